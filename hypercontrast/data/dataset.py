"""The types that pictures travel in. Shapes: N pictures, V views, C channels, H x W pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hypercontrast.data.augment import Augmentation
from hypercontrast.data.draws import Draws
from hypercontrast.data.longtail import long_tailed_order
from hypercontrast.data.sampler import Share
from hypercontrast.metrics import position_in_class


class Batch(NamedTuple):
    """Pictures on the device they are trained on, on the scale 0 to 255."""

    pixels: Tensor  # [n, C, H, W], or [V·n, C, H, W], one view of all after another
    labels: Tensor  # [n] int64
    indices: Tensor  # [n] int64, their places in the set


class Pictures(Protocol):
    """A set of labelled pictures of one size, wherever they are kept.

    A batch holds the pictures of its indices in their order, but for those that cannot be decoded: they are left out,
    and `damaged` names them.
    """

    @property
    def labels(self) -> Tensor:
        """[N] int64, on the device where the batches' indices are to be."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""

    @property
    def damaged(self) -> tuple[str, ...]:
        """Where the pictures come from that could not be decoded so far."""

    def __len__(self) -> int: ...

    def select(self, index: Tensor) -> Pictures:
        """The pictures at `index`, in that order."""

    def to(self, device: torch.device) -> Pictures:
        """The same pictures, with batches on `device`."""

    def plain(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        """The pictures of each batch of indices as they are, uint8."""

    def views(self, shares: Iterable[Share], augment: Augmentation, seeds: Sequence[int]) -> Iterator[Batch]:
        """The pictures of each share augmented, float32: one view for every seed, by the draws of (seed, place)."""


@dataclass(frozen=True)
class Images:
    """Small pictures [N, C, H, W] uint8 and labels [N], kept whole on one device."""

    pixels: Tensor
    labels: Tensor
    damaged: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def select(self, index: Tensor) -> Images:
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def to(self, device: torch.device) -> Images:
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def plain(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        for indices in batches:
            yield Batch(self.pixels[indices], self.labels[indices], indices)

    def views(self, shares: Iterable[Share], augment: Augmentation, seeds: Sequence[int]) -> Iterator[Batch]:
        for indices, places, _ in shares:
            images = self.pixels[indices].float()
            views = [augment(images, Draws(seed, places)) for seed in seeds]
            yield Batch(torch.cat(views), self.labels[indices], indices)


@dataclass(frozen=True)
class Dataset:
    """A training and a validation set. `augmentation` and `view_augmentation` name entries of `AUGMENTATIONS`."""

    train: Pictures
    validation: Pictures
    class_names: tuple[str, ...]
    augmentation: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train.shape[0]

    @property
    def image_size(self) -> int:
        return self.train.shape[-1]

    @property
    def view_augmentation(self) -> str:
        """For the views of contrastive learning: colours too, where there are any, and blur where it can be seen."""
        if self.augmentation != "crop_flip" or self.channels != 3:
            return self.augmentation
        return "crop_flip_colour_blur" if self.image_size > SMALL_PICTURE else "crop_flip_colour"

    def limited(self, limit: int) -> Dataset:
        """At most `limit` training and `limit` validation pictures, evenly from every class; 0 for all."""
        return replace(self, train=_limited(self.train, limit), validation=_limited(self.validation, limit))

    def long_tailed(self, imbalance: float, shape: str) -> Dataset:
        """With the training classes cut down as `long_tailed_counts` says; the validation set stays."""
        order = long_tailed_order(self.train.labels, self.num_classes, imbalance, shape)
        return replace(self, train=self.train.select(order))

    def to(self, device: torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), validation=self.validation.to(device))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel [C] over the training set, on the scale 0 to 255.

        Of 10,000 pictures, evenly spaced, where they would have to be decoded for it.
        """
        count = len(self.train) if isinstance(self.train, Images) else min(len(self.train), 10_000)
        device = self.train.labels.device
        chosen = torch.arange(count, device=device) * len(self.train) // count
        seen, total = 0, torch.zeros(2, self.channels, dtype=torch.float64)
        for batch in self.train.plain(chosen.split(4096)):
            values = batch.pixels.transpose(0, 1).flatten(1).float()
            total += torch.stack([values.mean(1), values.square().mean(1)]).double().cpu() * len(batch.pixels)
            seen += len(batch.pixels)
        mean, square = total / seen
        return mean.float(), (square - mean.square()).clamp_min(1.0).sqrt().float()


SMALL_PICTURE = 64  # pixels a side, up to which pictures are treated as CIFAR's


def _limited(pictures: Pictures, limit: int) -> Pictures:
    return pictures.select(limited_order(pictures.labels, limit)) if limit else pictures


def limited_order(labels: Tensor, limit: int) -> Tensor:
    """Indices of at most `limit` samples, evenly from every class; of all, as they stand, for 0 or where they fit."""
    if 0 < limit < len(labels):
        return balanced_order(labels)[:limit]
    return torch.arange(len(labels), device=labels.device)


def balanced_order(labels: Tensor) -> Tensor:
    """An order [N] of the samples whose every prefix is balanced: the first of each class, the second of each, ..."""
    by_class = torch.argsort(labels, stable=True)
    return by_class[torch.argsort(position_in_class(labels)[by_class], stable=True)]
