"""The paper's tables beside ours, value by value; and its figure 2 from our runs.

    python -m hypercontrast.table TABLE [TABLE ...] [RUN ...] [--data-root DIR] [--markdown | --json]
    python -m hypercontrast.table figure2 RUN [RUN ...] [--output FILE] [--json]

TABLE is 1 to 14, or all; RUN is a folder that `hypercontrast.train` wrote, finished or not. Runs that differ in their
seed alone are taken together: ours is their mean, with the standard deviation (of a sample) from two runs on. Of runs
with one seed the newest finished one counts; the others are named below the tables.

States of a value
- reproduced: the recipe was followed in everything that matters, the run is finished, and ours lies within
  2·sqrt(s_paper² + s_ours²) of the paper's. s_paper is the standard deviation of table 13 where the value is there,
  else `paper.ASSUMED`; s_ours is 0 for a single seed.
- differs: finished, but further off, or not run as the recipe says; a note says which.
- running: not finished; a note says which epoch it is in.
- needs data: no run, and the pictures are not there. - not run: a note gives the command.

Runs on data the paper does not have, or on a part of its own, are stand-ins: they are shown apart, beside the column
with as many classes (in tables 4 and 5, which have one column, beside that), and never called reproduced.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypercontrast import checkpoint, data, figures
from hypercontrast.checkpoint import CheckpointError
from hypercontrast.config import Config, UsageError, read_recipe
from hypercontrast.data.facts import FACTS, TRANSFER_FACTS
from hypercontrast.data.transfer import locate as locate_transfer_set
from hypercontrast.figures import Curve
from hypercontrast.output import say
from hypercontrast.paper import (
    ACCURACY,
    ASSUMED,
    BEST_TEMPERATURE,
    CLASSES,
    COLLAPSE,
    DATASETS,
    PROBES,
    TABLES,
    TEMPERATURES,
    Cell,
    Table,
)
from hypercontrast.progress import Parser, aligned, command, fail, to_json
from hypercontrast.report import describe, legal_range
from hypercontrast.results import FREE, Group, Run, read_groups
from hypercontrast.runs import LOSS_TITLES

FIGURE = "figure2"
COLUMNS = 100
RULE = (
    "reproduced: the recipe was followed, the run is finished, and |ours − paper| ≤ 2·sqrt(s_paper² + s_ours²)."
    f" s_paper is the standard deviation in table 13 where the value is there, else {ASSUMED};"
    " s_ours is that over seeds, 0 for a single one."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for a mistake in the call or a damaged run, 130 if interrupted."""
    try:
        args = parser().parse_args(argv)
        names, paths = _split(args.words)
        if names == [FIGURE] and args.markdown:
            raise UsageError(f"markdown must be left out with {FIGURE}, which is a picture")
        if names != [FIGURE] and args.output is not None:
            raise UsageError(f"output must be left out with tables, which are printed, got {args.output}")
        groups = read_groups(paths)
        if names == [FIGURE]:
            output = f"{FIGURE}.svg" if args.output is None else args.output
            checkpoint.write_atomic(Path(output), figure2(groups).encode())
            say(to_json({"figure": output}) if args.json else output)
        elif args.json:
            say(to_json(as_records(names, groups, args.data_root)))
        else:
            say(render(names, groups, args.data_root, markdown=args.markdown))
    except (UsageError, CheckpointError, OSError) as error:
        return fail(2, str(error))
    except KeyboardInterrupt:
        return fail(130, "interrupted; nothing was written")
    return 0


