"""Prototypes on the hypersphere: learned ones (a head), class means, and the classifier either makes.

Shapes: N samples, K classes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hypercontrast import _checks
from hypercontrast._agreement import agree, connected
from hypercontrast._ops import in_full_precision
from hypercontrast.distributed import resolve_group
from hypercontrast.reference import MIN_NORM, unit_rows


def simplex_etf(num_classes: int, dim: int, *, generator: torch.Generator | None = None) -> Tensor:
    """K unit vectors [K, D] in float64 with pairwise cosine -1/(K-1), in a random orientation; needs D >= K - 1.

    K = 1 gives one random unit vector. Raises ValueError when dim < num_classes - 1.
    """
    _checks.check_sizes(dim, num_classes)
    if dim < num_classes - 1:
        raise ValueError(f"dim must be at least num_classes - 1 = {num_classes - 1} for a simplex ETF, got {dim}")
    if num_classes == 1:
        return unit_rows(torch.randn(1, dim, dtype=torch.float64, generator=generator))
    centred = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    # Coordinates of the centred corners in the K-1 dimensions they span, then a random isometry into D.
    eigenvalues, vectors = torch.linalg.eigh(centred)
    corners = vectors[:, 1:] * eigenvalues[1:].sqrt()
    basis, _ = torch.linalg.qr(torch.randn(dim, num_classes - 1, dtype=torch.float64, generator=generator))
    return unit_rows(corners @ basis.T)


class PrototypeHead(nn.Module):
    """Owns the prototypes [K, D] and an optional neck; gives cosine logits.

    Args:
        dim: feature dimension D.
        num_classes: number of classes K.
        neck: None, "linear" (D -> D) or "bn" (BatchNorm1d). Features after ReLU and pooling are non-negative and can
            at best form an orthogonal frame; a signed neck lets them reach the simplex ETF.
        fixed_etf: hold the prototypes fixed at a random simplex ETF (Yang et al. 2022) instead of learning them.

    `forward(x)`: [N, D] -> cosines [N, K] in x's dtype. `embed(x)`: what the losses take as `features`.
    """

    prototypes: Tensor

    def __init__(self, dim: int, num_classes: int, neck: str | None = None, *, fixed_etf: bool = False) -> None:
        super().__init__()
        _checks.check_sizes(dim, num_classes)
        self.dim = dim
        if neck is None:
            self.neck: nn.Module = nn.Identity()
        elif neck == "linear":
            self.neck = nn.Linear(dim, dim)
        elif neck == "bn":
            self.neck = nn.BatchNorm1d(dim)
        else:
            raise ValueError(f"neck must be None, 'linear' or 'bn', got {neck!r}")
        if fixed_etf:
            self.register_buffer("prototypes", simplex_etf(num_classes, dim).to(torch.get_default_dtype()))
        else:
            self.prototypes = nn.Parameter(torch.randn(num_classes, dim) / dim**0.5)

    def embed(self, x: Tensor) -> Tensor:
        _checks.check_features(x, self.dim)
        return self.neck(x)

    def forward(self, x: Tensor) -> Tensor:
        return _cosines(self.embed(x), self.prototypes)


class ClassMeans(nn.Module):
    """Running class means of unit features: w_c = normalised mean over all samples of class c of z/|z|.

    Args:
        num_classes, dim: K and D.
        mode: "mean", the exact mean over everything since `reset` (the paper's definition), or "ema", the exponential
            average over batches used by the paper's public code.
        momentum: share of the old value in "ema".

    Sums are float64 buffers, so the order of the batches does not matter, and stay so in a model that is converted.
    What the last `all_reduce` gave is kept beside them: the next one adds up only what ranks have seen since. Keep them
    outside a module that DDP wraps, or wrap it with broadcast_buffers=False: else each forward overwrites every rank's
    sums with rank 0's.
    """

    sums: Tensor
    counts: Tensor
    shared_sums: Tensor
    shared_counts: Tensor

    def __init__(self, num_classes: int, dim: int, *, mode: str = "mean", momentum: float = 0.9) -> None:
        super().__init__()
        _checks.check_sizes(dim, num_classes)
        _checks.check_option("mode", mode, ("mean", "ema"))
        _checks.check_number("momentum", momentum)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        self.mode, self.momentum = mode, momentum
        for prefix in ("", "shared_"):
            self.register_buffer(f"{prefix}sums", torch.zeros(num_classes, dim, dtype=torch.float64))
            self.register_buffer(f"{prefix}counts", torch.zeros(num_classes, dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassMeans:
        """What `.to()`, `.half()` and the like run: the sums go to the device, and stay in float64."""
        before = {name: getattr(self, name) for name in ("sums", "shared_sums")}
        super()._apply(fn, recurse)
        for name, sums in before.items():
            if getattr(self, name).dtype != sums.dtype:
                setattr(self, name, sums.to(getattr(self, name).device))
        return self

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, *, ignore_index: int = -100) -> None:
        """Add a batch: features [N, D] raw, labels [N] int64.

        Raises ValueError on a wrong shape, label or norm, TypeError on a wrong type.
        """
        num_classes, dim = self.sums.shape
        _checks.check_features(features, dim)
        _checks.check_labels(labels, len(features), features.device)
        _checks.check_ignore_index(ignore_index)
        if not labels.is_cuda:
            _checks.check_label_range(labels, num_classes, ignore_index)
            _checks.check_finite_norms("features", _checks.norms(features))
        in_range = _checks.in_range(labels, num_classes, ignore_index)
        y = torch.where(in_range, labels, 0)
        units = unit_rows(features.double()) * in_range[:, None]
        self.add(
            torch.zeros_like(self.sums).index_add_(0, y, units),
            torch.zeros_like(self.counts).index_add_(0, y, in_range.long()),
        )

    @torch.no_grad()
    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Add per-class sums [K, D] of unit features and their counts [K], as the losses compute them on the way.

        Raises TypeError, ValueError where they are not of this shape, or on the CPU where a sum is not finite.
        """
        _checks.check_matrix("sums", sums, "[K, D]")
        if sums.shape != self.sums.shape:
            raise ValueError(f"sums must have shape {list(self.sums.shape)}, got {list(sums.shape)}")
        if not isinstance(counts, Tensor) or counts.dtype != torch.int64:
            raise TypeError(f"counts must be an int64 tensor, got {getattr(counts, 'dtype', type(counts).__name__)}")
        if counts.shape != self.counts.shape:
            raise ValueError(f"counts must have shape {list(self.counts.shape)}, got {list(counts.shape)}")
        if _checks.can_be_read(sums):
            _checks.check_finite_norms("sums", _checks.norms(sums))
        if self.mode == "ema":
            mean = unit_rows(sums.double())
            started = (self.counts > 0)[:, None]
            blended = torch.where(started, self.momentum * self.sums + (1 - self.momentum) * mean, mean)
            self.sums.copy_(torch.where((counts > 0)[:, None], blended, self.sums))
        else:
            self.sums += sums
        self.counts += counts

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Make every rank hold the means over all that the ranks of `group` have seen; in "ema" mode, of each class the
        average of the running means of those ranks that have seen it.

        As often as you like, over the same group: between two calls every rank goes on from what all have seen. None:
        the default group, if there is one. Raises ValueError on every rank where [K, D], mode or momentum differ,
        LostRankError if a rank ended or does not answer; the means are then as they were.
        """
        resolved = resolve_group("auto" if group is None else group)
        if resolved is None:
            return
        mode = f"mode {self.mode}" + (f", momentum {self.momentum}" if self.mode == "ema" else "")
        agree(lambda: f"ClassMeans.all_reduce of {list(self.sums.shape)}, {mode}", resolved, self.sums)
        sums = self.sums - self.shared_sums
        counts = torch.stack([self.counts - self.shared_counts, (self.counts > 0).long()])  # and ranks that have any
        with connected():
            dist.all_reduce(sums, group=resolved)
            dist.all_reduce(counts, group=resolved)
        self.counts.copy_(self.shared_counts.add_(counts[0]))
        if self.mode == "ema":
            self.sums.copy_(sums / counts[1].clamp(min=1)[:, None])
        else:
            self.sums.copy_(self.shared_sums.add_(sums))

    def prototypes(self) -> Tensor:
        """[K, D] float32 unit class means; zero for a class never seen."""
        return unit_rows(self.sums).float()

    def reset(self) -> None:
        """Forget everything seen."""
        for buffer in self.buffers():
            buffer.zero_()


class PrototypeClassifier(nn.Module):
    """Nearest prototype by cosine. `forward(x)`: [N, D] -> cosines [N, K]; `predict(x)` -> labels [N].

    Prototypes that are a parameter stay that parameter, others become a buffer: in state_dict, and moved by `.to()`.
    """

    prototypes: Tensor

    def __init__(self, prototypes: Tensor) -> None:
        super().__init__()
        _checks.check_matrix("prototypes", prototypes, "[K, D]")
        if len(prototypes) == 0:
            raise ValueError(f"prototypes must hold at least one class, got {list(prototypes.shape)}")
        if isinstance(prototypes, nn.Parameter):
            self.prototypes = prototypes
        else:
            self.register_buffer("prototypes", prototypes)

    def forward(self, features: Tensor) -> Tensor:
        _checks.check_features(features, self.prototypes.shape[1])
        return _cosines(features, self.prototypes)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """The label of each row's nearest prototype [N], never that of one without a direction, as of a class that
        `ClassMeans` has not seen. Where a norm is not finite there is none: ValueError on the CPU; on a GPU, which is
        not asked, the label -1.
        """
        cosines = self(features)
        norms_N, norms_K = map(_checks.norms, (features, self.prototypes))
        if _checks.can_be_read(features):
            _checks.check_finite_norms("features", norms_N)
            _checks.check_finite_norms("prototypes", norms_K)
        known = torch.isfinite(norms_N) & torch.isfinite(norms_K).all()
        directed = cosines.masked_fill(norms_K <= MIN_NORM, -torch.inf)  # whose cosine of 0 beats all negative ones
        return torch.where(known, directed.argmax(dim=1), -1)


def _cosines(features: Tensor, prototypes: Tensor) -> Tensor:
    """[N, K] in the features' dtype, also under autocast, whose bfloat16 would tell close prototypes apart no more;
    lengths are taken in float32 at least, for half precision overflows at 65504.
    """
    u, w = (unit_rows(x.to(_checks.accumulator(x))).to(features.dtype) for x in (features, prototypes))
    with in_full_precision(features):
        return u @ w.T
