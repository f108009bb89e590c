"""The training driver: `python -m hypercontrast.train --loss nonl`, or `train(config)` from Python.

A run folder holds
- config.yaml: the resolved settings;
- metrics.jsonl: one line an epoch, see `train`;
- checkpoints/: see `hypercontrast.checkpoint`;
- embeddings.safetensors, once the run is finished: validation features [n, D] (n <= 1,000) and labels [n], class_means
  [K, D] of the training set, prototypes [K, D] of the head, and the class names (a JSON list) in its metadata.

Everything random is a function of (seed, epoch, rank), so a run that was killed and resumed ends in the same weights,
bit for bit, as one that was not, on the CPU with the same number of ranks and threads.

Shapes: N samples, K classes, D dimensions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypercontrast import checkpoint, data
from hypercontrast._ops import resolve_backend
from hypercontrast.checkpoint import Checkpoint, CheckpointError
from hypercontrast.config import Config, UsageError, parse, read_config, resume_folder, to_yaml
from hypercontrast.data import AUGMENTATIONS, Dataset, Images, derived_seed, epoch_batches, steps_per_epoch
from hypercontrast.launch import RankError, Ranks, check_hardware, device_of, is_main, is_rank, joined, start_ranks
from hypercontrast.losses import CELoss, ETFDRLoss, NONLLoss, NormFaceLoss, NTCELoss
from hypercontrast.metrics import NeuralCollapse
from hypercontrast.models import LinearHead, Network, build_model, check_model
from hypercontrast.progress import Progress, fail, python
from hypercontrast.prototypes import ClassMeans, PrototypeClassifier, PrototypeHead

PROTOTYPE_LOSSES = {"normface": NormFaceLoss, "ntce": NTCELoss, "nonl": NONLLoss}
FINAL_LR = 1e-3  # of the peak
EVALUATION_BATCH = 1024
EMBEDDINGS_LIMIT = 1000
# Settings a resumed run may change without becoming another run.
FREE_ON_RESUME = {"data_root", "recipe", "gpus", "cpu_ranks", "backend", "run_dir", "resume", "dry_run", "quiet"}

OnEpoch = Callable[[dict[str, Any]], None]


class TrainingError(RuntimeError):
    """Training cannot go on; the message names epoch and step."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for a mistake in the call, 1 for a run that failed, 130 if interrupted."""
    try:
        config = prepare(parse(sys.argv[1:] if argv is None else argv))
        try:
            result = plan(config) if config.dry_run else _summary(train(config))
        except KeyboardInterrupt:
            return fail(130, f"interrupted; to continue: {python()} -m hypercontrast.train --resume {config.run_dir}")
    except UsageError as error:
        return fail(2, str(error))
    except (TrainingError, CheckpointError) as error:
        return fail(1, str(error))
    except RankError as error:
        return _fail_for(error)
    if is_main():
        print(result)
    return 0


def train(config: Config, on_epoch: OnEpoch | None = None) -> Path:
    """Train as `config` says and return the run's folder.

    Every epoch ends with a validation, and a line in metrics.jsonl: epoch (from 1), loss (mean over the epoch's
    samples), accuracy (of the head, on the validation set), prototype_accuracy (of the training set's class means, on
    the validation set), lr (of the last step), seconds (of the whole epoch), samples_per_second (of its training part),
    and every metric of `NeuralCollapse` on the training set, without augmentation. Accuracies are shares of 1.

    on_epoch: called with that line as a dict once the epoch is saved; only where this process trains (as rank 0).

    Raises UsageError before anything starts if the config cannot be run here, TrainingError if the loss stops being
    finite, CheckpointError if a run to resume has no intact checkpoint, RankError if a rank fails.
    """
    config = prepare(config)
    if config.ranks > 1 and not is_rank():
        if on_epoch is not None:
            raise UsageError(f"on_epoch must be None for a run that starts {config.ranks} ranks, got {on_epoch!r}")
        start_ranks(config, _train_rank)
        return Path(config.run_dir)
    with joined(config) as ranks:
        return _Run(ranks.agree(lambda: _placed(config)), ranks).train(on_epoch)


