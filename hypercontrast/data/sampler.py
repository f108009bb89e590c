"""Which pictures make up which batch on which rank: a function of (seed, epoch) alone, so nothing has to be saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def derived_seed(*parts: int | str) -> int:
    """An independent 63-bit seed for every combination of `parts`, e.g. (seed, epoch, "batches")."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    return -(-num_samples // batch_size)


def epoch_batches(
    num_samples: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, int]]:
    """This rank's batches of an epoch: pairs of (indices [n], size of the global batch).

    Every sample comes exactly once an epoch. The permutation is cut into ceil(N / batch_size) global batches, and each
    of these among the ranks, as evenly as integers allow: no straggling last batch, and no rank without samples while
    a global batch holds at least `world` of them. The prototype losses are exact under uneven local batches.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch, "batches"))
    order = torch.randperm(num_samples, generator=generator)
    for batch in order.tensor_split(steps_per_epoch(num_samples, batch_size)):
        yield batch.tensor_split(world)[rank], len(batch)
