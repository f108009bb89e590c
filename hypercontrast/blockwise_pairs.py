"""Memory-linear PyTorch backend of the `pair_lse` primitive: samples against samples, tile by tile.

Rows and columns are sorted by class first. Positives then lie near the diagonal, most tiles hold none, and those need
no comparison of labels. When the columns are the rows themselves a tile above the diagonal serves its mirror image too,
so half the products and exponentials are computed. Cost in matrix products (F = 2·n·m·D): forward F, backward 2 F;
against itself forward F/2, backward 3F/2.

Precision is that of `blockwise`: products and sums in float32 (float64 for float64), log-sum-exps in float64.

Shapes: n rows, m columns, D dimensions; tiles [R, C].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hypercontrast import _checks, tiles
from hypercontrast.blockwise import (
    Sums,
    class_sums,
    exponent,
    inverse_norms,
    is_bounded,
    spans,
    spread,
    statistics_dtype,
)

EDGE = 640  # rows and columns of a tile: 1.6 MiB of float32, so that two threads' halves of it stay in L2


def kept_elements(num_samples: int, dtype: torch.dtype, keep_bytes: int) -> int:
    """Room for the exponentials of all tiles on and above the diagonal where they fit the budget, else for none."""
    rest = num_samples % EDGE
    elements = (num_samples**2 + num_samples // EDGE * EDGE**2 + rest**2) // 2
    return elements if elements * dtype.itemsize <= keep_bytes else 0


@dataclass(frozen=True)
class Side:
    """What a backward knows of the anchors on one side, each [n]: their log-sum-exps, their positives, and the loss's
    gradients with respect to both.
    """

    lse: Tensor
    grad_lse: Tensor
    positives: Tensor
    grad_positives: Tensor


class _Operand:
    """The present rows of one side, sorted by class; `units` are u/√τ, so that products of two are logits."""

    def __init__(self, x: Tensor, inv_norms: Tensor, ids: Tensor | None, root_scale: float | Tensor) -> None:
        self.length = len(x)
        self.order: Tensor | None = None
        if ids is None:  # a mask tells the positives
            self.ids = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        else:
            sorted_ids, order = ids.sort(stable=True)
            absent = int((sorted_ids < 0).sum())
            self.ids, self.order = sorted_ids[absent:], order[absent:]
        self.inv = self.take(inv_norms)
        rows = self.take(x).to(inv_norms.dtype)
        self.units = torch.mul(rows, (self.inv * root_scale)[:, None], out=None if self.order is None else rows)
        self.n = len(self.units)
        self.blocks = spans(self.n, EDGE)

    def take(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[self.order]

    def put(self, x: Tensor, fill: float) -> Tensor:
        return spread(x, self.order, self.length, fill)

    def put_gradient(self, grad: Tensor) -> Tensor:
        """Back in the samples' order. The units have served, so that order takes their memory when it is as long."""
        if self.order is None or self.n < self.length:
            return self.put(grad, 0.0)
        return self.units.index_copy_(0, self.order, grad)

    def classes(self, block: slice) -> tuple[int, int]:
        """The first and the last class of a block."""
        return int(self.ids[block.start]), int(self.ids[block.stop - 1])


