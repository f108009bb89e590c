"""Pictures of what was measured: `python -m bench plot FILE.csv ... --output FOLDER`.

From rows of the matrix, for each dtype (and each device, where there are several), a picture of what they hold:

    time-DTYPE.png      milliseconds of forward and backward against N, with the band between the 20th and the 80th
                        percentile
    forward-DTYPE.png   the same of the forward alone
    memory-DTYPE.png    peak MiB beyond inputs and outputs against N

and from points of the roofline roofline-DTYPE.png. Cases that differ in N alone share a panel: lines show the growth,
dashes that of the products, F1; cases of one N are bars. A form that ran out of memory has a cross above the axes, at
the least such N; what is missing for another reason, a wrong result among them, is named below. Where files have the
same form of the same case, the later file counts.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import forms, record
from bench.peers import OURS
from bench.record import Case, Point, Row
from hypercontrast.config import UsageError, access

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's, darkened where thin lines on white need it: told apart in every colour vision. Ours alone has the
# vermilion, a thick line and round marks.
OUR_COLOUR = "#d55e00"
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#5b4b9a", "#4d4d4d")
MARKS = ("s", "^", "D", "v", "P", "X", "<", ">")
SOFT, GUIDE, GRID = "#5a5a5a", "#8a8a8a", "#e4e4e4"
GROWTH = {**dict.fromkeys(forms.PROTOTYPE_LOSSES, (1, "2NKD")), "supcon": (2, "2N²D")}  # of F1 with N, and F1
NAMES = {"ntce": "NTCE", "nonl": "NONL", "normface": "NormFace", "supcon": "SupCon"}

# Inches.
DPI = 150
COLUMNS = 2
WIDTH, LINES_HEIGHT, BAR_HEIGHT = 6.6, 3.5, 0.27
TOP, GAP, BOTTOM = 1.4, 1.0, 0.6
LETTER, LINE = 0.078, 0.17
ABOVE = 1.04  # of the height of the axes: where crosses are


@dataclass(frozen=True)
class Quantity:
    """What of a row is drawn, and the two ends of its band where it has one."""

    name: str
    title: str
    unit: str
    columns: tuple[str, ...]
    ratio: str = ""  # the column of a time's ratio to ours

    @property
    def is_time(self) -> bool:
        return bool(self.ratio)

    def value(self, row: Row) -> float | None:
        """None for a wrong result: however fast, it is no measurement."""
        return None if row.status in ("wrong", "failed") else getattr(row, self.columns[0])

    def times_ours(self, row: Row) -> str:
        """How many times the time of ours, in words; nothing of ours itself and where it was not measured beside it."""
        times = getattr(row, self.ratio) if self.is_time and row.form != OURS else None
        if times is None or self.value(row) is None:
            return ""
        return f"  {times:.2g}×" if times < 100 else f"  {times:.0f}×"

    def band(self, row: Row) -> tuple[float, float] | None:
        ends = tuple(getattr(row, column) for column in self.columns[1:])
        return None if not ends or None in ends else ends


QUANTITIES = (
    Quantity(
        "time", "Time of forward and backward", "ms", ("fwd_bwd_ms", "fwd_bwd_p20", "fwd_bwd_p80"), "fwd_bwd_ratio"
    ),
    Quantity("forward", "Time of the forward", "ms", ("fwd_ms", "fwd_p20", "fwd_p80"), "fwd_ratio"),
    Quantity("memory", "Peak memory beyond inputs and outputs", "MiB", ("scratch_mib",)),
)


@dataclass(frozen=True)
class Look:
    """How a form is drawn, the same in every panel of a picture."""

    colour: str
    mark: str
    width: float
    layer: int
    weight: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    others = (form for form in names if form != OURS)
    found = {
        form: Look(COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)], 1.5, 3, "normal") for i, form in enumerate(others)
    }
    return {**found, OURS: Look(OUR_COLOUR, "o", 3, 4, "bold")}


def draw(csv_files: Sequence[Path], folder: Path) -> list[Path]:
    """Write the pictures of all rows in these files; their paths.

    Raises: UsageError without matplotlib, for a file that is none of the bench's, and where nothing was measured.
    """
    figures = figures_of(*read(csv_files))
    if not figures:
        raise UsageError(f"FILE must hold measured rows, got none in {', '.join(map(str, csv_files))}")
    with access(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=DPI)
    return [folder / f"{name}.png" for name in figures]


def draw_beside(file: Path) -> list[Path]:
    """The pictures of a file that was just measured, in its folder; none, and a line that says why, where there can be
    none.
    """
    try:
        return draw([file], file.parent)
    except UsageError as error:
        print(f"no pictures: {error}")
        return []


def read(csv_files: Iterable[Path]) -> tuple[list[Row], list[Point]]:
    """The rows of the matrix and the points of the roofline in these files, the last of each case and form."""
    rows: dict[tuple, Row] = {}
    points: dict[tuple, Point] = {}
    for path in csv_files:
        with access(path, "read"), path.open(newline="") as file:
            of_roofline = "passes" in next(csv.reader(file), [])
        if of_roofline:
            points |= {(_where(p), p.op, p.passes, p.n, p.k, p.d, p.dtype): p for p in record.read(path, Point)}
        else:
            rows |= {(_where(row), row.case, row.form): row for row in record.read(path)}
    return list(rows.values()), list(points.values())


def figures_of(rows: Sequence[Row], points: Sequence[Point]) -> dict[str, Figure]:
    """{name: picture}."""
    several = len({_where(x) for x in (*rows, *points)}) > 1
    found = {}

    def name(what: str, where: str, dtype: str) -> str:
        return "-".join([what, *([re.sub(r"\W+", "_", where)] if several else []), dtype])

    for setting, chosen in _grouped(rows, lambda row: (_where(row), row.dtype)).items():
        for quantity in QUANTITIES:
            if any(quantity.value(row) is not None for row in chosen):
                found[name(quantity.name, *setting)] = growth_figure(chosen, quantity)
    for setting, together in _grouped(points, lambda p: (_where(p), p.dtype)).items():
        found[name("roofline", *setting)] = roofline_figure(together)
    return found


def _grouped(items: Iterable, key: Callable) -> dict:
    found: dict = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _where(x: Row | Point) -> str:
    return x.device + (f", {x.threads} thread{'s' * (x.threads > 1)}" if x.threads else "")


def _subtitle(together: Sequence[Row] | Sequence[Point]) -> str:
    """Where and with what these were measured; of several files it may be with several commits, on several days."""
    words = {"torch": "torch {}", "commit": "commit {}", "date": "{}"}
    values = {name: ", ".join(dict.fromkeys(getattr(x, name) for x in together)) for name in words}
    with_what = [words[name].format(value) for name, value in values.items()]
    return " · ".join([_where(together[0]), together[0].dtype, *with_what])


def _variant(row: Row) -> list[str]:
    """What a case has unlike most."""
    words = {"labels": "{}", "temperature": "τ = {:g}", "features": "{}", "ranks": "{} ranks"}
    usual = Case(*row.case[:5])
    return [words[name].format(value) for name, value in row.case._asdict().items() if value != getattr(usual, name)]


def _page(width: float, height: float, title: str, subtitle: str) -> Figure:
    """A page of so many inches with nothing but its title."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plot needs matplotlib: pip install 'hypercontrast[bench]'") from None
    page = Figure(figsize=(width, height), facecolor="white")
    page.text(0.2 / width, 1 - 0.2 / height, title, fontsize=15, weight="bold", va="top")
    page.text(0.2 / width, 1 - 0.54 / height, subtitle, fontsize=9.5, color=SOFT, va="top")
    return page


