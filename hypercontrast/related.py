"""Further losses from the `lse` primitive: only what is done with its log-sum-exps and positives differs.

Notation, dtypes, global batch, backends and errors are those of `hypercontrast.functional`. So are the arguments; where
a loss's paper has a scale, the default temperature is one over it.

Besides the primitive each loss costs O(N + K) arithmetic, `logit_adjusted_loss` copies of features and prototypes, and
`dcl_loss` over several ranks the gathered features.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hypercontrast import _autograd, _checks, _dispatch, _ops, reference
from hypercontrast._agreement import agree
from hypercontrast._autograd import Batch, Options, Rule, logaddexp, with_value
from hypercontrast._dispatch import check_group, check_values, gradient, told
from hypercontrast._ops import resolve_backend
from hypercontrast.distributed import GatherWithGrad, GroupLike, global_lse, resolve_group, row_counts, world_size

__all__ = ["arcface_loss", "cosface_loss", "dcl_loss", "ldam_margins", "logit_adjusted_loss", "proxy_anchor_loss"]

# What features have in the dimension of a bias: a power of two, so that nothing is rounded, and long, so that a bias
# which takes a class out, such as -1e38, is no prototype with a square beyond float32.
BIAS_LENGTH = 2.0**62


def cosface_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    margin: float | Tensor = 0.35,
    temperature: float | Tensor = 1 / 64,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalize: bool = True,
    group: GroupLike = "auto",
    backend: str = "auto",
) -> Tensor:
    """CosFace: cross-entropy with a margin m off the positive, mean_j log(1 + Σ_{c≠y_j} exp(s_cj - s_{y_j j} + m/τ)).

    Args:
        margin: m, in units of the cosine and not negative: a number, or one for every class [K], as `ldam_margins`
            makes them. A margin of 0 is NormFace.
        The others, dtypes, errors: see the module's docstring.

    Returns:
        Scalar, or [N] with reduction="none". At a simplex ETF: log(1 + (K-1) exp((m - K/(K-1))/τ)); all vectors equal:
        log(1 + (K-1) exp(m/τ)).

    Source: Wang et al. 2018 (arXiv 1801.09414); with a margin for every class Cao et al. 2019 (LDAM).
    """
    return _dispatch.prototype_loss(
        reference.cosface_loss, _cosface_loss, features, prototypes, labels, temperature=temperature, weight=weight,
        ignore_index=ignore_index, reduction=reduction, normalize=normalize, group=group, backend=backend,
        check=lambda: _check_margin(margin, prototypes), margin=margin,
    )  # fmt: skip


def _cosface_loss(
    features: Tensor, prototypes: Tensor, labels: Tensor, options: Options, *, margin: float | Tensor
) -> Tensor:
    col_lse, positives, batch = _sample_anchors(features, prototypes, labels, options)
    if isinstance(margin, Tensor):
        margin = margin.to(positives.dtype)[batch.class_of]
    return _against_target(col_lse, positives - margin / options.temperature, features, batch, options)


def ldam_margins(counts: Tensor, max_margin: float = 0.5) -> Tensor:
    """LDAM's margins of classes with n_c training samples, for `cosface_loss`: m_c = C/n_c^(1/4), C so that the rarest
    class has `max_margin`.

    Args:
        counts: [K], positive, of any real dtype; of the training set, not of a batch.
        max_margin: positive.

    Returns:
        [K] float32 on the counts' device.

    Raises:
        ValueError, TypeError: naming argument, rule and value. Counts are read, which makes the host wait for a GPU.

    Source: Cao et al. 2019 (arXiv 1906.07413); their code's scale is 30, `temperature=1 / 30`.
    """
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a tensor, got {type(counts).__name__}")
    if counts.dim() != 1 or len(counts) == 0 or counts.is_complex():
        raise ValueError(f"counts must have shape [K], one class each, got {counts.dtype} {list(counts.shape)}")
    wide = counts.to("cpu", torch.float64)
    bad = ~(torch.isfinite(wide) & (wide > 0))
    if bad.any():
        c = int(bad.nonzero()[0])
        raise ValueError(f"counts must be positive and finite, got {counts[c].item()} for class {c}")
    _checks.check_number("max_margin", max_margin)
    if not 0 < max_margin < math.inf:
        raise ValueError(f"max_margin must be positive and finite, got {max_margin}")
    return (max_margin * (wide.min() / wide) ** 0.25).to(counts.device, torch.float32)


def arcface_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.5,
    temperature: float | Tensor = 1 / 64,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    group: GroupLike = "auto",
    backend: str = "auto",
) -> Tensor:
    """ArcFace: cross-entropy with a margin m on the positive's angle θ_j, cos θ_j = ŵ_{y_j}·u_j,

        mean_j log(1 + Σ_{c≠y_j} exp(s_cj - t_j)),   t_j = cos(θ_j + m)/τ.

    Past θ = π - m, where the cosine would turn and rise, t = (cos θ - m sin m)/τ, as the published code has it. An
    angle has no slope at 0 and π: within about 1e-3 of them (in float64 4e-8) the margin's part of the gradient, whose
    length is sin(m) but whose direction rounding alone would choose, is left out.

    Args:
        margin: m in radians, in [0, π). A margin of 0 is NormFace.
        The others, dtypes, errors: see the module's docstring. Angles want unit vectors: there is no `normalize`.

    Returns:
        Scalar, or [N] with reduction="none". At a simplex ETF: log(1 + (K-1) exp(-(cos m + 1/(K-1))/τ)); all vectors
        equal: log(1 + (K-1) exp((1 - cos m)/τ)).

    Source: Deng et al. 2019 (arXiv 1801.07698).
    """
    return _dispatch.prototype_loss(
        reference.arcface_loss, _arcface_loss, features, prototypes, labels, temperature=temperature, weight=weight,
        ignore_index=ignore_index, reduction=reduction, normalize=True, group=group, backend=backend,
        check=lambda: _check_angle(margin), margin=margin,
    )  # fmt: skip


def _arcface_loss(features: Tensor, prototypes: Tensor, labels: Tensor, options: Options, *, margin: float) -> Tensor:
    col_lse, positives, batch = _sample_anchors(features, prototypes, labels, options)
    cosine = positives * options.temperature
    squared_sine = 1 - cosine.square()
    straight = squared_sine <= 8 * torch.finfo(_checks.accumulator(features)).eps  # rounding has its sign, or nearly
    sine = torch.where(straight, 0, torch.where(straight, 1, squared_sine).sqrt())
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    target = torch.where(cosine > -math.cos(margin), turned, cosine - margin * math.sin(margin))
    return _against_target(col_lse, target / options.temperature, features, batch, options)


def logit_adjusted_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    bias: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalize: bool = True,
    group: GroupLike = "auto",
    backend: str = "auto",
) -> Tensor:
    """Logit adjustment: NormFace with a bias for every class, mean_j [ log Σ_c exp(s_cj + b_c) - s_{y_j j} - b_{y_j} ].

    With b_c = log n_c, n_c the training samples of class c, it is balanced softmax, logit adjustment of strength 1;
    times a factor, of that strength. At test time the logits go without the bias.

    The bias is one more dimension of the vectors: [u, g]·[ŵ, τb/g]/τ = s + b. So features and prototypes are copied, as
    unit vectors in float32 (float64), 4 numbers wider so that rows of aligned features stay aligned. Products run in
    that dtype, those of half-precision features too, which would lose the bias's digits and the gradient's direction.

    Args:
        bias: b [K], finite; a bias that requires a gradient is learned.
        The others, dtypes, errors: see the module's docstring.

    Returns:
        Scalar, or [N] with reduction="none". With equal biases NormFace's values.

    Source: Menon et al. 2021 (arXiv 2007.07314); Ren et al. 2020 (arXiv 2007.10740).
    """
    return _dispatch.prototype_loss(
        reference.logit_adjusted_loss, _logit_adjusted_loss, features, prototypes, labels, temperature=temperature,
        weight=weight, ignore_index=ignore_index, reduction=reduction, normalize=normalize, group=group,
        backend=backend, check=lambda: _check_bias(bias, prototypes), bias=bias,
    )  # fmt: skip


def _logit_adjusted_loss(
    features: Tensor, prototypes: Tensor, labels: Tensor, options: Options, *, bias: Tensor
) -> Tensor:
    check_values(options.temperature, features, prototypes=prototypes)  # the operator sees unit vectors
    wide = _checks.accumulator(features)
    features, prototypes = features.to(wide), prototypes.to(wide)
    if options.normalize:
        features, prototypes = reference.unit_rows(features), reference.unit_rows(prototypes)
    scaled = bias.to(wide) * options.temperature / BIAS_LENGTH
    features = torch.cat([features, features.new_full((features.shape[0], 4), BIAS_LENGTH)], 1)
    prototypes = torch.cat([prototypes, F.pad(scaled[:, None], (0, 3))], 1)
    rule = Rule(rows=False, cols=True, exclude_own=False)
    return _autograd.prototype_loss(features, prototypes, labels, replace(options, normalize=False), rule)


def proxy_anchor_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.1,
    temperature: float | Tensor = 1 / 32,
    ignore_index: int = -100,
    normalize: bool = True,
    group: GroupLike = "auto",
    backend: str = "auto",
) -> Tensor:
    """Proxy-Anchor: every prototype pulls its samples and pushes all others, the hardest the most,

        mean_{c in the batch} log(1 + Σ_{j: y_j = c} exp(δ/τ - s_cj)) + mean_c log(1 + Σ_{j: y_j ≠ c} exp(δ/τ + s_cj)).

    The second mean is over all K prototypes. A sum of classes' terms has no terms by sample and no class weights: there
    is no `reduction` and no `weight`. The rows of all classes are summed, those absent from the batch as well.

    Args:
        margin: δ, in units of the cosine and not negative.
        The others, dtypes, errors: see the module's docstring.

    Returns:
        Scalar. At a simplex ETF with n samples a class: log(1 + n exp((δ-1)/τ)) + log(1 + n(K-1) exp((δ - 1/(K-1))/τ)).

    Source: Kim et al. 2020 (arXiv 2003.13911); its α is 1/τ.
    """
    return _dispatch.prototype_loss(
        reference.proxy_anchor_loss, _proxy_anchor_loss, features, prototypes, labels, temperature=temperature,
        weight=None, ignore_index=ignore_index, reduction="mean", normalize=normalize, group=group, backend=backend,
        check=lambda: _check_number(margin), margin=margin,
    )  # fmt: skip


def _proxy_anchor_loss(
    features: Tensor, prototypes: Tensor, labels: Tensor, options: Options, *, margin: float
) -> Tensor:
    rule = Rule(rows=True, cols=False, exclude_own=True, absent=True)
    row_lse, _, positives, batch = _autograd.statistics(features, prototypes, labels, options, rule)
    num_classes, world = len(prototypes), world_size(options.group)
    own_lse = _ClassLSE.apply(-positives, batch.class_of, batch.in_range, num_classes, options.backend)
    lse = torch.cat([own_lse, row_lse])
    nothing = lse.new_empty(0)
    lse, _ = global_lse(lse, nothing, options.group, bounded=options.bounded, sum_gradients=False)
    shift = margin / options.temperature
    if isinstance(shift, Tensor):
        shift = with_value(shift / world, shift)  # which every rank has a gradient of, and samples one rank alone
    pull, push = _softplus(lse + shift).split(num_classes)
    loss = pull.sum() / (batch.counts > 0).sum().clamp(min=1) + push.mean()
    return with_value(world * loss, loss).to(_checks.accumulator(features))


class _ClassLSE(torch.autograd.Function):
    """Log-sum-exp of values [N] within each class → [K], -inf for a class without any; the order never changes."""

    @staticmethod
    def forward(ctx, values: Tensor, class_of: Tensor, in_range: Tensor, num_classes: int, backend: str) -> Tensor:
        peak = values.new_full((num_classes,), -torch.inf)
        peak = peak.scatter_reduce(0, class_of, torch.where(in_range, values, -torch.inf), "amax")
        shifted = torch.where(in_range, values - peak[class_of], -torch.inf)
        lse = peak + _ops.segment_sum(shifted.exp(), class_of, num_classes, -1, backend).log()
        ctx.save_for_backward(values, class_of, in_range, lse)
        return lse

    @staticmethod
    def backward(ctx, grad: Tensor):
        values, class_of, in_range, lse = ctx.saved_tensors
        shares = torch.where(in_range, values - lse[class_of], -torch.inf).exp()
        return grad[class_of] * shares, None, None, None, None


def dcl_loss(
    features: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    normalize: bool = True,
    group: GroupLike = "auto",
    backend: str = "auto",
) -> Tensor:
    """Decoupled contrastive loss: NT-Xent of two views without the positive in the denominator,

        mean_{i, v} [ log Σ_{j≠i} (exp(u_iv·u_j0/τ) + exp(u_iv·u_j1/τ)) - u_i0·u_i1/τ ],   i, j samples, v views.

    Over several ranks the features of all are gathered, with their gradients; each rank computes its anchors' terms.

    Args:
        features: [B, 2, D], the two views of B samples.
        The others, dtypes, errors: see the module's docstring.

    Returns:
        Scalar, or [B, 2] with reduction="none"; it may be negative. All vectors equal: log(2(B-1)). A sample alone in
        the (global) batch has no negatives and contributes its positive, -u_i0·u_i1/τ.

    Source: Yeh et al. 2022 (arXiv 2110.06848), without its weights.
    """
    process_group = resolve_group(group)

    def checked() -> str:
        if isinstance(features, Tensor) and (features.dim() != 3 or features.shape[1] != 2):
            raise ValueError(f"features must have shape [B, 2, D], got {list(features.shape)}")
        _checks.check_pair_features(features)
        _checks.check_temperature(temperature, features.device)
        _checks.check_option("reduction", reduction, ("mean", "sum", "none"))
        _checks.check_flag("normalize", normalize)
        return resolve_backend(backend, features)

    def described() -> str:
        chosen = checked()
        check_group(process_group, chosen)
        check_values(temperature, features)
        return (
            f"dcl_loss of {features.dtype} features [n, 2, {features.shape[-1]}],"
            f" temperature {told(temperature)}, reduction {reduction}, normalize {normalize},"
            f" backend {chosen}, {gradient(features)} gradient of features, {gradient(temperature)} of temperature"
        )

    if process_group is not None:
        agree(described, process_group, features)
    chosen, temperature = checked(), _checks.as_scalar(temperature, features)
    if chosen == "reference":
        check_values(temperature, features)
        with _ops.in_full_precision(features):
            return reference.dcl_loss(features, temperature=temperature, reduction=reduction, normalize=normalize)
    columns, first = features, 0
    if process_group is not None:
        rows = row_counts(features, process_group)
        columns, first = GatherWithGrad.apply(features, rows, process_group), sum(rows[: dist.get_rank(process_group)])
    samples = torch.arange(first, first + features.shape[0], device=features.device).repeat_interleave(2)
    learned, inv_temperature = _checks.split_temperature(temperature)
    keep_bytes = _autograd.keep_bytes(features, temperature) // 2
    (lse_0, to_0), (lse_1, to_1) = (
        _ops.lse(
            features.flatten(0, 1), view, samples, None, learned, inv_temperature, -1, False, True, True, normalize,
            keep_bytes, chosen,
        )[1:3]
        for view in columns.unbind(1)
    )  # fmt: skip
    lse_N, positives = logaddexp(lse_0, lse_1), torch.stack([to_1[::2], to_0[1::2]], 1).flatten()
    loss_N = torch.where(lse_N == -torch.inf, 0, lse_N) - positives
    loss = _autograd.reduce_samples(loss_N, torch.ones_like(loss_N), reduction, process_group)
    loss = loss.to(_checks.accumulator(features))
    return loss.view(-1, 2) if reduction == "none" else loss


def _sample_anchors(
    features: Tensor, prototypes: Tensor, labels: Tensor, options: Options
) -> tuple[Tensor, Tensor, Batch]:
    """Log-sum-exps over the prototypes of other classes [N] and positives [N]."""
    rule = Rule(rows=False, cols=True, exclude_own=True)
    _, col_lse, positives, batch = _autograd.statistics(features, prototypes, labels, options, rule)
    return col_lse, positives, batch


def _against_target(col_lse: Tensor, target: Tensor, features: Tensor, batch: Batch, options: Options) -> Tensor:
    """log(exp(ℓ_j) + exp(t_j)) - t_j of every sample, reduced."""
    loss_N = _softplus(col_lse - target)
    loss = _autograd.reduce_samples(loss_N, batch.a_N, options.reduction, options.group)
    return loss.to(_checks.accumulator(features))


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) to the last digit: `F.softplus` is x from 20 on, 2e-9 too little."""
    return torch.logaddexp(x, x.new_zeros(()))


def _check_margin(margin: float | Tensor, prototypes: Tensor) -> None:
    if not isinstance(margin, Tensor):
        return _check_number(margin)
    _checks.check_per_class("margin", margin, len(prototypes), prototypes.device)
    if margin.requires_grad:
        raise ValueError("margin must not require a gradient: margins are constants of the loss")


def _check_number(margin: float) -> None:
    _checks.check_number("margin", margin)
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be finite and not negative, got {margin}")


def _check_angle(margin: float) -> None:
    _check_number(margin)
    if margin >= math.pi:
        raise ValueError(f"margin must lie in [0, π), got {margin}")


def _check_bias(bias: Tensor, prototypes: Tensor) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, got {type(bias).__name__}")
    _checks.check_per_class("bias", bias, len(prototypes), prototypes.device, signed=True)
