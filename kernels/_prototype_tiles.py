"""What both passes over prototypes and samples share: classes of rows, and what the launchers pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import Scaling


@triton.jit
def load_classes(present_ptr, index, count, COMPACT: tl.constexpr):
    """The class of each row of prototypes, int32; -2 past the last.

    Which is no sample's, as -1 is no row's: comparing the two sides never matches what takes no part.
    """
    inside = index < count
    if COMPACT:
        return tl.load(present_ptr + index, mask=inside, other=-2)
    else:
        return tl.where(inside, index, -2)


@triton.jit
def load_labels(labels_ptr, index, count, num_classes, ignored_class):
    """The class of each sample, int32; -1 for ignored ones, for labels that are no class, and past the last."""
    label = tl.load(labels_ptr + index, mask=index < count, other=-1)
    # The range is compared in 64 bits, unsigned: 2^40 is no class, narrowed it would be class 0. What is left is small.
    within = label.to(tl.uint64, bitcast=True) < num_classes
    narrow = label.to(tl.int32)
    return tl.where(within & (narrow != ignored_class), narrow, -1)


@dataclass(frozen=True)
class Present:
    """The classes in the batch, when only their rows are computed; found and counted on the device, without a wait."""

    classes: Tensor  # [R] int64, R = min(N, K): present classes, then absent ones
    count: Tensor  # int32, how many are present

    def spread(self, rows: Tensor, num_classes: int, empty: float) -> Tensor:
        """The rows at their classes, `empty` at all others."""
        spread = rows.new_full((num_classes, *rows.shape[1:]), empty)
        return spread.index_copy_(0, self.classes, rows)


@dataclass(frozen=True)
class Operands:
    """The tensors as the kernels take them: one type for both sides, aligned rows, D a multiple of 16."""

    features: Tensor  # [N, D]
    prototypes: Tensor  # [K, D]
    labels: Tensor  # [N]
    present: Present | None
    ignored_class: int  # -1 where ignore_index is no class, so that the range alone leaves it out

    def listed(self, of_classes: Tensor) -> Tensor:
        """Of a tensor [K, ...] the rows that are computed."""
        return of_classes if self.present is None else of_classes.index_select(0, self.present.classes)

    def class_arguments(self) -> dict[str, Any]:
        """How the kernels tell which class a row of prototypes, or a sample, is of."""
        return {
            "num_classes": len(self.prototypes),
            "ignored_class": self.ignored_class,
            **self.present_arguments(),
        }

    def present_arguments(self) -> dict[str, Any]:
        """The same of a row of prototypes alone."""
        return {
            "present_ptr": None if self.present is None else self.present.classes.to(torch.int32),
            "num_present_ptr": None if self.present is None else self.present.count,
            "COMPACT": self.present is not None,
        }


@dataclass(frozen=True)
class Options(Scaling):
    exclude_own: bool

    def scalars(self) -> dict[str, Any]:
        """The arguments every kernel over logits takes."""
        return {**self.arguments(), "EXCLUDE_OWN": self.exclude_own}
