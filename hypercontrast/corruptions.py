"""How a run holds up when its pictures are corrupted: its error at each corruption and severity, and the mCE.

    python -m hypercontrast.corruptions RUN [--source imagenet-c|generated] [--reference RUN] [--corruptions ...] ...

With E_cs the top-1 error under corruption c at severity s (Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261)
    CE_c = Σ_s E_cs / Σ_s E_cs of a reference,    mCE = the mean of CE_c over the 15 corruptions,    both in percent.

Sources
- imagenet-c: the published pictures, for runs on ImageNet or some of its classes. The reference is AlexNet.
- generated: the run's own validation pictures, corrupted by the package imagecorruptions-imaug. The strength of some
  corruptions is meant for pictures of 224 pixels, and small ones suffer more from them, so the errors compare only with
  those of other runs on the same pictures. The reference is such a run, e.g. one of cross-entropy.

RUN is a folder that `hypercontrast.train` wrote, finished or not: its newest intact checkpoint is taken, and its own
classifier. RUN/corruptions.json is written after every corruption, and keeps what earlier calls measured of the same
epoch on the same pictures: after one that was cut short, ask for the --corruptions that it lacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hypercontrast.checkpoint import CheckpointError
from hypercontrast.config import UsageError
from hypercontrast.data.corrupted import (
    BATCH,
    CORRUPTIONS,
    SEVERITIES,
    Batch,
    Generated,
    ImageNetC,
    Source,
    uncorrupted,
)
from hypercontrast.data.dataset import Dataset, Pictures, limited_order
from hypercontrast.launch import Ranks, device_of
from hypercontrast.output import say
from hypercontrast.progress import Parser, Progress, command, fail, to_json, working
from hypercontrast.records import check_writable, read_record, write_record
from hypercontrast.workspace import Workspace, restored, runnable_config

# AlexNet's top-1 errors on ImageNet-C, averaged over the severities, as the benchmark's authors
# publish them (github.com/hendrycks/robustness).
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
ALEXNET_CLASSES = 1000
SOURCES = ("imagenet-c", "generated")
RESULT = "corruptions.json"
# What two records must agree in to be measured on the same pictures.
SAME_PICTURES = ("source", "dataset", "classes", "pictures")

Errors = Mapping[str, Sequence[float | None]]  # of each corruption, by severity; None where not measured
HEADER = f"{'error at severity':17}" + "".join(f"{severity:8}" for severity in SEVERITIES) + f"{'CE':>8}"


@dataclass(frozen=True)
class Options:
    """What to measure and how; the flags of the command line."""

    run: str
    source: str = ""  # empty: imagenet-c for the data sets of that name, generated for any other
    data_root: str = ""
    reference: str = ""
    corruptions: tuple[str, ...] = CORRUPTIONS
    severities: tuple[int, ...] = SEVERITIES
    limit: int = 0
    workers: int = os.cpu_count() or 1
    quiet: bool = False

    def __post_init__(self) -> None:
        if not (self.corruptions and self.severities):
            raise UsageError("corruptions and severities must name at least one each, got none")
        for name, known, given in (
            ("source", SOURCES, (self.source,) if self.source else ()),
            ("corruptions", CORRUPTIONS, self.corruptions),
            ("severities", SEVERITIES, self.severities),
        ):
            if strangers := [item for item in given if item not in known]:
                raise UsageError(f"{name} must be among {', '.join(map(str, known))}, got {strangers[0]!r}")
        for name, least in (("limit", 0), ("workers", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for a mistake in the call or a damaged run, 1 for a failure, 130 if
    interrupted.
    """
    try:
        options, as_json = _parse(argv)
        record = measure(options)
    except (UsageError, CheckpointError) as error:
        return fail(2, str(error))
    except BrokenProcessPool:
        return fail(1, "a process that corrupts pictures was killed, perhaps for its memory: try fewer --workers")
    except KeyboardInterrupt:
        return fail(130, "interrupted; the corruptions measured to their end are kept")
    say(to_json(record) if as_json else summary(record))
    return 0