def prepare(config: Config) -> Config:
    """The config with its run folder settled. Raises UsageError if it cannot be run here; changes nothing on disk."""
    check_hardware(config)
    check_model(config.model)
    data.locate(config.dataset, config.data_root)
    try:
        backend = resolve_backend(config.backend, torch.empty(0, 1, device=device_of(config)))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if backend == "reference" and config.ranks > 1:
        raise UsageError(f"backend 'reference' must run on one rank, got {config.ranks}")
    return _placed(config)


def _placed(config: Config) -> Config:
    """The config with its run folder named, and `resume` down to auto or none."""
    if config.resume == "none":
        folder = Path(config.run_dir or f"runs/{_slug(config.dataset)}-{config.loss}-{time.strftime('%Y%m%d-%H%M%S')}")
        if (folder / "config.yaml").exists():
            raise UsageError(
                f"run_dir must not hold a run yet, got {folder}: continue it with --resume {folder}, or name another"
            )
        return dataclasses.replace(config, run_dir=str(folder))
    if not resume_folder(config):
        raise UsageError("resume auto needs run_dir, the folder of the run to continue")
    folder = Path(resume_folder(config))
    if config.run_dir and Path(config.run_dir) != folder:
        raise UsageError(f"run_dir must be the folder to resume, {folder}, or be left out, got {config.run_dir}")
    if config.resume != "auto" and not (folder / "config.yaml").is_file():
        raise UsageError(f"resume must be auto, none or the folder of a run, got {config.resume}")
    if (folder / "embeddings.safetensors").exists():
        raise UsageError(f"{folder} holds a finished run: name another --run-dir, or delete it to start again")
    if (folder / "config.yaml").is_file():
        _check_same_run(config, read_config(folder / "config.yaml"), folder)
    return dataclasses.replace(config, run_dir=str(folder), resume="auto")


def _check_same_run(config: Config, started: Config, folder: Path) -> None:
    for name, value in dataclasses.asdict(started).items():
        if name not in FREE_ON_RESUME and getattr(config, name) != value:
            raise UsageError(f"{name} must stay {value} to resume the run in {folder}, got {getattr(config, name)}")


def _slug(name: str) -> str:
    """A dataset's name as part of a folder's: `folder:/data/birds` becomes `birds`."""
    return re.sub(r"[^\w.-]+", "-", Path(name.rpartition(":")[2]).name) or "data"


def _train_rank(config: Config) -> None:
    train(config)


# One run.


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    class_means: Tensor


