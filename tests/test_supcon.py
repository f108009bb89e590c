"""SupCon: every form of it against its specification in float64, its gradients, its edges and its operators."""

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from oracle import (
    EXTREMES,
    SPREADS,
    TEMPERATURES,
    error_over_bound,
    laid_out,
    made_extreme,
    near_collapse,
    of_order_one,
)

import hypercontrast as hc
from hypercontrast import _pair_ops, blockwise_pairs
from hypercontrast.distributed import ABSENT

FORMS = ("labels", "views", "mask", "refs", "refs-mask", "queue")


@dataclass(frozen=True)
class Draw:
    """One random problem in one of the forms the loss takes."""

    form: str
    num_samples: int
    num_classes: int
    dim: int
    dtype: torch.dtype
    temperature: float
    spread: float | None
    extreme: str | None
    layout: str
    variant: str
    singletons: str
    reduction: str
    seed: int

    def make(self, device="cpu"):
        """Leaves that require a gradient, and a function from them (in any dtype) to a loss."""
        g = torch.Generator().manual_seed(self.seed)
        n, k, d = self.num_samples, self.num_classes, self.dim
        labels, other_labels = (torch.randint(0, k, (n,), generator=g) * 1000 - 7 for _ in range(2))
        if self.spread is None:
            z, others = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
        else:
            z, _ = near_collapse((labels + 7) // 1000, k, d, self.spread, g)
            others, _ = near_collapse((other_labels + 7) // 1000, k, d, self.spread, g)
        mask = torch.rand(n, n, generator=g) < 0.2
        other_labels[::5] = ABSENT if self.form == "queue" else other_labels[::5]
        options = {"temperature": self.temperature, "variant": self.variant, "singletons": self.singletons}
        options["reduction"] = self.reduction
        leaves = [laid_out(made_extreme(x, self.extreme, self.dtype, g), self.layout) for x in (z, others)]
        leaves = [x.detach().to(device).requires_grad_() for x in leaves]  # keeps the strides
        labels, other_labels, mask = (x.to(device) for x in (labels, other_labels, mask))
        queue = leaves[1].detach()

        def loss(features, ref_features, backend):
            kw = {**options, "backend": backend}
            if self.form == "labels":
                return hc.supcon_loss(features, labels, **kw)
            if self.form == "views":
                return hc.supcon_loss(torch.stack([features, ref_features], 1), **kw).sum()
            if self.form == "mask":
                return hc.supcon_loss(features, mask=mask, **kw)
            if self.form == "queue":
                return hc.supcon_loss(features, labels, queue=(queue.to(features.dtype), other_labels), **kw)
            if self.form == "refs":
                return hc.supcon_loss(features, labels, ref_features=ref_features, ref_labels=other_labels, **kw)
            return hc.supcon_loss(features, mask=mask, ref_features=ref_features, **kw)

        return leaves, loss


def draws(count, seed, dtypes, sizes=(0, 1, 2, 3, 17, 64, 127, 300, 600)):
    rng = random.Random(seed)
    return [
        Draw(
            rng.choice(FORMS), rng.choice(sizes), rng.choice((1, 2, 5, 33, 200)), rng.choice((1, 2, 3, 16, 33, 123, 200)),
            rng.choice(dtypes), rng.choice(TEMPERATURES), rng.choice(SPREADS), rng.choice(EXTREMES),
            rng.choice(("contiguous", "transposed", "sliced")),
            rng.choice(("out", "out", "in")), rng.choice(("exclude", "zero")), rng.choice(("mean", "sum", "none")),
            seed * 100_000 + i,
        )
        for i in range(count)
    ]  # fmt: skip


def loss_and_gradients(loss, leaves, backend):
    value = loss(*leaves, backend)
    g = torch.Generator().manual_seed(1)
    upstream = torch.rand(value.shape, generator=g, dtype=torch.float64).to(value)
    grads = torch.autograd.grad(value, leaves, upstream, allow_unused=True)
    return [
        x.detach().double()
        for x in (value, *(torch.zeros_like(z) if g is None else g for g, z in zip(grads, leaves, strict=True)))
    ]


def draw_error_over_bound(draw, backend, device="cpu") -> float:
    """See `oracle.error_over_bound`. A sample is an anchor and a column of others, so what positives add counts twice."""
    leaves, loss = draw.make(device)
    truth = loss_and_gradients(loss, [x.detach().double().requires_grad_() for x in leaves], "reference")
    ordinary, powers = zip(*(of_order_one(x) for x in leaves), strict=True)
    eager_loss, *eager_grads = loss_and_gradients(loss, ordinary, "reference")
    eager = [eager_loss, *(grad * power for grad, power in zip(eager_grads, powers, strict=True))]
    actual = loss_and_gradients(loss, leaves, backend)
    n, tau = draw.num_samples, draw.temperature
    mean_over = max(n, 1) if draw.reduction == "mean" and draw.singletons == "zero" else 1
    units = (n**0.5 / tau, *[2 * n**0.5 / (mean_over * tau)] * 2)
    narrow = backend == "triton"
    return error_over_bound(actual, truth, eager, leaves, units, temperature=tau, narrow_statistics=narrow)


@pytest.mark.parametrize(("form", "variant", "tau"), list(itertools.product(FORMS, ("out", "in"), (0.1, 0.01))))
def test_many_tiles_in_float64(form, variant, tau):
    """More than one tile a side, classes across their borders; 1/τ below and above the bound for plain sums."""
    draw = Draw(form, 1100, 3, 8, torch.float64, tau, None, None, "contiguous", variant, "exclude", "mean", 5)
    leaves, loss = draw.make()
    for got, want in zip(*(loss_and_gradients(loss, leaves, b) for b in ("blockwise", "reference")), strict=True):
        assert (got - want).norm() <= 1e-12 * want.norm().clamp(min=1)


@pytest.mark.parametrize("edge", [1, 3, 64])
def test_tile_size_changes_nothing(edge, monkeypatch):
    z, y = torch.randn(50, 7, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (50,))
    want = loss_and_gradients(lambda z, b: hc.supcon_loss(z, y, backend=b), [z], "blockwise")
    monkeypatch.setattr(blockwise_pairs, "EDGE", edge)
    got = loss_and_gradients(lambda z, b: hc.supcon_loss(z, y, backend=b), [z], "blockwise")
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("variant", ["out", "in"])
def test_logits_that_float32_rounds_by_hundreds(variant):
    """Products of few samples need not be symmetric, and a logit may then lie above the log-sum-exp it is part of."""
    for d in (3, 5, 7):
        z = (1e5 * torch.randn(8, d)).requires_grad_()
        hc.supcon_loss(z, torch.arange(8) % 3, normalize=False, variant=variant, backend="blockwise").backward()
        assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("n", [3, 7, 8])
def test_pairs_are_kept_all_or_none(n, monkeypatch):
    """The tiles on and above the diagonal, whole."""
    monkeypatch.setattr(blockwise_pairs, "EDGE", 4)
    sides = [min(4, n - start) for start in range(0, n, 4)]
    entries = sum(a * b for i, a in enumerate(sides) for b in sides[i:])
    for dtype in (torch.float32, torch.float64):
        kept = [blockwise_pairs.kept_elements(n, dtype, entries * dtype.itemsize - less) for less in (0, 1)]
        assert kept == [entries, 0]


@pytest.mark.parametrize("edge", [1, 3, 64])
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_an_anchor_finds_itself_in_whatever_tile(edge, tau, monkeypatch):
    """As over ranks, whose anchors are the columns from `offset` on of all that was gathered."""
    columns, ids, mine = torch.randn(50, 7, dtype=torch.float64), torch.randint(0, 4, (50,)), slice(20, 35)

    options = 1 / tau, True, False, "blockwise"
    want = _pair_ops.pair_lse(columns, None, ids, ids, None, None, 0, *options)
    monkeypatch.setattr(blockwise_pairs, "EDGE", edge)
    got = _pair_ops.pair_lse(columns[mine], columns, ids[mine], ids, None, None, 20, *options)
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b[mine], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_closed_forms(backend):
    classes, n, tau = 5, 4, 0.2
    frame = hc.simplex_etf(classes, 6).double()
    labels = torch.arange(classes).repeat_interleave(n)
    delta = classes / ((classes - 1) * tau)
    want = math.log(n - 1 + n * (classes - 1) * math.exp(-delta))
    got = hc.supcon_loss(frame[labels] * 3, labels, temperature=tau, backend=backend)
    assert got.item() == pytest.approx(want, abs=1e-6)
    same = hc.supcon_loss(torch.ones(12, 3, dtype=torch.float64), torch.arange(12) % 3, backend=backend)
    assert same.item() == pytest.approx(math.log(11), abs=1e-12)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_singletons(backend):
    z, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 2])
    kw = {"backend": backend}
    each, alone = hc.supcon_loss(z, y, reduction="none", return_singletons=True, **kw)
    assert alone == 1
    assert each[2] == 0
    assert (each[[0, 1, 3, 4]] > 0).all()
    assert torch.allclose(hc.supcon_loss(z, y, **kw), each.sum() / 4)
    assert torch.allclose(hc.supcon_loss(z, y, singletons="zero", **kw), each.sum() / 5)
    with pytest.raises(ValueError, match=r"every anchor a positive \(singletons='error'\), got 1 without"):
        hc.supcon_loss(z, y, singletons="error", **kw)
    assert hc.supcon_loss(z, torch.arange(5), **kw) == 0


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("length", [1e-9, 1e9])
def test_columns_beyond_the_range_of_half_features(backend, length):
    """The features are float16, which has neither length; what they are contrasted with is float32."""
    z, w, y = torch.randn(12, 6).half(), torch.randn(3, 6), torch.arange(12) % 3
    past, past_y = torch.randn(9, 6), torch.arange(9) % 3
    for loss in (
        lambda x: hc.ntce_loss(z, w, y, queue=(x, past_y), backend=backend),
        lambda x: hc.supcon_loss(z, y, queue=(x, past_y), backend=backend),
        lambda x: hc.supcon_loss(z, y, ref_features=x, ref_labels=past_y, backend=backend),
    ):
        assert loss(length * past).item() == pytest.approx(loss(past).item(), rel=1e-3)


