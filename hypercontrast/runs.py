"""What a run's folder tells: settings, one line of numbers an epoch, and what the last epoch left.

Its files may be missing or damaged: what is missing is None or empty, what is damaged is one ValueError.

Shapes: N samples of the whole validation set, n of them kept, K classes, D dimensions, C channels, H x W pixels.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hypercontrast.config import Config, UsageError, access, holds, read_config, read_yaml
from hypercontrast.figures import Array

LOSS_TITLES = {"ce": "CE", "normface": "NormFace", "ntce": "NTCE", "nonl": "NONL", "scl": "SCL", "etf-dr": "ETF+DR"}


@dataclass(frozen=True)
class Embeddings:
    """What the last epoch left, as the driver saved it."""

    features_nD: Array
    labels_n: Array
    pictures_nCHW: Array  # uint8
    class_means_KD: Array  # of length 1; zero for a class without training pictures
    mean_lengths_K: Array  # of the means of unit features, before they were scaled to length 1
    class_sizes_K: Array  # training samples
    class_names: tuple[str, ...]
    decisions_2N: Array  # label and choice of the head

    @cached_property
    def trained(self) -> Embeddings:
        """The same of the classes with training pictures alone: the others have no mean. Without decisions."""
        known_K = self.class_sizes_K > 0
        if known_K.all() or not known_K.any():
            return self
        kept_n = known_K[self.labels_n]
        return Embeddings(
            features_nD=self.features_nD[kept_n],
            labels_n=(known_K.cumsum() - 1)[self.labels_n[kept_n]],
            pictures_nCHW=self.pictures_nCHW[kept_n],
            class_means_KD=self.class_means_KD[known_K],
            mean_lengths_K=self.mean_lengths_K[known_K],
            class_sizes_K=self.class_sizes_K[known_K],
            class_names=tuple(self.class_names[c] for c in np.flatnonzero(known_K)),
            decisions_2N=self.decisions_2N[:, :0],
        )

    @cached_property
    def centred_means_KD(self) -> Array:
        """Unit directions of the class means seen from their common centre, where the simplex ETF is defined; as the
        metrics have it, of means at their own lengths.
        """
        means_KD = self.class_means_KD * self.mean_lengths_K[:, None]
        return unit_rows(means_KD - means_KD.mean(axis=0))

    @cached_property
    def confusion_KK(self) -> Array:
        """How many validation samples of each class (row) the head took for each class (column)."""
        K = len(self.class_names)
        labels, chosen = self.decisions_2N.astype(np.int64)
        return np.bincount(labels * K + chosen, minlength=K * K).reshape(K, K)


@dataclass(frozen=True)
class Run:
    path: Path
    name: str
    config: dict[str, Any]
    epochs: list[dict[str, float]]
    embeddings: Embeddings | None
    environment: dict[str, str]

    @property
    def title(self) -> str:
        """What was trained, in a word."""
        return LOSS_TITLES.get(str(self.config.get("loss")), self.name)

    @cached_property
    def settings(self) -> Config | None:
        """The config as the driver would read it; None where it would not."""
        try:
            return read_config(self.path / "config.yaml")
        except UsageError:
            return None

    @property
    def final(self) -> dict[str, float]:
        """The last epoch that was measured; before there is one, the last."""
        return next((row for row in reversed(self.epochs) if "accuracy" in row), self.epochs[-1])

    def series(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) pairs of one metric, without the epochs where it is missing or not finite."""
        return [(row["epoch"], row[key]) for row in self.epochs if math.isfinite(row.get(key, math.nan))]


LARGEST = 1e100  # number that a run may have measured; the differences of larger ones overflow in a chart


def load_runs(run_dirs: Iterable[str | Path]) -> list[Run]:
    """Read run folders, named by what tells their paths apart.

    Raises FileNotFoundError for a missing folder or metrics.jsonl, ValueError for a damaged file, ImportError naming
    the extra to install when safetensors or PyYAML is missing.
    """
    paths = list(dict.fromkeys(Path(run_dir).resolve() for run_dir in run_dirs))
    if not paths:
        raise ValueError("run_dirs must name at least one run folder, got none")
    parent = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent
    names = [path.name if path == parent else path.relative_to(parent).as_posix() for path in paths]
    return [_load_run(path, LOSS_TITLES.get(name, name)) for path, name in zip(paths, names, strict=True)]


