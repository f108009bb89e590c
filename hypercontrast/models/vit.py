"""torchvision's vision transformers without their classifier, for pictures of any number of channels."""

from __future__ import annotations

import math

from torch import nn
from torchvision import models

from hypercontrast.config import UsageError

PATCH = 16  # pixels a side


def build_vit(name: str, in_channels: int, image_size: int) -> tuple[nn.Module, int]:
    """A transformer ending in its class token after the last layer norm [N, D], and D.

    Raises UsageError if `image_size` is no multiple of the patch's 16 pixels.
    """
    if image_size % PATCH:
        raise UsageError(f"image_size must be a multiple of {PATCH} with model {name}, got {image_size}")
    network = getattr(models, name)(image_size=image_size)
    if in_channels != 3:
        network.conv_proj = _patches(in_channels, network.hidden_dim)
    network.heads = nn.Identity()
    return network, network.hidden_dim


def _patches(in_channels: int, dim: int) -> nn.Conv2d:
    """Patches to tokens, initialised as torchvision does."""
    conv = nn.Conv2d(in_channels, dim, PATCH, stride=PATCH)
    nn.init.trunc_normal_(conv.weight, std=math.sqrt(1 / (in_channels * PATCH**2)))
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
