"""The operators, registered with torch.library: schema, fake, autograd, and the choice of backend.

Everything rests on one primitive, `hypercontrast::lse`: log-sum-exps of s[c, j] = w_c·u_j/τ along its rows and columns
under the label rule, and the positives s[y_j, j]. Its gradient for any upstream gradients of the three is one formula,

    G[c, j] = m[c, j] (g_row[c] exp(s - row_lse[c]) + g_col[j] exp(s - col_lse[j])) + [y_j = c] g_pos[j],

pushed through the normalisation. m is zero at a sample's own class when `exclude_own`, and for ignored samples.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from hypercontrast import _checks, blockwise, compiled
from hypercontrast._operator import operator
from hypercontrast.kernels import _launch  # needs no Triton

BACKENDS = ("auto", "reference", "blockwise", "triton")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a part of it is missing, or it has been blocked
        return False


TRITON_IS_INSTALLED = _is_installed("triton")  # found, not imported: once, since torch.compile cannot trace a search


def resolve_backend(backend: str, features: Tensor) -> str:
    """The backend that will run: "reference", "blockwise" or "triton".

    "auto" takes the environment variable HYPERCONTRAST_BACKEND when set, else Triton for float32, bfloat16 and
    float16 on a GPU and the blockwise PyTorch backend everywhere else. An explicit backend that cannot run raises
    ValueError saying why.
    """
    _checks.check_option("backend", backend, BACKENDS)
    if backend == "auto":
        backend = os.environ.get("HYPERCONTRAST_BACKEND", "auto")
        _checks.check_option("HYPERCONTRAST_BACKEND", backend, BACKENDS)
    if backend == "auto":
        usable = features.is_cuda and features.dtype != torch.float64 and TRITON_IS_INSTALLED
        return "triton" if usable else "blockwise"
    if backend == "triton":
        if not TRITON_IS_INSTALLED:
            raise ValueError("backend='triton' needs the triton package, which cannot be imported")
        if features.dtype == torch.float64:
            raise ValueError("backend='triton' computes in float32, bfloat16 or float16, got float64 features")
        if not features.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"backend='triton' needs features on a GPU, got {features.device}")
    return backend


def _kernels():
    from hypercontrast.kernels import prototype_lse  # Triton is imported on first use, not with the package

    return prototype_lse


def _loss_kernels():
    from hypercontrast.kernels import prototype_loss

    return prototype_loss


def in_full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """No autocast inside: a kernel's types are its own. Where there is none, nothing is entered, which takes time."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _options(counts, temperature, inv_temperature, ignore_index, rows, cols, exclude_own, normalize) -> dict[str, Any]:
    """What forward and backward of either backend are told alike."""
    return {
        "counts": counts, "temperature": temperature, "inv_temperature": inv_temperature, "ignore_index": ignore_index,
        "rows": rows, "cols": cols, "exclude_own": exclude_own, "normalize": normalize,
    }  # fmt: skip


def _check_values(features, prototypes, labels, temperature, ignore_index) -> None:
    """What is read where reading is free."""
    if features.device.type == "cpu":
        _checks.check_label_range(labels, len(prototypes), ignore_index)
        _checks.check_temperature_value(temperature)


