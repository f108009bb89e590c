"""A backbone and its head. Shapes: N pictures, D feature dimensions, K classes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypercontrast.prototypes import PrototypeClassifier, PrototypeHead

# Of the features that supervised contrastive learning trains (arXiv 2605.20302, appendix E).
PROJECTION_DIM = 128


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


class ProjectionHead(nn.Module):
    """The head of supervised contrastive learning: a projection to train in, and the class means to classify by.

    Args:
        dim: dimension D of the backbone's features.
        num_classes: number of classes K.
        kind: "mlp" (D -> D -> 128, ReLU in between), "linear" (D -> 128) or "none" (the backbone's features).

    `prototypes` [K, projected D] are a buffer: zero until someone fills in the class means, and not trained.
    """

    prototypes: Tensor

    def __init__(self, dim: int, num_classes: int, kind: str = "mlp") -> None:
        super().__init__()
        if kind == "mlp":
            self.projection: nn.Module = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, PROJECTION_DIM))
        elif kind == "linear":
            self.projection = nn.Linear(dim, PROJECTION_DIM)
        elif kind == "none":
            self.projection = nn.Identity()
        else:
            raise ValueError(f"kind must be 'mlp', 'linear' or 'none', got {kind!r}")
        self.register_buffer("prototypes", torch.zeros(num_classes, dim if kind == "none" else PROJECTION_DIM))

    def embed(self, x: Tensor) -> Tensor:
        return self.projection(x)


class Network(nn.Module):
    """Pictures [N, C, H, W] -> features [N, D] as the losses take them; `scores` gives what a class is chosen by.

    temperature: where a temperature τ that is learned begins; `log_temperature` is then a parameter.
    """

    log_temperature: nn.Parameter | None

    def __init__(
        self, backbone: nn.Module, head: PrototypeHead | ProjectionHead, temperature: float | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        learned = None if temperature is None else nn.Parameter(torch.tensor(temperature).log())
        self.register_parameter("log_temperature", learned)

    def forward(self, images: Tensor) -> Tensor:
        with mixed_precision(images.device):
            return self.head.embed(self.backbone(images))

    def scores(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, K]: logits of a linear head, cosines to prototypes of any other."""
        if isinstance(self.head, LinearHead):
            return self.head.logits(features)
        return PrototypeClassifier(self.head.prototypes)(features)


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 autocast on a GPU; float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