def _axes(
    page: Figure, left: float, top: float, width: float, height: float, title: str, indent: float = 0, pad: float = 8
) -> Axes:
    """Axes that many inches from the page's top left corner; their title begins so many inches further left."""
    across, down = page.get_size_inches()
    axes = page.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    axes.set_title(title, loc="left", x=-indent / width, fontsize=11, weight="bold", pad=pad)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def growth_figure(rows: Sequence[Row], quantity: Quantity) -> Figure:
    """Rows of one device and dtype, those that differ in N and form alone in a panel."""
    drawn = [row for row in rows if quantity.value(row) is not None or row.status == "out of memory"]
    names = list(dict.fromkeys(row.form for row in drawn))
    style = looks(names)
    panels = sorted(_grouped(drawn, lambda row: row.case._replace(n=0)).values(), key=_is_lines, reverse=True)
    lines = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    heights = [max(_height(panel) for panel in line) for line in lines]
    notes = [part for note in _notes(rows) for part in textwrap.wrap(note, 80 * min(COLUMNS, len(panels)))]
    width = max(WIDTH * min(COLUMNS, len(panels)), 8)
    height = TOP + sum(heights) + GAP * (len(lines) - 1) + BOTTOM + LINE * len(notes)
    page = _page(width, height, quantity.title, _subtitle(drawn))
    if quantity.is_time:
        page.text(
            0.2 / width,
            1 - 0.76 / height,
            "×: times as long as ours, at the last N of both",
            fontsize=9.5,
            color=SOFT,
            va="top",
        )
    label_width = LETTER * max(len(form) for form in names)
    top = TOP
    for line, height_there in zip(lines, heights, strict=True):
        for column, panel in enumerate(line):
            several, left = _is_lines(panel), column * WIDTH
            before, after = (0.75, label_width + 1.1) if several else (label_width + 0.35, 1.1)
            pad = 20 if several else 8  # room for crosses
            indent = before - 0.75  # titles of a column begin together, and have all of its width
            axes = _axes(
                page, left + before, top, WIDTH - before - after, _height(panel), _panel_title(panel), indent, pad
            )
            (_draw_lines if several else _draw_bars)(axes, panel, quantity, style)
        top += height_there + GAP
    for i, note in enumerate(reversed(notes)):
        page.text(0.2 / width, (0.1 + LINE * i) / height, note, fontsize=8.5, color=SOFT)
    return page


