"""Augmentation of whole batches on the device they live on, every picture by random numbers of its own.

Shapes: N pictures, C channels, H x W pixels. Pictures come in and go out as float32 on the scale 0 to 255. Where
torchvision has the transform, the distribution is its, and so are the pixels for the same parameters, as it computes
them on floats. Every operation has shapes known beforehand and reads nothing back, so a GPU never waits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hypercontrast.data.draws import Draws


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training picture: where it is cut, then flip, colours and blur.

    crop: "shift" moves by up to two pixels, "resized" is torchvision's RandomResizedCrop(size, scale=(0.2, 1)) to the
    same size; with "resized" come RandomHorizontalFlip and, if asked for, `random_colour` and `random_blur`.
    compile: fuse all of it by torch.compile.
    """

    crop: Literal["shift", "resized"]
    colour: bool = False
    blur: bool = False
    compile: bool = False

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Of pictures [N, C, H, W], all of one size, by their `draws`.

        Raises ValueError if there are not N draws, or if colours are asked for and C is not 3.
        """
        return self._apply(_augmented, images, draws)

    def finished(self, images: Tensor, draws: Draws) -> Tensor:
        """All but the crop, of pictures that were cut already; `draws` goes on where it was left by `random_boxes`."""
        return self._apply(_finished, images, draws)

    def _apply(self, function: Callable[..., Tensor], images: Tensor, draws: Draws) -> Tensor:
        if len(draws) != len(images):  # one picture's draws would be broadcast to all
            raise ValueError(f"draws must be as many as images, got {len(draws)} for {len(images)}")
        if self.colour and images.shape[1] != 3:
            raise ValueError(f"images must have 3 channels for their colours to change, got {images.shape[1]}")
        return (_compiled(function) if self.compile else function)(self, images, draws)


def _augmented(kind: Augmentation, images: Tensor, draws: Draws) -> Tensor:
    if kind.crop == "shift":
        return random_shift(images, draws)
    return _finished(kind, resized_crop(images, random_boxes(draws, images.shape[-2:])), draws)


def _finished(kind: Augmentation, images: Tensor, draws: Draws) -> Tensor:
    images = random_flip(images, draws)
    if kind.colour:
        images = random_colour(images, draws)
    return random_blur(images, draws) if kind.blur else images


@functools.cache
def _compiled(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(apply, dynamic=False)


AUGMENTATIONS: dict[str, Augmentation] = {
    "shift": Augmentation("shift"),
    "crop_flip": Augmentation("resized"),
    "crop_flip_colour": Augmentation("resized", colour=True),
    "crop_flip_colour_blur": Augmentation("resized", colour=True, blur=True),
}


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pictures [N, C, H, W] less the channels' `mean` [C], by their `std` [C]; in float32, channels last."""
    normal = (pixels.float() - mean[:, None, None]) / std[:, None, None]
    return normal.contiguous(memory_format=torch.channels_last)


def random_shift(images: Tensor, draws: Draws, *, padding: int = 2) -> Tensor:
    """Each picture moved by up to `padding` pixels either way along both axes; what comes in is black."""
    n, _, height, width = images.shape
    offset = (draws.uniform(2, 1) * (2 * padding + 1)).long()
    rows = offset[:, 0] + torch.arange(height, device=images.device)
    cols = offset[:, 1] + torch.arange(width, device=images.device)
    samples = torch.arange(n, device=images.device)[:, None, None]
    # Indices around a slice put the channels last; they go back in front.
    shifted = F.pad(images, [padding] * 4)[samples, :, rows[:, :, None], cols[:, None, :]]
    return shifted.permute(0, 3, 1, 2)


def random_flip(images: Tensor, draws: Draws) -> Tensor:
    """torchvision's RandomHorizontalFlip: every other picture mirrored, by chance."""
    return torch.where(_per_picture(draws.uniform() < 0.5), images.flip(-1), images)


def random_colour(images: Tensor, draws: Draws, *, jitter_share: float = 0.8, grey_share: float = 0.2) -> Tensor:
    """torchvision's ColorJitter(.4, .4, .4, .1) and RandomGrayscale on these shares of the pictures [N, 3, H, W]."""
    jittered = colour_jitter(images, *random_jitter(draws))
    images = torch.where(_per_picture(draws.uniform() < jitter_share), jittered, images)
    return torch.where(_per_picture(draws.uniform() < grey_share), _grey(images), images)


def random_blur(images: Tensor, draws: Draws, *, share: float = 0.5, sigma: tuple[float, float] = (0.1, 2.0)) -> Tensor:
    """torchvision's GaussianBlur on this share of the pictures, as SimCLR has it: sigma uniform, a tenth of H wide."""
    blurred = gaussian_blur(images, draws.uniform(between=sigma))
    return torch.where(_per_picture(draws.uniform() < share), blurred, images)


