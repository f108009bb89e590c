"""What the frozen features of a run are worth: fixed prototypes against trained probes, in one table.

    python -m hypercontrast.evaluate RUN [--head] [--prototypes] [--linear-probe] [--normalized-probe] [--nc] ...

Methods
- trained head: what the run itself learned to classify by; scl learns none.
- fixed prototypes: class means of the training set, one pass, no training; the nearest by cosine classifies. In the
  space the losses see: after scl's projection, or after the neck.
- linear probe: a linear classifier on the backbone's features, the usual protocol.
- normalised probe: the same with cosine logits at the run's temperature.
- averaged prototypes: fixed prototypes as the paper's public code has them, an exponential average over the augmented,
  full batches of one rank; only when asked for.

RUN is a folder that `hypercontrast.train` wrote, finished or not: its newest intact checkpoint is taken, and its
pictures and limit. The table is also written to RUN/evaluation.json, with every neural-collapse metric, beside what
earlier calls measured on the same checkpoint.

Shapes: N samples, K classes, D dimensions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypercontrast.checkpoint import CheckpointError
from hypercontrast.config import Config, UsageError
from hypercontrast.data import AUGMENTATIONS, Share, epoch_batches, steps_per_epoch
from hypercontrast.launch import RankError, fail_for, is_main, is_rank, joined, start_ranks
from hypercontrast.metrics import NeuralCollapse
from hypercontrast.models import LinearHead
from hypercontrast.objective import TrainingError
from hypercontrast.output import say
from hypercontrast.probes import CosineProbe, Probe, ProbeSettings, fit_probe, train_probe
from hypercontrast.progress import Parser, Progress, aligned, command, fail, to_json, working
from hypercontrast.prototypes import ClassMeans, PrototypeClassifier
from hypercontrast.records import check_writable, read_record, write_record
from hypercontrast.workspace import Embedded, Workspace, restored, runnable_config

METHODS = {
    "head": "trained head",
    "prototypes": "fixed prototypes",
    "linear-probe": "linear probe",
    "normalized-probe": "normalised probe",
    "averaged-prototypes": "averaged prototypes",
}
# The columns of the paper's table 3.
NC_COLUMNS = {
    "intra_erank": "intra",
    "inter_erank": "inter",
    "weight_erank": "W erank",
    "weight_alignment": "weight",
    "instance_alignment": "instance",
    "mir": "MIR",
    "hdr": "HDR",
}
# A probe's training is the paper's on CIFAR, 100 epochs at a learning rate of 5 with batches of 512. Runs shorter than
# that get shorter probes, and smaller batches a learning rate in proportion.
MOST_EPOCHS, LEAST_EPOCHS = 100, 20
LR_PER_PICTURE = 5 / 512
# On ImageNet the learning rate and the epochs after which it falls are others, out of 90.
IMAGENET_LR = {"imagenet100": 2.0, "imagenet1k": 0.8}
IMAGENET_EPOCHS, IMAGENET_MILESTONES = 90, (30 / 90, 60 / 90, 80 / 90)
PROBES = ("linear-probe", "normalized-probe")
RESULT = "evaluation.json"


@dataclass(frozen=True)
class Options:
    """What to evaluate and how; the flags of the command line."""

    run: str
    methods: tuple[str, ...] = ()  # empty for all that the run has, but for averaged prototypes
    nc: bool = True
    cached: bool = False
    epochs: int = 0  # of a probe; 0 chooses by the run's
    lr: float = 0.0  # of a probe; 0 chooses by the batch size
    data_root: str = ""
    gpus: int = 0
    cpu_ranks: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
            if self.cached and getattr(self, name):
                raise UsageError(f"{name} must be 0 with cached, whose solver has none, got {getattr(self, name)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for a mistake in the call or a damaged run, 1 for a failure, 130 if
    interrupted.
    """
    try:
        options, as_json = _parse(argv)
        record = evaluate(options)
    except (UsageError, CheckpointError) as error:
        return fail(2, str(error))
    except TrainingError as error:
        return fail(1, str(error))
    except RankError as error:
        return fail_for(error, {"UsageError": 2, "CheckpointError": 2, "TrainingError": 1})
    except KeyboardInterrupt:
        return fail(130, "interrupted; nothing was written")
    if is_main():
        say(to_json(record) if as_json else table(record))
    return 0


