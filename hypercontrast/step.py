"""One optimisation step: pictures to features, the objective's gradient, SGD.

On a GPU the network runs in bfloat16, channels last and compiled, and nothing in a step waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hypercontrast.accumulate import accumulate_exact
from hypercontrast.config import Config
from hypercontrast.launch import Ranks
from hypercontrast.objective import Objective


class Step:
    """Steps of SGD with momentum 0.9 on the objective's network, over all ranks.

    Weight decay is not for the temperature: it has no zero to decay to.
    """

    def __init__(self, objective: Objective, config: Config, ranks: Ranks) -> None:
        self.objective, self.config = objective, config
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
            fused=ranks.device.type == "cuda",
        )
        if compiles(config, ranks.device):
            network.compile(dynamic=False)  # an epoch has batches of two sizes at most
        self.encoder: nn.Module = network
        if ranks.world > 1:
            self.encoder = nn.parallel.DistributedDataParallel(network)

    def __call__(self, images: Tensor, labels: Tensor, share: float, lr: float) -> Tensor:
        """Minimise the loss of images [N, C, H, W] and labels [N] by one step; returns it, detached.

        share: as of `Objective`. Raises ValueError, off a GPU, if the features are not finite.
        """

        def loss_of(features: Tensor) -> Tensor:
            return self.objective(features, labels, share)

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        if self.config.accumulate == 1:
            loss = loss_of(self.encoder(images))
            loss.backward()
        else:
            chunks = images.tensor_split(self.config.accumulate)
            loss = accumulate_exact(self.encoder, loss_of, chunks, self.objective.parameters)
        self.optimizer.step()
        self.objective.remember()
        return loss.detach()


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the network and the augmentation are compiled."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
