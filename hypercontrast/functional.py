"""The losses as functions: documentation, validation and dispatch, nothing else.

Notation of every docstring: N samples, K classes, D dimensions; u_j = z_j/|z_j| the unit features, ŵ_c = w_c/|w_c| the
unit prototypes, s_cj = ŵ_c·u_j/τ (of samples with each other s_ij = u_i·u_j/τ) the logits, n_c the samples of class c
in the batch.

What holds for every loss here

- Arguments. `features` [N, D] and `prototypes` [K, D] are raw; both are normalised inside unless `normalize=False`,
  which takes them as they are. `labels` [N] int64. `temperature` τ is a positive number, or a tensor of one float to
  learn it. `weight` [K] are class weights and `ignore_index` marks samples that count nowhere, as in
  `F.cross_entropy`; "mean" divides by the sum of the weights of the samples.
- Dtypes. float32, bfloat16, float16 and (not in Triton) float64. Products run in the features' dtype, sums in float32
  (float64 for float64), and so is the loss. Gradients come back in each argument's own dtype.
- Global batch. With `group="auto"` and torch.distributed initialised, the loss is over all ranks' samples and the
  value is the same on every rank; gradients are scaled so that DDP's average is exact. Ranks may hold different
  numbers of samples, none included. The prototype losses exchange per-class sums and counts, 2K numbers beside 512
  bytes that describe the call, never features: K more where logits may be large (a tensor τ, τ < 1/64,
  `normalize=False`), and K in the backward of anchor="both" and reduction="none". SupCon gathers features. With
  reduction="none" each rank gets its own samples' losses, and the gradient is exact for the average over ranks of
  whatever each makes of them.
- Backends. "reference" (eager, K x N or larger, one process), "blockwise" (PyTorch, memory-linear), "triton" (GPU).
  "auto" picks by device; `resolve_backend` tells which. The environment variable HYPERCONTRAST_BACKEND overrides
  "auto".
- `class_means`: a `ClassMeans` to update with this rank's batch, from the norms that the loss computes anyway if it
  normalises.
- `queue`: past features as further columns of the log-sum-exps: a `NegativeBuffer`, or a pair (features [Q, D], labels
  [Q]), in places not yet used anything finite and `NegativeBuffer.ABSENT`. They are constants and no anchors, count in
  no n_c and no mean. The loss only reads it; push after the backward.
- Special cases. A feature or prototype no longer than 1e-12 has no direction: its logits are zero, its gradient is
  zero. Lengths up to 1e12 cost no accuracy; in float16 on a GPU, as long as those of one batch lie within a factor of
  about 1,000 of each other. A batch with nothing to average has a loss of zero.
- Several ranks compare their calls before data moves. Where they differ in shape, dtype or options, in the order of
  calls, or one of them has bad input, every rank raises (over NCCL a rank may notice at its next call); LostRankError
  if a rank ended or does not answer. Options are compared by value; those that are tensors on a GPU by shape. Inside a
  graph of torch.compile calls are not compared.
- Errors. ValueError or TypeError naming argument, rule and value. Label range and finite norms are read on the CPU
  (a length above 1.8e19 has squares beyond float32); on a GPU an out-of-range label counts as ignored and is reported
  by a later call (from a captured CUDA graph by none), and a norm that is not finite gives a loss that is not.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch.distributed as dist
from torch import Tensor

from hypercontrast import _autograd, _checks, _dispatch, _supcon, reference
from hypercontrast._agreement import agree, ranks_of
from hypercontrast._autograd import Options, Rule
from hypercontrast._dispatch import Queue, check_group, check_range, check_values, gradient, present, queued, told
from hypercontrast._ops import in_full_precision, resolve_backend
from hypercontrast.buffer import NegativeBuffer
from hypercontrast.distributed import GroupLike, all_sum, resolve_group
from hypercontrast.prototypes import ClassMeans

__all__ = ["nonl_loss", "normface_loss", "ntce_loss", "resolve_backend", "supcon_loss"]


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
    return _dispatch.prototype_loss(
        reference.normface_loss, partial(_autograd.prototype_loss, rule=rule), features, prototypes, labels,
        temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction, normalize=normalize,
        group=group, class_means=class_means, backend=backend,
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
    queue: Queue = None,
    group: GroupLike = "auto",
    class_means: ClassMeans | None = None,
    backend: str = "auto",
) -> Tensor:
    """NTCE: each sample's prototype against the whole batch, mean_i [ log Σ_j exp(s_{y_i j}) - s_{y_i i} ].

    The sum runs over all samples j, those of the same class and i itself included, so there are as many terms as
    samples in the global batch. A `queue` holds this rank's own past samples: the sum runs over those of all ranks.
    Arguments, dtypes, errors: see the module's docstring.

    Returns:
        Scalar, or [N] with reduction="none". At a simplex ETF: NormFace's value + log n for n samples a class; all
        vectors equal: log N. The prototype gradient of a class absent from the batch is exactly zero.

    Source: arXiv 2605.20302, eq. 4.
    """
    rule = Rule(rows=True, cols=False, exclude_own=False)
    return _dispatch.prototype_loss(
        reference.ntce_loss, partial(_autograd.prototype_loss, rule=rule), features, prototypes, labels,
        temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction, normalize=normalize,
        queue=queue, group=group, class_means=class_means, backend=backend,
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
    queue: Queue = None,
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
        queue: this rank's own past samples, further negatives of prototypes: not for anchor="sample".
        The others, dtypes, errors: see the module's docstring.

    Returns:
        Scalar, or [N] with reduction="none"; it may be negative. At a simplex ETF, with Δ = K/((K-1)τ) and n samples
        a class: -Δ + log(n(K-1)) for "prototype", -Δ + log(K-1) for "sample", -Δ + log((n+1)(K-1)) for "both".

    Source: arXiv 2605.20302, eq. 5; "sample" and "both" are what its public code runs by flag.
    """

    def check() -> None:
        _checks.check_option("anchor", anchor, ("prototype", "sample", "both"))
        _checks.check_option("empty", empty, ("align", "zero", "error"))
        if queue is not None and anchor == "sample":
            raise ValueError("queue must be None for anchor='sample': only prototypes are contrasted with past samples")

    return _dispatch.prototype_loss(
        reference.nonl_loss, _nonl_loss, features, prototypes, labels, temperature=temperature, weight=weight,
        ignore_index=ignore_index, reduction=reduction, normalize=normalize, queue=queue, group=group,
        class_means=class_means, backend=backend, check=check, anchor=anchor, empty=empty,
    )  # fmt: skip


