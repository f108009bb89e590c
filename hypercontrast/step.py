"""One optimisation step: pictures to features, the objective's gradient, SGD.

On a GPU the network runs in bfloat16, channels last and compiled, and nothing in a step waits for the device: an update
that must not be made is left out there, and the host hears of it when it next reads the losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hypercontrast._checks import norms
from hypercontrast.accumulate import accumulate_exact
from hypercontrast.config import Config
from hypercontrast.launch import Ranks
from hypercontrast.objective import Objective


class Step:
    """Steps of SGD with momentum 0.9 on the objective's network, over all ranks.

    Weight decay is not for the temperature: it has no zero to decay to. From the first loss or gradient on that is not
    finite nothing is updated any more: the weights stay as they were before that step.
    """

    def __init__(self, objective: Objective, config: Config, ranks: Ranks) -> None:
        self.objective, self.config, self.ranks = objective, config, ranks
        network = objective.network
        if config.sync_bn and ranks.world > 1 and ranks.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        scale = [] if network.log_temperature is None else [network.log_temperature]
        weights = [parameter for parameter in network.parameters() if parameter is not network.log_temperature]
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": scale, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(
            groups,
            lr=config.peak_lr,
            momentum=0.9,
            weight_decay=config.weight_decay,
            fused=True,  # only this one can leave out an update without asking the device first
        )
        self.failed = torch.zeros((), device=ranks.device)  # 1 once a loss or gradient was not finite
        if compiles(config, ranks.device):
            network.compile(dynamic=False)  # an epoch has batches of two sizes at most
        self.encoder: nn.Module = network
        if ranks.world > 1:
            self.encoder = nn.parallel.DistributedDataParallel(network)

    def __call__(self, images: Tensor, labels: Tensor, share: float, lr: float) -> Tensor:
        """Minimise the loss of images [N, C, H, W] and labels [N] by one step.

        share: as of `Objective`. Returns the global batch's loss, or what else is not finite: off a GPU the lengths of
        features and prototypes, which the losses would refuse, and the norm of the gradient.
        """

        def loss_of(features: Tensor) -> Tensor:
            if features.device.type == "cpu":
                self._check(features, self.objective.network.head.prototypes)
            return self.objective(features, labels, share)

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        try:
            if self.config.accumulate == 1:
                loss = loss_of(self.encoder(images))
                loss.backward()
            else:
                chunks = images.tensor_split(self.config.accumulate)
                loss = accumulate_exact(self.encoder, loss_of, chunks, self.objective.parameters)
        except _NotFiniteError:
            return torch.tensor(torch.nan)
        seen = self._update(loss.detach().clone())
        self.objective.remember()
        return seen

    def _check(self, features: Tensor, prototypes: Tensor) -> None:
        """Raise on every rank if the length of some rank's features, or of a prototype, is not finite."""
        lengths = torch.cat([norms(features), norms(prototypes)])
        if self.ranks.sum((~lengths.isfinite()).any().float()) > 0:
            self.failed.fill_(1)
            raise _NotFiniteError

    @torch.no_grad()
    def _update(self, loss: Tensor) -> Tensor:
        """An optimiser's step, unless something is not finite; returns that, else the loss."""
        loss = self.ranks.sum(loss).div_(self.ranks.world)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)  # alike on all ranks: DDP has averaged the gradients
        seen = torch.where(norm.isfinite(), loss, norm)
        self.failed = torch.maximum(self.failed, (~seen.isfinite()).float())
        self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
        self.optimizer.step()
        return seen


class _NotFiniteError(ArithmeticError):
    """The length of some rank's features, or of a prototype, is not finite."""


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the network and the augmentation are compiled."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
