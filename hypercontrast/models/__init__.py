"""Backbones, pictures [N, C, H, W] to pooled features [N, D], and `Network`, a backbone with its head."""

from __future__ import annotations

import importlib.util

from torch import nn

from hypercontrast.config import UsageError
from hypercontrast.models.convnet import ConvNet
from hypercontrast.models.network import LinearHead, Network, ProjectionHead, mixed_precision

__all__ = [
    "RESNETS",
    "ConvNet",
    "LinearHead",
    "Network",
    "ProjectionHead",
    "build_model",
    "check_model",
    "mixed_precision",
]

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def build_model(name: str, in_channels: int, image_size: int) -> tuple[nn.Module, int]:
    """A backbone with fresh weights and the dimension D of its features. Raises UsageError on an unknown name.

    The features are non-negative: every backbone ends in ReLU and average pooling.
    """
    check_model(name)
    if name == "convnet":
        return ConvNet(in_channels), ConvNet.feature_dim
    from hypercontrast.models.resnet import build_resnet

    return build_resnet(name, in_channels, image_size)


def check_model(name: str) -> None:
    """Raise UsageError if `build_model` could not make this model here."""
    if name not in ("convnet", *RESNETS):
        raise UsageError(f"model must be one of convnet, {', '.join(RESNETS)}, got {name!r}")
    if name in RESNETS and importlib.util.find_spec("torchvision") is None:
        raise UsageError(f"model {name} needs torchvision: pip install 'hypercontrast[train]'")
