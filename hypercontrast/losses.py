"""The losses as modules: hyper-parameters only, no state, so they add nothing to a checkpoint."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hypercontrast import _checks, functional, related
from hypercontrast._dispatch import Queue
from hypercontrast.distributed import GroupLike
from hypercontrast.prototypes import ClassMeans
from hypercontrast.reference import unit_rows


class _Loss(nn.Module):
    """Holds the options of a functional loss under their own names."""

    def _hold(self, **options) -> None:
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def _options(self) -> dict:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = {k: v for k, v in self._options().items() if not isinstance(v, (Tensor, nn.Module))}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())


class NormFaceLoss(_Loss):
    """`functional.normface_loss` with its options held.

    Called with (features, prototypes, labels, class_means=None).
    """

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
        self._hold(
            temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction,
            normalize=normalize, group=group, backend=backend,
        )  # fmt: skip

    def forward(
        self, features: Tensor, prototypes: Tensor, labels: Tensor, class_means: ClassMeans | None = None
    ) -> Tensor:
        return functional.normface_loss(features, prototypes, labels, class_means=class_means, **self._options())


class NTCELoss(_Loss):
    """`functional.ntce_loss` with its options held.

    Called with (features, prototypes, labels, class_means=None).
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalize: bool = True,
        queue: Queue = None,
        group: GroupLike = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._hold(
            temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction,
            normalize=normalize, queue=queue, group=group, backend=backend,
        )  # fmt: skip

    def forward(
        self, features: Tensor, prototypes: Tensor, labels: Tensor, class_means: ClassMeans | None = None
    ) -> Tensor:
        return functional.ntce_loss(features, prototypes, labels, class_means=class_means, **self._options())


class NONLLoss(_Loss):
    """`functional.nonl_loss` with its options held.

    Called with (features, prototypes, labels, class_means=None).
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalize: bool = True,
        anchor: str = "prototype",
        empty: str = "align",
        queue: Queue = None,
        group: GroupLike = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._hold(
            temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction,
            normalize=normalize, anchor=anchor, empty=empty, queue=queue, group=group, backend=backend,
        )  # fmt: skip

    def forward(
        self, features: Tensor, prototypes: Tensor, labels: Tensor, class_means: ClassMeans | None = None
    ) -> Tensor:
        return functional.nonl_loss(features, prototypes, labels, class_means=class_means, **self._options())


class SupConLoss(_Loss):
    """`functional.supcon_loss` with its options held.

    Called with (features, labels=None, mask=None, ref_features=None, ref_labels=None).
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        base_temperature: float | None = None,
        variant: str = "out",
        singletons: str = "exclude",
        reduction: str = "mean",
        normalize: bool = True,
        queue: Queue = None,
        group: GroupLike = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._hold(
            temperature=temperature, base_temperature=base_temperature, variant=variant, singletons=singletons,
            reduction=reduction, normalize=normalize, queue=queue, group=group, backend=backend,
        )  # fmt: skip

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        ref_features: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        return functional.supcon_loss(
            features, labels, mask=mask, ref_features=ref_features, ref_labels=ref_labels, **self._options()
        )


class CosFaceLoss(_Loss):
    """`related.cosface_loss` with its options held. Called with (features, prototypes, labels)."""

    def __init__(
        self,
        margin: float | Tensor = 0.35,
        temperature: float | Tensor = 1 / 64,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalize: bool = True,
        group: GroupLike = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._hold(
            margin=margin, temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction,
            normalize=normalize, group=group, backend=backend,
        )  # fmt: skip

    def forward(self, features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
        return related.cosface_loss(features, prototypes, labels, **self._options())


class ArcFaceLoss(_Loss):
    """`related.arcface_loss` with its options held. Called with (features, prototypes, labels)."""

    def __init__(
        self,
        margin: float = 0.5,
        temperature: float | Tensor = 1 / 64,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        group: GroupLike = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._hold(
            margin=margin, temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction,
            group=group, backend=backend,
        )  # fmt: skip

    def forward(self, features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
        return related.arcface_loss(features, prototypes, labels, **self._options())


class LogitAdjustedLoss(_Loss):
    """`related.logit_adjusted_loss` with its options held. Called with (features, prototypes, labels)."""

    def __init__(
        self,
        bias: Tensor,
        temperature: float | Tensor = 0.1,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalize: bool = True,
        group: GroupLike = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._hold(
            bias=bias, temperature=temperature, weight=weight, ignore_index=ignore_index, reduction=reduction,
            normalize=normalize, group=group, backend=backend,
        )  # fmt: skip

    def forward(self, features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
        return related.logit_adjusted_loss(features, prototypes, labels, **self._options())


class ProxyAnchorLoss(_Loss):
    """`related.proxy_anchor_loss` with its options held. Called with (features, prototypes, labels)."""

    def __init__(
        self,
        margin: float = 0.1,
        temperature: float | Tensor = 1 / 32,
        ignore_index: int = -100,
        normalize: bool = True,
        group: GroupLike = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._hold(
            margin=margin, temperature=temperature, ignore_index=ignore_index, normalize=normalize, group=group,
            backend=backend,
        )  # fmt: skip

    def forward(self, features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
        return related.proxy_anchor_loss(features, prototypes, labels, **self._options())


class DCLLoss(_Loss):
    """`related.dcl_loss` with its options held. Called with (features)."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        normalize: bool = True,
        group: GroupLike = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._hold(
            temperature=temperature, reduction=reduction, normalize=normalize, group=group, backend=backend,
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return related.dcl_loss(features, **self._options())


def _check_all_labels(labels: Tensor, x: Tensor, num_classes: int) -> None:
    """Of the rows of x: none is ignored."""
    _checks.check_labels(labels, x.shape[0], x.device)
    if _checks.can_be_read(labels):
        _checks.check_label_range(labels, num_classes, ignore_index=0)


class CELoss(nn.Module):
    """Cross-entropy of ordinary logits [N, K], the baseline: `F.cross_entropy` in float32, averaged over the samples.
    Called with (logits, labels).

    weight: of every class [K], meant to average 1 over the samples: the sum is divided by N, not by the weights' sum,
    so that averages over ranks stay exact.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        _checks.check_matrix("logits", logits, "[N, K]")
        _check_all_labels(labels, logits, logits.shape[1])
        _checks.check_weight(self.weight, logits.shape[1], logits.device)
        logits = logits.to(_checks.accumulator(logits))
        weight = None if self.weight is None else self.weight.to(logits.dtype)  # which `.half()` and the like change
        return F.cross_entropy(logits, labels, weight, reduction="sum") / max(labels.shape[0], 1)


class ETFDRLoss(nn.Module):
    """Dot regression to fixed prototypes, mean_i (ŵ_{y_i}·u_i - 1)²/2 (Yang et al. 2022), the ETF+DR baseline.

    Called with (features, prototypes, labels). Over several ranks it and `CELoss` average over a rank's own samples.
    """

    def forward(self, features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
        _checks.check_matrix("features", features, "[N, D]")
        _checks.check_prototypes(prototypes, features)
        _check_all_labels(labels, features, len(prototypes))
        dtype = _checks.accumulator(features)
        cosines = (unit_rows(features.to(dtype)) * unit_rows(prototypes.to(dtype))[labels]).sum(dim=1)
        return 0.5 * (cosines - 1).square().sum() / max(labels.shape[0], 1)
