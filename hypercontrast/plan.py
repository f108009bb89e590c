"""The plan of a run: its learning rates, and in words what it would do (`--dry-run`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hypercontrast.config import Config
from hypercontrast.data import Dataset, steps_per_epoch
from hypercontrast.launch import device_of
from hypercontrast.models import Network
from hypercontrast.objective import GLOBAL_LOSSES, VIEWS
from hypercontrast.workspace import build_network, check_batches, load_dataset

FINAL_LR = 1e-3  # of the peak


def learning_rate(step: int, steps_per_epoch: int, config: Config) -> float:
    """Linear warm-up to `lr`, then a cosine to a thousandth of it at the end of the last epoch. Steps count from 0."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    cosine = math.cos(math.pi * (step - warmup) / (total - warmup))
    return config.lr * (FINAL_LR + (1 - FINAL_LR) * (1 + cosine) / 2)


def plan(config: Config) -> str:
    """What a run would do, in lines for a person."""
    world = config.ranks
    dataset = load_dataset(config)
    check_batches(config, dataset, world)
    samples, num_classes, views = len(dataset.train), dataset.num_classes, VIEWS.get(config.loss, 1)
    steps = steps_per_epoch(samples, config.batch_size)
    batch = -(-samples // steps)
    network = build_network(config, dataset)
    parameters = sum(p.numel() for p in network.parameters())
    activations = _activation_bytes(network, dataset) * views * -(-batch // world) // config.accumulate
    # Weights, gradients and momentum.
    memory = 12 * parameters + activations + dataset.train.pixels.nbytes + dataset.validation.pixels.nbytes
    rows = {
        "run folder": config.run_dir,
        "data": f"{config.dataset}: {samples} training, {len(dataset.validation)} validation, {num_classes} classes",
        "model": f"{config.model}, {parameters / 1e6:.2f} million parameters, D = {network.head.prototypes.shape[1]}",
        "loss": config.loss + (f", temperature {config.temperature}" if config.loss in GLOBAL_LOSSES else ""),
        "ranks": f"{world} on {device_of(config).type}",
        "global batch": f"{batch}, at most {-(-batch // world)} a rank" + "; two views of each" * (views == 2),
        "negatives": _negatives(config.loss, views * batch + config.queue, num_classes),
        "steps": f"{steps} an epoch, {steps * config.epochs} in {config.epochs} epochs",
        "learning rate": f"{config.lr:g}, cosine to {config.lr * FINAL_LR:g}; warm-up {config.warmup_epochs} epochs",
        "memory": f"about {memory / 2**20:.0f} MiB a rank for weights, activations and pictures",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _negatives(loss: str, batch: int, num_classes: int) -> str:
    of_other_classes = batch * (num_classes - 1) // num_classes
    if loss in ("nonl", "ntce"):
        return f"about {of_other_classes} samples of other classes for every prototype"
    if loss == "scl":
        return f"about {of_other_classes} views of other classes for every view"
    if loss == "etf-dr":
        return "none: features are drawn to fixed prototypes"
    return f"{num_classes - 1} prototypes of other classes for every sample"


@torch.no_grad()
def _activation_bytes(network: Network, dataset: Dataset) -> int:
    """Bytes one picture's activations take, in float32: the outputs of all layers."""
    total = 0

    def count(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += output.nbytes

    leaves = [m for m in network.modules() if not list(m.children())]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    network.eval()(dataset.train.pixels[:1].float())
    for handle in handles:
        handle.remove()
    return total
