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
MARGIN = 24  # around the charts of a sheet
MOST_DOTS = 40  # points of a curve, beyond which dots would only thicken its line
RUN_COLOURS = 6  # --run0 ... --run5, then again from the start
COSINE_COLOURS = {1: (18, 133, 122), -1: (176, 94, 22)}  # teal and brown: told apart in every colour vision
CLASS_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#c9a51b", "#41aacc",
    "#aa3377", "#ee7733", "#009988", "#888888", "#9970ab",
)  # fmt: skip
MOST_NAMES = 20  # classes, beyond which names no longer fit
MOST_VALUES = 12  # classes, beyond which the numbers in the cells no longer do

SCHEME = """
:root { color-scheme: light dark;
  --paper: #fdfcfa; --ink: #1d2125; --soft: #5a636b; --rule: #dfdcd5; --card: #ffffff;
  --run0: #b0440a; --run1: #0b5fa0; --run2: #0b7557; --run3: #98377a; --run4: #6f6000; --run5: #4a4f55; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --ink: #e9e7e2; --soft: #a3abb2; --rule: #343a40; --card: #1a1e22;
  --run0: #ff9f63; --run1: #74bcff; --run2: #55d3a8; --run3: #f09fd3; --run4: #d8c850; --run5: #c2c7cc; } }
"""

STYLE = """
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 12px; }
image { image-rendering: pixelated; }
.end { text-anchor: end; } .centre { text-anchor: middle; } .mid { dominant-baseline: central; }
svg .cell { font-size: 11.5px; } svg .strong { fill: #fff; }
.rule { fill: none; stroke: var(--rule); }
.ideal { fill: none; stroke: var(--soft); stroke-dasharray: 3 4; }
.line { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; }
.dots { stroke: var(--c); stroke-width: 6; stroke-linecap: round; }
svg .label { fill: var(--c); font-weight: 600; }
.run0 { --c: var(--run0); } .run1 { --c: var(--run1); } .run2 { --c: var(--run2); }
.run3 { --c: var(--run3); } .run4 { --c: var(--run4); } .run5 { --c: var(--run5); }
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
    """Coloured cells on the fixed scale -1 to 1, with names and numbers while they fit."""
    K = len(names)
    shown = [shorten(name, 11) for name in names] if K <= MOST_NAMES else []
    longest = max((len(name) for name in shown), default=0)
    margin = 12 + 6.5 * longest
    cell = (SQUARE - margin) / K
    parts = [
        f'<image x="{margin:.1f}" y="{margin:.1f}" width="{cell * K:.1f}" height="{cell * K:.1f}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{_cosine_png(cosines_KK)}"/>'
    ]
    for c, name in enumerate(shown):
        middle, edge = margin + (c + 0.5) * cell, margin - 6
        parts.append(_text(edge, middle, name, "end mid"))
        parts.append(_text(middle, edge, name, "mid", turned=True) if longest > 2 else _text(middle, edge, name))
    if K <= MOST_VALUES:
        for row, column in np.ndindex(K, K):
            value = float(cosines_KK[row, column])
            shown_value = "1" if row == column else _two_digits(value)
            css = "cell centre mid strong" if abs(value) > 0.9 else "cell centre mid"
            parts.append(_text(margin + (column + 0.5) * cell, margin + (row + 0.5) * cell, shown_value, css))
    return _svg(SQUARE, SQUARE, label, parts)


def _cosine_png(cosines_KK: Array) -> str:
    """A K x K picture in base64: hue by sign, opacity by |cosine|, so that zero is the page's own background."""
    rgba = np.empty((*cosines_KK.shape, 4), np.uint8)
    rgba[..., :3] = np.where(cosines_KK[..., None] >= 0, COSINE_COLOURS[1], COSINE_COLOURS[-1])
    rgba[..., 3] = (255 * np.clip(np.abs(cosines_KK), 0, 1)).round()
    header = struct.pack(">IIBBBBB", rgba.shape[1], rgba.shape[0], 8, 6, 0, 0, 0)  # 8 bits a channel, RGBA
    rows = b"".join(b"\0" + row.tobytes() for row in rgba)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    )
    return base64.b64encode(png).decode()


