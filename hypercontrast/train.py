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
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypercontrast import checkpoint, data
from hypercontrast._ops import resolve_backend
from hypercontrast.checkpoint import Checkpoint, CheckpointError
from hypercontrast.config import Config, UsageError, parse, read_config, resume_folder, to_yaml
from hypercontrast.data import AUGMENTATIONS, derived_seed, epoch_batches, limited_order, steps_per_epoch
from hypercontrast.data.streamed import check_damage
from hypercontrast.launch import (
    RankError,
    Ranks,
    check_hardware,
    device_of,
    fail_for,
    is_main,
    is_rank,
    joined,
    start_ranks,
)
from hypercontrast.metrics import NeuralCollapse
from hypercontrast.models import ProjectionHead, check_model
from hypercontrast.objective import VIEWS, LossRecord, Objective, TrainingError
from hypercontrast.plan import learning_rate, plan
from hypercontrast.progress import Progress, fail, python
from hypercontrast.prototypes import ClassMeans, PrototypeClassifier
from hypercontrast.step import Step, compiles
from hypercontrast.workspace import Workspace, network_tensors

EMBEDDINGS_LIMIT = 1000
# Settings a resumed run may change without becoming another run.
FREE_ON_RESUME = {
    "data_root", "recipe", "gpus", "cpu_ranks", "backend", "workers", "compile",
    "run_dir", "resume", "dry_run", "quiet",
}  # fmt: skip

