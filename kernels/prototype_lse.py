"""Log-sum-exps of cosine logits along rows and columns, and their exact gradient, without storing the logits.

Derivation. With ŵ_c = w_c/|w_c| and u_j = z_j/|z_j| the logits are s[c, j] = ŵ_c·u_j/τ, of shape K x N. Forward gives

    row_lse[c] = log Σ_j exp s[c, j]  over valid samples,      col_lse[j] = log Σ_c exp s[c, j],
    positives[j] = s[y_j, j],

without the entries y_j = c in both sums when `exclude_own`. For upstream gradients g_row, g_col, g_pos
of the three, that of s is

    G[c, j] = m (g_row[c] exp(s - row_lse[c]) + g_col[j] exp(s - col_lse[j])) + [y_j = c] g_pos[j],

m = 0 for invalid samples and, when `exclude_own`, for y_j = c. The log-sum-exps are all that a backward has to keep.
Write i_w = 1/|w|, i_z = 1/|z| and H[c, j] = G[c, j] i_w[c] i_z[j]. Then P_Z = Hᵀ W and P_W = H Z are the gradients
before the projection of the normalisation, both up to 1/τ, and for either operand X with its P

    t = x·P,    dX = (P - t i_x² x)/τ,    Σ_rows t / τ = Σ G∘s,

so the radial part is removed in fp32 from the sum itself, and the temperature's gradient costs nothing more.

Precision. Positives enter G in fp32, before it is rounded to the operand's type: near collapse G's entries cancel, and
adding the positive term after the product loses the tangential part altogether in bfloat16.

Two shapes of program. Narrow (half types, D up to 128): a program owns a block of rows of one operand A, streams those
of the other, B, and keeps A and its accumulator on chip, as attention does. Wide: the product runs over D in steps, and
the backward stores H for a bounded chunk and leaves P to two library products. Both operands take the part of A:
prototypes for the row sums and dW, features for the column sums and dZ; `A_IS_CLASSES` tells which.

Splits of the streamed side leave partial results that another kernel adds in a fixed order: no atomics, the same bits
every time. Where most classes are absent from the batch, the launchers gather the present ones first (`_Present`).

Shapes: N samples, K classes, D width; R rows of A, C rows of B; S splits. Vectors over tile rows carry _R, tiles _RC.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._launch import cdiv
from .class_sums import class_sums, segment_sum

__all__ = ["class_sums", "launch_bwd", "launch_fwd", "segment_sum"]

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_MAX_FIXED_SHIFT = 64.0  # |s| below this: exp(s) neither overflows a sum of 2^34 terms in fp32 nor underflows


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _classes(
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
def _load_rows(x_ptr, row, inside, stride, d, D, BLOCK_D: tl.constexpr):
    depth = d + tl.arange(0, BLOCK_D)
    start = row.to(tl.int64) * stride  # int64 first: row * stride passes 2^31
    return tl.load(x_ptr + start[:, None] + depth[None, :], mask=inside[:, None] & (depth < D)[None, :], other=0.0)


@triton.jit
def _inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE: tl.constexpr):
    if HAS_TEMPERATURE:
        return 1.0 / tl.load(temperature_ptr)
    else:
        return inv_temperature


@triton.jit
def _inverse(squares_R, NORMALIZE: tl.constexpr):
    if NORMALIZE:
        norm_R = tl.sqrt_rn(squares_R)
        return tl.where(norm_R <= 1e-12, 0.0, 1.0 / norm_R)  # no direction: s = 0 and no gradient
    else:
        return tl.full(squares_R.shape, 1.0, tl.float32)


@triton.jit(do_not_specialize=["ignore_index"])
def _inverse_norms_kernel(
    features_ptr,  # [N, D]
    prototypes_ptr,  # [K, D]
    labels_ptr,  # [N] int64
    temperature_ptr,  # [1] fp32 when HAS_TEMPERATURE
    inv_features_ptr,  # [N] fp32
    inv_prototypes_ptr,  # [K] fp32
    positives_ptr,  # [N] fp32
    N,
    K,
    D,
    stride_features,
    stride_prototypes,
    ignore_index,
    inv_temperature,
    HAS_TEMPERATURE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Inverse norms of both operands, and every sample's positive.

    A positive is a product of two rows, read here once; finding it in the tiles of the log-sum-exp would cost each
    tile a reduction across its rows. A label indexes memory only after it was found to lie in [0, K).
    """
    feature_blocks = tl.cdiv(N, BLOCK_R)
    block = tl.program_id(0)
    squares_R = tl.zeros((BLOCK_R,), tl.float32)
    if block < feature_blocks:
        sample_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
        inside_R = sample_R < N
        label_R = _classes(sample_R, N, labels_ptr, None, K, ignore_index, False, False)
        has_label_R = label_R >= 0
        products_R = tl.zeros((BLOCK_R,), tl.float32)
        own_squares_R = tl.zeros((BLOCK_R,), tl.float32)
        for d in range(0, D, BLOCK_D):
            z_RD = _load_rows(features_ptr, sample_R, inside_R, stride_features, d, D, BLOCK_D).to(tl.float32)
            w_RD = _load_rows(prototypes_ptr, label_R, has_label_R, stride_prototypes, d, D, BLOCK_D).to(tl.float32)
            squares_R += tl.sum(z_RD * z_RD, axis=1)
            own_squares_R += tl.sum(w_RD * w_RD, axis=1)
            products_R += tl.sum(z_RD * w_RD, axis=1)
        inv_R = _inverse(squares_R, NORMALIZE)
        inv_temp = _inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
        positives_R = products_R * inv_R * _inverse(own_squares_R, NORMALIZE) * inv_temp
        tl.store(inv_features_ptr + sample_R, inv_R, mask=inside_R)
        tl.store(positives_ptr + sample_R, tl.where(has_label_R, positives_R, 0.0), mask=inside_R)
    else:
        class_R = (block - feature_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside_R = class_R < K
        for d in range(0, D, BLOCK_D):
            w_RD = _load_rows(prototypes_ptr, class_R, inside_R, stride_prototypes, d, D, BLOCK_D).to(tl.float32)
            squares_R += tl.sum(w_RD * w_RD, axis=1)
        tl.store(inv_prototypes_ptr + class_R, _inverse(squares_R, NORMALIZE), mask=inside_R)


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    row_R,
    row_C,
    inside_R,
    inside_C,
    stride_a,
    stride_b,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A·Bᵀ for one tile, over D in steps."""
    dots_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for d in range(0, D, BLOCK_D):
        a_RD = _load_rows(a_ptr, row_R, inside_R, stride_a, d, D, BLOCK_D)
        b_CD = _load_rows(b_ptr, row_C, inside_C, stride_b, d, D, BLOCK_D)
        dots_RC = tl.dot(a_RD, b_CD.T, dots_RC, input_precision=INPUT_PRECISION)
    return dots_RC


@triton.jit
def _logits(dots_RC, inv_R, inv_C, inv_temp, ROWS_ARE_CLASSES: tl.constexpr):
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


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _split_range(split, splits, C, BLOCK_C: tl.constexpr):
    """Columns [first, last) of a split; whole tiles, so the bounds depend on C alone."""
    step = tl.cdiv(tl.cdiv(C, BLOCK_C), splits) * BLOCK_C
    return split * step, tl.minimum((split + 1) * step, C)


@triton.jit(do_not_specialize=["ignore_index"])
def _lse_fwd_kernel(
    a_ptr,  # [R, D] operand whose rows are summed over B
    b_ptr,  # [C, D]
    inv_a_ptr,  # fp32, one a row of A
    inv_b_ptr,  # fp32, one a row of B
    labels_ptr,  # [N] int64
    temperature_ptr,  # [1] fp32 when HAS_TEMPERATURE
    present_ptr,  # [R] int32, the class of each row, present ones first, when COMPACT
    num_present_ptr,  # [1] int32: rows from here on are of absent classes and take no part, when COMPACT
    lse_ptr,  # [S, R] fp32
    R,
    C,
    D,
    num_classes,
    stride_a,
    stride_b,
    ignore_index,
    inv_temperature,
    A_IS_CLASSES: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    FIXED_SHIFT: tl.constexpr,  # exp(s) is summed as it is: |s| <= 64
    HAS_TEMPERATURE: tl.constexpr,
    COMPACT: tl.constexpr,
    NARROW: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = R
    if COMPACT:
        R = tl.load(num_present_ptr)
    if tl.program_id(0) * BLOCK_R >= R:
        return
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    class_R = _classes(row_R, R, labels_ptr, present_ptr, num_classes, ignore_index, A_IS_CLASSES, COMPACT)
    inv_temp = _inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    inv_a_R = tl.load(inv_a_ptr + row_R, mask=inside_R, other=0.0)
    if NARROW:
        a_RD = _load_rows(a_ptr, row_R, inside_R, stride_a, 0, D, BLOCK_D)

    maximum_R = tl.full((BLOCK_R,), 0.0 if FIXED_SHIFT else float("-inf"), tl.float32)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    first, last = _split_range(tl.program_id(1), tl.num_programs(1), C, BLOCK_C)
    for start in range(first, last, BLOCK_C):
        row_C = start + tl.arange(0, BLOCK_C)
        inside_C = row_C < C
        class_C = _classes(row_C, C, labels_ptr, present_ptr, num_classes, ignore_index, not A_IS_CLASSES, False)
        if NARROW:
            b_CD = _load_rows(b_ptr, row_C, inside_C, stride_b, 0, D, BLOCK_D)
            dots_RC = tl.dot(a_RD, b_CD.T, input_precision=INPUT_PRECISION)
        else:
            dots_RC = _product(
                a_ptr, b_ptr, row_R, row_C, inside_R, inside_C, stride_a, stride_b, D,
                BLOCK_R, BLOCK_C, BLOCK_D, INPUT_PRECISION,
            )  # fmt: skip
        inv_b_C = tl.load(inv_b_ptr + row_C, mask=inside_C, other=0.0)
        logits_RC = _logits(dots_RC, inv_a_R, inv_b_C, inv_temp, A_IS_CLASSES)

        summed_RC = (class_C >= 0)[None, :]
        if EXCLUDE_OWN:
            summed_RC = summed_RC & (class_R[:, None] != class_C[None, :])
        logits_RC = tl.where(summed_RC, logits_RC, float("-inf"))
        if FIXED_SHIFT:
            total_R += tl.sum(_exp(logits_RC), axis=1)
        else:
            higher_R = tl.maximum(maximum_R, tl.max(logits_RC, axis=1))
            shift_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)  # nothing summed so far: no inf - inf
            total_R = total_R * _exp(maximum_R - shift_R)
            total_R += tl.sum(_exp(logits_RC - shift_R[:, None]), axis=1)
            maximum_R = higher_R

    lse_R = maximum_R + tl.log2(total_R) * _LN2
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * rows + row_R, lse_R, mask=inside_R)


@triton.jit
def _combine_kernel(
    partials_ptr,  # [S, R] fp32 log-sum-exps
    lse_ptr,  # [R] fp32
    S,
    R,
    BLOCK_R: tl.constexpr,
):
    """log Σ_s exp partials[s], in the order of s."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    maximum_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    partials = partials_ptr + rows
    for _ in range(S):
        maximum_R = tl.maximum(maximum_R, tl.load(partials, mask=inside, other=float("-inf")))
        partials += R
    shift_R = tl.where(maximum_R == float("-inf"), 0.0, maximum_R)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    partials = partials_ptr + rows
    for _ in range(S):
        partial_R = tl.load(partials, mask=inside, other=float("-inf"))
        total_R += tl.exp2((partial_R - shift_R) * _LOG2E)
        partials += R
    tl.store(lse_ptr + rows, shift_R + tl.log2(total_R) * _LN2, mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@triton.jit
def _load_side(lse_ptr, grad_ptr, row, inside, USED: tl.constexpr):
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
def _logit_grads(
    logits_RC,
    class_R,
    class_C,
    lse_R,
    grad_R,
    lse_C,
    grad_C,
    positive_RC,  # g_pos, broadcast along the classes
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
):
    """G of one tile in fp32, positives included."""
    grads_RC = tl.zeros_like(logits_RC)
    if HAS_A:
        grads_RC += grad_R[:, None] * _exp(logits_RC - lse_R[:, None])
    if HAS_B:
        grads_RC += grad_C[None, :] * _exp(logits_RC - lse_C[None, :])
    own_RC = class_R[:, None] == class_C[None, :]
    if EXCLUDE_OWN:
        grads_RC = tl.where(own_RC, positive_RC, grads_RC)
    else:
        grads_RC = tl.where(own_RC, grads_RC + positive_RC, grads_RC)
    return tl.where((class_R >= 0)[:, None] & (class_C >= 0)[None, :], grads_RC, 0.0)


@triton.jit(do_not_specialize=["ignore_index"])
def _lse_bwd_kernel(
    a_ptr,  # [R, D] operand whose gradient this program sums
    b_ptr,  # [C, D]
    inv_a_ptr,
    inv_b_ptr,
    labels_ptr,  # [N] int64
    lse_a_ptr,  # fp32, one a row of A, when HAS_A
    lse_b_ptr,  # fp32, one a row of B, when HAS_B
    grad_a_ptr,  # upstream gradient of lse_a
    grad_b_ptr,
    grad_pos_ptr,  # [N] fp32
    temperature_ptr,
    present_ptr,
    num_present_ptr,
    range_ptr,  # [1] fp32 power of two that brings G into fp16's range, when HAS_RANGE
    grad_ptr,  # [R, D]: dA
    radial_ptr,  # [R] fp32: x·P, see the top of the file
    partials_ptr,  # [S, R, D] fp32 when SPLIT: P of this split
    R,
    C,
    D,
    num_classes,
    stride_a,
    stride_b,
    stride_partials,
    ignore_index,
    inv_temperature,
    A_IS_CLASSES: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    COMPACT: tl.constexpr,
    SPLIT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if COMPACT:
        if A_IS_CLASSES:
            R = tl.load(num_present_ptr)
        else:
            C = tl.load(num_present_ptr)
    if tl.program_id(0) * BLOCK_R >= R:
        return
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    class_R = _classes(row_R, R, labels_ptr, present_ptr, num_classes, ignore_index, A_IS_CLASSES, COMPACT)
    inv_temp = _inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    inv_a_R = tl.load(inv_a_ptr + row_R, mask=inside_R, other=0.0)
    lse_R, grad_R = _load_side(lse_a_ptr, grad_a_ptr, row_R, inside_R, HAS_A)
    a_RD = _load_rows(a_ptr, row_R, inside_R, stride_a, 0, D, BLOCK_D)
    if not A_IS_CLASSES:
        positive_R = tl.load(grad_pos_ptr + row_R, mask=inside_R, other=0.0)
    fp16_range = 1.0
    if HAS_RANGE:
        fp16_range = tl.load(range_ptr)

    sum_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    first, last = _split_range(tl.program_id(1), tl.num_programs(1), C, BLOCK_C)
    for start in range(first, last, BLOCK_C):
        row_C = start + tl.arange(0, BLOCK_C)
        inside_C = row_C < C
        class_C = _classes(row_C, C, labels_ptr, present_ptr, num_classes, ignore_index, not A_IS_CLASSES, COMPACT)
        b_CD = _load_rows(b_ptr, row_C, inside_C, stride_b, 0, D, BLOCK_D)
        inv_b_C = tl.load(inv_b_ptr + row_C, mask=inside_C, other=0.0)
        lse_C, grad_C = _load_side(lse_b_ptr, grad_b_ptr, row_C, inside_C, HAS_B)
        if A_IS_CLASSES:
            positive_RC = tl.load(grad_pos_ptr + row_C, mask=inside_C, other=0.0)[None, :]
        else:
            positive_RC = positive_R[:, None]
        dots_RC = tl.dot(a_RD, b_CD.T, input_precision=INPUT_PRECISION)
        logits_RC = _logits(dots_RC, inv_a_R, inv_b_C, inv_temp, A_IS_CLASSES)
        grads_RC = _logit_grads(
            logits_RC, class_R, class_C, lse_R, grad_R, lse_C, grad_C, positive_RC, HAS_A, HAS_B, EXCLUDE_OWN
        )
        weights_RC = (grads_RC * (inv_b_C * fp16_range)[None, :]).to(b_CD.dtype)
        sum_RD = tl.dot(weights_RC, b_CD, sum_RD, input_precision=INPUT_PRECISION)

    sum_RD *= (inv_a_R / fp16_range)[:, None]
    depth = tl.arange(0, BLOCK_D)
    inside_RD = inside_R[:, None] & (depth < D)[None, :]
    start_R = row_R.to(tl.int64) * D
    if SPLIT:
        partials_ptr += tl.program_id(1).to(tl.int64) * stride_partials
        tl.store(partials_ptr + start_R[:, None] + depth[None, :], sum_RD, mask=inside_RD)
    else:
        x_RD = a_RD.to(tl.float32)
        radial_R = tl.sum(x_RD * sum_RD, axis=1)
        if NORMALIZE:
            sum_RD -= x_RD * (radial_R * inv_a_R * inv_a_R)[:, None]
        tl.store(grad_ptr + start_R[:, None] + depth[None, :], sum_RD * inv_temp, mask=inside_RD)
        tl.store(radial_ptr + row_R, radial_R, mask=inside_R)


@triton.jit
def _sum_partials(
    partials_ptr, row_R, inside_R, d, D, S, stride_partials, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    depth = d + tl.arange(0, BLOCK_D)
    inside_RD = inside_R[:, None] & (depth < D)[None, :]
    partials = partials_ptr + row_R.to(tl.int64)[:, None] * D + depth[None, :]
    sum_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for _ in range(S):
        sum_RD += tl.load(partials, mask=inside_RD, other=0.0)
        partials += stride_partials
    return sum_RD


@triton.jit
def _finish_kernel(
    partials_ptr,  # [S, R, D] fp32: P, in S parts
    x_ptr,  # [R, D] the operand P is the gradient of
    inv_ptr,  # [R] fp32
    temperature_ptr,
    range_ptr,
    grad_ptr,  # [R, D]
    radial_ptr,  # [R] fp32
    S,
    R,
    D,
    stride_x,
    stride_partials,
    inv_temperature,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dX = (P - t i² x)/τ, t = x·P. P is read twice, the second time from cache."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    inv_temp = _inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    unscale = 1.0
    if HAS_RANGE:
        unscale = 1.0 / tl.load(range_ptr)

    radial_R = tl.zeros((BLOCK_R,), tl.float32)
    for d in range(0, D, BLOCK_D):
        sum_RD = _sum_partials(partials_ptr, row_R, inside_R, d, D, S, stride_partials, BLOCK_R, BLOCK_D)
        x_RD = _load_rows(x_ptr, row_R, inside_R, stride_x, d, D, BLOCK_D).to(tl.float32)
        radial_R += tl.sum(x_RD * sum_RD, axis=1)
    radial_R *= unscale
    tl.store(radial_ptr + row_R, radial_R, mask=inside_R)
    inv_R = tl.load(inv_ptr + row_R, mask=inside_R, other=0.0)
    for d in range(0, D, BLOCK_D):
        sum_RD = _sum_partials(partials_ptr, row_R, inside_R, d, D, S, stride_partials, BLOCK_R, BLOCK_D) * unscale
        if NORMALIZE:
            x_RD = _load_rows(x_ptr, row_R, inside_R, stride_x, d, D, BLOCK_D).to(tl.float32)
            sum_RD -= x_RD * (radial_R * inv_R * inv_R)[:, None]
        depth = d + tl.arange(0, BLOCK_D)
        grads = grad_ptr + row_R.to(tl.int64)[:, None] * D + depth[None, :]
        tl.store(grads, sum_RD * inv_temp, mask=inside_R[:, None] & (depth < D)[None, :])


@triton.jit(do_not_specialize=["ignore_index", "row_start"])
def _lse_bwd_tile_kernel(
    w_ptr,  # [R, D]: this chunk of classes, and so are all vectors over classes but present_ptr
    z_ptr,  # [C, D]: this chunk of samples, and so are all vectors over samples
    inv_w_ptr,
    inv_z_ptr,
    labels_ptr,
    row_lse_ptr,
    col_lse_ptr,
    grad_row_ptr,
    grad_col_ptr,
    grad_pos_ptr,
    temperature_ptr,
    present_ptr,
    num_present_ptr,
    range_ptr,
    h_ptr,  # [R, C] in the operand's type
    R,
    C,
    D,
    row_start,  # of this chunk among the (present) classes
    num_classes,
    stride_w,
    stride_z,
    stride_h,
    ignore_index,
    inv_temperature,
    HAS_ROWS: tl.constexpr,
    HAS_COLS: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    COMPACT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """H of one tile. Rows past the present classes are written as zeros: the library products read them."""
    row_blocks = tl.cdiv(R, BLOCK_R)
    row_R = tl.program_id(0) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    row_C = tl.program_id(0) // row_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    members, depth = R, D
    if COMPACT:
        members = tl.minimum(R, tl.load(num_present_ptr) - row_start)
        depth = tl.where(
            tl.program_id(0) % row_blocks * BLOCK_R < members, D, 0
        )  # a block of absent classes: no product
    inside_R, inside_C = row_R < members, row_C < C
    class_R = _classes(
        row_start + row_R, row_start + members, labels_ptr, present_ptr, num_classes, ignore_index, True, COMPACT
    )
    class_C = _classes(row_C, C, labels_ptr, present_ptr, num_classes, ignore_index, False, COMPACT)
    inv_temp = _inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    dots_RC = _product(
        w_ptr, z_ptr, row_R, row_C, inside_R, inside_C, stride_w, stride_z, depth,
        BLOCK_R, BLOCK_C, BLOCK_D, INPUT_PRECISION,
    )  # fmt: skip
    inv_w_R = tl.load(inv_w_ptr + row_R, mask=inside_R, other=0.0)
    inv_z_C = tl.load(inv_z_ptr + row_C, mask=inside_C, other=0.0)
    lse_R, grad_R = _load_side(row_lse_ptr, grad_row_ptr, row_R, inside_R, HAS_ROWS)
    lse_C, grad_C = _load_side(col_lse_ptr, grad_col_ptr, row_C, inside_C, HAS_COLS)
    positive_RC = tl.load(grad_pos_ptr + row_C, mask=inside_C, other=0.0)[None, :]
    logits_RC = _logits(dots_RC, inv_w_R, inv_z_C, inv_temp, True)
    grads_RC = _logit_grads(
        logits_RC, class_R, class_C, lse_R, grad_R, lse_C, grad_C, positive_RC, HAS_ROWS, HAS_COLS, EXCLUDE_OWN
    )
    if HAS_RANGE:
        inv_w_R *= tl.load(range_ptr)
    h_RC = grads_RC * inv_w_R[:, None] * inv_z_C[None, :]
    h_ptrs = h_ptr + row_R.to(tl.int64)[:, None] * stride_h + row_C[None, :]
    tl.store(h_ptrs, h_RC, mask=(row_R < R)[:, None] & (row_C < C)[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


@dataclass(frozen=True)
class _Present:
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
class _Operands:
    """The tensors as the kernels take them: one type for both sides, aligned rows, D a multiple of 16."""

    features: Tensor  # [N, D]
    prototypes: Tensor  # [K, D]
    labels: Tensor  # [N]
    present: _Present | None

    def class_arguments(self) -> dict:
        """How the kernels tell which class a row of prototypes is."""
        return {
            "num_classes": len(self.prototypes),
            "present_ptr": None if self.present is None else self.present.classes.to(torch.int32),
            "num_present_ptr": None if self.present is None else self.present.count,
            "COMPACT": self.present is not None,
        }


@dataclass(frozen=True)
class _Options:
    temperature: Tensor | None
    inv_temperature: float
    ignore_index: int
    exclude_own: bool
    normalize: bool

    def fixed_shift(self, dtype: torch.dtype) -> bool:
        """Whether exp(s) can be summed as it is. float32 keeps the maximum, which is more exact."""
        bounded = self.normalize and self.temperature is None and self.inv_temperature <= _MAX_FIXED_SHIFT
        return bounded and dtype.itemsize == 2

    def scalars(self) -> dict:
        """The arguments every kernel over logits takes."""
        return {
            "temperature_ptr": self.temperature,
            "ignore_index": self.ignore_index,
            "inv_temperature": self.inv_temperature,
            "EXCLUDE_OWN": self.exclude_own,
            "HAS_TEMPERATURE": self.temperature is not None,
        }


def launch_fwd(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    counts: Tensor | None = None,
    temperature: Tensor | None = None,
    inv_temperature: float,
    ignore_index: int,
    rows: bool,
    cols: bool,
    exclude_own: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps of s = ŵ·u/τ along rows and columns, the positives and the inverse norms.

    Args:
        features, prototypes: [N, D] and [K, D] float32, bfloat16 or float16, any row stride. Products are taken in the
            type of the features and summed in fp32.
        labels: [N] int64. `ignore_index` and anything outside [0, K) is left out of every row sum and has no positive.
        counts: [K] int64, samples of each class in the global batch. With rows alone and K large, rows of absent
            classes are skipped and their row_lse is -inf.
        temperature: one fp32 value on the device, read by the kernels; None to use the number `inv_temperature`.

    Returns (fp32): row_lse [K] or [0]; col_lse [N] or [0], both -inf where nothing was summed; positives [N], zero for
        ignored samples; inverse norms [N] and [K], ones when not `normalize`, zero for vectors no longer than 1e-12.
    """
    operands = _prepare(features, prototypes, labels, counts, rows_only=rows and not cols)
    options = _Options(temperature, inv_temperature, ignore_index, exclude_own, normalize)
    with _launch.on_device(features):
        positives, inv_features, inv_prototypes = _inverse_norms(operands, options)
        shared = (operands, options, inv_features, inv_prototypes)
        row_lse = _launch_lse(*shared, a_is_classes=True) if rows else positives.new_empty(0)
        col_lse = _launch_lse(*shared, a_is_classes=False) if cols else positives.new_empty(0)
    return row_lse, col_lse, positives, inv_features, inv_prototypes


def launch_bwd(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    inv_norm_features: Tensor,
    inv_norm_prototypes: Tensor,
    grad_row: Tensor,
    grad_col: Tensor,
    grad_pos: Tensor,
    *,
    counts: Tensor | None = None,
    temperature: Tensor | None = None,
    inv_temperature: float,
    ignore_index: int,
    rows: bool,
    cols: bool,
    exclude_own: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient for upstream gradients of row_lse, col_lse and positives (contiguous fp32; unused sides are not read).

    Returns: grad_features [N, D] and grad_prototypes [K, D], summed in fp32, in the types of their inputs; Σ G∘s, an
        fp32 scalar, from which dL/dτ = -Σ G∘s / τ.
    """
    operands = _prepare(features, prototypes, labels, counts, rows_only=rows and not cols)
    options = _Options(temperature, inv_temperature, ignore_index, exclude_own, normalize)
    present = operands.present
    classes = operands.prototypes, inv_norm_prototypes, row_lse if rows else None, grad_row if rows else None
    samples = operands.features, inv_norm_features, col_lse if cols else None, grad_col if cols else None
    if present is not None:
        classes = tuple(present.take(tensor) for tensor in classes)
    # Rows of absent classes are not visited, and without samples none is: they keep the zeros they start from.
    new = torch.empty if present is None and len(features) else torch.zeros
    classes = _Side(*classes, *_gradient_of(prototypes, classes[0], new))
    samples = _Side(*samples, *_gradient_of(features, samples[0], new))
    if len(features):
        narrow = _launch.is_narrow(operands.features.dtype, operands.features.shape[1])
        backward = _narrow_backward if narrow else _wide_backward
        with _launch.on_device(features):
            backward(operands, options, classes, samples, grad_pos)
    grad_prototypes = classes.grad
    if present is not None:
        grad_prototypes = present.spread(grad_prototypes, len(prototypes), 0.0)
    logit_grad_sum = samples.radial.sum()
    logit_grad_sum = (
        logit_grad_sum * inv_temperature if temperature is None else logit_grad_sum / temperature.reshape(())
    )
    return _unpadded(samples.grad, features), _unpadded(grad_prototypes, prototypes), logit_grad_sum


def _gradient_of(x: Tensor, operand: Tensor, new: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Room for the gradient of x in x's type and the operand's (padded) shape, and for x·P."""
    grad = new(operand.shape, dtype=_kernel_dtype(x), device=x.device)
    return grad, new(len(operand), dtype=torch.float32, device=x.device)


def _unpadded(grad: Tensor, x: Tensor) -> Tensor:
    return grad[:, : x.shape[1]].to(x.dtype).contiguous()


def _kernel_dtype(x: Tensor) -> torch.dtype:
    """Triton's interpreter misreads bfloat16, so without a GPU it is computed in float32."""
    return torch.float32 if x.dtype == torch.bfloat16 and not x.is_cuda else x.dtype


def _prepare(features: Tensor, prototypes: Tensor, labels: Tensor, counts: Tensor | None, rows_only: bool) -> _Operands:
    dtype = _kernel_dtype(features)
    present = None
    if rows_only and counts is not None and _launch.skips_absent_classes(len(features), *prototypes.shape):
        present_first = torch.argsort((counts == 0).to(torch.int8), stable=True)
        present = _Present(present_first[: len(features)], (counts != 0).sum().to(torch.int32))
    return _Operands(
        _launch.aligned(features.to(dtype)), _launch.aligned(prototypes.to(dtype)), labels.contiguous(), present
    )


def _inverse_norms(operands: _Operands, options: _Options) -> tuple[Tensor, Tensor, Tensor]:
    """Positives, and the inverse norms of features and prototypes."""
    features, prototypes = operands.features, operands.prototypes
    (num_samples, dim), num_classes = features.shape, len(prototypes)
    positives = torch.empty(num_samples, dtype=torch.float32, device=features.device)
    inv_features = torch.empty_like(positives)
    inv_prototypes = positives.new_empty(num_classes)
    blocks = _launch.row_blocks(dim)
    _inverse_norms_kernel[(cdiv(num_samples, blocks["BLOCK_R"]) + cdiv(num_classes, blocks["BLOCK_R"]),)](
        features_ptr=features,
        prototypes_ptr=prototypes,
        labels_ptr=operands.labels,
        temperature_ptr=options.temperature,
        inv_features_ptr=inv_features,
        inv_prototypes_ptr=inv_prototypes,
        positives_ptr=positives,
        N=num_samples,
        K=num_classes,
        D=dim,
        stride_features=features.stride(0),
        stride_prototypes=prototypes.stride(0),
        ignore_index=options.ignore_index,
        inv_temperature=options.inv_temperature,
        HAS_TEMPERATURE=options.temperature is not None,
        NORMALIZE=options.normalize,
        **blocks,
    )
    return positives, inv_features, inv_prototypes


def _launch_lse(
    operands: _Operands,
    options: _Options,
    inv_features: Tensor,
    inv_prototypes: Tensor,
    *,
    a_is_classes: bool,
) -> Tensor:
    """row_lse when `a_is_classes`, else col_lse."""
    present = operands.present
    classes, samples = (operands.prototypes, inv_prototypes), (operands.features, inv_features)
    if present is not None:
        classes = present.take(operands.prototypes), present.take(inv_prototypes)
    (a, inv_a), (b, inv_b) = (classes, samples) if a_is_classes else (samples, classes)
    num_rows, (num_columns, dim) = len(a), b.shape
    narrow = _launch.is_narrow(a.dtype, dim)
    if narrow:
        config = _launch.narrow_config(_launch.FORWARD_NARROW, dim)
    else:
        table = _launch.FORWARD_WIDE_TIGHT if _launch.is_tight(False, a.device) else _launch.FORWARD_WIDE
        config = _launch.wide_config(table, a.dtype, num_rows, num_columns)
    row_blocks = cdiv(num_rows, config.block_r)
    splits = _launch.split_count(row_blocks, cdiv(num_columns, config.block_c), 4 * num_rows)
    lse = torch.empty(splits, num_rows, device=a.device)
    if present is not None:
        lse.fill_(float("-inf"))  # rows of absent classes are not visited
    if num_rows:
        _lse_fwd_kernel[(row_blocks, splits)](
            a_ptr=a,
            b_ptr=b,
            inv_a_ptr=inv_a,
            inv_b_ptr=inv_b,
            labels_ptr=operands.labels,
            lse_ptr=lse,
            R=num_rows,
            C=num_columns,
            D=dim,
            stride_a=a.stride(0),
            stride_b=b.stride(0),
            A_IS_CLASSES=a_is_classes,
            FIXED_SHIFT=options.fixed_shift(a.dtype),
            NARROW=narrow,
            INPUT_PRECISION=_launch.input_precision(a.dtype),
            **operands.class_arguments(),
            **options.scalars(),
            **config.launch_options(),
        )
    lse = _combine(lse) if splits > 1 else lse.view(-1)
    return lse if present is None else present.spread(lse, len(operands.prototypes), float("-inf"))


def _combine(partials: Tensor) -> Tensor:
    """log Σ exp of [S, R] along S."""
    splits, num_rows = partials.shape
    combined = partials.new_empty(num_rows)
    _combine_kernel[(cdiv(num_rows, _launch.COMBINE_BLOCKS["BLOCK_R"]),)](
        partials_ptr=partials, lse_ptr=combined, S=splits, R=num_rows, **_launch.COMBINE_BLOCKS
    )
    return combined


@dataclass(frozen=True)
class _Side:
    """One operand in the backward: what was kept of it, the upstream gradient of its log-sum-exp, and where dX goes."""

    x: Tensor  # [rows, D]
    inv: Tensor  # [rows]
    lse: Tensor | None  # [rows], None when its log-sum-exp is not used
    upstream: Tensor | None  # [rows]
    grad: Tensor  # [rows, D], written
    radial: Tensor  # [rows], written: x·P

    def rows(self, part: slice) -> _Side:
        return _Side(*(None if tensor is None else tensor[part] for tensor in vars(self).values()))


def _narrow_backward(operands: _Operands, options: _Options, classes: _Side, samples: _Side, grad_pos: Tensor) -> None:
    _launch_narrow(operands, options, classes, samples, grad_pos, a_is_classes=True)
    _launch_narrow(operands, options, samples, classes, grad_pos, a_is_classes=False)


def _launch_narrow(
    operands: _Operands, options: _Options, a: _Side, b: _Side, grad_pos: Tensor, *, a_is_classes: bool
) -> None:
    """dA, by recomputing the logits."""
    num_rows, (num_columns, dim) = len(a.x), b.x.shape
    tight = _launch.is_tight((b if a_is_classes else a).lse is not None, a.x.device)
    config = _launch.narrow_config(_launch.BACKWARD_NARROW_TIGHT if tight else _launch.BACKWARD_NARROW, dim)
    row_blocks = cdiv(num_rows, config.block_r)
    splits = _launch.split_count(row_blocks, cdiv(num_columns, config.block_c), 4 * num_rows * dim)
    fp16_range = _fp16_range(a.x.dtype, (a.upstream, b.upstream, grad_pos), b.inv)
    new = torch.empty if operands.present is None else torch.zeros  # rows of absent classes are not visited
    partials = new(splits, num_rows, dim, device=a.x.device) if splits > 1 else None
    _lse_bwd_kernel[(row_blocks, splits)](
        a_ptr=a.x,
        b_ptr=b.x,
        inv_a_ptr=a.inv,
        inv_b_ptr=b.inv,
        labels_ptr=operands.labels,
        lse_a_ptr=a.lse,
        lse_b_ptr=b.lse,
        grad_a_ptr=a.upstream,
        grad_b_ptr=b.upstream,
        grad_pos_ptr=grad_pos,
        range_ptr=fp16_range,
        grad_ptr=a.grad,
        radial_ptr=a.radial,
        partials_ptr=partials,
        R=num_rows,
        C=num_columns,
        D=dim,
        stride_a=a.x.stride(0),
        stride_b=b.x.stride(0),
        stride_partials=num_rows * dim,
        A_IS_CLASSES=a_is_classes,
        HAS_A=a.lse is not None,
        HAS_B=b.lse is not None,
        HAS_RANGE=fp16_range is not None,
        SPLIT=splits > 1,
        NORMALIZE=options.normalize,
        INPUT_PRECISION=_launch.input_precision(a.x.dtype),
        **operands.class_arguments(),
        **options.scalars(),
        **config.launch_options(),
    )
    if partials is not None:
        _finish(options, a, partials, None)  # the kernel has undone the scale of fp16


def _wide_backward(operands: _Operands, options: _Options, classes: _Side, samples: _Side, grad_pos: Tensor) -> None:
    """Both gradients through H, a bounded chunk at a time along the longer side; the other side's sum stays in fp32."""
    dtype, num_rows, num_samples = samples.x.dtype, len(classes.x), len(samples.x)
    fp16_range = _fp16_range(dtype, (classes.upstream, samples.upstream, grad_pos), classes.inv, samples.inv)
    longer, shorter = (classes, samples) if num_rows > num_samples else (samples, classes)
    whole_sum = None
    for rows, columns in _launch.chunks(num_rows, num_samples, dtype.itemsize):
        w, z = classes.rows(rows), samples.rows(columns)
        h = _launch_tile(operands, options, w, z, columns, rows.start, grad_pos, fp16_range)
        sums = {id(classes): _mm_fp32(h, z.x), id(samples): _mm_fp32(h.T, w.x)}
        _finish(options, w if longer is classes else z, sums[id(longer)][None], fp16_range)
        whole_sum = sums[id(shorter)] if whole_sum is None else whole_sum.add_(sums[id(shorter)])
    _finish(options, shorter, whole_sum[None], fp16_range)


def _launch_tile(
    operands: _Operands,
    options: _Options,
    classes: _Side,
    samples: _Side,
    columns: slice,
    row_start: int,
    grad_pos: Tensor,
    fp16_range: Tensor | None,
) -> Tensor:
    """H of a chunk of classes and samples, in the operand's type."""
    num_rows, (num_columns, dim) = len(classes.x), samples.x.shape
    tight = _launch.is_tight(samples.lse is not None, samples.x.device)
    table = _launch.BACKWARD_WIDE_TIGHT if tight else _launch.BACKWARD_WIDE
    config = _launch.wide_config(table, samples.x.dtype, num_rows, num_columns)
    h = samples.x.new_empty(num_rows, cdiv(num_columns, 64) * 64)  # padded: library products want aligned rows
    _lse_bwd_tile_kernel[(cdiv(num_rows, config.block_r) * cdiv(num_columns, config.block_c),)](
        w_ptr=classes.x,
        z_ptr=samples.x,
        inv_w_ptr=classes.inv,
        inv_z_ptr=samples.inv,
        labels_ptr=operands.labels[columns],
        row_lse_ptr=classes.lse,
        col_lse_ptr=samples.lse,
        grad_row_ptr=classes.upstream,
        grad_col_ptr=samples.upstream,
        grad_pos_ptr=grad_pos[columns],
        range_ptr=fp16_range,
        h_ptr=h,
        R=num_rows,
        C=num_columns,
        D=dim,
        row_start=row_start,
        stride_w=classes.x.stride(0),
        stride_z=samples.x.stride(0),
        stride_h=h.stride(0),
        HAS_ROWS=classes.lse is not None,
        HAS_COLS=samples.lse is not None,
        HAS_RANGE=fp16_range is not None,
        INPUT_PRECISION=_launch.input_precision(samples.x.dtype),
        **operands.class_arguments(),
        **options.scalars(),
        **config.launch_options(),
    )
    return h[:, :num_columns]


def _finish(options: _Options, side: _Side, partials: Tensor, fp16_range: Tensor | None) -> None:
    """side.grad and side.radial from P = Σ_s partials[s]."""
    splits, num_rows, dim = partials.shape
    blocks = _launch.row_blocks(dim)
    _finish_kernel[(cdiv(num_rows, blocks["BLOCK_R"]),)](
        partials_ptr=partials,
        x_ptr=side.x,
        inv_ptr=side.inv,
        temperature_ptr=options.temperature,
        range_ptr=fp16_range,
        grad_ptr=side.grad,
        radial_ptr=side.radial,
        S=splits,
        R=num_rows,
        D=dim,
        stride_x=side.x.stride(0),
        stride_partials=num_rows * dim,
        inv_temperature=options.inv_temperature,
        HAS_TEMPERATURE=options.temperature is not None,
        HAS_RANGE=fp16_range is not None,
        NORMALIZE=options.normalize,
        **blocks,
    )


def _fp16_range(dtype: torch.dtype, upstream: tuple[Tensor | None, ...], *inv_norms: Tensor) -> Tensor | None:
    """A power of two that brings the largest entry a rounded weight can have to about 2^13, on the device; fp16 only.

    G's entries are about 1/N^2, below fp16's smallest number; bfloat16 and float32 have the exponents for them.
    """
    if dtype != torch.float16:
        return None
    peak = torch.stack([g.abs().amax() for g in upstream if g is not None]).amax()
    for inv in inv_norms:
        peak = peak * inv.amax()
    exponent = (13.0 - torch.log2(peak).ceil()).clamp(-100.0, 100.0)
    return torch.exp2(exponent)


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """A·B summed and returned in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
