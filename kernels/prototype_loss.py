"""From log-sum-exps to the loss in one launch more: its mean or sum, and the gradients that its backward starts from.

With s_j the positive of sample j, a_j its class's weight (zero for ignored samples), ℓ_j its log-sum-exp,

    L = (1/M) Σ_j a_j (ℓ_j - s_j),     M = Σ_j a_j, or 1 for the sum,

where ℓ_j is col_lse[j], row_lse[y_j], or for both r_j + c_j = 1 parts of one sum, r_j = exp(row_lse[y_j] - ℓ_j). Hence

    M dL/dcol_lse[j] = a_j c_j,     M dL/drow_lse[c] = a_c Σ_{y_j = c} r_j,     M ∂L/∂s_j = -a_j,

which do not depend on the gradient g from above: the backward kernels multiply by g/M last, in fp32, reading both from
the device.

One launch joins the parts of split log-sum-exps, adds the terms up and writes these gradients. Programs of samples and
programs of classes need no word from each other: in a class's sum the only row_lse that counts is its own. Small
batches are one program of samples, hence three launches from features to loss; of large ones every program leaves its
part of the sums to one launch more, and many parts of many log-sum-exps are joined before.

Shapes: N samples, K classes, S splits, B programs of samples. Vectors carry _N and _K, tiles _KN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, prototype_forward, prototype_lse
from ._epilogue import combine, joined
from ._launch import cdiv
from ._prototype_tiles import Options, load_labels
from ._tiles import exp, log_sum


@triton.jit
def _store_totals(
    loss_ptr, divisor_ptr, extremes_ptr, index, count, total, weight, lowest, highest, MEAN: tl.constexpr
):
    """L and M, or, of several parts, the sums that these are made of. With nothing to average the loss is zero."""
    if count == 1:
        weight = tl.where(weight > 0, weight, 1.0) if MEAN else 1.0
        total /= weight
    tl.store(loss_ptr + index, total)
    tl.store(divisor_ptr + index, weight)
    tl.store(extremes_ptr + index, lowest)
    tl.store(extremes_ptr + count + index, highest)


@triton.jit(do_not_specialize=["ignore_index"])
def _loss_kernel(
    row_partials_ptr,  # [row_splits, K] fp32 when HAS_ROWS
    col_partials_ptr,  # [col_splits, N] fp32 when HAS_COLS
    positives_ptr,  # [N] fp32
    labels_ptr,  # [N] int64
    weight_ptr,  # [K] fp32 when HAS_WEIGHT
    class_counts_ptr,  # [K] int32, samples of each class, when HAS_COUNTS: else they are counted here
    row_lse_ptr,  # [K] fp32
    col_lse_ptr,  # [N] fp32
    grad_row_ptr,  # [K] fp32
    grad_col_ptr,  # [N] fp32
    grad_pos_ptr,  # [N] fp32
    loss_ptr,  # [B] fp32: of every program the sum of its terms, or the loss
    divisor_ptr,  # [B] fp32: the sum of its weights, or M
    extremes_ptr,  # [2, B] int64: smallest and largest label, ignored ones counted as zero
    row_splits,
    col_splits,
    N,
    K,
    ignore_index,
    HAS_ROWS: tl.constexpr,
    HAS_COLS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    ZERO_EMPTY: tl.constexpr,  # a sample without any logit to sum drops out; otherwise its positive stays
    MEAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    sample_blocks = tl.maximum(tl.cdiv(N, BLOCK_N), 1)
    block = tl.program_id(0)
    if block < sample_blocks:
        sample_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_N = sample_N < N
        label_N = tl.load(labels_ptr + sample_N, mask=inside_N, other=0)
        seen_N = tl.where(label_N == ignore_index, 0, label_N)
        class_N = load_labels(labels_ptr, sample_N, N, K, ignore_index)
        valid_N = class_N >= 0
        a_N = tl.where(valid_N, 1.0, 0.0)
        if HAS_WEIGHT:
            a_N = tl.load(weight_ptr + class_N, mask=valid_N, other=0.0)
        weight = tl.sum(a_N, axis=0)
        positive_N = tl.load(positives_ptr + sample_N, mask=inside_N, other=0.0)

        lse_N = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        share_N = tl.full((BLOCK_N,), 1.0, tl.float32)
        if HAS_ROWS:
            lse_N = joined(row_partials_ptr, class_N, valid_N, row_splits, K, BLOCK_S)
        if HAS_COLS:
            col_lse_N = joined(col_partials_ptr, sample_N, inside_N, col_splits, N, BLOCK_S)
            tl.store(col_lse_ptr + sample_N, col_lse_N, mask=inside_N)
            if HAS_ROWS:
                higher_N = tl.maximum(lse_N, col_lse_N)
                shift_N = tl.where(higher_N == float("-inf"), 0.0, higher_N)
                of_col_N = exp(col_lse_N - shift_N)
                total_N = exp(lse_N - shift_N) + of_col_N
                share_N = tl.where(total_N > 0, of_col_N / total_N, 0.0)
                lse_N = log_sum(higher_N, total_N)
            else:
                lse_N = col_lse_N
        empty_N = lse_N == float("-inf")
        if ZERO_EMPTY:
            a_N = tl.where(empty_N, 0.0, a_N)
        total = tl.sum(a_N * (tl.where(empty_N, 0.0, lse_N) - positive_N), axis=0)
        tl.store(grad_pos_ptr + sample_N, -a_N, mask=inside_N)
        if HAS_COLS:
            tl.store(grad_col_ptr + sample_N, tl.where(empty_N, 0.0, a_N * share_N), mask=inside_N)
        _store_totals(
            loss_ptr, divisor_ptr, extremes_ptr, block, sample_blocks, total, weight,
            tl.min(seen_N, axis=0), tl.max(seen_N, axis=0), MEAN,
        )  # fmt: skip
    elif HAS_ROWS:
        class_K = (block - sample_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside_K = class_K < K
        row_lse_K = joined(row_partials_ptr, class_K, inside_K, row_splits, K, BLOCK_S)
        if HAS_COUNTS:
            sum_K = tl.load(class_counts_ptr + class_K, mask=inside_K, other=0).to(tl.float32)
        else:
            sum_K = tl.zeros((BLOCK_K,), tl.float32)
            for start in range(0, N, BLOCK_N):
                sample_N = start + tl.arange(0, BLOCK_N)
                class_N = load_labels(labels_ptr, sample_N, N, K, ignore_index)
                own_KN = class_K[:, None] == class_N[None, :]
                if HAS_COLS:
                    col_lse_N = joined(col_partials_ptr, sample_N, sample_N < N, col_splits, N, BLOCK_S)
                    share_KN = 1.0 / (1.0 + exp(col_lse_N[None, :] - row_lse_K[:, None]))
                    sum_K += tl.sum(tl.where(own_KN, share_KN, 0.0), axis=1)
                else:
                    sum_K += tl.sum(tl.where(own_KN, 1.0, 0.0), axis=1)
        if HAS_WEIGHT:
            sum_K *= tl.load(weight_ptr + class_K, mask=inside_K, other=0.0)
        tl.store(row_lse_ptr + class_K, row_lse_K, mask=inside_K)
        # Without a single logit there is no share, and perhaps no number.
        tl.store(grad_row_ptr + class_K, tl.where(row_lse_K == float("-inf"), 0.0, sum_K), mask=inside_K)


@triton.jit
def _totals_kernel(
    losses_ptr,  # [B] fp32
    weights_ptr,  # [B] fp32
    all_extremes_ptr,  # [2, B] int64
    loss_ptr,  # [1] fp32
    divisor_ptr,  # [1] fp32
    extremes_ptr,  # [2] int64
    B,
    MEAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """What the programs of samples have left, added up in their order."""
    total_B = tl.zeros((BLOCK_B,), tl.float32)
    weight_B = tl.zeros((BLOCK_B,), tl.float32)
    lowest_B = tl.zeros((BLOCK_B,), tl.int64)
    highest_B = tl.zeros((BLOCK_B,), tl.int64)
    for start in range(0, B, BLOCK_B):
        index_B = start + tl.arange(0, BLOCK_B)
        inside_B = index_B < B
        total_B += tl.load(losses_ptr + index_B, mask=inside_B, other=0.0)
        weight_B += tl.load(weights_ptr + index_B, mask=inside_B, other=0.0)
        lowest_B = tl.minimum(lowest_B, tl.load(all_extremes_ptr + index_B, mask=inside_B, other=0))
        highest_B = tl.maximum(highest_B, tl.load(all_extremes_ptr + B + index_B, mask=inside_B, other=0))
    _store_totals(
        loss_ptr, divisor_ptr, extremes_ptr, 0, 1, tl.sum(total_B, axis=0), tl.sum(weight_B, axis=0),
        tl.min(lowest_B, axis=0), tl.max(highest_B, axis=0), MEAN,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


class Forward(NamedTuple):
    """The loss, and all that its backward reads."""

    loss: Tensor  # [] fp32
    row_lse: Tensor  # [K] fp32, or [0]
    col_lse: Tensor  # [N] fp32, or [0]
    positives: Tensor  # [N] fp32
    inv_features: Tensor  # [N] fp32
    inv_prototypes: Tensor  # [K] fp32
    kept: Tensor  # exp(s), see `prototype_lse.launch_fwd`, or empty
    grad_row: Tensor  # like row_lse, and the next two like theirs: M times the gradient
    grad_col: Tensor
    grad_pos: Tensor  # [N] fp32
    divisor: Tensor  # [] fp32: M
    extremes: Tensor  # [2] int64: smallest and largest label, ignored ones counted as zero


def launch_fwd(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    *,
    temperature: Tensor | None = None,
    inv_temperature: float,
    ignore_index: int,
    rows: bool,
    cols: bool,
    exclude_own: bool,
    normalize: bool,
    zero_empty: bool,
    mean: bool,
    keep_bytes: int = 0,
) -> Forward:
    """The loss of rows, columns or both, of tensors as `prototype_lse.launch_fwd` takes them; class weights [K]."""
    operands = prototype_lse.prepare(features, prototypes, labels, None, ignore_index, rows_only=False)
    options = Options(temperature, inv_temperature, normalize, exclude_own)
    num_samples, num_classes = len(features), len(prototypes)
    shape = _launch.kept_shape(
        features, prototypes, counts=None, temperature=temperature, inv_temperature=inv_temperature, rows=rows,
        cols=cols, normalize=normalize, keep_bytes=keep_bytes,
    )  # fmt: skip
    kept = operands.features.new_empty(shape)
    with _launch.on_device(features):
        counted = rows and not cols and num_samples * num_classes > _launch.MAX_COMPARISONS
        norms = prototype_forward.inverse_norms(operands, options, cols=cols, count=counted)
        positives = norms.positives
        parts = prototype_forward.partials(operands, options, norms, kept, rows=rows, cols=cols, of_ignored=False)
        joins = _launch.joins_in_loss(num_samples, *map(len, parts))
        if not joins:
            parts = [part if len(part) < 2 else combine(part)[None] for part in parts]
        row_partials, col_partials = parts
        blocks = _launch.loss_blocks(num_classes, joins)
        sample_blocks = max(cdiv(num_samples, blocks["BLOCK_N"]), 1)
        class_blocks = cdiv(num_classes, blocks["BLOCK_K"]) if rows else 0
        totals = _totals(sample_blocks, positives)
        row_lse, col_lse = (positives.new_empty(size) for size in (num_classes * rows, num_samples * cols))
        grad_row, grad_col, grad_pos = (torch.empty_like(x) for x in (row_lse, col_lse, positives))
        _loss_kernel[(sample_blocks + class_blocks,)](
            row_partials_ptr=row_partials if rows else None,
            col_partials_ptr=col_partials if cols else None,
            positives_ptr=positives,
            labels_ptr=operands.labels,
            weight_ptr=None if weight is None else weight.float().contiguous(),
            class_counts_ptr=norms.counts,
            row_lse_ptr=row_lse if rows else None,
            col_lse_ptr=col_lse if cols else None,
            grad_row_ptr=grad_row if rows else None,
            grad_col_ptr=grad_col if cols else None,
            grad_pos_ptr=grad_pos,
            loss_ptr=totals[0],
            divisor_ptr=totals[1],
            extremes_ptr=totals[2],
            row_splits=len(row_partials),
            col_splits=len(col_partials),
            N=num_samples,
            K=num_classes,
            ignore_index=ignore_index,
            HAS_ROWS=rows,
            HAS_COLS=cols,
            HAS_WEIGHT=weight is not None,
            HAS_COUNTS=counted,
            ZERO_EMPTY=zero_empty,
            MEAN=mean,
            **blocks,
        )
        if sample_blocks > 1:
            parts, totals = totals, _totals(1, positives)
            _totals_kernel[(1,)](
                losses_ptr=parts[0],
                weights_ptr=parts[1],
                all_extremes_ptr=parts[2],
                loss_ptr=totals[0],
                divisor_ptr=totals[1],
                extremes_ptr=totals[2],
                B=sample_blocks,
                MEAN=mean,
                **_launch.TOTALS_BLOCKS,
            )
    loss, divisor, extremes = totals
    upstream = grad_row, grad_col, grad_pos
    return Forward(
        loss.view(()), row_lse, col_lse, positives, norms.inv_features, norms.inv_prototypes, kept, *upstream,
        divisor.view(()), extremes.view(2),
    )  # fmt: skip


def _totals(parts: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for parts of the loss, of its divisor and of the labels' extremes."""
    return like.new_empty(parts), like.new_empty(parts), like.new_empty(2, parts, dtype=torch.int64)
