"""From log-sum-exps of samples against one another to SupCon's loss in one launch more, with what its backward reads.

With P_i positives of anchor i, L_i its log-sum-exp and p_i their sum ("out") or log-sum-exp ("in") as in pair_lse.py,

    L = (b/M) Σ_i a_i (L_i - p_i/P_i)      or      L = (b/M) Σ_i a_i (L_i - p_i + log P_i),

a_i = 0 for anchors without positives and 1 for all others, M how many anchors the mean is over, or 1 for the sum, and b
a constant. Hence

    M dL/dL_i = b a_i,     M dL/dp_i = -b a_i/P_i      or      -b a_i,

which do not depend on the gradient g from above: the backward kernels multiply by g/M last, in fp32, reading both from
the device. One program goes over all anchors: it takes less time than the launch that would add up the parts of many.

Shapes: N samples, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, class_sums, pair_lse
from ._epilogue import Scaling
from .pair_backward import Backward, LossSide


@triton.jit
def _pair_loss_kernel(
    lse_ptr,  # [N] fp32
    positives_ptr,  # [N] fp32
    ids_ptr,  # [N] int64
    counts_ptr,  # [N] int32: samples of each class
    grad_lse_ptr,  # [N] fp32, written, as all that follow
    grad_positives_ptr,  # [N] fp32
    loss_ptr,  # [1] fp32
    divisor_ptr,  # [1] fp32: M
    alone_ptr,  # [1] int64: anchors without positives
    N,
    scale,  # b
    INSIDE: tl.constexpr,
    EXCLUDE: tl.constexpr,  # the mean is over anchors with positives alone
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total_N = tl.zeros((BLOCK,), tl.float32)
    alone_N = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        row_N = start + tl.arange(0, BLOCK)
        inside_N = row_N < N
        id_N = tl.load(ids_ptr + row_N, mask=inside_N, other=-1)
        others_N = tl.load(counts_ptr + id_N, mask=id_N >= 0, other=1) - 1
        paired_N = inside_N & (others_N > 0)
        alone_N += tl.where(inside_N & (others_N == 0), 1, 0)
        lse_N = tl.load(lse_ptr + row_N, mask=paired_N, other=0.0)
        positive_N = tl.load(positives_ptr + row_N, mask=paired_N, other=0.0)
        others_N = tl.maximum(others_N, 1).to(tl.float32)
        share_N = tl.full((BLOCK,), 1.0, tl.float32)
        if INSIDE:
            positive_N -= tl.log(others_N)
        else:
            share_N /= others_N
            positive_N /= others_N
        total_N += lse_N - positive_N
        tl.store(grad_lse_ptr + row_N, tl.where(paired_N, scale, 0.0), mask=inside_N)
        tl.store(grad_positives_ptr + row_N, tl.where(paired_N, -scale * share_N, 0.0), mask=inside_N)
    alone = tl.sum(alone_N, axis=0)
    divisor = 1.0
    if MEAN:
        divisor = tl.maximum(N - alone if EXCLUDE else N, 1).to(tl.float32)
    tl.store(loss_ptr, tl.sum(total_N, axis=0) * scale / divisor)
    tl.store(divisor_ptr, divisor)
    tl.store(alone_ptr, alone.to(tl.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


class Forward(NamedTuple):
    """The loss, and all that its backward reads."""

    loss: Tensor  # [] fp32
    alone: Tensor  # [] int64: anchors without positives
    divisor: Tensor  # [] fp32: M
    ids: Tensor  # [N] int64: class numbers, see `class_sums.classes`
    lse: Tensor  # [N] fp32, as all that follow
    positives: Tensor
    inv: Tensor  # inverse norms
    grad_lse: Tensor  # M times the gradient, and so is the next
    grad_positives: Tensor


def launch_fwd(
    features: Tensor,
    labels: Tensor,
    *,
    absent: int,
    inv_temperature: float,
    scale: float,
    normalize: bool,
    inside: bool,
    exclude: bool,
    mean: bool,
) -> Forward:
    """The loss of features as `pair_lse.launch_fwd` takes them, of labels [N] int64 of any values, contrasted with
    themselves; times `scale`. See `_pair_loss_kernel` for the rest.
    """
    ids, counts = class_sums.classes(labels, 0, absent)
    lse, positives, inv, _ = pair_lse.launch_fwd(
        features, None, ids, None, None, offset=0, temperature=None, inv_temperature=inv_temperature,
        normalize=normalize, inside=inside,
    )  # fmt: skip
    grad_lse, grad_positives = torch.empty_like(lse), torch.empty_like(lse)
    loss, divisor, alone = lse.new_empty(()), lse.new_empty(()), ids.new_empty(())
    with _launch.on_device(features):
        _pair_loss_kernel[(1,)](
            lse_ptr=lse,
            positives_ptr=positives,
            ids_ptr=ids,
            counts_ptr=counts,
            grad_lse_ptr=grad_lse,
            grad_positives_ptr=grad_positives,
            loss_ptr=loss,
            divisor_ptr=divisor,
            alone_ptr=alone,
            N=len(ids),
            scale=scale,
            INSIDE=inside,
            EXCLUDE=exclude,
            MEAN=mean,
            **_launch.PAIR_LOSS_BLOCKS,
        )
    return Forward(loss, alone, divisor, ids, lse, positives, inv, grad_lse, grad_positives)


def launch_bwd(
    features: Tensor,
    ids: Tensor,
    lse: Tensor,
    positives: Tensor,
    inv: Tensor,
    grad_lse: Tensor,
    grad_positives: Tensor,
    *,
    factor: tuple[Tensor, Tensor],
    inv_temperature: float,
    normalize: bool,
    inside: bool,
) -> Tensor:
    """The features' gradient [N, D] in their type, of what `launch_fwd` gave, times g/M for factor (g, M)."""
    scaling = Scaling(None, inv_temperature, normalize, factor=factor)
    side = LossSide(lse, grad_lse, positives, grad_positives)
    pairs = pair_lse.against_itself(features, ids)
    grad, _ = pair_lse.gradient(scaling, Backward(pairs, inv, inv, side, side, None, None, inside), features)
    return grad
