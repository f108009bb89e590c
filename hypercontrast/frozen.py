"""A run's network as it was saved, without the run's data.

Shapes: N pictures, C channels, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypercontrast.checkpoint import CheckpointError
from hypercontrast.config import Config, run_config
from hypercontrast.data import normalize
from hypercontrast.data.sources import LARGEST_SIDE
from hypercontrast.models import Network, mixed_precision
from hypercontrast.workspace import BESIDE_NETWORK, build_network, load_network, newest_checkpoint


@dataclass(frozen=True)
class FrozenRun:
    """A network in evaluation mode on one device, and how the run's pictures went into it."""

    config: Config
    epoch: int
    network: Network
    mean: Tensor  # [C], of the run's training pictures on the scale 0 to 255
    std: Tensor  # [C]
    image_size: int

    @property
    def channels(self) -> int:
        return len(self.mean)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Pictures [N, C, H, W] as the run's were -> the backbone's pooled features [N, D] in float32."""
        images = normalize(pixels, self.mean, self.std)
        with mixed_precision(images.device):
            return self.network.backbone(images).float()


def restored_network(run: str, device: torch.device) -> FrozenRun:
    """The network of the run's newest intact checkpoint.

    Beside its weights a checkpoint holds class_means [K, D], and of the pictures mean and std [C] and image_size [].

    Raises UsageError if the folder holds no run, or one that has saved nothing yet, and CheckpointError if the
    checkpoint is damaged, or is not of the network that config.yaml describes.
    """
    config = run_config(run)
    saved = newest_checkpoint(run)
    if missing := [name for name in BESIDE_NETWORK if name not in saved.tensors]:
        raise CheckpointError(
            f"the checkpoint of {run} must hold mean, std and image_size of the pictures it was trained on, got no"
            f" {missing[0]}"
        )
    means, mean, std, image_size = (saved.tensors[name] for name in BESIDE_NETWORK)
    channels = {(1,), (3,)}
    fits = means.dim() == 2 and mean.shape in channels and std.shape == mean.shape and image_size.shape == ()
    if not (fits and 0 < image_size <= LARGEST_SIDE):
        raise CheckpointError(
            f"the checkpoint of {run} must hold class_means [K, D], mean and std [C], and image_size of at most"
            f" {LARGEST_SIDE}, got others"
        )
    mean, std, side = mean.to(device), std.to(device), int(image_size)
    network = build_network(config, len(mean), side, len(means))
    load_network(network, saved.tensors)
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FrozenRun(config, saved.epoch, network.eval(), mean, std, side)