@operator("hypercontrast::lse")
def lse(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    counts: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: float,
    ignore_index: int,
    rows: bool,
    cols: bool,
    exclude_own: bool,
    normalize: bool,
    keep_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row and column log-sum-exps and positives of the K x N logits.

    Args:
        features [N, D], prototypes [K, D], labels [N].
        counts: [K] samples of each class in the (global) batch; rows of absent classes may then be skipped. Triton
            takes no more than N present classes; None computes all rows.
        temperature: one float on the device in the accumulator's dtype, or None to use `inv_temperature`.
        rows, cols: which log-sum-exps to compute; the other is returned empty.
        keep_bytes: how much may be kept to spare the backward the exponentials.

    Returns:
        row_lse [K] or [0], -inf where nothing was summed; col_lse [N] or [0]; positives [N], zero for ignored samples
        (float32 from Triton, float64 from the blockwise backend: see there); inverse norms [N] and [K] in the
        accumulator's dtype; the kept exponentials, or an empty tensor, in a layout of the backend's own.
    """
    with in_full_precision(features):
        _check_values(features, prototypes, labels, temperature, ignore_index)
        options = _options(counts, temperature, inv_temperature, ignore_index, rows, cols, exclude_own, normalize)
        if backend == "triton":
            return _kernels().launch_fwd(features, prototypes, labels, **options, keep_bytes=keep_bytes)
        return blockwise.launch_fwd(features, prototypes, labels, **options, keep_bytes=keep_bytes)


@lse.register_fake
def _lse_fake(
    features, prototypes, labels, counts, temperature, inv_temperature, ignore_index, rows, cols, exclude_own,
    normalize, keep_bytes, backend,
):  # fmt: skip
    n, k, dtype = features.shape[0], prototypes.shape[0], _checks.accumulator(features)
    wide = torch.float32 if backend == "triton" else blockwise.statistics_dtype(features.device)
    statistics = [features.new_empty(size, dtype=wide) for size in (k if rows else 0, n if cols else 0, n)]
    inverse_norms = [features.new_empty(size, dtype=dtype) for size in (n, k)]
    if backend == "triton":
        shape = _launch.kept_shape(
            features, prototypes, counts=counts, temperature=temperature, inv_temperature=inv_temperature, rows=rows,
            cols=cols, normalize=normalize, keep_bytes=keep_bytes,
        )  # fmt: skip
        kept = features.new_empty(shape, dtype=_launch.kernel_dtype(features))
    else:
        bounded = blockwise.is_bounded(temperature, inv_temperature, normalize)
        kept = features.new_empty(blockwise.kept_elements(n, k, dtype, keep_bytes) if bounded else 0, dtype=dtype)
    return *statistics, *inverse_norms, kept


@operator("hypercontrast::lse_backward")
def lse_backward(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    positives: Tensor,
    inv_norm_features: Tensor,
    inv_norm_prototypes: Tensor,
    kept: Tensor,
    grad_row: Tensor,
    grad_col: Tensor,
    grad_pos: Tensor,
    counts: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: float,
    ignore_index: int,
    rows: bool,
    cols: bool,
    exclude_own: bool,
    normalize: bool,
    backend: str,
    wants_features: bool,
    wants_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lse`: of the features, of the prototypes, and Σ G∘s, from which d/dτ = -Σ G∘s / τ.

    The first two only where they are wanted, else empty: a third of the products each. The last comes with the first.
    """
    with in_full_precision(features):
        options = _options(counts, temperature, inv_temperature, ignore_index, rows, cols, exclude_own, normalize)
        wanted = wants_features, wants_prototypes
        statistics = (features, prototypes, labels, row_lse, col_lse)
        rest = (
            inv_norm_features, inv_norm_prototypes, kept,
            grad_row.contiguous(), grad_col.contiguous(), grad_pos.contiguous(),
        )  # fmt: skip
        if backend == "triton":
            *grads, radial = _kernels().launch_bwd(*statistics, positives, *rest, **options, wanted=wanted)
            logit_grad_sum = radial.sum() * inv_temperature if temperature is None else radial.sum() / temperature
            return *grads, logit_grad_sum.to(radial.dtype).reshape(())
        return blockwise.launch_bwd(*statistics, *rest, **options, wanted=wanted)


@lse_backward.register_fake
def _lse_backward_fake(features, prototypes, *args):
    grads = _fake_grads(features, prototypes, *args[-2:])
    return *grads, features.new_empty((), dtype=_checks.accumulator(features))


def _fake_grads(features, prototypes, wants_features: bool, wants_prototypes: bool) -> tuple[Tensor, Tensor]:
    def grad(x: Tensor, wanted: bool) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else features.new_empty(0)

    return grad(features, wants_features), grad(prototypes, wants_prototypes)


def _wanted(ctx, temperature: Tensor | None) -> tuple[bool, bool]:
    """Whose gradients a backward has to compute: of the features, of the prototypes. τ's is read off the first."""
    of_temperature = temperature is not None and ctx.needs_input_grad[4]
    return ctx.needs_input_grad[0] or of_temperature, ctx.needs_input_grad[1]


def _asked_for(grads: tuple[Tensor, Tensor], ctx) -> tuple[Tensor | None, Tensor | None]:
    features, prototypes = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return features, prototypes


def _lse_setup_context(ctx, inputs, output) -> None:
    features, prototypes, labels, counts, temperature, *options = inputs
    row_lse, col_lse, positives, inv_features, inv_prototypes, kept = output
    ctx.mark_non_differentiable(inv_features, inv_prototypes, kept)
    ctx.set_materialize_grads(False)  # else autograd would fill a gradient for the kept exponentials with zeros
    ctx.save_for_backward(
        features,
        prototypes,
        labels,
        row_lse,
        col_lse,
        positives,
        inv_features,
        inv_prototypes,
        kept,
        counts,
        temperature,
    )
    ctx.options = options


def _lse_autograd(ctx, grad_row, grad_col, grad_pos, *_unused):
    *tensors, counts, temperature = ctx.saved_tensors
    row_lse, col_lse = tensors[3:5]
    grad_row = torch.zeros_like(row_lse) if grad_row is None else grad_row
    grad_col = torch.zeros_like(col_lse) if grad_col is None else grad_col
    if grad_pos is None:
        grad_pos = row_lse.new_zeros(tensors[0].shape[0])
    inv_temperature, ignore_index, rows, cols, exclude_own, normalize, _, backend = ctx.options
    *grads, logit_grad_sum = lse_backward(
        *tensors, grad_row, grad_col, grad_pos, counts, temperature, inv_temperature, ignore_index, rows, cols,
        exclude_own, normalize, backend, *_wanted(ctx, temperature),
    )  # fmt: skip
    grad_temperature = None
    if temperature is not None and ctx.needs_input_grad[4]:
        grad_temperature = (-logit_grad_sum / temperature).to(temperature.dtype).reshape(temperature.shape)
    return *_asked_for(grads, ctx), None, None, grad_temperature, *[None] * len(ctx.options)


lse.register_autograd(_lse_autograd, setup_context=_lse_setup_context)


@operator("hypercontrast::prototype_loss")
def prototype_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: float,
    ignore_index: int,
    rows: bool,
    cols: bool,
    exclude_own: bool,
    normalize: bool,
    zero_empty: bool,
    mean: bool,
    keep_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss itself: `lse` and what _autograd.py makes of it over one process. In three launches of Triton, or in one
    call of the C++ extension: what that takes says `compiled.takes`.

    Args: as of `lse`, and
        weight: [K] class weights.
        zero_empty: samples without any logit to sum drop out, instead of keeping their positive.
        mean: divided by the sum of the samples' weights.

    Returns:
        The loss; what the backward needs, see `kernels.prototype_loss.Forward`: log-sum-exps, positives, inverse norms
        of features and prototypes, kept exponentials, upstream gradients of row_lse, col_lse and positives, the divisor
        (all fp32 but what is kept); and the smallest and the largest label, ignored ones taken for zero. On a CPU
        log-sum-exps, positives, upstream gradients and divisor are float64, and the last, checked there, is empty.
    """
    if backend == "blockwise":
        return compiled.prototype_loss(
            features, prototypes, labels, weight, temperature=temperature, inv_temperature=inv_temperature,
            ignore_index=ignore_index, rows=rows, cols=cols, exclude_own=exclude_own, zero_empty=zero_empty, mean=mean,
            keep_bytes=keep_bytes,
        )  # fmt: skip
    with in_full_precision(features):
        _check_values(features, prototypes, labels, temperature, ignore_index)
        return tuple(
            _loss_kernels().launch_fwd(
                features, prototypes, labels, weight, temperature=temperature, inv_temperature=inv_temperature,
                ignore_index=ignore_index, rows=rows, cols=cols, exclude_own=exclude_own, normalize=normalize,
                zero_empty=zero_empty, mean=mean, keep_bytes=keep_bytes,
            )
        )  # fmt: skip


@prototype_loss.register_fake
def _prototype_loss_fake(
    features, prototypes, labels, weight, temperature, inv_temperature, ignore_index, rows, cols, exclude_own,
    normalize, zero_empty, mean, keep_bytes, backend,
):  # fmt: skip
    n, k = features.shape[0], prototypes.shape[0]
    wide = torch.float32 if backend == "triton" else torch.float64
    row_lse, col_lse = (features.new_empty(size, dtype=wide) for size in (k if rows else 0, n if cols else 0))
    positives, divisor = (features.new_empty(shape, dtype=wide) for shape in (n, ()))
    loss, inv_features, inv_prototypes = (features.new_empty(shape, dtype=torch.float32) for shape in ((), n, k))
    statistics = row_lse, col_lse, positives, inv_features, inv_prototypes
    upstream = [torch.empty_like(x) for x in (row_lse, col_lse, positives)]
    if backend == "blockwise":
        kept = features.new_empty(compiled.kept_elements(n, k, rows, cols, keep_bytes))
        return loss, *statistics, kept, *upstream, divisor, labels.new_empty(0)
    shape = _launch.kept_shape(
        features, prototypes, counts=None, temperature=temperature, inv_temperature=inv_temperature, rows=rows,
        cols=cols, normalize=normalize, keep_bytes=keep_bytes,
    )  # fmt: skip
    kept = features.new_empty(shape, dtype=_launch.kernel_dtype(features))
    return loss, *statistics, kept, *upstream, divisor, labels.new_empty(2)


@operator("hypercontrast::prototype_loss_backward")
def prototype_loss_backward(
    grad_loss: Tensor,
    divisor: Tensor,
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    positives: Tensor,
    inv_norm_features: Tensor,
    inv_norm_prototypes: Tensor,
    kept: Tensor,
    grad_row: Tensor,
    grad_col: Tensor,
    grad_pos: Tensor,
    temperature: Tensor | None,
    inv_temperature: float,
    ignore_index: int,
    rows: bool,
    cols: bool,
    exclude_own: bool,
    normalize: bool,
    backend: str,
    wants_features: bool,
    wants_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `prototype_loss`: of the features, of the prototypes, and τ Σ_c G∘s: by Triton of every sample [N],
    else their sum [1] where the temperature is a tensor.

    The first two only where they are wanted, else empty. The last comes with the first.
    """
    wanted = wants_features, wants_prototypes
    if backend == "blockwise":
        return compiled.prototype_loss_backward(
            grad_loss, divisor, features, prototypes, labels, row_lse, col_lse, inv_norm_features, inv_norm_prototypes,
            kept, grad_row, grad_col, grad_pos, temperature=temperature, inv_temperature=inv_temperature,
            ignore_index=ignore_index, rows=rows, cols=cols, exclude_own=exclude_own, wanted=wanted,
        )  # fmt: skip
    with in_full_precision(features):
        options = _options(None, temperature, inv_temperature, ignore_index, rows, cols, exclude_own, normalize)
        return _kernels().launch_bwd(
            features, prototypes, labels, row_lse, col_lse, positives, inv_norm_features, inv_norm_prototypes, kept,
            grad_row, grad_col, grad_pos, **options, factor=(grad_loss, divisor), wanted=wanted,
        )  # fmt: skip


@prototype_loss_backward.register_fake
def _prototype_loss_backward_fake(grad_loss, divisor, features, prototypes, *args):
    *_, temperature, _, _, _, _, _, _, backend, wants_features, wants_prototypes = args
    of_all = 0 if temperature is None else 1
    size = of_all if backend == "blockwise" else features.shape[0] if wants_features else 0
    radial = features.new_empty(size, dtype=torch.float32)
    return *_fake_grads(features, prototypes, wants_features, wants_prototypes), radial


def _prototype_loss_setup_context(ctx, inputs, output) -> None:
    features, prototypes, labels, _, temperature, *options = inputs
    _, *statistics, divisor, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(divisor, features, prototypes, labels, *statistics, temperature)
    ctx.options = options


def _prototype_loss_autograd(ctx, grad_loss, *_unused):
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, temperature = ctx.saved_tensors
    *options, _, _, _, backend = ctx.options
    *grads, radial = prototype_loss_backward(
        grad_loss, *tensors, temperature, *options, backend, *_wanted(ctx, temperature)
    )  # fmt: skip
    grad_temperature = None
    if temperature is not None and ctx.needs_input_grad[4]:
        grad_temperature = -radial.sum() / temperature.to(radial.dtype).square()
        grad_temperature = grad_temperature.to(temperature.dtype).reshape(temperature.shape)
    return *_asked_for(grads, ctx), None, None, grad_temperature, *[None] * len(ctx.options)


prototype_loss.register_autograd(_prototype_loss_autograd, setup_context=_prototype_loss_setup_context)


@operator("hypercontrast::segment_sum")
def segment_sum(values: Tensor, labels: Tensor, num_classes: int, ignore_index: int, backend: str) -> Tensor:
    """Sum of values [N] within each class → [K], in an order that never changes; ignored samples are left out."""
    if backend == "triton":
        return _kernels().segment_sum(values, labels, num_classes, ignore_index)
    in_range = _checks.in_range(labels, num_classes, ignore_index)
    sums = values.new_zeros(num_classes)
    return sums.index_add_(0, torch.where(in_range, labels, 0), torch.where(in_range, values, 0))


@segment_sum.register_fake
def _segment_sum_fake(values, labels, num_classes, ignore_index, backend):
    return values.new_empty(num_classes)


@operator("hypercontrast::class_sums")
def class_sums(
    features: Tensor, inv_norms: Tensor, labels: Tensor, num_classes: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Per-class sums of the unit features [K, D] and counts [K] int64: the class-mean prototype update."""
    if backend == "triton":
        return _kernels().class_sums(features, inv_norms, labels, num_classes, ignore_index)
    in_range = labels != ignore_index
    y = torch.where(in_range, labels, 0)
    sums = blockwise.class_sums(features, torch.where(in_range, inv_norms, 0), y, num_classes)
    return sums.to(inv_norms.dtype), labels.new_zeros(num_classes).index_add_(0, y, in_range.long())


@class_sums.register_fake
def _class_sums_fake(features, inv_norms, labels, num_classes, ignore_index, backend):
    sums = features.new_empty((num_classes, features.shape[1]), dtype=inv_norms.dtype)
    return sums, labels.new_empty(num_classes)