def chart(curves: Sequence[Curve], label: str, *, ideal: float | None = None) -> str:
    """Values over epochs: every curve in the same axes, labelled where it ends; dashes mark the ideal."""
    epochs = [epoch for curve in curves for epoch, _ in curve.points]
    first, last = min(epochs), max(epochs)
    low, high = _value_range([value for curve in curves for _, value in curve.points], ideal)
    left, top, bottom = 46.0, 12.0, CHART_HEIGHT - 34.0
    right = CHART_WIDTH - 14 - 8.2 * max(len(shorten(curve.name, 12)) for curve in curves)

    def x(epoch: float) -> float:
        return left + (right - left) * (epoch - first) / max(last - first, 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = []
    for tick in _ticks(low, high):
        parts.append(f'<path class="rule" d="M{left} {y(tick):.1f}H{right:.1f}"/>')
        parts.append(_text(left - 7, y(tick), _minus(f"{tick:.6g}"), "end mid"))
    parts += [_text(x(epoch), bottom + 16, f"{epoch:g}") for epoch in sorted({first, last})]
    parts.append(_text((left + right) / 2, bottom + 30, "epoch"))
    if ideal is not None:
        parts.append(f'<path class="ideal" d="M{left} {y(ideal):.1f}H{right:.1f}"/>')
    label_ys = _spread([y(curve.points[-1][1]) for curve in curves], gap=14, limit=bottom)
    for curve, label_y in zip(curves, label_ys, strict=True):
        places = [f"{x(epoch):.1f} {y(value):.1f}" for epoch, value in curve.points]
        dots = f'<path class="dots" d="{_dots(places)}"/>' if len(places) <= MOST_DOTS else ""
        parts.append(
            f'<g class="run{curve.colour % RUN_COLOURS}"><path class="line" d="M{"L".join(places)}"/>{dots}'
            f"{_text(right + 8, label_y, shorten(curve.name, 12), 'mid label')}</g>"
        )
    return _svg(CHART_WIDTH, CHART_HEIGHT, label, parts)


def _value_range(values: Sequence[float], ideal: float | None) -> tuple[float, float]:
    """What the axis covers: the values, the ideal, and zero unless that would press the curves against the top."""
    marks = [*values] if ideal is None else [*values, ideal]
    if 0 < min(marks) < max(marks) / 2:
        marks.append(0.0)
    low, high = min(marks), max(marks)
    # Room for a curve that never moves, also where neighbouring floats are far apart.
    flat = high - low <= 1e-9 * max(abs(low), abs(high), 1e-9)
    return (low - 0.5 * max(abs(low), 1), high + 0.5 * max(abs(high), 1)) if flat else (low, high)


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round values inside the range."""
    rough = (high - low) / count
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
            parts.append(_mean(means[c, 0], means[c, 1], _class_colour(c), css))
    if len(means) <= MOST_NAMES:
        parts += [
            _name(x, y, name, "front" if depth >= 0 else "back")
            for (x, y, depth), name in zip(means, names, strict=True)
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


def _mean(x: float, y: float, colour: str, css: str) -> str:
    return (
        f'<g class="{css}"><path class="spoke" stroke="{colour}" d="M{MIDDLE} {MIDDLE}L{x:.1f} {y:.1f}"/>'
        f'<circle class="mean" fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="6"/></g>'
    )


def _name(x: float, y: float, name: str, css: str) -> str:
    """Beside the disc, away from the middle."""
    out = math.hypot(x - MIDDLE, y - MIDDLE) or 1
    return _text(x + 15 * (x - MIDDLE) / out, y + 15 * (y - MIDDLE) / out, shorten(name, 11), f"centre mid name {css}")


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
