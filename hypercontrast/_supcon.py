"""SupCon from the statistics of `pair_lse`: O(N) arithmetic, and its collectives over a global batch.

Every anchor i has a log-sum-exp L_i over its columns and positives with P_i of them; the loss is a mean of

    L_i - (1/P_i) Σ_p s_ip          ("out")      or      L_i - log (1/P_i) Σ_p exp(s_ip)      ("in").

Over R ranks the features and labels of all are gathered, without a gradient. An anchor's logits are symmetric, so this
rank's rows receive their whole gradient, as anchors and as everyone else's columns, from one pass over the gathered
columns, once the ranks have told each other their anchors' log-sum-exps and upstream gradients: a few numbers a row,
and no exchange of gradients. Columns of a reference set or a queue are contrasted in a pass of their own.

One process's samples against themselves have their loss from one operator, `_pair_ops.pair_loss`, where Triton or the
extension can, unless every anchor's loss is asked for; by Triton not of a learned temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hypercontrast import _autograd, _checks, _pair_ops, compiled
from hypercontrast._agreement import agree
from hypercontrast.distributed import ABSENT, gather_rows, row_counts
from hypercontrast.reference import in_dtype_of

if TYPE_CHECKING:
    from hypercontrast.buffer import NegativeBuffer


@dataclass(frozen=True)
class _Logits:
    """How logits are made and what backend makes them: what every pass of one loss shares."""

    learned: Tensor | None
    inv_temperature: float
    normalize: bool
    inside: bool
    backend: str

    def arguments(self, offset: int | None) -> tuple:
        return self.learned, offset, self.inv_temperature, self.normalize, self.inside, self.backend


@dataclass(frozen=True)
class _Part:
    """Statistics of the anchors against one set of columns, each [N]."""

    lse: Tensor
    positives: Tensor
    count: Tensor


def supcon_loss(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    refs: tuple[Tensor, Tensor | None] | None,
    queue: tuple[Tensor, Tensor] | None,
    *,
    temperature: float | Tensor,
    base_temperature: float | None,
    variant: str,
    singletons: str,
    reduction: str,
    normalize: bool,
    group: dist.ProcessGroup | None,
    buffer: NegativeBuffer | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss of features [N, D] and how many anchors had no positive."""
    learned, inv_temperature = _checks.split_temperature(temperature)
    scale = 1.0 if base_temperature is None else temperature / base_temperature
    alone = refs is None and queue is None and group is None
    if backend == "triton":
        takes = learned is None
    else:
        takes = variant == "out" and compiled.takes(learned, inv_temperature, normalize, features)
    if takes and labels is not None and alone and reduction != "none":
        # The operator's scale is a number: a learned one has a gradient of its own.
        constant, factor = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        loss, single_count, *_ = _pair_ops.pair_loss(
            features, labels, learned, inv_temperature, constant, normalize, variant == "in",
            singletons == "exclude", reduction == "mean", _autograd.keep_bytes(features, learned), backend,
        )  # fmt: skip
        return (loss if factor is None else loss * factor), single_count
    logits = _Logits(learned, inv_temperature, normalize, variant == "in", backend)
    if refs is not None:
        part = _against(features, *refs, labels, mask, logits)
    elif group is None:
        part = _against_itself(features, labels, mask, logits)
    else:
        part = _against_all_ranks(features, labels, logits, group, buffer)
    lse, positives, count = part.lse, part.positives, part.count
    if queue is not None:
        past = _against(features, *queue, labels, None, logits)
        lse, count = _autograd.logaddexp(lse, past.lse), count + past.count
        positives = _autograd.logaddexp(positives, past.positives) if logits.inside else positives + past.positives
    single = count == 0
    some = count.clamp(min=1).to(lse.dtype)
    positives = torch.where(single, 0, positives)
    align = positives - some.log() if logits.inside else positives / some
    loss_N = torch.where(single, 0, torch.where(single, 0, lse) - align)
    if base_temperature is not None:
        loss_N = loss_N * scale
    weight_N = (~single).to(lse.dtype) if singletons == "exclude" else torch.ones_like(lse)
    loss = _autograd.reduce_samples(loss_N, weight_N, reduction, group)
    return loss.to(_checks.accumulator(features)), single.sum()


def _against_itself(features: Tensor, labels: Tensor | None, mask: Tensor | None, logits: _Logits) -> _Part:
    ids: Tensor | None = None
    if mask is None:
        ids, _, count = _classes(labels, None, logits.backend)
        count = _others(count)
    else:
        count = mask.sum(1) - mask.diagonal().long()
    lse, positives, *_ = _pair_ops.pair_lse(features, None, ids, ids, mask, *logits.arguments(offset=0))
    return _Part(lse, positives, count)