class _Pairs:
    """The walk over tiles, their logits, their pairs of a row with itself, and their positives."""

    def __init__(
        self, rows, columns, row_ids, column_ids, inv_rows, inv_columns, *,
        offset, temperature, inv_temperature, normalize, inside,
    ):  # fmt: skip
        root_scale = (inv_temperature if temperature is None else 1 / temperature.to(inv_rows.dtype)) ** 0.5
        self.bounded = is_bounded(temperature, inv_temperature, normalize)
        self.symmetric, self.inside, self.normalize, self.root_scale = columns is None, inside, normalize, root_scale
        self.rows = _Operand(rows, inv_rows, row_ids, root_scale)
        self.columns = self.rows if columns is None else _Operand(columns, inv_columns, column_ids, root_scale)
        self.own = None if offset is None else self._own_columns(offset)
        self.nothing = tiles.NOTHING if self.bounded else -torch.inf
        self.memory = inv_rows.new_empty(2, EDGE * EDGE)

    def _own_columns(self, offset: int) -> Tensor:
        """Of each row, which column is itself, both counted as sorted; -1 where none is."""
        columns = self.columns
        place = torch.full((columns.length + 1,), -1, device=columns.units.device)  # the last: no such column
        original = torch.arange(columns.length, device=place.device)
        place[columns.take(original)] = original[: columns.n]
        own = self.rows.take(torch.arange(self.rows.length, device=place.device)) + offset
        return place[torch.where((own >= 0) & (own < columns.length), own, -1)]

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """All of them, or those on and above the diagonal when the columns are the rows."""
        for rows in self.rows.blocks:
            for columns in self.columns.blocks:
                if not self.symmetric or columns.start >= rows.start:
                    yield rows, columns

    def mirrors(self, rows: slice, columns: slice) -> bool:
        """Whether a tile stands for its mirror image below the diagonal as well."""
        return self.symmetric and rows != columns

    def buffer(self, rows: slice, columns: slice, which: int) -> Tensor:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return self.memory[which, : height * width].view(height, width)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        return tiles.product_(self.rows.units[rows], self.columns.units[columns].T, self.buffer(rows, columns, 0))

    def fill_own_(self, rows: slice, columns: slice, x: Tensor, value: float) -> None:
        """Set the entries of rows with themselves."""
        if self.own is None or self.mirrors(rows, columns):
            return
        place = self.own[rows] - columns.start
        here = ((place >= 0) & (place < x.shape[1])).nonzero()[:, 0]
        x[here, place[here]] = value

    def positives(self, rows: slice, columns: slice, mask: Tensor | None) -> Tensor | None:
        """Which entries are positives: those of `mask`, or pairs of one class; None where there are clearly none."""
        if mask is not None:
            found = mask[rows, columns].clone()
        else:
            (first, last), (low, high) = self.rows.classes(rows), self.columns.classes(columns)
            if first > high or low > last:
                return None
            found = self.rows.ids[rows, None] == self.columns.ids[columns]
        self.fill_own_(rows, columns, found, False)
        return found


def launch_fwd(anchors, columns, anchor_ids, column_ids, mask, **options):
    """See `hypercontrast._pair_ops.pair_lse`."""
    dtype, wide = _checks.accumulator(anchors), statistics_dtype(anchors.device)
    inv_anchors = inverse_norms("features", anchors, dtype, options["normalize"])
    inv_columns = inv_anchors
    if columns is not None:
        inv_columns = inverse_norms("ref_features", columns, dtype, options["normalize"])
    p = _Pairs(anchors, columns, anchor_ids, column_ids, inv_anchors, inv_columns, **options)
    denominators, numerators = (Sums(inv_anchors, p.rows.n, p.bounded) for _ in range(2))
    sums_do = mask is None and not p.inside  # the positives are then known from the sums of the classes
    positives = _class_positives(p) if sums_do else inv_anchors.new_zeros(p.rows.n)
    nothing = 0.0 if p.bounded else -torch.inf

    for r, c in p.tiles():
        s_RC = p.logits(r, c)
        p.fill_own_(r, c, s_RC, p.nothing)
        mirrors = p.mirrors(r, c)
        sides = [(r, c, s_RC)] + ([(c, r, s_RC.T)] if mirrors else [])
        found = [None if sums_do else p.positives(own, others, mask) for own, others, _ in sides]
        if not p.inside:
            for (own, _, s), chosen in zip(sides, found, strict=True):
                if chosen is not None:
                    positives[own] += torch.where(chosen, s, 0).sum(1)
        if p.bounded:
            total = denominators.total
            tiles.exponentiate_(s_RC, None, None, None, False, total[r], total[c] if mirrors else None)
        for (own, _, x), chosen in zip(sides, found, strict=True):
            if not p.bounded:
                denominators.add(own, x)
            if p.inside and chosen is not None:
                numerators.add(own, torch.where(chosen, x, nothing))

    positives = numerators.lse() if p.inside else positives.to(wide)
    return (
        p.rows.put(denominators.lse(), -torch.inf),
        p.rows.put(positives, -torch.inf if p.inside else 0.0),
        inv_anchors,
        inv_columns,
    )


def _class_positives(p: _Pairs) -> Tensor:
    """Σ of each row's positives, u·(C - u), C the sum of its class's columns; less u only where it is among them."""
    rows, columns = p.rows, p.columns
    num_classes = 1 + max((int(x.ids[-1]) for x in (rows, columns) if x.n), default=0)
    sums = class_sums(columns.units, None, columns.ids, num_classes)
    positives = sums.new_empty(rows.n)
    for block in rows.blocks:
        others = sums[rows.ids[block]]
        if p.own is not None:
            own = p.own[block]
            others -= torch.where((own >= 0)[:, None], columns.units[own], 0)
        positives[block] = (rows.units[block] * others).sum(1)
    return positives


