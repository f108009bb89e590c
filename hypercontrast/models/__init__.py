"""Backbones, pictures [N, C, H, W] to pooled features [N, D], and `Network`, a backbone with its head."""

from __future__ import annotations

import importlib.util

from torch import nn

from hypercontrast.config import Config, UsageError
from hypercontrast.models.convnet import ConvNet
from hypercontrast.models.network import LinearHead, Network, ProjectionHead, mixed_precision

__all__ = [
    "RESNETS",
    "VITS",
    "ConvNet",
    "LinearHead",
    "Network",
    "ProjectionHead",
    "build_model",
    "check_model",
    "mixed_precision",
]

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
VITS = ("vit_b_16", "vit_l_16")
TIMM = "timm:"  # what comes before the name of a network of timm's


def build_model(name: str, in_channels: int, image_size: int, width: int = Config.width) -> tuple[nn.Module, int]:
    """A backbone with fresh weights and the dimension D of its features. Nothing is downloaded.

    convnet and the ResNets end in ReLU and average pooling: their features are non-negative. Those of vit_b_16 and
    vit_l_16, the class token after a layer norm, are signed. What timm:NAME gives depends on the network; most modern
    ones end in a norm and are signed.

    width: channels after a ResNet's stem; every layer grows in proportion, and so does D. The others have no such knob.

    Raises UsageError as `check_model` does, or if the network cannot take pictures of `image_size` pixels a side.
    """
    check_model(name, width)
    if name == "convnet":
        if image_size < ConvNet.least_size:
            raise UsageError(f"image_size must be at least {ConvNet.least_size} with model convnet, got {image_size}")
        return ConvNet(in_channels), ConvNet.feature_dim
    if name.startswith(TIMM):
        from hypercontrast.models.from_timm import build_timm

        return build_timm(name.removeprefix(TIMM), in_channels, image_size)
    try:
        from hypercontrast.models.resnet import build_resnet
        from hypercontrast.models.vit import build_vit
    except (ImportError, RuntimeError) as error:  # a build for another torch fails with "operator ... does not exist"
        raise UsageError(
            f"model {name} needs a torchvision that matches this torch: pip install 'hypercontrast[train]' ({error})"
        ) from None
    if name in VITS:
        return build_vit(name, in_channels, image_size)
    return build_resnet(name, in_channels, image_size, width)


def check_model(name: str, width: int = Config.width) -> None:
    """Raise UsageError if `build_model` could not make this model here."""
    if name.startswith(TIMM):
        from hypercontrast.models.from_timm import check_timm

        check_timm(name.removeprefix(TIMM))
    elif name not in ("convnet", *RESNETS, *VITS):
        known = ", ".join(("convnet", *RESNETS, *VITS))
        raise UsageError(f"model must be one of {known} or {TIMM}NAME, got {name!r}")
    elif name != "convnet" and importlib.util.find_spec("torchvision") is None:
        raise UsageError(f"model {name} needs torchvision: pip install 'hypercontrast[train]'")
    if width != Config.width and name not in RESNETS:
        raise UsageError(f"width must be {Config.width} with model {name}, which comes in one width, got {width}")
