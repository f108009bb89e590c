"""What a training step minimises, and the record of it over an epoch.

Shapes: N samples, D dimensions.
"""

from __future__ import annotations

import warnings
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

    batch: the most rows that this rank's features have in a step.
    """

    def __init__(self, network: Network, config: Config, ranks: Ranks, batch: int) -> None:
        self.network, self.ranks = network, ranks
        self.queue = _queue(config, ranks, batch, network.head.prototypes.shape[1]) if config.queue else None
        self._latest: tuple[Tensor, Tensor] | None = None
        if config.loss in GLOBAL_LOSSES:
            options: dict[str, Any] = {"queue": self.queue} if self.queue else {}
            self.loss: torch.nn.Module = GLOBAL_LOSSES[config.loss](
                temperature=config.temperature, backend=config.backend, **options
            )
        else:
            self.loss = CELoss() if config.loss == "ce" else ETFDRLoss()

    @property
    def parameters(self) -> list[Tensor]:
        """What the loss uses besides the features."""
        return list(self.network.head.parameters(recurse=False))

    def __call__(self, features: Tensor, labels: Tensor, share: float) -> Tensor:
        """Of features [N, D] and labels [N]."""
        if self.queue is not None:
            self._latest = features.detach(), labels
        if isinstance(self.loss, SupConLoss):
            return self.loss(features, labels)
        if isinstance(self.loss, CELoss):
            return share * self.loss(self.network.scores(features), labels)
        loss = self.loss(features, self.network.head.prototypes, labels)
        return share * loss if isinstance(self.loss, ETFDRLoss) else loss

    def remember(self) -> None:
        """Queue the features last seen, for the steps to come."""
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


def _queue(config: Config, ranks: Ranks, batch: int, dim: int) -> NegativeBuffer:
    """SupCon contrasts past features of all ranks on each; the prototype losses add up each rank's own."""
    if config.loss == "scl":
        return NegativeBuffer(dim, batch, config.queue, device=ranks.device)
    return NegativeBuffer(dim, batch, -(-config.queue // ranks.world), device=ranks.device, group=None)


class LossRecord:
    """The losses of an epoch, kept on the device and read now and then: reading each would stall a GPU every step."""

    def __init__(self, steps: int, epoch: int, ranks: Ranks, every: int = 50) -> None:
        self.epoch, self.ranks, self.every = epoch, ranks, every
        self._losses = torch.zeros(steps, device=ranks.device)
        self._sizes: list[int] = []
        self._checked = 0

    def add(self, loss: Tensor, size: int) -> None:
        self._losses[len(self._sizes)] = loss
        self._sizes.append(size)
        if len(self._sizes) - self._checked == self.every:
            self._check()

    def mean(self) -> float:
        """The mean over the epoch's samples."""
        self._check()
        sizes = torch.tensor(self._sizes, dtype=torch.float64, device=self.ranks.device)
        return float((self._losses.double() * sizes).sum() / sizes.sum())

    def _check(self) -> None:
        """Average what is new over the ranks and raise TrainingError at the first loss that is not finite."""
        new = self._losses[self._checked : len(self._sizes)]
        self.ranks.sum(new).div_(self.ranks.world)
        bad = (~torch.isfinite(new)).nonzero().flatten().tolist()
        if bad:
            step = self._checked + bad[0] + 1
            raise TrainingError(
                f"loss must be finite, got {float(new[bad[0]])} at epoch {self.epoch}, step {step}:"
                " try a smaller --lr or a larger --temperature"
            )
        self._checked = len(self._sizes)