def measure(options: Options) -> dict[str, Any]:
    """Measure a run under corruptions, print a line for each unless `quiet`, and write RUN/corruptions.json.

    Returns what was written.

    Keys: epoch (of the checkpoint), source, dataset (the run's), classes and pictures (of each corruption and
    severity), reference (AlexNet, a run's folder or None), clean_error (on as many validation pictures), errors (of
    each corruption, by severity; None where not measured), ce (of each corruption) and mce, in percent, as far as
    errors and reference allow, and damaged: the files that could not be read and were left out. Errors are shares of 1.

    Raises UsageError if that cannot be done here, CheckpointError if the run has no intact checkpoint,
    BrokenProcessPool if a process that corrupts pictures is killed.
    """
    config = runnable_config(options.run, options.data_root)
    check_writable(Path(options.run, RESULT))
    other = _measured(Path(options.reference)) if options.reference else None
    if options.reference and other is None:
        path = Path(options.reference, RESULT)
        raise UsageError(f"reference must be a run measured by hypercontrast.corruptions, got no {path}")
    with working(f"reading {config.dataset}", silent=options.quiet):
        workspace, epoch = restored(options.run, config, Ranks(0, 1, device_of(config)))
    kind = options.source or ("imagenet-c" if config.dataset.startswith("imagenet") else "generated")
    source = _source(kind, options, Path(config.data_root), workspace.dataset)
    record: dict[str, Any] = {
        "epoch": epoch,
        "source": kind,
        "dataset": config.dataset,
        "classes": workspace.dataset.num_classes,
        "pictures": source.pictures,
        "reference": options.reference or ("AlexNet" if kind == "imagenet-c" else None),
    }
    reference = _reference(record, other)
    errors, _ = _earlier(Path(options.run), record)
    steps = len(options.severities) * -(-source.pictures // BATCH)
    with source.pool, Progress(steps=steps, silent=options.quiet) as progress:
        progress.start("no corruption")
        record["clean_error"], _ = _error(_clean(workspace.dataset.validation, options.limit), workspace, progress)
        progress.say(HEADER)
        for corruption in CORRUPTIONS:
            if corruption in options.corruptions:
                progress.start(corruption)
                found = {s: _error(source.batches(corruption, s), workspace, progress) for s in options.severities}
                errors, damaged = _earlier(Path(options.run), record)  # another call may have written in the meantime
                by_severity = errors.setdefault(corruption, [None] * len(SEVERITIES))
                for severity, (error, lost) in found.items():
                    by_severity[severity - 1] = error
                    cell = f"{corruption}/{severity}/"
                    damaged = [name for name in damaged if not name.startswith(cell)] + lost
                ce = corruption_errors(errors, reference)
                record |= {"errors": errors, "ce": ce, "mce": mean_corruption_error(ce), "damaged": damaged}
                write_record(Path(options.run, RESULT), record)
            if corruption in errors:
                progress.say(row(corruption, errors[corruption], corruption_errors(errors, reference)))
    return record


def corruption_errors(errors: Errors, reference: Mapping[str, float]) -> dict[str, float]:
    """CE in percent, of every corruption that was measured at all severities and is in the reference.

    reference: the error of each corruption, averaged over the severities; above 0.
    """
    return {c: 100 * (mean / reference[c]) for c, mean in _means(errors).items() if c in reference}


def mean_corruption_error(ce: Mapping[str, float]) -> float | None:
    """The mCE from the CE of all 15 corruptions; None if one is lacking."""
    return sum(ce[c] for c in CORRUPTIONS) / len(CORRUPTIONS) if ce.keys() >= set(CORRUPTIONS) else None


def _means(errors: Errors) -> dict[str, float]:
    """Over the severities, where all of them were measured."""
    known = {c: [e for e in by_severity if e is not None] for c, by_severity in errors.items()}
    return {c: sum(e) / len(e) for c, e in known.items() if len(e) == len(SEVERITIES)}


def _source(kind: str, options: Options, data_root: Path, dataset: Dataset) -> Source:
    if kind == "generated":
        return Generated(dataset.validation, limit=options.limit, workers=options.workers)
    if (dataset.channels, dataset.image_size) != (3, ImageNetC.SIDE):
        shape = f"{dataset.channels} x {dataset.image_size} x {dataset.image_size}"
        raise UsageError(f"source imagenet-c needs a run on pictures of 3 x 224 x 224, got {shape}")
    return ImageNetC(
        data_root,
        dataset.class_names,
        options.corruptions,
        options.severities,
        limit=options.limit,
        workers=options.workers,
    )


def _clean(images: Pictures, limit: int) -> Iterator[Batch]:
    return (batch for batch, _ in uncorrupted(images, limited_order(images.labels.cpu(), limit)))


@torch.no_grad()
def _error(batches: Iterable[Batch], workspace: Workspace, progress: Progress) -> tuple[float, list[str]]:
    """The share of pictures that the run's own classifier gets wrong, and the files that were damaged."""
    network, device = workspace.network.eval(), workspace.ranks.device
    hits = count = 0
    damaged: list[str] = []
    for batch in batches:
        images = workspace.normalized(torch.from_numpy(batch.pixels).to(device))
        labels = torch.from_numpy(batch.labels).to(device)
        hits += int((network.scores(workspace.embed(images, labels).head).argmax(1) == labels).sum())
        count += len(labels)
        damaged += batch.damaged
        progress.step()
    if not count:
        raise UsageError(f"there must be pictures that can be read, got damaged ones alone: {', '.join(damaged[:3])}")
    return (count - hits) / count, damaged


# Records: this run's from earlier calls, and the reference's.


def _measured(run: Path) -> dict[str, Any] | None:
    """What earlier calls measured of a run; None if there were none."""
    rule = "must be as hypercontrast.corruptions wrote it: delete it to measure again"
    return read_record(run / RESULT, _intact, rule)


def _intact(record: dict[str, Any]) -> dict[str, Any]:
    """The record. Raises ValueError where its errors or names are none."""
    for key in ("epoch", *SAME_PICTURES):
        record[key]
    intact = [isinstance(record["pictures"], int), *(isinstance(name, str) for name in record["damaged"])]
    for by_severity in record["errors"].values():
        intact += [len(by_severity) == len(SEVERITIES), *(e is None or 0 <= e <= 1 for e in by_severity)]
    if not all(intact):
        raise ValueError
    return record


def _reference(record: Mapping[str, Any], other: Mapping[str, Any] | None) -> Mapping[str, float]:
    """What to divide by: errors averaged over the severities, of AlexNet or of another run on the same pictures."""
    if other is None:
        return ALEXNET if record["reference"] else {}
    for key in SAME_PICTURES:
        if other[key] != record[key]:
            raise UsageError(f"reference must have the same {key} as the run, {record[key]}, got {other[key]}")
    means = _means(other["errors"])
    if faultless := [corruption for corruption, mean in means.items() if mean == 0]:
        raise UsageError(f"reference must have an error to divide by, got none under {', '.join(faultless)}")
    return means


def _earlier(run: Path, record: Mapping[str, Any]) -> tuple[dict[str, list[float | None]], list[str]]:
    """Errors and damaged files that earlier calls found on the same pictures at the same epoch."""
    earlier = _measured(run)
    if earlier is None:
        return {}, []
    if all(earlier[key] == record[key] for key in ("epoch", *SAME_PICTURES)):
        return earlier["errors"], earlier["damaged"]
    replaces = earlier["source"] != record["source"] or earlier["pictures"] > record["pictures"]
    if earlier["epoch"] == record["epoch"] and replaces:
        raise UsageError(
            f"{run / RESULT} must be moved away first: it holds results on {earlier['pictures']} {earlier['source']}"
            f" pictures, and a measurement on {record['pictures']} {record['source']} ones would replace them"
        )
    return {}, []


# What is printed.


def row(corruption: str, by_severity: Sequence[float | None], ce: Mapping[str, float]) -> str:
    """A corruption's line below HEADER."""
    cells = [f"{'–':>8}" if error is None else f"{error:8.1%}" for error in by_severity]
    return f"{corruption:17}{''.join(cells)}" + (f"{ce[corruption]:8.1f}" if corruption in ce else f"{'–':>8}")


def summary(record: Mapping[str, Any]) -> str:
    """The mCE, or why there is none, and what to bear in mind."""
    known = [error for by_severity in record["errors"].values() for error in by_severity if error is not None]
    lines = [f"clean error {record['clean_error']:.1%}, under corruption {sum(known) / len(known):.1%} on average"]
    if record["mce"] is not None:
        lines.append(f"mCE {record['mce']:.1f} % (reference: {record['reference']})")
    elif record["reference"] is None:
        lines.append("no mCE: it needs a --reference, another run measured on the same pictures")
    else:
        lines.append(
            f"no mCE: it needs all {len(CORRUPTIONS)} corruptions at all {len(SEVERITIES)} severities, of the run and"
            f" of the reference, got {len(record['ce'])} of them"
        )
    if record["reference"] == "AlexNet" and record["classes"] != ALEXNET_CLASSES:
        lines.append(
            f"AlexNet's errors are over {ALEXNET_CLASSES} classes: the CE of runs on {record['classes']} compare with"
            " each other alone"
        )
    if record["damaged"]:
        some = ", ".join(record["damaged"][:3])
        lines.append(f"damaged and left out: {len(record['damaged'])}, such as {some}")
    return "\n".join(lines)


def parser() -> Parser:
    parser = Parser(
        prog=command("corruptions"),
        description="A run's errors on corrupted pictures, and their mean relative to a reference's, the mCE.",
    )
    parser.add_argument("run", metavar="RUN", help="folder written by hypercontrast.train")
    parser.add_argument(
        "--source",
        default=Options.source,
        help="imagenet-c, in the data root, or generated from the run's own pictures; by default as suits its data",
    )
    parser.add_argument("--data-root", default="", help="where the data is now; by default where the run had it")
    parser.add_argument(
        "--reference", metavar="RUN", default="", help="measured run that errors are relative to, instead of AlexNet"
    )
    parser.add_argument("--corruptions", nargs="+", default=CORRUPTIONS, help="of the 15; an mCE needs all")
    parser.add_argument("--severities", nargs="+", type=int, default=SEVERITIES, help="of 1 to 5; an mCE needs all")
    parser.add_argument("--limit", type=int, default=0, help="pictures of each corruption and severity; 0 for all")
    parser.add_argument("--workers", type=int, default=Options.workers, help="that corrupt or decode pictures")
    parser.add_output_flags()
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[Options, bool]:
    """The options, and whether the result is wanted as JSON."""
    args, as_json = parser().parse_with_output(argv)
    return Options(**args | {name: tuple(args[name]) for name in ("corruptions", "severities")}), as_json


if __name__ == "__main__":
    sys.exit(main())