def _nonl_loss(
    features: Tensor, prototypes: Tensor, labels: Tensor, options: Options, *, anchor: str, empty: str
) -> Tensor:
    rule = Rule(rows=anchor != "sample", cols=anchor != "prototype", exclude_own=True, empty=empty)
    return _autograd.prototype_loss(features, prototypes, labels, options, rule)


@overload
def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    ref_features: Tensor | None = None,
    ref_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    base_temperature: float | None = None,
    variant: str = "out",
    singletons: str = "exclude",
    reduction: str = "mean",
    normalize: bool = True,
    return_singletons: Literal[False] = False,
    queue: Queue = None,
    group: GroupLike = "auto",
    backend: str = "auto",
) -> Tensor: ...


@overload
def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    ref_features: Tensor | None = None,
    ref_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    base_temperature: float | None = None,
    variant: str = "out",
    singletons: str = "exclude",
    reduction: str = "mean",
    normalize: bool = True,
    return_singletons: Literal[True],
    queue: Queue = None,
    group: GroupLike = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    ref_features: Tensor | None = None,
    ref_labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    base_temperature: float | None = None,
    variant: str = "out",
    singletons: str = "exclude",
    reduction: str = "mean",
    normalize: bool = True,
    return_singletons: bool = False,
    queue: Queue = None,
    group: GroupLike = "auto",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Supervised contrastive loss: each sample against all others, its P_i positives those of its class.

        "out":  mean_i [ log Σ_{j≠i} exp(s_ij) - (1/P_i) Σ_p s_ip ]
        "in":   mean_i [ log Σ_{j≠i} exp(s_ij) - log (1/P_i) Σ_p exp(s_ip) ]

    Time N²D, memory N·D: the logits never exist, in the forward or in the backward.

    Args:
        features: [N, D], or [B, V, D] for V views of B samples, which are N = B·V anchors.
        labels: [N] or [B] int64, any values. `NegativeBuffer.ABSENT`, the least, marks rows without a sample: columns
            of no anchor, and anchors without positives.
            Without labels and mask, [B, V, D] is contrasted as NT-Xent: a sample's other views are its positives.
        mask: [N, N], [B, B], or [N, R] with references; bool, instead of labels: mask[i, j] makes j a positive of i.
            The diagonal is not read for [N, N]; for [B, B] it makes a sample's views positives of each other. For one
            process.
        ref_features, ref_labels: [R, D] and [R], contrasted instead of the samples themselves: an anchor's columns are
            all references and no sample. They may require a gradient. Every rank has its own.
        base_temperature: multiplies the loss by temperature/base_temperature, as SupCon's published code does.
        variant: where the mean over positives stands, outside the log or inside; see above.
        singletons: anchors without positives: "exclude" leaves them out of the mean, "zero" counts them with a loss of
            zero, "error" raises ValueError (on a GPU this reads the device).
        queue: past samples of any rank, columns of every anchor and positives of those of their class. A
            `NegativeBuffer` over the loss's group carries the gather of the batch as well; for `normalize=False` it has
            to be one of `normalize=False`.
        return_singletons: return (loss, how many of this rank's anchors had no positive) instead of the loss.
        The others, dtypes, errors: see the module's docstring.

    Returns:
        Scalar, or with reduction="none" [N] or [B, V], zero for singletons. At a simplex ETF with n samples a class:
        log(n - 1 + n(K-1) exp(-K/((K-1)τ))); all vectors equal: log(N - 1).

    Source: Khosla et al. 2020, eqs. 2 and 3; arXiv 2605.20302, eq. 2.
    """
    process_group = resolve_group(group)
    buffer = queue if isinstance(queue, NegativeBuffer) and queue.group is not None else None
    views_alone = labels is None and mask is None

    def checked() -> tuple[str, tuple[Tensor, Tensor] | None]:
        _checks.check_supcon_inputs(
            features, labels, mask, ref_features, ref_labels, temperature, base_temperature, variant, singletons,
            reduction, normalize,
        )  # fmt: skip
        if mask is not None and (process_group is not None or queue is not None):
            raise ValueError("mask must be None with a queue or over several ranks: it says nothing of their samples")
        if views_alone and queue is not None:
            raise ValueError("labels must be given with a queue: without, no past sample can be told from this one")
        if buffer is not None and process_group is not None:  # it carries the gather
            _check_carrier(buffer, process_group, normalize)
        if ref_features is not None:
            check_range("ref_features", ref_features, features, normalize)
        return resolve_backend(backend, features), queued(queue, features, normalize)

    def described() -> str:
        """What the collectives rest on, once nothing can fail halfway through them."""
        chosen, _ = checked()
        check_group(process_group, chosen)
        check_values(temperature, features, ref_features=ref_features)
        return (
            f"supcon_loss of {features.dtype} features [n, {features.shape[-1]}]"
            f" by {'views' if views_alone else 'labels'}, temperature {told(temperature)},"
            f" base_temperature {told(base_temperature)}, variant {variant}, singletons {singletons},"
            f" reduction {reduction}, normalize {normalize}, backend {chosen}, references {ref_features is not None},"
            f" gathered by {'a NegativeBuffer' if buffer else 'itself'}, {gradient(features, temperature)} gradient"
        )

    if process_group is not None:
        agree(described, process_group, features)
    chosen, past = checked()
    options: dict[str, Any] = {
        "temperature": _checks.as_scalar(temperature, features), "base_temperature": base_temperature,
        "variant": variant, "singletons": singletons,
        "reduction": reduction, "normalize": normalize,
    }  # fmt: skip
    shape = features.shape[:-1]
    features, labels, mask = reference.flatten_views(features, labels, mask, ref_features is None)
    if views_alone and process_group is not None:
        labels = labels + (dist.get_rank(process_group) << 40)  # every rank numbers its samples from zero
    if chosen == "reference":
        check_values(temperature, features, ref_features=ref_features)
        past = None if past is None else present(past)
        with in_full_precision(features):
            loss, alone = reference.supcon_loss(
                features, labels, mask=mask, ref_features=ref_features, ref_labels=ref_labels, queue=past, **options
            )
    else:
        refs = None if ref_features is None else (ref_features, ref_labels)
        loss, alone = _supcon.supcon_loss(
            features, labels, mask, refs, past, **options, group=process_group, buffer=buffer, backend=chosen
        )
    if singletons == "error" and (lonely := int(all_sum(alone, process_group))):  # on all ranks, so that none waits
        raise ValueError(f"labels must give every anchor a positive (singletons='error'), got {lonely} without")
    if reduction == "none":
        loss = loss.reshape(shape)
    return (loss, alone) if return_singletons else loss


def _check_carrier(buffer: NegativeBuffer, group: dist.ProcessGroup, normalize: bool) -> None:
    """What it gathers must be the loss's own columns: from the same ranks, and as long as the anchors are."""
    of_buffer, of_loss = ranks_of(buffer.group), ranks_of(group)
    if of_buffer != of_loss:
        raise ValueError(f"queue must be a NegativeBuffer over the loss's ranks {of_loss}, got one over {of_buffer}")
    if buffer.normalize and not normalize:
        raise ValueError("queue must be a NegativeBuffer with normalize=False for normalize=False, got normalize=True")
