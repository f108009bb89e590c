"""The pictures of the pages, docs/pictures/*.svg: `python docs/draw.py` writes them, the same bytes every time.

They are drawn with the report's own parts (`hypercontrast.figures`), and arrows are gradients of the losses themselves.

Shapes: N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import hypercontrast as hc
from hypercontrast import figures

FOLDER = Path(__file__).parent / "pictures"

# The picture is a document of its own here, which a page would otherwise have styled.
STYLE = f"""{figures.SCHEME}{figures.STYLE}
:root {{ font-family: system-ui, sans-serif; }}
:root {{ --pull: rgb{figures.COSINE_COLOURS[1]}; --push: rgb{figures.COSINE_COLOURS[-1]}; }}
svg .slot {{ fill: none; stroke: var(--rule); }}
svg .sum {{ fill: var(--push); stroke: none; opacity: .75; }}
svg .pull {{ fill: var(--pull); stroke: var(--card); stroke-width: 2; }}
svg .anchor {{ font-weight: 700; }}
svg .anchored {{ fill: none; stroke: var(--ink); stroke-width: 1.5; }}
.arrow {{ fill: none; stroke-width: 2.4; stroke-linecap: round; stroke-linejoin: round; }}
"""

# One batch for all grids: the class of each sample, and the anchor, a sample of class 1.
LABELS = (0, 0, 0, 1, 1, 1, 2, 2, 3, 3)
ANCHOR, OWN, CLASSES = 4, 1, 4
LEFT, TOP, CELL = 64, 34, 31


def pictures() -> dict[str, str]:
    """File name → SVG."""
    row, column = {(OWN, j) for j in range(len(LABELS))}, {(c, ANCHOR) for c in range(CLASSES)}
    own_class = {(c, j) for c in range(CLASSES) for j, y in enumerate(LABELS) if y == c}
    at = {(OWN, ANCHOR)}
    others = {(ANCHOR, j) for j in range(len(LABELS)) if j != ANCHOR}
    mates = {(i, j) for i, j in others if LABELS[j] == OWN}
    classes, samples = [f"class {c}" for c in range(CLASSES)], [str(y) for y in LABELS]
    return {
        "grid-normface.svg": grid(classes, column, at, "NormFace: the sample's column"),
        "grid-ntce.svg": grid(classes, row, at, "NTCE: its class's whole row"),
        "grid-nonl.svg": grid(classes, row - own_class, at, "NONL: the row without its own class"),
        "grid-nonl-sample.svg": grid(classes, column - own_class, at, "NONL, sample anchor"),
        "grid-nonl-both.svg": grid(classes, (row | column) - own_class, at, "NONL, both anchors"),
        "grid-supcon.svg": grid(samples, others, mates, "SupCon: the sample against all others"),
        **{f"forces-{name}.svg": forces(loss, name) for name, loss in FORCES.items()},
        "temperature.svg": temperature(),
        **frames(),
    }


def grid(rows: list[str], summed: set, pulled: set, label: str) -> str:
    """Which logits stand in one sample's loss: squares in the log-sum-exp, discs in the positive term."""
    parts = [figures._text(LEFT + CELL * len(LABELS) / 2, 12, label, "centre anchor")]
    for j, y in enumerate(LABELS):
        parts.append(
            figures._text(LEFT + (j + 0.5) * CELL, TOP - 7, str(y), "centre anchor" if j == ANCHOR else "centre")
        )
    pairs = rows == [str(y) for y in LABELS]
    for c, name in enumerate(rows):
        y = TOP + c * CELL
        named = c == (ANCHOR if pairs else OWN)
        parts.append(figures._text(LEFT - 8, y + CELL / 2, name, "end mid anchor" if named else "end mid"))
        for j in range(len(LABELS)):
            x = LEFT + j * CELL
            parts.append(f'<rect class="slot" x="{x}" y="{y}" width="{CELL}" height="{CELL}"/>')
            if (c, j) in summed:
                parts.append(
                    f'<rect class="sum" x="{x + 2}" y="{y + 2}" width="{CELL - 4}" height="{CELL - 4}" rx="3"/>'
                )
            if (c, j) in pulled:
                parts.append(f'<circle class="pull" cx="{x + CELL / 2}" cy="{y + CELL / 2}" r="8"/>')
    width, height = CELL * len(LABELS), CELL * len(rows)
    box = (LEFT, TOP + ANCHOR * CELL, width, CELL) if pairs else (LEFT + ANCHOR * CELL, TOP, CELL, height)
    parts.append('<rect class="anchored" x="{}" y="{}" width="{}" height="{}"/>'.format(*box))
    return document(figures._svg(figures.SQUARE, TOP + height + 6, label, parts))


FORCES: dict[str, Callable] = {
    "normface": hc.normface_loss,
    "ntce": hc.ntce_loss,
    "nonl": hc.nonl_loss,
    "supcon": lambda features, prototypes, labels, **options: hc.supcon_loss(features, labels, **options),
}


