"""What is known of the named data sets without reading them: sizes, where they are looked for, where to get them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """Pictures of training and validation (or test) set, and how large they come to the network."""

    classes: int
    train: int
    validation: int
    channels: int
    image_size: int


FACTS = {
    "mnist5k": Facts(10, 4_000, 1_000, 1, 28),
    "cifar10": Facts(10, 50_000, 10_000, 3, 32),
    "cifar100": Facts(100, 50_000, 10_000, 3, 32),
    "imagenet100": Facts(100, 126_689, 5_000, 3, 224),
    "imagenet1k": Facts(1_000, 1_281_167, 50_000, 3, 224),
}
