"""Where the time of a training step goes: the driver's own step on a recipe's kind of pictures, taken apart.

    python -m bench step [--losses nonl scl | --recipe imagenet1k-nonl] [--pictures N] [--steps S] [--output FILE]

Random pictures of the data set's size take as long as real ones and need no data set; they are on the device, so what
reading and decoding cost is not in here. `Step`, `Objective` and the augmentation are the driver's, unchanged.

Parts, by marks on one timeline, so that they leave nothing out: on a CPU the clock's, on a GPU device events on the
stream, which a step that has to wait for its host shows as a longer part.
    data             a batch of pictures augmented and normalised, its order drawn once an epoch
    model forward    pictures to features
    loss forward     features to loss
    loss backward    until the features' gradient is there
    model backward   the rest of the backward pass
    optimiser        zeroing gradients, SGD, a queue's push
    communication    over ranks: steps with every exchange less steps without (DDP's gradients and buffers, the loss's
                     sums), so only what computing does not hide; what batch norm over ranks exchanges stays in the
                     model. The other parts are of steps without
    rest             steps without marks less steps with: what marking costs, and the noise between the two

So parts + communication + rest is the whole step, which is timed without marks. All are means over as many steps, taken
in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bench import record
from bench.arguments import at_least, writable
from bench.measure import ratio
from bench.record import Row
from hypercontrast.config import Config, UsageError, configure
from hypercontrast.data import (
    AUGMENTATIONS,
    FACTS,
    RESIDENT_BYTES,
    Dataset,
    Images,
    derived_seed,
    epoch_batches,
    normalize,
    steps_per_epoch,
)
from hypercontrast.launch import RankError, Ranks, check_hardware, fail_for, is_rank, joined, start_ranks
from hypercontrast.models import check_model
from hypercontrast.objective import VIEWS, Objective
from hypercontrast.step import Step, compiles
from hypercontrast.workspace import build_network, check_batches

PARTS = ("data", "model forward", "loss forward", "loss backward", "model backward", "optimiser")
LOSSES = ("ce", "normface", "ntce", "nonl", "scl", "etf-dr")
TURNS = 2  # that every way of running gets
WATCHED_STEPS = 5
FEW_BATCHES = 4


class Timeline:
    """Marks in the order of a step: what ended where. Nothing waits for a GPU until `milliseconds`."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def milliseconds(self) -> list[tuple[str, float]]:
        """What ended at each mark but the first, and how long it took."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return [(name, start.elapsed_time(end)) for (_, start), (name, end) in itertools.pairwise(self._marks)]
        return [(name, 1e3 * (end - start)) for (_, start), (name, end) in itertools.pairwise(self._marks)]


class Training:
    """The driver's steps, on and on, without its reading, measuring and saving.

    pictures: in the set, cut to whole batches, for another size would be compiled anew. None for the data set's number,
    or a few batches of those that the driver would not keep on the device either.

    Raises UsageError for a config whose steps cannot be taken apart.
    """

    def __init__(self, config: Config, pictures: int | None, ranks: Ranks) -> None:
        if config.accumulate != 1:
            raise UsageError(f"accumulate must be 1 to tell a step's parts apart, got {config.accumulate}")
        if config.dataset not in FACTS:
            raise UsageError(f"dataset must be one of {', '.join(FACTS)}, got {config.dataset}")
        self.facts = facts = FACTS[config.dataset]
        if pictures is None:
            resident = facts.train * facts.channels * facts.image_size**2 <= RESIDENT_BYTES
            pictures = facts.train if resident else FEW_BATCHES * config.batch_size
        pictures = pictures // config.batch_size * config.batch_size or pictures
        check_batches(config, pictures, ranks.world)
        self.config, self.ranks = config, ranks
        self.steps = steps_per_epoch(pictures, config.batch_size)
        size = (pictures, facts.channels, facts.image_size, facts.image_size)
        pixels = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        self.train = Images(pixels, torch.arange(pictures) % facts.classes).to(ranks.device)
        names = tuple(map(str, range(facts.classes)))
        dataset = Dataset(self.train, self.train, names, "crop_flip" if facts.channels == 3 else "shift")
        self.views = VIEWS.get(config.loss, 1)
        name = dataset.augmentation if self.views == 1 else dataset.view_augmentation
        self.augment = dataclasses.replace(AUGMENTATIONS[name], compile=compiles(config, ranks.device))
        torch.manual_seed(config.seed)
        network = build_network(config, facts.channels, facts.image_size, facts.classes).to(ranks.device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.rows = self.views * (pictures // self.steps // ranks.world)
        self.shape = (self.rows, *network.head.prototypes.shape)  # N, K, D
        counts = torch.bincount(self.train.labels, minlength=facts.classes)
        self.objective = Objective(network, config, ranks, self.rows, counts)
        self.step = Step(self.objective, config, ranks)
        self.mean = self.std = torch.full((facts.channels,), 127.5, device=ranks.device)
        self._timeline: Timeline | None = None
        self._hook()
        self._batches = self._on_and_on()

    def _hook(self) -> None:
        """Let the step's own pieces say where they end. A compiled network is left as it is, and only its call wrapped:
        hooks would become part of what is compiled.
        """
        encode = self.step.encoder

        def encoder(images: Tensor) -> Tensor:
            self._mark("optimiser")
            features = encode(images)
            self._mark("model forward")
            if self._timeline is not None:
                features.register_hook(lambda _: self._mark("loss backward"))
            return features

        self.step.encoder = encoder  # type: ignore[assignment]
        self._network = encode
        self.objective.loss.register_forward_hook(lambda *_: self._mark("loss forward"))
        self.step.optimizer.register_step_pre_hook(lambda *_: self._mark("model backward"))

    def _mark(self, name: str) -> None:
        if self._timeline is not None:
            self._timeline.mark(name)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures of this rank as the network takes them, and their labels."""
        ranks, seeds = self.ranks, [derived_seed(epoch, view) for view in range(self.views)]
        shares = epoch_batches(
            self.train.labels, self.config.batch_size, seed=0, epoch=epoch, rank=ranks.rank, world=ranks.world
        )
        for batch in self.train.views(list(shares), self.augment, seeds):
            yield normalize(batch.pixels, self.mean, self.std), batch.labels.repeat(self.views)

    def _on_and_on(self) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            yield from self.epoch(epoch)

    def whole(self, steps: int, *, exchange: bool = True) -> list[float]:
        """Milliseconds of each of some steps."""
        timeline = Timeline(self.ranks.device)
        timeline.mark("start")
        with self._exchanging(exchange):
            for _ in range(steps):
                self.step(*next(self._batches), 1.0, self.config.peak_lr)
                timeline.mark("step")
        return [ms for _, ms in timeline.milliseconds()]

    def parts(self, steps: int, *, exchange: bool = True) -> dict[str, float]:
        """Milliseconds of every part of some steps, all together."""
        self._timeline = timeline = Timeline(self.ranks.device)
        timeline.mark("start")
        with self._exchanging(exchange):
            for _ in range(steps):
                images, labels = next(self._batches)
                timeline.mark("data")
                self.step(images, labels, 1.0, self.config.peak_lr)
                timeline.mark("optimiser")
        self._timeline = None
        found = dict.fromkeys(PARTS, 0.0)
        for name, ms in timeline.milliseconds():
            found[name] += ms
        return found

    def _exchanging(self, exchange: bool) -> AbstractContextManager:
        """Whether DDP and the loss speak with other ranks; in the loss it stays as it was set last."""
        if hasattr(self.objective.loss, "group"):
            self.objective.loss.group = "auto" if exchange else None
        alone = not exchange and isinstance(self._network, DistributedDataParallel)
        return self._network.no_sync() if alone else nullcontext()

    def watch(self) -> None:
        """A few steps that must not wait for a GPU; RuntimeError where one does."""
        batches = self.epoch(0)
        next(batches)  # what happens once an epoch may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            for images, labels in itertools.islice(batches, WATCHED_STEPS):
                self.step(images, labels, 1.0, self.config.peak_lr)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Shares:
    """A recipe's step. Times are means in milliseconds; `parts` and the two after it add up to step_ms."""

    recipe: str
    loss: str
    ranks: int
    device: str
    compiled: bool
    n: int  # rows of the loss on a rank: pictures, twice as many with two views
    k: int
    d: int
    steps: int  # measured
    warm_up_s: float  # of the first step, compiling included
    step_ms: float
    parts: dict[str, float]
    communication: float
    rest: float
    pictures_per_s: float  # of all ranks
    epoch_s: float  # of the data set's number of pictures, training alone

    def flat(self) -> dict[str, Any]:
        """As a line of a CSV file or a table: shares of the step in the place of times."""
        times = {**self.parts, "communication": self.communication, "rest": self.rest}
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shares = {name: round(ms / self.step_ms, 4) for name, ms in times.items()}
        return {name: value for name, value in found.items() if name not in ("parts", *times)} | shares


