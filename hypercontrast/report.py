"""One self-contained HTML page of a run, which every finished run writes itself, or of several, to compare them.

    python -m hypercontrast.report RUN [RUN ...] [--output FILE]

A run folder is what `hypercontrast.train` writes: config.yaml, metrics.jsonl and, once it is finished,
embeddings.safetensors. The page loads nothing and runs nothing: inline CSS, inline SVG and PNG, no script.

Shapes: n samples, K classes, D dimensions.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from hypercontrast import figures, page
from hypercontrast.config import Config, access, read_recipe, recipe_names
from hypercontrast.figures import Array, Curve, Span, classes_a_cell, count, number, shorten
from hypercontrast.metrics import DESCRIPTIONS, Description
from hypercontrast.mistakes import confusion_section, percent, pictures_section
from hypercontrast.output import say
from hypercontrast.progress import Parser, command, fail
from hypercontrast.runs import Embeddings, Run, load_runs, unit_rows

# What the driver writes beside the neural-collapse metrics.
DRIVER_METRICS = {
    "loss": Description(
        "Training loss",
        "Mean over the epoch. Different losses have different scales: compare only equal ones.",
        "",
    ),
    "accuracy": Description(
        "Accuracy",
        "Share of validation samples the head (linear layer or prototypes; for SCL its fixed class means) gets right.",
        "1",
    ),
    "prototype_accuracy": Description(
        "Prototype accuracy",
        "Share of validation samples whose nearest training class mean, by cosine, is their own class: no head needed.",
        "1",
    ),
}
# Bookkeeping of an epoch, not a result; and results that say how much was measured, not how well it went.
BOOKKEEPING = ("epoch", "lr", "seconds", "samples_per_second")
COUNTS = ("classes_seen", "samples", "samples_kept", "damaged")

# The columns of the first table, under shorter names than the full list has room for.
HEADLINE = {
    "accuracy": "Accuracy",
    "prototype_accuracy": "Prototype accuracy",
    "nc1": "NC1",
    "nc2_angle_std": "Spread of cosines, from the centre",
    "cos_mean": "Mean cosine",
    "distance_etf": "Distance to simplex ETF",
    "distance_frame": "Distance to orthogonal frame",
}
EVENNESS = ("nc2_angle_std", "distance_frame")  # what a run must lead in to be called the most even
HEADLINE_CURVES = ("accuracy", "prototype_accuracy", "nc1", "nc2_angle_std", "distance_etf", "distance_frame")
EXPLAINED = ("nc1", "nc2_angle_std", "nc2_norm_cv", "nc3", "nc4", "cos_mean", "distance_etf", "distance_frame")
# Which way is good: as the ideal says, but for these two, whose ideal is a place that few features can reach.
BETTER = {"0": "lower", "1": "higher", "K − 1": "higher"}
BETTER_OF = {"cos_mean": "lower", "distance_frame": "lower"}
SPHERE_SAMPLES = 600  # drawn per run; more only thicken the clouds
LONG_NAME = 12  # characters, beyond which names are cut in charts, and every run gets a letter to be told apart by
# Settings that say which pictures a run was trained and measured on.
DATA = ("dataset", "limit", "imbalance", "imbalance_shape")
# Settings that say where and how to run, not what.
PLACES = ("run_dir", "resume", "quiet", "json", "dry_run", "recipe")


def describe(key: str) -> Description:
    """Of a metric in a run's log."""
    return (DRIVER_METRICS | DESCRIPTIONS).get(key, Description(key, "", ""))


def legal_range(key: str) -> tuple[float, float]:
    """The values that a metric can have."""
    if key.endswith("accuracy") or key == "nc4":
        return 0, 1
    if key == "cos_mean":
        return -1, 1
    return -math.inf if key == "loss" else 0, math.inf


def _better(key: str) -> str:
    return BETTER_OF.get(key) or BETTER.get(describe(key).ideal, "")


