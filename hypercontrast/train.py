"""The training driver: `python -m hypercontrast.train --loss nonl`, or `train(config)` from Python.

A run folder holds
- config.yaml: the resolved settings;
- environment.json: versions, machine and commit that it was last started with;
- metrics.jsonl: one line an epoch, see `train`;
- checkpoints/: see `hypercontrast.checkpoint`;
- embeddings.safetensors, once the run is finished: validation features [n, D] (n <= 1,000), labels [n] and pictures
  [n, C, H, W] (uint8, at most 48 pixels a side), class_means [K, D] of the training set, at length 1,
  mean_lengths [K] that they had before (means of unit features), class_sizes [K], prototypes [K, D] of the head,
  decisions [2, N] (label and the head's choice, of the whole validation set), and the class names (a JSON list) in its
  metadata;
- report.html, after that: see `hypercontrast.report`.

Everything random is a function of (seed, epoch, step, rank), so a run that was killed and resumed, inside an epoch too,
ends in the same weights, bit for bit, as one that was not, on the CPU with the same number of ranks and threads.

Shapes: N samples, K classes, D dimensions, C channels, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypercontrast import checkpoint
from hypercontrast._agreement import LostRankError, connected
from hypercontrast._ops import resolve_backend
from hypercontrast.checkpoint import Checkpoint, CheckpointError
from hypercontrast.config import (
    FREE_ON_RESUME,
    Config,
    UsageError,
    holds,
    parse,
    read_config,
    resume_folder,
    to_yaml,
)
from hypercontrast.data import AUGMENTATIONS, Share, derived_seed, epoch_batches, limited_order, steps_per_epoch
from hypercontrast.data.streamed import check_damage
from hypercontrast.environment import environment
from hypercontrast.launch import (
    Interrupted,
    RankError,
    Ranks,
    device_of,
    fail_for,
    interrupt,
    is_main,
    is_rank,
    joined,
    num_ranks,
    start_ranks,
    stop_signals,
)
from hypercontrast.lock import locked
from hypercontrast.metrics import NeuralCollapse
from hypercontrast.models import ProjectionHead
from hypercontrast.objective import VIEWS, LossRecord, NotFinite, Objective, TrainingError
from hypercontrast.output import say, warn
from hypercontrast.plan import learning_rate, plan
from hypercontrast.progress import Progress, command, fail, to_json, working
from hypercontrast.prototypes import ClassMeans, PrototypeClassifier
from hypercontrast.report import write_report
from hypercontrast.results import RESULT_FILES
from hypercontrast.step import Step, compiles
from hypercontrast.workspace import Workspace, check_batches, check_runnable, load_network

EMBEDDINGS_LIMIT = 1000
THUMBNAIL = 48  # pixels a side that pictures are reduced to, for the report
# What a run writes after its config.yaml; another one in its folder would take it for its own.
LATER = ("checkpoints", "embeddings.safetensors", *RESULT_FILES)
# Exit codes of errors that need no traceback.
FORESEEN = {"UsageError": 2, "TrainingError": 1, "CheckpointError": 1, "LostRankError": 1}

OnEpoch = Callable[[dict[str, Any]], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for a mistake in the call, 1 for a run that failed, 130 or 143 if
    interrupted by SIGINT or SIGTERM.
    """
    folder = result = ""
    try:
        with stop_signals(interrupt):
            config = parse(sys.argv[1:] if argv is None else argv, command("train"))
            if config.dry_run:
                result = plan(_placed(config))
            else:
                config = prepare(config)
                folder = config.run_dir
                run = train(config)
                if is_main():  # which has written it; another rank's machine may have no such folder
                    result = to_json(_result(run)) if config.json else _summary(run)
    except KeyboardInterrupt as stop:
        return fail(stop.code if isinstance(stop, Interrupted) else 130, _interrupted(folder))
    except UsageError as error:
        return fail(2, str(error))
    except (TrainingError, CheckpointError, LostRankError) as error:
        return fail(1, str(error))
    except RankError as error:
        return fail_for(error, FORESEEN)
    if is_main():
        say(result)
    return 0


