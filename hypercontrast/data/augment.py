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


AUGMENTATIONS: dict[str, Augmentation] = {"shift": random_shift, "crop_flip": random_resized_crop_flip}


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


def _source_positions(start: Tensor, extent: Tensor, size: int) -> Tensor:
    """Where [N, size] the pixels of an enlarged box [N, 1] come from, never beyond the box."""
    centres = (torch.arange(size, device=start.device) + 0.5) * (extent / size) - 0.5
    return start + centres.clamp_min(0).minimum(extent - 1)


def _integers(high: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=device)
