"""The operators of losses that contrast samples with samples, registered with torch.library like those of `_ops`.

`hypercontrast::pair_lse`: of the logits s[i, j] = u_i·v_j/τ between anchors u and columns v, each anchor's log-sum-exp
over the columns other than itself, and its positives (their sum, or their log-sum-exp). For upstream gradients g and h
of the two the gradient of s is

    G[i, j] = g_i exp(s - lse_i) + [j is a positive of i] h_i   (h_i exp(s - positives_i) for a log-sum-exp),

zero at an anchor's own column. Contrasted with themselves, u = v, samples receive (G + Gᵀ) u/τ: both parts have the
same logits, so one pass over the tiles gives the whole gradient.

`hypercontrast::pair_loss` is the whole loss of one process's samples against themselves, by Triton or the extension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypercontrast import _checks, blockwise, blockwise_pairs, compiled
from hypercontrast._operator import operator
from hypercontrast._ops import in_full_precision
from hypercontrast.distributed import ABSENT


def _kernels():
    from hypercontrast.kernels import pair_lse  # Triton is imported on first use, not with the package

    return pair_lse


def _loss_kernels():
    from hypercontrast.kernels import pair_loss

    return pair_loss


@operator("hypercontrast::pair_lse")
def pair_lse(
    anchors: Tensor,
    columns: Tensor | None,
    anchor_ids: Tensor | None,
    column_ids: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    offset: int | None,
    inv_temperature: float,
    normalize: bool,
    inside: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps and positives of the n x m logits between anchors and columns.

    Args:
        anchors [n, D]; columns [m, D], or None for the anchors themselves.
        anchor_ids [n], column_ids [m]: class of each in [0, n + m), below zero for rows that are not there. A pair of
            one class is positive. None when `mask` [n, m] tells the positives.
        temperature: one float on the device in the accumulator's dtype, or None to use `inv_temperature`.
        offset: column offset + i is anchor i itself, and takes part in nothing of it; None when no column is.
        inside: take the positives' log-sum-exp instead of their sum.

    Returns:
        lse [n], -inf where nothing was summed; positives [n], zero or (inside) -inf where there are none; both float32
        from Triton, float64 from the blockwise backend; inverse norms [n], and [m] or [0], in the accumulator's dtype.
    """
    with in_full_precision(anchors):
        if anchors.device.type == "cpu":
            _checks.check_temperature_value(temperature)
        options = _options(temperature, offset, inv_temperature, normalize, inside)
        operands = (anchors, columns, anchor_ids, column_ids, mask)
        implementation = _kernels() if backend == "triton" else blockwise_pairs
        lse, positives, inv_anchors, inv_columns = implementation.launch_fwd(*operands, **options)
        return lse, positives, inv_anchors, inv_anchors.new_empty(0) if columns is None else inv_columns


def _options(temperature, offset, inv_temperature, normalize, inside) -> dict[str, Any]:
    """What forward and backward of either backend are told alike."""
    return {
        "temperature": temperature, "offset": offset, "inv_temperature": inv_temperature, "normalize": normalize,
        "inside": inside,
    }  # fmt: skip


@pair_lse.register_fake
def _pair_lse_fake(
    anchors, columns, anchor_ids, column_ids, mask, temperature, offset, inv_temperature, normalize, inside, backend
):
    n, m, dtype = anchors.shape[0], 0 if columns is None else columns.shape[0], _checks.accumulator(anchors)
    wide = torch.float32 if backend == "triton" else blockwise.statistics_dtype(anchors.device)
    statistics = [anchors.new_empty(n, dtype=wide) for _ in range(2)]
    return *statistics, anchors.new_empty(n, dtype=dtype), anchors.new_empty(m, dtype=dtype)