def train(config: Config, on_epoch: OnEpoch | None = None) -> Path:
    """Train as `config` says and return the run's folder.

    Every epoch ends with a line in metrics.jsonl: epoch (from 1), loss (mean over the epoch's samples), lr (of the last
    step), temperature where it changes, seconds (of the whole epoch), samples_per_second (of its training part); and
    every `evaluate_every` epochs, and after the last, with a checkpoint and a validation, which adds accuracy (of the
    head, on the validation set), prototype_accuracy (of the training set's class means, on the validation set) and
    every metric of `NeuralCollapse` on the training set, without augmentation. Accuracies are shares of 1. scl learns
    no classifier: its prototypes are the class means, so its two accuracies are the same number.

    With `checkpoint_every` there is also a checkpoint every so many steps inside an epoch. SIGINT or SIGTERM ends a run
    of one rank after its step, with a checkpoint, and a second one at once; several ranks end at once.

    Pictures that cannot be decoded are left out: `damaged` in the line counts them, and damaged.txt in the run's folder
    names them.

    on_epoch: called with that line as a dict once the epoch is saved; only where this process trains (as rank 0).

    Raises UsageError before anything starts if the config cannot be run here, or another process trains in the run's
    folder, TrainingError before the update if a loss or a gradient is not finite, CheckpointError if a run to resume
    has no intact checkpoint or the run's folder cannot be written to, RankError if a rank fails, LostRankError in one
    that another has left alone, Interrupted (a KeyboardInterrupt) on a signal to stop.
    """
    config = prepare(config)
    if (config.ranks > 1 or config.max_restarts) and not is_rank():
        if on_epoch is not None:
            raise UsageError(f"on_epoch must be None for a run that starts {config.ranks} ranks, got {on_epoch!r}")
        _start_ranks(config)
        return Path(config.run_dir)
    with joined(config) as ranks, ExitStack() as held:

        def place() -> Config:
            held.enter_context(locked(Path(config.run_dir)))
            return _placed(config)

        config = ranks.agree(place)
        with working(f"reading {config.dataset}", silent=_is_silent(config, ranks)):
            run = _Run(config, ranks)
        return run.train(on_epoch)


def _is_silent(config: Config, ranks: Ranks) -> bool:
    return config.quiet or config.json or ranks.rank != 0


def prepare(config: Config) -> Config:
    """The config with its run folder settled. Raises UsageError if it cannot be run here; changes nothing on disk."""
    check_runnable(config)
    try:
        backend = resolve_backend(config.backend, torch.empty(0, 1, device=device_of(config)))
    except ValueError as error:
        raise UsageError(str(error)) from None
    world = num_ranks(config)
    if backend == "reference" and world > 1:
        raise UsageError(f"backend 'reference' must run on one rank, got {world}")
    check_batches(config, None, world)
    return _placed(config)


def _placed(config: Config) -> Config:
    """The config with its run folder named, and `resume` down to auto or none."""
    if config.resume == "none":
        name = f"{_slug(config.dataset)}-{config.loss}" if config.recipe == "none" else config.recipe
        # To the microsecond: runs over seeds may well be started together.
        folder = Path(config.run_dir or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S-%f}")
        if holds(folder, "config.yaml"):
            raise UsageError(
                f"run_dir must not hold a run yet, got {folder}: continue it with --resume {shlex.quote(str(folder))},"
                " or name another"
            )
        _check_nothing_left(folder)
        return dataclasses.replace(config, run_dir=str(folder))
    if not resume_folder(config):
        raise UsageError("resume auto needs run_dir, the folder of the run to continue")
    folder = Path(resume_folder(config))
    if config.run_dir and Path(config.run_dir) != folder:
        raise UsageError(f"run_dir must be the folder to resume, {folder}, or be left out, got {config.run_dir}")
    if config.resume != "auto" and not holds(folder, "config.yaml"):
        raise UsageError(f"resume must be auto, none or the folder of a run, got {config.resume}")
    if holds(folder, "embeddings.safetensors"):
        if not holds(folder, "report.html"):
            raise UsageError(f"{folder} holds a finished run; for its report: {_report_command(folder)}")
        raise UsageError(f"{folder} holds a finished run: name another --run-dir, or delete it to start again")
    if holds(folder, "config.yaml"):
        _check_same_run(config, read_config(folder / "config.yaml"), folder)
    else:
        _check_nothing_left(folder)
    return dataclasses.replace(config, run_dir=str(folder), resume="auto")


