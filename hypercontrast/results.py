"""What run folders say: settings, measured epochs and result files; and runs that differ in their seed alone, together.

Nothing is computed here but the course of neural collapse, `share_to_collapse`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hypercontrast.config import FREE_ON_RESUME, Config, UsageError, access, holds, read_config
from hypercontrast.paper import COLLAPSE_SHARE, TABLE_7_METRICS
from hypercontrast.runs import read_epochs

# Settings that change where, how fast or how often, or which of the equally good draws, but not what is measured.
FREE = FREE_ON_RESUME | {"seed", "evaluate_every"}
RESULT_FILES = ("evaluation.json", "transfer.json", "corruptions.json")
SMOOTHING = 0.9  # an epoch
COVERED = 0.95


@dataclass(frozen=True)
class Run:
    """One run folder, finished or not."""

    path: Path
    config: Config
    epochs: Sequence[dict[str, float]]  # the lines of metrics.jsonl
    files: dict[str, dict[str, Any]]  # those of RESULT_FILES that are there; evaluation.json also by method
    written: float = 0.0  # when its last epoch was, in seconds

    @property
    def measured(self) -> list[dict[str, float]]:
        """The epochs whose accuracy and metrics were measured."""
        return [row for row in self.epochs if "accuracy" in row]

    @property
    def last(self) -> dict[str, float]:
        """The last of these, empty before there is one."""
        return self.measured[-1] if self.measured else {}

    @property
    def epoch(self) -> int:
        return int(self.epochs[-1]["epoch"]) if self.epochs else 0

    @property
    def finished(self) -> bool:
        return self.last.get("epoch", 0) >= self.config.epochs

    @property
    def classes(self) -> int | None:
        """Classes with training pictures, None before the first measured epoch."""
        seen = self.last.get("classes_seen", math.nan)
        return int(seen) if math.isfinite(seen) else None

    @cached_property
    def _tree(self) -> dict[str, Any]:
        """Every result as file -> key -> ... -> value."""
        shares = {key: share_to_collapse(points) for key in TABLE_7_METRICS if (points := self.series(key))}
        return {"metrics.jsonl": {**self.last, COLLAPSE_SHARE: shares}, **self.files}

    def series(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) pairs of a metric, without the epochs where it is missing or not finite."""
        return [(row["epoch"], row[key]) for row in self.epochs if math.isfinite(row.get(key, math.nan))]

    def find(self, source: Sequence[str]) -> Any:
        """What stands at a file name and keys within the file; None where nothing does."""
        found: Any = self._tree
        for key in source:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def value(self, source: Sequence[str]) -> float | None:
        """A finite number at that place, or None."""
        found = self.find(source)
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


@dataclass(frozen=True)
class Group:
    """Runs that differ only in seeds and in how they were run: one a seed, for its repeats would count as others."""

    runs: tuple[Run, ...]
    repeats: tuple[Run, ...] = ()  # the others of seeds that are in `runs`

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def classes(self) -> int | None:
        return next((run.classes for run in self.runs if run.classes is not None), None)


def read_groups(paths: Iterable[str | Path]) -> list[Group]:
    """Run folders, grouped, in the order given.

    What is no folder is passed over, for shells expand runs/* to files too. Raises UsageError for a path that is not
    there, a folder without a config.yaml, or a damaged file.
    """
    folders = dict.fromkeys(Path(path) for path in paths)
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for folder in folders:
        if _is_folder(folder):
            run = _read_run(folder)
            settings = dataclasses.asdict(run.config)
            key = tuple(value for name, value in settings.items() if name not in FREE)
            groups.setdefault(key, []).append(run)
    return [_one_a_seed(runs) for runs in groups.values()]


def _one_a_seed(runs: Sequence[Run]) -> Group:
    """The finished run of each seed before others, then the newest."""
    chosen: dict[int, Run] = {}
    for run in runs:
        before = chosen.get(run.config.seed)
        if before is None or (run.finished, run.written) > (before.finished, before.written):
            chosen[run.config.seed] = run
    return Group(tuple(chosen.values()), tuple(run for run in runs if run is not chosen[run.config.seed]))


def _is_folder(path: Path) -> bool:
    with access(path, "read"):
        try:
            return stat.S_ISDIR(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise UsageError(f"runs must be folders of runs, got {path}, which does not exist") from None


def _read_run(folder: Path) -> Run:
    if not holds(folder, "config.yaml"):
        raise UsageError(f"runs must be folders of runs, with a config.yaml, got {folder}")
    metrics = folder / "metrics.jsonl"
    try:
        epochs = read_epochs(metrics) if metrics.is_file() else []
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    files = {name: _read_json(folder / name) for name in RESULT_FILES if (folder / name).is_file()}
    if "evaluation.json" in files:
        files["evaluation.json"] |= _by_method(folder / "evaluation.json", files["evaluation.json"])
    written = metrics.stat().st_mtime if epochs else 0.0
    return Run(folder, read_config(folder / "config.yaml"), epochs, files, written)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} must be readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _by_method(path: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Its list of results as a mapping, so that a place in it can be named."""
    try:
        return {result["method"]: result for result in evaluation["results"]}
    except (KeyError, TypeError):
        raise UsageError(f"{path} must hold a list of results, each with a method") from None


def share_to_collapse(points: Sequence[tuple[float, float]]) -> float:
    """The share of a run after which a metric has covered 95 % of its way and stays there.

    points: (epoch e_i, value v_i), at least one, epochs rising, as unevenly as they were measured; the last epoch is
    the run's. With s_i = Σ_{j<=i} .9^(e_i − e_j) v_j / Σ_{j<=i} .9^(e_i − e_j), the bias-corrected moving average, the
    share is e_k/e_m for the smallest k such that every i >= k has (s_i − s_1)/(s_m − s_1) >= .95. A metric that never
    moves is there from its first epoch. The definition is ours; epochs have equally many iterations.
    """
    smoothed: list[float] = []
    total = weight = 0.0
    previous = points[0][0]
    for epoch, value in points:
        fade = SMOOTHING ** (epoch - previous)
        total, weight, previous = fade * total + value, fade * weight + 1, epoch
        smoothed.append(total / weight)
    way = smoothed[-1] - smoothed[0]
    if abs(way) <= 1e-9 * max(map(abs, smoothed)):  # rounding
        return points[0][0] / points[-1][0]
    arrival = len(points) - 1
    # Multiplied by the way, so that falling metrics read like rising ones.
    while arrival > 0 and (smoothed[arrival - 1] - smoothed[0]) * way >= COVERED * way * way:
        arrival -= 1
    return points[arrival][0] / points[-1][0]
