"""Passes over pairs of samples where exp(s) needs no maximum: half types, vectors that fit a tile, 1/τ not large.

The derivation is in pair_lse.py. What pairs cost here is instructions, not products: at D = 128 a tensor core takes as
long for one pair as eight instructions of a multiprocessor's four schedulers. Hence every loop has two parts. What
depends on one sample alone is prepared once, in vectors padded to whole tiles, so that a tile checks no bounds and no
class of absent samples:

    exp s[k, j] = exp2((x_k·x_j f_k + b_k) f'_j + b_j),   f = log2(e)/(τ|x|), f' = 1/|x|, b = 0, or -inf for the absent.

And of the tiles only those that hold a sample's pair with itself look for it. Sums stay plain sums until all partial
results are joined, where the logarithm is taken once.

Backward. With g' = g exp(-lse) the weight of x_j in the gradient of x_k is, times 1/|x_k| that is applied at the end,

    w[k, j] = exp s[k, j] (g'_k i_j + g'_j i_j) + P[k, j] (q_k i_j + q_j i_j)    (`inside`: q' exp s for q, as with g')

with i = 1/|x|, zero for the absent. g' i and q i are prepared for the columns, so that either bracket is one FMA. What
a tile takes of a column lies side by side: every thread needs it of many columns, one load each.

Shapes: R rows, C columns, D width; S splits. Vectors over samples are padded to a multiple of _launch.PADDING.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._epilogue import MAX_FIXED_SHIFT, Gradient, Scaling, finish, fp16_range
from ._launch import cdiv
from ._tiles import LN2, LOG2E, exp, inverse, load_rows
from .pair_backward import Backward, Side, side_arguments

_SMALLEST_FACTOR = tl.constexpr(1e-30)


@triton.jit
def _load_tile(x_ptr, start, size, stride, D, offset_ND, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [start, start + BLOCK_N) of x. One address in int64; within a tile the launcher keeps offsets below 2^31."""
    inside_N = start + tl.arange(0, BLOCK_N) < size
    inside_D = tl.arange(0, BLOCK_D) < D
    return tl.load(
        x_ptr + tl.cast(start, tl.int64) * stride + offset_ND, mask=inside_N[:, None] & inside_D[None, :], other=0.0
    )