def _check_nothing_left(folder: Path) -> None:
    """Raise UsageError for a folder where a run has lost its config.yaml, and with it what its files are of."""
    if left := [name for name in LATER if (folder / name).exists()]:
        raise UsageError(f"run_dir must hold no {left[0]} of a run without its config.yaml, got {folder}: name another")


def _check_same_run(config: Config, started: Config, folder: Path) -> None:
    for name, value in dataclasses.asdict(started).items():
        if name not in FREE_ON_RESUME and getattr(config, name) != value:
            raise UsageError(f"{name} must stay {value} to resume the run in {folder}, got {getattr(config, name)}")


def _slug(name: str) -> str:
    """A dataset's name as part of a folder's: `folder:/data/birds` becomes `birds`."""
    return re.sub(r"[^\w.-]+", "-", Path(name.rpartition(":")[2]).name) or "data"


def _start_ranks(config: Config) -> None:
    """Train in new ranks; where one of them dies, start all again from the last checkpoint, `max_restarts` times."""
    for left in reversed(range(config.max_restarts + 1)):
        try:
            return start_ranks(config.ranks, _train_rank, config)
        except RankError as error:
            if left == 0 or error.kind in FORESEEN.keys() - {"LostRankError"}:  # which would come again
                raise
            warn(f"{error}; starting again from the last checkpoint, restarts left: {left - 1}")
            config = dataclasses.replace(config, resume="auto")


def _train_rank(config: Config) -> None:
    train(config)


