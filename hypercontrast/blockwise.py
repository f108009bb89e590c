"""Memory-linear PyTorch backend of the `lse` primitive, for the CPU and any device without Triton.

Samples pass in blocks, so that a tile of logits stays in cache and no more than a tile exists beside those whose
exponentials are kept: the backward needs exp(s) again, and as many tiles as fit the memory budget spare it their
product. Cost in matrix products (F1 = 2NKD): forward F1, backward 2 F1 where kept, else 3 F1.

Half-precision inputs are widened a block at a time: sums and products run in float32 (float64 for float64). The K + N
log-sum-exps travel in float64, so that exp(s - lse) near 1 keeps the accuracy of the sum it came from: rounding a
log-sum-exp of 20 to float32 would cost a gradient near collapse a factor of 20 in accuracy.

Shapes: N samples, K classes, D dimensions, B samples in a block, P classes in a panel.
"""

from __future__ import annotations

import contextlib
import numbers
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from hypercontrast import _checks, tiles
from hypercontrast.reference import MIN_NORM

# Largest 1/τ at which exp(s) needs no running maximum: |s| <= 1/τ, so sums over up to 1e10 samples stay below the
# float32 overflow (e^88) and single terms stay normal numbers (e^-64 = 2e-28).
BOUNDED_INV_TEMPERATURE = 64.0

# Smallest and largest factor/|x| that rows are folded with: sums up to the inverse of either then fit float32, and the
# factor itself, times 64/τ.
MIN_FOLDED_SCALE, MAX_FOLDED_SCALE = 1e-32, 1e32

TILE_ELEMENTS = 1 << 21  # logits in a tile, 8 MiB of float32: fewer rows slow the products, more are more memory
PANEL_CLASSES = 1024  # classes in a tile: sums of more products round half as much again in oneDNN
MIN_BLOCK = 128  # samples in a tile at least, so that the products stay products of matrices

_kept_in_use = threading.Lock()

_BUDGET_VARIABLE = "HYPERCONTRAST_MEMORY_BUDGET_MIB"


def _initial_budget() -> int:
    """In bytes."""
    text = os.environ.get(_BUDGET_VARIABLE, "64")
    try:
        num_bytes = float(text) * 2**20
    except ValueError:
        num_bytes = -1
    if not 0 <= num_bytes < 2**63:
        raise ValueError(f"{_BUDGET_VARIABLE} must be a number of MiB in [0, 2^43), got {text!r}")
    return int(num_bytes)


_budget_bytes = _initial_budget()


def set_memory_budget(num_bytes: int) -> None:
    """How much a loss may keep from forward to backward to save time: 64 MiB at first. 0 always recomputes.

    It keeps the exponentials of its logits; those that do not fit are computed again. On a CPU they take 4 bytes each:
    K x N against prototypes, of which as many are kept as fit, and with the C++ extension half the N² of SupCon, all of
    them or none. On a GPU losses against prototypes keep all or none, in bfloat16 (temperatures from 1/64) and float16
    (from 0.1), 2 bytes each, for features wide enough to gain by it, of D >= 512 (256 for anchors on both sides), at a
    temperature that is not learned. What a backward takes while it runs, bounded too, comes on top.

    The environment variable HYPERCONTRAST_MEMORY_BUDGET_MIB sets the initial value. With the C++ extension the memory
    of one loss on a CPU, up to 256 MiB, waits for the next step; setting the budget gives it back.
    """
    global _budget_bytes
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, numbers.Real):
        raise TypeError(f"num_bytes must be a number of bytes, got {type(num_bytes).__name__}")
    if not 0 <= num_bytes < 2**63:
        raise ValueError(f"num_bytes must lie in [0, 2^63), got {num_bytes}")
    _budget_bytes = int(num_bytes)
    tiles.release()


def memory_budget() -> int:
    """The current budget in bytes; see `set_memory_budget`."""
    return _budget_bytes


def is_bounded(temperature: Tensor | None, inv_temperature: float, normalize: bool) -> bool:
    """Whether logits are known, without reading the device, to be small enough for sums without a running maximum."""
    return normalize and temperature is None and inv_temperature <= BOUNDED_INV_TEMPERATURE