@triton.jit
def _tile_offsets(stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.arange(0, BLOCK_N)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _prepare_kernel(
    x_ptr,  # [N, D]
    ids_ptr,  # [N] int64
    inv_ptr,  # [N] fp32, and what follows up to padded_N
    factor_ptr,  # fp32
    bias_ptr,  # fp32
    classes_ptr,  # int32, -1 for the absent
    N,
    D,
    padded_N,
    stride_x,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """1/|x|, and what the forward's tiles take of each sample."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < N
    x_RD = load_rows(x_ptr, row_R, inside_R, stride_x, 0, D, BLOCK_D).to(tl.float32)
    inv_R = inverse(tl.sum(x_RD * x_RD, axis=1), True)
    id_R = tl.load(ids_ptr + row_R, mask=inside_R, other=-1)
    here_R = id_R >= 0
    padded_R = row_R < padded_N
    tl.store(inv_ptr + row_R, inv_R, mask=inside_R)
    # Zero would make NaN of an absent sample's bias where the two meet; a zero vector's products are zero anyway.
    tl.store(factor_ptr + row_R, tl.where(inv_R < _SMALLEST_FACTOR, _SMALLEST_FACTOR, inv_R), mask=padded_R)
    tl.store(bias_ptr + row_R, tl.where(here_R, 0.0, float("-inf")), mask=padded_R)
    tl.store(classes_ptr + row_R, tl.where(here_R, id_R, -1).to(tl.int32), mask=padded_R)


@triton.jit
def _tile(
    a_RD, factor_R, bias_R, class_R, own_R, b_ptr, factor_ptr, bias_ptr, classes_ptr, start, C, D, stride_b, offset_CD,
    OWN: tl.constexpr, POSITIVES: tl.constexpr, INSIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """exp(s) of the columns from `start` on, and what positives add: their s in units of log 2 or, `inside`, exp(s).

    A sample with itself is left out where the tile may hold it (OWN). Without POSITIVES the second is the first. Absent
    samples are a class, with -inf among themselves.
    """
    b_CD = _load_tile(b_ptr, start, C, stride_b, D, offset_CD, BLOCK_C, BLOCK_D)
    dots_RC = tl.dot(a_RD, b_CD.T)
    row_C = start + tl.arange(0, BLOCK_C)
    factor_C, bias_C = tl.load(factor_ptr + row_C), tl.load(bias_ptr + row_C)
    logits_RC = (dots_RC * factor_R[:, None] + bias_R[:, None]) * factor_C[None, :] + bias_C[None, :]
    if OWN:
        logits_RC = tl.where(own_R[:, None] == row_C[None, :], float("-inf"), logits_RC)
    exp_RC = tl.exp2(logits_RC)
    positive_RC = exp_RC
    if POSITIVES:
        same_RC = class_R[:, None] == tl.load(classes_ptr + row_C)[None, :]
        if INSIDE:
            positive_RC = tl.where(same_RC, exp_RC, 0.0)
        else:
            if OWN:
                same_RC = same_RC & (logits_RC > float("-inf"))
            positive_RC = tl.where(same_RC, logits_RC, 0.0)
    return exp_RC, positive_RC


@triton.jit
def _tiles_of_split(C, BLOCK_C: tl.constexpr):
    tiles = tl.cdiv(C, BLOCK_C)
    step = tl.cdiv(tiles, tl.num_programs(1))
    first = tl.minimum(tl.program_id(1) * step, tiles)
    return first, tl.minimum(first + step, tiles)


@triton.jit
def _own_tiles(first_own, last_own, first, last, BLOCK_C: tl.constexpr):
    """Of the tiles [first, last), those that hold one of the columns [first_own, last_own): again as [first, last)."""
    first_tile = tl.minimum(tl.maximum(tl.maximum(first_own, 0) // BLOCK_C, first), last)
    return first_tile, tl.minimum(tl.maximum(tl.cdiv(tl.maximum(last_own, 0), BLOCK_C), first_tile), last)


@triton.jit
def _triangle_fixed_kernel(
    x_ptr,  # [C, D]; the rows are the first R of them
    factor_ptr,  # [C] fp32
    bias_ptr,  # [C] fp32
    classes_ptr,  # [C] int32
    row_sums_ptr,  # [1 or 2, S, stride_sums] fp32: of exp(s) and, with positives, of their s in units of log 2
    col_sums_ptr,  # [1 or 2, strips, stride_sums] fp32, written right of the diagonal block of each strip
    R,
    C,
    D,
    stride_x,
    stride_sums,
    inv_temperature,
    POSITIVES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # divides BLOCK_R
    BLOCK_D: tl.constexpr,
):
    """A share of two strips, the i-th from the top and the i-th from the bottom: together all such pairs are as long.

    The diagonal block is computed whole and gives row sums alone.
    """
    WIDTH: tl.constexpr = BLOCK_R // BLOCK_C
    strips, tiles = tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C)
    upper = tl.program_id(0)
    lower = strips - 1 - upper
    upper_tiles = tiles - upper * WIDTH
    step = tl.cdiv(upper_tiles + tl.where(lower > upper, tiles - lower * WIDTH, 0), tl.num_programs(1))
    share = tl.program_id(1) * step
    offset_CD = _tile_offsets(stride_x, BLOCK_C, BLOCK_D)
    for part in tl.static_range(2):
        strip = upper if part == 0 else lower
        # Tiles of the upper strip come first; tile t of a strip begins at column t·BLOCK_C.
        first = strip * WIDTH + share - part * upper_tiles
        last = tl.minimum(first + step, tiles)
        if part == 1:
            last = tl.where(lower > upper, last, 0)  # the strip in the middle of an odd number has no other
        beside = (strip + 1) * WIDTH
        first = tl.maximum(first, strip * WIDTH)
        row_R = strip * BLOCK_R + tl.arange(0, BLOCK_R)
        factor_R = tl.load(factor_ptr + row_R) * (inv_temperature * LOG2E)
        bias_R = tl.load(bias_ptr + row_R)
        x_RD = _load_tile(
            x_ptr, strip * BLOCK_R, C, stride_x, D, _tile_offsets(stride_x, BLOCK_R, BLOCK_D), BLOCK_R, BLOCK_D
        )
        total_R = tl.zeros((BLOCK_R,), tl.float32)
        class_R, positive_R = tl.load(classes_ptr + row_R), tl.zeros((BLOCK_R,), tl.float32)
        for tile in tl.range(first, tl.minimum(last, beside), num_stages=1):
            exp_RC, positive_RC = _tile(
                x_RD, factor_R, bias_R, class_R, row_R, x_ptr, factor_ptr, bias_ptr, classes_ptr, tile * BLOCK_C, C, D,
                stride_x, offset_CD, True, POSITIVES, False, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            total_R += tl.sum(exp_RC, axis=1)
            if POSITIVES:
                positive_R += tl.sum(positive_RC, axis=1)
        for tile in range(tl.maximum(first, beside), last):
            exp_RC, positive_RC = _tile(
                x_RD, factor_R, bias_R, class_R, row_R, x_ptr, factor_ptr, bias_ptr, classes_ptr, tile * BLOCK_C, C, D,
                stride_x, offset_CD, False, POSITIVES, False, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            total_R += tl.sum(exp_RC, axis=1)
            col_sums = col_sums_ptr + tl.cast(strip, tl.int64) * stride_sums + tile * BLOCK_C
            tl.store(col_sums + tl.arange(0, BLOCK_C), tl.sum(exp_RC, axis=0))
            if POSITIVES:
                positive_R += tl.sum(positive_RC, axis=1)
                col_sums += tl.cast(strips, tl.int64) * stride_sums
                tl.store(col_sums + tl.arange(0, BLOCK_C), tl.sum(positive_RC, axis=0))
        row_sums = row_sums_ptr + tl.program_id(1).to(tl.int64) * stride_sums + row_R
        written = (row_R >= 0) & ((part == 0) | (lower > upper))
        tl.store(row_sums, total_R, mask=written)
        if POSITIVES:
            tl.store(row_sums + tl.num_programs(1).to(tl.int64) * stride_sums, positive_R, mask=written)


@triton.jit(do_not_specialize=["offset"])
def _rectangle_fixed_kernel(
    a_ptr,  # [R, D]
    b_ptr,  # [C, D]
    row_factor_ptr,  # [R] fp32
    row_bias_ptr,  # [R] fp32
    row_classes_ptr,  # [R] int32
    col_factor_ptr,  # [C] fp32
    col_bias_ptr,  # [C] fp32
    col_classes_ptr,  # [C] int32
    row_sums_ptr,  # [1 or 2, S, stride_sums] fp32: of exp(s) and, with positives, of their s (units of log 2) or exp(s)
    R,
    C,
    D,
    stride_a,
    stride_b,
    stride_sums,
    offset,  # column offset + k is row k's own; past the columns when there is none
    inv_temperature,
    POSITIVES: tl.constexpr,
    INSIDE: tl.constexpr,  # exp(s) of the positives, not s
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row sums of a block of rows over a split of the columns."""
    block = tl.program_id(0) * BLOCK_R
    row_R = block + tl.arange(0, BLOCK_R)
    factor_R = tl.load(row_factor_ptr + row_R) * (inv_temperature * LOG2E)
    bias_R = tl.load(row_bias_ptr + row_R)
    class_R = tl.load(row_classes_ptr + row_R)
    a_RD = _load_tile(a_ptr, block, R, stride_a, D, _tile_offsets(stride_a, BLOCK_R, BLOCK_D), BLOCK_R, BLOCK_D)
    offset_CD = _tile_offsets(stride_b, BLOCK_C, BLOCK_D)
    total_R, positive_total_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    first, last = _tiles_of_split(C, BLOCK_C)
    own, beside = _own_tiles(block + offset, block + offset + BLOCK_R, first, last, BLOCK_C)
    for tile in tl.range(own, beside, num_stages=1):
        exp_RC, positive_RC = _tile(
            a_RD, factor_R, bias_R, class_R, row_R + offset, b_ptr, col_factor_ptr, col_bias_ptr, col_classes_ptr,
            tile * BLOCK_C, C, D, stride_b, offset_CD, True, POSITIVES, INSIDE, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        total_R += tl.sum(exp_RC, axis=1)
        if POSITIVES:
            positive_total_R += tl.sum(positive_RC, axis=1)
    for position in range(first, last - (beside - own)):
        tile = position + tl.where(position >= own, beside - own, 0)
        exp_RC, positive_RC = _tile(
            a_RD, factor_R, bias_R, class_R, row_R + offset, b_ptr, col_factor_ptr, col_bias_ptr, col_classes_ptr,
            tile * BLOCK_C, C, D, stride_b, offset_CD, False, POSITIVES, INSIDE, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        total_R += tl.sum(exp_RC, axis=1)
        if POSITIVES:
            positive_total_R += tl.sum(positive_RC, axis=1)
    row_sums = row_sums_ptr + tl.program_id(1).to(tl.int64) * stride_sums + row_R
    tl.store(row_sums, total_R)
    if POSITIVES:
        tl.store(row_sums + tl.num_programs(1).to(tl.int64) * stride_sums, positive_total_R)


@triton.jit
def _join_kernel(
    row_sums_ptr,  # [1 or 2, S, stride_sums] fp32, for the first R rows
    col_sums_ptr,  # [1 or 2, strips, stride_sums] fp32 when STEP > 0
    lse_ptr,  # [N] fp32: of the first R rows, and sums so far of the others
    positives_ptr,  # the same for the second of the sums, if the grid reaches them
    S,
    R,
    N,
    stride_sums,
    STEP: tl.constexpr,  # col_sums[s] holds rows from (s + 1) STEP on; 0 where there are none
    ACCUMULATE: tl.constexpr,  # begin with the sums so far
    INSIDE: tl.constexpr,  # the second are sums of exp(s) too
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """All partial sums of a row, in the order in which they lie; the logarithm of the whole, or the whole in nats."""
    kind = tl.program_id(1).to(tl.int64)
    row_sums_ptr += kind * S * stride_sums
    col_sums_ptr += kind * tl.cdiv(R, STEP if STEP > 0 else 1) * stride_sums
    result_ptr = lse_ptr
    if kind == 1:
        result_ptr = positives_ptr
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < N
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    if ACCUMULATE:
        total_R = tl.load(result_ptr + row_R, mask=inside_R, other=0.0)
    for split in range(0, S, BLOCK_S):
        split_S = split + tl.arange(0, BLOCK_S)
        inside_SR = (split_S < S)[:, None] & (row_R < R)[None, :]
        row_sums = row_sums_ptr + split_S.to(tl.int64)[:, None] * stride_sums + row_R[None, :]
        total_R += tl.sum(tl.load(row_sums, mask=inside_SR, other=0.0), axis=0)
    if STEP > 0:
        strips = tl.minimum(tl.cdiv(R, STEP), ((tl.program_id(0) + 1) * BLOCK_R - 1) // STEP)
        for start in range(0, strips, BLOCK_S):
            strip_S = start + tl.arange(0, BLOCK_S)
            above_SR = inside_R[None, :] & (row_R[None, :] >= ((strip_S + 1) * STEP)[:, None])
            above_SR &= (strip_S < strips)[:, None]
            col_sums = col_sums_ptr + strip_S.to(tl.int64)[:, None] * stride_sums + row_R[None, :]
            total_R += tl.sum(tl.load(col_sums, mask=above_SR, other=0.0), axis=0)
    result_R = tl.log2(total_R)
    if not INSIDE:
        # -inf: absent samples among themselves.
        result_R = tl.where(kind == 0, result_R, tl.where(total_R == float("-inf"), 0.0, total_R))
    tl.store(result_ptr + row_R, tl.where(row_R < R, result_R * LN2, total_R), mask=inside_R)


@triton.jit
def _prepare_side_kernel(
    lse_ptr,  # [N] fp32, as the three after it, when USED: as anchors
    grad_lse_ptr,
    positives_ptr,
    grad_positives_ptr,
    inv_ptr,  # [N] fp32
    ids_ptr,  # [N] int64
    range_ptr,  # [1] fp32 power of two that brings G into fp16's range, when HAS_RANGE
    row_terms_ptr,  # [4, padded_N] fp32: i (zero for the absent), g', q, and the bits of the int32 class
    col_terms_ptr,  # [padded_N, 4] fp32: i, g' i, q i, class; side by side, so that one load brings them all
    N,
    padded_N,
    USED: tl.constexpr,
    INSIDE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What the backward's tiles take of each sample, whether it is a row or a column."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R, padded_R = row_R < N, row_R < padded_N
    id_R = tl.load(ids_ptr + row_R, mask=inside_R, other=-1)
    here_R = id_R >= 0
    inv_R = tl.load(inv_ptr + row_R, mask=here_R, other=0.0)
    of_lse_R, of_positives_R = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    if USED:
        of_lse_R = _taken_apart(lse_ptr, grad_lse_ptr, row_R, here_R)
        if INSIDE:
            of_positives_R = _taken_apart(positives_ptr, grad_positives_ptr, row_R, here_R)
        else:
            of_positives_R = tl.load(grad_positives_ptr + row_R, mask=here_R, other=0.0)
    if HAS_RANGE:
        fp16_range = tl.load(range_ptr)
        of_lse_R *= fp16_range
        of_positives_R *= fp16_range
    class_R = tl.where(here_R, id_R, -1).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(row_terms_ptr + row_R, inv_R, mask=padded_R)
    tl.store(row_terms_ptr + padded_N + row_R, of_lse_R, mask=padded_R)
    tl.store(row_terms_ptr + 2 * padded_N + row_R, of_positives_R, mask=padded_R)
    tl.store(row_terms_ptr + 3 * padded_N + row_R, class_R, mask=padded_R)
    tl.store(col_terms_ptr + 4 * row_R, inv_R, mask=padded_R)
    tl.store(col_terms_ptr + 4 * row_R + 1, of_lse_R * inv_R, mask=padded_R)
    tl.store(col_terms_ptr + 4 * row_R + 2, of_positives_R * inv_R, mask=padded_R)
    tl.store(col_terms_ptr + 4 * row_R + 3, class_R, mask=padded_R)


@triton.jit
def _taken_apart(lse_ptr, grad_ptr, row_R, here_R):
    """g exp(-lse), zero where nothing was summed."""
    lse_R = tl.load(lse_ptr + row_R, mask=here_R, other=float("-inf"))
    summed_R = lse_R > float("-inf")
    return tl.load(grad_ptr + row_R, mask=summed_R, other=0.0) * exp(-tl.where(summed_R, lse_R, 0.0))


@triton.jit
def _bwd_fixed_tile(
    a_RD, factor_R, of_lse_R, of_positives_R, class_R, own_R, sum_RD,
    b_ptr, terms_ptr, start, C, D, stride_b, offset_CD,
    INSIDE: tl.constexpr, OWN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum with w·x of the columns from `start` on, the sample itself left out if OWN."""
    b_CD = _load_tile(b_ptr, start, C, stride_b, D, offset_CD, BLOCK_C, BLOCK_D)
    dots_RC = tl.dot(a_RD, b_CD.T)
    row_C = start + tl.arange(0, BLOCK_C)
    terms_C4 = tl.load(terms_ptr + row_C[:, None] * 4 + tl.arange(0, 4)[None, :])
    even_C2, odd_C2 = tl.split(tl.reshape(terms_C4, (BLOCK_C, 2, 2)))
    inv_C, of_positives_C = tl.split(even_C2)
    of_lse_C, class_C = tl.split(odd_C2)
    class_C = class_C.to(tl.int32, bitcast=True)
    exp_RC = tl.exp2(dots_RC * factor_R[:, None] * inv_C[None, :])
    of_lse_RC = of_lse_R[:, None] * inv_C[None, :] + of_lse_C[None, :]
    of_positives_RC = of_positives_R[:, None] * inv_C[None, :] + of_positives_C[None, :]
    of_positives_RC = tl.where(class_R[:, None] == class_C[None, :], of_positives_RC, 0.0)
    weights_RC = exp_RC * (of_lse_RC + of_positives_RC) if INSIDE else exp_RC * of_lse_RC + of_positives_RC
    if OWN:
        weights_RC = tl.where(own_R[:, None] == row_C[None, :], 0.0, weights_RC)
    return tl.dot(weights_RC.to(b_CD.dtype), b_CD, sum_RD)


@triton.jit(do_not_specialize=["offset"])
def _bwd_fixed_kernel(
    a_ptr,  # [R, D]
    b_ptr,  # [C, D]
    row_terms_ptr,  # [4, padded_R] fp32, see `_prepare_side_kernel`
    col_terms_ptr,  # [C, 4] fp32
    range_ptr,  # [1] fp32 when HAS_RANGE
    partials_ptr,  # [S, R, D] fp32: P of each split
    R,
    C,
    D,
    padded_R,
    stride_a,
    stride_b,
    stride_partials,
    offset,  # column offset + k is row k's own
    inv_temperature,
    INSIDE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0) * BLOCK_R
    row_R = block + tl.arange(0, BLOCK_R)
    inv_R = tl.load(row_terms_ptr + row_R)
    class_R = tl.load(row_terms_ptr + 3 * padded_R + row_R).to(tl.int32, bitcast=True)
    of_lse_R = tl.load(row_terms_ptr + padded_R + row_R)
    of_positives_R = tl.load(row_terms_ptr + 2 * padded_R + row_R)
    factor_R = inv_R * (inv_temperature * LOG2E)
    a_RD = _load_tile(a_ptr, block, R, stride_a, D, _tile_offsets(stride_a, BLOCK_R, BLOCK_D), BLOCK_R, BLOCK_D)
    offset_CD = _tile_offsets(stride_b, BLOCK_C, BLOCK_D)
    sum_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    first, last = _tiles_of_split(C, BLOCK_C)
    own, beside = _own_tiles(block + offset, block + offset + BLOCK_R, first, last, BLOCK_C)
    for tile in tl.range(own, beside, num_stages=1):
        sum_RD = _bwd_fixed_tile(
            a_RD, factor_R, of_lse_R, of_positives_R, class_R, row_R + offset, sum_RD,
            b_ptr, col_terms_ptr, tile * BLOCK_C, C, D, stride_b, offset_CD,
            INSIDE, True, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    for position in range(first, last - (beside - own)):
        tile = position + tl.where(position >= own, beside - own, 0)
        sum_RD = _bwd_fixed_tile(
            a_RD, factor_R, of_lse_R, of_positives_R, class_R, row_R, sum_RD,
            b_ptr, col_terms_ptr, tile * BLOCK_C, C, D, stride_b, offset_CD,
            INSIDE, False, BLOCK_C, BLOCK_D,
        )  # fmt: skip
    if HAS_RANGE:
        inv_R /= tl.load(range_ptr)
    # Rows of absent samples summed what nobody asked for; and zero vectors have no gradient either.
    sum_RD = tl.where((inv_R == 0.0)[:, None], 0.0, sum_RD * inv_R[:, None])
    depth = tl.arange(0, BLOCK_D)
    partials = partials_ptr + tl.program_id(1).to(tl.int64) * stride_partials + row_R.to(tl.int64)[:, None] * D
    tl.store(partials + depth[None, :], sum_RD, mask=(row_R < R)[:, None] & (depth < D)[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def serves(scaling: Scaling, x: Tensor, tables: dict[int, _launch.Narrow], bound: float = MAX_FIXED_SHIFT) -> bool:
    return scaling.fixed_shift(x.dtype, bound) and _launch.is_narrow(tables, x)


@dataclass(frozen=True)
class Samples:
    """Vectors, and what the forward's tiles take of each, padded."""

    x: Tensor  # [N, D]
    inv: Tensor  # [N] fp32
    factor: Tensor  # fp32
    bias: Tensor  # fp32
    classes: Tensor  # int32

    @property
    def padded(self) -> int:
        return len(self.factor)

    def since(self, row: int) -> Samples:
        return type(self)(*(tensor[row:] for tensor in vars(self).values()))

    def arguments(self, prefix: str = "") -> dict[str, Tensor]:
        return {
            f"{prefix}factor_ptr": self.factor,
            f"{prefix}bias_ptr": self.bias,
            f"{prefix}classes_ptr": self.classes,
        }


def near(x: Tensor) -> Tensor:
    """x itself unless its rows lie so far apart that a tile does not fit 2^31 elements."""
    return x if x.stride(0) * _launch.PADDING < 2**31 else x.contiguous()


def prepare(x: Tensor, ids: Tensor) -> Samples:
    num_rows, dim = x.shape
    padded = _launch.padded_columns(num_rows)
    inv = torch.empty(num_rows, device=x.device)
    factor, bias = torch.empty(2, padded, device=x.device)
    classes = torch.empty(padded, dtype=torch.int32, device=x.device)
    blocks = _launch.row_blocks(dim)
    _prepare_kernel[(cdiv(padded, blocks["BLOCK_R"]),)](
        x_ptr=x,
        ids_ptr=ids,
        inv_ptr=inv,
        factor_ptr=factor,
        bias_ptr=bias,
        classes_ptr=classes,
        N=num_rows,
        D=dim,
        padded_N=padded,
        stride_x=x.stride(0),
        **blocks,
    )
    return Samples(near(x), inv, factor, bias, classes)


def sums_positives(num_rows: int, num_columns: int) -> bool:
    """Whether adding up positives in the tiles costs less than the launches that bring classes together."""
    return num_rows * num_columns <= _launch.MAX_POSITIVES_IN_TILES


def triangle(scaling: Scaling, samples: Samples, with_positives: bool) -> list[Tensor]:
    """Log-sum-exps [R] of rows that are the columns as well, and if asked for the sums of their positives [R]."""
    num_rows, dim = samples.x.shape
    tables = _launch.PAIR_TRIANGLE_FIXED_CROWDED if with_positives else _launch.PAIR_TRIANGLE_FIXED
    config = _launch.narrow_config(tables, samples.x)
    kinds = 2 if with_positives else 1
    results = [torch.empty(num_rows, device=samples.x.device) for _ in range(kinds)]  # outputs share no storage
    for first, last in _launch.strip_groups(num_rows, config.block_r, _launch.PADDING):
        part, group_rows = samples.since(first), last - first
        strips, tiles = cdiv(group_rows, config.block_r), cdiv(num_rows - first, config.block_c)
        pairs = cdiv(strips, 2)
        splits = _launch.split_count(pairs, tiles, 4 * kinds * part.padded)
        row_sums = results[0].new_empty(kinds, splits, part.padded)
        col_sums = results[0].new_empty(kinds, strips, part.padded)
        _triangle_fixed_kernel[(pairs, splits)](
            x_ptr=part.x,
            row_sums_ptr=row_sums,
            col_sums_ptr=col_sums,
            R=group_rows,
            C=num_rows - first,
            D=dim,
            stride_x=part.x.stride(0),
            stride_sums=part.padded,
            inv_temperature=scaling.inv_temperature,
            POSITIVES=with_positives,
            **part.arguments(),
            **config.launch_options(),
        )
        _join(
            [result[first:] for result in results], group_rows, row_sums, col_sums, config.block_r, accumulate=first > 0
        )
        del row_sums, col_sums  # before the next are made
    return results


def _join(
    results: list[Tensor],
    rows: int,
    row_sums: Tensor,
    col_sums: Tensor | None = None,
    step: int = 0,
    *,
    accumulate: bool = False,
    inside: bool = False,
) -> None:
    """Results of the first `rows`, one or two of [N], from partial sums [., S, .] and, with a step, those of columns
    [., strips, .].
    """
    kinds, num_rows = len(results), len(results[0])
    _join_kernel[(cdiv(num_rows, _launch.COMBINE_BLOCKS["BLOCK_R"]), kinds)](
        row_sums_ptr=row_sums,
        col_sums_ptr=row_sums if col_sums is None else col_sums,  # not read without a step
        lse_ptr=results[0],
        positives_ptr=results[-1],
        S=row_sums.shape[1],
        R=rows,
        N=num_rows,
        stride_sums=row_sums.stride(1),
        STEP=step,
        ACCUMULATE=accumulate,
        INSIDE=inside,
        **_launch.COMBINE_BLOCKS,
    )


def rectangle(
    scaling: Scaling, rows: Samples, columns: Samples, offset: int, with_positives: bool, inside: bool
) -> list[Tensor]:
    """Log-sum-exps [R], and if asked for the sums or (`inside`) the log-sum-exps of the positives [R]."""
    (num_rows, dim), num_columns = rows.x.shape, len(columns.x)
    config = _launch.narrow_config(_launch.PAIR_RECTANGLE_FIXED, rows.x)
    row_blocks = cdiv(num_rows, config.block_r)
    splits = _launch.split_count(row_blocks, cdiv(num_columns, config.block_c), 4 * rows.padded)
    results = [torch.empty(num_rows, device=rows.x.device) for _ in range(2 if with_positives else 1)]
    row_sums = results[0].new_empty(len(results), splits, rows.padded)
    _rectangle_fixed_kernel[(row_blocks, splits)](
        a_ptr=rows.x,
        b_ptr=columns.x,
        row_sums_ptr=row_sums,
        R=num_rows,
        C=num_columns,
        D=dim,
        stride_a=rows.x.stride(0),
        stride_b=columns.x.stride(0),
        stride_sums=rows.padded,
        offset=offset,
        inv_temperature=scaling.inv_temperature,
        POSITIVES=with_positives,
        INSIDE=inside,
        **rows.arguments("row_"),
        **columns.arguments("col_"),
        **config.launch_options(),
    )
    _join(results, num_rows, row_sums, inside=inside)
    return results


def backward(scaling: Scaling, given: Backward, gradient: Gradient) -> None:
    """The gradient by recomputing exp(s), a bounded number of rows at a time: their P passes through memory."""
    pairs = given.pairs
    (num_rows, dim), num_columns = pairs.rows.shape, len(pairs.columns)
    weights_range = fp16_range(given.dtype, given.upstream(), given.inv_columns)
    columns = _prepare_side(given.column_side, given.inv_columns, pairs.column_ids, weights_range, given.inside)
    if pairs.rows is pairs.columns and given.row_side is given.column_side:
        rows = columns
    else:
        rows = _prepare_side(given.row_side, given.inv_rows, pairs.row_ids, weights_range, given.inside)
    (row_terms, _), (_, col_terms) = rows, columns
    x, others = near(pairs.rows), near(pairs.columns)
    config = _launch.narrow_config(_launch.PAIR_BACKWARD_FIXED, x)
    for part in _launch.row_chunks(num_rows, 4 * dim):
        size = part.stop - part.start
        row_blocks = cdiv(size, config.block_r)
        splits = _launch.split_count(row_blocks, cdiv(num_columns, config.block_c), 4 * size * dim)
        partials = given.inv_rows.new_empty(splits, size, dim)
        _bwd_fixed_kernel[(row_blocks, splits)](
            a_ptr=x[part],
            b_ptr=others,
            row_terms_ptr=row_terms[:, part.start :],
            col_terms_ptr=col_terms,
            range_ptr=weights_range,
            partials_ptr=partials,
            R=size,
            C=num_columns,
            D=dim,
            padded_R=row_terms.stride(0),
            stride_a=x.stride(0),
            stride_b=others.stride(0),
            stride_partials=size * dim,
            offset=pairs.own_offset + part.start,
            inv_temperature=scaling.inv_temperature,
            INSIDE=given.inside,
            HAS_RANGE=weights_range is not None,
            **config.launch_options(),
        )
        # The kernel has undone the scale of fp16.
        finish(scaling, None, (gradient.rows(part), partials))
        del partials  # before the next are made


def _prepare_side(
    side: Side | None, inv: Tensor, ids: Tensor, weights_range: Tensor | None, inside: bool
) -> tuple[Tensor, Tensor]:
    padded = _launch.padded_columns(len(inv))
    row_terms, col_terms = inv.new_empty(4, padded), inv.new_empty(padded, 4)
    _prepare_side_kernel[(cdiv(padded, _launch.SIDE_BLOCKS["BLOCK_R"]),)](
        **side_arguments(side),
        inv_ptr=inv,
        ids_ptr=ids,
        range_ptr=weights_range,
        row_terms_ptr=row_terms,
        col_terms_ptr=col_terms,
        N=len(inv),
        padded_N=padded,
        USED=side is not None,
        INSIDE=inside,
        HAS_RANGE=weights_range is not None,
        **_launch.SIDE_BLOCKS,
    )
    return row_terms, col_terms