class _Run:
    """What lives as long as a run does: data, network, optimiser and the place where they are saved."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.folder = Path(config.run_dir)
        dataset = _load(config)
        _check_batches(config, dataset, ranks.world)
        mean, std = dataset.statistics()
        self.dataset = dataset.to(ranks.device)
        self.mean, self.std = mean.to(ranks.device), std.to(ranks.device)
        self.augment = AUGMENTATIONS[dataset.augmentation]
        self.steps = steps_per_epoch(len(dataset.train), config.batch_size)

        torch.manual_seed(config.seed)
        self.network = build_network(config, dataset).to(ranks.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay
        )
        self.history: list[dict[str, Any]] = []
        self.class_means = torch.zeros_like(self.network.head.prototypes)

    def train(self, on_epoch: OnEpoch | None) -> Path:
        self._restore()
        objective: nn.Module = Objective(self.network, self.config)
        if self.ranks.world > 1:
            objective = nn.parallel.DistributedDataParallel(objective)
        main = self.ranks.rank == 0
        with Progress(self.config.epochs, self.steps, silent=self.config.quiet or not main) as progress:
            for epoch in range(len(self.history) + 1, self.config.epochs + 1):
                record = self._epoch(epoch, objective, progress)
                if main:
                    self._save(epoch, record)
                    progress.end_epoch(record)
                    if on_epoch is not None:
                        on_epoch(record)
        if main:
            self._write_embeddings()
        return self.folder

    def _epoch(self, epoch: int, objective: nn.Module, progress: Progress) -> dict[str, Any]:
        started = time.perf_counter()
        progress.start_epoch(epoch)
        loss, lr = self._train_epoch(epoch, objective, progress)
        trained = time.perf_counter()
        try:
            evaluation = self._evaluate()
        except ValueError as error:  # features or weights that are not finite
            raise TrainingError(f"training stopped after epoch {epoch}: {error}") from error
        self.class_means = evaluation.class_means
        return {
            "epoch": epoch,
            "loss": loss,
            **evaluation.metrics,
            "lr": lr,
            "seconds": time.perf_counter() - started,
            "samples_per_second": len(self.dataset.train) / (trained - started),
        }

    def _train_epoch(self, epoch: int, objective: nn.Module, progress: Progress) -> tuple[float, float]:
        """The epoch's mean loss and its last learning rate."""
        config, ranks, train = self.config, self.ranks, self.dataset.train
        # For models that draw from the global generator, such as those with dropout.
        torch.manual_seed(derived_seed(config.seed, epoch, ranks.rank, "model"))
        generator = torch.Generator(ranks.device)
        generator.manual_seed(derived_seed(config.seed, epoch, ranks.rank, "augmentation"))
        batches = epoch_batches(
            len(train), config.batch_size, seed=config.seed, epoch=epoch, rank=ranks.rank, world=ranks.world
        )
        losses = LossRecord(self.steps, epoch, ranks)
        objective.train()
        lr = config.lr
        for step, (index, global_size) in enumerate(batches):
            lr = learning_rate((epoch - 1) * self.steps + step, self.steps, config)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            batch = train[index.to(ranks.device)]
            images = self._normalized(self.augment(batch.pixels.float(), generator))
            try:
                loss = objective(images, batch.labels, len(index) * ranks.world / global_size)
            except ValueError as error:  # off a GPU the losses notice features that are not finite
                raise TrainingError(f"training stopped at epoch {epoch}, step {step + 1}: {error}") from error
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.add(loss.detach(), global_size)
            progress.step()
        return losses.mean(), lr

    @torch.no_grad()
    def _evaluate(self) -> Evaluation:
        """Class means and collapse of the training set, accuracies on the validation set, over all ranks."""
        ranks, (num_classes, dim) = self.ranks, self.network.head.prototypes.shape
        ranks.share_buffers(self.network)
        means = ClassMeans(num_classes, dim).to(ranks.device)
        collapse = NeuralCollapse(num_classes, dim, device=ranks.device)
        for features, labels in self._embedded(self.dataset.train):
            means.update(features, labels)
            collapse.update(features, labels)
        if ranks.world > 1:
            means.all_reduce()
            collapse.all_reduce()
        class_means = means.prototypes()

        nearest_mean = PrototypeClassifier(class_means)
        hits = torch.zeros(2, dtype=torch.int64, device=ranks.device)
        for features, labels in self._embedded(self.dataset.validation):
            chosen = torch.stack([self.network.scores(features).argmax(1), nearest_mean.predict(features)])
            hits += (chosen == labels).sum(1)
        accuracy, prototype_accuracy = (ranks.sum(hits).double() / len(self.dataset.validation)).tolist()
        return Evaluation(
            {
                "accuracy": accuracy,
                "prototype_accuracy": prototype_accuracy,
                **collapse.compute(self.network.head.prototypes),
            },
            class_means,
        )

    def _embedded(self, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of the pictures as float32 features [n, D] and labels [n], batch by batch."""
        self.network.eval()
        own = torch.arange(self.ranks.rank, len(images), self.ranks.world, device=self.ranks.device)
        for index in own.split(EVALUATION_BATCH):
            batch = images[index]
            yield self._features(batch.pixels), batch.labels

    def _features(self, pixels: Tensor) -> Tensor:
        with mixed_precision(self.ranks.device):
            return self.network(self._normalized(pixels)).float()

    def _normalized(self, pixels: Tensor) -> Tensor:
        return data.normalize(pixels, self.mean, self.std).contiguous(memory_format=torch.channels_last)

    # Saving and restoring.

    def _restore(self) -> None:
        """Start from the newest intact checkpoint, if there is one, with metrics.jsonl cut back to it."""
        saved = self.ranks.agree(lambda: checkpoint.load_checkpoint(self.folder))
        if saved is not None:
            tensors = dict(saved.tensors)
            self.class_means = tensors.pop("class_means").to(self.ranks.device)
            self.network.load_state_dict(tensors)
            self.optimizer.load_state_dict(saved.state["optimizer"])
            self.history = saved.state["history"]
        if self.ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = dataclasses.replace(self.config, resume="none")
            checkpoint.write_atomic(self.folder / "config.yaml", to_yaml(kept).encode())
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            checkpoint.write_atomic(self.folder / "metrics.jsonl", lines.encode())

    def _save(self, epoch: int, record: dict[str, Any]) -> None:
        """The checkpoint first: it holds all lines of metrics.jsonl, so one lost in a crash comes back from it."""
        self.history.append(record)
        tensors = {**self.network.state_dict(), "class_means": self.class_means}
        state = {"optimizer": self.optimizer.state_dict(), "history": self.history}
        checkpoint.save_checkpoint(self.folder, Checkpoint(epoch, tensors, state))
        checkpoint.append_line(self.folder / "metrics.jsonl", json.dumps(record))

    @torch.no_grad()
    def _write_embeddings(self) -> None:
        from safetensors.torch import save

        self.network.eval()
        sample = self.dataset.validation.limited(EMBEDDINGS_LIMIT)
        tensors = {
            "features": self._features(sample.pixels),
            "labels": sample.labels,
            "class_means": self.class_means,
            "prototypes": self.network.head.prototypes,
        }
        content = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            metadata={"class_names": json.dumps(self.dataset.class_names)},
        )
        checkpoint.write_atomic(self.folder / "embeddings.safetensors", content)


class Objective(nn.Module):
    """Network and loss as one module, so that DDP sees every parameter used. Gives the global batch's mean loss.

    The prototype losses span all ranks by themselves. The others average over this rank's samples; `share`, its
    part of the global batch times the number of ranks, makes DDP's average over ranks the average over samples.
    """

    def __init__(self, network: Network, config: Config) -> None:
        super().__init__()
        self.network = network
        if config.loss in PROTOTYPE_LOSSES:
            self.loss: nn.Module = PROTOTYPE_LOSSES[config.loss](temperature=config.temperature, backend=config.backend)
        else:
            self.loss = CELoss() if config.loss == "ce" else ETFDRLoss()

    def forward(self, images: Tensor, labels: Tensor, share: float) -> Tensor:
        with mixed_precision(images.device):
            features = self.network(images)
        if isinstance(self.loss, CELoss):
            return share * self.loss(self.network.scores(features), labels)
        loss = self.loss(features, self.network.head.prototypes, labels)
        return share * loss if isinstance(self.loss, ETFDRLoss) else loss


class LossRecord:
    """The losses of an epoch, kept on the device and read now and then: reading each would stall a GPU every step."""

    def __init__(self, steps: int, epoch: int, ranks: Ranks, every: int = 50) -> None:
        self.epoch, self.ranks, self.every = epoch, ranks, every
        self._losses = torch.zeros(steps, device=ranks.device)
        self._sizes: list[int] = []
        self._checked = 0

    def add(self, loss: Tensor, size: int) -> None:
        self._losses[len(self._sizes)] = loss
        self._sizes.append(size)
        if len(self._sizes) - self._checked == self.every:
            self._check()

    def mean(self) -> float:
        """The mean over the epoch's samples."""
        self._check()
        sizes = torch.tensor(self._sizes, dtype=torch.float64, device=self.ranks.device)
        return float((self._losses.double() * sizes).sum() / sizes.sum())

    def _check(self) -> None:
        """Average what is new over the ranks and raise TrainingError at the first loss that is not finite."""
        new = self._losses[self._checked : len(self._sizes)]
        self.ranks.sum(new).div_(self.ranks.world)
        bad = (~torch.isfinite(new)).nonzero().flatten().tolist()
        if bad:
            step = self._checked + bad[0] + 1
            raise TrainingError(
                f"loss must be finite, got {float(new[bad[0]])} at epoch {self.epoch}, step {step}:"
                " try a smaller --lr or a larger --temperature"
            )
        self._checked = len(self._sizes)


def build_network(config: Config, dataset: Dataset) -> Network:
    """Backbone and head with fresh weights from torch's global generator."""
    backbone, dim = build_model(config.model, dataset.channels, dataset.image_size)
    neck = None if config.neck == "none" else config.neck
    try:
        head = (
            LinearHead(dim, dataset.num_classes, neck)
            if config.loss == "ce"
            else PrototypeHead(dim, dataset.num_classes, neck, fixed_etf=config.loss == "etf-dr")
        )
    except ValueError as error:  # more classes than the dimension has room for in a simplex
        raise UsageError(f"model {config.model}: {error}") from None
    return Network(backbone, head)


def learning_rate(step: int, steps_per_epoch: int, config: Config) -> float:
    """Linear warm-up to `lr`, then a cosine to a thousandth of it at the end of the last epoch. Steps count from 0."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    cosine = math.cos(math.pi * (step - warmup) / (total - warmup))
    return config.lr * (FINAL_LR + (1 - FINAL_LR) * (1 + cosine) / 2)


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 autocast on a GPU; float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _load(config: Config) -> Dataset:
    return data.load(config.dataset, config.data_root).limited(config.limit)


def _check_batches(config: Config, dataset: Dataset, world: int) -> None:
    """Batch norm needs two samples a rank in the smallest batch."""
    smallest = len(dataset.train) // steps_per_epoch(len(dataset.train), config.batch_size)
    if smallest < 2 * world:
        raise UsageError(
            f"batch_size must leave every one of {world} ranks two pictures, got batches of {smallest} from"
            f" batch_size={config.batch_size} and {len(dataset.train)} pictures"
        )


# What is said before and after.


def plan(config: Config) -> str:
    """What a run would do, in lines for a person."""
    world = config.ranks
    dataset = _load(config)
    _check_batches(config, dataset, world)
    samples, num_classes = len(dataset.train), dataset.num_classes
    steps = steps_per_epoch(samples, config.batch_size)
    batch = -(-samples // steps)
    network = build_network(config, dataset)
    parameters = sum(p.numel() for p in network.parameters())
    activations = _activation_bytes(network, dataset) * -(-batch // world)
    # Weights, gradients and momentum.
    memory = 12 * parameters + activations + dataset.train.pixels.nbytes + dataset.validation.pixels.nbytes
    rows = {
        "run folder": config.run_dir,
        "data": f"{config.dataset}: {samples} training, {len(dataset.validation)} validation, {num_classes} classes",
        "model": f"{config.model}, {parameters / 1e6:.2f} million parameters, D = {network.head.prototypes.shape[1]}",
        "loss": config.loss + (f", temperature {config.temperature}" if config.loss in PROTOTYPE_LOSSES else ""),
        "ranks": f"{world} on {device_of(config).type}",
        "global batch": f"{batch}, at most {-(-batch // world)} a rank",
        "negatives": _negatives(config.loss, batch, num_classes),
        "steps": f"{steps} an epoch, {steps * config.epochs} in {config.epochs} epochs",
        "learning rate": f"{config.lr:g}, cosine to {config.lr * FINAL_LR:g}; warm-up {config.warmup_epochs} epochs",
        "memory": f"about {memory / 2**20:.0f} MiB a rank for weights, activations and pictures",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _negatives(loss: str, batch: int, num_classes: int) -> str:
    if loss in ("nonl", "ntce"):
        return f"about {batch * (num_classes - 1) // num_classes} samples of other classes for every prototype"
    if loss == "etf-dr":
        return "none: features are drawn to fixed prototypes"
    return f"{num_classes - 1} prototypes of other classes for every sample"


@torch.no_grad()
def _activation_bytes(network: Network, dataset: Dataset) -> int:
    """Bytes one picture's activations take, in float32: the outputs of all layers."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += output.nbytes

    leaves = [m for m in network.modules() if not list(m.children())]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    network.eval()(dataset.train.pixels[:1].float())
    for handle in handles:
        handle.remove()
    return total


def _summary(folder: Path) -> str:
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return (
        f"{folder}: accuracy {last['accuracy']:.1%}, by class means {last['prototype_accuracy']:.1%},"
        f" distance to the simplex ETF {last['distance_etf']:.3f};"
        f" pictures: {python()} -m hypercontrast.report {folder}"
    )


def _fail_for(error: RankError) -> int:
    """As if the rank's error were this process's own: a traceback only where it was not foreseen."""
    if error.kind == "UsageError":
        return fail(2, str(error))
    if error.kind not in ("TrainingError", "CheckpointError"):
        print(error.trace, file=sys.stderr)
    return fail(1, str(error))


if __name__ == "__main__":
    sys.exit(main())
