"""Which pictures make up which batch on which rank: a function of (seed, epoch) alone, so nothing has to be saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# How the chance of a class to be drawn grows with its size: n_c to this power.
CLASS_POWERS = {"sqrt": 0.5, "balanced": 0.0}


class Share(NamedTuple):
    """One rank's part of a global batch."""

    indices: Tensor  # [n], places of the pictures in their set
    places: Tensor  # [n], their places in the epoch: a picture may come twice, a place only once
    global_size: int  # pictures of all ranks together


def derived_seed(*parts: int | str) -> int:
    """An independent 63-bit seed for every combination of `parts`, e.g. (seed, epoch, "batches")."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    return -(-num_samples // batch_size)


def epoch_batches(
    labels: Tensor,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    sampling: str = "all",
) -> Iterator[Share]:
    """This rank's shares of an epoch's global batches, on the device of `labels` [N].

    sampling: "all" takes every sample exactly once an epoch. "sqrt" and "balanced" draw N samples with replacement,
    classes in proportion to the square root of their size or all alike (Kang et al. 2020). The epoch is cut into
    ceil(N / batch_size) global batches, and each of these among the ranks, as evenly as integers allow: no straggling
    last batch, and no rank without samples while a global batch holds at least `world` of them. The losses are exact
    under uneven local batches.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch, "batches"))
    if sampling == "all":
        order = torch.randperm(len(labels), generator=generator)
    else:
        counts = torch.bincount(labels).double()
        chances = counts[labels] ** (CLASS_POWERS[sampling] - 1)
        # As torch.multinomial draws, but that one takes at most 2**24 pictures.
        reached = chances.cpu().cumsum(0)
        thrown = torch.rand(len(labels), dtype=torch.float64, generator=generator)
        order = torch.searchsorted(reached / reached[-1], thrown)
    # To the device at once: a copy at every step would make a GPU wait.
    order = order.to(labels.device)
    places = torch.arange(len(labels), device=labels.device)
    steps = steps_per_epoch(len(labels), batch_size)
    for indices, place in zip(order.tensor_split(steps), places.tensor_split(steps), strict=True):
        yield Share(indices.tensor_split(world)[rank], place.tensor_split(world)[rank], len(indices))
