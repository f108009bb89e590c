"""One self-contained HTML page that compares run folders.

    python -m hypercontrast.report RUN [RUN ...] [--output FILE]

A run folder is what `hypercontrast.train` writes: config.yaml, metrics.jsonl and, once it is finished,
embeddings.safetensors. The page loads nothing and runs nothing: inline CSS, inline SVG, no script.

Shapes: N samples, K classes, D dimensions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hypercontrast import figures
from hypercontrast.figures import Array, Curve, number

LOSS_TITLES = {"ce": "CE", "normface": "NormFace", "ntce": "NTCE", "nonl": "NONL", "scl": "SCL", "etf-dr": "ETF+DR"}

# What the driver writes beside the neural-collapse metrics: key -> (title, sentence, ideal).
DRIVER_METRICS = {
    "loss": (
        "Training loss",
        "Mean over the epoch. Different losses have different scales: compare only equal ones.",
        "",
    ),
    "accuracy": (
        "Accuracy",
        "Share of validation samples the head (linear layer or prototypes; for SCL its fixed class means) gets right.",
        "1",
    ),
    "prototype_accuracy": (
        "Prototype accuracy",
        "Share of validation samples whose nearest training class mean, by cosine, is their own class: no head needed.",
        "1",
    ),
}
# Bookkeeping of an epoch, not a result; and results that say how much was measured, not how well it went.
BOOKKEEPING = ("epoch", "lr", "seconds", "samples_per_second")
COUNTS = ("classes_seen", "samples", "samples_kept")

# The columns of the first table, under shorter names than the full list has room for.
HEADLINE = {
    "nc2_angle_std": "Spread of cosines, from the centre",
    "cos_mean": "Mean cosine",
    "distance_etf": "Distance to simplex ETF",
    "distance_frame": "Distance to orthogonal frame",
    "accuracy": "Accuracy",
    "prototype_accuracy": "Prototype accuracy",
}
EVENNESS = ("nc2_angle_std", "distance_frame")  # what a run must lead in to be called the most even
HEADLINE_CURVES = ("nc2_angle_std", "distance_etf", "distance_frame", "nc1", "accuracy", "prototype_accuracy")
SPHERE_SAMPLES = 600  # drawn per run; more only thicken the clouds


@dataclass(frozen=True)
class Embeddings:
    """What the last epoch left: raw features [N, D], labels [N], unit class means [K, D], class names (K of them)."""

    features_ND: Array
    labels_N: Array
    class_means_KD: Array
    class_names: tuple[str, ...]

    @cached_property
    def centred_means_KD(self) -> Array:
        """Unit directions of the class means seen from their common centre, where the simplex ETF is defined."""
        return _unit_rows(self.class_means_KD - self.class_means_KD.mean(axis=0))


@dataclass(frozen=True)
class Run:
    path: Path
    name: str
    config: dict[str, Any]
    epochs: list[dict[str, float]]
    embeddings: Embeddings | None

    @property
    def final(self) -> dict[str, float]:
        """The last epoch that was measured; before there is one, the last."""
        return next((row for row in reversed(self.epochs) if "accuracy" in row), self.epochs[-1])

    def series(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) pairs of one metric, without the epochs where it is missing or not finite."""
        return [(row["epoch"], row[key]) for row in self.epochs if math.isfinite(row.get(key, math.nan))]


# --------------------------------------------------------------------------------- reading run folders


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
    if not path.is_dir():
        raise FileNotFoundError(f"run folder does not exist: {path}")
    if not metrics.is_file():
        raise FileNotFoundError(f"not a run folder (no metrics.jsonl): {path}")
    epochs = read_epochs(metrics)
    if not epochs:
        raise ValueError(f"no finished epoch yet in {metrics}")
    embeddings = path / "embeddings.safetensors"
    return Run(
        path=path,
        name=name,
        config=_read_config(path / "config.yaml"),
        epochs=epochs,
        embeddings=_read_embeddings(embeddings) if embeddings.is_file() else None,
    )


