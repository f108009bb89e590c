"""torchvision's ResNets without their classifier, with the stem that suits the pictures."""

from __future__ import annotations

from torch import nn

from hypercontrast.config import UsageError

# The largest picture for which the 3x3 stem without pooling is used, as is usual for CIFAR.
SMALL_IMAGE = 64


def build_resnet(name: str, in_channels: int, image_size: int) -> tuple[nn.Module, int]:
    """A ResNet ending in pooled features [N, D], and D. Raises UsageError if torchvision cannot be imported."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # a build for another torch fails with "operator ... does not exist"
        raise UsageError(
            f"model {name} needs a torchvision that matches this torch: pip install 'hypercontrast[train]' ({error})"
        ) from None

    network = getattr(models, name)()
    small = image_size <= SMALL_IMAGE
    if small:
        network.maxpool = nn.Identity()
    if small or in_channels != 3:
        network.conv1 = _stem(in_channels, small)
    dim = network.fc.in_features
    network.fc = nn.Identity()
    return network, dim


def _stem(in_channels: int, small: bool) -> nn.Conv2d:
    conv = (
        nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        if small
        else nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