OnEpoch = Callable[[dict[str, Any]], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for a mistake in the call, 1 for a run that failed, 130 if interrupted."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        try:
            result = plan(_placed(config)) if config.dry_run else _summary(train(prepare(config)))
        except KeyboardInterrupt:
            return fail(130, f"interrupted; to continue: {python()} -m hypercontrast.train --resume {config.run_dir}")
    except UsageError as error:
        return fail(2, str(error))
    except (TrainingError, CheckpointError) as error:
        return fail(1, str(error))
    except RankError as error:
        return fail_for(error, {"UsageError": 2, "TrainingError": 1, "CheckpointError": 1})
    if is_main():
        print(result)
    return 0


def train(config: Config, on_epoch: OnEpoch | None = None) -> Path:
    """Train as `config` says and return the run's folder.

    Every epoch ends with a line in metrics.jsonl: epoch (from 1), loss (mean over the epoch's samples), lr (of the last
    step), temperature where it changes, seconds (of the whole epoch), samples_per_second (of its training part); and
    every `evaluate_every` epochs, and after the last, with a checkpoint and a validation, which adds accuracy (of the
    head, on the validation set), prototype_accuracy (of the training set's class means, on the validation set) and
    every metric of `NeuralCollapse` on the training set, without augmentation. Accuracies are shares of 1. scl learns
    no classifier: its prototypes are the class means, so its two accuracies are the same number.

    Pictures that cannot be decoded are left out: `damaged` in the line counts them, and damaged.txt in the run's folder
    names them.

    on_epoch: called with that line as a dict once the epoch is saved; only where this process trains (as rank 0).

    Raises UsageError before anything starts if the config cannot be run here, TrainingError if the loss stops being
    finite, CheckpointError if a run to resume has no intact checkpoint, RankError if a rank fails.
    """
    config = prepare(config)
    if config.ranks > 1 and not is_rank():
        if on_epoch is not None:
            raise UsageError(f"on_epoch must be None for a run that starts {config.ranks} ranks, got {on_epoch!r}")
        start_ranks(config.ranks, _train_rank, config)
        return Path(config.run_dir)
    with joined(config) as ranks:
        return _Run(ranks.agree(lambda: _placed(config)), ranks).train(on_epoch)


def prepare(config: Config) -> Config:
    """The config with its run folder settled. Raises UsageError if it cannot be run here; changes nothing on disk."""
    check_hardware(config)
    check_model(config.model, config.width)
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
        name = f"{_slug(config.dataset)}-{config.loss}" if config.recipe == "none" else config.recipe
        folder = Path(config.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
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
        self.workspace = Workspace(config, ranks)
        self.dataset, self.network = self.workspace.dataset, self.workspace.network
        self.views = VIEWS.get(config.loss, 1)
        name = self.dataset.augmentation if self.views == 1 else self.dataset.view_augmentation
        self.augment = dataclasses.replace(AUGMENTATIONS[name], compile=compiles(config, ranks.device))
        labels = self.dataset.train.labels
        self.steps = steps_per_epoch(len(labels), config.batch_size)
        batch = -(-len(labels) // self.steps)
        counts = torch.bincount(labels, minlength=self.dataset.num_classes)
        self.objective = Objective(self.network, config, ranks, self.views * -(-batch // ranks.world), counts)
        self.step = Step(self.objective, config, ranks)
        self.history: list[dict[str, Any]] = []
        self.damaged: list[str] = []
        self.class_means = torch.zeros_like(self.network.head.prototypes)

    def train(self, on_epoch: OnEpoch | None) -> Path:
        self._restore()
        main = self.ranks.rank == 0
        with Progress(self.config.epochs, self.steps, silent=self.config.quiet or not main) as progress:
            for epoch in range(len(self.history) + 1, self.config.epochs + 1):
                record = self._epoch(epoch, progress)
                self._save(epoch, record)
                if main:
                    progress.end_epoch(record)
                    if on_epoch is not None:
                        on_epoch(record)
        if main:
            self._write_embeddings()
        return self.folder

    def _epoch(self, epoch: int, progress: Progress) -> dict[str, Any]:
        started = time.perf_counter()
        progress.start_epoch(epoch)
        record: dict[str, Any] = {"epoch": epoch, **self._train_epoch(epoch, progress)}
        trained = time.perf_counter()
        if self._measured(epoch):
            try:
                evaluation = self._evaluate()
            except ValueError as error:  # features or weights that are not finite
                raise TrainingError(f"training stopped after epoch {epoch}: {error}") from error
            self.class_means = evaluation.class_means
            record |= evaluation.metrics
        self.damaged = self._damaged()
        if self.damaged:
            record["damaged"] = len(self.damaged)
        record["seconds"] = time.perf_counter() - started
        record["samples_per_second"] = len(self.dataset.train) / (trained - started)
        return record

    def _measured(self, epoch: int) -> bool:
        return epoch % self.config.evaluate_every == 0 or epoch == self.config.epochs

    def _train_epoch(self, epoch: int, progress: Progress) -> dict[str, float]:
        """The epoch's mean loss, its last learning rate, and its last temperature where that changes."""
        config, ranks, train = self.config, self.ranks, self.dataset.train
        # For models that draw from the global generator, such as those with dropout.
        torch.manual_seed(derived_seed(config.seed, epoch, ranks.rank, "model"))
        seeds = [derived_seed(config.seed, epoch, view, "augmentation") for view in range(self.views)]
        shares = list(
            epoch_batches(
                train.labels,
                config.batch_size,
                seed=config.seed,
                epoch=epoch,
                rank=ranks.rank,
                world=ranks.world,
                sampling=config.sampling,
            )
        )
        losses = LossRecord(self.steps, epoch, ranks)
        self.network.train()
        lr = config.peak_lr
        batches = train.views(shares, self.augment, seeds)
        for n, (share, batch) in enumerate(zip(shares, batches, strict=True)):
            done = (epoch - 1) * self.steps + n
            lr = learning_rate(done, self.steps, config)
            self.objective.advance(done / (config.epochs * self.steps))
            images, labels = self.workspace.normalized(batch.pixels), batch.labels.repeat(self.views)
            try:
                loss = self.step(images, labels, len(batch.labels) * ranks.world / share.global_size, lr)
            except ValueError as error:  # off a GPU the losses notice features that are not finite
                raise TrainingError(f"training stopped at epoch {epoch}, step {n + 1}: {error}") from error
            losses.add(loss, share.global_size)
            progress.step()
        record = {"loss": losses.mean(), "lr": lr}
        if config.temperature_rule != "fixed":
            record["temperature"] = float(torch.as_tensor(self.objective.temperature).detach())
        return record

    @torch.no_grad()
    def _evaluate(self) -> Evaluation:
        """Class means and collapse of the training set, accuracies on the validation set, over all ranks."""
        ranks, head = self.ranks, self.network.head
        num_classes, dim = head.prototypes.shape
        ranks.share_buffers(self.network)
        means = ClassMeans(num_classes, dim).to(ranks.device)
        collapse = NeuralCollapse(num_classes, dim, device=ranks.device)
        for batch in self.workspace.embedded(self.dataset.train):
            means.update(batch.head, batch.labels)
            collapse.update(batch.head, batch.labels)
        if ranks.world > 1:
            means.all_reduce()
            collapse.all_reduce()
        class_means = means.prototypes()
        if isinstance(head, ProjectionHead):  # it learns no prototypes: the class means are its classifier
            head.prototypes.copy_(class_means)

        nearest_mean = PrototypeClassifier(class_means)
        counts = torch.zeros(3, dtype=torch.int64, device=ranks.device)  # right by head, right by mean, all
        for batch in self.workspace.embedded(self.dataset.validation):
            chosen = [self.network.scores(batch.head).argmax(1), nearest_mean.predict(batch.head), batch.labels]
            counts += (torch.stack(chosen) == batch.labels).sum(1)
        by_head, by_mean, seen = ranks.sum(counts).tolist()
        return Evaluation(
            {
                "accuracy": by_head / seen,
                "prototype_accuracy": by_mean / seen,
                **collapse.compute(head.prototypes),
            },
            class_means,
        )

    def _damaged(self) -> list[str]:
        """The pictures that some rank could not decode so far. Raises UsageError if they are too many."""
        train, validation = self.dataset.train, self.dataset.validation
        own = sorted({*train.damaged, *validation.damaged})
        damaged = sorted({name for names in self.ranks.gathered(own) for name in names})
        check_damage(damaged, len(train) + len(validation))
        return damaged

    # Saving and restoring.

    def _restore(self) -> None:
        """Start from the newest intact checkpoint, if there is one, with metrics.jsonl cut back to it."""
        saved = self.ranks.agree(lambda: checkpoint.load_checkpoint(self.folder))
        if saved is not None:
            self.class_means = saved.tensors["class_means"].to(self.ranks.device)
            self.network.load_state_dict(network_tensors(saved.tensors))
            self.step.optimizer.load_state_dict(saved.state["optimizer"])
            self.history = saved.state["history"]
            self.objective.load_state(saved.state.get("queues", []))
        if self.ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = dataclasses.replace(self.config, resume="none")
            checkpoint.write_atomic(self.folder / "config.yaml", to_yaml(kept).encode())
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            checkpoint.write_atomic(self.folder / "metrics.jsonl", lines.encode())

    def _save(self, epoch: int, record: dict[str, Any]) -> None:
        """A checkpoint where the epoch was measured; first, for it holds all lines of metrics.jsonl."""
        self.history.append(record)
        measured = self._measured(epoch)
        queues = self.objective.state() if measured else []
        if self.ranks.rank != 0:
            return
        if measured:
            tensors = {
                **self.network.state_dict(),
                "class_means": self.class_means,
                "mean": self.workspace.mean,
                "std": self.workspace.std,
                "image_size": torch.tensor(self.dataset.image_size),
            }
            state = {"optimizer": self.step.optimizer.state_dict(), "history": self.history, "queues": queues}
            checkpoint.save_checkpoint(self.folder, Checkpoint(epoch, tensors, state))
        if self.damaged:
            names = "".join(f"{name}\n" for name in self.damaged)
            checkpoint.write_atomic(self.folder / "damaged.txt", names.encode())
        checkpoint.append_line(self.folder / "metrics.jsonl", json.dumps(record))

    @torch.no_grad()
    def _write_embeddings(self) -> None:
        from safetensors.torch import save

        self.network.eval()
        validation = self.dataset.validation
        chosen = limited_order(validation.labels, EMBEDDINGS_LIMIT)
        parts = [
            self.workspace.embed(self.workspace.normalized(batch.pixels), batch.labels)
            for batch in validation.plain([chosen])
        ]
        tensors = {
            "features": torch.cat([part.head for part in parts]),
            "labels": torch.cat([part.labels for part in parts]),
            "class_means": self.class_means,
            "prototypes": self.network.head.prototypes,
        }
        content = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            metadata={"class_names": json.dumps(self.dataset.class_names)},
        )
        checkpoint.write_atomic(self.folder / "embeddings.safetensors", content)


def _summary(folder: Path) -> str:
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return (
        f"{folder}: accuracy {last['accuracy']:.1%}, by class means {last['prototype_accuracy']:.1%},"
        f" distance to the simplex ETF {last['distance_etf']:.3f};"
        f" pictures: {python()} -m hypercontrast.report {folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