def forces(loss: Callable, name: str) -> str:
    """Three classes on the circle, and where one step of descent would move samples and prototypes."""
    labels = torch.arange(3).repeat_interleave(4)
    centres = torch.tensor([1.75, 0.35, -0.75], dtype=torch.float64)
    scatter = torch.tensor([-0.42, -0.13, 0.2, 0.47], dtype=torch.float64).repeat(3)
    angles = centres[labels] + scatter * torch.tensor([1.0, 0.8, 1.2], dtype=torch.float64)[labels]
    features = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    turned = centres + torch.tensor([0.35, -0.3, -0.45], dtype=torch.float64)
    prototypes = torch.stack([turned.cos(), turned.sin()], 1).requires_grad_()
    loss(features, prototypes, labels, temperature=0.5).backward()
    moved = -features.grad
    longest = moved.norm(dim=1).max()
    middle, radius = figures.MIDDLE, figures.RADIUS
    parts = [f'<circle class="globe" cx="{middle}" cy="{middle}" r="{radius}"/>']

    def place(point: torch.Tensor, r: float = 1.0) -> tuple[float, float]:
        return middle + radius * r * point[0].item(), middle - radius * r * point[1].item()

    for u, step, y in zip(features.detach(), moved / longest, labels.tolist(), strict=True):
        colour = figures.CLASS_COLOURS[y]
        parts.append(arrow(*place(u), *place(u + 0.36 * step), colour))
        parts.append('<circle class="mean" fill="{}" cx="{:.1f}" cy="{:.1f}" r="4.5"/>'.format(colour, *place(u)))
    if prototypes.grad is not None:
        steps = -prototypes.grad / prototypes.grad.norm(dim=1).max()
        for c, (w, step) in enumerate(zip(prototypes.detach(), steps, strict=True)):
            colour = figures.CLASS_COLOURS[c]
            parts.append(arrow(*place(w, 0.8), *place(0.8 * w + 0.36 * step), colour))
            x, y = place(w, 0.8)
            parts.append(f'<rect class="mean" fill="{colour}" x="{x - 7:.1f}" y="{y - 7:.1f}" width="14" height="14"/>')
    return document(figures._svg(figures.SQUARE, figures.SQUARE, f"Forces of {name} on a circle", parts))


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    length = math.hypot(to_x - x, to_y - y)
    if length < 4:
        return ""
    along, head = math.atan2(to_y - y, to_x - x), min(7.0, length / 2)
    ends = [(to_x - head * math.cos(along + turn), to_y - head * math.sin(along + turn)) for turn in (0.5, -0.5)]
    (ax, ay), (bx, by) = ends
    path = f"M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}M{ax:.1f} {ay:.1f}L{to_x:.1f} {to_y:.1f}L{bx:.1f} {by:.1f}"
    return f'<path class="arrow" stroke="{colour}" d="{path}"/>'


def temperature() -> str:
    """The weight exp((cos - 1)/τ) of a negative, in units of that of one in the anchor's own direction."""
    left, top, right, bottom, decades = 62, 14, 350, 220, 6
    parts = []
    for power in range(0, decades + 1, 2):
        y = top + (bottom - top) * power / decades
        parts.append(f'<path class="rule" d="M{left} {y:.1f}H{right}"/>')
        parts.append(figures._text(left - 7, y, f"{10.0**-power:g}".replace("1e-06", "10⁻⁶"), "end mid"))
    for tick in (-1, -0.5, 0, 0.5, 1):
        parts.append(figures._text(left + (right - left) * (tick + 1) / 2, bottom + 16, f"{tick:g}".replace("-", "−")))
    parts.append(figures._text((left + right) / 2, bottom + 32, "cosine of anchor and negative"))
    for colour, tau in enumerate((0.05, 0.1, 0.2, 0.5, 1.0)):
        end = max(-1.0, 1 - tau * decades * math.log(10))  # where the line leaves the picture
        x = left + (right - left) * (end + 1) / 2
        slope = (bottom - top) / decades / math.log(10) / tau  # a unit of cosine
        y = top + slope * (1 - end)
        if end > -1:  # the word stands left of a steep line, above a flat one
            word = figures._text(x, y - 12, f"τ = {tau:g}", "end label")
        else:
            word = figures._text(x + 6, y - 10 - 50 * slope * 2 / (right - left), f"τ = {tau:g}", "label")
        parts.append(f'<g class="run{colour}"><path class="line" d="M{right} {top}L{x:.1f} {y:.1f}"/>{word}</g>')
    label = "Weight of a negative against its cosine, for five temperatures"
    return document(figures._svg(right + 14, bottom + 42, label, parts))


def frames() -> dict[str, str]:
    """The simplex of four classes, the orthogonal frame of three, and the cosines of ten in either."""
    generator = torch.Generator().manual_seed(0)
    noise = np.random.default_rng(0)
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / math.sqrt(3)

    def drawn(means: np.ndarray, label: str) -> str:
        labels = np.repeat(np.arange(len(means)), 40)
        samples = means[labels] + 0.1 * noise.standard_normal((len(labels), 3))
        samples /= np.linalg.norm(samples, axis=1, keepdims=True)
        return document(figures.sphere(means, samples, labels, [f"class {c}" for c in range(len(means))], label))

    simplex = hc.simplex_etf(10, 12, generator=generator).numpy()
    names = [str(c) for c in range(10)]
    return {
        "frame-simplex.svg": drawn(corners, "Four class means in a simplex: pairwise cosine −1/3"),
        "frame-orthogonal.svg": drawn(np.eye(3), "Three class means in an orthogonal frame: pairwise cosine 0"),
        "cosines-simplex.svg": document(
            figures.cosine_matrix(simplex @ simplex.T, names, "Cosines of ten means, simplex")
        ),
        "cosines-orthogonal.svg": document(
            figures.cosine_matrix(np.eye(10), names, "Cosines of ten means, orthogonal frame")
        ),
    }


def document(drawing: str) -> str:
    """A drawing as a file of its own."""
    start, rest = drawing.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).split(">", 1)
    return f"{start}><style>{STYLE}</style>{rest}\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, drawing in pictures().items():
        (FOLDER / name).write_text(drawing)
