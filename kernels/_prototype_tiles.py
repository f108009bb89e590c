"""What both passes over prototypes and samples share: classes of rows, logits, and what the launchers pass on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import Scaling


@triton.jit
def load_classes(
    index,
    count,
    labels_ptr,
    present_ptr,
    num_classes,
    ignore_index,
    OF_CLASSES: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """The class each row of an operand belongs to, int32; negative for rows that take no part.

    Those have different values among classes and samples, so that comparing the two sides never matches them.
    """
    inside = index < count
    if OF_CLASSES:
        if COMPACT:
            return tl.load(present_ptr + index, mask=inside, other=-2)
        else:
            return tl.where(inside, index, -2)
    else:
        # ignore_index and the range are compared in int64: a label of 2^40 is no class, narrowed it would be class 0.
        label = tl.load(labels_ptr + index, mask=inside, other=-1)
        valid = (label != ignore_index) & (label >= 0) & (label < num_classes)
        return tl.where(valid, label, -1).to(tl.int32)


@triton.jit
def class_logits(dots_RC, inv_R, inv_C, inv_temp, ROWS_ARE_CLASSES: tl.constexpr):
    """s from the bare products.

    The temperature joins the classes, and the factors meet before the product: a logit then has the same bits
    whichever operand owns the rows, and exp(s - lse) in the backward suffers only the rounding of lse. That is also why
    logits are kept in nats, not in units of log 2: converting lse, and back, would be the largest error at small τ.
    """
    if ROWS_ARE_CLASSES:
        inv_R = inv_R * inv_temp
    else:
        inv_C = inv_C * inv_temp
    return dots_RC * (inv_R[:, None] * inv_C[None, :])


@dataclass(frozen=True)
class Present:
    """The classes in the batch, when only their rows are computed; found and counted on the device, without a wait."""

    classes: Tensor  # [R] int64, R = min(N, K): present classes, then absent ones
    count: Tensor  # int32, how many are present

    def take(self, vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.index_select(0, self.classes)

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

    def class_arguments(self) -> dict:
        """How the kernels tell which class a row of prototypes is."""
        return {
            "num_classes": len(self.prototypes),
            "present_ptr": None if self.present is None else self.present.classes.to(torch.int32),
            "num_present_ptr": None if self.present is None else self.present.count,
            "COMPACT": self.present is not None,
        }


@dataclass(frozen=True)
class Options(Scaling):
    ignore_index: int
    exclude_own: bool

    def scalars(self) -> dict[str, Any]:
        """The arguments every kernel over logits takes."""
        return {**self.arguments(), "ignore_index": self.ignore_index, "EXCLUDE_OWN": self.exclude_own}