# One run.


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
        self.losses = LossRecord(self.steps, ranks.device)  # of the epoch under way
        self.unfinished: dict[str, Any] = {}  # what a checkpoint says of the epoch it was saved in
        self.started = 0.0  # when that epoch did, on the clock of time.perf_counter
        self.damaged: list[str] = []
        # Of the last evaluation; decisions: labels, choices of the head.
        self.class_means = torch.zeros_like(self.network.head.prototypes)
        self.mean_lengths = torch.zeros(self.dataset.num_classes)
        self.decisions = torch.empty(2, 0, dtype=torch.int32)
        self.stop: int | None = None  # the signal that asks for it

    def train(self, on_epoch: OnEpoch | None) -> Path:
        self._restore()
        main = self.ranks.rank == 0
        progress = Progress(self.config.epochs, self.steps, silent=_is_silent(self.config, self.ranks))
        with stop_signals(self._note), progress:
            for epoch in range(len(self.history) + 1, self.config.epochs + 1):
                record = self._epoch(epoch, progress)
                self._save(epoch, record)
                if main:
                    progress.end_epoch(record)
                    if on_epoch is not None:
                        on_epoch(record)
        if main:
            self._write_embeddings()
            self._write_report()
        return self.folder

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            interrupt(number)
        self.stop = number

    def _stop_if_asked(self) -> None:
        if self.stop is not None:
            self._save_inside()
            interrupt(self.stop)

    def _epoch(self, epoch: int, progress: Progress) -> dict[str, Any]:
        self.started = time.perf_counter() - self.unfinished.pop("seconds", 0.0)
        self.losses = LossRecord(self.steps, self.ranks.device, **self.unfinished)
        self.unfinished = {}
        progress.start_epoch(epoch, len(self.losses))
        record: dict[str, Any] = {"epoch": epoch, **self._train_epoch(epoch, progress)}
        trained = time.perf_counter()
        if self._measured(epoch):
            try:
                with connected(f"after epoch {epoch}"):
                    record |= self._evaluate()
            except ValueError as error:  # features or weights that are not finite
                raise self._failure(f"after epoch {epoch}: {error}") from error
        self.damaged = self._damaged()
        if self.damaged:
            record["damaged"] = len(self.damaged)
        record["seconds"] = time.perf_counter() - self.started
        record["samples_per_second"] = len(self.dataset.train) / (trained - self.started)
        return record

    def _measured(self, epoch: int) -> bool:
        return epoch % self.config.evaluate_every == 0 or epoch == self.config.epochs

    def _train_epoch(self, epoch: int, progress: Progress) -> dict[str, float]:
        """The rest of the epoch: its mean loss, its last learning rate, and its last temperature where that changes."""
        config, ranks, train, losses = self.config, self.ranks, self.dataset.train, self.losses
        seeds = [derived_seed(config.seed, epoch, view, "augmentation") for view in range(self.views)]
        shares = self._shares(epoch, ranks.rank, ranks.world)[len(losses) :]
        self.network.train()
        batches = train.views(shares, self.augment, seeds)
        try:
            for share, batch in zip(shares, batches, strict=True):
                # For models that draw from the global generator, such as those with dropout.
                torch.manual_seed(derived_seed(config.seed, epoch, len(losses), ranks.rank, "model"))
                lr = self._schedule(epoch, len(losses))
                images, labels = self.workspace.normalized(batch.pixels), batch.labels.repeat(self.views)
                with connected(f"epoch {epoch}, step {len(losses) + 1}"):
                    loss = self.step(images, labels, len(batch.labels) * ranks.world / share.global_size, lr)
                losses.add(loss, share.global_size)
                progress.step()
                self._stop_if_asked()
                if config.checkpoint_every and len(losses) % config.checkpoint_every == 0 and len(losses) < self.steps:
                    self._save_inside()
            record = {"loss": losses.mean(), "lr": self._schedule(epoch, self.steps - 1)}
        except NotFinite as bad:
            ids = self._shares(epoch)[bad.step - 1].indices.tolist()
            larger = "" if self.objective.temperature is None else " or a larger --temperature"
            raise self._failure(
                f"before the update of epoch {epoch}, step {bad.step}: loss and gradient must be finite, got"
                f" {bad.value}, try a smaller --lr{larger}",
                f"; the batch's samples are {', '.join(map(str, ids))}",
            ) from None
        if config.temperature_rule != "fixed":
            record["temperature"] = float(torch.as_tensor(self.objective.temperature).detach())
        return record

    def _shares(self, epoch: int, rank: int = 0, world: int = 1) -> list[Share]:
        """One rank's shares of all batches of an epoch; by default the whole batches."""
        config = self.config
        return list(
            epoch_batches(
                self.dataset.train.labels,
                config.batch_size,
                seed=config.seed,
                epoch=epoch,
                rank=rank,
                world=world,
                sampling=config.sampling,
            )
        )

    def _schedule(self, epoch: int, step: int) -> float:
        """Set what depends on the place in the training for the step after `step` others; returns its learning rate."""
        done = (epoch - 1) * self.steps + step
        self.objective.advance(done / (self.config.epochs * self.steps))
        return learning_rate(done, self.steps, self.config)

    def _failure(self, what: str, more: str = "") -> TrainingError:
        return TrainingError(f"training stopped {what}; {checkpoint.last_good(self.folder)}{more}")

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Collapse of the training set and accuracies on the validation set, over all ranks; keeps class means and
        decisions.
        """
        ranks, head = self.ranks, self.network.head
        num_classes, dim = head.prototypes.shape
        ranks.share_buffers(self.network)
        means = ClassMeans(num_classes, dim).to(ranks.device)
        collapse = NeuralCollapse(num_classes, dim, device=ranks.device)
        for batch in self.workspace.embedded(self.dataset.train):
            self._stop_if_asked()
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
        decisions = []
        for batch in self.workspace.embedded(self.dataset.validation):
            self._stop_if_asked()
            by_head = self.network.scores(batch.head).argmax(1)
            chosen = [by_head, nearest_mean.predict(batch.head), batch.labels]
            counts += (torch.stack(chosen) == batch.labels).sum(1)
            decisions.append(torch.stack([batch.labels, by_head]).int())
        right_by_head, right_by_mean, seen = ranks.sum(counts).tolist()
        accuracies = {"accuracy": right_by_head / seen, "prototype_accuracy": right_by_mean / seen}
        metrics = accuracies | collapse.compute(head.prototypes)
        self.class_means = class_means
        self.mean_lengths = means.sums.norm(dim=1) / means.counts.clamp(min=1)
        self.decisions = torch.cat(ranks.gathered(torch.cat(decisions, 1).cpu()), 1)
        return metrics

    def _damaged(self) -> list[str]:
        """The pictures that some rank could not decode so far. Raises UsageError if they are too many."""
        train, validation = self.dataset.train, self.dataset.validation
        own = sorted({*train.damaged, *validation.damaged})
        damaged = sorted({*self.damaged, *(name for names in self.ranks.gathered(own) for name in names)})
        check_damage(damaged, len(train) + len(validation))
        return damaged

    # Saving and restoring.

    def _restore(self) -> None:
        """Start from the newest intact checkpoint, if there is one, with metrics.jsonl cut back to it."""
        saved = self.ranks.agree(lambda: checkpoint.load_checkpoint(self.folder))
        if saved is not None:
            try:
                self._continue(saved)
            except KeyError as missing:
                raise CheckpointError(
                    f"the checkpoint of {self.folder} must hold a run's state, got no {missing.args[0]}"
                ) from None
        if self.ranks.rank == 0:
            kept = dataclasses.replace(self.config, resume="none")
            checkpoint.write_atomic(self.folder / "config.yaml", to_yaml(kept).encode())
            made_with = json.dumps(environment(self.ranks.device, self.ranks.world), indent=1)
            checkpoint.write_atomic(self.folder / "environment.json", made_with.encode())
            self._write_history()

    def _continue(self, saved: Checkpoint) -> None:
        """Raises KeyError for what `_save_checkpoint` saves and this one has not."""
        self.class_means = saved.tensors["class_means"].to(self.ranks.device)
        load_network(self.network, saved.tensors)
        self.step.optimizer.load_state_dict(saved.state["optimizer"])
        self.history = saved.state["history"]
        self.unfinished = saved.state["unfinished"]
        self.damaged = saved.state["damaged"]
        self.decisions = saved.state["decisions"]
        self.mean_lengths = saved.state["mean_lengths"]
        self.objective.load_state(saved.state["queues"])

    def _save(self, epoch: int, record: dict[str, Any]) -> None:
        """A checkpoint where the epoch was measured; first, for it holds all lines of metrics.jsonl."""
        self.history.append(record)
        if self._measured(epoch):
            self._save_checkpoint(0, {})
        if self.ranks.rank != 0:
            return
        if self.damaged:
            names = "".join(f"{name}\n" for name in self.damaged)
            # As the system spells them, for a file's name need not be UTF-8.
            checkpoint.write_atomic(self.folder / "damaged.txt", os.fsencode(names))
        self._write_history()

    def _save_inside(self) -> None:
        """A checkpoint of the epoch under way."""
        self.damaged = self._damaged()
        seconds = time.perf_counter() - self.started
        self._save_checkpoint(len(self.losses), {**self.losses.state(), "seconds": seconds})

    def _save_checkpoint(self, step: int, unfinished: dict[str, Any]) -> None:
        """All ranks call this together. unfinished: of an epoch under way, what makes its line in metrics.jsonl."""
        queues = self.objective.state()
        if self.ranks.rank != 0:
            return
        tensors = {
            **self.network.state_dict(),
            "class_means": self.class_means,
            "mean": self.workspace.mean,
            "std": self.workspace.std,
            "image_size": torch.tensor(self.dataset.image_size),
        }
        state = {
            "optimizer": self.step.optimizer.state_dict(),
            "history": self.history,
            "unfinished": unfinished,
            "damaged": self.damaged,
            "decisions": self.decisions,
            "mean_lengths": self.mean_lengths,
            "queues": queues,
        }
        measured = [record for record in self.history if "accuracy" in record]
        best = max(measured, key=lambda record: record["accuracy"])["epoch"] if measured else 0
        try:
            checkpoint.save_checkpoint(
                self.folder,
                Checkpoint(len(self.history), tensors, state, step),
                kept=self.config.keep_checkpoints,
                best=best,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {checkpoint.last_good(self.folder)}") from None

    def _write_history(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        checkpoint.write_atomic(self.folder / "metrics.jsonl", lines.encode())

    @torch.no_grad()
    def _write_embeddings(self) -> None:
        from safetensors.torch import save

        self.network.eval()
        validation = self.dataset.validation
        chosen = limited_order(validation.labels, EMBEDDINGS_LIMIT)
        batches = list(validation.plain([chosen]))
        parts = [self.workspace.embed(self.workspace.normalized(batch.pixels), batch.labels) for batch in batches]
        tensors = {
            "features": torch.cat([part.head for part in parts]),
            "labels": torch.cat([part.labels for part in parts]),
            "pictures": torch.cat([_thumbnails(batch.pixels) for batch in batches]),
            "class_means": self.class_means,
            "class_sizes": torch.bincount(self.dataset.train.labels, minlength=self.dataset.num_classes),
            "prototypes": self.network.head.prototypes,
            "mean_lengths": self.mean_lengths,
            "decisions": self.decisions,
        }
        content = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            metadata={"class_names": json.dumps(self.dataset.class_names)},
        )
        checkpoint.write_atomic(self.folder / "embeddings.safetensors", content)

    def _write_report(self) -> None:
        try:
            write_report([self.folder])
        except UsageError as error:
            warn(error)
        except Exception as error:  # a picture of the run is no reason to lose it
            warn(f"{self.folder / 'report.html'} could not be written: {error}")


def _thumbnails(pixels: Tensor) -> Tensor:
    """[n, C, H, W] uint8, reduced by averaging to at most THUMBNAIL pixels a side."""
    height, width = (min(side, THUMBNAIL) for side in pixels.shape[2:])
    return F.adaptive_avg_pool2d(pixels.float(), (height, width)).round().to(torch.uint8)


def _interrupted(folder: str) -> str:
    if not holds(folder, "config.yaml"):
        return "interrupted before anything was saved"
    if holds(folder, "embeddings.safetensors"):  # the report alone is left to be written
        return f"interrupted; {folder} holds a finished run; for its report: {_report_command(folder)}"
    resume = f"{command('train')} --resume {shlex.quote(folder)}"
    return f"interrupted; {checkpoint.last_good(Path(folder))}; to continue: {resume}"


def _report_command(folder: Path | str) -> str:
    return f"{command('report')} {shlex.quote(str(folder))}"


def _result(folder: Path) -> dict[str, Any]:
    """The run's folder and report, and the line of its last epoch."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {"run_dir": str(folder), "report": str(folder / "report.html"), **last}


def _summary(folder: Path) -> str:
    last = _result(folder)
    return (
        f"{folder}: accuracy {last['accuracy']:.1%}, by class means {last['prototype_accuracy']:.1%},"
        f" distance to the simplex ETF {last['distance_etf']:.3f};"
        f" pictures: {last['report']}"
    )


if __name__ == "__main__":
    sys.exit(main())
