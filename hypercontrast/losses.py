"""The losses as modules: hyper-parameters only, no state, so they add nothing to a checkpoint."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hypercontrast import _checks, functional
from hypercontrast.functional import GroupLike
from hypercontrast.prototypes import ClassMeans
from hypercontrast.reference import unit_rows


class _PrototypeLoss(nn.Module):
    """Holds what the three prototype losses share."""

    weight: Tensor | None

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalize: bool = True,
        group: GroupLike = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(temperature, nn.Parameter):
            self.register_parameter("temperature", temperature)
        else:
            self.temperature = temperature
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.normalize = normalize
        self.group = group
        self.backend = backend

    def _options(self) -> dict:
        names = ("temperature", "weight", "ignore_index", "reduction", "normalize", "group", "backend")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        shown = {k: v for k, v in self._options().items() if k != "weight"}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())


class NormFaceLoss(_PrototypeLoss):
    """`functional.normface_loss` with its options held."""

    def forward(
        self, features: Tensor, prototypes: Tensor, labels: Tensor, class_means: ClassMeans | None = None
    ) -> Tensor:
        return functional.normface_loss(features, prototypes, labels, class_means=class_means, **self._options())


class NTCELoss(_PrototypeLoss):
    """`functional.ntce_loss` with its options held."""

    def forward(
        self, features: Tensor, prototypes: Tensor, labels: Tensor, class_means: ClassMeans | None = None
    ) -> Tensor:
        return functional.ntce_loss(features, prototypes, labels, class_means=class_means, **self._options())


class NONLLoss(_PrototypeLoss):
    """`functional.nonl_loss` with its options held."""

    def __init__(self, *args, anchor: str = "prototype", empty: str = "align", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.anchor = anchor
        self.empty = empty

    def _options(self) -> dict:
        return super()._options() | {"anchor": self.anchor, "empty": self.empty}

    def forward(
        self, features: Tensor, prototypes: Tensor, labels: Tensor, class_means: ClassMeans | None = None
    ) -> Tensor:
        return functional.nonl_loss(features, prototypes, labels, class_means=class_means, **self._options())


class CELoss(nn.Module):
    """Cross-entropy of ordinary logits [N, K], the baseline: `F.cross_entropy` in float32, averaged over the
    samples.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.to(_checks.accumulator(logits)), labels)


class ETFDRLoss(nn.Module):
    """Dot regression to fixed prototypes, mean_i (w_{y_i}·u_i - 1)²/2 (Yang et al. 2022), the ETF+DR baseline."""

    def forward(self, features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
        dtype = _checks.accumulator(features)
        cosines = (unit_rows(features.to(dtype)) * unit_rows(prototypes.to(dtype))[labels]).sum(dim=1)
        return 0.5 * (cosines - 1).square().mean()
