"""Backward over pairs of samples: the gradient of the rows, in one pass. The derivation is in pair_lse.py.

Narrow: a program keeps a block of rows and its accumulator on chip and streams the columns. These are for logits that
need their log-sum-exp subtracted before exp: pair_fixed.py has the others. Wide, and under masks: H is stored for a
bounded chunk of rows and columns, and a library product adds it to P.

Shapes: R rows, C columns, D width; S splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._epilogue import MAX_BACKWARD_SHIFT, Gradient, Scaling, finish, fp16_range, mm_fp32
from ._launch import cdiv
from ._pair_tiles import load_ids, load_mask, pair_logits, valid_pairs
from ._tiles import exp, load_inverse_temperature, load_rows, product, split_range
from .pair_forward import Pairs


@triton.jit
def _load_term(lse_ptr, grad_ptr, index, inside, FIXED_SHIFT: tl.constexpr):
    """(c, f) such that g exp(s - lse) is f exp(s - c), or f exp(s) with a fixed shift.

    Where nothing was summed (-inf), and outside, +inf stands in: exp(s - inf) = 0 for every logit, with no NaN.
    """
    factor = tl.load(grad_ptr + index, mask=inside, other=0.0)
    if FIXED_SHIFT:
        return tl.zeros_like(factor), factor
    else:
        lse = tl.load(lse_ptr + index, mask=inside, other=float("-inf"))
        empty = lse == float("-inf")
        return tl.where(empty, float("inf"), lse), tl.where(empty, 0.0, factor)


@triton.jit
def _load_side(
    lse_ptr,
    grad_lse_ptr,
    positives_ptr,
    grad_positives_ptr,
    index,
    inside,
    USED: tl.constexpr,
    INSIDE: tl.constexpr,
    FIXED_SHIFT: tl.constexpr,
):
    """What a side's log-sum-exps and its positives add to G: twice (c, f), see `_load_term`."""
    nothing = tl.zeros_like(index).to(tl.float32)
    if USED:
        lse, grad_lse = _load_term(lse_ptr, grad_lse_ptr, index, inside, FIXED_SHIFT)
        if INSIDE:
            positives, grad_positives = _load_term(positives_ptr, grad_positives_ptr, index, inside, FIXED_SHIFT)
        else:
            positives, grad_positives = nothing, tl.load(grad_positives_ptr + index, mask=inside, other=0.0)
        return lse, grad_lse, positives, grad_positives
    else:
        return nothing, nothing, nothing, nothing


@triton.jit
def _exponentials(
    logits_RC, c_R, f_R, c_C, f_C, HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr, FIXED_SHIFT: tl.constexpr
):
    """What the row's and the column's log-sum-exps add to G. s is symmetric: with a fixed shift one exp serves both."""
    if FIXED_SHIFT:
        exp_RC = exp(logits_RC)
        return exp_RC * f_R[:, None], exp_RC * f_C[None, :]
    else:
        of_rows_RC, of_cols_RC = tl.zeros_like(logits_RC), tl.zeros_like(logits_RC)
        if HAS_ROWS:
            of_rows_RC = exp(logits_RC - c_R[:, None]) * f_R[:, None]
        if HAS_COLS:
            of_cols_RC = exp(logits_RC - c_C[None, :]) * f_C[None, :]
        return of_rows_RC, of_cols_RC


@triton.jit
def _pair_grads(
    logits_RC,
    valid_RC,
    row_positive_RC,
    col_positive_RC,
    lse_R,
    grad_lse_R,
    positives_R,
    grad_positives_R,
    lse_C,
    grad_lse_C,
    positives_C,
    grad_positives_C,
    HAS_ROWS: tl.constexpr,
    HAS_COLS: tl.constexpr,
    HAS_MASK: tl.constexpr,  # without a mask both sides have the same positives
    INSIDE: tl.constexpr,
    FIXED_SHIFT: tl.constexpr,
):
    """G of one tile in fp32, positives included."""
    of_rows_RC, of_cols_RC = _exponentials(
        logits_RC, lse_R, grad_lse_R, lse_C, grad_lse_C, HAS_ROWS, HAS_COLS, FIXED_SHIFT
    )
    grads_RC = of_rows_RC + of_cols_RC
    if INSIDE:
        of_rows_RC, of_cols_RC = _exponentials(
            logits_RC, positives_R, grad_positives_R, positives_C, grad_positives_C, HAS_ROWS, HAS_COLS, FIXED_SHIFT
        )
    else:
        of_rows_RC, of_cols_RC = grad_positives_R[:, None], grad_positives_C[None, :]
    if HAS_MASK:
        grads_RC += tl.where(row_positive_RC, of_rows_RC, 0.0) + tl.where(col_positive_RC, of_cols_RC, 0.0)
    else:
        grads_RC += tl.where(row_positive_RC, of_rows_RC + of_cols_RC, 0.0)
    return tl.where(valid_RC, grads_RC, 0.0)