def measure(recipe: str, pictures: int | None, steps: int, ranks: Ranks | None = None, **options: Any) -> Shares:
    """Shares of the recipe's step on this rank, with config `options` on top; all ranks call this together.

    pictures: as of `Training`. steps: measured of every way, at least TURNS.
    """
    config = configure(recipe=recipe, **options)
    if ranks is None:
        ranks = Ranks(0, 1, torch.device(record.this_device()))
    training = Training(config, pictures, ranks)
    warm_up = sum(training.whole(1)) / 1e3
    if ranks.device.type == "cuda" and ranks.world == 1:
        training.watch()
    modes = [(True, False), (True, True)] if ranks.world == 1 else [(True, False), (False, False), (False, True)]
    wholes: dict[bool, list[float]] = {True: [], False: []}
    parts = dict.fromkeys(PARTS, 0.0)
    for _ in range(TURNS):
        for exchange, marked in modes:
            # Whether DDP exchanges buffers follows the step before.
            training.whole(1, exchange=exchange)
            if marked:
                for name, ms in training.parts(steps // TURNS, exchange=exchange).items():
                    parts[name] += ms
            else:
                wholes[exchange] += training.whole(steps // TURNS, exchange=exchange)
    measured = TURNS * (steps // TURNS)
    parts = {name: ms / measured for name, ms in parts.items()}
    whole = statistics.mean(wholes[True])
    pictures_per_s = 1e3 * len(training.train) / training.steps / whole
    alone = statistics.mean(wholes[False]) if wholes[False] else whole
    n, k, d = training.shape
    return Shares(
        recipe, config.loss, ranks.world, str(record.environment(ranks.device.type)["device"]),
        compiles(config, ranks.device), n, k, d, measured, round(warm_up, 2), round(whole, 3), parts,
        communication=whole - alone, rest=alone - sum(parts.values()),
        pictures_per_s=_four_digits(pictures_per_s), epoch_s=_four_digits(training.facts.train / pictures_per_s),
    )  # fmt: skip


def _four_digits(x: float) -> float:
    return float(f"{x:.4g}")


def missing(*others: str) -> str:
    """What the recipes and their networks, or `others`, need that is not installed; nothing when all is there."""
    needed = {"yaml": "PyYAML", "torchvision": "torchvision"} | {other: other for other in others}
    absent = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    return f"needs {' and '.join(absent)}" if absent else ""


def rows(device: str, quick: bool) -> Iterator[Row]:
    """The whole step of two CIFAR-10 recipes, with our loss and with the eager one of the specification in its place.

    A CPU takes them at a quarter of the width and of the batch; `quick` is smaller still. Half the steps of a form come
    before the other's. The loss's own rows carry the errors.
    """
    smaller: dict[str, Any] = {} if device == "cuda" else {"width": 16, "batch_size": 128}
    if quick:
        smaller = {"width": 8, "batch_size": 32}
    steps = 4 if quick else 50 if device == "cuda" else 8
    for loss in ("nonl", "scl"):
        config = configure(recipe=f"cifar10-{loss}", **smaller)
        forms = {"eager": "reference", "ours": "auto"}
        ranks = Ranks(0, 1, torch.device(device))
        pictures = 4 * config.batch_size
        trainings = {
            form: Training(dataclasses.replace(config, backend=backend), pictures, ranks)
            for form, backend in forms.items()
        }
        times: dict[str, list[float]] = {form: [] for form in forms}
        for training in trainings.values():
            training.whole(2)
        for _, (form, training) in itertools.product(range(TURNS), trainings.items()):
            times[form] += training.whole(steps // TURNS)
        for form, training in trainings.items():
            n, k, d = training.shape
            p20, _, _, p80 = statistics.quantiles(times[form], n=5, method="inclusive")
            yield Row(
                op="step", form=form, n=n, k=k, d=d, dtype="bfloat16" if device == "cuda" else "float32",
                temperature=config.temperature, fwd_bwd_ms=round(statistics.median(times[form]), 4),
                fwd_bwd_p20=round(p20, 4), fwd_bwd_p80=round(p80, 4),
                fwd_bwd_ratio=round(ratio(times[form], times["ours"]), 4),
                rounds=steps, **record.environment(device),
            )  # fmt: skip


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--losses", nargs="+", default=["nonl", "scl", "ce"], choices=LOSSES, help="of cifar10-LOSS")
    chosen.add_argument("--recipe", nargs="+", default=[], help="any others of the driver's")
    parser.add_argument("--pictures", type=at_least(2), help="in the training set (default: the data set's)")
    parser.add_argument("--steps", type=at_least(TURNS), default=20, help="measured of every way (default: 20)")
    parser.add_argument("--output", type=Path, help="CSV file of the shares")
    for name, kind in (("batch-size", int), ("width", int), ("cpu-ranks", int), ("gpus", int), ("compile", str)):
        parser.add_argument(f"--{name}", type=kind, help="as of hypercontrast.train (default: the recipe's)")


@dataclass(frozen=True)
class _Order:
    """What every rank is told."""

    recipes: Sequence[str]
    pictures: int | None
    steps: int
    options: dict[str, Any]
    output: Path | None


def run(args: argparse.Namespace) -> int:
    names = ("batch_size", "width", "cpu_ranks", "gpus", "compile")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipes = args.recipe or [f"cifar10-{loss}" for loss in args.losses]
    order = _Order(recipes, args.pictures, args.steps, options, args.output)
    configs = [configure(recipe=recipe, **options) for recipe in recipes]
    for config in configs:
        check_hardware(config)
        check_model(config.model, config.width)
    if args.output is not None:
        writable(args.output)
    try:
        if configs[0].ranks > 1 and not is_rank():
            start_ranks(configs[0].ranks, _on_rank, order)
        else:
            _on_rank(order)
    except RankError as error:
        return fail_for(error, {"UsageError": 2})
    return 0


def _on_rank(order: _Order) -> None:
    with joined(configure(recipe=order.recipes[0], **order.options)) as ranks:
        if ranks.rank == 0 and order.output is not None:
            order.output.write_text("")
        for place, recipe in enumerate(order.recipes):
            found = measure(recipe, order.pictures, order.steps, ranks, **order.options).flat()
            if ranks.rank == 0:
                _show(found, first=place == 0)
                if order.output is not None:
                    record.append(order.output, found)


def _show(last: dict[str, Any], first: bool) -> None:
    """A line of a table, under its head if it is the first."""
    shares = (*PARTS, "communication", "rest")
    if first:
        print(f"# {last['device']}, {last['ranks']} ranks, torch {torch.__version__}, commit {record.commit()}")
        head = ("recipe", "n", "K", "D", "step ms", *shares, "pictures/s", "s an epoch")
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    cells = [last["recipe"], last["n"], last["k"], last["d"], f"{last['step_ms']:.4g}"]
    cells += [f"{last[name]:.1%}" for name in shares]
    cells += [f"{last['pictures_per_s']:.4g}", f"{last['epoch_s']:.4g}"]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
