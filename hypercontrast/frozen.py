"""A run's backbone as it was saved, without the run's data.

Shapes: N pictures, C channels, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypercontrast import checkpoint
from hypercontrast.checkpoint import CheckpointError
from hypercontrast.config import Config, UsageError, read_config
from hypercontrast.data import normalize
from hypercontrast.models import build_model, mixed_precision

LUMA = (0.299, 0.587, 0.114)  # a grey picture's share of red, green and blue (ITU-R BT.601), as Pillow converts


@dataclass(frozen=True)
class FrozenBackbone:
    """A backbone in evaluation mode on one device, and how the run's pictures went into it."""

    config: Config
    epoch: int
    network: nn.Module
    mean: Tensor  # [C], of the run's training pictures on the scale 0 to 255
    std: Tensor  # [C]
    image_size: int

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Pictures [N, 1 or 3, H, W] uint8 of any size, on any device -> pooled features [N, D] in float32."""
        pixels = _fitted(pixels.to(self.mean.device).float(), len(self.mean), self.image_size)
        images = normalize(pixels, self.mean, self.std).contiguous(memory_format=torch.channels_last)
        with mixed_precision(images.device):
            return self.network(images).float()


def run_config(run: str) -> Config:
    """The config a run was trained with. Raises UsageError if the folder holds no run."""
    path = Path(run, "config.yaml")
    if not path.is_file():
        raise UsageError(f"RUN must be the folder of a run, with a config.yaml, got {run}")
    return read_config(path)


def load_backbone(run: str, device: torch.device) -> FrozenBackbone:
    """The backbone of the run's newest intact checkpoint.

    Beside the weights a checkpoint holds `mean` and `std` [C] and `image_size` [], what the network was fed with.

    Raises UsageError if the folder holds no run, or one that has saved nothing yet, and CheckpointError if the
    checkpoint is damaged, or is not of the network that config.yaml describes.
    """
    config = run_config(run)
    saved = checkpoint.load_checkpoint(Path(run))
    if saved is None:
        raise UsageError(f"{run} must hold a checkpoint: the run has not finished an epoch yet")
    if missing := [name for name in ("mean", "std", "image_size") if name not in saved.tensors]:
        raise CheckpointError(
            f"the checkpoint of {run} must hold mean, std and image_size of the pictures it was trained on, got no"
            f" {missing[0]}: it is of an older version, so train again"
        )
    mean, std = (saved.tensors[name].to(device) for name in ("mean", "std"))
    image_size = int(saved.tensors["image_size"])
    network, _ = build_model(config.model, len(mean), image_size, config.width)
    prefix = "backbone."
    weights = {n.removeprefix(prefix): x for n, x in saved.tensors.items() if n.startswith(prefix)}
    if {n: x.shape for n, x in network.state_dict().items()} != {n: x.shape for n, x in weights.items()}:
        raise CheckpointError("the checkpoint must hold the network that config.yaml describes, got other tensors")
    network.load_state_dict(weights)
    network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return FrozenBackbone(config, saved.epoch, network, mean, std, image_size)


def _fitted(pixels: Tensor, channels: int, size: int) -> Tensor:
    """The shorter side scaled to `size`, the middle cut out, and made grey or three-channelled as the run's were."""
    if pixels.shape[1] > channels:
        pixels = torch.einsum("nchw,c->nhw", pixels, pixels.new_tensor(LUMA))[:, None]
    pixels = pixels.expand(-1, channels, -1, -1)
    shorter = min(pixels.shape[-2:])
    if shorter != size:
        sides = [max(size, round(side * size / shorter)) for side in pixels.shape[-2:]]
        pixels = F.interpolate(pixels, sides, mode="bilinear", antialias=True)
    top, left = ((side - size) // 2 for side in pixels.shape[-2:])
    return pixels[:, :, top : top + size, left : left + size]
