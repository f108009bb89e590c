"""What training and evaluation share: a run's pictures and network on one rank's device, and the features in between;
how the network is built and restored, and what a machine must have for it.

Shapes: N samples, K classes, D dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hypercontrast import checkpoint, data
from hypercontrast.checkpoint import Checkpoint, CheckpointError
from hypercontrast.config import Config, UsageError, run_config
from hypercontrast.data import Dataset, Pictures, steps_per_epoch
from hypercontrast.launch import Ranks, check_hardware
from hypercontrast.models import LinearHead, Network, ProjectionHead, build_model, check_model, mixed_precision
from hypercontrast.prototypes import PrototypeHead

EVALUATION_BATCH = {"cpu": 128, "cuda": 1024}  # what caches hold, what keeps a GPU busy


class Embedded(NamedTuple):
    """A batch of pictures after the network, in float32."""

    backbone: Tensor  # [n, D], pooled, before neck or projection
    head: Tensor  # [n, D'], after them: what the losses take
    labels: Tensor  # [n]


class Workspace:
    """A run's data set and network on this rank's device; the network starts as `config.seed` makes it."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        dataset = load_dataset(config)
        check_batches(config, len(dataset.train), ranks.world)
        self.ranks = ranks
        self.dataset = dataset.to(ranks.device)
        mean, std = self.dataset.statistics()
        self.mean, self.std = mean.to(ranks.device), std.to(ranks.device)

        torch.manual_seed(config.seed)
        self.network = build_network(config, dataset.channels, dataset.image_size, dataset.num_classes)
        self.network.to(ranks.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def embedded(self, pictures: Pictures) -> Iterator[Embedded]:
        """This rank's part of the pictures through the network, batch by batch, as they are."""
        self.network.eval()
        own = torch.arange(self.ranks.rank, len(pictures), self.ranks.world, device=self.ranks.device)
        for batch in pictures.plain(own.split(EVALUATION_BATCH[self.ranks.device.type])):
            yield self.embed(self.normalized(batch.pixels), batch.labels)

    @torch.no_grad()
    def embed(self, images: Tensor, labels: Tensor) -> Embedded:
        with mixed_precision(self.ranks.device):
            backbone = self.network.backbone(images)
            head = self.network.head.embed(backbone)
        return Embedded(backbone.float(), head.float(), labels)

    def normalized(self, pixels: Tensor) -> Tensor:
        return data.normalize(pixels, self.mean, self.std)


# What a checkpoint holds besides the network: the training set's class means [K, D], and of its pictures the pixels'
# mean and std [C] and the size [].
BESIDE_NETWORK = ("class_means", "mean", "std", "image_size")


def network_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors without those that are not the network's."""
    return {name: tensor for name, tensor in tensors.items() if name not in BESIDE_NETWORK}


def newest_checkpoint(run: str) -> Checkpoint:
    """The newest intact checkpoint after a whole epoch of the run in this folder.

    Raises UsageError if the run has not saved one yet, CheckpointError if none is intact.
    """
    saved = checkpoint.load_checkpoint(Path(run), whole_epochs=True)
    if saved is None:
        raise UsageError(f"{run} must hold a checkpoint of a whole epoch, got none: not saved yet, or deleted")
    return saved


def load_network(network: Network, tensors: Mapping[str, Tensor]) -> None:
    """Fill the network from a checkpoint's tensors. Raises CheckpointError if they are another network's."""
    wanted, found = network.state_dict(), network_tensors(tensors)
    if {n: x.shape for n, x in wanted.items()} != {n: x.shape for n, x in found.items()}:
        raise CheckpointError("the checkpoint must hold the network that config.yaml describes, got other tensors")
    network.load_state_dict(found)


def restored(run: str, config: Config, ranks: Ranks) -> tuple[Workspace, int]:
    """A run's data and network as its newest intact checkpoint left them, and the epoch of that checkpoint.

    Raises UsageError if there is no checkpoint yet, CheckpointError if none is intact or it is another network's.
    """
    saved = ranks.agree(lambda: newest_checkpoint(run))
    workspace = Workspace(config, ranks)
    load_network(workspace.network, saved.tensors)
    return workspace, saved.epoch


def build_network(config: Config, channels: int, image_size: int, num_classes: int) -> Network:
    """Backbone and head with fresh weights from torch's global generator."""
    backbone, dim = build_model(config.model, channels, image_size, config.width)
    try:
        head = _build_head(config, dim, num_classes)
    except ValueError as error:  # more classes than the dimension has room for in a simplex
        raise UsageError(f"model {config.model}: {error}") from None
    return Network(backbone, head, config.temperature if config.temperature_rule == "learned" else None)


def _build_head(config: Config, dim: int, num_classes: int) -> PrototypeHead | ProjectionHead:
    neck = None if config.neck == "none" else config.neck
    if config.loss == "scl":
        return ProjectionHead(dim, num_classes, config.head)
    if config.loss == "ce":
        return LinearHead(dim, num_classes, neck)
    return PrototypeHead(dim, num_classes, neck, fixed_etf=config.loss == "etf-dr")


def load_dataset(config: Config) -> Dataset:
    """The run's pictures: limited first, then long-tailed."""
    dataset = data.load(config.dataset, config.data_root, config.limit, config.workers)
    return dataset if config.imbalance == 1 else dataset.long_tailed(config.imbalance, config.imbalance_shape)


def check_runnable(config: Config) -> None:
    """Raise UsageError if this machine has not the GPUs, the model or the pictures of a run."""
    check_hardware(config)
    check_model(config.model, config.width)
    data.locate(config.dataset, config.data_root)


def runnable_config(run: str, data_root: str = "", gpus: int = 0, cpu_ranks: int = 0) -> Config:
    """The config of the run in the folder `run`, to be run with these settings; an empty data_root keeps the run's own.

    Raises UsageError if that cannot be done here.
    """
    config = run_config(run)
    config = dataclasses.replace(config, data_root=data_root or config.data_root, gpus=gpus, cpu_ranks=cpu_ranks)
    check_runnable(config)
    return config


def check_batches(config: Config, samples: int | None, world: int) -> None:
    """Batch norm needs two samples in the smallest chunk of the smallest batch of every rank.

    samples: None while they are not counted, for what no number of them can satisfy.
    """
    if samples is None:
        pictures = f" and limit={config.limit}" * (config.limit > 0)
        smallest = min(config.batch_size, config.limit or config.batch_size)
    else:
        pictures = f" and {samples} pictures"
        smallest = samples // steps_per_epoch(samples, config.batch_size)
    if smallest // world // config.accumulate < 2:
        chunks = "" if config.accumulate == 1 else f" and each of accumulate={config.accumulate} chunks"
        raise UsageError(
            f"batch_size must leave every one of {world} ranks{chunks} two pictures, got batches of {smallest} from"
            f" batch_size={config.batch_size}{pictures}"
        )
