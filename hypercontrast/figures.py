"""Drawings of the report and of figure 2: plain numbers in, one SVG element as text out.

Colours come from CSS variables, those of `SCHEME`, so that one drawing suits the light and the dark scheme; words are
real text, about as large as the rest of the page is on a phone.

Shapes: N samples, K classes.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# SVG units are about the CSS pixels that a phone has.
SQUARE = 380
CHART_WIDTH, CHART_HEIGHT = 360, 220
RULER_WIDTH = 360
MARGIN = 24  # around the charts of a sheet
MOST_DOTS = 40  # points of a curve, beyond which dots would only thicken its line
RUN_COLOURS = 6  # --run0 ... --run5, then again from the start
# Told apart without colour, too; strokes and gaps of each run's curves.
DASHES = ("", "8 4", "2 4", "12 4 2 4", "5 3", "16 5")
LOG_SPAN = 30  # times its smallest value that a curve of positive ones must reach to be drawn on a logarithmic axis
ROUNDED_ZERO = 1e-12  # smaller values are what rounding has left of a zero
# Teal and brown: told apart in every colour vision, and so light that both black and white can be read on them.
COSINE_COLOURS = {1: (18, 132, 121), -1: (178, 95, 23)}
CLASS_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#c9a51b", "#41aacc",
    "#aa3377", "#ee7733", "#009988", "#888888", "#9970ab",
)  # fmt: skip
MOST_NAMES = 20  # classes, beyond which names no longer fit
MOST_VALUES = 12  # classes, beyond which the numbers in the cells no longer do
MOST_CELLS = 400  # classes, beyond which a cell would be less than a pixel, and stands for a few of them

SCHEME = """
:root { color-scheme: light dark;
  --paper: #fdfcfa; --ink: #1d2125; --soft: #5a636b; --rule: #dfdcd5; --card: #ffffff; --cell: #000000;
  --run0: #b0440a; --run1: #0b5fa0; --run2: #0b7557; --run3: #98377a; --run4: #6f6000; --run5: #4a4f55; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --ink: #e9e7e2; --soft: #a3abb2; --rule: #343a40; --card: #1a1e22; --cell: #ffffff;
  --run0: #ff9f63; --run1: #74bcff; --run2: #55d3a8; --run3: #f09fd3; --run4: #d8c850; --run5: #c2c7cc; } }
"""

STYLE = """
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 12px; }
image { image-rendering: pixelated; }
.end { text-anchor: end; } .centre { text-anchor: middle; } .mid { dominant-baseline: central; }
svg .cell { font-size: 11.5px; fill: var(--cell); }
.rule { fill: none; stroke: var(--rule); }
.ideal { fill: none; stroke: var(--soft); stroke-dasharray: 3 4; }
.line { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; }
.dots { stroke: var(--c); stroke-width: 6; stroke-linecap: round; }
svg .label { fill: var(--c); font-weight: 600; }
.run0 { --c: var(--run0); } .run1 { --c: var(--run1); } .run2 { --c: var(--run2); }
.run3 { --c: var(--run3); } .run4 { --c: var(--run4); } .run5 { --c: var(--run5); }
.bar { fill: none; stroke: var(--c); stroke-width: 9; opacity: .3; }
.mark { fill: var(--c); }
.globe { fill: var(--card); stroke: var(--rule); stroke-width: 1.5; }
.samples { fill: none; stroke-width: 3.4; stroke-linecap: round; opacity: .55; }
.spoke { stroke-width: 1.2; opacity: .6; }
.mean { stroke: var(--card); stroke-width: 1.5; }
g.back { opacity: .35; } .samples.back { opacity: .2; }
svg .name { font-size: 13px; font-weight: 700; }
svg .name { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .name.back { fill: var(--soft); font-weight: 500; }
"""

# A drawing takes the width of what it stands in: on a sheet that would be all of it, where browsers style inner ones.
SHEET_STYLE = f"""
:root {{ max-width: 1000px; background: var(--paper); font-family: system-ui, sans-serif; }}
svg svg {{ width: {CHART_WIDTH}px; height: {CHART_HEIGHT}px; }}
svg .title {{ font-size: 14px; font-weight: 600; }}
"""


@dataclass(frozen=True)
class Curve:
    """(epoch, value) pairs of one run; `colour` counts the page's runs, so that a run keeps its colour."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]


def cosine_matrix(cosines_KK: Array, names: Sequence[str], label: str) -> str:
    """Coloured cells on the fixed scale -1 to 1: hue by sign, opacity by |cosine|, so that zero is the page's own.

    Past MOST_CELLS classes a cell is the mean over neighbours.
    """
    starts = np.arange(0, len(names), classes_a_cell(len(names)))
    sizes = np.diff([*starts, len(names)])
    sums = np.add.reduceat(np.add.reduceat(cosines_KK, starts, axis=0), starts, axis=1)
    cells = sums / np.outer(sizes, sizes)
    rgba = _tinted(cells >= 0, np.clip(np.abs(cells), 0, 1))
    few = cosines_KK if len(names) <= MOST_VALUES else cosines_KK[:0]
    words = [["1" if row == c else _two_digits(x) for c, x in enumerate(xs)] for row, xs in enumerate(few)]
    return _matrix(rgba, words, names, label)


def confusion_matrix(counts_KK: Array, names: Sequence[str], label: str) -> str:
    """Rows are labels, columns decisions; opacity is the root of the share of the row, so that few errors show.

    Past MOST_CELLS classes a cell is the largest of its neighbours, on the diagonal those off it included.
    """
    K = len(names)
    share_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    starts = np.arange(0, K, classes_a_cell(K))
    cells = np.maximum.reduceat(np.maximum.reduceat(share_KK, starts, axis=0), starts, axis=1)
    fits = K <= MOST_VALUES and counts_KK.max(initial=0) < 10_000
    words = [[str(count or "") for count in row] for row in counts_KK.tolist()] if fits else []
    return _matrix(_tinted(np.eye(len(starts), dtype=bool), np.sqrt(cells)), words, names, label)


def classes_a_cell(K: int) -> int:
    """How many neighbouring classes a row of a matrix stands for."""
    return -(-K // MOST_CELLS)


def _matrix(rgba: Array, words: Sequence[Sequence[str]], names: Sequence[str], label: str) -> str:
    """A square of coloured cells, with names and words while they fit."""
    K = len(names)
    shown = [shorten(name, 11) for name in names] if K <= MOST_NAMES else []
    longest = max((len(name) for name in shown), default=0)
    margin = 12 + 6.5 * longest if shown else 0
    cell = (SQUARE - margin) / K
    parts = [
        f'<image x="{margin:.1f}" y="{margin:.1f}" width="{cell * K:.1f}" height="{cell * K:.1f}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{png(rgba)}"/>',
        f'<path class="rule" d="M{margin:.1f} {margin:.1f}h{cell * K:.1f}v{cell * K:.1f}h{-cell * K:.1f}z"/>',
    ]
    for c, name in enumerate(shown):
        middle, edge = margin + (c + 0.5) * cell, margin - 6
        parts.append(_text(edge, middle, name, "end mid"))
        parts.append(_text(middle, edge, name, "mid", turned=True) if longest > 2 else _text(middle, edge, name))
    for row, line in enumerate(words):
        for column, word in enumerate(line):
            x, y = margin + (column + 0.5) * cell, margin + (row + 0.5) * cell
            parts.append(_text(x, y, word, "cell centre mid") if word else "")
    return _svg(SQUARE, SQUARE, label, parts)


def _tinted(first_KK: Array, opacity_KK: Array) -> Array:
    rgba = np.empty((*opacity_KK.shape, 4), np.uint8)
    rgba[..., :3] = np.where(first_KK[..., None], COSINE_COLOURS[1], COSINE_COLOURS[-1])
    rgba[..., 3] = (255 * opacity_KK).round()
    return rgba


def png(pixels: Array) -> str:
    """A picture [H, W, C] of uint8 in base64: grey, colour, or colour with opacity (C = 1, 3, 4)."""
    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)  # 8 bits a channel
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
    )
    return base64.b64encode(content).decode()


