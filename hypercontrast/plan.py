"""The plan of a run: its learning rates, and in words what it would do (`--dry-run`)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypercontrast import data
from hypercontrast.config import Config, UsageError
from hypercontrast.data import FACTS, long_tailed_counts, steps_per_epoch
from hypercontrast.launch import device_of, num_ranks
from hypercontrast.models import Network
from hypercontrast.objective import GLOBAL_LOSSES, VIEWS
from hypercontrast.progress import aligned
from hypercontrast.workspace import build_network, check_batches, load_dataset

FINAL_LR = 1e-3  # of the peak


def learning_rate(step: int, steps_per_epoch: int, config: Config) -> float:
    """Linear warm-up to `peak_lr`, then a cosine to a thousandth of it at the end of the last epoch.

    Steps count from 0.
    """
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + (config.peak_lr - config.warmup_lr) * (step + 1) / warmup
    cosine = math.cos(math.pi * (step - warmup) / (total - warmup))
    return config.peak_lr * (FINAL_LR + (1 - FINAL_LR) * (1 + cosine) / 2)


@dataclass(frozen=True)
class _Extent:
    """How much there is to train on, and whether it is at hand."""

    train: int
    validation: int
    classes: int
    channels: int
    image_size: int
    resident_bytes: int
    missing: str = ""


def plan(config: Config) -> str:
    """What a run would do, in lines for a person; of a named data set that is missing, by its published size.

    Memory and time are estimates, made by sending a few pictures through the network on the device at hand.
    """
    world = num_ranks(config)
    extent = _extent(config)
    check_batches(config, extent.train, world)
    views = VIEWS.get(config.loss, 1)
    steps = steps_per_epoch(extent.train, config.batch_size)
    batch = -(-extent.train // steps)
    device = device_of(config)
    network = build_network(config, extent.channels, extent.image_size, extent.classes).to(device)
    parameters = sum(p.numel() for p in network.parameters())
    picture = torch.zeros(2, extent.channels, extent.image_size, extent.image_size, device=device)
    picture_bytes = _activation_bytes(network, picture)
    activations = picture_bytes * views * -(-batch // world) // config.accumulate
    # Weights, gradients and momentum.
    memory = 12 * parameters + activations + extent.resident_bytes
    # Exact accumulation goes through the network once more without a graph, about a third of a step.
    passes = views * (4 / 3 if config.accumulate > 1 else 1)
    least = max(min(LEAST_PICTURES, -(-batch // world), ENOUGH_BYTES // picture_bytes), 2)
    seconds = _seconds_per_picture(network, picture, least) * passes * extent.train
    rows = {
        "run folder": config.run_dir,
        "data": f"{config.dataset}: {extent.train} training, {extent.validation} validation, {extent.classes} classes",
        "model": f"{config.model}, {parameters / 1e6:.2f} million parameters, D = {network.head.prototypes.shape[1]}",
        "loss": config.loss + _temperature(config),
        "ranks": f"{world} on {device.type}",
        "global batch": f"{batch}, at most {-(-batch // world)} a rank" + "; two views of each" * (views == 2),
        "negatives": _negatives(config, views * batch + config.queue, extent.classes),
        "steps": f"{steps} an epoch, {steps * config.epochs} in {config.epochs} epochs",
        "learning rate": _learning_rate_rule(config),
        "memory": f"about {memory / 2**20:.0f} MiB a rank for weights, activations and pictures",
        "time": f"about {_duration(seconds * config.epochs / world)} if {device.type} is this one and data keeps up",
    }
    if extent.missing:
        rows["missing"] = extent.missing
    return aligned([*rows.items()])


def _extent(config: Config) -> _Extent:
    try:
        dataset = load_dataset(config)
    except UsageError as error:
        if config.dataset not in FACTS:
            raise
        return _published_extent(config, str(error))
    parts = dataset.train, dataset.validation
    resident = sum(part.pixels.nbytes for part in parts if isinstance(part, data.Images))
    return _Extent(
        len(dataset.train), len(dataset.validation), dataset.num_classes, dataset.channels, dataset.image_size, resident
    )


def _published_extent(config: Config, missing: str) -> _Extent:
    facts = FACTS[config.dataset]
    train, validation = (min(n, config.limit or n) for n in (facts.train, facts.validation))
    if config.imbalance < 1:
        largest = -(-train // facts.classes)
        train = sum(long_tailed_counts(largest, facts.classes, config.imbalance, config.imbalance_shape))
    picture = facts.channels * facts.image_size**2
    resident = (train + validation) * picture
    return _Extent(
        train, validation, facts.classes, facts.channels, facts.image_size,
        resident if resident <= data.RESIDENT_BYTES else 0, missing,
    )  # fmt: skip


def _temperature(config: Config) -> str:
    if config.loss not in GLOBAL_LOSSES:
        return ""
    return {
        "fixed": f", temperature {config.temperature:g}",
        "learned": f", temperature learned from {config.temperature:g}, at least {config.final_temperature:g}",
        "cosine": f", temperature from {config.temperature:g} to {config.final_temperature:g} along a cosine",
    }[config.temperature_rule]


def _learning_rate_rule(config: Config) -> str:
    rule = f" ({config.lr:g} for every {config.lr_per} pictures of a batch)" if config.lr_per else ""
    return (
        f"{config.peak_lr:g}{rule}, cosine to {config.peak_lr * FINAL_LR:g};"
        f" warm-up {config.warmup_epochs} epochs from {config.warmup_lr:g}"
    )


def _negatives(config: Config, batch: int, num_classes: int) -> str:
    of_other_classes = batch * (num_classes - 1) // num_classes
    if config.loss == "scl":
        return f"about {of_other_classes} views of other classes for every view"
    if config.loss == "etf-dr":
        return "none: features are drawn to fixed prototypes"
    samples = f"about {of_other_classes} samples of other classes for every prototype"
    prototypes = f"{num_classes - 1} prototypes of other classes for every sample"
    if config.anchor == "both":
        return f"{samples}, {prototypes}"
    return samples if config.loss in ("nonl", "ntce") and config.anchor == "prototype" else prototypes


@torch.no_grad()
def _activation_bytes(network: Network, pictures: Tensor) -> int:
    """Bytes one picture's activations take, in float32: the outputs of all layers."""
    total = 0

    def count(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        total += output.nbytes if isinstance(output, Tensor) else 0

    leaves = [m for m in network.modules() if not list(m.children())]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    network.eval()(pictures)
    for handle in handles:
        handle.remove()
    return total // len(pictures)


def _seconds_per_picture(network: Network, pictures: Tensor, least: int) -> float:
    """Forward and backward of one picture, timed over batches that double from `least` until they take long enough.

    A few pictures would say little of a batch: on a busy CPU it is passes that cost, not pictures. The first pass, over
    `pictures`, is for warming up.
    """
    network.train()
    _seconds(network, pictures)
    pictures = pictures[:1].repeat(least, 1, 1, 1)
    while (seconds := _seconds(network, pictures)) < LONG_ENOUGH and len(pictures) < MOST_PICTURES:
        pictures = torch.cat([pictures, pictures])
    return seconds / len(pictures)


LONG_ENOUGH, MOST_PICTURES = 0.2, 512
# What a batch that is timed has at least, unless its activations were too many for a quick answer.
LEAST_PICTURES, ENOUGH_BYTES = 32, 2**30


def _seconds(network: Network, pictures: Tensor) -> float:
    started = time.perf_counter()
    network(pictures).float().sum().backward()
    if pictures.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.0f} hours" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"
