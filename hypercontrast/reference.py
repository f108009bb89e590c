"""The losses in a few eager lines each: the specification, and the oracle of the tests.

One process, memory K x M or N x N, the precision of the inputs (float64 for truth). The signatures are those of
`hypercontrast.functional` without `group`, `class_means` and `backend`, and with a queue as (features, labels).

Shapes: N samples, M of them not ignored, K classes, D dimensions. s[c, j] = w_c·u_j / temperature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hypercontrast.distributed import ABSENT

# Vectors at most this long have no direction: they map to the zero vector and receive a zero gradient.
MIN_NORM = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """x/|x| along the last dimension, zero for a zero row, in the dtype of x."""
    return (x / row_lengths(x)).to(x.dtype)


def row_lengths(x: Tensor) -> Tensor:
    """|x| along the last dimension, which is kept; infinite for a zero row, so that divided by it there are zeros.

    In float32 at least: float16 ends at 65504.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.masked_fill(norm <= MIN_NORM, torch.inf)


def in_dtype_of(features: Tensor, x: Tensor, normalize: bool) -> Tensor:
    """Further columns in the features' dtype; unit vectors in float16, whose range is short, if they are to be ones."""
    if normalize and features.dtype == torch.float16 != x.dtype:
        x = unit_rows(x)
    return x.to(features.dtype)


def _logits(features, prototypes, labels, temperature, weight, ignore_index, normalize):
    """Logits [K, M] of the samples that count, in the features' precision, then float32 at least."""
    if normalize:
        features, prototypes = unit_rows(features), unit_rows(prototypes)
    prototypes = prototypes.to(features.dtype)
    keep = labels != ignore_index
    y = labels[keep]
    logits = prototypes @ features[keep].T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    a = logits.new_ones(y.shape) if weight is None else weight[y].to(logits.dtype)
    own = torch.nn.functional.one_hot(y, len(prototypes)).T.bool()
    return logits, y, own, a, keep


def _past_logits(prototypes, queue, features, temperature, ignore_index, normalize):
    """Logits [K, Q] of a queue of past samples (features, labels), [K, 0] without one, and which are of their class."""
    past, labels = (features[:0], features.new_zeros(0, dtype=torch.int64)) if queue is None else queue
    past = in_dtype_of(features, past, normalize)
    s, _, own, _, _ = _logits(past, prototypes, labels, temperature, None, ignore_index, normalize)
    return s, own


def _reduce(loss, a, keep, reduction):
    """Weighted reduction of the per-sample losses [M]; nothing to average over is a loss of zero."""
    if reduction == "none":
        return loss.new_zeros(keep.shape).masked_scatter(keep, a * loss)
    total = (a * loss).sum()
    return total if reduction == "sum" else total / a.sum() if a.sum() > 0 else total


def normface_loss(
    features,
    prototypes,
    labels,
    *,
    temperature=0.1,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    normalize=True,
):
    s, _, own, a, keep = _logits(features, prototypes, labels, temperature, weight, ignore_index, normalize)
    return _reduce(s.logsumexp(0) - s.T[own.T], a, keep, reduction)


def ntce_loss(
    features,
    prototypes,
    labels,
    *,
    temperature=0.1,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    normalize=True,
    queue=None,
):
    s, y, own, a, keep = _logits(features, prototypes, labels, temperature, weight, ignore_index, normalize)
    past, _ = _past_logits(prototypes, queue, features, temperature, ignore_index, normalize)
    return _reduce(torch.cat([s, past], 1).logsumexp(1)[y] - s.T[own.T], a, keep, reduction)


def nonl_loss(
    features, prototypes, labels, *, temperature=0.1, weight=None, ignore_index=-100, reduction="mean", normalize=True,
    anchor="prototype", empty="align", queue=None,
):  # fmt: skip
    s, y, own, a, keep = _logits(features, prototypes, labels, temperature, weight, ignore_index, normalize)
    past, own_past = _past_logits(prototypes, queue, features, temperature, ignore_index, normalize)
    negatives = s.masked_fill(own, -torch.inf)
    of_rows = torch.cat([negatives, past.masked_fill(own_past, -torch.inf)], 1).T[:, y]
    denominators = {"prototype": [of_rows], "sample": [negatives], "both": [negatives, of_rows]}
    denominator = torch.cat(denominators[anchor])
    nothing = (denominator == -torch.inf).all(0)
    if empty == "error" and nothing.any():
        raise ValueError(
            f"nonl_loss needs a negative for every sample, got {int(nothing.sum())} without (empty='error')"
        )
    lse = torch.where(nothing, 0, denominator.masked_fill(nothing, 0).logsumexp(0))
    loss = lse - s.T[own.T]
    return _reduce(torch.where(nothing, 0, loss) if empty == "zero" else loss, a, keep, reduction)


def cosface_loss(
    features, prototypes, labels, *, margin=0.35, temperature=1 / 64, weight=None, ignore_index=-100, reduction="mean",
    normalize=True,
):  # fmt: skip
    s, y, own, a, keep = _logits(features, prototypes, labels, temperature, weight, ignore_index, normalize)
    margin_M = margin[y].to(s.dtype) if isinstance(margin, torch.Tensor) else margin
    s = torch.where(own, s - margin_M / temperature, s)
    return _reduce(s.logsumexp(0) - s.T[own.T], a, keep, reduction)