def evaluate(options: Options) -> dict[str, Any]:
    """Evaluate a run and write RUN/evaluation.json; returns what was measured.

    The file keeps what earlier calls measured by other methods, where epoch, device and ranks are the same; results of
    probes, where these were trained alike.

    Keys: epoch (of the checkpoint), device, ranks, probe (how the probes were trained) and results, a list with
    method, features ("backbone" or "head"), dim, accuracy (share of 1, on the validation set), seconds (to make the
    classifier, without reading the data and without validation), share_of_linear_probe (of its seconds, if it was
    run too), nc (every metric of `NeuralCollapse`, on the training set as it is) and nc_compat (the same as the paper's
    public code computes them).

    Raises UsageError if the run cannot be evaluated here, CheckpointError if it has no intact checkpoint,
    TrainingError if a probe diverges, RankError if a rank fails.
    """
    config = runnable_config(options.run, options.data_root, options.gpus, options.cpu_ranks)
    methods = _methods(options, config)
    if is_main():
        check_writable(Path(options.run, RESULT))
    read_record(Path(options.run, RESULT), _by_method)  # before hours go into what could not be added to it
    if config.ranks > 1 and not is_rank():
        start_ranks(config.ranks, _evaluate_rank, options)
        record = json.loads(Path(options.run, RESULT).read_text(encoding="utf-8"))
        kept = () if options.nc else ("nc", "nc_compat")  # which an earlier call may have left there
        mine = [result for result in record["results"] if result["method"] in methods]
        return record | {"results": [{k: v for k, v in result.items() if k not in kept} for result in mine]}
    with joined(config) as ranks:
        with working(f"reading {config.dataset}", silent=options.quiet or not is_main()):
            workspace, epoch = restored(options.run, config, ranks)
        record = _evaluated(methods, options, config, workspace, epoch)
        if ranks.rank == 0:  # another call may have written in the meantime
            earlier = read_record(Path(options.run, RESULT), _by_method)
            write_record(Path(options.run, RESULT), _merged(earlier, record))
        return record


def _evaluate_rank(options: Options) -> None:
    evaluate(options)


def _methods(options: Options, config: Config) -> tuple[str, ...]:
    has_head = config.loss != "scl"
    if "head" in options.methods and not has_head:
        raise UsageError("method head needs a run that trained one, got loss scl: take --prototypes")
    all_of_run = (name for name in METHODS if name != "averaged-prototypes" and (name != "head" or has_head))
    return options.methods or tuple(all_of_run)