def parser() -> Parser:
    parser = Parser(prog=command("table"), description="The paper's tables beside ours.")
    parser.add_argument(
        "words", nargs="+", metavar="TABLE|RUN", help=f"1 to {len(TABLES)}, all or {FIGURE}; then run folders"
    )
    parser.add_argument("--data-root", default="data", help="where the data sets are, to say which are missing")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="Markdown, for a file")
    form.add_argument("--json", action="store_true", help=f"one object a value, in a list; of {FIGURE} its file")
    parser.add_argument("--output", metavar="FILE", help=f"what {FIGURE} writes, by default {FIGURE}.svg")
    return parser


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of tables, which come first, and the run folders."""
    count = next((n for n, word in enumerate(words) if not re.fullmatch(rf"\d+|all|{FIGURE}", word)), len(words))
    names, paths = list(words[:count]), list(words[count:])
    if "all" in names:
        names = [*dict.fromkeys([*TABLES, *(name for name in names if name != "all")])]
    if not names or any(name not in (*TABLES, FIGURE) for name in names) or (FIGURE in names and len(names) > 1):
        raise UsageError(f"table must be 1 to {len(TABLES)}, all, or {FIGURE} alone, got {' '.join(words)!r}")
    return names, paths


# What our runs have for a value.


@dataclass(frozen=True)
class Ours:
    """The runs of one value.

    values: one a seed, in the paper's unit. departures: how they differ from the recipe, in words.
    lacking: finished runs that have no value. unfinished: how far the others are, in words, empty without others.
    """

    runs: Sequence[Run]
    values: Sequence[float]
    departures: Sequence[str]
    lacking: Sequence[Run]
    unfinished: str


@cache
def _recipe(name: str) -> Config:
    return read_recipe(name)


def _belongs(config: Config, cell: Cell) -> bool:
    return config.limit == 0 and _shares(config, cell, cell.identity)


def _shares(config: Config, cell: Cell, settings: Iterable[str]) -> bool:
    settings = tuple(settings)
    return any(
        all(getattr(config, name) == getattr(_recipe(recipe), name) for name in settings) for recipe in cell.recipes
    )


def _stands_in(group: Group, cell: Cell) -> bool:
    config = group.config
    if not _shares(config, cell, (name for name in cell.identity if name != "dataset")):
        return False
    if config.dataset == cell.dataset:
        return config.limit > 0
    if cell.source[0] in ("transfer.json", "corruptions.json"):  # what was measured has its own classes
        return any(cell.source[0] in run.files for run in group.runs)
    return config.dataset not in DATASETS and CLASSES.get(group.classes or 0) == cell.dataset


def _departures(config: Config, recipe: Config, besides: Iterable[str] = ()) -> list[str]:
    """What the settings have that the recipe has not; what a reader asks first comes first."""
    settings = dataclasses.asdict(recipe)
    order = dict.fromkeys(("dataset", "limit", "epochs", *settings))
    changed = [n for n in order if n not in FREE and n not in besides and getattr(config, n) != settings[n]]
    return [_departure(name, config, recipe) for name in changed]


def _departure(name: str, config: Config, recipe: Config) -> str:
    value, wanted = getattr(config, name), getattr(recipe, name)
    if name == "dataset":
        return f"{_short(value)} for {wanted}"
    if name == "limit" and config.dataset in DATASETS:
        return f"{value:,} of {FACTS[config.dataset].train:,} pictures"
    if name == "epochs" and value < wanted:
        return f"{value} of {wanted} epochs"
    return f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"


def _short(dataset: str) -> str:
    """`parquet:/data/tin100` as `tin100`."""
    return Path(dataset.rpartition(":")[2]).name or dataset


def _measured_otherwise(run: Run, cell: Cell) -> list[str]:
    """How a run's result file departs from the paper's protocol."""
    file = run.files.get(cell.source[0], {})
    found = []
    if "epoch" in file and file["epoch"] != run.config.epochs:
        found.append(f"measured at epoch {file['epoch']} of {run.config.epochs}")
    if cell.source[0] == "evaluation.json" and cell.source[1].endswith("probe"):
        probe, (epochs, lr) = file.get("probe"), PROBES[cell.dataset]
        if not isinstance(probe, dict):
            found.append(f"probe by {probe}")
        elif (probe.get("epochs"), probe.get("lr")) != (epochs, lr):
            found.append(f"probe of {probe.get('epochs')} epochs at lr {probe.get('lr')}, not {epochs} at {lr}")
    if cell.source[0] == "transfer.json":
        test, all_of_them = run.find((*cell.source[:-1], "test")), TRANSFER_FACTS[cell.source[2]].validation
        if test != all_of_them:
            found.append(f"{test} of {all_of_them:,} test pictures")
    if cell.source[0] == "corruptions.json":
        if file.get("source") != "imagenet-c":
            found.append(f"{file.get('source')} corruptions")
        if file.get("reference") != "AlexNet":
            found.append(f"relative to {file.get('reference')}")
    return found


def _closest(cell: Cell, groups: Sequence[Group]) -> Ours:
    """The group that follows one of the cell's recipes best."""

    def rank(choice: tuple[Group, int]) -> tuple[int, int, int]:
        group, recipe = choice
        return len(_departures(group.config, _recipe(cell.recipes[recipe]))), recipe, -len(group.finished)

    group, recipe = min(((group, n) for group in groups for n in range(len(cell.recipes))), key=rank)
    found = [(run, value) for run in group.finished if (value := run.value(cell.source)) is not None]
    departures = _departures(group.config, _recipe(cell.recipes[recipe]))
    departures += dict.fromkeys(phrase for run, _ in found for phrase in _measured_otherwise(run, cell))
    if found and len(found) < cell.seeds:
        departures.append(f"{len(found)} of {cell.seeds} seeds")
    values = [value * cell.quantity.scale for _, value in found]
    lacking = [run for run in group.finished if run.value(cell.source) is None]
    return Ours(group.runs, values, departures, lacking, _unfinished(group.runs))


