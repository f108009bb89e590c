"""From the statistics of the `lse` primitive to a loss over the global batch: O(N + K) work, and the only collectives.

With s_j the positive of sample j, a its class's weight, n_c the samples of class c and M = Σ_j a_j over all ranks,

    prototype anchor:  L = (1/M) [Σ_c a_c n_c ℓ_c - Σ_j a_j s_j]      (depends on the batch through one ℓ_c a class)
    sample anchor:     L = (1/M) Σ_j a_j (ℓ_j - s_j).

Over R ranks the value is the global one on every rank, and local gradients carry a factor R, which DDP's average
removes. In one process most batches have their loss from one operator instead (`_ops.prototype_loss`): there the
launches, or on a CPU the calls, of this arithmetic would cost more than the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from hypercontrast import _checks, _ops, blockwise, compiled
from hypercontrast.distributed import ABSENT, all_sum, global_lse, world_size
from hypercontrast.kernels import _launch  # needs no Triton
from hypercontrast.reference import in_dtype_of, row_lengths

if TYPE_CHECKING:
    from hypercontrast.prototypes import ClassMeans


@dataclass(frozen=True)
class Options:
    """What every prototype loss is told besides its samples and prototypes, once all of it is known to be right."""

    temperature: float | Tensor  # see `_checks.as_scalar`
    weight: Tensor | None
    ignore_index: int
    reduction: str
    normalize: bool
    queue: tuple[Tensor, Tensor] | None
    group: dist.ProcessGroup | None
    class_means: ClassMeans | None
    backend: str

    @property
    def learned(self) -> Tensor | None:
        return _checks.split_temperature(self.temperature)[0]

    @property
    def inv_temperature(self) -> float:
        return _checks.split_temperature(self.temperature)[1]

    @property
    def bounded(self) -> bool:
        return blockwise.is_bounded(self.learned, self.inv_temperature, self.normalize)


@dataclass(frozen=True)
class Rule:
    """Which logits a loss sums: along rows (a prototype against the samples), columns (a sample against the
    prototypes) or both, with or without those of the anchor's own class, and what to do when nothing is left. Rows of
    classes `absent` from the batch are summed where asked for.
    """

    rows: bool
    cols: bool
    exclude_own: bool
    empty: str = "align"
    absent: bool = False


class _ClassGather(torch.autograd.Function):
    """values [K] at each sample's class → [N] (zero for ignored samples); the backward adds up in a fixed order."""

    @staticmethod
    def forward(ctx, values: Tensor, labels: Tensor, in_range: Tensor, ignore_index: int, backend: str) -> Tensor:
        ctx.save_for_backward(labels)
        ctx.options = (len(values), ignore_index, backend)
        return torch.where(in_range, values[torch.where(in_range, labels, 0)], 0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (labels,) = ctx.saved_tensors
        return _ops.segment_sum(grad.contiguous(), labels, *ctx.options), None, None, None, None


def prototype_loss(features: Tensor, prototypes: Tensor, labels: Tensor, options: Options, rule: Rule) -> Tensor:
    if _has_operator(features, prototypes, options, rule):
        loss, _, _, _, inv_norms, *_, extremes = _ops.prototype_loss(
            features, prototypes, labels, options.weight, options.learned, options.inv_temperature,
            options.ignore_index, rule.rows, rule.cols, rule.exclude_own, options.normalize, rule.empty == "zero",
            options.reduction == "mean", keep_bytes(features, prototypes, options.temperature), options.backend,
        )  # fmt: skip
        _checks.watch_labels(labels, len(prototypes), options.ignore_index, extremes)
        if options.class_means is not None:
            options.class_means.add(*_class_sums(features, inv_norms, labels, len(prototypes), options))
        return loss
    row_lse, col_lse, positives, batch = statistics(features, prototypes, labels, options, rule)
    if rule.rows and not rule.cols and options.reduction != "none":
        positive_total = (batch.a_N * positives).sum()
        lse_K, totals = global_lse(
            row_lse, positive_total[None], options.group, bounded=options.bounded, sum_gradients=False
        )
        loss = _over_classes(rule, lse_K, positive_total, totals[0], batch, options)
    else:
        lse_N = col_lse
        if rule.rows:
            nothing = row_lse.new_empty(0)
            lse_K, _ = global_lse(row_lse, nothing, options.group, bounded=options.bounded, sum_gradients=True)
            own_N = _ClassGather.apply(lse_K, labels, batch.in_range, options.ignore_index, options.backend)
            lse_N = logaddexp(col_lse, own_N) if rule.cols else own_N
        loss = _over_samples(rule, lse_N, positives, batch, options)
    if batch.class_sums is not None and options.class_means is not None:
        options.class_means.add(*batch.class_sums)
    return loss.to(_checks.accumulator(features))


def _has_operator(features: Tensor, prototypes: Tensor, options: Options, rule: Rule) -> bool:
    """Whether one operator computes the whole loss."""
    if options.queue is not None or options.group is not None or options.reduction == "none" or rule.empty == "error":
        return False
    if options.backend == "triton":
        return _launch.loss_follows_lse(len(features), len(prototypes), features.shape[1], rule.rows, rule.cols)
    return compiled.takes(options.learned, options.inv_temperature, options.normalize, features, prototypes)


def has_backward(*inputs: object) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def keep_bytes(*inputs: object) -> int:
    """What a forward may keep for its backward: nothing where there will be none."""
    return blockwise.memory_budget() if has_backward(*inputs) else 0


@dataclass(frozen=True)
class Batch:
    """The samples' classes [N], zero for ignored ones, and what they weigh: a_N is zero for ignored ones; counts [K],
    see `Rule.rows`, are over all ranks.
    """

    class_of: Tensor
    in_range: Tensor
    a_N: Tensor
    counts: Tensor
    class_sums: tuple[Tensor, Tensor] | None  # for `class_means`, once the loss is there


def statistics(
    features: Tensor, prototypes: Tensor, labels: Tensor, options: Options, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """This rank's row_lse [K], col_lse [N] and positives [N], see `_ops.lse`, and what the samples weigh."""
    weight, ignore_index, group, backend = options.weight, options.ignore_index, options.group, options.backend
    num_classes = len(prototypes)
    _checks.watch_labels(labels, num_classes, ignore_index)
    in_range = _checks.in_range(labels, num_classes, ignore_index)
    class_of = torch.where(in_range, labels, 0)
    counts = labels.new_zeros(num_classes).index_add_(0, class_of, in_range.long())
    if rule.rows and group is not None:  # only a row's sum needs to know who else has its class
        counts = all_sum(counts.int(), group).long()  # half the bytes

    budget = keep_bytes(features, prototypes, options.temperature)

    def lse(samples: Tensor, labels: Tensor, listed: Tensor | None, cols: bool) -> tuple[Tensor, ...]:
        return _ops.lse(
            samples, prototypes, labels, listed, options.learned, options.inv_temperature, ignore_index, rule.rows,
            cols, rule.exclude_own, options.normalize, budget, backend,
        )  # fmt: skip

    # Triton has room for as many present classes as there are samples: those of other ranks need not fit.
    listed = counts if not rule.absent and (group is None or backend != "triton") else None
    row_lse, col_lse, positives, inv_norms, _, _ = lse(features, labels, listed, rule.cols)
    if options.queue is not None:
        past, past_labels = options.queue
        if backend == "triton" and len(past) < len(features):
            listed = None
        past = in_dtype_of(features, past, options.normalize)
        past_lse, *_ = lse(past, torch.where(past_labels == ABSENT, ignore_index, past_labels), listed, False)
        row_lse = logaddexp(row_lse, past_lse)
    class_sums = None
    if options.class_means is not None:
        class_sums = _class_sums(features, inv_norms, labels, num_classes, options)
    dtype = positives.dtype  # what the O(N + K) arithmetic on them runs in
    a_N = in_range.to(dtype) if weight is None else weight.to(dtype)[class_of] * in_range
    return row_lse, col_lse, positives, Batch(class_of, in_range, a_N, counts, class_sums)


def _class_sums(
    features: Tensor, inv_norms: Tensor, labels: Tensor, num_classes: int, options: Options
) -> tuple[Tensor, Tensor]:
    """Those of unit features, also where the loss takes features as they are and its inverse norms are ones."""
    features = features.detach()
    if not options.normalize:
        inv_norms = 1 / row_lengths(features.to(inv_norms.dtype))[:, 0]
    return _ops.class_sums(features, inv_norms, labels, num_classes, options.ignore_index, options.backend)


def _over_classes(
    rule: Rule, lse_K: Tensor, positive_total: Tensor, global_total: Tensor, batch: Batch, options: Options
) -> Tensor:
    """(1/M) [Σ_c a_c n_c ℓ_c - Σ_j a_j s_j]: every rank knows the whole first sum; of the second its own part, which
    has the gradient, and the global value.
    """
    weight = options.weight
    a_K = batch.counts.to(lse_K.dtype) if weight is None else batch.counts * weight.to(lse_K.dtype)
    present, empty = batch.counts > 0, lse_K == -torch.inf
    _refuse_empty(rule, present & empty, None)
    lse_total = (a_K * torch.where(present & ~empty, lse_K, 0)).sum()
    if rule.empty == "zero":  # a class without negatives is the only one there is: all samples drop out, or none
        nothing = (present & empty).any()
        positive_total, global_total = (torch.where(nothing, 0, total) for total in (positive_total, global_total))
    divisor = _divisor(a_K.sum(), options.reduction)
    loss = (lse_total - positive_total) / divisor
    if options.group is None:
        return loss
    return with_value(world_size(options.group) * loss, (lse_total - global_total) / divisor)


def _over_samples(rule: Rule, lse_N: Tensor, positives: Tensor, batch: Batch, options: Options) -> Tensor:
    """(1/M) Σ_j a_j (ℓ_j - s_j), or its terms."""
    empty = lse_N == -torch.inf
    _refuse_empty(rule, empty & batch.in_range, options.group)
    loss_N = torch.where(empty, 0, lse_N) - positives
    if rule.empty == "zero":
        loss_N = torch.where(empty, 0, loss_N)
    return reduce_samples(loss_N, batch.a_N, options.reduction, options.group)


def reduce_samples(loss_N: Tensor, weight_N: Tensor, reduction: str, group: dist.ProcessGroup | None) -> Tensor:
    """Σ_j a_j loss_j over all ranks, by Σ_j a_j for the mean, or this rank's terms. Nothing to average over is zero."""
    loss_N = weight_N * loss_N
    if reduction == "none":
        return loss_N
    totals = torch.stack([loss_N.sum(), weight_N.sum()])
    if group is None:
        return totals[0] / _divisor(totals[1], reduction)
    value, weight = all_sum(totals, group)
    divisor = _divisor(weight, reduction)
    return with_value(world_size(group) * totals[0] / divisor, value / divisor)


def _divisor(total: Tensor, reduction: str) -> Tensor | float:
    return torch.where(total > 0, total, 1) if reduction == "mean" else 1.0


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp with a zero gradient, not NaN, where both are -inf."""
    nothing = (a == -torch.inf) & (b == -torch.inf)
    return torch.where(nothing, -torch.inf, torch.logaddexp(torch.where(nothing, 0, a), torch.where(nothing, 0, b)))


def with_value(surrogate: Tensor, value: Tensor) -> Tensor:
    """`value` with the gradient of `surrogate`."""
    return surrogate + (value - surrogate).detach()


def _refuse_empty(rule: Rule, empty: Tensor, group: dist.ProcessGroup | None) -> None:
    """`group`: whose ranks see other samples each, and are to raise together."""
    if rule.empty == "error" and all_sum(empty.sum(), group):
        raise ValueError("labels must hold at least two classes for a loss over negatives (empty='error'), got one")
