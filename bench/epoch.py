"""Seconds per training epoch of the CIFAR recipes, on random pictures of CIFAR-10's number and size.

    python -m bench.epoch [--losses nonl ce] [--pictures 50000] [--epochs 3] [--compile auto|on|off]

Random pictures take as long as real ones, and need no data set. A first epoch warms up and compiles; the others are
timed whole, then once more the augmentation alone, which gives its share. On a GPU a few steps run with
`torch.cuda.set_sync_debug_mode("error")`: one that waits for the device fails the measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hypercontrast.config import configure
from hypercontrast.data import AUGMENTATIONS, Images, Share, derived_seed, epoch_batches, normalize, steps_per_epoch
from hypercontrast.launch import Ranks
from hypercontrast.objective import VIEWS, Objective
from hypercontrast.step import Step, compiles
from hypercontrast.workspace import build_network

CLASSES = 10
WATCHED_STEPS = 5


class Epochs:
    """The training part of the driver's epochs, without its reading, measuring and saving."""

    def __init__(self, loss: str, pictures: int, **options: Any) -> None:
        self.config = config = configure(recipe=f"cifar10-{loss}", **options)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ranks = Ranks(0, 1, self.device)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (pictures, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.train = Images(pixels, torch.arange(pictures) % CLASSES).to(self.device)
        self.views = VIEWS.get(loss, 1)
        name = "crop_flip" if self.views == 1 else "crop_flip_colour"
        self.augment = dataclasses.replace(AUGMENTATIONS[name], compile=compiles(config, self.device))
        network = build_network(config, 3, 32, CLASSES).to(self.device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = -(-pictures // steps_per_epoch(pictures, config.batch_size))
        counts = torch.bincount(self.train.labels)
        self.step = Step(Objective(network, config, ranks, self.views * batch, counts), config, ranks)
        self.mean = self.std = torch.full((3,), 127.5, device=self.device)

    def augmented(self, epoch: int) -> Iterator[tuple[Share, Tensor, Tensor]]:
        """The shares of an epoch with their pictures as the network takes them, and the labels."""
        shares = list(epoch_batches(self.train.labels, self.config.batch_size, seed=0, epoch=epoch))
        seeds = [derived_seed(epoch, view) for view in range(self.views)]
        for share, batch in zip(shares, self.train.views(shares, self.augment, seeds), strict=True):
            images = normalize(batch.pixels, self.mean, self.std)
            yield share, images, batch.labels.repeat(self.views)

    def run(self, epoch: int) -> None:
        for _, images, labels in self.augmented(epoch):
            self.step(images, labels, 1.0, self.config.peak_lr)

    def seconds(self, work: Any) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def watched(self) -> None:
        """A few steps that must not wait for the device; RuntimeError where one does."""
        batches = self.augmented(0)
        next(batches)  # what happens once an epoch may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _, (_, images, labels) in zip(range(WATCHED_STEPS), batches, strict=False):
                self.step(images, labels, 1.0, self.config.peak_lr)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(loss: str, pictures: int, epochs: int, **options: Any) -> dict[str, float | str | bool]:
    work = Epochs(loss, pictures, **options)
    warm_up = work.seconds(lambda: work.run(0))
    if work.device.type == "cuda":
        work.watched()
    seconds = statistics.median(work.seconds(lambda epoch=epoch: work.run(epoch)) for epoch in range(1, epochs + 1))
    augmenting = work.seconds(lambda: list(map(len, work.augmented(epochs))))
    return {
        "loss": loss,
        "compiled": compiles(work.config, work.device),
        "warm_up_s": round(warm_up, 2),
        "epoch_s": round(seconds, 3),
        "pictures_per_s": round(pictures / seconds),
        "augmentation_share": round(augmenting / seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per training epoch of the CIFAR recipes.")
    parser.add_argument(
        "--losses", nargs="+", default=["nonl", "ce"], choices=["ce", "normface", "ntce", "nonl", "scl"]
    )
    parser.add_argument("--pictures", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    args = parser.parse_args()
    for loss in args.losses:
        print("  ".join(f"{k}={v}" for k, v in measure(loss, args.pictures, args.epochs, compile=args.compile).items()))


if __name__ == "__main__":
    main()