def _by_method(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its results as a mapping."""
    for result in record["results"]:
        _row(result)  # which fails where something is missing
    results = {result["method"]: result for result in record["results"]}
    return {key: record[key] for key in ("epoch", "device", "ranks", "probe")} | {"results": results}


def _merged(earlier: Mapping[str, Any] | None, record: dict[str, Any]) -> dict[str, Any]:
    """The record, with earlier results of the same checkpoint that still hold."""
    if earlier is None or any(earlier[key] != record[key] for key in ("epoch", "device", "ranks")):
        return record
    new, old = {result["method"]: result for result in record["results"]}, earlier["results"]
    probe = record["probe"]
    if not any(method in new for method in PROBES):
        probe = earlier["probe"]
    elif earlier["probe"] != probe:
        old = {method: result for method, result in old.items() if method not in PROBES}
    results = [old.get(method, {}) | new.get(method, {}) for method in METHODS if method in old or method in new]
    return record | {"probe": probe, "results": _with_shares(results)}


def _with_shares(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results, each with its share of the seconds of the linear probe among them."""
    linear = next((result["seconds"] for result in results if result["method"] == "linear-probe"), None)
    return [result | {"share_of_linear_probe": linear and result["seconds"] / linear} for result in results]


def _evaluated(
    methods: Sequence[str], options: Options, config: Config, workspace: Workspace, epoch: int
) -> dict[str, Any]:
    settings = _probe_settings(options, config)
    torch.optim.SGD([torch.zeros(1)])  # a process's first optimiser imports for seconds: no method's business
    results: list[dict[str, Any]] = []
    classifiers = []
    steps = steps_per_epoch(len(workspace.dataset.train), settings.batch_size)
    with Progress(settings.epochs, steps, silent=options.quiet or not is_main()) as progress:
        progress.begin("features of the validation set")
        validation = list(workspace.embedded(workspace.dataset.validation))
        dim = validation[0].backbone.shape[1]
        for method in methods:
            progress.begin(METHODS[method])
            started = time.perf_counter()
            made = _make(method, config, workspace, dim, None if options.cached else settings, progress)
            if workspace.ranks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            classifiers.append(made)
            results.append(
                {
                    "method": method,
                    "features": made.features,
                    "dim": made.prototypes.shape[1],
                    "accuracy": _accuracy(made, validation, workspace),
                    "seconds": seconds,
                }
            )
        progress.begin("neural-collapse metrics")
        collapse = _collapse(classifiers, workspace) if options.nc else []
    results = _with_shares(results)
    if options.nc:
        for result, (nc, compat) in zip(results, collapse, strict=True):
            result |= {"nc": nc, "nc_compat": compat}
    return {
        "epoch": epoch,
        "device": workspace.ranks.device.type,
        "ranks": workspace.ranks.world,
        "probe": "L-BFGS on kept features" if options.cached else dataclasses.asdict(settings),
        "results": results,
    }


def _probe_settings(options: Options, config: Config) -> ProbeSettings:
    imagenet = config.dataset in IMAGENET_LR
    epochs = min(max(config.epochs, LEAST_EPOCHS), IMAGENET_EPOCHS if imagenet else MOST_EPOCHS)
    lr = IMAGENET_LR[config.dataset] if imagenet else LR_PER_PICTURE * config.batch_size
    return ProbeSettings(
        epochs=options.epochs or epochs,
        lr=options.lr or lr,
        batch_size=config.batch_size,
        seed=config.seed,
        milestones=IMAGENET_MILESTONES if imagenet else ProbeSettings.milestones,
    )


@dataclass(frozen=True)
class Made:
    """A classifier, from features to scores, which features of `Embedded` it takes, and the rows of its weights."""

    features: str
    classifier: Callable[[Tensor], Tensor]
    prototypes: Tensor


def _make(
    method: str, config: Config, workspace: Workspace, dim: int, settings: ProbeSettings | None, progress: Progress
) -> Made:
    """Train by `settings`, or without them fit on kept features."""
    if method == "head":
        return Made("head", workspace.network.scores, workspace.network.head.prototypes)
    if method in ("prototypes", "averaged-prototypes"):
        means = class_means(workspace) if method == "prototypes" else averaged_means(workspace, config)
        return Made("head", PrototypeClassifier(means), means)
    torch.manual_seed(config.seed)  # all ranks start alike
    num_classes = workspace.dataset.num_classes
    probe: Probe = (
        LinearHead(dim, num_classes) if method == "linear-probe" else CosineProbe(dim, num_classes, config.temperature)
    ).to(workspace.ranks.device)
    if settings is None:
        fit_probe(probe, workspace)
    else:
        train_probe(probe, workspace, settings, progress)
    return Made("backbone", probe, probe.prototypes)


@torch.no_grad()
def class_means(workspace: Workspace) -> Tensor:
    """The fixed prototypes [K, D]: unit class means of the whole training set, in one pass, over all ranks."""
    means = ClassMeans(*workspace.network.head.prototypes.shape).to(workspace.ranks.device)
    for batch in workspace.embedded(workspace.dataset.train):
        means.update(batch.head, batch.labels)
    if workspace.ranks.world > 1:
        means.all_reduce()
    return means.prototypes()


@torch.no_grad()
def averaged_means(workspace: Workspace, config: Config) -> Tensor:
    """Fixed prototypes [K, D] as the paper's public code makes them, for comparison: see the module's text.

    Of several ranks all average the first one's batches: a run has one classifier.
    """
    train, ranks = workspace.dataset.train, workspace.ranks
    means = ClassMeans(*workspace.network.head.prototypes.shape, mode="ema").to(ranks.device)
    full = [
        indices
        for indices in torch.arange(len(train), device=ranks.device).split(config.batch_size)
        if len(indices) == min(config.batch_size, len(train))
    ]
    order = torch.cat([share.indices for share in epoch_batches(train.labels, len(train), seed=config.seed, epoch=0)])
    shares = [Share(order[places], places, len(places)) for places in full[:: ranks.world]]
    workspace.network.eval()
    for batch in train.views(shares, AUGMENTATIONS[workspace.dataset.augmentation], [config.seed]):
        means.update(workspace.embed(workspace.normalized(batch.pixels), batch.labels).head, batch.labels)
    return means.prototypes()


@torch.no_grad()
def _accuracy(made: Made, validation: Sequence[Embedded], workspace: Workspace) -> float:
    counts = torch.zeros(2, dtype=torch.int64, device=workspace.ranks.device)
    for batch in validation:
        chosen = torch.stack([made.classifier(getattr(batch, made.features)).argmax(1), batch.labels])
        counts += (chosen == batch.labels).sum(1)
    right, seen = workspace.ranks.sum(counts).tolist()
    return right / seen


def _collapse(made: Sequence[Made], workspace: Workspace) -> list[tuple[dict[str, float], dict[str, float]]]:
    """The metrics of the training set's features as they are, with each classifier's weights as prototypes: ours, and
    the public code's.
    """
    dims = {m.features: m.prototypes.shape for m in made}
    metrics = {name: NeuralCollapse(*shape, device=workspace.ranks.device) for name, shape in dims.items()}
    for batch in workspace.embedded(workspace.dataset.train):
        for name, metric in metrics.items():
            metric.update(getattr(batch, name), batch.labels)
    if workspace.ranks.world > 1:
        for metric in metrics.values():
            metric.all_reduce()
    results = []
    for m in made:
        metric = metrics[m.features]
        both = []
        for metric.compat in (False, True):
            both.append(metric.compute(m.prototypes.detach()))
        results.append((both[0], both[1]))
    return results


def table(record: dict[str, Any]) -> str:
    """The results in aligned columns, one line a method."""
    rows = [_row(result) for result in record["results"]]
    header = ("method", "features", "top-1", "seconds", "of linear", *NC_COLUMNS.values())[: len(rows[0])]
    return aligned([header, *rows], range(2, len(header)))


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    share = result["share_of_linear_probe"]
    return (
        METHODS[result["method"]],
        f"{result['features']}, D = {result['dim']}",
        f"{result['accuracy']:.2%}",
        f"{result['seconds']:.2f}",
        "–" if share is None else f"{share:.1%}",
        *(f"{result['nc'][key]:.3f}" for key in NC_COLUMNS if "nc" in result),
    )


def parser() -> Parser:
    parser = Parser(
        prog=command("evaluate"),
        description="Fixed prototypes against trained probes on a frozen run. Without methods: all it has, and --nc.",
    )
    parser.add_argument("run", metavar="RUN", help="folder written by hypercontrast.train")
    for name, title in METHODS.items():
        parser.add_argument(f"--{name}", dest="methods", action="append_const", const=name, help=f"the {title}")
    parser.add_argument("--nc", action="store_true", help="neural-collapse metrics with each classifier's weights")
    parser.add_argument(
        "--cached",
        action="store_true",
        help="fit the probes by L-BFGS on features computed once: faster than SGD, without --epochs and --lr",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=0,
        help=f"of a probe; 0 takes as many as the run had, within {LEAST_EPOCHS} to {MOST_EPOCHS}"
        f" (ImageNet: {IMAGENET_EPOCHS})",
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=0.0,
        help="of a probe, at its start; 0 takes 5 per 512 pictures of a batch"
        f" ({' and '.join(f'{name}: {lr:g}' for name, lr in IMAGENET_LR.items())})",
    )
    parser.add_argument("--data-root", default="", help="where the data is now; by default where the run had it")
    parser.add_argument("--gpus", type=int, default=0, help="0 takes one if there is one, else the CPU")
    parser.add_argument("--cpu-ranks", type=int, default=0, help="ranks on the CPU; 0 leaves the choice to --gpus")
    parser.add_output_flags()
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[Options, bool]:
    """The options, and whether the result is wanted as JSON."""
    args, as_json = parser().parse_with_output(argv)
    named = args.pop("methods")
    args["nc"] |= named is None
    return Options(methods=tuple(name for name in METHODS if named and name in named), **args), as_json


if __name__ == "__main__":
    sys.exit(main())
