"""A small study of the paper's claims that two CPU cores can make: which of them hold on few pictures and epochs.

    python -m bench.study [PART ...] [--output DIR] [--data-root DIR]

Every part is a grid of runs of `hypercontrast.train`, three seeds each, evaluated when they end: trained head, fixed
prototypes and, after SCL, a linear probe. A run that is there is not made again, one that was interrupted goes on. What
the tables and figures are made from is then copied out: config.yaml, metrics.jsonl and evaluation.json of every run.

    python -m hypercontrast.table 1 2 3 6 7 DIR/*
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from hypercontrast.config import Config, configure
from hypercontrast.evaluate import Options, evaluate
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
    "beyond": {f"mnist5k-nonl-{way}": {} for way in ("signed", "queue", "accumulate", "learned", "cosine")},
}
KEPT = ("config.yaml", "metrics.jsonl", "evaluation.json")


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
    for folder in sorted(path.parent for path in output.glob("*/*/evaluation.json")):
        kept = results / folder.parent.name / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copyfile(folder / name, kept / name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description="The study on two CPU cores.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="where the runs go")
    parser.add_argument("--data-root", default="data", help="folder that holds cifar10")
    parser.add_argument("--collect", type=Path, help="copy the results of all runs so far here, and stop")
    args = parser.parse_args()
    if args.collect:
        collect(args.output, args.collect)
        return
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    for part in args.parts or PARTS:
        run(part, args.output, args.data_root)


if __name__ == "__main__":
    main()
