"""Linear transfer: what a run's frozen features are worth on other data sets (arXiv 2605.20302, table 4).

    python -m hypercontrast.transfer RUN [--datasets food101 cifar10 ...] [--data-root DIR] [--workers N] ...

RUN is a folder that `hypercontrast.train` wrote, finished or not: its newest intact checkpoint is taken. The values are
written to RUN/transfer.json as they come. Every data set that is there is evaluated, the others are named as missing.

Protocol, linear evaluation as is usual since Kornblith et al. 2019:
- Features are the backbone's, before neck or projection. Pictures come as the run's validation pictures did, shorter
  side scaled and middle cut out, at its size and normalised by its mean and standard deviation; no augmentation.
- Features are centred and divided by one number, the root of their mean variance over the training set. Losses on the
  sphere leave the features' scale open, and the grid of strengths below must mean the same for every run. One number
  for all dimensions leaves their geometry alone: the optimum is one of the raw features, at another strength.
- Multinomial logistic regression, mean cross-entropy + l2/2·|W|², by L-BFGS. The strength l2 comes from a grid of half
  powers of ten, 10 to 10⁻⁶, by the data set's own metric on a fifth of every class held out of the training set; each
  fit starts from the one before. Then all training pictures are fitted with the strength chosen.
- Top-1 accuracy; the mean over classes of their accuracies for pets and flowers; for voc2007 one logistic regression of
  every class against the rest and the mean of their average precisions, see `mean_average_precision`.

The paper gives the data sets and the mean average precision for voc2007, but in the material at hand neither the grid
and the held-out part, nor whether pets and flowers are averaged over classes, nor how precision is interpolated (VOC
2007's own rule takes 11 points; here nothing is). These choices are ours.

Shapes: N samples, K classes, D dimensions.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypercontrast.checkpoint import CheckpointError
from hypercontrast.config import Config, UsageError, run_config
from hypercontrast.data import Pictures
from hypercontrast.data.transfer import TransferSet, locate
from hypercontrast.frozen import FrozenRun, restored_network
from hypercontrast.launch import Ranks, device_of
from hypercontrast.models import LinearHead
from hypercontrast.objective import TrainingError
from hypercontrast.output import say
from hypercontrast.probes import fit_features
from hypercontrast.progress import Parser, Progress, command, fail, to_json
from hypercontrast.records import check_writable, read_record, write_record
from hypercontrast.workspace import EVALUATION_BATCH

STRENGTHS = tuple(10 ** (power / 2) for power in range(2, -13, -1))
FOLD = 5  # one of so many pictures of a class is held out
RESULT = "transfer.json"
COLUMNS = ("data set", "metric", "value", "l2", "train", "test", "damaged")

Load = Callable[..., TransferSet]  # load(limit, size=, channels=, workers=), as of `hypercontrast.data.transfer`
Metric = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Options:
    """What to evaluate; the flags of the command line."""

    run: str
    datasets: tuple[str, ...] = ()  # none: all that are there
    data_root: str = ""
    workers: int = Config.workers
    limit: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "limit"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be at least 0, got {getattr(self, name)}")
        if unknown := [name for name in self.datasets if name not in METRICS]:
            raise UsageError(f"datasets must be among {', '.join(METRICS)}, got {unknown[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for a mistake in the call or a damaged run, 1 for a failure, 130 if
    interrupted.
    """
    try:
        options, as_json = _parse(argv)
        record = transfer(options)
    except (UsageError, CheckpointError) as error:
        return fail(2, str(error))
    except TrainingError as error:
        return fail(1, str(error))
    except KeyboardInterrupt:
        return fail(130, f"interrupted; the data sets that were finished are in {RESULT}")
    if as_json:
        say(to_json(record))
    elif options.quiet:
        say(table(record))
    return 0