def _value(key: str, value: float) -> str:
    return percent(value) if key.endswith("accuracy") and math.isfinite(value) else number(value)


def _last(run: Run, key: str) -> str:
    return _value(key, run.final.get(key, math.nan))


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


def _result_keys(runs: Sequence[Run]) -> list[str]:
    """Every result that any run logged, in the order of the logs."""
    keys = dict.fromkeys(key for run in runs for key in run.final)
    return [key for key in keys if key not in BOOKKEEPING]


def _leaders(runs: Sequence[Run], key: str) -> list[int]:
    """Places of the runs with the best value, among several on the same data that differ."""
    values = [run.final.get(key, math.nan) for run in runs]
    finite = [value for value in values if math.isfinite(value)]
    if not _comparable(runs) or not _better(key) or len(set(finite)) < 2:
        return []
    best = min(finite) if _better(key) == "lower" else max(finite)
    return [place for place, value in enumerate(values) if value == best]


def _comparable(runs: Sequence[Run]) -> bool:
    data = {tuple(run.config.get(key) for key in DATA) for run in runs}
    return len(runs) > 1 and len(data) == 1 and all(_has_pairs(run) for run in runs)


def _has_pairs(run: Run) -> bool:
    """Whether there are class means to be placed apart: of a single one every distance is 0."""
    return run.final.get("classes_seen", 2) > 1


# ------------------------------------------------------------------------------------ the outcome


def _against(runs: Sequence[Run], key: str) -> str:
    """`0.099 for NONL against 0.339 for CE`, best first; past three runs the rest as a range, of one the value."""
    if len(runs) == 1:
        return number(runs[0].final[key])
    best, *others = sorted(runs, key=lambda run: run.final[key])
    parts = [f"{number(run.final[key])} for {run.name}" for run in (best, *others)]
    if len(others) < 3:
        return f"{parts[0]} against {_join(parts[1:])}"
    return f"{parts[0]} against {number(others[0].final[key])} to {number(others[-1].final[key])} for the others"


def outcome(runs: Sequence[Run]) -> str:
    """The result in plain words, from measured numbers only.

    It names a winner only among runs on the same data, and only one that leads in both measures of evenness.
    """
    needed = (*EVENNESS, "distance_etf")
    measured = [
        run for run in runs if all(math.isfinite(run.final.get(key, math.nan)) for key in needed) and _has_pairs(run)
    ]
    if not measured:
        return "No run here measured the geometry of its class means."
    numbers = (
        f"seen from their centre, the cosines between them have a standard deviation of "
        f"{_against(measured, 'nc2_angle_std')}. The distance to an orthogonal frame is "
        f"{_against(measured, 'distance_frame')}; to the simplex ETF it is {_against(measured, 'distance_etf')}."
    )
    how = "more" if len(measured) == 2 else "most"
    for run in measured:
        others = [other for other in measured if other is not run]
        if _comparable(measured) and all(run.final[key] < other.final[key] for other in others for key in EVENNESS):
            return f"{run.name} places its class means {how} evenly: {numbers}"
    return f"How evenly the class means are placed: {numbers}"


def _accuracy_sentence(run: Run) -> str:
    by_head, by_mean = run.final.get("accuracy", math.nan), run.final.get("prototype_accuracy", math.nan)
    if not math.isfinite(by_head):
        return ""
    if run.config.get("loss") == "scl":
        return f"{run.title} gets {percent(by_head)} of the validation samples right by their nearest class mean. "
    alone = f", and {percent(by_mean)} by their nearest class mean alone" if math.isfinite(by_mean) else ""
    return f"{run.title} gets {percent(by_head)} of the validation samples right{alone}. "


