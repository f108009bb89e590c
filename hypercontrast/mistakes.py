"""What a run gets right and wrong, sample by sample: the report's sections on confusion, class sizes and pictures.

Shapes: N samples of the whole validation set, n of them kept, K classes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from hypercontrast import figures, page
from hypercontrast.figures import MOST_NAMES, Array, classes_a_cell, count, number, shorten
from hypercontrast.runs import Embeddings, Run, unit_rows

MOST_LISTED = 10  # of the hardest classes, where the matrix has no room for names
MOST_CLASSES = 12  # shown with pictures
TYPICAL, WRONG = 4, 4  # pictures of a class
# Training samples that part many-, medium- and few-shot classes (Liu et al. 2019, arXiv 1904.05160).
MANY, FEW = 100, 20
IMBALANCED = 2  # times its smallest class that the largest must have for classes to be told apart by size


def percent(share: float) -> str:
    return f"{share:.1%}"


def _class_accuracy(confusion_KK: Array) -> Array:
    """Share of each class that was right [K]; NaN for a class without samples."""
    totals_K = confusion_KK.sum(axis=1)
    return np.where(totals_K > 0, confusion_KK.diagonal() / np.maximum(totals_K, 1), np.nan)


def confusion_section(runs: Sequence[Run]) -> str:
    drawn = [(run, left, left.confusion_KK) for run in runs if (left := run.embeddings) is not None]
    found = [(run, left, confusion_KK) for run, left, confusion_KK in drawn if confusion_KK.any()]
    if not found:
        return ""
    if len(found) == 1:
        matrices = _confusion_figure("All classes", *found[0]) + _classes_table(*found[0])
    else:
        matrices = "".join(_confusion_figure(run.name, run, left, counts) for run, left, counts in found)
    return f"""
<p>A row is the class a validation sample belongs to, a column the class the head takes it for (for SCL the nearest
class mean): right on the diagonal, mistakes in brown beside it. The deeper the colour, the larger the share of its row;
small shares are drawn deeper than they are, to be seen.</p>
<div class="grid wide">{matrices}</div>{_sizes_table(found)}"""


def _confusion_figure(title: str, run: Run, left: Embeddings, confusion_KK: Array) -> str:
    right, total = int(confusion_KK.trace()), int(confusion_KK.sum())
    caption = f"Right: {right:,} of {total:,}, {percent(right / total)}."
    wrong_KK = confusion_KK * ~np.eye(len(confusion_KK), dtype=bool)
    if wrong_KK.any():
        a, b = np.unravel_index(wrong_KK.argmax(), wrong_KK.shape)
        mistake = f"{left.class_names[a]} taken for {left.class_names[b]}, {count(wrong_KK[a, b], 'time')}"
        caption += f" Most frequent mistake: {mistake}."
    if (block := classes_a_cell(len(confusion_KK))) > 1:
        caption += f" A cell is the largest of {block} × {block} shares."
    label = f"{run.name}: confusion of {count(len(confusion_KK), 'class')}. {caption}"
    return page.figure(title, figures.confusion_matrix(confusion_KK, left.class_names, label), caption)


def _classes_table(run: Run, left: Embeddings, confusion_KK: Array) -> str:
    """The accuracy of each class, or of the worst, and what it is most often taken for."""
    K, accuracy_K = len(confusion_KK), _class_accuracy(confusion_KK)
    shown = sorted(np.argsort(accuracy_K, kind="stable")[:MOST_LISTED]) if K > MOST_NAMES else range(K)
    wrong_KK = confusion_KK * ~np.eye(K, dtype=bool)
    rows = []
    for c in shown:
        total, other = confusion_KK[c].sum(), int(wrong_KK[c].argmax())
        mistake = (
            f"{escape(shorten(left.class_names[other], 22))}<small>{count(wrong_KK[c, other], 'time')}</small>"
            if wrong_KK[c].any()
            else "–"
        )
        rows.append([escape(left.class_names[c]), percent(accuracy_K[c]) if total else "–", f"{total:,}", mistake])
    title = "Class by class" if K <= MOST_NAMES else f"The {len(rows)} hardest classes"
    table = page.table(["Class", "Right", "Samples", "Most often taken for"], rows, title)
    return f"<div><h3>{title}</h3>{table}</div>"


def _sizes_table(found: Sequence[tuple[Run, Embeddings, Array]]) -> str:
    """Accuracies by training samples a class, the mean over classes, where a run's classes differ in size."""
    rows = []
    for run, left, confusion_KK in found:
        sizes_K = left.class_sizes_K
        if sizes_K.max() < IMBALANCED * max(sizes_K.min(), 1):
            continue
        accuracy_K = _class_accuracy(confusion_KK)
        groups = (sizes_K > MANY, (sizes_K <= MANY) & (sizes_K >= FEW), sizes_K < FEW)
        cells = []
        for chosen_K in groups:
            seen = accuracy_K[chosen_K & ~np.isnan(accuracy_K)]
            cells.append(f"{percent(seen.mean())}<small>{len(seen)} of the classes</small>" if len(seen) else "–")
        rows.append([escape(run.name), *cells, f"{sizes_K.max():,} to {sizes_K.min():,}"])
    if not rows:
        return ""
    header = ["Run", f"Many: over {MANY}", f"Medium: {FEW} to {MANY}", f"Few: under {FEW}", "Samples a class"]
    return (
        '<h3 class="row">Classes large and small</h3><p>Accuracy, averaged over the classes with so many training '
        "samples. A long tail shows as a fall from left to right.</p>"
        + page.table(header, rows, "Accuracy by size of class")
    )