def transfer(options: Options) -> dict[str, Any]:
    """Evaluate a run on other data sets, print a line for each unless `quiet`, and write RUN/transfer.json after each.

    Returns what was written.

    Keys: epoch (of the checkpoint) and results, a dict from the data set's name to metric, value (a share of 1), l2
    (the strength chosen), train, test (pictures used) and damaged (pictures left out, for they cannot be decoded).
    Results that the file holds already are kept if they are of the same epoch, and replaced where evaluated again.

    Raises UsageError if the run or the data sets cannot be used, CheckpointError if the run has no intact checkpoint,
    TrainingError if its features are not finite.
    """
    config = run_config(options.run)
    loaders, missing = _located(options, options.data_root or config.data_root)
    check_writable(Path(options.run, RESULT))
    frozen = restored_network(options.run, device_of(dataclasses.replace(config, gpus=0, cpu_ranks=0)))
    record: dict[str, Any] = {"epoch": frozen.epoch, "results": _earlier(options.run, frozen.epoch)}
    shape = {"size": frozen.image_size, "channels": frozen.channels}
    with Progress(silent=options.quiet) as progress:
        for name, reason in missing.items():
            progress.say(f"{name} is missing: {reason}")
        progress.say(_row(COLUMNS))
        for name, load in loaders.items():
            progress.begin(name)
            result = evaluated(name, load(options.limit, **shape, workers=options.workers), frozen)
            # Another call may have written in the meantime.
            record["results"] = _earlier(options.run, frozen.epoch) | {name: result}
            write_record(Path(options.run, RESULT), record)
            progress.say(_result_row(name, result))
    return record


def evaluated(name: str, pictures: TransferSet, frozen: FrozenRun) -> dict[str, Any]:
    """The result of one data set."""
    metric, score = METRICS[name]
    targets = pictures.targets or (pictures.train.labels, pictures.test.labels)
    train, train_targets = _embedded(name, pictures.train, targets[0], frozen)
    test, test_targets = _embedded(name, pictures.test, targets[1], frozen)
    centre, scale = train.mean(0), train.var(0, correction=0).mean().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # a backbone that gives one answer to everything
    train, test = (train - centre) / scale, (test - centre) / scale

    l2, probe = chosen_strength(train, train_targets, len(pictures.class_names), score)
    fit_features(probe, train, train_targets, _alone(train), ridge=l2)
    with torch.no_grad():
        value = score(probe(test), test_targets)
    damaged = len(pictures.train) + len(pictures.test) - len(train) - len(test)
    return {"metric": metric, "value": value, "l2": l2, "train": len(train), "test": len(test), "damaged": damaged}


def chosen_strength(features: Tensor, targets: Tensor, num_classes: int, score: Metric) -> tuple[float, LinearHead]:
    """The strength that does best on the held-out part, the larger one of equals, and the probe fitted with it.

    Raises UsageError if there is nothing to hold out.
    """
    held = held_out(targets)
    if not held.any():
        raise UsageError(f"the training set must hold two pictures at least, got {len(targets)}")
    probe = LinearHead(features.shape[1], num_classes).to(features.device)
    for parameter in probe.parameters():
        nn.init.zeros_(parameter)
    rest, rest_targets = features[~held], targets[~held]
    best, l2, chosen = -1.0, STRENGTHS[0], probe
    for strength in STRENGTHS:
        fit_features(probe, rest, rest_targets, _alone(rest), ridge=strength)
        with torch.no_grad():
            value = score(probe(features[held]), targets[held])
        if value > best:
            best, l2, chosen = value, strength, copy.deepcopy(probe)
    return l2, chosen


def held_out(targets: Tensor) -> Tensor:
    """[N] bool: a fifth of every class, or of all samples where one can be of several; by chance, always the same."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(targets), generator=generator).to(targets.device)
    if targets.ndim == 1:
        order = order[targets[order].argsort(stable=True)]
    held = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    held[order[1::FOLD]] = True
    return held


# Metrics of logits [N, K] and targets.


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest logit is that of their label [N]."""
    return float((logits.argmax(1) == labels).double().mean())


def accuracy_per_class(logits: Tensor, labels: Tensor) -> float:
    """The mean over the classes among the labels [N] of the accuracy on their samples."""
    size = logits.shape[1]
    counts = torch.bincount(labels, minlength=size)
    hits = torch.bincount(labels[logits.argmax(1) == labels], minlength=size)
    return float((hits / counts.double())[counts > 0].mean())


def mean_average_precision(logits: Tensor, targets: Tensor) -> float:
    """The mean of `average_precision` over classes; targets [N, K] are 1, 0 or NaN, which leaves the sample out.

    A class without positives has no recall and is left out of the mean. Raises UsageError if all are.
    """
    values = []
    for scores, wanted in zip(logits.T, targets.T, strict=True):
        known = ~wanted.isnan()
        if (wanted > 0).any():
            values.append(average_precision(scores[known], wanted[known] > 0))
    if not values:
        raise UsageError(f"targets must hold a positive of one class at least, got none of {targets.shape[1]}")
    return sum(values) / len(values)