def _outcome_section(runs: Sequence[Run], lead: str) -> str:
    unfinished = [escape(run.name) for run in runs if run.embeddings is None]
    note = (
        f"<p>{_join(unfinished)}: no embeddings saved yet, so the matrices and the sphere leave "
        f"{'it' if len(unfinished) == 1 else 'them'} out.</p>"
        if unfinished
        else ""
    )
    for run in runs:
        if run.embeddings is not None and run.embeddings.trained is not run.embeddings:
            present, whole = len(run.embeddings.trained.class_names), len(run.embeddings.class_names)
            which = f"{escape(run.name)}: " if len(runs) > 1 else ""
            note += (
                f"<p>{which}{present:,} of {whole:,} classes had training pictures. "
                "The class means, and all that is measured or drawn of them, are of these alone.</p>"
            )
    numbers = _headline_cards(runs[0]) if len(runs) == 1 else _headline_table(runs)
    sentence = _accuracy_sentence(runs[0]) if len(runs) == 1 else ""
    return f"""
<p class="lead">{escape(sentence + lead)}</p>
{numbers}
<p class="soft">Each accuracy comes from a single run, and small differences between single runs are noise. Compare
accuracies over several seeds.</p>
{note}"""


def _headline_cards(run: Run) -> str:
    entries = []
    for key, title in HEADLINE.items():
        if math.isfinite(run.final.get(key, math.nan)):
            better, ideal = _better(key), describe(key).ideal
            aim = {"0": "0 is ideal", "1": "100% is ideal"}.get(ideal, f"{better} is better")
            entries.append((title, _last(run, key), aim))
    return page.cards(entries) if entries else ""


def _headline_table(runs: Sequence[Run]) -> str:
    keys = [key for key in HEADLINE if any(run.series(key) for run in runs)]
    header = ["Run", *(f"{HEADLINE[key]}<small>{_better(key)} is better</small>" for key in keys)]
    rows = [[escape(run.name), *(_last(run, key) for key in keys)] for run in runs]
    best = [(place, column) for column, key in enumerate(keys, start=1) for place in _leaders(runs, key)]
    return page.table(header, rows, "Headline numbers of every run", best)


# ------------------------------------------------------------------------------------ curves


def _chart(key: str, runs: Sequence[Run]) -> str:
    found = [(index, run, points) for index, run in enumerate(runs) if (points := run.series(key))]
    names = {index: run.name if len(runs) > 1 else _value(key, points[-1][1]) for index, run, points in found}
    scale = 100 if key.endswith("accuracy") else 1  # in percent, as everywhere on the page
    curves = [Curve(names[index], index, [(e, scale * value) for e, value in points]) for index, _, points in found]
    title, sentence, ideal = describe(key)
    best = _as_float(ideal)
    ends = _join([f"{run.name} {_value(key, points[-1][1])}" for _, run, points in found])
    label = f"{title} over the epochs; at the end: {ends}"
    better = f" {_better(key).capitalize()} is better." if _better(key) else ""
    least, most = legal_range(key)
    ideal_place = None if best is None else scale * best
    drawing = figures.chart(curves, label, ideal=ideal_place, legal=(scale * least, scale * most))
    return page.figure(f"{title}, %" if scale > 1 else title, drawing, sentence + better)


def _curves_section(runs: Sequence[Run]) -> str:
    drawable = [key for key in _result_keys(runs) if key not in COUNTS and any(run.series(key) for run in runs)]
    # Losses of different kinds share no scale.
    first = ("loss", *HEADLINE_CURVES, "nc3", "nc4") if len({run.title for run in runs}) == 1 else HEADLINE_CURVES
    headline = [key for key in first if key in drawable]
    others = [_chart(key, runs) for key in drawable if key not in headline]
    legend = "".join(f"<li>{figures.key(index)}{escape(run.name)}</li>" for index, run in enumerate(runs))
    return f"""
<p>Accuracies are measured on the validation set, everything else on the training set. A grey
dashed line is the ideal.</p>
{f'<ul class="legend">{legend}</ul>' if len(runs) > 1 else ""}
<div class="grid">{"".join(_chart(key, runs) for key in headline)}</div>
{page.folded(count(len(others), "more curve"), f'<div class="grid">{"".join(others)}</div>' if others else "")}"""


