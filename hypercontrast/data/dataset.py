"""The two types that pictures travel in. Shapes: N pictures, C channels, H x W pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Pictures [N, C, H, W] uint8 and labels [N] int64, on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))

    def limited(self, limit: int) -> Images:
        """At most `limit` pictures, evenly from every class; 0 for all."""
        return self[limited_order(self.labels, limit)] if limit else self


@dataclass(frozen=True)
class Dataset:
    """A training and a validation set. `augmentation` and `view_augmentation` name entries of `AUGMENTATIONS`."""

    train: Images
    validation: Images
    class_names: tuple[str, ...]
    augmentation: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train.pixels.shape[1]

    @property
    def view_augmentation(self) -> str:
        """For the views of contrastive learning: colours too, where there are any."""
        return "crop_flip_colour" if self.augmentation == "crop_flip" and self.channels == 3 else self.augmentation

    @property
    def image_size(self) -> int:
        return self.train.pixels.shape[-1]

    def limited(self, limit: int) -> Dataset:
        return replace(self, train=self.train.limited(limit), validation=self.validation.limited(limit))

    def to(self, device: torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), validation=self.validation.to(device))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel [C] over the training set, on the scale 0 to 255."""
        total = torch.zeros(2, self.channels, dtype=torch.float64)
        for chunk in self.train.pixels.split(4096):
            values = chunk.transpose(0, 1).flatten(1).float()
            total += torch.stack([values.mean(1), values.square().mean(1)]).double().cpu() * len(chunk)
        mean, square = total / len(self.train)
        return mean.float(), (square - mean.square()).clamp_min(1.0).sqrt().float()


def limited_order(labels: Tensor, limit: int) -> Tensor:
    """Indices of at most `limit` samples, evenly from every class; of all, as they stand, for 0 or where they fit."""
    if 0 < limit < len(labels):
        return balanced_order(labels)[:limit]
    return torch.arange(len(labels), device=labels.device)


def balanced_order(labels: Tensor) -> Tensor:
    """An order [N] of the samples whose every prefix is balanced: the first of each class, the second of each, ..."""
    by_class = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    turn = torch.empty_like(labels)
    turn[by_class] = torch.arange(len(labels), device=labels.device) - starts.repeat_interleave(counts)
    return by_class[torch.argsort(turn[by_class], stable=True)]
