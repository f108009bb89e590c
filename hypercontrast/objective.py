"""What a training step minimises, and the record of it over an epoch.

Shapes: N samples, D dimensions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypercontrast.buffer import NegativeBuffer
from hypercontrast.config import Config
from hypercontrast.launch import Ranks
from hypercontrast.losses import CELoss, ETFDRLoss, NONLLoss, NormFaceLoss, NTCELoss, SupConLoss
from hypercontrast.models import Network

# These span all ranks by themselves, and have a temperature and backends.
GLOBAL_LOSSES = {"normface": NormFaceLoss, "ntce": NTCELoss, "nonl": NONLLoss, "scl": SupConLoss}
VIEWS = {"scl": 2}  # of every picture in a batch; 1 for the other losses


class TrainingError(RuntimeError):
    """Training cannot go on; the message names epoch and step."""


class Objective:
    """The global batch's mean loss of the network's features, and the queue of past features that it may contrast.

    The losses that do not span all ranks average over this rank's samples; `share`, its part of the global batch times
    the number of ranks, makes DDP's average over ranks the average over samples.

    batch: the most rows that this rank's features have in a step. class_counts: training samples of every class [K].
    """

    def __init__(self, network: Network, config: Config, ranks: Ranks, batch: int, class_counts: Tensor) -> None:
        self.network, self.ranks, self.config = network, ranks, config
        self.queue = _queue(config, ranks, batch, network.head.prototypes.shape[1]) if config.queue else None
        self._latest: tuple[Tensor, Tensor] | None = None
        weight = None if config.class_weights == "none" else inverse_weights(class_counts).to(ranks.device)
        if config.loss in GLOBAL_LOSSES:
            options: dict[str, Any] = {"temperature": config.temperature, "backend": config.backend}
            if self.queue is not None:
                options["queue"] = self.queue
            if weight is not None:
                options["weight"] = weight
            if config.loss == "nonl":
                options["anchor"] = config.anchor
            self.loss: torch.nn.Module = GLOBAL_LOSSES[config.loss](**options).to(ranks.device)
        else:
            self.loss = CELoss(weight).to(ranks.device) if config.loss == "ce" else ETFDRLoss()

    def advance(self, progress: float) -> None:
        """Set the temperature for the steps from `progress` on, the share of the training done."""
        if self.config.temperature_rule == "cosine":
            first, last = self.config.temperature, self.config.final_temperature
            self.loss.temperature = last + (first - last) * (1 + math.cos(math.pi * progress)) / 2  # type: ignore[assignment]

    @property
    def temperature(self) -> float | Tensor | None:
        """What the features' cosines are divided by; None where the loss has none."""
        if self.network.log_temperature is not None:
            return self.network.log_temperature.exp()
        return getattr(self.loss, "temperature", None)

    @property
    def parameters(self) -> list[Tensor]:
        """What the loss uses besides the features."""
        scale = self.network.log_temperature
        return [*self.network.head.parameters(recurse=False), *([] if scale is None else [scale])]

    def __call__(self, features: Tensor, labels: Tensor, share: float) -> Tensor:
        """Of features [N, D] and labels [N]."""
        if self.queue is not None:
            self._latest = features.detach(), labels
        if self.network.log_temperature is not None:
            self.loss.temperature = self.temperature  # type: ignore[assignment]
        if isinstance(self.loss, SupConLoss):
            return self.loss(features, labels)
        if isinstance(self.loss, CELoss):
            return share * self.loss(self.network.scores(features), labels)
        loss = self.loss(features, self.network.head.prototypes, labels)
        return share * loss if isinstance(self.loss, ETFDRLoss) else loss

    @torch.no_grad()
    def remember(self) -> None:
        """After a step: keep a learned temperature in its range, and queue the features last seen."""
        if self.network.log_temperature is not None:
            # NONL has no minimum in τ: once the classes are apart, it falls as long as τ does.
            self.network.log_temperature.clamp_(math.log(self.config.final_temperature), 0.0)
        if self.queue is None or self._latest is None:
            return
        if self.queue.group is None:
            self.queue.push(*self._latest)
        else:
            self.queue.push()  # the loss has gathered those of all ranks

    def state(self) -> list[dict[str, Any]]:
        """Every rank's queue on the CPU, for a checkpoint; all ranks call this together."""
        if self.queue is None:
            return []
        own = self.queue.state_dict()
        return self.ranks.gathered({name: x.cpu() if isinstance(x, Tensor) else x for name, x in own.items()})

    def load_state(self, queues: list[dict[str, Any]]) -> None:
        if self.queue is None:
            return
        if len(queues) == self.ranks.world:
            self.queue.load_state_dict(queues[self.ranks.rank])
        else:
            warnings.warn(
                f"the queue starts empty: it was kept by {len(queues)} ranks, now there are {self.ranks.world}",
                RuntimeWarning,
                stacklevel=2,
            )


def inverse_weights(class_counts: Tensor) -> Tensor:
    """A weight for every class [K], inverse to its size, that averages 1 over the samples; 0 for an empty class."""
    weight = torch.where(class_counts > 0, 1 / class_counts.clamp_min(1), 0.0)
    return (weight * class_counts.sum() / (class_counts > 0).sum()).float()


def _queue(config: Config, ranks: Ranks, batch: int, dim: int) -> NegativeBuffer:
    """SupCon contrasts past features of all ranks on each; the prototype losses add up each rank's own."""
    if config.loss == "scl":
        return NegativeBuffer(dim, batch, config.queue, device=ranks.device)
    return NegativeBuffer(dim, batch, -(-config.queue // ranks.world), device=ranks.device, group=None)


class NotFinite(ArithmeticError):
    """A step's loss or gradient was not finite. step: counted from 1."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__(f"loss and gradient must be finite, got {value} at step {step}")
        self.step, self.value = step, value


class LossRecord:
    """The losses of an epoch, kept on the device. A GPU's are read now and then, for the host waits each time.

    seen: those of the epoch's first steps, from `state`.
    """

    def __init__(self, steps: int, device: torch.device, seen: Tensor | None = None, sizes: Sequence[int] = ()) -> None:
        self._losses = torch.zeros(steps, device=device)
        self._sizes = list(sizes)
        self._checked = len(sizes)
        self._every = 50 if device.type == "cuda" else 1
        if seen is not None:
            self._losses[: len(sizes)] = seen

    def __len__(self) -> int:
        """Steps so far."""
        return len(self._sizes)

    def add(self, loss: Tensor, size: int) -> None:
        """The loss of the next global batch, of `size` samples. Raises NotFinite for this one or one before."""
        self._losses[len(self._sizes)] = loss
        self._sizes.append(size)
        if len(self._sizes) - self._checked == self._every:
            self.check()

    def mean(self) -> float:
        """The mean over the epoch's samples. Raises NotFinite."""
        self.check()
        sizes = torch.tensor(self._sizes, dtype=torch.float64, device=self._losses.device)
        return float((self._losses[: len(sizes)].double() * sizes).sum() / sizes.sum())

    def state(self) -> dict[str, Any]:
        """What makes the record anew. Raises NotFinite."""
        self.check()
        return {"seen": self._losses[: len(self._sizes)].cpu(), "sizes": list(self._sizes)}

    def check(self) -> None:
        """Raise NotFinite at the first loss that is not finite."""
        new = self._losses[self._checked : len(self._sizes)]
        bad = (~torch.isfinite(new)).nonzero().flatten().tolist()
        if bad:
            raise NotFinite(self._checked + bad[0] + 1, float(new[bad[0]]))
        self._checked = len(self._sizes)