def chart(
    curves: Sequence[Curve],
    label: str,
    *,
    ideal: float | None = None,
    legal: tuple[float, float] = (-math.inf, math.inf),
) -> str:
    """Values over epochs: every curve in the same axes, labelled where it ends; dashes mark the ideal.

    legal: the values there can be, which the axis does not leave. It is logarithmic where all values are positive, more
    than rounding, and far apart; an ideal of 0 is then out of the picture.
    """
    epochs = [epoch for curve in curves for epoch, _ in curve.points]
    first, last = min(epochs), max(epochs)
    values = [value for curve in curves for _, value in curve.points]
    if logarithmic := ROUNDED_ZERO < min(values) < max(values) / LOG_SPAN:
        ideal = ideal if ideal and ideal > 0 else None
        values = [math.log10(value) for value in values]
        low, high = float(math.floor(min(values))), float(math.ceil(max(values)))
    else:
        low, high = _value_range(values, ideal, legal)
    left, top, bottom = 46.0, 12.0, CHART_HEIGHT - 34.0
    right = CHART_WIDTH - 14 - 8.2 * max(len(shorten(curve.name, 12)) for curve in curves)

    def x(epoch: float) -> float:
        return left + (right - left) * ((epoch - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        place = math.log10(value) if logarithmic else value
        return bottom - (bottom - top) * (place - low) / (high - low)

    ticks = _powers(low, high) if logarithmic else [(tick, _minus(f"{tick:.6g}")) for tick in _ticks(low, high)]
    parts = []
    for tick, word in ticks:
        parts.append(f'<path class="rule" d="M{left} {y(tick):.1f}H{right:.1f}"/>')
        parts.append(_text(left - 7, y(tick), word, "end mid"))
    parts += [_text(x(epoch), bottom + 16, f"{epoch:g}") for epoch in sorted({first, last})]
    parts.append(_text((left + right) / 2, bottom + 30, "epoch"))
    if logarithmic:
        parts.append(_text(right, top - 3, "log scale", "end"))
    if ideal is not None:
        parts.append(f'<path class="ideal" d="M{left} {y(ideal):.1f}H{right:.1f}"/>')
    label_ys = _spread([y(curve.points[-1][1]) for curve in curves], gap=14, limit=bottom)
    for curve, label_y in zip(curves, label_ys, strict=True):
        places = [f"{x(epoch):.1f} {y(value):.1f}" for epoch, value in curve.points]
        dots = f'<path class="dots" d="{_dots(places)}"/>' if len(places) <= MOST_DOTS else ""
        dash = DASHES[curve.colour % RUN_COLOURS]
        drawn = f'<path class="line"{f" stroke-dasharray={dash!r}" if dash else ""} d="M{"L".join(places)}"/>'
        parts.append(
            f'<g class="run{curve.colour % RUN_COLOURS}">{drawn}{dots}'
            f"{_text(right + 8, label_y, shorten(curve.name, 12), 'mid label')}</g>"
        )
    return _svg(CHART_WIDTH, CHART_HEIGHT, label, parts)


def key(colour: int) -> str:
    """A piece of a run's line, for a legend."""
    dash = DASHES[colour % RUN_COLOURS]
    line = f'<path class="line"{f" stroke-dasharray={dash!r}" if dash else ""} d="M1 6H39"/>'
    return f'<svg class="key run{colour % RUN_COLOURS}" width="40" height="12" aria-hidden="true">{line}</svg>'


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """At most about six powers of ten of a logarithmic axis, and how to write them."""
    step = max(1, math.ceil((high - low) / 5))
    powers = range(int(low), int(high) + 1, step)
    return [(10.0**power, f"{10.0**power:g}" if -4 < power < 5 else f"1e{_minus(str(power))}") for power in powers]


@dataclass(frozen=True)
class Span:
    """A mean and a standard deviation of one run on a ruler."""

    name: str
    colour: int
    mean: float
    std: float


def ruler(spans: Sequence[Span], marks: Sequence[tuple[float, str]], low: float, label: str) -> str:
    """Means on one axis from `low` to 1, bars one standard deviation to each side, and the named places to reach."""
    left, right, top, gap = 14.0, RULER_WIDTH - 14.0, 18.0 * len(marks) + 8, 40
    bottom = top + gap * len(spans)

    def x(value: float) -> float:
        return left + (right - left) * (min(max(value, low), 1) - low) / (1 - low)

    parts = [f'<path class="rule" d="M{left} {bottom:g}H{right}"/>']
    for row, (place, name) in enumerate(marks):
        line = 14.0 + 18 * row
        parts.append(f'<path class="ideal" d="M{x(place):.1f} {line + 5:g}V{bottom:g}"/>')
        parts.append(_text(max(x(place) - 5, 0), line, name, ""))
    for row, span in enumerate(spans):
        y = top + gap * (row + 0.5) + 6
        word = f"{span.name} {number(span.mean)} ± {span.std:.3f}".strip()
        width = 7.4 * len(word)
        start = min(max(x(span.mean) - width / 2, 0), RULER_WIDTH - width)
        parts.append(
            f'<g class="run{span.colour % RUN_COLOURS}">'
            f'<path class="bar" d="M{x(span.mean - span.std):.1f} {y:g}H{x(span.mean + span.std):.1f}"/>'
            f'<circle class="mark" cx="{x(span.mean):.1f}" cy="{y:g}" r="6"/>{_text(start, y - 11, word, "label")}</g>'
        )
    for tick in (0.0, 0.5, 1.0):
        parts.append(_text(x(tick), bottom + 16, f"{tick:g}"))
    return _svg(RULER_WIDTH, int(bottom) + 24, label, parts)


def _value_range(values: Sequence[float], ideal: float | None, legal: tuple[float, float]) -> tuple[float, float]:
    """What the axis covers: the values, the ideal, and zero unless that would press the curves against the top."""
    marks = [*values] if ideal is None else [*values, ideal]
    if 0 < min(marks) < max(marks) / 2:
        marks.append(0.0)
    low, high = min(marks), max(marks)
    # Room for a curve that never moves, also where neighbouring floats are far apart.
    flat = high - low <= 1e-9 * max(abs(low), abs(high), 1e-9)
    if not flat:
        return low, high
    least, most = low - 0.5 * max(abs(low), 1), high + 0.5 * max(abs(high), 1)
    return min(max(least, legal[0]), low), max(min(most, legal[1]), high)


def _ticks(low: float, high: float) -> list[float]:
    """About four round values inside the range."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10, 20) if multiple * power >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _spread(positions: Sequence[float], gap: float, limit: float) -> list[float]:
    """Move labels at least `gap` apart, keeping their order, none beyond `limit`."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    for before, here in pairwise(order):
        placed[here] = max(placed[here], placed[before] + gap)
    for here in reversed(order):
        placed[here] = min(placed[here], limit)
        limit = placed[here] - gap
    return placed


def sphere(means_K3: Array, samples_N3: Array, labels_N: Array, names: Sequence[str], label: str) -> str:
    """Unit vectors in an orthographic view from a little above: class means as discs on spokes, samples as specks."""
    means, samples = _seen(means_K3), _seen(samples_N3)
    parts = [_globe()]
    for css, in_front in (("back", False), ("front", True)):
        for c in range(len(means)):
            chosen = samples[(labels_N == c) & ((samples[:, 2] >= 0) == in_front)]
            dots = _dots([f"{x:.1f} {y:.1f}" for x, y, _ in chosen])
            parts.append(f'<path class="samples {css}" stroke="{_class_colour(c)}" d="{dots}"/>' if dots else "")
        for c in np.flatnonzero((means[:, 2] >= 0) == in_front):
            parts.append(_mean(means[c, 0], means[c, 1], _class_colour(c), css, spoke=len(means) <= MOST_NAMES))
    if len(means) <= MOST_NAMES:
        shown = [shorten(name, 11) for name in names]
        parts += [
            _text(x, y, name, f"centre mid name {'front' if depth >= 0 else 'back'}")
            for (x, y), depth, name in zip(_beside(means, shown), means[:, 2], shown, strict=True)
        ]
    return _svg(SQUARE, SQUARE, label, parts)


MIDDLE, RADIUS = SQUARE / 2, SQUARE / 2 - 34


def _seen(points: Array) -> Array:
    """Columns x and y on paper, and depth, positive in front."""
    turn, tilt = math.radians(-28), math.radians(22)
    right = points[:, 0] * math.cos(turn) - points[:, 1] * math.sin(turn)
    away = points[:, 0] * math.sin(turn) + points[:, 1] * math.cos(turn)
    up = points[:, 2] * math.cos(tilt) + away * math.sin(tilt)
    depth = points[:, 2] * math.sin(tilt) - away * math.cos(tilt)
    return np.stack([MIDDLE + RADIUS * right, MIDDLE - RADIUS * up, depth], axis=1)


def _globe() -> str:
    """The sphere's outline and three great circles."""
    angles = np.linspace(0, 2 * math.pi, 73)
    ring = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    circles = (_seen(np.roll(ring, shift, axis=1)) for shift in range(3))
    paths = ("M" + "L".join(f"{x:.0f} {y:.0f}" for x, y, _ in circle) for circle in circles)
    return f'<circle class="globe" cx="{MIDDLE}" cy="{MIDDLE}" r="{RADIUS}"/>' + "".join(
        f'<path class="rule" d="{path}"/>' for path in paths
    )


def _mean(x: float, y: float, colour: str, css: str, *, spoke: bool) -> str:
    line = f'<path class="spoke" stroke="{colour}" d="M{MIDDLE} {MIDDLE}L{x:.1f} {y:.1f}"/>' if spoke else ""
    return f'<g class="{css}">{line}<circle class="mean" fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="6"/></g>'


def _beside(means: Array, names: Sequence[str]) -> list[tuple[float, float]]:
    """Where the names of the discs stand, within the picture: further from the middle, at the disc's side or above or
    below it, but as little as need be higher or lower where discs and other names are.
    """
    taken = [(x, y, 6.0) for x, y, _ in means]  # and half the width
    placed: list[tuple[float, float]] = []
    for (x, y, _), name in zip(means, names, strict=True):
        half = 4.0 * len(name)
        right, down = x - MIDDLE, y - MIDDLE
        out = math.hypot(right, down) or 1
        left, top = x + math.copysign(half + 9, right), y + 15 * down / out
        if abs(down) > abs(right) or not half <= left <= SQUARE - half:
            left, top = min(max(x + 15 * right / out, half), SQUARE - half), y + math.copysign(15, down)
        heights = [top, *sorted(range(8, SQUARE - 8), key=lambda height: abs(height - top))]
        others = [y for x, y, width in taken if abs(left - x) < half + width]
        top = next((height for height in heights if all(abs(height - y) >= 13 for y in others)), top)
        taken.append((left, top, half))
        placed.append((left, top))
    return placed


def _class_colour(c: int) -> str:
    return CLASS_COLOURS[c % len(CLASS_COLOURS)]


def sheet(title: str, drawings: Sequence[tuple[str, str]], columns: int = 2) -> str:
    """Titled charts, row by row, as an SVG file of its own: with the styles that a page would set."""
    width, height = CHART_WIDTH + 2 * MARGIN, CHART_HEIGHT + 2 * MARGIN
    parts = [_text(MARGIN, MARGIN + 8, title, "title")]
    for place, (name, drawing) in enumerate(drawings):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * width, 3 * MARGIN + row * height
        parts.append(f'<g transform="translate({left} {top})">{_text(0, 0, name, "title")}')
        parts.append(f'<g transform="translate(0 {MARGIN / 2:g})">{drawing}</g></g>')
    width, height = columns * width, 2 * MARGIN + -(-len(drawings) // columns) * height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{escape(title)}</title><style>{SCHEME}{STYLE}{SHEET_STYLE}</style>{''.join(parts)}</svg>\n"
    )


# Parts of every drawing.


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def number(value: float) -> str:
    """Three decimals, scientific where those would show nothing, with a real minus sign."""
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) >= 10:
        return _minus(f"{int(value):,}")
    return _minus(f"{value:.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:.1e}")


def _two_digits(value: float) -> str:
    """`.09` and `−.11`: what a cell has room for."""
    text = f"{abs(value):.2f}".removeprefix("0")
    return f"−{text}" if value < 0 and text != ".00" else text


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _dots(places: Iterable[str]) -> str:
    """A path of points: lines of no length, which round caps make visible."""
    return "".join(f"M{place}h0" for place in places)


def _text(x: float, y: float, text: str, css: str = "centre", *, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}"{turn}>{escape(text)}</text>'


def _svg(width: int, height: int, label: str, parts: Iterable[str]) -> str:
    drawing = "".join(parts)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{drawing}</svg>'