def test_sums_over_a_large_collapsed_class():
    """The same number a thousand times, which float32 would round the same way every time."""
    n, tau = 4096, 0.07
    units = torch.nn.functional.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))
    cosine = (units[0].double() @ units[1].double()).item()
    want = math.log(n // 2 - 1 + n // 2 * math.exp((cosine - 1) / tau))
    y = torch.arange(n) % 2
    for reduction in ("mean", "none"):  # where it is built the extension computes the first
        got = hc.supcon_loss(units[y], y, temperature=tau, reduction=reduction).mean().item()
        assert got == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("others", ["none", "refs", "queue"])
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_rows_without_a_sample(backend, variant, reduction, others, tau):
    """Are columns of no anchor, and anchors without positives."""
    z, past = (torch.randn(12, 5, requires_grad=True) for _ in range(2))
    y, past_y = torch.arange(12) % 3, torch.arange(12) % 4
    there, past_there = y != 2, past_y != 1

    def of(rows, columns):
        kw = {"temperature": tau, "variant": variant, "reduction": reduction, "backend": backend}
        labels, column_labels = (torch.where(*mask, ABSENT) for mask in ((there, y), (past_there, past_y)))
        if others == "refs":
            kw |= {"ref_features": past[columns], "ref_labels": column_labels[columns]}
        if others == "queue":
            kw["queue"] = past.detach()[columns], column_labels[columns]
        loss, alone = hc.supcon_loss(z[rows], labels[rows], return_singletons=True, **kw)
        return loss, alone, torch.autograd.grad(loss.sum(), z)[0]

    (got, alone, grad), (want, alone_there, grad_there) = of(..., ...), of(there, past_there)
    torch.testing.assert_close(got[there] if reduction == "none" else got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, grad_there, rtol=1e-5, atol=1e-5)
    assert alone == alone_there + 4
    assert not grad[~there].any()
    if reduction == "none":
        assert not got[~there].any()


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_contrast_is_zero(backend, n):
    z = torch.randn(n, 3, requires_grad=True)
    loss = hc.supcon_loss(z, torch.zeros(n, dtype=torch.int64), backend=backend)
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_views_are_rows_with_repeated_labels():
    z, y = torch.randn(6, 3, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 1])
    flat = hc.supcon_loss(z.flatten(0, 1), y.repeat_interleave(3), reduction="none")
    assert torch.equal(hc.supcon_loss(z, y, reduction="none"), flat.view(6, 3))
    mask = y[:, None] == y
    assert torch.allclose(hc.supcon_loss(z, mask=mask), flat.mean())
    assert torch.allclose(hc.supcon_loss(z), hc.supcon_loss(z, torch.arange(6)))


