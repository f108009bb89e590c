"""torchvision's ResNets without their classifier, at any width, with the stem that suits the pictures."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

# The largest picture for which the 3x3 stem without pooling is used, as is usual for CIFAR.
SMALL_IMAGE = 64
TORCHVISION_WIDTH = 64  # channels after the stem, which its first stage keeps
# The kind of a network's blocks, and how many of them each of its four stages has.
STAGES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


class ScaledResNet(ResNet):
    """torchvision's network with 1, 2, 4 and 8 times `width` planes in its stages; at 64 it is torchvision's own."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], layers: list[int], width: int) -> None:
        self.width = width  # the stages are made while torchvision's constructor runs
        super().__init__(block, layers)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        if planes == TORCHVISION_WIDTH:  # the first stage takes what the stem gives
            self.inplanes = self.width
        return super()._make_layer(block, planes // TORCHVISION_WIDTH * self.width, *args, **options)


def build_resnet(name: str, in_channels: int, image_size: int, width: int) -> tuple[nn.Module, int]:
    """A ResNet ending in pooled features [N, D], and D: 8 times `width`, or 32 times with bottlenecks."""
    block, layers = STAGES[name]
    network = ScaledResNet(block, layers, width)
    small = image_size <= SMALL_IMAGE
    if small:
        network.maxpool = nn.Identity()
    if small or in_channels != 3 or width != TORCHVISION_WIDTH:
        network.conv1, network.bn1 = _stem(in_channels, width, small), nn.BatchNorm2d(width)
    network.fc = nn.Identity()
    return network, 8 * width * block.expansion


def _stem(in_channels: int, width: int, small: bool) -> nn.Conv2d:
    conv = (
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        if small
        else nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