def _best_temperature(cell: Cell, groups: Sequence[Group]) -> Ours:
    """The temperature with the highest mean accuracy, among runs that differ in it and in their seed alone."""
    recipe = _recipe(cell.recipes[0])
    sweeps: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        sweeps.setdefault(tuple(_departures(group.config, recipe, besides=["temperature"])), []).append(group)
    departures, sweep = min(sweeps.items(), key=lambda item: (len(item[0]), -len(item[1])))
    found = {group.config.temperature: [run.value(ACCURACY) for run in group.finished] for group in sweep}
    accuracy = {tau: statistics.fmean(known) for tau, values in found.items() if (known := _known(values))}
    tried = len(accuracy.keys() & set(TEMPERATURES))
    short = [f"{tried} of {len(TEMPERATURES)} temperatures"] if tried < len(TEMPERATURES) else []
    best = [max(sorted(accuracy), key=accuracy.__getitem__)] if accuracy else []
    runs = [run for group in sweep for run in group.runs]
    lacking = [run for run in runs if run.finished and run.value(ACCURACY) is None]
    return Ours(runs, best, [*departures, *short], lacking, _unfinished(runs))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _paths(runs: Iterable[Run]) -> str:
    return ", ".join(str(run.path) for run in runs)


def _unfinished(runs: Iterable[Run]) -> str:
    epochs = [f"epoch {run.epoch} of {run.config.epochs}" for run in runs if not run.finished]
    return ", ".join(dict.fromkeys(epochs))


# What is said about a value.


@dataclass(frozen=True)
class Line:
    """One value, as text and as numbers; `note` is what the state needs said, empty where it needs nothing."""

    labels: tuple[str, str, str]
    paper: str
    ours: str
    difference: str
    state: str
    note: str
    published: float
    measured: tuple[float, ...] = ()  # one a seed


def _line(cell: Cell, ours: Ours | None, root: str, stand_in: str = "") -> Line:
    quantity = cell.quantity
    paper = f"{cell.value:.{quantity.digits}f}"
    if cell.seeds > 1 and cell.std is not None:
        paper += f" ± {cell.std:.{quantity.digits}f}"
    title = DATASETS[cell.dataset]
    labels = (cell.method, f"{stand_in} for {title}" if stand_in else title, cell.column)
    if ours is None or not ours.values:
        return Line(labels, paper, "–", "–", *_unmeasured(cell, ours, root), cell.value)
    mean, digits = statistics.fmean(ours.values), quantity.our_digits
    n, std = len(ours.values), statistics.stdev(ours.values) if len(ours.values) > 1 else 0.0
    text = f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if n > 1 else "")
    if cell.source != BEST_TEMPERATURE:  # which is one, whatever the number of seeds
        text += f", n = {n}"
    state, note = _verdict(cell, ours, abs(mean - cell.value), std)
    difference = round(mean - cell.value, digits) + 0.0  # no −0.00
    signed = f"{difference:+.{digits}f}".replace("-", "−")
    return Line(labels, paper, text, signed, state, note, cell.value, tuple(ours.values))


def _verdict(cell: Cell, ours: Ours, off: float, std: float) -> tuple[str, str]:
    published = cell.quantity.assumed_std(cell.value) if cell.std is None else cell.std
    tolerance = 2 * (published**2 + std**2) ** 0.5
    notes = list(ours.departures)
    rounding = 1e-9  # of 0.3 - 0.3 and its like
    if not notes and off > tolerance + rounding:
        digits = cell.quantity.our_digits
        notes.append(f"{off:.{digits}f} off, at most {tolerance:.{digits}f} expected")
    state = "differs" if notes else "reproduced"
    if ours.lacking:
        notes.append(f"nothing yet from {_paths(ours.lacking)}")
    if ours.unfinished:
        notes.append(f"others running, {ours.unfinished}")
    return state, ", ".join(notes)