def pictures_section(run: Run) -> str:
    """The kept samples nearest to their class mean, and those of the class that are furthest on another's side."""
    left = run.embeddings.trained if run.embeddings is not None else None
    if left is None or len(left.class_names) < 2:
        return ""
    cosines_nK = unit_rows(left.features_nD) @ left.class_means_KD.T
    shown = _shown_classes(cosines_nK, left.labels_n)
    figures_ = "".join(_class_figure(left, cosines_nK, c) for c in shown)
    K = len(left.class_names)
    which = "" if len(shown) == K else f" Shown are the {len(shown)} of {K} classes with the most mistakes among these."
    return f"""
<p>From {len(left.labels_n):,} validation samples, by the cosine between a sample's feature and the class means, its
prototypes. <b>Typical</b> are those nearest to the mean of their own class; <b>mistaken</b> are those that lie nearer
to another class's, the surest mistakes first. Below a mistaken picture stand the class it was taken for and how much
larger that cosine is.{which}</p>
<div class="grid">{figures_}</div>"""


def _shown_classes(cosines_nK: Array, labels_n: Array) -> list[int]:
    """All classes that have samples, or those with the most mistakes, in their own order."""
    K = cosines_nK.shape[1]
    seen_K = np.bincount(labels_n, minlength=K)
    wrong_K = np.bincount(labels_n[cosines_nK.argmax(axis=1) != labels_n], minlength=K)
    order = np.argsort(-wrong_K, kind="stable")
    return sorted([int(c) for c in order if seen_K[c]][:MOST_CLASSES])


def _class_figure(left: Embeddings, cosines_nK: Array, c: int) -> str:
    own = np.flatnonzero(left.labels_n == c)
    to_own = cosines_nK[own, c]
    others = np.where(np.arange(cosines_nK.shape[1]) == c, -np.inf, cosines_nK[own])
    margin, chosen = others.max(axis=1) - to_own, others.argmax(axis=1)
    name = left.class_names[c]
    typical = [
        page.picture(left.pictures_nCHW[own[i]], f"{name}, cosine {number(to_own[i])} to its mean")
        for i in np.argsort(-to_own, kind="stable")[:TYPICAL]
    ]
    wrong = [
        page.picture(left.pictures_nCHW[own[i]], f"{name} taken for {left.class_names[chosen[i]]}")
        + f"→\u00a0{escape(shorten(left.class_names[chosen[i]], 22))}<br>+{margin[i]:#.2g}"
        for i in np.argsort(-margin, kind="stable")[:WRONG]
        if margin[i] > 0
    ]
    mistakes = int((margin > 0).sum())
    words = f"Mistaken, {mistakes} of {len(own)}" if mistakes else f"None of {len(own)} mistaken"
    return (
        f"<figure><h3>{escape(name)}</h3><small>Typical</small>{_strip(typical)}"
        f"<small>{words}</small>{_strip(wrong) if wrong else ''}</figure>"
    )


def _strip(items: Sequence[str]) -> str:
    return '<ul class="strip">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"
