"""timm's networks without their classifier. Weights are fresh: nothing is downloaded.

A name is looked up in timm's registry and nowhere else, so the prefixes with which timm reads a hub or a folder, and
the tags of its trained weights, are unknown names here.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from hypercontrast.config import UsageError


def check_timm(name: str) -> None:
    """Raise UsageError, with the names nearest to it, if timm is not there or has no such network."""
    known = _timm(name).list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UsageError(f"model must be timm:NAME of a network that timm lists, got 'timm:{name}'{hint}")


def build_timm(name: str, in_channels: int, image_size: int) -> tuple[nn.Module, int]:
    """A network of timm's ending in pooled features [N, D], and D, as measured on one picture.

    Raises UsageError if the network cannot take pictures of that size, or gives no such features.
    """
    timm = _timm(name)
    settings = timm.models.get_pretrained_cfg(name)
    # Networks that are built for one size must be told it; the others do not know the argument.
    size = {"img_size": image_size} if settings and settings.fixed_input_size else {}
    try:
        network = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_channels, **size).eval()
        with torch.no_grad():
            features = network(torch.zeros(1, in_channels, image_size, image_size))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise UsageError(f"image_size must suit model timm:{name}, got {image_size} ({reason})") from None
    if features.ndim != 2:
        raise UsageError(f"model timm:{name} must give features [N, D], got {list(features.shape)} for one picture")
    return network.train(), features.shape[1]


def _timm(name: str) -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # without torchvision, or with one for another torch
        raise UsageError(f"model timm:{name} needs timm: pip install timm ({error})") from None
    return timm