def read_epochs(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, numbers only. Raises ValueError naming a line that is none."""
    text = path.read_text(encoding="utf-8")
    # A run in progress may be in the middle of its last line.
    whole = text[: text.rfind("\n") + 1]
    epochs = []
    for row_number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            row["epoch"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {row_number} is not a JSON object with an epoch: {line[:80]}") from None
        epochs.append({key: value for key, value in row.items() if isinstance(value, int | float)})
    return epochs


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        import yaml
    except ImportError:
        raise ImportError("reports need PyYAML: pip install 'hypercontrast[train]'") from None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return config if isinstance(config, dict) else {}


def _read_embeddings(path: Path) -> Embeddings:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("reports need safetensors: pip install 'hypercontrast[train]'") from None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in ("features", "labels", "class_means")}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}") from None
    means_KD = arrays["class_means"].astype(np.float64)
    names = json.loads(metadata.get("class_names", "[]")) or range(len(means_KD))
    if len(names) != len(means_KD):
        raise ValueError(f"{path} must name its {len(means_KD)} classes, got {len(names)} names")
    return Embeddings(
        features_ND=arrays["features"].astype(np.float64),
        labels_N=arrays["labels"],
        class_means_KD=_unit_rows(means_KD),
        class_names=tuple(str(name) for name in names),
    )


def _unit_rows(x: Array) -> Array:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)


# ----------------------------------------------------------------------------------------- small parts


def _describe(key: str) -> tuple[str, str, str]:
    from hypercontrast.metrics import DESCRIPTIONS

    title, sentence, ideal = (DRIVER_METRICS | DESCRIPTIONS).get(key, (key, "", ""))
    return title, sentence, str(ideal)


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _three(cosine: float) -> str:
    """Three decimals and no more: what is below is rounding of the saved means."""
    return number(round(float(cosine), 3) + 0.0)


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _figure(title: str, drawing: str, caption: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A table in a region that scrolls by itself and can be reached by keyboard. Cells are HTML."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# --------------------------------------------------------------------------------------------- figures


def _cosine_figure(run: Run, embeddings: Embeddings, means_KD: Array) -> str:
    names, cosines_KK = embeddings.class_names, means_KD @ means_KD.T
    different_KK = ~np.eye(len(names), dtype=bool)
    caption = ""
    if len(names) > 1:
        off = cosines_KK[different_KK]
        a, b = np.unravel_index(np.where(different_KK, cosines_KK, -np.inf).argmax(), cosines_KK.shape)
        caption = (
            f"Off the diagonal: mean {_three(off.mean())}, standard deviation {_three(off.std())}. "
            f"Closest pair: {names[a]} and {names[b]}, {_three(off.max())}."
        )
    label = f"{run.name}: cosines between {len(names)} class means. {caption}"
    return _figure(run.name, figures.cosine_matrix(cosines_KK, names, label), caption)


def _matrices_section(runs: Sequence[Run]) -> str:
    drawn = [(run, run.embeddings) for run in runs if run.embeddings is not None]
    if not drawn:
        return ""
    sizes = {len(embeddings.class_names) for _, embeddings in drawn} - {1}  # one class has no pairs
    etf = _join([f"−1/{K - 1} = {number(-1 / (K - 1))}" for K in sorted(sizes)] or ["−1/(K−1)"])
    raw = "".join(_cosine_figure(run, found, found.class_means_KD) for run, found in drawn)
    centred = "".join(_cosine_figure(run, found, found.centred_means_KD) for run, found in drawn)
    return f"""
<section aria-labelledby="cosines"><h2 id="cosines">Cosines between class means</h2>
<p>A class mean is the average direction of a class's training features. Each cell is the cosine between two of them,
on one scale for all matrices: 1 is the same direction, 0 a right angle, −1 opposite.</p>
<div class="scale" aria-hidden="true"><span>−1</span><i></i><span>0</span><i></i><span>1</span></div>
<h3 class="row">As seen from the origin</h3>
<p>Orthogonal frame: every cell off the diagonal is 0. Simplex ETF: every one is {etf}.</p>
<div class="grid wide">{raw}</div>
<h3 class="row">As seen from the centre of the class means</h3>
<p>The same class means after subtracting their common centre, as neural collapse defines them. Evenly placed means,
whether an orthogonal frame or an ETF, give {etf} everywhere; uneven colours are classes the model holds closer
together than others.</p>
<div class="grid wide">{centred}</div>
</section>"""


def _chart(key: str, runs: Sequence[Run]) -> str:
    curves = [Curve(run.name, index, points) for index, run in enumerate(runs) if (points := run.series(key))]
    title, sentence, ideal = _describe(key)
    ends = _join([f"{curve.name} {number(curve.points[-1][1])}" for curve in curves])
    label = f"{title} over the epochs; at the end: {ends}"
    return _figure(title, figures.chart(curves, label, ideal=_as_float(ideal)), sentence)


def _curves_section(runs: Sequence[Run]) -> str:
    drawable = [key for key in _result_keys(runs) if key not in COUNTS and any(run.series(key) for run in runs)]
    headline = [key for key in HEADLINE_CURVES if key in drawable]
    others = [_chart(key, runs) for key in drawable if key not in headline]
    more = (
        f'<details><summary>{len(others)} more curves</summary><div class="grid">{"".join(others)}</div></details>'
        if others
        else ""
    )
    return f"""
<section aria-labelledby="curves"><h2 id="curves">Over the epochs</h2>
<p>Measured on the training set, accuracies on the validation set. A dashed line is the ideal.</p>
<div class="grid">{"".join(_chart(key, runs) for key in headline)}</div>
{more}</section>"""


def _result_keys(runs: Sequence[Run]) -> list[str]:
    """Every result that any run logged, in the order of the logs."""
    keys = dict.fromkeys(key for run in runs for key in run.final)
    return [key for key in keys if key not in BOOKKEEPING]


def _sphere_figure(run: Run, embeddings: Embeddings) -> str:
    chosen = _balanced_sample(embeddings.labels_N, len(embeddings.class_names))
    samples_ND = _unit_rows(embeddings.features_ND[chosen])
    centre_D = embeddings.class_means_KD.mean(axis=0)
    axes_3D, share = _principal_axes(embeddings.class_means_KD - centre_D)
    drawing = figures.sphere(
        _unit_rows((embeddings.class_means_KD - centre_D) @ axes_3D.T),
        _unit_rows((samples_ND - centre_D) @ axes_3D.T),
        embeddings.labels_N[chosen],
        embeddings.class_names,
        f"{run.name}: class means and validation samples on a sphere",
    )
    return _figure(run.name, drawing, f"This view holds {share:.0%} of the variance of the class means.")


def _balanced_sample(labels_N: Array, num_classes: int) -> Array:
    """Indices of the first samples of every class, about SPHERE_SAMPLES in all."""
    quota = max(1, SPHERE_SAMPLES // num_classes)
    return np.concatenate([np.flatnonzero(labels_N == c)[:quota] for c in range(num_classes)])


def _principal_axes(centred_KD: Array) -> tuple[Array, float]:
    """The three leading principal components [3, D], zero where there are fewer, and their share of the variance."""
    _, singular, axes = np.linalg.svd(centred_KD, full_matrices=False)
    axes_3D = axes[:3] * np.where(axes[:3].sum(axis=1, keepdims=True) < 0, -1, 1)  # their sign is free: fix it
    variance = singular**2
    share = variance[:3].sum() / variance.sum() if variance.sum() > 0 else 1.0
    return np.pad(axes_3D, ((0, 3 - len(axes_3D)), (0, 0))), float(share)


def _sphere_section(runs: Sequence[Run]) -> str:
    spheres = [_sphere_figure(run, run.embeddings) for run in runs if run.embeddings is not None]
    if not spheres:
        return ""
    return f"""
<section aria-labelledby="sphere"><h2 id="sphere">The class means on the sphere</h2>
<p>Discs are class means, specks are validation samples; pale ones are behind. Each picture is a projection: unit
vectors seen from the centre of the class means, projected on the three leading principal components of that run's
class means, and scaled to length 1 again.</p>
<p>Three axes can hold only 3/(K−1) of the variance of K evenly placed means, so some of them must look close together
here although they are not; the matrices above are the exact picture.</p>
<div class="grid wide">{"".join(spheres)}</div>
</section>"""


# ------------------------------------------------------------------------------------ words and tables


def _against(runs: Sequence[Run], key: str) -> str:
    """`0.099 for NONL against 0.339 for CE`, best first; past three runs the rest as a range."""
    best, *others = sorted(runs, key=lambda run: run.final[key])
    parts = [f"{number(run.final[key])} for {run.name}" for run in (best, *others)]
    if not others:
        return parts[0]
    if len(others) < 3:
        return f"{parts[0]} against {_join(parts[1:])}"
    return f"{parts[0]} against {number(others[0].final[key])} to {number(others[-1].final[key])} for the others"


def outcome(runs: Sequence[Run]) -> str:
    """The result in plain words, from measured numbers only.

    It names a winner only among runs on the same data, and only one that leads in both measures of evenness.
    """
    needed = (*EVENNESS, "distance_etf")
    measured = [run for run in runs if all(math.isfinite(run.final.get(key, math.nan)) for key in needed)]
    if not measured:
        return "No run here measured the geometry of its class means."
    numbers = (
        f"seen from their centre, the cosines between them have a standard deviation of "
        f"{_against(measured, 'nc2_angle_std')}. The distance to an orthogonal frame is "
        f"{_against(measured, 'distance_frame')}; to the simplex ETF it is {_against(measured, 'distance_etf')}."
    )
    comparable = len(measured) > 1 and len({run.config.get("dataset") for run in measured}) == 1
    how = "more" if len(measured) == 2 else "most"
    for run in measured:
        others = [other for other in measured if other is not run]
        if comparable and all(run.final[key] < other.final[key] for other in others for key in EVENNESS):
            return f"{run.name} places its class means {how} evenly: {numbers}"
    return f"How evenly the class means are placed: {numbers}"


def _outcome_section(runs: Sequence[Run]) -> str:
    keys = [key for key in HEADLINE if any(run.series(key) for run in runs)]
    header = ["Run", *(HEADLINE[key] for key in keys)]
    rows = [[escape(run.name), *(number(run.final.get(key, math.nan)) for key in keys)] for run in runs]
    unfinished = [escape(run.name) for run in runs if run.embeddings is None]
    note = (
        f"<p>{_join(unfinished)}: no embeddings saved yet, so the matrices and the sphere leave "
        f"{'it' if len(unfinished) == 1 else 'them'} out.</p>"
        if unfinished
        else ""
    )
    return f"""
<section aria-labelledby="outcome"><h2 id="outcome" class="quiet">Outcome</h2>
<p class="lead">{escape(outcome(runs))}</p>
{_table(header, rows, "Headline numbers of every run")}
<p>Each accuracy comes from a single run, and small differences between single runs are noise. Compare accuracies over
several seeds.</p>
{note}</section>"""


def _reach_section(runs: Sequence[Run]) -> str:
    signs = []
    for run in runs:
        if run.embeddings is not None:
            smallest = float(run.embeddings.features_ND.min())
            word = "non-negative" if smallest >= 0 else "signed"
            signs.append(f"{escape(run.name)} {number(smallest)} ({word})")
    measured = f"<p>Smallest feature coordinate on the validation set: {_join(signs)}.</p>" if signs else ""
    sizes = {len(run.embeddings.class_names) for run in runs if run.embeddings is not None}
    floor = "".join(f", {number(K**-0.5)} for {K} classes" for K in sorted(sizes))
    return f"""
<section aria-labelledby="reach"><h2 id="reach">What can be reached</h2>
<p>In a <b>simplex ETF</b> the K class means point as far from each other as K directions can: every pair has cosine
−1/(K−1). After ReLU and average pooling no feature coordinate is negative, so no cosine between class means is
negative either, and the ETF is out of reach. The best even state left is an <b>orthogonal frame</b>, every pair at a
right angle. That is why both distances are reported: an exact orthogonal frame still has distance 1/√K to the
ETF{floor}.</p>
<p>A <b>signed neck</b>, a linear layer or batch normalisation after the pooling (<code>--neck linear</code>,
<code>--neck bn</code>), lets coordinates be negative and makes the ETF reachable; so does SCL's projection head.</p>
{measured}</section>"""


def _metrics_section(runs: Sequence[Run]) -> str:
    rows = []
    for key in _result_keys(runs):
        title, sentence, ideal = _describe(key)
        name = f"{escape(title)} <code>{escape(key)}</code><small>{escape(sentence)}</small>"
        rows.append([name, *(number(run.final.get(key, math.nan)) for run in runs), f"<small>{escape(ideal)}</small>"])
    header = ["Metric", *(escape(run.name) for run in runs), "Ideal"]
    return f"""
<section aria-labelledby="metrics"><h2 id="metrics">Every metric, at the last measurement</h2>
{_table(header, rows, "Every metric of every run")}</section>"""


def _settings_section(runs: Sequence[Run]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [[str(run.config.get(key, "–")) for run in runs] for key in keys]
    differing = {key for key, row in zip(keys, rows, strict=True) if len(set(row)) > 1}

    def table(chosen: Callable[[str], bool], label: str) -> str:
        cells = [
            [f"<code>{escape(key)}</code>", *map(escape, row)]
            for key, row in zip(keys, rows, strict=True)
            if chosen(key)
        ]
        return _table(["Setting", *(escape(run.name) for run in runs)], cells, label) if cells else ""

    same = table(lambda key: key not in differing, "Settings that all runs share")
    shared = f"<details><summary>Settings all runs share</summary>{same}</details>" if same else ""
    if len(runs) == 1:
        shared = same
    seconds = [
        f"{escape(run.name)} {len(run.epochs)} epochs in {sum(v for _, v in run.series('seconds')):.0f} s"
        for run in runs
    ]
    return f"""
<section aria-labelledby="settings"><h2 id="settings">Settings and environment</h2>
{table(lambda key: key in differing, "Settings that differ")}{shared}
<p>Trained: {"; ".join(seconds)}.</p>
<p>{escape(_environment())}</p>
</section>"""


def _resume_section(runs: Sequence[Run]) -> str:
    # The driver writes the embeddings last of all.
    unfinished = [run for run in runs if run.embeddings is None]
    if unfinished:
        names = _join([run.name for run in unfinished])
        text = f"Not finished yet: {names}. Continue from the newest good checkpoint with"
        commands = [f"python -m hypercontrast.train --resume {_shell(run.path)}" for run in unfinished]
    else:
        text = "Every run here is finished. One that is cut short continues from its newest good checkpoint with"
        commands = ["python -m hypercontrast.train --resume RUN_FOLDER"]
    return f"""
<section aria-labelledby="resume"><h2 id="resume">Go on from here</h2>
<p>{escape(text)}</p>
<pre><code>{escape(chr(10).join(commands))}</code></pre>
<p>and ends as if it had never stopped. To compare other runs, give their folders to</p>
<pre><code>python -m hypercontrast.report RUN_FOLDER [RUN_FOLDER ...]</code></pre>
</section>"""


def _shell(path: Path) -> str:
    return shlex.quote(os.path.relpath(path))


def _environment() -> str:
    import torch

    return (
        f"This page was written with torch {torch.__version__} on Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores."
    )


# -------------------------------------------------------------------------------------------- the page

STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 20px; overflow-wrap: anywhere; }
header { padding-top: 56px; }
main { padding-bottom: 80px; }
section { margin-top: 64px; }
section:first-child { margin-top: 8px; }
p { max-width: 68ch; margin: .6em 0; }
h1 { font-size: 1rem; font-weight: 600; color: var(--soft); margin: 0; }
h2 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .5em; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0 0 .3em; }
h3.row { font-size: 1.1rem; margin-top: 1.8em; }
.lead { font-size: clamp(1.15rem, 2.6vw, 1.5rem); line-height: 1.45; max-width: 52ch; margin: 0 0 1.2em; }
.quiet { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
.grid { display: grid; gap: 28px; margin-top: 20px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 520px; }
figcaption, small, .scale { color: var(--soft); font-size: .86rem; line-height: 1.5; }
figcaption { margin-top: .3em; }
.scale { display: flex; align-items: center; gap: 8px; max-width: 420px; margin: 1em 0; }
.scale i { flex: 1; height: 12px; background: linear-gradient(to right, rgb(176 94 22), rgb(176 94 22 / 0)); }
.scale i + span + i { background: linear-gradient(to right, rgb(18 133 122 / 0), rgb(18 133 122)); }
.scroll { overflow-x: auto; margin: 1em 0; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .95rem; line-height: 1.4; }
th, td { text-align: left; vertical-align: top; padding: .55em 1.4em .55em 0; border-bottom: 1px solid var(--rule); }
thead th { font-weight: 500; color: var(--soft); font-size: .86rem; }
tbody th { font-weight: 600; }
td { white-space: nowrap; }
small { display: block; font-weight: 400; }
th small { min-width: 22ch; max-width: 62ch; }
td small { white-space: normal; width: 17ch; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-weight: 400; }
th code { color: var(--soft); }
pre { white-space: pre-wrap; padding: 14px 16px; border: 1px solid var(--rule); border-radius: 6px;
  background: var(--card); }
details { margin-top: 1.2em; }
summary { cursor: pointer; padding: .4em 0; }
:focus-visible { outline: 2px solid var(--run1); outline-offset: 3px; }
@media print { figure { break-inside: avoid; } }
"""


def write_report(run_dirs: Iterable[str | Path], output: str | Path | None = None) -> Path:
    """Write one HTML page comparing the runs; returns its path.

    output: by default report.html in the run folder, or in the nearest folder above all of them.
    Raises FileNotFoundError, ValueError or ImportError as `load_runs` does.
    """
    runs = load_runs(run_dirs)
    if output is None:
        home = Path(os.path.commonpath([run.path for run in runs]))
        output = home / "report.html"
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(runs), encoding="utf-8")
    return target


def render(runs: Sequence[Run]) -> str:
    """The whole page. Its policy forbids scripts and any request, whatever text the runs bring along."""
    names = _join([run.name for run in runs])
    datasets = _join(list(dict.fromkeys(str(run.config.get("dataset", "unnamed data")) for run in runs)))
    body = "".join(
        (
            _outcome_section(runs),
            _matrices_section(runs),
            _reach_section(runs),
            _curves_section(runs),
            _sphere_section(runs),
            _metrics_section(runs),
            _settings_section(runs),
            _resume_section(runs),
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(names)} on {escape(datasets)} – hypercontrast</title>
<style>{figures.SCHEME}{STYLE}{figures.STYLE}</style>
</head>
<body>
<header><h1>{escape(names)} on {escape(datasets)}</h1></header>
<main>{body}</main>
</body>
</html>
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hypercontrast.report", description="Compare run folders on one self-contained HTML page."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder written by hypercontrast.train")
    parser.add_argument("--output", metavar="FILE", help="default: report.html beside what the runs share")
    args = parser.parse_args(argv)
    try:
        print(write_report(args.runs, args.output))
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
