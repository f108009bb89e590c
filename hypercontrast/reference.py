"""The prototype losses in a few eager lines each: the specification, and the oracle of the tests.

One process, memory K x M, the precision of the inputs (float64 for truth). The signatures are those of
`hypercontrast.functional` without `group`, `class_means` and `backend`.

Shapes: N samples, M of them not ignored, K classes, D dimensions. s[c, j] = w_c·u_j / temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Vectors at most this long have no direction: they map to the zero vector and receive a zero gradient.
MIN_NORM = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """x/|x| along the last dimension, zero for a zero row."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    zero = norm <= MIN_NORM
    return torch.where(zero, 0, x / torch.where(zero, 1, norm))


def _logits(features, prototypes, labels, temperature, weight, ignore_index, normalize):
    """Logits [K, M] of the samples that count, in the features' precision, then float32 at least."""
    prototypes = prototypes.to(features.dtype)
    if normalize:
        features, prototypes = unit_rows(features), unit_rows(prototypes)
    keep = labels != ignore_index
    y = labels[keep]
    logits = prototypes @ features[keep].T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    a = logits.new_ones(y.shape) if weight is None else weight[y].to(logits.dtype)
    own = torch.nn.functional.one_hot(y, len(prototypes)).T.bool()
    return logits, y, own, a, keep


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
):
    s, y, own, a, keep = _logits(features, prototypes, labels, temperature, weight, ignore_index, normalize)
    return _reduce(s.logsumexp(1)[y] - s.T[own.T], a, keep, reduction)


def nonl_loss(
    features, prototypes, labels, *, temperature=0.1, weight=None, ignore_index=-100, reduction="mean", normalize=True,
    anchor="prototype", empty="align",
):  # fmt: skip
    s, y, own, a, keep = _logits(features, prototypes, labels, temperature, weight, ignore_index, normalize)
    negatives = s.masked_fill(own, -torch.inf)
    denominators = {
        "prototype": [negatives.T[:, y]],
        "sample": [negatives],
        "both": [negatives, negatives.T[:, y]],
    }
    denominator = torch.cat(denominators[anchor])
    nothing = (denominator == -torch.inf).all(0)
    if empty == "error" and nothing.any():
        raise ValueError(
            f"nonl_loss needs a negative for every sample, got {int(nothing.sum())} without (empty='error')"
        )
    lse = torch.where(nothing, 0, denominator.masked_fill(nothing, 0).logsumexp(0))
    loss = lse - s.T[own.T]
    return _reduce(torch.where(nothing, 0, loss) if empty == "zero" else loss, a, keep, reduction)