def arcface_loss(
    features, prototypes, labels, *, margin=0.5, temperature=1 / 64, weight=None, ignore_index=-100, reduction="mean",
    normalize=True,
):  # fmt: skip
    s, _, own, a, keep = _logits(features, prototypes, labels, temperature, weight, ignore_index, normalize)
    cosine = s * temperature
    least = 4 * torch.finfo(s.dtype).eps  # from 0 and π, where the angle has no slope
    angle = cosine.clamp(least - 1, 1 - least).acos()
    target = torch.where(angle < torch.pi - margin, (angle + margin).cos(), cosine - margin * math.sin(margin))
    s = torch.where(own, target / temperature, s)
    return _reduce(s.logsumexp(0) - s.T[own.T], a, keep, reduction)


def logit_adjusted_loss(
    features, prototypes, labels, bias, *, temperature=0.1, weight=None, ignore_index=-100, reduction="mean",
    normalize=True,
):  # fmt: skip
    s, _, own, a, keep = _logits(features, prototypes, labels, temperature, weight, ignore_index, normalize)
    s = s + bias.to(s.dtype)[:, None]
    return _reduce(s.logsumexp(0) - s.T[own.T], a, keep, reduction)


def proxy_anchor_loss(
    features, prototypes, labels, *, margin=0.1, temperature=1 / 32, ignore_index=-100, normalize=True, **_
):
    """A mean over classes: the samples' weights and reduction, which all losses are called with, have no say."""
    s, _, own, _, _ = _logits(features, prototypes, labels, temperature, None, ignore_index, normalize)
    shift, one = margin / temperature, s.new_zeros(len(s), 1)
    pull = torch.cat([one, (shift - s).masked_fill(~own, -torch.inf)], 1).logsumexp(1)
    push = torch.cat([one, (shift + s).masked_fill(own, -torch.inf)], 1).logsumexp(1)
    return pull.sum() / own.any(1).sum().clamp(min=1) + push.mean()


def dcl_loss(features, *, temperature=0.1, reduction="mean", normalize=True):
    """Of two views [B, 2, D]."""
    samples = len(features)
    units = features.flatten(0, 1)
    if normalize:
        units = unit_rows(units)
    s = units @ units.T
    s = s.to(torch.promote_types(s.dtype, torch.float32)) / temperature
    sample = torch.arange(samples, device=features.device).repeat_interleave(2)
    own = sample[:, None] == sample
    nothing = own.all(1)
    lse = torch.where(nothing, 0, s.masked_fill(own & ~nothing[:, None], -torch.inf).logsumexp(1))
    row = torch.arange(2 * samples, device=features.device)
    loss = lse - s[row, row ^ 1]  # the other view
    if reduction == "none":
        return loss.view(samples, 2)
    return loss.sum() / max(len(loss), 1) if reduction == "mean" else loss.sum()


def flatten_views(features, labels, mask, against_self):
    """[B, V, D] as B·V rows, the views of a sample next to each other, with the labels and the mask to match.

    Without labels and mask a sample is the class of its own views. [N, D] passes as it is. The mask's columns are
    samples too when the features are contrasted `against_self`.
    """
    if features.dim() == 2:
        return features, labels, mask
    samples, views = features.shape[:2]
    if labels is None and mask is None:
        labels = torch.arange(samples, device=features.device)
    if labels is not None:
        labels = labels.repeat_interleave(views)
    if mask is not None:
        mask = mask.repeat_interleave(views, 0)
        if against_self:
            mask = mask.repeat_interleave(views, 1)
    return features.flatten(0, 1), labels, mask


def supcon_loss(
    features, labels, *, mask=None, ref_features=None, ref_labels=None, temperature=0.1, base_temperature=None,
    variant="out", singletons="exclude", reduction="mean", normalize=True, queue=None,
):  # fmt: skip
    """Of features [N, D] (see `flatten_views`); returns the loss and how many anchors have no positive."""
    columns, column_labels = (features, labels) if ref_features is None else (ref_features, ref_labels)
    own = torch.zeros(len(features), len(columns), dtype=torch.bool, device=features.device)
    if ref_features is None:
        own.fill_diagonal_(True)
    if queue is not None:
        columns = torch.cat([in_dtype_of(features, x, normalize) for x in (columns, queue[0])])
        column_labels = torch.cat([column_labels, queue[1]])
        own = torch.nn.functional.pad(own, (0, len(queue[0])))
    if column_labels is not None:
        own |= column_labels == ABSENT  # no column of anyone
    columns = in_dtype_of(features, columns, normalize)
    if normalize:
        features, columns = unit_rows(features), unit_rows(columns)
    s = features @ columns.T
    s = s.to(torch.promote_types(s.dtype, torch.float32)) / temperature
    positive = (mask if mask is not None else labels[:, None] == column_labels) & ~own
    count = positive.sum(1)
    single, some = count == 0, count.clamp(min=1).to(s.dtype)
    lse = s.masked_fill(own, -torch.inf).masked_fill(single[:, None], 0).logsumexp(1)
    if variant == "out":
        align = torch.where(positive, s, 0).sum(1) / some
    else:
        align = s.masked_fill(~positive & ~single[:, None], -torch.inf).logsumexp(1) - some.log()
    loss = torch.where(single, 0, lse - align)
    if base_temperature is not None:
        loss = loss * (temperature / base_temperature)
    if reduction == "none":
        return loss, single.sum()
    anchors = (~single if singletons == "exclude" else torch.ones_like(single)).sum()
    return loss.sum() / anchors.clamp(min=1) if reduction == "mean" else loss.sum(), single.sum()
