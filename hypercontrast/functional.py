"""The losses as functions: documentation, validation and dispatch, nothing else.

Notation of every docstring: N samples, K classes, D dimensions; u_j = z_j/|z_j| the unit features, ŵ_c = w_c/|w_c| the
unit prototypes, s_cj = ŵ_c·u_j/τ the logits, n_c the samples of class c in the batch.

What holds for every loss here
- Arguments. `features` [N, D] and `prototypes` [K, D] are raw; both are normalised inside unless `normalize=False`,
  which takes them as they are. `labels` [N] int64. `temperature` τ is a positive number, or a tensor of one float to
  learn it. `weight` [K] are class weights and `ignore_index` marks samples that count nowhere, as in
  `F.cross_entropy`; "mean" divides by the sum of the weights of the samples.
- Dtypes. float32, bfloat16, float16 and (not in Triton) float64. Products run in the features' dtype, sums in float32
  (float64 for float64), and so is the loss. Gradients come back in each argument's own dtype.
- Global batch. With `group="auto"` and torch.distributed initialised, the loss is over all ranks' samples and the
  value is the same on every rank; gradients are scaled so that DDP's average is exact. Ranks may hold different
  numbers of samples, none included. Exchanged are per-class sums and counts, 2K numbers, never features. With
  reduction="none" each rank gets its own samples' losses, and the gradient is exact for the average over ranks of
  whatever each makes of them.
- Backends. "reference" (eager, K x N or larger, one process), "blockwise" (PyTorch, memory-linear), "triton" (GPU).
  "auto" picks by device; `resolve_backend` tells which. The environment variable HYPERCONTRAST_BACKEND overrides
  "auto".
- `class_means`: a `ClassMeans` to update with this rank's batch from the norms computed anyway.
- Special cases. A feature or prototype no longer than 1e-12 has no direction: its logits are zero, its gradient is
  zero. A batch with nothing to average has a loss of zero.
- Errors. ValueError or TypeError naming argument, rule and value. Label range and finite norms are read on the CPU;
  on a GPU an out-of-range label counts as ignored and is reported by a later call, and non-finite features give a
  non-finite loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from hypercontrast import _autograd, _checks, reference
from hypercontrast._autograd import Rule
from hypercontrast._ops import resolve_backend
from hypercontrast.distributed import GroupLike, resolve_group
from hypercontrast.prototypes import ClassMeans

__all__ = ["nonl_loss", "normface_loss", "ntce_loss", "resolve_backend"]


def normface_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalize: bool = True,
    group: GroupLike = "auto",
    class_means: ClassMeans | None = None,
    backend: str = "auto",
) -> Tensor:
    """NormFace: cross-entropy of cosine logits, mean_j [ log Σ_c exp(s_cj) - s_{y_j j} ].

    Each sample is an anchor against all K prototypes. Arguments, dtypes, errors: see the module's docstring.

    Returns:
        Scalar, or [N] with reduction="none". At a simplex ETF: log(1 + (K-1) exp(-K/((K-1)τ))); all vectors equal:
        log K.

    Source: Wang et al. 2017; arXiv 2605.20302, eq. 3.
    """
    rule = Rule(rows=False, cols=True, exclude_own=False)
    return _prototype_loss(
        reference.normface_loss, rule, features, prototypes, labels, class_means, group, backend,
        temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction, normalize=normalize,
    )  # fmt: skip


def ntce_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalize: bool = True,
    group: GroupLike = "auto",
    class_means: ClassMeans | None = None,
    backend: str = "auto",
) -> Tensor:
    """NTCE: each sample's prototype against the whole batch, mean_i [ log Σ_j exp(s_{y_i j}) - s_{y_i i} ].

    The sum runs over all samples j, those of the same class and i itself included, so there are as many terms as
    samples in the global batch. Arguments, dtypes, errors: see the module's docstring.

    Returns:
        Scalar, or [N] with reduction="none". At a simplex ETF: NormFace's value + log n for n samples a class; all
        vectors
        equal: log N. The prototype gradient of a class absent from the batch is exactly zero.

    Source: arXiv 2605.20302, eq. 4.
    """
    rule = Rule(rows=True, cols=False, exclude_own=False)
    return _prototype_loss(
        reference.ntce_loss, rule, features, prototypes, labels, class_means, group, backend,
        temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction, normalize=normalize,
    )  # fmt: skip


def nonl_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalize: bool = True,
    anchor: str = "prototype",
    empty: str = "align",
    group: GroupLike = "auto",
    class_means: ClassMeans | None = None,
    backend: str = "auto",
) -> Tensor:
    """NONL: only negatives in the denominator, mean_i [ log Σ_{j: y_j ≠ y_i} exp(s_{y_i j}) - s_{y_i i} ].

    Args:
        anchor: "prototype", the formula above; "sample", log Σ_{c ≠ y_i} exp(s_ci) in its place (Proxy-NCA); "both",
            the log of the two sums together.
        empty: what a sample without negatives contributes (a batch of one class): "align" its positive term -s alone,
            "zero" nothing, "error" a ValueError (on a GPU this reads the device).
        The others, dtypes, errors: see the module's docstring.

    Returns:
        Scalar, or [N] with reduction="none"; it may be negative. At a simplex ETF, with Δ = K/((K-1)τ) and n samples
        a class: -Δ + log(n(K-1)) for "prototype", -Δ + log(K-1) for "sample", -Δ + log((n+1)(K-1)) for "both".

    Source: arXiv 2605.20302, eq. 5; "sample" and "both" are what its public code runs by flag.
    """
    _checks.check_option("anchor", anchor, ("prototype", "sample", "both"))
    _checks.check_option("empty", empty, ("align", "zero", "error"))
    rule = Rule(rows=anchor != "sample", cols=anchor != "prototype", exclude_own=True, empty=empty)
    return _prototype_loss(
        partial(reference.nonl_loss, anchor=anchor, empty=empty), rule, features, prototypes, labels, class_means,
        group, backend, temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction,
        normalize=normalize,
    )  # fmt: skip


def _prototype_loss(
    specification: Callable[..., Tensor],
    rule: Rule,
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    class_means: ClassMeans | None,
    group: GroupLike,
    backend: str,
    **options,
) -> Tensor:
    """Validate and dispatch: to the specification for backend="reference", else to the primitive under its rule."""
    _checks.check_prototype_inputs(features, prototypes, labels, **options)
    if class_means is not None and class_means.sums.shape != prototypes.shape:
        raise ValueError(
            f"class_means must hold {list(prototypes.shape)} like prototypes, got {list(class_means.sums.shape)}"
        )
    process_group, backend = resolve_group(group), resolve_backend(backend, features)
    if backend == "reference":
        if process_group is not None:
            raise ValueError("backend='reference' computes over one process, got a group of several: pass group=None")
        if features.device.type == "cpu":
            _checks.check_label_range(labels, len(prototypes), options["ignore_index"])
            _checks.check_finite_norms("features", features.detach().norm(dim=1, dtype=_checks.accumulator(features)))
            _checks.check_finite_norms(
                "prototypes", prototypes.detach().norm(dim=1, dtype=_checks.accumulator(prototypes))
            )
            _checks.check_temperature_value(options["temperature"])
        if class_means is not None:
            class_means.update(features.detach(), labels, ignore_index=options["ignore_index"])
        return specification(features, prototypes, labels, **options)
    if labels.is_cuda:
        _checks.watch_labels(labels, len(prototypes), options["ignore_index"])
    return _autograd.prototype_loss(
        features,
        prototypes,
        labels,
        rule,
        **options,
        group=process_group,
        class_means=class_means,
        backend=backend,
    )
