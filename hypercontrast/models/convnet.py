"""A network small enough to learn digits on a laptop within a minute."""

from __future__ import annotations

from torch import nn


class ConvNet(nn.Sequential):
    """Three blocks of 3x3 convolution, batch norm and ReLU, halved in between, then the average over all positions.

    [N, C, H, W] -> [N, 128], for pictures of about 28 to 64 pixels; 94,000 parameters.
    """

    feature_dim = 128
    least_size = 4  # pixels a side, which are halved twice

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__(
            _block(in_channels, 32),
            nn.MaxPool2d(2),
            _block(32, 64),
            nn.MaxPool2d(2),
            _block(64, self.feature_dim),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