# ------------------------------------------------------------------------------------ class means


def _off_diagonal(means_KD: Array) -> Array:
    return (means_KD @ means_KD.T)[~np.eye(len(means_KD), dtype=bool)]


def _cosine_figure(title: str, run: Run, embeddings: Embeddings, means_KD: Array) -> str:
    names, cosines_KK = embeddings.class_names, means_KD @ means_KD.T
    caption = "" if len(names) > 1 else "One class, so there is nothing off the diagonal."
    if len(names) > 1:
        off = _off_diagonal(means_KD)
        apart_KK = np.where(np.eye(len(names), dtype=bool), -np.inf, cosines_KK)
        a, b = np.unravel_index(apart_KK.argmax(), apart_KK.shape)
        caption = (
            f"Off the diagonal: mean {_three(off.mean())}, standard deviation {_three(off.std())}. "
            f"Closest pair: {names[a]} and {names[b]}, {_three(off.max())}."
        )
    if (block := classes_a_cell(len(names))) > 1:
        caption += f" A cell is the mean over {block} × {block} of the {len(names):,} classes."
    label = f"{run.name}, {title}: cosines between {count(len(names), 'class mean')}. {caption}"
    return page.figure(title, figures.cosine_matrix(cosines_KK, names, label), caption)


def _matrices_section(runs: Sequence[Run]) -> str:
    drawn = [(run, run.embeddings.trained) for run in runs if run.embeddings is not None]
    if not drawn:
        return ""
    sizes = {len(embeddings.class_names) for _, embeddings in drawn} - {1}  # one class has no pairs
    etf = _join([f"−1/{K - 1} = {number(-1 / (K - 1))}" for K in sorted(sizes)] or ["−1/(K−1)"])
    origin, centre = "As seen from the origin", "As seen from the centre of the class means"
    about_origin = f"Orthogonal frame: every cell off the diagonal is 0. Simplex ETF: every one is {etf}."
    about_centre = f"""The same class means after subtracting their common centre, as neural collapse defines them.
Evenly placed means, whether an orthogonal frame or an ETF, give {etf} everywhere; uneven colours are classes the model
holds closer together than others."""
    several = [(run, found) for run, found in drawn if len(found.class_names) > 1]  # one class is its own centre
    if len(runs) == 1:
        ((run, found),) = drawn
        from_centre = f"<p><b>From the centre:</b> {about_centre[0].lower()}{about_centre[1:]}</p>" if several else ""
        matrices = f"""
<p>{about_origin}</p>{from_centre}
<div class="grid wide">{_cosine_figure(origin, run, found, found.class_means_KD)}
{_cosine_figure(centre, run, found, found.centred_means_KD) if several else ""}</div>"""
    else:
        raw = "".join(_cosine_figure(run.name, run, found, found.class_means_KD) for run, found in drawn)
        centred = "".join(_cosine_figure(run.name, run, found, found.centred_means_KD) for run, found in several)
        matrices = f"""
<h3 class="row">{origin}</h3><p>{about_origin}</p><div class="grid wide">{raw}</div>
<h3 class="row">{centre}</h3><p>{about_centre}</p><div class="grid wide">{centred}</div>"""
    return f"""
<p>A class mean is the average direction of a class's training features. Each cell is the cosine between two of them,
on one scale for all matrices: 1 is the same direction, 0 a right angle, −1 opposite.</p>
<div class="scale" aria-hidden="true"><span>−1</span><i></i><span>0</span><i></i><span>1</span></div>{matrices}"""