def average_precision(scores: Tensor, positives: Tensor) -> float:
    """Σ (R_n − R_{n−1})·P_n over the thresholds that are a score [N], without interpolation; 0 without positives.

    Recall R_n and precision P_n are of all samples at or above the n-th largest score: equal scores are one threshold.
    Equals scikit-learn's `average_precision_score`.
    """
    order = scores.argsort(descending=True)
    scores, hits = scores[order], positives[order].double().cumsum(0)
    last_of_equals = torch.cat([scores[1:] != scores[:-1], positives.new_ones(1)])
    ranks = torch.arange(1, len(scores) + 1, device=scores.device)[last_of_equals]
    hits = hits[last_of_equals]
    recalled = hits.diff(prepend=hits.new_zeros(1))
    return float((recalled * hits / ranks).sum() / hits[-1].clamp_min(1))


# What the paper's table 4 has, in its order. How each is scored: its name and the function.
METRICS: dict[str, tuple[str, Metric]] = {
    "food101": ("top-1", accuracy),
    "cifar10": ("top-1", accuracy),
    "cifar100": ("top-1", accuracy),
    "cars": ("top-1", accuracy),
    "dtd": ("top-1", accuracy),
    "pets": ("mean per class", accuracy_per_class),
    "flowers": ("mean per class", accuracy_per_class),
    "voc2007": ("mAP", mean_average_precision),
}


def _located(options: Options, root: str) -> tuple[dict[str, Load], dict[str, str]]:
    """What loads each data set, and why others are missing. Those that were asked for by name must be there."""
    loaders, missing = {}, {}
    for name in options.datasets or METRICS:
        try:
            loaders[name] = locate(name, root)
        except UsageError as error:
            if options.datasets:
                raise
            missing[name] = str(error)
    if not loaders:
        raise UsageError(f"data_root must hold one of {', '.join(missing)}, got none ({next(iter(missing.values()))})")
    return loaders, missing


def _embedded(name: str, pictures: Pictures, targets: Tensor, frozen: FrozenRun) -> tuple[Tensor, Tensor]:
    """Features [n, D] and targets of the pictures that are intact."""
    device = frozen.mean.device
    pictures, targets = pictures.to(device), targets.to(device)
    order = torch.arange(len(pictures), device=device)
    features, places = [], []
    for batch in pictures.plain(order.split(EVALUATION_BATCH[device.type])):
        features.append(frozen.features(batch.pixels))
        places.append(batch.indices)
    embedded = torch.cat(features)
    if not embedded.isfinite().all():
        raise TrainingError(f"features of {name} must be finite, got some that are not: the run has diverged")
    return embedded, targets[torch.cat(places)]


def _alone(features: Tensor) -> Ranks:
    return Ranks(0, 1, features.device)


def _earlier(run: str, epoch: int) -> dict[str, Any]:
    """Results that the run's file holds of this epoch."""
    found, results = read_record(Path(run, RESULT), _parsed) or (epoch, {})
    return results if found == epoch else {}


def _parsed(record: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Epoch and results of a record."""
    for name, result in record["results"].items():
        _result_row(name, result)  # which fails where something is missing
    return record["epoch"], record["results"]


def table(record: Mapping[str, Any]) -> str:
    """The results in aligned columns, a line a data set."""
    return "\n".join([_row(COLUMNS), *(_result_row(name, result) for name, result in record["results"].items())])


def _result_row(name: str, result: Mapping[str, Any]) -> str:
    counts = (str(result[key]) for key in ("train", "test", "damaged"))
    return _row((name, result["metric"], f"{result['value']:.2%}", f"{result['l2']:.1e}", *counts))


def _row(cells: Sequence[str]) -> str:
    return "{:<9} {:<15} {:>8} {:>9} {:>7} {:>7} {:>8}".format(*cells)


def parser() -> Parser:
    parser = Parser(
        prog=command("transfer"),
        description="Linear transfer of a frozen run to other data sets. Nothing is downloaded.",
    )
    parser.add_argument("run", metavar="RUN", help="folder written by hypercontrast.train")
    parser.add_argument(
        "--datasets",
        nargs="+",
        default=(),
        metavar="NAME",
        help=f"of {', '.join(METRICS)}; by default all that are there",
    )
    parser.add_argument("--data-root", default="", help="where the data sets are; by default where the run's was")
    parser.add_argument(
        "--workers", type=int, default=Options.workers, help="processes that decode pictures; 0 decodes in this one"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="use at most this many training and this many test pictures; 0 for all"
    )
    parser.add_output_flags()
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[Options, bool]:
    """The options, and whether the result is wanted as JSON."""
    args, as_json = parser().parse_with_output(argv)
    return Options(datasets=tuple(args.pop("datasets")), **args), as_json


if __name__ == "__main__":
    sys.exit(main())
