"""What a backward's tiles read of each column, made ready once, and what they make of it: weights of half types.

A thread of a tile holds few rows of many columns, so what is done to a column there is done many times over. Hence a
small kernel does it for all columns first. Weights of the product are G∘i with i the columns' inverse norms (see
prototype_lse.py); i joins the exponents, as log2 i, and where a column takes no part that is -inf.

Of column j with class y and, if its side was summed, log-sum-exp l and upstream gradient g:

    columns [padded, 4]  what makes its dot products logits in units of log 2; y (int32 bits, negative where it takes
                         no part); i times the gradient of its positive (i, of classes); log2 i or -inf
    sides [padded, 2]    g; log2 i - l log2(e)

side by side, so that one load brings them all, and padded, so that a tile checks no bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._epilogue import Gradient
from ._prototype_tiles import Operands, Options, load_classes, load_labels
from ._tiles import LOG2E, load_inverse_temperature


@triton.jit
def load_side(lse_ptr, grad_ptr, row, inside, USED: tl.constexpr):
    """Log-sum-exp and its upstream gradient, of one side of a tile.

    Where nothing was summed (-inf), and outside, +inf stands in: exp(s - inf) = 0 for every logit, with no NaN.
    """
    if USED:
        lse = tl.load(lse_ptr + row, mask=inside, other=float("inf"))
        grad = tl.load(grad_ptr + row, mask=inside, other=0.0)
        return tl.where(lse == float("-inf"), float("inf"), lse), grad
    else:
        return tl.zeros_like(row).to(tl.float32), tl.zeros_like(row).to(tl.float32)


@triton.jit
def _store_columns(
    columns_ptr, sides_ptr, column, padded, inv, scale, label, positive, lse_ptr, grad_ptr, inside, fp16_range,
    HAS_SIDE: tl.constexpr,
):  # fmt: skip
    there = column < padded
    addend = tl.where(label >= 0, tl.log2(inv), float("-inf"))
    tl.store(columns_ptr + 4 * column, scale, mask=there)
    tl.store(columns_ptr + 4 * column + 1, label.to(tl.float32, bitcast=True), mask=there)
    tl.store(columns_ptr + 4 * column + 2, positive * inv, mask=there)
    tl.store(columns_ptr + 4 * column + 3, addend, mask=there)
    if HAS_SIDE:
        lse, grad = load_side(lse_ptr, grad_ptr, column, inside, True)
        tl.store(sides_ptr + 2 * column, grad * fp16_range, mask=there)
        tl.store(sides_ptr + 2 * column + 1, addend - lse * LOG2E, mask=there)


@triton.jit(do_not_specialize=["ignored_class"])
def _columns_kernel(
    inv_z_ptr,  # [N] fp32
    inv_w_ptr,  # [R] fp32, and so are all vectors over (present) classes
    labels_ptr,
    row_lse_ptr,
    col_lse_ptr,
    grad_row_ptr,
    grad_col_ptr,
    grad_pos_ptr,
    temperature_ptr,
    present_ptr,
    num_present_ptr,
    sample_range_ptr,  # scales of fp16 where samples, or classes, are the columns, when HAS_RANGE
    class_range_ptr,
    sample_columns_ptr,  # [padded_N, 4] fp32
    sample_sides_ptr,  # [padded_N, 2] fp32 when HAS_COLS
    class_columns_ptr,  # [padded_R, 4] fp32, if the grid reaches them
    class_sides_ptr,  # [padded_R, 2] fp32 when HAS_ROWS
    N,
    R,
    padded_N,
    padded_R,
    num_classes,
    ignored_class,
    inv_temperature,
    HAS_ROWS: tl.constexpr,
    HAS_COLS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    COMPACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    sample_blocks = padded_N // BLOCK
    fp16_range = 1.0
    if block < sample_blocks:
        row = block * BLOCK + tl.arange(0, BLOCK)
        inside = row < N
        if HAS_RANGE:
            fp16_range = tl.load(sample_range_ptr)
        inv = tl.load(inv_z_ptr + row, mask=inside, other=0.0)
        label = load_labels(labels_ptr, row, N, num_classes, ignored_class)
        positive = tl.load(grad_pos_ptr + row, mask=inside, other=0.0) * fp16_range
        _store_columns(
            sample_columns_ptr, sample_sides_ptr, row, padded_N, inv, inv, label, positive, col_lse_ptr, grad_col_ptr,
            inside, fp16_range, HAS_COLS,
        )  # fmt: skip
    else:
        row = (block - sample_blocks) * BLOCK + tl.arange(0, BLOCK)
        rows = tl.load(num_present_ptr) if COMPACT else R
        inside = row < rows
        if HAS_RANGE:
            fp16_range = tl.load(class_range_ptr)
        inv = tl.load(inv_w_ptr + row, mask=inside, other=0.0)
        label = load_classes(present_ptr, row, rows, COMPACT)
        inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
        _store_columns(
            class_columns_ptr, class_sides_ptr, row, padded_R, inv, inv * (inv_temp * LOG2E), label, 1.0, row_lse_ptr,
            grad_row_ptr, inside, fp16_range, HAS_ROWS,
        )  # fmt: skip


@triton.jit
def column_weights(
    dots_RC,
    column_C,  # their numbers
    columns_ptr,
    sides_ptr,
    class_R,
    scale_R,
    lse_R,  # in units of log 2
    grad_R,
    positive_R,  # when POSITIVE_OF_ROWS
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    POSITIVE_OF_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """G∘i of a tile, positives included, in fp32."""
    terms_C4 = tl.load(columns_ptr + column_C[:, None] * 4 + tl.arange(0, 4)[None, :])
    even_C2, odd_C2 = tl.split(tl.reshape(terms_C4, (BLOCK_C, 2, 2)))
    scale_C, positive_C = tl.split(even_C2)
    class_C, addend_C = tl.split(odd_C2)
    logits_RC = dots_RC * (scale_R[:, None] * scale_C[None, :])
    if HAS_A:
        weights_RC = grad_R[:, None] * tl.exp2(logits_RC + (addend_C[None, :] - lse_R[:, None]))
    if HAS_B:
        sides_C2 = tl.load(sides_ptr + column_C[:, None] * 2 + tl.arange(0, 2)[None, :])
        grad_C, side_C = tl.split(sides_C2)
        of_B_RC = grad_C[None, :] * tl.exp2(logits_RC + side_C[None, :])
        weights_RC = weights_RC + of_B_RC if HAS_A else of_B_RC
    positive_RC = positive_R[:, None] * positive_C[None, :] if POSITIVE_OF_ROWS else positive_C[None, :]
    own_RC = class_R[:, None] == class_C.to(tl.int32, bitcast=True)[None, :]
    if EXCLUDE_OWN:  # before the sum that both have: to choose between sum and positive would take registers
        weights_RC = tl.where(own_RC, 0.0, weights_RC)
    return tl.where(own_RC, weights_RC + positive_RC, weights_RC)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


@dataclass(frozen=True)
class Side(Gradient):
    """One operand in the backward: what was kept of it, the upstream gradient of its log-sum-exp, and where dX goes."""

    lse: Tensor | None  # [R], None when its log-sum-exp is not used
    upstream: Tensor | None  # [R]


class Columns(NamedTuple):
    columns: Tensor  # [padded, 4] fp32
    sides: Tensor | None  # [padded, 2] fp32

    def part(self, part: slice) -> Columns:
        return Columns(self.columns[part.start :], None if self.sides is None else self.sides[part.start :])

    def arguments(self) -> dict[str, Tensor | None]:
        return {"columns_ptr": self.columns, "sides_ptr": self.sides}


def columns(
    operands: Operands,
    options: Options,
    classes: Side,
    samples: Side,
    grad_pos: Tensor,
    ranges: tuple[Tensor | None, Tensor | None],
    *,
    of_classes: bool,
) -> tuple[Columns, Columns | None]:
    """Samples as columns and, if asked for, classes; `ranges` are the scales of fp16 for either."""
    counts = len(samples.x), len(classes.x)
    padded = tuple(map(_launch.padded_columns, counts))
    sample_columns = _empty(grad_pos, padded[0], samples.lse is not None)
    class_columns = _empty(grad_pos, padded[1], classes.lse is not None) if of_classes else None
    _columns_kernel[((padded[0] + padded[1] * of_classes) // _launch.COLUMN_BLOCKS["BLOCK"],)](
        inv_z_ptr=samples.inv,
        inv_w_ptr=classes.inv,
        labels_ptr=operands.labels,
        row_lse_ptr=classes.lse,
        col_lse_ptr=samples.lse,
        grad_row_ptr=classes.upstream,
        grad_col_ptr=samples.upstream,
        grad_pos_ptr=grad_pos,
        sample_range_ptr=ranges[0],
        class_range_ptr=ranges[1],
        sample_columns_ptr=sample_columns.columns,
        sample_sides_ptr=sample_columns.sides,
        class_columns_ptr=class_columns.columns if class_columns else grad_pos,  # not reached: any pointer will do
        class_sides_ptr=None if classes.lse is None else (class_columns.sides if class_columns else grad_pos),
        N=counts[0],
        R=counts[1],
        padded_N=padded[0],
        padded_R=padded[1],
        HAS_ROWS=classes.lse is not None,
        HAS_COLS=samples.lse is not None,
        HAS_RANGE=ranges[0] is not None,
        **operands.class_arguments(),
        **options.arguments(),
        **_launch.COLUMN_BLOCKS,
    )
    return sample_columns, class_columns


def _empty(like: Tensor, padded: int, has_side: bool) -> Columns:
    return Columns(like.new_empty(padded, 4), like.new_empty(padded, 2) if has_side else None)