@dataclass(frozen=True)
class _Terms:
    """What one side adds to G: factor·exp(s - shift), and for its positives positive_factor, or where their log-sum-exp
    was taken positive_factor·exp(s - positive_shift). Vectors over that side's anchors.
    """

    shift: Tensor
    factor: Tensor
    positive_shift: Tensor
    positive_factor: Tensor

    @classmethod
    def from_side(cls, side: Side, operand: _Operand, p: _Pairs) -> _Terms:
        lse, grad_lse, positives, grad_positives = (
            operand.take(x) for x in (side.lse, side.grad_lse, side.positives, side.grad_positives)
        )
        dtype = operand.units.dtype
        denominator = exponent(lse, grad_lse, dtype, p.bounded)
        if p.inside:
            return cls(*denominator, *exponent(positives, grad_positives, dtype, p.bounded))
        return cls(*denominator, torch.zeros_like(denominator[0]), grad_positives.to(dtype))

    def of(self, block: slice) -> _Terms:
        """Those of a tile's rows or columns."""
        return _Terms(*(x[block] for x in vars(self).values()))


def launch_bwd(
    rows, columns, row_ids, column_ids, inv_rows, inv_columns, row_side, column_side, row_mask, column_mask, **options
):
    """See `hypercontrast._pair_ops.pair_lse_backward`."""
    p = _Pairs(rows, columns, row_ids, column_ids, inv_rows, inv_columns, **options)
    sides = [
        (dim, _Terms.from_side(side, operand, p), mask)
        for dim, side, operand, mask in ((0, row_side, p.rows, row_mask), (1, column_side, p.columns, column_mask))
        if side is not None
    ]
    grad = torch.zeros_like(p.rows.units)
    for tile in p.tiles():
        x_RC = g_RC = p.logits(*tile)
        if p.inside or not p.bounded:  # the logits serve more than once
            g_RC = p.buffer(*tile, 1)
        terms = [(dim, t.of(tile[dim]), mask) for dim, t, mask in sides]
        _weighted_exponentials(x_RC, {dim: (t.shift, t.factor) for dim, t, _ in terms}, p.bounded, out=g_RC)
        # Positives join in before the products: added to the products they would leave the rounding of both behind.
        for dim, t, mask in terms:
            found = p.positives(*tile, mask)
            if found is None:
                continue
            if p.inside:
                own = {dim: (t.positive_shift, t.positive_factor)}
                weights = _weighted_exponentials(x_RC, own, p.bounded, out=torch.empty_like(x_RC))
            else:
                weights = t.positive_factor.unsqueeze(1 - dim)
            g_RC += torch.where(found, weights, 0)
        p.fill_own_(*tile, g_RC, 0.0)
        r, c = tile
        tiles.product_(g_RC, p.columns.units[c], grad[r], add=True)
        if p.mirrors(r, c):
            tiles.product_(g_RC.T, p.rows.units[r], grad[c], add=True)
    logit_grad_sum = _through_norm_(grad, p)
    return p.rows.put_gradient(grad).to(rows.dtype), logit_grad_sum


def _weighted_exponentials(s: Tensor, terms: dict[int, tuple[Tensor, Tensor]], bounded: bool, out: Tensor) -> Tensor:
    """Σ factor·exp(s - shift) of a tile, into `out`; terms has the shifts and factors of rows (0) and columns (1)."""
    if bounded:  # all shifts are zero
        row_weights, column_weights = (terms[dim][1] if dim in terms else None for dim in (0, 1))
        return tiles.weigh(s, None, False, row_weights, column_weights, out=out)
    out.zero_()
    for dim, (shift, factor) in terms.items():
        # No logit is above a log-sum-exp that it is part of, but by rounding: of logits of 1e9 by enough for infinity.
        out += (s - shift.unsqueeze(1 - dim)).clamp_(max=0).exp_().mul_(factor.unsqueeze(1 - dim))
    return out


def _through_norm_(grad: Tensor, p: _Pairs) -> Tensor:
    """Turn Σ_j G u_j/√τ in place into dL/dx of the rows; return Σ G∘s, the sum of its products with u/√τ."""
    total = torch.zeros((), dtype=grad.dtype, device=grad.device)
    outer = p.rows.inv * p.root_scale
    inv_norms = torch.ones_like(outer) / p.root_scale  # of the units u/√τ, on which the gradient is projected
    for block in p.rows.blocks:
        total += (p.rows.units[block] * grad[block]).sum()
        tiles.through_norm_(grad[block], p.rows.units[block], inv_norms[block], outer[block], project=p.normalize)
    return total