def _is_lines(panel: Sequence[Row]) -> bool:
    return len({row.n for row in panel}) > 1


def _height(panel: Sequence[Row]) -> float:
    return LINES_HEIGHT if _is_lines(panel) else BAR_HEIGHT * (len(panel) + 1)


def _panel_title(panel: Sequence[Row]) -> str:
    row = panel[0]
    n = "" if _is_lines(panel) else f"N = {row.n:,}  "
    return ", ".join([f"{NAMES.get(row.op, row.op)}   {n}K = {row.k:,}  D = {row.d:,}", *_variant(row)])


def _notes(rows: Sequence[Row]) -> list[str]:
    """What is not drawn, and why: a line for each form and reason."""
    missing = _grouped(
        (row for row in rows if row.status in ("absent", "wrong", "failed")),
        lambda row: (row.form, row.status, row.reason),
    )
    notes = []
    for (form, status, reason), there in missing.items():
        cases = ", ".join(f"{row.op} {row.n:,} × {row.k:,} × {row.d:,}" for row in there)
        notes.append(f"{form}: {status}" + f" ({reason})" * bool(reason) + f" at {cases}" * (status != "absent"))
    return notes


def _draw_lines(axes: Axes, panel: Sequence[Row], quantity: Quantity, style: dict[str, Look]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
    from matplotlib.transforms import ScaledTranslation

    by_form = {form: sorted(there, key=lambda row: row.n) for form, there in _grouped(panel, lambda x: x.form).items()}
    measured = [value for row in panel if (value := quantity.value(row)) is not None]
    out = {form: row.n for form, there in by_form.items() for row in reversed(there) if quantity.value(row) is None}
    axes.set_xscale("log", base=2)
    if quantity.is_time:
        axes.set_yscale("log")
        drawn = [*measured, *itertools.chain(*(quantity.band(row) or () for row in panel if quantity.value(row)))]
        low, high = min(drawn, default=1), max(drawn, default=1)  # of a panel of crosses alone
        axes.set_ylim(low / 1.6, high * 1.6)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    else:  # nothing at all is a result, and has no logarithm
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        axes.set_ylim(0, max(measured, default=1) * 2 + 1)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    sizes = sorted({row.n for row in panel})
    axes.xaxis.set_major_locator(FixedLocator(sizes[:: -max(1, math.ceil(len(sizes) / 7))]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(sizes[0] / 1.15, sizes[-1] * 1.15)
    axes.set_xlabel("N", fontsize=10)
    axes.set_ylabel(quantity.unit, fontsize=10)

    ends = []
    for form, there in by_form.items():
        look = style[form]
        points = [(row.n, value) for row in there if (value := quantity.value(row)) is not None]
        label = form + next(filter(None, map(quantity.times_ours, reversed(there))), "")
        (line,) = axes.plot(*zip(*points, strict=True) if points else ([], []), **_line(look), label=label)
        bands = [(row.n, *band) for row in there if quantity.value(row) is not None and (band := quantity.band(row))]
        if bands:
            axes.fill_between(*zip(*bands, strict=True), color=look.colour, alpha=0.22, linewidth=0, zorder=look.layer)
        if form in out:
            earlier = [other for other in out if out[other] == out[form]].index(form)
            beside = ScaledTranslation(earlier * 0.16, 0, axes.figure.dpi_scale_trans)
            # Above all values, for it is none.
            axes.plot(out[form], ABOVE, transform=axes.get_xaxis_transform() + beside, **_cross(look))
        ends.append((math.inf if form in out else points[-1][1], line))
    if out:
        axes.annotate(
            "out of memory", (min(out.values()), ABOVE), (-9, 0), xycoords=axes.get_xaxis_transform(),
            textcoords="offset points", ha="right", va="center", fontsize=8.5, color=SOFT, annotation_clip=False,
        )  # fmt: skip
    # In the order of their last values, as the eye meets them.
    lines = [line for _, line in sorted(ends, key=lambda end: -end[0])]
    lines += _draw_guide(axes, by_form.get(OURS, panel), quantity, sizes) if quantity.is_time else []
    legend = axes.legend(
        handles=lines, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9.5,
        labelcolor="linecolor", handlelength=1.6, labelspacing=0.7,
    )  # fmt: skip
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set_weight(style[OURS].weight if line.get_label() == OURS else "normal")


def _line(look: Look) -> dict[str, Any]:
    return {
        "color": look.colour, "marker": look.mark, "linewidth": look.width, "zorder": look.layer,
        "markersize": 4 + look.width, "markeredgecolor": "white", "markeredgewidth": 0.7,
    }  # fmt: skip


def _cross(look: Look) -> dict[str, Any]:
    return {
        "color": look.colour, "marker": "x", "markersize": 9, "markeredgewidth": 2.6, "zorder": 5, "clip_on": False
    }  # fmt: skip


def _draw_guide(axes: Axes, rows: Sequence[Row], quantity: Quantity, sizes: Sequence[int]) -> list[Line2D]:
    """Dashes with the slope of F1, through the largest case."""
    largest = max((row for row in rows if quantity.value(row) is not None), key=lambda row: row.n, default=None)
    if largest is None or largest.op not in GROWTH:
        return []
    power, f1 = GROWTH[largest.op]
    times = [quantity.value(largest) * (n / largest.n) ** power for n in sizes]
    return axes.plot(sizes, times, "--", color=GUIDE, linewidth=1.2, zorder=2, label=f"as F1 = {f1}")


def _draw_bars(axes: Axes, panel: Sequence[Row], quantity: Quantity, style: dict[str, Look]) -> None:
    """Ours first, then the others, the fastest first; a linear scale from zero."""
    rows = sorted(panel, key=lambda row: (quantity.value(row) is None, row.form != OURS, quantity.value(row)))
    largest = max((value for row in rows if (value := quantity.value(row))), default=1.0)
    for place, row in enumerate(rows):
        look, value = style[row.form], quantity.value(row)
        if value is None:
            text, end = "out of memory", 0.0
        else:
            axes.barh(place, value, color=look.colour, height=0.7, label=row.form)
            ends = quantity.band(row)
            if ends:
                spread = [[max(value - ends[0], 0)], [max(ends[1] - value, 0)]]
                axes.errorbar(value, place, xerr=spread, ecolor="black", elinewidth=1, capsize=2)
            text = f"{record.short(value)} {quantity.unit}{quantity.times_ours(row)}"
            end = max(value, ends[1] if ends else value)
        axes.annotate(
            text, (end, place), (8, 0), textcoords="offset points", va="center", annotation_clip=False,
            fontsize=9, weight=look.weight,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.form for row in rows], fontsize=9.5)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set(color=style[row.form].colour, weight=style[row.form].weight)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max([largest, *(ends[1] for row in rows if (ends := quantity.band(row)))]) * 1.02)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel(quantity.unit, fontsize=10)
    axes.grid(False, axis="y")


FLOORS = {"matmul": ("matmul_ms", "#4d4d4d"), "bytes": ("bytes_ms", "#0072b2"), "exp": ("exp_ms", "#cc79a7")}
OP_COLOURS = {"nonl": OUR_COLOUR, "ntce": "#009e73", "normface": "#5b4b9a", "supcon": "#8a6d00"}


def roofline_figure(points: Sequence[Point]) -> Figure:
    """Left, FLOP/s over FLOP a byte beneath the roofs of products, bytes and exponentials; right, the floors of each
    pass as shares of its time.
    """
    inside = max(3.8, 0.62 * len(points))
    page = _page(13.6, TOP + inside + 0.75, "Roofline of ours", _subtitle(points))
    _draw_roofs(_axes(page, 0.8, TOP, 5.4, inside, "Rate of the work   ○ forward   ● forward + backward"), points)
    _draw_floors(_axes(page, 9.0, TOP, 3.1, inside, "Floors, of the time taken"), points)
    return page


def _draw_roofs(axes: Axes, points: Sequence[Point]) -> None:
    from matplotlib.ticker import FuncFormatter

    products = max(max(p.square_tflops, p.products_tflops) for p in points)
    copy = max(p.copy_gbs for p in points)
    intensities = [p.flop / p.bytes for p in points]
    exp_roofs = [p.flop / p.exps * p.exp_gexps / 1e3 for p in points]
    ridge = 1e3 * products / copy
    low, high = min(ridge / 6, min(intensities) / 3), max(intensities) * 3
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(
        min(low * copy / 1e3, *(p.flop / p.time_ms / 1e9 for p in points)) / 1.5, 2 * max(products, *exp_roofs)
    )
    axes.plot([low, ridge, high], [low * copy / 1e3, products, products], color=FLOORS["matmul"][1], linewidth=2.2)
    axes.annotate(f"products {products:.3g} TFLOP/s", (high, products), (-4, 4), textcoords="offset points", ha="right",
                  fontsize=9, color=FLOORS["matmul"][1])  # fmt: skip
    axes.annotate(f"copy {copy:.3g} GB/s", (low * 1.5, low * 1.5 * copy / 1e3), (8, -4), textcoords="offset points",
                  va="top", fontsize=9, color=FLOORS["bytes"][1])  # fmt: skip
    axes.plot([low, ridge], [low * copy / 1e3, products], color=FLOORS["bytes"][1], linewidth=2.2)
    for p, intensity, exp_roof in zip(points, intensities, exp_roofs, strict=True):
        colour, done = OP_COLOURS[p.op], p.flop / p.time_ms / 1e9
        axes.plot([intensity / 1.15, intensity * 1.15], [exp_roof] * 2, color=FLOORS["exp"][1], linewidth=2.2)
        axes.plot([intensity] * 2, [done, done / p.share], ":", color=colour, linewidth=1.2)
        axes.plot(
            intensity, done, "o", markersize=9, markeredgecolor=colour, markeredgewidth=2, zorder=4, label=p.op,
            markerfacecolor="white" if p.passes == "forward" else colour,
        )  # fmt: skip
    top = max(range(len(points)), key=exp_roofs.__getitem__)
    axes.annotate("exponentials", (intensities[top], exp_roofs[top]), (0, 4), textcoords="offset points", ha="center",
                  fontsize=9, color=FLOORS["exp"][1])  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("least FLOP a byte moved", fontsize=10)
    axes.set_ylabel("TFLOP/s", fontsize=10)


def _draw_floors(axes: Axes, points: Sequence[Point]) -> None:
    for place, p in enumerate(points):
        for i, (kind, (column, colour)) in enumerate(FLOORS.items()):
            share = getattr(p, column) / p.time_ms
            axes.barh(place + 0.24 * (i - 1), share, height=0.22, color=colour)
            text, weight = (f"{kind} {share:.0%}", "bold") if kind == p.limit else (kind, "normal")
            axes.annotate(
                text, (share, place + 0.24 * (i - 1)), (4, 0), textcoords="offset points", va="center",
                fontsize=8, color=colour, weight=weight,
            )  # fmt: skip
    axes.set_yticks(
        range(len(points)),
        [
            f"{'○' if p.passes == 'forward' else '●'} {NAMES.get(p.op, p.op)}   {record.short(p.time_ms)} ms\n"
            f"{p.n:,} × {p.n if p.op == 'supcon' else p.k:,} × {p.d:,}"
            for p in points
        ],
    )
    for label, p in zip(axes.get_yticklabels(), points, strict=True):
        label.set(color=OP_COLOURS[p.op], fontsize=9)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlim(0, max(1, *(p.share for p in points)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.axvline(1, color=SOFT, linewidth=1)
    axes.grid(False, axis="y")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="CSV files of the matrix or the roofline")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where the pictures go (default: the first FILE's)"
    )


def run(args: argparse.Namespace) -> int:
    print(*draw(args.files, args.output or args.files[0].parent), sep="\n")
    return 0