def _unmeasured(cell: Cell, ours: Ours | None, root: str) -> tuple[str, str]:
    """State and note of a value that we do not have."""
    where = "" if root == "data" else f" --data-root {shlex.quote(root)}"
    if ours is None:
        if reason := _missing(data.locate, cell.dataset, root):
            return f"needs data {cell.dataset}", reason
        command = f"python -m hypercontrast.train --recipe {cell.recipes[0]}{where}"
        if cell.source == BEST_TEMPERATURE:
            command += f" --temperature T, with T = {', '.join(f'{t:g}' for t in TEMPERATURES)}"
        elif cell.seeds > 1:
            command += f" --seed S, with {cell.seeds} seeds"
        return "not run", command
    if ours.unfinished:
        return "running", ", ".join([ours.unfinished, *ours.departures])
    run = ours.lacking[0]
    folder = shlex.quote(str(run.path))
    if cell.source[0] == "evaluation.json":
        if reason := _missing(data.locate, run.config.dataset, run.config.data_root):
            return f"needs data {_short(run.config.dataset)}", reason
        return "not run", f"python -m hypercontrast.evaluate {folder}"
    if cell.source[0] == "transfer.json":
        name = cell.source[2]
        if reason := _missing(locate_transfer_set, name, root):
            return f"needs data {name}", reason
        return "not run", f"python -m hypercontrast.transfer {folder} --datasets {name}{where}"
    if cell.source[0] == "corruptions.json":
        if run.config.dataset != "imagenet1k":
            return "not run", f"python -m hypercontrast.corruptions {folder} --reference RUN"
        if not (images := Path(root, "imagenet-c")).is_dir():
            return "needs data imagenet-c", f"data_root must hold {images}/CORRUPTION/SEVERITY/CLASS/*.JPEG"
        return "not run", f"python -m hypercontrast.corruptions {folder}{where}"
    return "not measured", f"{run.path / 'metrics.jsonl'} holds no {cell.source[-1]}"


@cache
def _missing(locate: Callable[[str, str], object], name: str, root: str) -> str:
    """Why a data set cannot be read, empty where it can."""
    try:
        locate(name, root)
    except UsageError as error:
        return str(error)
    return ""


def lines(table: Table, groups: Sequence[Group], root: str) -> tuple[list[Line], list[Line], list[Path]]:
    """The table's values, the stand-ins beside them, and the runs of its cells that others follow more closely."""
    own, stand_ins = [], []
    shown: list[Path] = []
    candidates: list[Path] = []

    def ours_of(cell: Cell, chosen: Sequence[Group]) -> Ours:
        ours = (_best_temperature if cell.source == BEST_TEMPERATURE else _closest)(cell, chosen)
        shown.extend(run.path for run in ours.runs)
        candidates.extend(run.path for group in chosen for run in group.runs)
        return ours

    for cell in table.cells:
        chosen = [group for group in groups if _belongs(group.config, cell)]
        own.append(_line(cell, ours_of(cell, chosen) if chosen else None, root))
        beside: dict[tuple[str, int], list[Group]] = {}
        for group in groups:
            if _stands_in(group, cell):
                beside.setdefault((group.config.dataset, group.config.limit), []).append(group)
        for (dataset, _), members in beside.items():
            stand_ins.append(_line(cell, ours_of(cell, members), root, stand_in=_short(dataset)))
    stand_ins.sort(key=lambda line: line.labels[1])  # one data set after the other
    return own, stand_ins, [path for path in dict.fromkeys(candidates) if path not in shown]


# As data and as text.


def as_records(names: Iterable[str], groups: Sequence[Group], root: str = "data") -> list[dict[str, Any]]:
    """Every value of these tables and its stand-ins: table, method, data, column, paper, ours (one a seed), state, note
    and whether it is a stand-in.
    """
    records = []
    for table in dict.fromkeys(TABLES[name] for name in names):
        own, stand_ins, _ = lines(table, groups, root)
        for line in (*own, *stand_ins):
            labels = dict(zip(("method", "data", "column"), line.labels, strict=True))
            numbers = {"paper": line.published, "ours": line.measured}
            said = {"state": line.state, "note": line.note, "stand_in": line in stand_ins}
            records.append({"table": table.name, **labels, **numbers, **said})
    return records


def render(names: Iterable[str], groups: Sequence[Group], root: str = "data", *, markdown: bool = False) -> str:
    """The tables of these names, each once, then the rule that says what counts as reproduced.

    root: where the data sets are looked for. Raises UsageError if a recipe cannot be read.
    """
    tables = dict.fromkeys(TABLES[name] for name in names)
    parts = [_section(table, groups, root, markdown) for table in tables]
    lost = [run for group in groups if not any(_has_place(group, table) for table in tables) for run in group.runs]
    if lost:
        where = "this table" if len(tables) == 1 else "these tables"
        parts.append(_paragraph(f"No place in {where}: {_paths(lost)}.", markdown))
    if repeats := [run for group in groups for run in group.repeats]:
        parts.append(_paragraph(f"Not counted, for another run has the same seed: {_paths(repeats)}.", markdown))
    return "\n\n".join([*parts, _paragraph(RULE, markdown)])


