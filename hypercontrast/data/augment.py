"""Augmentation of whole batches on the device they live on, seeded by a generator.

Shapes: N pictures, C channels, H x W pixels. Pictures come in and go out as floats on the scale 0 to 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pictures [N, C, H, W] with every channel shifted by `mean` [C] and scaled by `std` [C], in float32."""
    return (pixels.float() - mean[:, None, None]) / std[:, None, None]


def random_shift(images: Tensor, generator: torch.Generator, *, padding: int = 2) -> Tensor:
    """Each picture moved by up to `padding` pixels either way along both axes; what comes in is black."""
    n, _, height, width = images.shape
    offset = _integers(2 * padding + 1, (2, n, 1), generator, images.device)
    rows = offset[0] + torch.arange(height, device=images.device)
    cols = offset[1] + torch.arange(width, device=images.device)
    samples = torch.arange(n, device=images.device)[:, None, None]
    # Indices around a slice put the channels last; they go back in front.
    shifted = F.pad(images, [padding] * 4)[samples, :, rows[:, :, None], cols[:, None, :]]
    return shifted.permute(0, 3, 1, 2)


def random_resized_crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """torchvision's RandomResizedCrop(size, scale=(0.2, 1)) to the same size and RandomHorizontalFlip, batched."""
    boxes = random_boxes(len(images), images.shape[-2:], generator, images.device)
    flip = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return resized_crop(images, boxes, flip)


def random_crop_colour(images: Tensor, generator: torch.Generator) -> Tensor:
    """`random_resized_crop_flip`, then `random_colour`: the views of contrastive learning (SimCLR, without blur)."""
    return random_colour(random_resized_crop_flip(images, generator), generator)


def random_colour(
    images: Tensor, generator: torch.Generator, *, jitter_share: float = 0.8, grey_share: float = 0.2
) -> Tensor:
    """torchvision's ColorJitter(.4, .4, .4, .1) and RandomGrayscale on these shares of the pictures [N, 3, H, W].

    As there, every picture has its own factors and its own order of the four adjustments.
    """
    n, device = len(images), images.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    factors = 1 + (2 * uniform(n, len(JITTER)) - 1) * torch.tensor(list(JITTER.values()), device=device)
    order = uniform(n, len(JITTER)).argsort(dim=1)
    jittered = images
    for kind in order.unbind(1):
        jittered = adjusted(jittered, kind, factors.gather(1, kind[:, None])[:, 0])
    images = torch.where(_per_picture(uniform(n) < jitter_share), jittered, images)
    return torch.where(_per_picture(uniform(n) < grey_share), _grey(images), images)


AUGMENTATIONS: dict[str, Augmentation] = {
    "shift": random_shift,
    "crop_flip": random_resized_crop_flip,
    "crop_flip_colour": random_crop_colour,
}

# The adjustments of a colour jitter, and how far the factor of each may lie from 1.
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def random_boxes(
    n: int,
    size: torch.Size | tuple[int, int],
    generator: torch.Generator,
    device: torch.device,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    tries: int = 10,
) -> Tensor:
    """Boxes [n, 4] as (top, left, height, width), distributed as torchvision's RandomResizedCrop draws them.

    A share of the area in `scale` and a log-uniform aspect `ratio` are drawn until the box fits, `tries` times at most;
    after that the box is the whole picture (torchvision's fallback for any picture whose own aspect lies in `ratio`).
    """
    height, width = size

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(tries, n, generator=generator, device=device)

    area = height * width * uniform(*scale)
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1])).exp()
    box_w, box_h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (box_w >= 1) & (box_w <= width) & (box_h >= 1) & (box_h <= height)
    first = fits.int().argmax(0, keepdim=True)
    any_fits = fits.any(0)
    box_h = torch.where(any_fits, box_h.gather(0, first)[0], height)
    box_w = torch.where(any_fits, box_w.gather(0, first)[0], width)
    room = torch.stack([height - box_h, width - box_w])
    corner = (torch.rand(2, n, generator=generator, device=device) * (room + 1)).floor().minimum(room)
    return torch.stack([corner[0], corner[1], box_h, box_w], dim=1)


def resized_crop(images: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
    """Each picture's box [N, 4] enlarged to the full size, bilinear, its edge repeated; mirrored where `flip` [N]."""
    height, width = images.shape[-2:]
    top, left, box_h, box_w = boxes[:, :, None].unbind(1)
    rows = _source_positions(top, box_h, height)
    cols = _source_positions(left, box_w, width)
    cols = torch.where(flip[:, None], cols.flip(1), cols)
    # grid_sample with align_corners=True counts pixel centres from -1 to 1.
    grid_y = (rows * (2 / max(height - 1, 1)) - 1)[:, :, None].expand(-1, -1, width)
    grid_x = (cols * (2 / max(width - 1, 1)) - 1)[:, None, :].expand(-1, height, -1)
    return F.grid_sample(images, torch.stack([grid_x, grid_y], dim=-1), align_corners=True)


def adjusted(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Each picture [N, 3, H, W] under one adjustment of its own, `kind` [N], by its own `factor` [N].

    Brightness, contrast and saturation mix the picture with black, its mean grey and its own grey; a factor of 1 leaves
    it as it is. Hue turns the colour circle by factor - 1 of a full turn. Every picture goes through both, since
    choosing by picture would make a GPU wait for the choice.
    """
    grey = _grey(images)
    base = torch.where(_per_picture(kind == CONTRAST), grey.mean(dim=(1, 2, 3), keepdim=True), grey)
    base = torch.where(_per_picture(kind == BRIGHTNESS), 0, base)
    mixed = torch.lerp(base.expand_as(images), images, _per_picture(factor)).clamp(0, 255)
    return torch.where(_per_picture(kind == HUE), _hue_turned(images, _per_picture(factor - 1)), mixed)


def _hue_turned(images: Tensor, turn: Tensor) -> Tensor:
    """Hue shifted by `turn` [N, 1, 1, 1] of a full turn, value and saturation (of HSV) kept."""
    red, green, blue = images.split(1, dim=1)
    value, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - least
    sixths = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    ) / torch.where(chroma == 0, 1, chroma)
    # Along the circle every channel is a trapezoid, the same for all three but for where it starts.
    starts = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    place = (starts + sixths + 6 * turn) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Luma [N, 1, H, W] with torchvision's weights."""
    weights = torch.tensor([0.2989, 0.587, 0.114], device=images.device)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def _per_picture(x: Tensor) -> Tensor:
    return x[:, None, None, None]


def _source_positions(start: Tensor, extent: Tensor, size: int) -> Tensor:
    """Where [N, size] the pixels of an enlarged box [N, 1] come from, never beyond the box."""
    centres = (torch.arange(size, device=start.device) + 0.5) * (extent / size) - 0.5
    return start + centres.clamp_min(0).minimum(extent - 1)


def _integers(high: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=device)