def _against(
    features: Tensor, columns: Tensor, column_labels: Tensor | None, labels: Tensor | None, mask: Tensor | None,
    logits: _Logits,
) -> _Part:  # fmt: skip
    """Against columns none of which is an anchor."""
    ids: Tensor | None = None
    column_ids: Tensor | None = None
    if mask is None:
        ids, column_ids, count = _classes(labels, column_labels, logits.backend)
    else:
        count = mask.sum(1)
    columns = in_dtype_of(features, columns, logits.normalize)
    lse, positives, *_ = _pair_ops.pair_lse(features, columns, ids, column_ids, mask, *logits.arguments(offset=None))
    return _Part(lse, positives, count)


def _against_all_ranks(
    features: Tensor, labels: Any, logits: _Logits, group: dist.ProcessGroup, buffer: NegativeBuffer | None
) -> _Part:
    """Against the global batch: this rank's samples and all others'."""
    if buffer is not None:
        columns, column_labels, offset = buffer.gather(features.detach(), labels)
        rows = [buffer.batch] * dist.get_world_size(group)
    else:
        rows = row_counts(features, group)
        columns, column_labels = (gather_rows(x.detach(), rows, group) for x in (features, labels))
        offset = sum(rows[: dist.get_rank(group)])
    ids, column_ids, count = _classes(labels, column_labels, logits.backend)
    lse, positives = _GlobalPairs.apply(
        features, logits.learned, columns.to(features.dtype), ids, column_ids, offset, rows, logits, group
    )
    return _Part(lse, positives, _others(count))


class _GlobalPairs(torch.autograd.Function):
    """(lse, positives) of this rank's anchors; the backward gives their whole gradient, see the top of the file."""

    @staticmethod
    def forward(ctx, features, learned, columns, ids, column_ids, offset, rows, logits, group):
        lse, positives, inv_features, inv_columns = _pair_ops.pair_lse(
            features, columns, ids, column_ids, None, *logits.arguments(offset)
        )
        ctx.save_for_backward(features, learned, columns, ids, column_ids, lse, positives, inv_features, inv_columns)
        ctx.offset, ctx.rows, ctx.logits, ctx.group = offset, rows, logits, group
        return lse, positives

    @staticmethod
    def backward(ctx, grad_lse, grad_positives):
        features, learned, columns, ids, column_ids, lse, positives, inv_features, inv_columns = ctx.saved_tensors
        # Constants: with create_graph=True they would bring a graph into a collective's memory.
        side = [x.detach() for x in (lse, grad_lse, positives, grad_positives)]
        agree(lambda: "backward of supcon_loss", ctx.group, features)
        column_side = gather_rows(torch.stack(side, 1), ctx.rows, ctx.group).unbind(1)
        grad, logit_grad_sum = _pair_ops.pair_lse_backward(
            features, columns, ids, column_ids, inv_features, inv_columns, *side, *column_side, None, None,
            *ctx.logits.arguments(ctx.offset),
        )  # fmt: skip
        grad_learned = None
        if learned is not None:  # every pair is met from both of its sides, on one rank or on two
            grad_learned = (-logit_grad_sum / (2 * learned)).to(learned.dtype).reshape(learned.shape)
        return grad, grad_learned, *[None] * 7


def _classes(labels: Any, column_labels: Tensor | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Classes of the rows, and of the columns, which without labels of their own are the rows; and how many columns are
    of each row's class, none for rows that are not there.
    """
    joint = labels if column_labels is None else torch.cat([labels, column_labels])
    first_column = 0 if column_labels is None else labels.shape[0]
    if backend == "triton":
        ids, counts = _pair_ops.label_classes(joint, first_column)
    else:
        ids = _class_ids(joint)
        counted = ids[first_column:]
        counts = ids.new_zeros(ids.shape[0]).index_add_(0, counted.clamp(min=0), (counted >= 0).long())
    row_ids = ids[: labels.shape[0]]
    count = torch.where(row_ids < 0, 0, counts[row_ids.clamp(min=0)]).long()
    return row_ids, ids[first_column:], count


def _class_ids(labels: Tensor) -> Tensor:
    """Labels, whatever their values, as classes numbered from zero; absent rows below zero.

    Sorted rather than found by `torch.unique`, whose result has a size that a GPU would have to be asked for.
    """
    ordered, order = labels.sort()
    changes = torch.zeros_like(ordered)
    changes[1:] = ordered[1:] != ordered[:-1]
    ids = torch.empty_like(labels).scatter_(0, order, changes.cumsum(0))
    return torch.where(labels == ABSENT, -1, ids)


def _others(count: Tensor) -> Tensor:
    """Without the anchor itself, which is of its own class unless it is not there."""
    return (count - 1).clamp(min=0)