def _load_run(path: Path, name: str) -> Run:
    metrics = path / "metrics.jsonl"
    if not holds(path, metrics.name):
        problem = "not a run folder (no metrics.jsonl)" if path.is_dir() else "run folder does not exist"
        raise FileNotFoundError(f"{problem}: {path}")
    epochs = read_epochs(metrics)
    if not epochs:
        raise ValueError(f"no finished epoch yet in {metrics}")
    embeddings = path / "embeddings.safetensors"
    return Run(
        path=path,
        name=name,
        config=_read_config(path / "config.yaml"),
        epochs=epochs,
        embeddings=_read_embeddings(embeddings) if holds(path, embeddings.name) else None,
        environment=_read_environment(path / "environment.json"),
    )


def read_epochs(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, numbers only, epochs rising. Raises ValueError naming a line that is none."""
    with access(path, "read"):
        text = path.read_text(encoding="utf-8", errors="replace")  # what is no text is no JSON: its line is named
    # A run in progress may be in the middle of its last line.
    whole = text[: text.rfind("\n") + 1]
    epochs: list[dict[str, float]] = []
    for row_number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            before = epochs[-1]["epoch"] if epochs else 0
            follows, too_large = before < numbers["epoch"], any(LARGEST < abs(x) < math.inf for x in numbers.values())
            intact = follows and not too_large and math.isfinite(numbers["epoch"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            intact = False
        if not intact:
            raise ValueError(f"{path}, line {row_number} is not a JSON object of a later epoch's numbers: {line[:80]}")
        epochs.append(numbers)
    return epochs


def _read_config(path: Path) -> dict[str, Any]:
    config = read_yaml(path) if path.is_file() else {}
    return config if isinstance(config, dict) else {}


def _read_environment(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    with access(path, "read"):
        content = path.read_bytes()
    try:
        found = json.loads(content)
        return {str(key): str(value) for key, value in found.items()}
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path} must hold a JSON object") from None


def _read_embeddings(path: Path) -> Embeddings:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("reports need safetensors: pip install 'hypercontrast[train]'") from None
    with access(path, "read"):  # of what the library would say that it is not there
        path.open("rb").close()
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
            names = json.loads((file.metadata() or {}).get("class_names", "[]"))
        features, labels, means = (arrays[key] for key in ("features", "labels", "class_means"))
        decisions, sizes, pictures, lengths = (
            arrays[key] for key in ("decisions", "class_sizes", "pictures", "mean_lengths")
        )
    # Of a dtype that NumPy does not know there is a TypeError or an AttributeError.
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}") from None
    K, n = (len(x) if x.ndim else 0 for x in (means, labels))
    fits = {
        "class_means": means.ndim == 2 and means.size > 0 and _are_finite(means),
        "labels": labels.ndim == 1 and n > 0 and _are_classes(labels, K),
        "features": features.shape == (n, *means.shape[1:]) and _are_finite(features),
        "decisions": decisions.ndim == 2 and len(decisions) == 2 and _are_classes(decisions, K),
        "class_sizes": sizes.shape == (K,) and _are_finite(sizes) and (sizes >= 0).all(),
        "pictures": pictures.dtype == np.uint8
        and pictures.ndim == 4
        and len(pictures) == n
        and pictures.shape[1] in (1, 3),
        "mean_lengths": lengths.shape == (K,) and _are_finite(lengths) and ((lengths >= 0) & (lengths < 2)).all(),
    }
    if wrong := [key for key, right in fits.items() if not right]:
        raise ValueError(f"{path} is damaged or incomplete: {wrong[0]} must fit {n} samples of {K} classes")
    names = names or list(range(K))
    if not isinstance(names, list) or len(names) != K:
        got = f"{len(names)} names" if isinstance(names, list) else type(names).__name__
        raise ValueError(f"{path} must name its {K} classes, got {got}")
    return Embeddings(
        features_nD=features.astype(np.float64),
        labels_n=labels,
        pictures_nCHW=pictures,
        class_means_KD=unit_rows(means.astype(np.float64)),
        mean_lengths_K=lengths.astype(np.float64),
        class_sizes_K=sizes,
        class_names=tuple(str(name) for name in names),
        decisions_2N=decisions,
    )


def _are_finite(x: Array) -> bool:
    return bool(x.dtype.kind in "fiu" and np.isfinite(x).all())


def _are_classes(x: Array, K: int) -> bool:
    return bool(np.issubdtype(x.dtype, np.integer) and np.all((x >= 0) & (x < K)))


def unit_rows(x: Array) -> Array:
    """Every row at length 1; a row of zeros stays."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)