@operator("hypercontrast::pair_lse_backward")
def pair_lse_backward(
    rows: Tensor,
    columns: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    inv_rows: Tensor,
    inv_columns: Tensor,
    row_lse: Tensor | None,
    grad_row_lse: Tensor | None,
    row_positives: Tensor | None,
    grad_row_positives: Tensor | None,
    column_lse: Tensor | None,
    grad_column_lse: Tensor | None,
    column_positives: Tensor | None,
    grad_column_positives: Tensor | None,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    temperature: Tensor | None,
    offset: int | None,
    inv_temperature: float,
    normalize: bool,
    inside: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows as anchors, as columns of other anchors, or as both, and Σ G∘s over the same pairs.

    Log-sum-exps, positives and their gradients are those of the anchors on each side, None where that side holds none:
    one by one, for torch batches no lists. Masks stand as [row, column], whichever of the two the anchor is.
    """
    with in_full_precision(rows):
        options = _options(temperature, offset, inv_temperature, normalize, inside)
        implementation = _kernels() if backend == "triton" else blockwise_pairs
        row_side = (row_lse, grad_row_lse, row_positives, grad_row_positives)
        column_side = (column_lse, grad_column_lse, column_positives, grad_column_positives)
        sides = [None if side[0] is None else implementation.Side(*side) for side in (row_side, column_side)]
        inv_columns = inv_rows if columns is None else inv_columns
        return implementation.launch_bwd(
            rows, columns, row_ids, column_ids, inv_rows, inv_columns, *sides, row_mask, column_mask, **options
        )


@pair_lse_backward.register_fake
def _pair_lse_backward_fake(rows, *args):
    grad = torch.empty_like(rows, memory_format=torch.contiguous_format)
    return grad, rows.new_empty((), dtype=_checks.accumulator(rows))


@operator("hypercontrast::label_classes")
def label_classes(labels: Tensor, first_counted: int) -> tuple[Tensor, Tensor]:
    """Class of each of the labels [N] in [0, N), below zero for rows that are not there; and of each class [N] how many
    samples from `first_counted` on are of it, int32. By Triton; see there for what the numbers are.
    """
    from hypercontrast.kernels import class_sums

    return class_sums.classes(labels.contiguous(), first_counted, ABSENT)


@label_classes.register_fake
def _label_classes_fake(labels, first_counted):
    return torch.empty_like(labels), torch.empty_like(labels, dtype=torch.int32)


def _pair_lse_setup_context(ctx, inputs, output) -> None:
    anchors, columns, anchor_ids, column_ids, mask, temperature, *options = inputs
    lse, positives, inv_anchors, inv_columns = output
    ctx.mark_non_differentiable(inv_anchors, inv_columns)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        anchors, columns, anchor_ids, column_ids, mask, temperature, lse, positives, inv_anchors, inv_columns
    )
    ctx.options = options


def _pair_lse_autograd(ctx, grad_lse, grad_positives, *_unused):
    (
        anchors, columns, anchor_ids, column_ids, mask, temperature, lse, positives, inv_anchors, inv_columns
    ) = ctx.saved_tensors  # fmt: skip
    offset, *options = ctx.options
    side = [
        lse,
        torch.zeros_like(lse) if grad_lse is None else grad_lse,
        positives,
        torch.zeros_like(positives) if grad_positives is None else grad_positives,
    ]
    no_anchors = [None] * len(side)
    transposed = None if mask is None else mask.T
    itself = columns is None
    grad_anchors, logit_grad_sum = pair_lse_backward(
        anchors, columns, anchor_ids, column_ids, inv_anchors, inv_columns, *side,
        *(side if itself else no_anchors), mask, transposed, temperature, offset, *options,
    )  # fmt: skip
    grad_columns = None
    if ctx.needs_input_grad[1]:
        grad_columns, _ = pair_lse_backward(
            columns, anchors, column_ids, anchor_ids, inv_columns, inv_anchors, *no_anchors, *side, None, transposed,
            temperature, None if offset is None else -offset, *options,
        )  # fmt: skip
    grad_temperature = None
    if temperature is not None:
        pairs_counted = 2 if itself else 1  # against itself every pair is met from both of its sides
        grad_temperature = -logit_grad_sum / (pairs_counted * temperature)
        grad_temperature = grad_temperature.to(temperature.dtype).reshape(temperature.shape)
    return grad_anchors, grad_columns, None, None, None, grad_temperature, *[None] * len(ctx.options)


pair_lse.register_autograd(_pair_lse_autograd, setup_context=_pair_lse_setup_context)


@operator("hypercontrast::pair_loss")
def pair_loss(
    features: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    inv_temperature: float,
    scale: float,
    normalize: bool,
    inside: bool,
    exclude: bool,
    mean: bool,
    keep_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """SupCon itself: `label_classes`, `pair_lse` and what _supcon.py makes of them over one process. By Triton, or in
    one call of the C++ extension: what that takes says `compiled.takes`, and not `inside`.

    Args:
        features [N, D], contrasted with themselves; labels [N] int64, of any values.
        temperature: one float to learn, on a CPU alone, or None to use `inv_temperature`.
        scale: what the loss is multiplied by.
        inside: the mean over positives stands inside the logarithm.
        exclude, mean: divided by the number of anchors that have positives, or of all.
        keep_bytes: how much a CPU may keep to spare the backward the exponentials.

    Returns:
        The loss; how many anchors have no positive; and what the backward needs, see `kernels.pair_loss.Forward`: the
        divisor, class numbers, log-sum-exps, positives, inverse norms, upstream gradients of lse and positives, and the
        kept exponentials, if any. On a CPU all of these but the inverse norms and the last are float64.
    """
    if backend == "blockwise":
        return compiled.pair_loss(
            features, labels, temperature=temperature, inv_temperature=inv_temperature, scale=scale, exclude=exclude,
            mean=mean, keep_bytes=keep_bytes,
        )  # fmt: skip
    with in_full_precision(features):
        found = _loss_kernels().launch_fwd(
            features, labels.contiguous(), absent=ABSENT, inv_temperature=inv_temperature, scale=scale,
            normalize=normalize, inside=inside, exclude=exclude, mean=mean,
        )  # fmt: skip
        return *found, features.new_empty(0)


@pair_loss.register_fake
def _pair_loss_fake(
    features, labels, temperature, inv_temperature, scale, normalize, inside, exclude, mean, keep_bytes, backend
):
    n, wide = features.shape[0], torch.float32 if backend == "triton" else torch.float64
    loss, inv_norms = (features.new_empty(shape, dtype=torch.float32) for shape in ((), n))
    divisor = features.new_empty((), dtype=wide)
    lse, positives, grad_lse, grad_positives = (features.new_empty(n, dtype=wide) for _ in range(4))
    statistics = lse, positives, inv_norms, grad_lse, grad_positives
    kept = features.new_empty(
        blockwise_pairs.kept_elements(n, features.dtype, keep_bytes) if backend == "blockwise" else 0
    )
    return loss, labels.new_empty(()), divisor, labels.new_empty(n), *statistics, kept


@operator("hypercontrast::pair_loss_backward")
def pair_loss_backward(
    grad_loss: Tensor,
    divisor: Tensor,
    features: Tensor,
    ids: Tensor,
    lse: Tensor,
    positives: Tensor,
    inv_norms: Tensor,
    grad_lse: Tensor,
    grad_positives: Tensor,
    kept: Tensor,
    temperature: Tensor | None,
    inv_temperature: float,
    normalize: bool,
    inside: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradient of `pair_loss` and, where the temperature is a tensor, ΣG∘s [1], each pair from both of its sides."""
    if backend == "blockwise":
        return compiled.pair_loss_backward(
            grad_loss, divisor, features, ids, lse, inv_norms, grad_lse, grad_positives, kept, temperature=temperature,
            inv_temperature=inv_temperature,
        )  # fmt: skip
    with in_full_precision(features):
        grad = _loss_kernels().launch_bwd(
            features, ids, lse, positives, inv_norms, grad_lse, grad_positives, factor=(grad_loss, divisor),
            inv_temperature=inv_temperature, normalize=normalize, inside=inside,
        )  # fmt: skip
    return grad, features.new_empty(0)


@pair_loss_backward.register_fake
def _pair_loss_backward_fake(grad_loss, divisor, features, *args):
    *_, temperature, _, _, _, _ = args
    grad = torch.empty_like(features, memory_format=torch.contiguous_format)
    return grad, features.new_empty(0 if temperature is None else 1)


def _pair_loss_setup_context(ctx, inputs, output) -> None:
    features, _, temperature, inv_temperature, _, normalize, inside, _, _, _, backend = inputs
    _, _, divisor, *statistics = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(divisor, features, *statistics, temperature)
    ctx.options = inv_temperature, normalize, inside, backend


def _pair_loss_autograd(ctx, grad_loss, *_unused):
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    saved = ctx.saved_tensors  # once: hooks unpack at every look
    temperature = saved[-1]
    grad, logit_grad_sum = pair_loss_backward(grad_loss, *saved, *ctx.options)
    grad_temperature = None
    if temperature is not None and ctx.needs_input_grad[2]:
        grad_temperature = -logit_grad_sum / (2 * temperature)
        grad_temperature = grad_temperature.to(temperature.dtype).reshape(temperature.shape)
    return grad, None, grad_temperature, *[None] * 8


pair_loss.register_autograd(_pair_loss_autograd, setup_context=_pair_loss_setup_context)