@triton.jit(do_not_specialize=["offset"])
def _pair_bwd_kernel(
    a_ptr,  # [R, D] rows
    b_ptr,  # [C, D] columns
    inv_a_ptr,  # [R] fp32
    inv_b_ptr,  # [C] fp32
    row_ids_ptr,  # [R] int64
    col_ids_ptr,  # [C] int64
    row_lse_ptr,  # [R] fp32, as the three after it, when HAS_ROWS
    grad_row_lse_ptr,
    row_positives_ptr,
    grad_row_positives_ptr,
    col_lse_ptr,  # [C] fp32, as the three after it, when HAS_COLS
    grad_col_lse_ptr,
    col_positives_ptr,
    grad_col_positives_ptr,
    temperature_ptr,  # [1] fp32 when HAS_TEMPERATURE
    range_ptr,  # [1] fp32 power of two that brings G into fp16's range, when HAS_RANGE
    partials_ptr,  # [S, R, D] fp32: P of each split
    R,
    C,
    D,
    stride_a,
    stride_b,
    stride_partials,
    offset,  # column offset + k is row k's own
    inv_temperature,
    HAS_ROWS: tl.constexpr,
    HAS_COLS: tl.constexpr,
    INSIDE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    id_R = load_ids(row_ids_ptr, row_R, inside_R, False)
    inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    inv_a_R = tl.load(inv_a_ptr + row_R, mask=inside_R, other=0.0)
    lse_R, grad_lse_R, positives_R, grad_positives_R = _load_side(
        row_lse_ptr, grad_row_lse_ptr, row_positives_ptr, grad_row_positives_ptr, row_R, inside_R,
        HAS_ROWS, INSIDE, False,
    )  # fmt: skip
    a_RD = load_rows(a_ptr, row_R, inside_R, stride_a, 0, D, BLOCK_D)
    fp16_range = 1.0
    if HAS_RANGE:
        fp16_range = tl.load(range_ptr)

    sum_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    first, last = split_range(C, BLOCK_C)
    for start in range(first, last, BLOCK_C):
        row_C = start + tl.arange(0, BLOCK_C)
        inside_C = row_C < C
        id_C = load_ids(col_ids_ptr, row_C, inside_C, False)
        b_CD = load_rows(b_ptr, row_C, inside_C, stride_b, 0, D, BLOCK_D)
        inv_b_C = tl.load(inv_b_ptr + row_C, mask=inside_C, other=0.0)
        lse_C, grad_lse_C, positives_C, grad_positives_C = _load_side(
            col_lse_ptr, grad_col_lse_ptr, col_positives_ptr, grad_col_positives_ptr, row_C, inside_C,
            HAS_COLS, INSIDE, False,
        )  # fmt: skip
        dots_RC = tl.dot(a_RD, b_CD.T, input_precision=INPUT_PRECISION)
        logits_RC = pair_logits(dots_RC, inv_a_R, inv_b_C, inv_temp)
        valid_RC = valid_pairs(id_R, id_C, row_R + offset, row_C)
        positive_RC = id_R[:, None] == id_C[None, :]
        grads_RC = _pair_grads(
            logits_RC, valid_RC, positive_RC, positive_RC,
            lse_R, grad_lse_R, positives_R, grad_positives_R,
            lse_C, grad_lse_C, positives_C, grad_positives_C,
            HAS_ROWS, HAS_COLS, False, INSIDE, False,
        )  # fmt: skip
        weights_RC = (grads_RC * (inv_b_C * fp16_range)[None, :]).to(b_CD.dtype)
        sum_RD = tl.dot(weights_RC, b_CD, sum_RD, input_precision=INPUT_PRECISION)

    sum_RD *= (inv_a_R / fp16_range)[:, None]
    depth = tl.arange(0, BLOCK_D)
    partials = partials_ptr + tl.program_id(1).to(tl.int64) * stride_partials + row_R.to(tl.int64)[:, None] * D
    tl.store(partials + depth[None, :], sum_RD, mask=inside_R[:, None] & (depth < D)[None, :])


@triton.jit(
    do_not_specialize=["offset", "row_mask_row_step", "row_mask_col_step", "col_mask_row_step", "col_mask_col_step"]
)
def _pair_bwd_tile_kernel(
    a_ptr,  # [R, D]: this chunk of the rows, and so are all vectors over rows
    b_ptr,  # [C, D]: this chunk of the columns, and so are all vectors over columns
    inv_a_ptr,
    inv_b_ptr,
    row_ids_ptr,  # [R] int64, without masks
    col_ids_ptr,
    row_lse_ptr,
    grad_row_lse_ptr,
    row_positives_ptr,
    grad_row_positives_ptr,
    col_lse_ptr,
    grad_col_lse_ptr,
    col_positives_ptr,
    grad_col_positives_ptr,
    row_mask_ptr,  # [R, C] bytes, any strides, when HAS_MASK and HAS_ROWS: positives of the rows
    col_mask_ptr,  # the same of the columns
    temperature_ptr,
    range_ptr,
    h_ptr,  # [R, C] in the operand's type
    R,
    C,
    D,
    stride_a,
    stride_b,
    stride_h,
    row_mask_row_step,
    row_mask_col_step,
    col_mask_row_step,
    col_mask_col_step,
    offset,  # within the chunk, negative where own columns lie before it
    inv_temperature,
    HAS_ROWS: tl.constexpr,
    HAS_COLS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    INSIDE: tl.constexpr,
    FIXED_SHIFT: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """H of one tile."""
    row_blocks = tl.cdiv(R, BLOCK_R)
    row_R = tl.program_id(0) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    row_C = tl.program_id(0) // row_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_R, inside_C = row_R < R, row_C < C
    inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    dots_RC = product(
        a_ptr, b_ptr, row_R, row_C, inside_R, inside_C, stride_a, stride_b, D,
        BLOCK_R, BLOCK_C, BLOCK_D, INPUT_PRECISION,
    )  # fmt: skip
    id_R = load_ids(row_ids_ptr, row_R, inside_R, HAS_MASK)
    id_C = load_ids(col_ids_ptr, row_C, inside_C, HAS_MASK)
    inv_a_R = tl.load(inv_a_ptr + row_R, mask=inside_R, other=0.0)
    inv_b_C = tl.load(inv_b_ptr + row_C, mask=inside_C, other=0.0)
    lse_R, grad_lse_R, positives_R, grad_positives_R = _load_side(
        row_lse_ptr, grad_row_lse_ptr, row_positives_ptr, grad_row_positives_ptr, row_R, inside_R,
        HAS_ROWS, INSIDE, FIXED_SHIFT,
    )  # fmt: skip
    lse_C, grad_lse_C, positives_C, grad_positives_C = _load_side(
        col_lse_ptr, grad_col_lse_ptr, col_positives_ptr, grad_col_positives_ptr, row_C, inside_C,
        HAS_COLS, INSIDE, FIXED_SHIFT,
    )  # fmt: skip
    logits_RC = pair_logits(dots_RC, inv_a_R, inv_b_C, inv_temp)
    valid_RC = valid_pairs(id_R, id_C, row_R + offset, row_C)
    row_positive_RC = id_R[:, None] == id_C[None, :]
    col_positive_RC = row_positive_RC
    if HAS_MASK and HAS_ROWS:
        row_positive_RC = load_mask(
            row_mask_ptr, row_R, row_C, inside_R, inside_C, row_mask_row_step, row_mask_col_step
        )
    if HAS_MASK and HAS_COLS:
        col_positive_RC = load_mask(
            col_mask_ptr, row_R, row_C, inside_R, inside_C, col_mask_row_step, col_mask_col_step
        )
    grads_RC = _pair_grads(
        logits_RC, valid_RC, row_positive_RC, col_positive_RC,
        lse_R, grad_lse_R, positives_R, grad_positives_R,
        lse_C, grad_lse_C, positives_C, grad_positives_C,
        HAS_ROWS, HAS_COLS, HAS_MASK, INSIDE, FIXED_SHIFT,
    )  # fmt: skip
    if HAS_RANGE:
        inv_a_R *= tl.load(range_ptr)
    h_RC = grads_RC * inv_a_R[:, None] * inv_b_C[None, :]
    h_ptrs = h_ptr + row_R.to(tl.int64)[:, None] * stride_h + row_C[None, :]
    tl.store(h_ptrs, h_RC, mask=inside_R[:, None] & inside_C[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


@dataclass(frozen=True)
class Side:
    """Log-sum-exps and positives of the rows, or of the columns, and their upstream gradients; fp32, one a sample."""

    lse: Tensor
    grad_lse: Tensor
    positives: Tensor
    grad_positives: Tensor

    @classmethod
    def of(cls, side: Any) -> Side:
        """From anything with these fields, as the kernels read them."""
        return cls(*(getattr(side, field.name).contiguous() for field in fields(cls)))

    def part(self, part: slice) -> Side:
        return Side(*(tensor[part] for tensor in vars(self).values()))

    def upstream(self) -> tuple[Tensor, Tensor]:
        """The gradients that reach G: that of an empty sum does not."""
        return torch.where(self.lse == float("-inf"), 0.0, self.grad_lse), self.grad_positives

    def taken_apart(self, inside: bool) -> Side:
        """With g exp(-lse) in the place of g, for a fixed shift."""

        def factor(lse: Tensor, grad: Tensor) -> Tensor:
            return torch.where(lse == float("-inf"), 0.0, grad * torch.exp(-lse))

        grad_positives = factor(self.positives, self.grad_positives) if inside else self.grad_positives
        return Side(self.lse, factor(self.lse, self.grad_lse), self.positives, grad_positives)


@dataclass(frozen=True)
class LossSide(Side):
    """Of samples that are rows and columns, with gradients that are zero where nothing was summed."""

    def upstream(self) -> tuple[Tensor, Tensor]:
        return self.grad_lse, self.grad_positives


def side_arguments(side: Side | None, prefix: str = "") -> dict[str, Tensor | None]:
    """How the kernels learn a side; of one that is no anchor, None, they get no pointers."""
    lse, grad_lse, positives, grad_positives = [None] * 4 if side is None else vars(side).values()
    return {
        f"{prefix}lse_ptr": lse,
        f"grad_{prefix}lse_ptr": grad_lse,
        f"{prefix}positives_ptr": positives,
        f"grad_{prefix}positives_ptr": grad_positives,
    }


@dataclass(frozen=True)
class Backward:
    """All that either backward reads."""

    pairs: Pairs
    inv_rows: Tensor  # [R]
    inv_columns: Tensor  # [C]
    row_side: Side | None
    column_side: Side | None
    row_mask: Tensor | None  # [R, C] bool
    column_mask: Tensor | None  # [R, C] bool
    inside: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.pairs.rows.dtype

    @property
    def has_mask(self) -> bool:
        return self.pairs.row_ids is None

    def upstream(self) -> Iterator[Tensor]:
        """Made when they are read, which takes launches: for fp16 alone."""
        sides = [self.row_side] if self.row_side is self.column_side else [self.row_side, self.column_side]
        return (g for side in sides if side is not None for g in side.upstream())

    def taken_apart(self, scaling: Scaling) -> Backward:
        """With the sides as the kernels read them when the shift is fixed."""
        if not scaling.fixed_shift(self.dtype, MAX_BACKWARD_SHIFT):
            return self
        row_side, column_side = (
            None if side is None else side.taken_apart(self.inside) for side in (self.row_side, self.column_side)
        )
        return replace(self, row_side=row_side, column_side=column_side)

    def chunk(self, rows: slice, columns: slice) -> Backward:
        pairs = self.pairs
        return Backward(
            Pairs(
                pairs.rows[rows],
                pairs.columns[columns],
                None if pairs.row_ids is None else pairs.row_ids[rows],
                None if pairs.column_ids is None else pairs.column_ids[columns],
                pairs.own_offset + rows.start - columns.start,
            ),
            self.inv_rows[rows],
            self.inv_columns[columns],
            None if self.row_side is None else self.row_side.part(rows),
            None if self.column_side is None else self.column_side.part(columns),
            None if self.row_mask is None else self.row_mask[rows, columns],
            None if self.column_mask is None else self.column_mask[rows, columns],
            self.inside,
        )

    def arguments(self, scaling: Scaling, fp16_range: Tensor | None) -> dict[str, Any]:
        pairs = self.pairs
        return {
            "a_ptr": pairs.rows,
            "b_ptr": pairs.columns,
            "inv_a_ptr": self.inv_rows,
            "inv_b_ptr": self.inv_columns,
            "row_ids_ptr": pairs.row_ids,
            "col_ids_ptr": pairs.column_ids,
            **side_arguments(self.row_side, "row_"),
            **side_arguments(self.column_side, "col_"),
            "range_ptr": fp16_range,
            "R": len(pairs.rows),
            "C": len(pairs.columns),
            "D": pairs.rows.shape[1],
            "stride_a": pairs.rows.stride(0),
            "stride_b": pairs.columns.stride(0),
            "offset": pairs.own_offset,
            "HAS_ROWS": self.row_side is not None,
            "HAS_COLS": self.column_side is not None,
            "INSIDE": self.inside,
            "HAS_RANGE": fp16_range is not None,
            "INPUT_PRECISION": _launch.input_precision(self.dtype),
            **scaling.arguments(),
        }

    def mask_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"HAS_MASK": self.has_mask}
        for side, mask in (("row", self.row_mask), ("col", self.column_mask)):
            arguments |= {
                f"{side}_mask_ptr": None if mask is None else mask.view(torch.uint8),
                f"{side}_mask_row_step": 0 if mask is None else mask.stride(0),
                f"{side}_mask_col_step": 0 if mask is None else mask.stride(1),
            }
        return arguments


def narrow(scaling: Scaling, backward: Backward, gradient: Gradient) -> None:
    """The gradient by recomputing the logits, a bounded number of rows at a time: their P passes through memory."""
    (num_rows, dim), num_columns = gradient.x.shape, len(backward.pairs.columns)
    weights_range = fp16_range(backward.dtype, backward.upstream(), backward.inv_columns)
    for rows in _launch.row_chunks(num_rows, 4 * dim):
        chunk = backward.chunk(rows, slice(0, num_columns))
        # The kernel has undone the scale of fp16.
        finish(scaling, None, (gradient.rows(rows), _launch_narrow(scaling, chunk, weights_range)))


def _launch_narrow(scaling: Scaling, chunk: Backward, weights_range: Tensor | None) -> Tensor:
    """P of a chunk, in parts [S, R, D]."""
    (num_rows, dim), num_columns = chunk.pairs.rows.shape, len(chunk.pairs.columns)
    crowded = chunk.inside or chunk.row_side is None
    tables = _launch.PAIR_BACKWARD_NARROW_CROWDED if crowded else _launch.PAIR_BACKWARD_NARROW
    config = _launch.narrow_config(tables, chunk.pairs.rows)
    row_blocks = cdiv(num_rows, config.block_r)
    splits = _launch.split_count(row_blocks, cdiv(num_columns, config.block_c), 4 * num_rows * dim)
    partials = chunk.inv_rows.new_empty(splits, num_rows, dim)
    _pair_bwd_kernel[(row_blocks, splits)](
        partials_ptr=partials,
        stride_partials=num_rows * dim,
        **chunk.arguments(scaling, weights_range),
        **config.launch_options(),
    )
    return partials


def wide(scaling: Scaling, backward: Backward, gradient: Gradient) -> None:
    """The gradient through H, a bounded chunk at a time; P stays in fp32 until all columns are in."""
    (num_rows, dim), num_columns = gradient.x.shape, len(backward.pairs.columns)
    weights_range = fp16_range(backward.dtype, backward.upstream(), backward.inv_rows, backward.inv_columns)
    backward = backward.taken_apart(scaling)
    for rows, column_parts in _launch.pair_chunks(num_rows, num_columns, backward.dtype.itemsize, dim):
        whole_sum = None
        for columns in column_parts:
            chunk = backward.chunk(rows, columns)
            whole_sum = mm_fp32(_launch_tile(scaling, chunk, weights_range), chunk.pairs.columns, whole_sum)
        finish(scaling, weights_range, (gradient.rows(rows), whole_sum[None]))


def _launch_tile(scaling: Scaling, chunk: Backward, weights_range: Tensor | None) -> Tensor:
    """H of a chunk, in the operand's type."""
    rows = chunk.pairs.rows
    num_rows, num_columns = len(rows), len(chunk.pairs.columns)
    crowded = chunk.inside or chunk.has_mask
    tables = _launch.PAIR_BACKWARD_WIDE_CROWDED if crowded else _launch.PAIR_BACKWARD_WIDE
    config = _launch.wide_config(tables, rows, num_columns)
    h = rows.new_empty(num_rows, cdiv(num_columns, 64) * 64)  # padded: library products want aligned rows
    _pair_bwd_tile_kernel[(cdiv(num_rows, config.block_r) * cdiv(num_columns, config.block_c),)](
        h_ptr=h,
        stride_h=h.stride(0),
        FIXED_SHIFT=scaling.fixed_shift(chunk.dtype, MAX_BACKWARD_SHIFT),
        **chunk.arguments(scaling, weights_range),
        **chunk.mask_arguments(),
        **config.launch_options(),
    )
    return h[:, :num_columns]