def _reach_section(runs: Sequence[Run]) -> str:
    drawn = [(run, run.embeddings) for run in runs if run.embeddings is not None]
    signs = []
    for run, left in drawn:
        smallest = float(left.features_nD.min())
        word = "non-negative" if smallest >= 0 else "signed"
        signs.append(f"{escape(run.name)} {number(smallest)} ({word})")
    measured = f"<p>Smallest feature coordinate on the validation set: {_join(signs)}.</p>" if signs else ""
    sizes = {len(left.trained.class_names) for _, left in drawn} - {1}
    floor = "".join(f", {number(K**-0.5)} for {K} classes" for K in sorted(sizes))
    return f"""
<p>In a <b>simplex ETF</b> the K class means point as far from each other as K directions can: every pair has cosine
−1/(K−1). After ReLU and average pooling no feature coordinate is negative, so no cosine between class means is
negative either, and the ETF is out of reach. The best even state left is an <b>orthogonal frame</b>, every pair at a
right angle. That is why both distances are reported: an exact orthogonal frame still has distance 1/√K to the
ETF{floor}.</p>
<p>A <b>signed neck</b>, a linear layer or batch normalisation after the pooling (<code>--neck linear</code>,
<code>--neck bn</code>), lets coordinates be negative and makes the ETF reachable; so does SCL's projection head.</p>
{measured}{_ruler(runs)}"""


def _ruler(runs: Sequence[Run]) -> str:
    """Mean cosines of all runs with the same number of classes, between the two frames and 1."""
    spans, sizes = [], set()
    for index, run in enumerate(runs):
        if run.embeddings is not None and len(run.embeddings.trained.class_names) > 1:
            off = _off_diagonal(run.embeddings.trained.class_means_KD)
            name = shorten(run.name, 22) if len(runs) > 1 else ""
            spans.append(Span(name, index, float(off.mean()), float(off.std())))
            sizes.add(len(run.embeddings.trained.class_names))
    if len(sizes) != 1:
        return ""
    etf = -1 / (sizes.pop() - 1)
    marks = [(etf, f"simplex ETF, {number(etf)}"), (0.0, "orthogonal frame, 0")]
    ends = _join([f"{span.name} {_three(span.mean)}, standard deviation {_three(span.std)}" for span in spans])
    drawing = figures.ruler(spans, marks, min(etf, *(span.mean for span in spans)) - 0.06, f"Mean cosines: {ends}")
    caption = (
        "Cosines between the class means: the mean, and one standard deviation to each side. Further left is further "
        "apart; a shorter bar is more even."
    )
    return f'<div class="grid wide">{page.figure("Between the frames", drawing, caption)}</div>'


# ------------------------------------------------------------------------------------ the sphere


def _sphere_figure(title: str, run: Run, embeddings: Embeddings) -> str:
    chosen = _balanced_sample(embeddings.labels_n, len(embeddings.class_names))
    samples_nD = unit_rows(embeddings.features_nD[chosen])
    centre_D = embeddings.class_means_KD.mean(axis=0)
    axes_3D, share = _principal_axes(embeddings.class_means_KD - centre_D)
    drawing = figures.sphere(
        unit_rows((embeddings.class_means_KD - centre_D) @ axes_3D.T),
        unit_rows((samples_nD - centre_D) @ axes_3D.T),
        embeddings.labels_n[chosen],
        embeddings.class_names,
        f"{run.name}: class means and validation samples on a sphere",
    )
    return page.figure(title, drawing, f"This view holds {share:.0%} of the variance of the class means.")


