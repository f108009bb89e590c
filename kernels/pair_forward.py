"""Forward over pairs of samples: log-sum-exps and positives. The derivation is in pair_lse.py.

Rectangular: a program owns a block of rows and streams the columns. Triangular, when the columns are the rows: s is
symmetric, so a tile above the diagonal serves its rows by its row sums and its columns by its column sums. The latter
leave one partial result for each block of rows (a strip); strips are taken in groups whose partial results fit the
scratch memory, and each group's are joined to the running result in a fixed order.

Positives that are only added up need no tile: Σ_p s[k, p] = u_k·(C - u_own)/τ, where C is the sum of the unit vectors
of k's class. A mask, and the log-sum-exp of positives, are accumulated in the tiles of the rectangular pass.

Shapes: R rows, C columns, D width; S splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, class_sums
from ._epilogue import MAX_FIXED_SHIFT, Scaling, combine
from ._launch import cdiv
from ._pair_tiles import load_ids, load_mask, pair_logits, valid_pairs
from ._tiles import (
    add_exponentials,
    empty_sum,
    inverse,
    load_inverse_temperature,
    load_rows,
    log_sum,
    product,
    split_range,
)


@triton.jit
def _norms_kernel(
    x_ptr,  # [R, D]
    inv_ptr,  # [R] fp32
    R,
    D,
    stride_x,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    squares_R = tl.zeros((BLOCK_R,), tl.float32)
    for d in range(0, D, BLOCK_D):
        x_RD = load_rows(x_ptr, row_R, inside_R, stride_x, d, D, BLOCK_D).to(tl.float32)
        squares_R += tl.sum(x_RD * x_RD, axis=1)
    tl.store(inv_ptr + row_R, inverse(squares_R, NORMALIZE), mask=inside_R)


@triton.jit(do_not_specialize=["first_class", "last_class", "offset"])
def _class_positives_kernel(
    a_ptr,  # [R, D]
    b_ptr,  # [C, D]
    inv_a_ptr,  # [R] fp32
    inv_b_ptr,  # [C] fp32
    row_ids_ptr,  # [R] int64
    col_ids_ptr,  # [C] int64
    sums_ptr,  # [last_class - first_class, D] fp32: Σ of the unit columns of each class
    temperature_ptr,
    positives_ptr,  # [R] fp32, written for rows of these classes
    R,
    C,
    D,
    stride_a,
    stride_b,
    first_class,
    last_class,
    offset,
    inv_temperature,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    id_R = tl.load(row_ids_ptr + row_R, mask=row_R < R, other=-1)
    here_R = (id_R >= first_class) & (id_R < last_class)
    own_R = row_R + offset
    own_R = tl.where(here_R & (own_R >= 0) & (own_R < C), own_R, -1)
    own_id_R = tl.load(col_ids_ptr + own_R, mask=own_R >= 0, other=-1)
    has_own_R = (own_R >= 0) & (own_id_R == id_R)  # else the class's sum is without it
    inv_own_R = tl.load(inv_b_ptr + own_R, mask=has_own_R, other=0.0)
    dots_R = tl.zeros((BLOCK_R,), tl.float32)
    for d in range(0, D, BLOCK_D):
        a_RD = load_rows(a_ptr, row_R, here_R, stride_a, d, D, BLOCK_D).to(tl.float32)
        sum_RD = load_rows(sums_ptr, id_R - first_class, here_R, D, d, D, BLOCK_D)
        own_RD = load_rows(b_ptr, own_R, has_own_R, stride_b, d, D, BLOCK_D).to(tl.float32)
        dots_R += tl.sum(a_RD * (sum_RD - own_RD * inv_own_R[:, None]), axis=1)
    inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    inv_a_R = tl.load(inv_a_ptr + row_R, mask=here_R, other=0.0)
    tl.store(positives_ptr + row_R, dots_R * inv_a_R * inv_temp, mask=here_R)


@triton.jit(do_not_specialize=["offset", "mask_row_step", "mask_col_step"])
def _pair_fwd_kernel(
    a_ptr,  # [R, D]
    b_ptr,  # [C, D]
    inv_a_ptr,  # [R] fp32
    inv_b_ptr,  # [C] fp32
    row_ids_ptr,  # [R] int64, without a mask
    col_ids_ptr,  # [C] int64, without a mask
    mask_ptr,  # [R, C] bytes, any strides, when HAS_MASK
    temperature_ptr,  # [1] fp32 when HAS_TEMPERATURE
    lse_ptr,  # [S, R] fp32
    positives_ptr,  # [S, R] fp32 when HAS_POSITIVES
    R,
    C,
    D,
    stride_a,
    stride_b,
    mask_row_step,
    mask_col_step,
    offset,  # column offset + k is row k's own; past the columns when there is none
    inv_temperature,
    HAS_MASK: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    INSIDE: tl.constexpr,  # log-sum-exp of the positives, not their sum
    FIXED_SHIFT: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    NARROW: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    id_R = load_ids(row_ids_ptr, row_R, inside_R, HAS_MASK)
    inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    inv_a_R = tl.load(inv_a_ptr + row_R, mask=inside_R, other=0.0)
    if NARROW:
        a_RD = load_rows(a_ptr, row_R, inside_R, stride_a, 0, D, BLOCK_D)

    maximum_R, total_R = empty_sum(BLOCK_R, FIXED_SHIFT)
    positive_maximum_R, positive_total_R = empty_sum(BLOCK_R, FIXED_SHIFT)
    first, last = split_range(C, BLOCK_C)
    for start in range(first, last, BLOCK_C):
        row_C = start + tl.arange(0, BLOCK_C)
        inside_C = row_C < C
        id_C = load_ids(col_ids_ptr, row_C, inside_C, HAS_MASK)
        if NARROW:
            b_CD = load_rows(b_ptr, row_C, inside_C, stride_b, 0, D, BLOCK_D)
            dots_RC = tl.dot(a_RD, b_CD.T, input_precision=INPUT_PRECISION)
        else:
            dots_RC = product(
                a_ptr, b_ptr, row_R, row_C, inside_R, inside_C, stride_a, stride_b, D,
                BLOCK_R, BLOCK_C, BLOCK_D, INPUT_PRECISION,
            )  # fmt: skip
        inv_b_C = tl.load(inv_b_ptr + row_C, mask=inside_C, other=0.0)
        logits_RC = pair_logits(dots_RC, inv_a_R, inv_b_C, inv_temp)
        valid_RC = valid_pairs(id_R, id_C, row_R + offset, row_C)
        logits_RC = tl.where(valid_RC, logits_RC, float("-inf"))
        maximum_R, total_R = add_exponentials(maximum_R, total_R, logits_RC, 1, FIXED_SHIFT)
        if HAS_POSITIVES:
            if HAS_MASK:
                positive_RC = load_mask(mask_ptr, row_R, row_C, inside_R, inside_C, mask_row_step, mask_col_step)
            else:
                positive_RC = id_R[:, None] == id_C[None, :]
            positive_RC = positive_RC & valid_RC
            if INSIDE:
                logits_RC = tl.where(positive_RC, logits_RC, float("-inf"))
                positive_maximum_R, positive_total_R = add_exponentials(
                    positive_maximum_R, positive_total_R, logits_RC, 1, FIXED_SHIFT
                )
            else:
                positive_total_R += tl.sum(tl.where(positive_RC, logits_RC, 0.0), axis=1)

    result = tl.program_id(1).to(tl.int64) * R + row_R
    tl.store(lse_ptr + result, log_sum(maximum_R, total_R), mask=inside_R)
    if HAS_POSITIVES:
        if INSIDE:
            positive_total_R = log_sum(positive_maximum_R, positive_total_R)
        tl.store(positives_ptr + result, positive_total_R, mask=inside_R)


@triton.jit
def _pair_triangle_kernel(
    x_ptr,  # [C, D]; the rows are the first R of them
    inv_ptr,  # [C] fp32
    ids_ptr,  # [C] int64
    temperature_ptr,
    row_lse_ptr,  # [S, R] fp32
    col_lse_ptr,  # [strips, C] fp32, written right of the diagonal block of each strip
    R,
    C,
    D,
    stride_x,
    inv_temperature,
    FIXED_SHIFT: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    NARROW: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # divides BLOCK_R
    BLOCK_D: tl.constexpr,
):
    """A split of one strip. The diagonal block is computed whole and gives row sums alone."""
    strip = tl.program_id(0)
    row_R = strip * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    result = tl.program_id(1).to(tl.int64) * R + row_R
    first, last = split_range(C, BLOCK_C)
    first = tl.maximum(first, strip * BLOCK_R)
    if first >= last:  # left of the diagonal
        tl.store(row_lse_ptr + result, tl.full((BLOCK_R,), float("-inf"), tl.float32), mask=inside_R)
        return
    id_R = load_ids(ids_ptr, row_R, inside_R, False)
    inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    inv_R = tl.load(inv_ptr + row_R, mask=inside_R, other=0.0)
    if NARROW:
        x_RD = load_rows(x_ptr, row_R, inside_R, stride_x, 0, D, BLOCK_D)

    maximum_R, total_R = empty_sum(BLOCK_R, FIXED_SHIFT)
    for start in range(first, last, BLOCK_C):
        row_C = start + tl.arange(0, BLOCK_C)
        inside_C = row_C < C
        id_C = load_ids(ids_ptr, row_C, inside_C, False)
        if NARROW:
            x_CD = load_rows(x_ptr, row_C, inside_C, stride_x, 0, D, BLOCK_D)
            dots_RC = tl.dot(x_RD, x_CD.T, input_precision=INPUT_PRECISION)
        else:
            dots_RC = product(
                x_ptr, x_ptr, row_R, row_C, inside_R, inside_C, stride_x, stride_x, D,
                BLOCK_R, BLOCK_C, BLOCK_D, INPUT_PRECISION,
            )  # fmt: skip
        inv_C = tl.load(inv_ptr + row_C, mask=inside_C, other=0.0)
        logits_RC = pair_logits(dots_RC, inv_R, inv_C, inv_temp)
        logits_RC = tl.where(valid_pairs(id_R, id_C, row_R, row_C), logits_RC, float("-inf"))
        maximum_R, total_R = add_exponentials(maximum_R, total_R, logits_RC, 1, FIXED_SHIFT)
        maximum_C, total_C = empty_sum(BLOCK_C, FIXED_SHIFT)
        maximum_C, total_C = add_exponentials(maximum_C, total_C, logits_RC, 0, FIXED_SHIFT)
        above_C = inside_C & (row_C >= (strip + 1) * BLOCK_R)
        tl.store(col_lse_ptr + strip.to(tl.int64) * C + row_C, log_sum(maximum_C, total_C), mask=above_C)
    tl.store(row_lse_ptr + result, log_sum(maximum_R, total_R), mask=inside_R)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


@dataclass(frozen=True)
class Pairs:
    """Rows and columns as the kernels take them: one type for both, aligned rows, D a multiple of 16."""

    rows: Tensor  # [R, D]
    columns: Tensor  # [C, D]
    row_ids: Tensor | None  # [R] int64, None when a mask is given
    column_ids: Tensor | None  # [C]
    offset: int | None

    @property
    def own_offset(self) -> int:
        """Where rows have no column of their own, one past the columns."""
        return len(self.columns) if self.offset is None else self.offset


def inverse_norms(scaling: Scaling, x: Tensor) -> Tensor:
    num_rows, dim = x.shape
    inv = torch.empty(num_rows, device=x.device)
    blocks = _launch.row_blocks(dim)
    if num_rows:
        _norms_kernel[(cdiv(num_rows, blocks["BLOCK_R"]),)](
            x_ptr=x, inv_ptr=inv, R=num_rows, D=dim, stride_x=x.stride(0), NORMALIZE=scaling.normalize, **blocks
        )
    return inv


def class_positives(scaling: Scaling, pairs: Pairs, inv_rows: Tensor, inv_columns: Tensor) -> Tensor:
    """Σ over row k's positives of s [R], a bounded number of classes at a time."""
    rows, columns = pairs.rows, pairs.columns
    (num_rows, dim), num_columns = rows.shape, len(columns)
    num_classes = num_columns if rows is columns else num_rows + num_columns  # ids are dense
    positives = inv_rows.new_zeros(num_rows)
    members = class_sums.by_class(pairs.column_ids, num_classes)
    blocks = _launch.row_blocks(dim)
    step = max(1, _launch.SCRATCH_BYTES // (4 * dim))
    for first in range(0, num_classes, step):
        last = min(first + step, num_classes)
        _class_positives_kernel[(cdiv(num_rows, blocks["BLOCK_R"]),)](
            a_ptr=rows,
            b_ptr=columns,
            inv_a_ptr=inv_rows,
            inv_b_ptr=inv_columns,
            row_ids_ptr=pairs.row_ids,
            col_ids_ptr=pairs.column_ids,
            sums_ptr=class_sums.sum_members(columns, inv_columns, members.classes(first, last)),
            positives_ptr=positives,
            R=num_rows,
            C=num_columns,
            D=dim,
            stride_a=rows.stride(0),
            stride_b=columns.stride(0),
            first_class=first,
            last_class=last,
            offset=pairs.own_offset,
            **scaling.arguments(),
            **blocks,
        )
    return positives


def rectangle(
    scaling: Scaling, pairs: Pairs, inv_rows: Tensor, inv_columns: Tensor, mask: Tensor | None, inside: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exps [R], and positives [R] when they need the tiles: a mask, or their log-sum-exp."""
    rows, columns = pairs.rows, pairs.columns
    (num_rows, dim), num_columns = rows.shape, len(columns)
    tables = _launch.PAIR_FORWARD_NARROW, _launch.PAIR_FORWARD_WIDE
    config, narrow = _launch.forward_config(*tables, rows, num_columns)
    row_blocks = cdiv(num_rows, config.block_r)
    splits = _launch.split_count(row_blocks, cdiv(num_columns, config.block_c), 4 * num_rows)
    lse = torch.empty(splits, num_rows, device=rows.device)
    positives = torch.empty_like(lse) if inside or mask is not None else None
    _pair_fwd_kernel[(row_blocks, splits)](
        a_ptr=rows,
        b_ptr=columns,
        inv_a_ptr=inv_rows,
        inv_b_ptr=inv_columns,
        row_ids_ptr=pairs.row_ids,
        col_ids_ptr=pairs.column_ids,
        mask_ptr=None if mask is None else mask.view(torch.uint8),
        lse_ptr=lse,
        positives_ptr=positives,
        R=num_rows,
        C=num_columns,
        D=dim,
        stride_a=rows.stride(0),
        stride_b=columns.stride(0),
        mask_row_step=0 if mask is None else mask.stride(0),
        mask_col_step=0 if mask is None else mask.stride(1),
        offset=pairs.own_offset,
        HAS_MASK=mask is not None,
        HAS_POSITIVES=positives is not None,
        INSIDE=inside,
        **_variant(scaling, rows, config, narrow),
    )
    if positives is not None:
        positives = combine(positives) if inside else positives.sum(0)
    return combine(lse), positives


def triangle(scaling: Scaling, pairs: Pairs, inv: Tensor) -> Tensor:
    """Log-sum-exps [R] of rows that are the columns as well."""
    x, ids = pairs.rows, pairs.row_ids
    num_rows, dim = x.shape
    tables = _launch.PAIR_TRIANGLE_NARROW, _launch.PAIR_TRIANGLE_WIDE
    config, narrow = _launch.forward_config(*tables, x, num_rows)
    lse = inv.new_full((num_rows,), float("-inf"))
    for first, last in _launch.strip_groups(num_rows, config.block_r):
        group_rows, columns = last - first, num_rows - first
        strips = cdiv(group_rows, config.block_r)
        # Half of the programs find nothing above the diagonal, and those left differ in length: four times as many.
        splits = _launch.split_count(strips, cdiv(columns, config.block_c), 4 * group_rows, waves=4)
        row_lse = inv.new_empty(splits, group_rows)
        col_lse = inv.new_empty(strips, columns)
        _pair_triangle_kernel[(strips, splits)](
            x_ptr=x[first:],
            inv_ptr=inv[first:],
            ids_ptr=ids[first:],
            row_lse_ptr=row_lse,
            col_lse_ptr=col_lse,
            R=group_rows,
            C=columns,
            D=dim,
            stride_x=x.stride(0),
            **_variant(scaling, x, config, narrow),
        )
        combine(row_lse, into=lse[first:last])
        combine(col_lse, into=lse[first:], step=config.block_r)
        del row_lse, col_lse  # before the next are made
    return lse


def _variant(scaling: Scaling, x: Tensor, config: _launch.Config, narrow: bool) -> dict[str, Any]:
    """What follows of the tile and of the type for either forward kernel."""
    return {
        "FIXED_SHIFT": scaling.fixed_shift(x.dtype, MAX_FIXED_SHIFT),
        "NARROW": narrow,
        "INPUT_PRECISION": _launch.input_precision(x.dtype),
        **scaling.arguments(),
        **config.launch_options(),
    }