def test_base_temperature_scales_the_loss():
    z, y = torch.randn(9, 4), torch.arange(9) % 3
    plain = hc.supcon_loss(z, y, temperature=0.2)
    assert torch.allclose(hc.supcon_loss(z, y, temperature=0.2, base_temperature=0.07), plain * (0.2 / 0.07))


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("form", ["labels", "refs", "queue"])
def test_learned_temperature(form, variant):
    leaves, _ = Draw(form, 40, 4, 6, torch.float64, 0.1, None, None, "contiguous", variant, "exclude", "mean", 3).make()
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (40,), generator=g)
    extra = {"refs": {"ref_features": leaves[1], "ref_labels": y}, "queue": {"queue": (leaves[1].detach(), y)}}
    grads = []
    for backend in ("reference", "blockwise"):
        tau = torch.tensor(0.13, dtype=torch.float64, requires_grad=True)
        value = hc.supcon_loss(leaves[0], y, temperature=tau, variant=variant, backend=backend, **extra.get(form, {}))
        grads.append(torch.autograd.grad(value, (leaves[0], tau)))
    for got, want in zip(*reversed(grads), strict=True):
        assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("variant", ["out", "in"])
def test_gradcheck(variant):
    z, ref = (torch.randn(7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y, tau = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options = {"variant": variant, "backend": "blockwise", "reduction": "none"}
    assert torch.autograd.gradcheck(lambda z, tau: hc.supcon_loss(z, y, temperature=tau, **options), (z, tau))
    refs = {"ref_labels": y.flip(0), **options}
    assert torch.autograd.gradcheck(lambda z, ref: hc.supcon_loss(z, y, ref_features=ref, **refs), (z, ref))
    raw = {"normalize": False, "temperature": 1.0, **options}
    assert torch.autograd.gradcheck(lambda z: hc.supcon_loss(z, y, **raw), (z,))


def test_compiles_whole():
    z, y = torch.randn(20, 8, requires_grad=True), torch.randint(0, 3, (20,))

    def step(z, y):
        return hc.supcon_loss(z, y, backend="blockwise")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,), (want,) = (torch.autograd.grad(fn(z, y), z) for fn in (compiled, step))
    assert torch.allclose(got, want, atol=1e-7)


@pytest.mark.parametrize("variant", ["out", "in"])
@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_autocast_changes_nothing(backend, variant):
    """Nor in a backward within, but for the reference, whose backward is torch's own and belongs outside."""
    z, y = torch.randn(20, 8, requires_grad=True), torch.randint(0, 3, (20,))
    loss = hc.supcon_loss(z, y, variant=variant, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = hc.supcon_loss(z, y, variant=variant, backend=backend)
        grad = torch.autograd.grad(inside, z) if backend == "blockwise" else None
    assert torch.equal(inside, loss)
    assert grad is None or torch.equal(*grad, *torch.autograd.grad(loss, z))


def test_zero_rows_have_no_gradient():
    z, y = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    z[2] = 0
    z.requires_grad_()
    hc.supcon_loss(z, y).backward()
    assert torch.isfinite(z.grad).all()
    assert torch.equal(z.grad[2], torch.zeros(4))


def test_module_equals_function():
    z, y = torch.randn(8, 2, 4), torch.arange(8) % 4
    options = {"temperature": 0.2, "variant": "in", "singletons": "zero", "reduction": "sum", "base_temperature": 0.1}
    module = hc.SupConLoss(**options)
    assert torch.equal(module(z, y), hc.supcon_loss(z, y, **options))
    assert "temperature=0.2" in repr(module)
    learned = hc.SupConLoss(temperature=torch.nn.Parameter(torch.tensor(0.1)))
    learned(z, y).backward()
    assert learned.temperature.grad is not None


@pytest.mark.parametrize("name", ["ntce_loss", "nonl_loss"])
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_queue_of_prototype_losses(name, tau):
    z, w, past = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (30, 5, 40))
    y, past_y = torch.randint(0, 5, (30,)), torch.randint(0, 5, (40,))
    past_y[::4], past_y[1::7] = ABSENT, -100
    queue = (past.detach(), past_y)
    results = []
    for backend in ("reference", "blockwise"):
        loss = getattr(hc, name)(z, w, y, temperature=tau, queue=queue, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (z, w))))
    for got, want in zip(*reversed(results), strict=True):
        assert (got - want).norm() <= 1e-12 * want.norm()
    assert results[0][0] > getattr(hc, name)(z, w, y, temperature=tau)


