"""A small study of the paper's claims that two CPU cores can make: which of them hold on few pictures and epochs.

    python -m bench.study [PART ...] [--output DIR] [--data-root DIR]

Every part is a grid of runs of `hypercontrast.train`, three seeds each, evaluated when they end: trained head, fixed
prototypes and, after SCL, a linear probe. A run that is there is not made again, one that was interrupted goes on.

    python -m bench.study --collect RESULTS

copies out what tables and figures are made from, config.yaml, metrics.jsonl and evaluation.json of every run, with
figures and a table of every part: means and standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypercontrast.config import Config, UsageError, configure
from hypercontrast.evaluate import Options, evaluate
from hypercontrast.progress import fail
from hypercontrast.results import Run, read_groups
from hypercontrast.table import figure2
from hypercontrast.train import train

LOSSES = ("ce", "normface", "ntce", "nonl", "scl")
SEEDS = (0, 1, 2)
# A tenth of CIFAR-10 and a sixteenth of ResNet-18, so that a run takes minutes.
SLICE: dict[str, Any] = {
    "limit": 5000, "model": "resnet18", "width": 16, "epochs": 8, "warmup_epochs": 1, "batch_size": 128, "lr": 0.1,
    "evaluate_every": 2,
}  # fmt: skip
# 1,240 pictures are ten batches: more epochs, so that the smallest class, of five, is seen more than 40 times.
TAIL: dict[str, Any] = {"imbalance": 0.01, "epochs": 24, "evaluate_every": 4}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "mnist5k": {f"mnist5k-{loss}": {} for loss in LOSSES},
    "longtail": {f"mnist5k-{loss}": TAIL for loss in LOSSES},
    "cifar10": {f"cifar10-{loss}": SLICE for loss in LOSSES},
    # The temperatures that are best after 1000 epochs are too high for eight.
    "cifar10cold": {f"cifar10-{loss}": {**SLICE, "temperature": 0.2} for loss in ("normface", "ntce")},
    "beyond": {f"mnist5k-nonl-{way}": {} for way in ("signed", "queue", "accumulate", "learned", "cosine")},
}
KEPT = ("config.yaml", "metrics.jsonl", "evaluation.json")
# Column -> (key of a measured epoch, factor, decimals).
COLUMNS = {
    "top-1, %": ("accuracy", 100, 1),
    "by class means, %": ("prototype_accuracy", 100, 1),
    "to simplex": ("distance_etf", 1, 3),
    "to orthogonal frame": ("distance_frame", 1, 3),
    "prototypes to simplex": ("weight_distance_etf", 1, 3),
    "weight alignment": ("weight_alignment", 1, 3),
    "NC1": ("nc1", 1, 2),
    "temperature": ("temperature", 1, 3),
}


def run(part: str, output: Path, data_root: str) -> None:
    for recipe, options in PARTS[part].items():
        for seed in SEEDS:
            folder = output / part / f"{recipe}-{seed}"
            config = configure(
                recipe=recipe,
                seed=seed,
                run_dir=str(folder),
                resume="auto",
                cpu_ranks=1,
                data_root=data_root,
                **options,
            )
            if not (folder / "embeddings.safetensors").exists():
                train(config)
            if not (folder / "evaluation.json").exists():
                evaluate(_evaluation(config))


def _evaluation(config: Config) -> Options:
    methods = ("prototypes", "linear-probe") if config.loss == "scl" else ("head", "prototypes")
    return Options(config.run_dir, methods=methods, cpu_ranks=1)


def collect(output: Path, results: Path) -> None:
    """Copy what tables and figures are made from."""
    folders = sorted(path.parent for path in output.glob("*/*/evaluation.json"))
    if not folders and not results.is_dir():
        raise UsageError(f"--output must hold evaluated runs, got none in {output}")
    for folder in folders:
        kept = results / folder.parent.name / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copyfile(folder / name, kept / name)
    for part in sorted(path for path in results.iterdir() if path.is_dir()):
        (results / f"{part.name}.md").write_text(summary(sorted(part.iterdir())), encoding="utf-8")
        if part.name != "beyond":  # whose runs share their loss
            (results / f"{part.name}.svg").write_text(figure2(read_groups(sorted(part.iterdir()))), encoding="utf-8")


def summary(folders: Sequence[Path]) -> str:
    """A table of runs in Markdown, a row for those that differ in their seed alone."""
    groups = read_groups(folders)
    used = {title: how for title, how in COLUMNS.items() if any(_values(group.runs, how[0]) for group in groups)}
    rows = [["run", "n", *used], ["---"] * (len(used) + 2)]
    for group in groups:
        name = group.runs[0].path.name.rpartition("-")[0]
        rows.append(
            [name, str(len(group.finished)), *(_cell(_values(group.runs, *how[:2]), how[2]) for how in used.values())]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _values(runs: Sequence[Run], key: str, factor: float = 1) -> list[float]:
    return [factor * run.measured[-1][key] for run in runs if run.finished and key in run.measured[-1]]


def _cell(values: Sequence[float], decimals: int) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description="The study on two CPU cores.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="where the runs go")
    parser.add_argument("--data-root", default="data", help="folder that holds cifar10")
    parser.add_argument("--collect", type=Path, help="copy the results of all runs so far here, and stop")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    try:
        if args.collect:
            collect(args.output, args.collect)
            return 0
        for part in args.parts or PARTS:
            run(part, args.output, args.data_root)
    except UsageError as error:
        return fail(2, str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