def _has_place(group: Group, table: Table) -> bool:
    return any(_belongs(group.config, cell) or _stands_in(group, cell) for cell in table.cells)


def _section(table: Table, groups: Sequence[Group], root: str, markdown: bool) -> str:
    own, stand_ins, passed_over = lines(table, groups, root)
    notes = list(dict.fromkeys(f"{line.state}: {line.note}" for line in (*own, *stand_ins) if line.note))
    header = ("method", "data", table.heading, "paper", "ours", "difference", "state")
    grid = _markdown_grid if markdown else _text_grid

    def block(chosen: Sequence[Line]) -> str:
        rows = [
            (*line.labels, line.paper, line.ours, line.difference, line.state + _mark(line, notes)) for line in chosen
        ]
        kept = [column for column, name in enumerate(header) if name]
        return grid([[row[column] for column in kept] for row in (header, *rows)])

    parts = [f"{'## ' if markdown else ''}{table.name}: {table.title}"]
    if own:
        parts.append(block(own))
    if stand_ins:
        parts.append(
            _paragraph(
                "Stand-ins: other data, beside the paper's column with as many classes if there is one.", markdown
            )
        )
        parts.append(block(stand_ins))
    if notes:
        parts.append("\n".join(f"{'- ' * markdown}[{n}] {note}" for n, note in enumerate(notes, start=1)))
    if passed_over:
        runs = ", ".join(map(str, passed_over))
        parts.append(_paragraph(f"Not shown, for other runs follow the recipes more closely: {runs}.", markdown))
    parts += [_paragraph(note, markdown) for note in table.notes]
    return "\n\n".join(parts)


def _mark(line: Line, notes: Sequence[str]) -> str:
    return f" [{notes.index(f'{line.state}: {line.note}') + 1}]" if line.note else ""


def _paragraph(text: str, markdown: bool) -> str:
    return text if markdown else textwrap.fill(text, COLUMNS, break_long_words=False, break_on_hyphens=False)


def _text_grid(rows: Sequence[Sequence[str]]) -> str:
    columns = len(rows[0])
    return aligned(rows, range(columns - 4, columns - 1))


def _markdown_grid(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    columns = len(rows[0])
    rule = "|" + "|".join("--:" if columns - 4 <= column < columns - 1 else "---" for column in range(columns)) + "|"
    return "\n".join([header, rule, *body])


# Figure 2.


def figure2(groups: Sequence[Group]) -> str:
    """The metrics of table 3 and the accuracy over the epochs, as one SVG: a curve a loss, the mean over its seeds.

    A curve has the epochs that all seeds measured. Raises UsageError for runs on several data sets, for a loss with
    runs that differ in more than their seed, and where nothing was measured yet.
    """
    datasets = dict.fromkeys(group.config.dataset for group in groups)
    if len(datasets) > 1:
        raise UsageError(f"{FIGURE} must have runs on one data set, got {', '.join(datasets)}")
    by_loss: dict[str, Group] = {}
    for group in groups:
        if other := by_loss.get(group.config.loss):
            what = ", ".join(_departures(group.config, other.config))
            raise UsageError(
                f"{FIGURE} must have runs of a loss that differ in their seed alone,"
                f" got {other.runs[0].path} and {group.runs[0].path}: {what}"
            )
        by_loss[group.config.loss] = group
    drawings = []
    for key in (*COLLAPSE, "accuracy"):
        title = describe(key).title
        curves = [
            Curve(name, colour, points)
            for colour, (loss, name) in enumerate(LOSS_TITLES.items())
            if loss in by_loss and (points := _mean_course(by_loss[loss], key))
        ]
        if curves:
            drawings.append((title, figures.chart(curves, f"{title} over the epochs", legal=legal_range(key))))
    if not drawings:
        raise UsageError(f"{FIGURE} must have runs with a measured epoch, got {len(groups)} without")
    return figures.sheet(f"Neural collapse on {_short(next(iter(datasets)))}, mean over seeds", drawings)


def _mean_course(group: Group, key: str) -> list[tuple[float, float]]:
    courses = [dict(run.series(key)) for run in group.runs]
    common = set.intersection(*map(set, courses))
    return [(epoch, statistics.fmean(course[epoch] for course in courses)) for epoch in sorted(common)]


if __name__ == "__main__":
    sys.exit(main())