def random_boxes(
    draws: Draws,
    size: torch.Size | tuple[int, int],
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    tries: int = 10,
) -> Tensor:
    """Boxes [N, 4] as (top, left, height, width), distributed as torchvision's RandomResizedCrop draws them.

    size: (H, W) of all pictures. A share of the area in `scale` and a log-uniform aspect `ratio` are drawn until the
    box fits, `tries` times at most; after that the box is the largest in the middle whose aspect lies in `ratio`.
    """
    height, width = size
    area = height * width * draws.uniform(tries, between=scale)
    aspect = draws.uniform(tries, between=(math.log(ratio[0]), math.log(ratio[1]))).exp()
    box_w, box_h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (box_w >= 1) & (box_w <= width) & (box_h >= 1) & (box_h <= height)
    first = fits.int().argmax(1, keepdim=True)
    any_fits = fits.any(1)
    widest, highest = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    box_h = box_h.gather(1, first)[:, 0].masked_fill(~any_fits, highest)
    box_w = box_w.gather(1, first)[:, 0].masked_fill(~any_fits, widest)
    room = torch.stack([height - box_h, width - box_w], dim=1)
    corner = (draws.uniform(2) * (room + 1)).floor()
    corner = torch.where(any_fits[:, None], corner, (room / 2).floor())
    return torch.cat([corner, box_h[:, None], box_w[:, None]], dim=1)


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Each picture's box [N, 4] enlarged to the full size, bilinear, its edge repeated."""
    height, width = images.shape[-2:]
    top, left, box_h, box_w = boxes[:, :, None].unbind(1)
    rows = _source_positions(top, box_h, height)
    cols = _source_positions(left, box_w, width)
    # grid_sample with align_corners=True counts pixel centres from -1 to 1.
    grid_y = (rows * (2 / max(height - 1, 1)) - 1)[:, :, None].expand(-1, -1, width)
    grid_x = (cols * (2 / max(width - 1, 1)) - 1)[:, None, :].expand(-1, height, -1)
    return F.grid_sample(images, torch.stack([grid_x, grid_y], dim=-1), align_corners=True)


# The adjustments of a colour jitter, and what their factors are drawn from.
JITTER = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4), "hue": (-0.1, 0.1)}
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def random_jitter(draws: Draws) -> tuple[Tensor, Tensor]:
    """Factors [N, 4] and order [N, 4] for `colour_jitter`, distributed as torchvision's ColorJitter draws them."""
    factors = torch.stack([draws.uniform(between=limits) for limits in JITTER.values()], dim=1)
    # Stable, so that all devices agree where two numbers are equal.
    return factors, draws.uniform(len(JITTER)).argsort(dim=1, stable=True)


def colour_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Each picture [N, 3, H, W] under the four adjustments of `JITTER`, one after another in an order of its own.

    factors: [N, 4]. Brightness, contrast and saturation mix the picture with black, its mean grey and its own grey,
    and leave it as it is at 1; hue turns the colour circle by this share of a full turn.
    order: [N, 4] int64, which adjustment comes first, second, third and last.
    """
    hue_place = order.argsort(dim=1)[:, HUE]
    # Choosing by picture would make a GPU wait for the choice, so all go through everything. Hue costs the most and
    # comes once: it stands between the three places that may be before it and the three that may be after it.
    steps = list(zip(order.unbind(1), factors.gather(1, order).unbind(1), strict=True))
    for place, (kind, factor) in enumerate(steps[:-1]):
        images = _mixed(images, kind, factor.masked_fill(hue_place <= place, 1))
    images = _hue_turned(images, _per_picture(factors[:, HUE]))
    for place, (kind, factor) in enumerate(steps[1:], start=1):
        images = _mixed(images, kind, factor.masked_fill(hue_place >= place, 1))
    return images


def _mixed(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast or saturation, by `kind` [N]; a `factor` [N] of 1 changes nothing, not even by rounding."""
    grey = _grey(images)
    mean_share, grey_share = (1 - factor) * (kind == CONTRAST), (1 - factor) * (kind == SATURATION)
    base = _per_picture(mean_share) * grey.mean(dim=(1, 2, 3), keepdim=True) + _per_picture(grey_share) * grey
    return torch.addcmul(base, images, _per_picture(factor)).clamp_(0, 255)


def _hue_turned(images: Tensor, turn: Tensor) -> Tensor:
    """Hue shifted by `turn` [N, 1, 1, 1] of a full turn, value and saturation (of HSV) kept."""
    red, green, blue = images.split(1, dim=1)
    value, least = red.maximum(green).maximum(blue), red.minimum(green).minimum(blue)
    chroma = value - least
    sixths = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    ) / chroma.masked_fill(chroma == 0, 1)
    hue = (sixths + 6 * turn) % 6
    # Along the circle every channel is a trapezoid: red is least around 3, green is full around 2 and blue around 4.
    heights = torch.cat([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()], dim=1).clamp_(0, 1)
    return heights.mul_(chroma).add_(least)


def _grey(images: Tensor) -> Tensor:
    """Luma [N, 1, H, W] with torchvision's weights."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Each picture [N, C, H, W] under a Gaussian of its own `sigma` [N] in pixels, its edge mirrored.

    As torchvision's gaussian_blur with the odd kernel nearest to a tenth of the height, for all sigmas the same. Either
    side must be longer than half of it.
    """
    n, channels, height, width = images.shape
    if n == 0:  # a convolution cannot have no groups
        return images
    radius = max(height // 20, 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, dim=1).repeat_interleave(channels, 0)
    # A group for every channel of every picture, along one axis and then along the other. Products with banded matrices
    # would need ten times the arithmetic, and round pixels to 11 bits wherever TF32 is allowed.
    x = F.pad(images.reshape(1, n * channels, height, width), [radius] * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * channels)
    return F.conv2d(x, kernel[:, None, None, :], groups=n * channels).view_as(images)


def _per_picture(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def _source_positions(start: Tensor, extent: Tensor, size: int) -> Tensor:
    """Where [N, size] the pixels of an enlarged box [N, 1] come from, never beyond the box."""
    centres = (torch.arange(size, device=start.device) + 0.5) * (extent / size) - 0.5
    return start + centres.clamp_min(0).minimum(extent - 1)