def statistics_dtype(device: torch.device) -> torch.dtype:
    """What log-sum-exps and positives are returned in."""
    return torch.float32 if device.type == "mps" else torch.float64  # no float64 there


def kept_elements(num_samples: int, num_classes: int, dtype: torch.dtype, keep_bytes: int) -> int:
    """Room for as many of the exponentials [N, K] as fit the budget."""
    return min(num_samples * num_classes, keep_bytes // dtype.itemsize)


def inverse_norms(name: str, x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """1/|x| of each row, zero where |x| <= MIN_NORM; ones when the rows are taken as they are."""
    norms = x.new_empty(len(x), dtype=dtype)
    at_once = len(x) if x.dtype == dtype else TILE_ELEMENTS // x.shape[1]
    for block in spans(len(x), max(at_once, 1)):
        torch.linalg.vector_norm(x[block], dim=1, dtype=dtype, out=norms[block])  # widens whatever it is given
    if x.device.type == "cpu":
        _checks.check_finite_norms(name, norms)
    return torch.where(norms <= MIN_NORM, 0, 1 / norms) if normalize else torch.ones_like(norms)


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    """Rows of x times their factors, in the factors' precision."""
    return x.to(factors.dtype) * factors[:, None]


def spans(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def class_sums(x: Tensor, factors: Tensor | None, ids: Tensor, num_classes: int) -> Tensor:
    """Σ of the rows of each class [K, D], times their factors if there are any, in `statistics_dtype`.

    At collapse a class is the same number again and again, which float32 rounds the same way every time.
    """
    wide = statistics_dtype(x.device)
    sums = x.new_zeros(num_classes, x.shape[1], dtype=wide)
    for block in spans(len(x), max(1, TILE_ELEMENTS // x.shape[1])):
        rows = x[block].to(wide)
        sums.index_add_(0, ids[block], rows if factors is None else rows * factors[block, None])
    return sums


class Sums:
    """Log-sum-exps that grow tile by tile: plain sums of exponentials where those are bounded, else in units of
    exp(peak), the running maximum.
    """

    def __init__(self, like: Tensor, length: int, bounded: bool) -> None:
        self.total = like.new_zeros(length, dtype=statistics_dtype(like.device))
        self.peak = None if bounded else like.new_full((length,), -torch.inf)

    def add(self, part: slice, x: Tensor) -> None:
        """Entries [R, C] of some of them: exponentials where bounded, else logits."""
        total = self.total[part]
        if self.peak is None:
            total += x.sum(1)
            return
        peak = self.peak[part]
        new_peak = torch.maximum(peak, x.amax(1))
        shift = torch.where(new_peak == -torch.inf, 0, new_peak)
        total.mul_((peak - shift).exp()).add_((x - shift[:, None]).exp().sum(1))
        peak.copy_(new_peak)

    def lse(self) -> Tensor:
        log = self.total.log()
        return log if self.peak is None else self.peak + log


class _Tiling:
    """What forward and backward share: the samples and classes that count, the walk over tiles, and a tile's logits.

    `classes` holds the class of each row that is computed, `labels` each kept sample's row among them (-1: not there).
    """

    def __init__(
        self, features, prototypes, labels, inv_features, inv_prototypes, *,
        counts, temperature, inv_temperature, ignore_index, rows, cols, exclude_own, normalize,
    ):  # fmt: skip
        self.rows, self.cols, self.exclude_own = rows, cols, exclude_own
        self.bounded = is_bounded(temperature, inv_temperature, normalize)
        self.scale = inv_temperature if temperature is None else 1 / temperature.to(inv_features.dtype)

        valid = labels != ignore_index
        self.samples = None if valid.all() else valid.nonzero()[:, 0]
        self.classes = None
        if rows and not cols and counts is not None and not counts.all():
            self.classes = counts.nonzero()[:, 0]
            row_of_class = torch.full_like(counts, -1)
            row_of_class[self.classes] = torch.arange(len(self.classes), device=counts.device)

        self.features, self.inv_features = self.of_samples(features), self.of_samples(inv_features)
        self.prototypes, self.inv_prototypes = self.of_classes(prototypes), self.of_classes(inv_prototypes)
        self.labels = self.of_samples(labels)
        if self.classes is not None:
            self.labels = row_of_class[self.labels]
        self.n, self.k = len(self.features), len(self.prototypes)
        self.dtype = inv_features.dtype

    def of_samples(self, x: Tensor) -> Tensor:
        return x if self.samples is None else x[self.samples]

    def of_classes(self, x: Tensor) -> Tensor:
        return x if self.classes is None else x[self.classes]

    def panels(self, factor: Tensor | None = None):
        """(classes, unit prototypes / τ [P, D], times their factors) panel by panel."""
        inv = self.inv_prototypes * self.scale if factor is None else self.inv_prototypes * self.scale * factor
        for panel in spans(self.k, PANEL_CLASSES):
            yield panel, scaled(self.prototypes[panel], inv[panel])

    def tiles(self, panel: slice) -> Iterator[tuple[slice, Tensor]]:
        """Block by block of a panel: (samples, the column of each one's positive in this tile, -1 without one)."""
        own = self.labels - panel.start
        if panel.stop - panel.start < self.k:
            own = torch.where((own >= 0) & (own < panel.stop - panel.start), own, -1)
        for block in spans(self.n, max(self.height, 1)):
            yield block, own[block]

    def kept_tile(self, kept: Tensor, panel: slice, block: slice) -> Tensor | None:
        """A tile's place in `kept`, where they lie one after the other; None past its end."""
        rows, cols = block.stop - block.start, panel.stop - panel.start
        start = self.n * panel.start + block.start * cols
        return _tile(kept, start, rows, cols) if start + rows * cols <= len(kept) else None

    def keeps_all(self, kept: Tensor) -> bool:
        return self.n * self.k <= len(kept)

    @property
    def height(self) -> int:
        """Samples in a tile: of few classes as many as have their vectors within a tile's memory."""
        width = min(max(self.k, self.features.shape[1]), PANEL_CLASSES)
        return min(self.n, max(MIN_BLOCK, TILE_ELEMENTS // max(width, 1)))

    def buffer(self) -> Tensor:
        """Room for the largest tile; every tile is a contiguous view of it."""
        return self.features.new_empty(self.height * min(self.k, PANEL_CLASSES), dtype=self.dtype)


def _tile(memory: Tensor, start: int, rows: int, cols: int) -> Tensor:
    return memory[start : start + rows * cols].view(rows, cols)


def launch_fwd(features, prototypes, labels, *, keep_bytes, **options):
    """See `hypercontrast._ops.lse`."""
    dtype = _checks.accumulator(features)
    n_all, k_all = len(features), len(prototypes)
    inv_features = inverse_norms("features", features, dtype, options["normalize"])
    inv_prototypes = inverse_norms("prototypes", prototypes, dtype, options["normalize"])
    t = _Tiling(features, prototypes, labels, inv_features, inv_prototypes, **options)

    positives = inv_features.new_zeros(t.n)
    row_sums, col_sums = (Sums(inv_features, length, t.bounded) for length in (t.k, t.n))
    kept = tiles.reusable(kept_elements(n_all, k_all, dtype, keep_bytes) if t.bounded else 0, like=inv_features)
    used, buffer = 0, t.buffer()

    for panel, w_PD in t.panels():
        for block, own_B in t.tiles(panel):
            s_BP = t.kept_tile(kept, panel, block)
            if s_BP is None:
                s_BP = _tile(buffer, 0, len(own_B), len(w_PD))
            else:
                used += s_BP.numel()
            tiles.product_(t.features[block].to(dtype), w_PD.T, s_BP)
            inv_B, positives_B = t.inv_features[block], positives[block]
            if t.bounded:
                rows = row_sums.total[panel] if t.rows else None
                cols = col_sums.total[block] if t.cols else None
                tiles.exponentiate_(s_BP, inv_B, own_B, positives_B, t.exclude_own, cols, rows)
                continue
            s_BP.mul_(inv_B[:, None])
            tiles.take_positives_(s_BP, own_B, positives_B, -torch.inf if t.exclude_own else None)
            if t.rows:
                row_sums.add(panel, s_BP.T)
            if t.cols:
                col_sums.add(block, s_BP)
    kept[used:].zero_()

    wide = statistics_dtype(features.device)
    return (
        spread(row_sums.lse(), t.classes, k_all, -torch.inf) if t.rows else positives.new_empty(0, dtype=wide),
        spread(col_sums.lse(), t.samples, n_all, -torch.inf) if t.cols else positives.new_empty(0, dtype=wide),
        spread(positives.to(wide), t.samples, n_all, 0.0),
        inv_features,
        inv_prototypes,
        kept,
    )


def spread(x: Tensor, index: Tensor | None, length: int, fill: float) -> Tensor:
    """Rows of x put back at `index` among `length` rows of `fill`."""
    if index is None:
        return x
    return x.new_full((length, *x.shape[1:]), fill).index_copy_(0, index, x)


def launch_bwd(
    features, prototypes, labels, row_lse, col_lse, inv_features, inv_prototypes, kept, grad_row, grad_col, grad_pos, *,
    wanted, **options,
):  # fmt: skip
    """See `hypercontrast._ops.lse_backward`."""
    t = _Tiling(features, prototypes, labels, inv_features, inv_prototypes, **options)
    pos = t.of_samples(grad_pos).to(t.dtype)
    row = exponent(t.of_classes(row_lse), t.of_classes(grad_row), t.dtype, t.bounded) if t.rows else None
    col = exponent(t.of_samples(col_lse), t.of_samples(grad_col), t.dtype, t.bounded) if t.cols else None
    class_factor, sample_factor, pos = _folded(t, row, col, pos) if t.keeps_all(kept) else (None, None, pos)
    folded = class_factor is not None or sample_factor is not None
    kept = kept.data  # positives are written into it and taken out again, which autograd's version count need not see

    wants_features, wants_prototypes = wanted
    grad_u = inv_features.new_empty(t.n if wants_features else 0, features.shape[1])
    grad_w = inv_features.new_zeros(t.k if wants_prototypes else 0, features.shape[1])
    if t.k == 0:  # a queue beside a batch without samples: no panel writes what the temperature's gradient is read off
        grad_u.zero_()
    inv_u = t.inv_features if sample_factor is None else t.inv_features * sample_factor
    buffer = t.buffer()
    units = inv_features.new_empty(t.height, features.shape[1])
    for panel, w_PD in t.panels(class_factor):
        for block, own_B in t.tiles(panel):
            x_BD = t.features[block].to(t.dtype)
            e_BP = t.kept_tile(kept, panel, block)
            g_BP = e_BP if folded and e_BP is not None else _tile(buffer, 0, len(own_B), len(w_PD))
            if not folded:
                _weigh(t, x_BD, w_PD, e_BP, block, panel, row, col, out=g_BP)
            # Positives join in before the products: added to the products they would leave the rounding of both behind.
            with _joined(g_BP, own_B, pos[block], t.exclude_own, kept=folded):
                if wants_features:
                    tiles.product_(g_BP, w_PD, grad_u[block], add=panel.start > 0)
                if wants_prototypes:
                    u_BD = torch.mul(x_BD, inv_u[block, None], out=units[: len(own_B)])
                    tiles.product_(g_BP.T, u_BD, grad_w[panel], add=True)

    grad_features = grad_prototypes = features.new_empty(0)
    logit_grad_sum = grad_u.new_zeros(())
    if wants_features:
        logit_grad_sum = through_norm_(grad_u, t.features, t.inv_features, sample_factor, options["normalize"])
        grad_features = spread(grad_u, t.samples, len(features), 0.0).to(features.dtype)
    if wants_prototypes:
        class_scale = t.scale * (torch.ones_like(t.inv_prototypes) if class_factor is None else class_factor)
        through_norm_(grad_w, t.prototypes, t.inv_prototypes, class_scale, options["normalize"])
        grad_prototypes = spread(grad_w, t.classes, len(prototypes), 0.0).to(prototypes.dtype)
    return grad_features, grad_prototypes, logit_grad_sum


@contextlib.contextmanager
def _joined(g_BP: Tensor, own_B: Tensor, pos_B: Tensor, replace: bool, kept: bool):
    """Add each sample's positive to its own entry of a tile, or put it there. Inside only, if the tile is `kept` for
    other walks over the graph, and then for one thread at a time.
    """
    places = tiles.entries(own_B)
    with _kept_in_use if kept else contextlib.nullcontext():
        before = g_BP[places]
        try:
            g_BP[places] = pos_B[places[0]] if replace else before + pos_B[places[0]]
            yield
        finally:
            if kept:
                g_BP[places] = before


def _folded(t: _Tiling, row, col, pos: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(factors of classes, factors of samples, what positives add) that make G = factors·(exp(s) + positives).

    Of a loss with one kind of anchor the factors of exp(s) are constant along a row or a column of G, so they can scale
    the operands of the products instead of the K x N exponentials. Not where a factor of zero would have to be divided
    out of a positive, nor where vectors are so long that the projection's sums would overflow before they are scaled.
    """
    if (t.rows and t.cols) or t.k == 0:  # of no class there is no factor
        return None, None, pos
    factor = (row or col)[1]
    inv = t.inv_prototypes if t.rows else t.inv_features
    scale = (factor * inv).abs()
    extreme = (scale < MIN_FOLDED_SCALE) | (scale > MAX_FOLDED_SCALE)
    if (extreme & (factor != 0) & (inv != 0)).any():
        return None, None, pos
    own = factor[t.labels] if t.rows else factor
    if ((own == 0) & (pos != 0)).any():
        return None, None, pos
    pos = torch.where(own == 0, 0, pos / own)
    return (factor, None, pos) if t.rows else (None, factor, pos)


def _weigh(t: _Tiling, x_BD, w_PD, e_BP, block: slice, panel: slice, row, col, out: Tensor) -> None:
    """G without its positives, from the kept exponentials or by computing the logits again."""
    inv_B = t.inv_features[block]
    if e_BP is None:
        tiles.product_(x_BD, w_PD.T, out)
    if t.bounded:  # both shifts are zero: one exponential serves rows and columns
        weights = col[1][block] if t.cols else None, row[1][panel] if t.rows else None
        tiles.weigh(out if e_BP is None else e_BP, inv_B, e_BP is not None, *weights, out=out)
        return
    out.mul_(inv_B[:, None])
    terms = []
    if t.rows:
        terms.append((out - row[0][panel]).exp_().mul_(row[1][panel]))
    if t.cols:
        terms.append(out.sub_(col[0][block, None]).exp_().mul_(col[1][block, None]))
    torch.add(*terms, out=out) if len(terms) == 2 else out.copy_(terms[0])


def exponent(lse: Tensor, grad: Tensor, dtype: torch.dtype, bounded: bool) -> tuple[Tensor, Tensor]:
    """(shift, factor) such that grad·exp(s - lse) = factor·exp(s - shift) in the tile's precision.

    The shift is zero where exp(s) cannot overflow, else the log-sum-exp rounded, with what was rounded off in the
    factor.
    """
    shift = torch.zeros_like(lse) if bounded else lse.to(dtype).to(lse.dtype)
    factor = torch.where(lse == -torch.inf, 0, grad * (shift - lse).exp())  # a sum over nothing has no gradient
    return torch.where(lse == -torch.inf, torch.inf, shift).to(dtype), factor.to(dtype)


def through_norm_(grad: Tensor, x: Tensor, inv_norms: Tensor, factor: Tensor | None, normalize: bool) -> Tensor:
    """Turn dL/du = factor·grad in place into dL/dx = (dL/du - (u·dL/du) u)/|x|; return Σ u·dL/du."""
    outer = inv_norms if factor is None else inv_norms * factor
    total = torch.zeros((), dtype=grad.dtype, device=grad.device)
    for block in spans(len(x), max(1, TILE_ELEMENTS // x.shape[1])):
        total += tiles.through_norm_(
            grad[block], x[block].to(grad.dtype), inv_norms[block], outer[block], project=normalize
        )
    return total
