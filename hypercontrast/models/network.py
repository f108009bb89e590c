"""A backbone and its head. Shapes: N pictures, D feature dimensions, K classes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypercontrast.prototypes import PrototypeClassifier, PrototypeHead


class LinearHead(PrototypeHead):
    """The ordinary classifier of the cross-entropy baseline, initialised as `nn.Linear`: logits x·Wᵀ + b.

    The features stay raw. The rows of W stand where the other heads have prototypes.
    """

    def __init__(self, dim: int, num_classes: int, neck: str | None = None) -> None:
        super().__init__(dim, num_classes, neck)
        bound = 1 / math.sqrt(dim)
        nn.init.uniform_(self.prototypes, -bound, bound)
        self.bias = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] embedded features -> [N, K], in the dtype of the weights."""
        return F.linear(features.to(self.prototypes.dtype), self.prototypes, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.embed(x))


class Network(nn.Module):
    """Pictures [N, C, H, W] -> features [N, D] as the losses take them; `scores` gives what a class is chosen by."""

    def __init__(self, backbone: nn.Module, head: PrototypeHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head.embed(self.backbone(images))

    def scores(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, K]: logits of a linear head, cosines to prototypes of any other."""
        if isinstance(self.head, LinearHead):
            return self.head.logits(features)
        return PrototypeClassifier(self.head.prototypes)(features)