Z, Y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
BAD = {
    "features not a tensor": (TypeError, "features must be a tensor", lambda: hc.supcon_loss([1.0], Y)),
    "features of one dimension": (ValueError, r"\[N, D\] or \[B, V, D\], got \[3\]", lambda: hc.supcon_loss(Z[0], Y)),
    "features of integers": (TypeError, "features must be float32", lambda: hc.supcon_loss(Z.long(), Y)),
    "no dimension": (ValueError, "at least one dimension", lambda: hc.supcon_loss(Z[:, :0], Y)),
    "NaN": (ValueError, "features must have finite norms", lambda: hc.supcon_loss(Z * torch.nan, Y)),
    "no labels": (ValueError, "labels or mask must be given", lambda: hc.supcon_loss(Z)),
    "labels and mask": (ValueError, "must not both be given", lambda: hc.supcon_loss(Z, Y, mask=torch.ones(4, 4) > 0)),
    "labels of floats": (TypeError, "labels must be int64", lambda: hc.supcon_loss(Z, Y.float())),
    "too few labels": (ValueError, r"labels must have shape \[4\]", lambda: hc.supcon_loss(Z, Y[:3])),
    "mask of floats": (TypeError, "mask must be a bool tensor", lambda: hc.supcon_loss(Z, mask=torch.ones(4, 4))),
    "mask of another shape": (ValueError, r"mask must have shape \[4, 4\]", lambda: hc.supcon_loss(Z, mask=torch.ones(4, 3) > 0)),
    "refs of another width": (ValueError, "features' dimension 3", lambda: hc.supcon_loss(Z, Y, ref_features=Z[:, :2], ref_labels=Y)),
    "refs without labels": (ValueError, "ref_labels must be given exactly", lambda: hc.supcon_loss(Z, Y, ref_features=Z)),
    "ref labels alone": (ValueError, "ref_labels must come with ref_features", lambda: hc.supcon_loss(Z, Y, ref_labels=Y)),
    "refs in float64": (TypeError, "float64 exactly when", lambda: hc.supcon_loss(Z, Y, ref_features=Z.double(), ref_labels=Y)),
    "temperature zero": (ValueError, "temperature must be positive", lambda: hc.supcon_loss(Z, Y, temperature=0)),
    "negative tensor temperature": (ValueError, "temperature must be positive", lambda: hc.supcon_loss(Z, Y, temperature=torch.tensor(-1.0))),
    "base temperature": (ValueError, "base_temperature must be positive", lambda: hc.supcon_loss(Z, Y, base_temperature=-1)),
    "endless base temperature": (ValueError, "base_temperature must be positive and finite, got inf", lambda: hc.supcon_loss(Z, Y, base_temperature=float("inf"))),
    "variant": (ValueError, "variant must be one of 'out', 'in', got 'both'", lambda: hc.supcon_loss(Z, Y, variant="both")),
    "singletons": (ValueError, "singletons must be one of", lambda: hc.supcon_loss(Z, Y, singletons="drop")),
    "reduction": (ValueError, "reduction must be one of", lambda: hc.supcon_loss(Z, Y, reduction="avg")),
    "normalize": (TypeError, "normalize must be True or False", lambda: hc.supcon_loss(Z, Y, normalize=1)),
    "queue not a pair": (TypeError, "queue must be a NegativeBuffer or a pair", lambda: hc.supcon_loss(Z, Y, queue=Z)),
    "queue of another width": (ValueError, "queue must hold features of dimension 3", lambda: hc.supcon_loss(Z, Y, queue=(Z[:, :2], Y))),
    "queue with a gradient": (ValueError, "queue must not require a gradient", lambda: hc.supcon_loss(Z, Y, queue=(Z.clone().requires_grad_(), Y))),
    "queue without labels": (ValueError, "labels must be given with a queue", lambda: hc.supcon_loss(torch.randn(4, 2, 3), queue=(Z, Y))),
    "queue with a mask": (ValueError, "mask must be None with a queue", lambda: hc.supcon_loss(Z, mask=torch.ones(4, 4) > 0, queue=(Z, Y))),
    "queue of sample anchors": (ValueError, "queue must be None for anchor='sample'", lambda: hc.nonl_loss(Z, Z, Y, anchor="sample", queue=(Z, Y))),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    kind, message, call = BAD[case]
    with pytest.raises(kind, match=message):
        call()
