"""Long-tailed training sets: the first n_c pictures of every class, fewer from class to class."""

from __future__ import annotations

import torch
from torch import Tensor

from hypercontrast.metrics import position_in_class


def long_tailed_counts(largest: int, num_classes: int, imbalance: float, shape: str) -> list[int]:
    """Pictures of every class c = 0 ... K-1; the largest has `largest`, n, and the smallest `imbalance` times as many.

    "exp": n·imbalance^(c/(K-1)), rounded down, at least 1 (arXiv 2605.20302, appendix E, after Cui et al. 2019).
    "step": n for the first half of the classes (K // 2), n·imbalance for the others (Buda et al. 2018).
    """
    shares = {
        "exp": [imbalance ** (c / max(num_classes - 1, 1)) for c in range(num_classes)],
        "step": [1.0 if c < num_classes // 2 else imbalance for c in range(num_classes)],
    }[shape]
    # A product such as 500 * 0.02, which should be whole, may fall short of it by a rounding error.
    return [max(int(largest * share + 1e-9), 1) for share in shares]


def long_tailed_order(labels: Tensor, num_classes: int, imbalance: float, shape: str) -> Tensor:
    """Indices, in their own order, of the first n_c samples of every class c (all of a class that has fewer)."""
    counts = torch.bincount(labels, minlength=num_classes)
    wanted = torch.tensor(long_tailed_counts(int(counts.max()), num_classes, imbalance, shape), device=labels.device)
    return (position_in_class(labels) < wanted[labels]).nonzero().flatten()