def _balanced_sample(labels_n: Array, num_classes: int) -> Array:
    """Indices of the first samples of every class, about SPHERE_SAMPLES in all."""
    quota = max(1, SPHERE_SAMPLES // num_classes)
    return np.concatenate([np.flatnonzero(labels_n == c)[:quota] for c in range(num_classes)])


def _principal_axes(centred_KD: Array) -> tuple[Array, float]:
    """The three leading principal components [3, D], zero where there are fewer, and their share of the variance."""
    _, singular, axes = np.linalg.svd(centred_KD, full_matrices=False)
    axes_3D = axes[:3] * np.where(axes[:3].sum(axis=1, keepdims=True) < 0, -1, 1)  # their sign is free: fix it
    variance = singular**2
    share = variance[:3].sum() / variance.sum() if variance.sum() > 0 else 1.0
    return np.pad(axes_3D, ((0, 3 - len(axes_3D)), (0, 0))), float(share)


def _sphere_section(runs: Sequence[Run]) -> str:
    title = "Projected" if len(runs) == 1 else ""
    spheres = [
        _sphere_figure(title or run.name, run, run.embeddings.trained) for run in runs if run.embeddings is not None
    ]
    if not spheres:
        return ""
    sizes = [len(run.embeddings.trained.class_names) for run in runs if run.embeddings is not None]
    crowded = (
        """
<p>Three axes can hold only 3/(K−1) of the variance of K evenly placed means, so some of them must look close together
here although they are not; the matrices above are the exact picture.</p>"""
        if max(sizes) > 4  # fewer stand in three dimensions as they are
        else ""
    )
    return f"""
<p>Discs are class means, specks are validation samples; pale ones are behind. Each picture is a projection: unit
vectors seen from the centre of the class means, projected on the three leading principal components of that run's
class means, and scaled to length 1 again.</p>{crowded}
<div class="grid wide">{"".join(spheres)}</div>"""


# ------------------------------------------------------------------------------------ metrics, speed, settings


def _metrics_section(runs: Sequence[Run]) -> str:
    keys = _result_keys(runs)
    explained = [key for key in EXPLAINED if key in keys]
    rest = [key for key in keys if key not in explained]
    all_others = _metrics_table(runs, rest, "Further metrics of every run")
    return f"""
<p>At the last measurement. In full collapse every class is one point (NC1 = 0), the class means stand at equal lengths
and equal angles (NC2 = 0), each prototype points along its class mean (NC3 = 0), and the nearest class mean decides
(NC4 = 0).</p>
{_metrics_table(runs, explained, "Neural collapse of every run") if explained else ""}
{page.folded(count(len(rest), "further metric"), all_others) if explained and rest else all_others}"""


def _metrics_table(runs: Sequence[Run], keys: Sequence[str], label: str) -> str:
    rows = []
    for key in keys:
        title, sentence, ideal = describe(key)
        name = f"{escape(title)} <code>{escape(key)}</code><small>{escape(sentence)}</small>"
        values = [_last(run, key) for run in runs]
        rows.append([name, *values, _better(key) or "–", f"<small>{escape(ideal)}</small>"])
    header = ["Metric", *(escape(run.name) if len(runs) > 1 else "Value" for run in runs), "Better", "Ideal"]
    best = [(row, place + 1) for row, key in enumerate(keys) for place in _leaders(runs, key)]
    return page.table(header, rows, label, best)


def _speed_section(runs: Sequence[Run]) -> str:
    timed = [run for run in runs if run.series("seconds")]
    if not timed:
        return ""
    rows = []
    for run in timed:
        seconds = [value for _, value in run.series("seconds")]
        rates = [value for _, value in run.series("samples_per_second")]
        rate = f"{statistics.median(rates):,.0f}" if rates else "–"
        trained = f"{count(len(run.epochs), 'epoch')} in {sum(seconds):.0f} s"
        rows.append([escape(run.name), trained, f"{statistics.median(seconds):.1f} s", rate])
    header = ["Run", "Trained", "Median epoch", "Samples a second, median"]
    chart = ""
    if drawn := [(run, points) for run in runs if len(points := run.series("samples_per_second")) > 1]:
        curves = [
            Curve(run.name if len(runs) > 1 else f"{points[-1][1]:,.0f}", list(runs).index(run), points)
            for run, points in drawn
        ]
        drawing = figures.chart(curves, "Training samples a second over the epochs", legal=(0, math.inf))
        chart = page.figure("Training samples a second", drawing, "Without measurements and checkpoints.")
    return page.table(header, rows, "Speed of every run") + f'<div class="grid">{chart}</div>'


def _settings_section(runs: Sequence[Run]) -> str:
    if len(runs) == 1 and runs[0].settings is not None:
        return _own_settings(runs[0].settings)
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [[f"<code>{escape(key)}</code>", *(escape(str(run.config.get(key, "–"))) for run in runs)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    same = [row[:2] for row in rows if len(set(row[1:])) == 1]
    header = ["Setting", *(escape(run.name) for run in runs)]
    shared = page.table(["Setting", "Value"], same, "Settings that all runs share") if same else ""
    return (page.table(header, differing, "Settings that differ") if differing else "") + (
        page.folded("Settings all runs share", shared) if len(runs) > 1 else shared
    )


def _own_settings(config: Config) -> str:
    """What the run changed of its recipe or the defaults first, the rest folded."""
    base, name = _base(config)
    changed = [
        [f"<code>{escape(key)}</code>", escape(str(value)), escape(str(usual))]
        for key, value, usual in _changes(config)
    ]
    rest = [
        [f"<code>{escape(key)}</code>", escape(str(value))]
        for key, value in dataclasses.asdict(config).items()
        if value == getattr(base, key)
    ]
    first = (
        page.table(["Setting", "This run", escape(name)], changed, "Settings that this run changed")
        if changed
        else f"<p>Exactly as {escape(name)}.</p>"
    )
    return first + page.folded(
        f"{count(len(rest), 'setting')} as {name}", page.table(["Setting", "Value"], rest, "Settings that stayed")
    )


def _base(config: Config) -> tuple[Config, str]:
    """What the run's settings started from, and how to call it."""
    if config.recipe not in recipe_names():  # none, or one of another version
        return dataclasses.replace(Config(), recipe=config.recipe), "the defaults"
    return read_recipe(config.recipe), f"the recipe {config.recipe}"


def _changes(config: Config) -> list[tuple[str, object, object]]:
    base = dataclasses.asdict(_base(config)[0])
    found = dataclasses.asdict(config)
    return [(key, value, base[key]) for key, value in found.items() if value != base[key] and key not in PLACES]


def training_command(config: Config) -> str:
    """The command line that trains the same again: the recipe, and what the run changed of it."""
    words = ["--recipe", config.recipe if config.recipe in recipe_names() else "none"]
    for key, value, _ in _changes(config):
        flag = key.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return f"python -m hypercontrast.train {shlex.join(words)}"


def _environment_section(runs: Sequence[Run]) -> str:
    known = [run for run in runs if run.environment]
    if not known:
        return ""
    keys = dict.fromkeys(key for run in known for key in run.environment)
    rows = [[escape(key), *(escape(run.environment.get(key, "–")) for run in known)] for key in keys]
    header = ["", *(escape(run.name) if len(runs) > 1 else "This run" for run in known)]
    return page.table(header, rows, "Environment of every run")


def _next_section(runs: Sequence[Run]) -> str:
    # The driver writes the embeddings last of all.
    unfinished = [run for run in runs if run.embeddings is None]
    parts = []
    if unfinished:
        names = _join([run.name for run in unfinished])
        parts += [f"<p>{escape(f'Not finished yet: {names}. Continue from the newest good checkpoint with')}</p>"]
        parts += [page.command(f"python -m hypercontrast.train --resume {_shell(run.path)}") for run in unfinished]
        parts += ["<p>which ends as if it had never stopped.</p>"]
    if commands := [training_command(run.settings) for run in runs if run.settings is not None]:
        each = "the same run" if len(runs) == 1 else "each run"
        parts += [f"<p>Train {each} again, into a folder of its own, with</p>", page.command("\n".join(commands))]
    if not unfinished:
        parts += ["<p>A run that is cut short continues from its newest good checkpoint with</p>"]
        parts += [page.command("python -m hypercontrast.train --resume RUN_FOLDER")]
    parts += ["<p>Compare runs on one page with</p>"]
    parts += [page.command("python -m hypercontrast.report RUN_FOLDER [RUN_FOLDER ...]")]
    return "".join(parts)


def _shell(path: Path) -> str:
    return shlex.quote(os.path.relpath(path))


# -------------------------------------------------------------------------------------------- the page


def write_report(run_dirs: Iterable[str | Path], output: str | Path | None = None) -> Path:
    """Write one HTML page of a run, or comparing several; returns its path.

    output: by default report.html in the run folder, or in the nearest folder above all of them.
    Raises FileNotFoundError, ValueError or ImportError as `load_runs` does, UsageError (a ValueError) if it cannot be
    written.
    """
    runs = load_runs(run_dirs)
    if output is None:
        home = Path(os.path.commonpath([run.path for run in runs]))
        output = home / "report.html"
    target = Path(output)
    content = render(runs)
    with access(target, "written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8", errors="replace")  # names of folders need not be UTF-8
    return target


def render(runs: Sequence[Run]) -> str:
    """The whole page."""
    title, lead = _title(runs), outcome(runs)
    if any(len(run.name) > LONG_NAME for run in runs) and len(runs) > 1:
        signs = [chr(ord("A") + place) if place < 26 else str(place + 1) for place in range(len(runs))]
        runs = [dataclasses.replace(run, name=f"{sign} {run.name}") for sign, run in zip(signs, runs, strict=True)]
    return page.document(
        title,
        _below(runs),
        (
            ("outcome", "Outcome", _outcome_section(runs, lead)),
            ("curves", "Over the epochs", _curves_section(runs)),
            ("cosines", "Cosines between class means", _matrices_section(runs)),
            ("reach", "What can be reached", _reach_section(runs)),
            ("confusion", "What is taken for what", confusion_section(runs)),
            ("pictures", "Typical and mistaken pictures", pictures_section(runs[0]) if len(runs) == 1 else ""),
            ("sphere", "The class means on the sphere", _sphere_section(runs)),
            ("metrics", "Neural collapse in numbers", _metrics_section(runs)),
            ("speed", "Speed", _speed_section(runs)),
            ("settings", "Settings", _settings_section(runs)),
            ("environment", "Environment", _environment_section(runs)),
            ("next", "Go on from here", _next_section(runs)),
        ),
    )


def _title(runs: Sequence[Run]) -> str:
    names = runs[0].title if len(runs) == 1 else _join([run.name for run in runs])
    datasets = _join(list(dict.fromkeys(str(run.config.get("dataset", "unnamed data")) for run in runs)))
    return f"{names if len(names) < 40 else f'{len(runs)} runs'} on {datasets}"


def _below(runs: Sequence[Run]) -> str:
    """Under the title: which run it is and how far it came."""
    if len(runs) == 1:
        return f'<p class="soft"><code>{escape(runs[0].name)}</code> · {escape(_state(runs[0]))}</p>'
    unfinished = [f"{run.name} {_state(run)}" for run in runs if len(run.epochs) != _planned(run)]
    return f'<p class="soft">Not all are finished: {escape(_join(unfinished))}.</p>' if unfinished else ""


def _planned(run: Run) -> object:
    return run.config.get("epochs", len(run.epochs))


def _state(run: Run) -> str:
    trained, planned = len(run.epochs), _planned(run)
    return count(trained, "epoch") if trained == planned else f"stopped after epoch {trained} of {planned}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for a mistake in the call or a damaged run, 130 if interrupted."""
    try:
        args = parser().parse_args(argv)
        say(write_report(args.runs, args.output))
    except (OSError, ValueError, ImportError) as error:
        return fail(2, str(error))
    except KeyboardInterrupt:
        return fail(130, "interrupted; nothing was written")
    return 0


def parser() -> Parser:
    parser = Parser(prog=command("report"), description="One self-contained HTML page of a run, or comparing several.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder written by hypercontrast.train")
    parser.add_argument("--output", metavar="FILE", help="default: report.html beside what the runs share")
    return parser


if __name__ == "__main__":
    sys.exit(main())
