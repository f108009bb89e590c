"""Random numbers that belong to pictures: the same for a picture whatever batch, rank, process or device it is in.

A generator's numbers depend on how many were drawn before, so they change with the batch. Here every number is a hash
of (seed, picture, count): augmentation is a pure function, which needs no state saved, compiles, and gives one machine
or eight the same views. 32-bit hashes in int64 arithmetic, so that no product overflows and all devices agree bit for
bit. Not for cryptography.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # steps through 32-bit numbers as evenly as any odd constant

T = TypeVar("T", int, Tensor)


class Draws:
    """Uniform numbers for the pictures `index` [N] int64 under `seed`; every call to `uniform` gives new ones."""

    def __init__(self, seed: int, index: Tensor) -> None:
        # The seed is mixed first: under two that differ by little, neighbours would only change places. The constant
        # keeps the high half apart from what the mixing below makes of the low half.
        low = _mixed(seed & MASK)
        high = _mixed((seed >> 32) + low + GOLDEN & MASK)
        # Bijective in the low half of the index: two pictures of an epoch never share a key.
        self._keys = _mixed(_mixed((index & MASK) ^ low) ^ ((index >> 32) + high & MASK))
        self._count = 0

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def device(self) -> torch.device:
        return self._keys.device

    def uniform(self, *shape: int, between: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Float32 numbers [N, *shape] that are uniform `between` two limits.

        From 0 to 1 they are multiples of 2⁻²⁴ below 1, so that one times a whole number k stays below k when rounded.
        """
        count = math.prod(shape)
        places = torch.arange(self._count + 1, self._count + count + 1, device=self.device)
        self._count += count
        keys = self._keys[:, None]
        # Masked first, though they are small: of a range that is only added to and multiplied torch.compile makes an
        # index, whose constants, (count + 1) * GOLDEN here, have to fit 32 bits on a GPU.
        steps = (places & MASK) * GOLDEN & MASK
        # The key enters twice, so that the sequences of two pictures are not one sequence from two starting points.
        bits = _mixed(_mixed(keys ^ steps) + keys & MASK)
        low, high = between
        return ((bits >> 8).float() * 2**-24 * (high - low) + low).view(len(self), *shape)


def _mixed(x: T) -> T:
    """A bijection of 32-bit numbers, in [...] int64 or one int, that changes half the bits, whichever bit is flipped.

    Xorshift-multiply with the constants that the search of hash-prospector (C. Wellons) found least biased.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & MASK
    x = (x ^ (x >> 15)) * 0x735A2D97 & MASK
    return x ^ (x >> 15)
