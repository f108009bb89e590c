"""The further losses against their specifications: every option in float64, fuzz, closed forms, edges, ranks, Triton."""

import ctypes
import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import ranks
import torch
from oracle import REGIMES, draws, error_over_bound, of_order_one, set_regime

import hypercontrast as hc
from bench.measure import in_fresh_process
from hypercontrast import _ops, reference


def margins(k):
    return hc.ldam_margins(torch.arange(1, k + 1) ** 2)


def biases(k):
    return torch.linspace(-4, 3, k, dtype=torch.float64)


# name → (function, what K classes are given besides)
LOSSES = {
    "cosface": ("cosface_loss", lambda k: {"margin": 0.35}),
    "ldam": ("cosface_loss", lambda k: {"margin": margins(k)}),
    "arcface": ("arcface_loss", lambda k: {"margin": 0.5}),
    "logit-adjusted": ("logit_adjusted_loss", lambda k: {"bias": biases(k)}),
    "proxy-anchor": ("proxy_anchor_loss", lambda k: {"margin": 0.1}),
}
OF_SAMPLES = [name for name in LOSSES if name != "proxy-anchor"]  # with terms, weights and reductions by sample


def call(name, features, prototypes, labels, backend="auto", **options):
    function, specific = LOSSES[name]
    return getattr(hc, function)(
        features, prototypes, labels, backend=backend, **{**specific(len(prototypes)), **options}
    )


def results(loss, leaves, upstream=None):
    """Loss and gradients, in float64."""
    if upstream is not None:
        upstream = upstream.to(loss)
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, leaves, upstream))]


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def assert_equal(got, want, tolerance=1e-12):
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tolerance * b.norm().clamp(min=1)


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    set_regime(request.param, monkeypatch)


@pytest.mark.parametrize("tau", [0.2, 1 / 64, 0.01])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_its_specification(name, tau, regime):
    """A learned temperature, weights, ignored samples and absent classes, every reduction."""
    z, w, y = leaf(37, 5), leaf(9, 5), torch.randint(0, 7, (37,))
    y[::6] = 3
    temperature = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "sum", "none") if name in OF_SAMPLES else (None,):
        options = {"ignore_index": 3, "temperature": temperature}
        if reduction:
            options |= {"reduction": reduction, "weight": torch.rand(9).double()}
        upstream = torch.rand(37) if reduction == "none" else torch.ones(())
        got, want = (
            results(call(name, z, w, y, backend, **options), (z, w, temperature), upstream)
            for backend in ("blockwise", "reference")
        )
        assert_equal(got, want, 1e-11)
        fixed = {**options, "temperature": tau}  # without a tensor small logits are summed in another way
        assert_equal(results(call(name, z, w, y, "blockwise", **fixed), (z, w), upstream), want[:3])


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "arcface"])
def test_without_normalisation(name, regime):
    z, w, y = leaf(25, 6), leaf(8, 6), torch.randint(0, 8, (25,))
    got, want = (
        results(call(name, z, w, y, backend, normalize=False, temperature=0.1), (z, w))
        for backend in ("blockwise", "reference")
    )
    assert_equal(got, want)
    assert (got[0] - call(name, z, w, y, temperature=0.1)).abs() > 0.1


def angle_slope(z, w, y):
    """The largest 1/sin θ of the positives: what an angle makes of the rounding of its cosine, and, squared, the sine's
    relative error, which the gradient has. From where the sine is lost in rounding there is no slope.
    """
    kept = y >= 0
    u, v = (reference.unit_rows(x.detach().double()) for x in (z[kept], w))
    sine = (1 - (u * v[y[kept]]).sum(1).square()).clamp(min=8 * torch.finfo(torch.float32).eps).sqrt()
    return 1 / sine.min().item() if len(sine) else 1


def draw_error_over_bound(draw, name, backend) -> float:
    z, w, y = draw.tensors()
    options = {"temperature": draw.temperature}
    truth = results(
        call(name, *(wide := [x.detach().double().requires_grad_() for x in (z, w)]), y, "reference", **options), wide
    )
    leaves, powers = zip(*(of_order_one(x) for x in (z, w)), strict=True)
    loss, *grads = results(call(name, *leaves, y, "reference", **options), leaves)
    eager = [loss, *(grad * power for grad, power in zip(grads, powers, strict=True))]
    actual = results(call(name, z, w, y, backend, **options), (z, w))
    kept = y[y >= 0]
    # A positive adds 1/(Mτ) to a sample and n_c/(Mτ) to a class; of Proxy-Anchor no more than 1/τ to either.
    slope = angle_slope(z, w, y) if name == "arcface" else 1
    counts, m_tau = torch.bincount(kept, minlength=len(w)), max(1, len(kept)) * draw.temperature
    units = (slope / draw.temperature, slope**2 * len(kept) ** 0.5 / m_tau, slope**2 * counts.double().norm() / m_tau)
    return error_over_bound(
        actual, truth, eager, (z, w), units, temperature=draw.temperature, narrow_statistics=backend == "triton"
    )


@pytest.mark.parametrize("name", LOSSES)
def test_fuzz(name):
    problems = draws(60, seed=70, dtypes=(torch.float32, torch.bfloat16, torch.float16))
    worst = [(draw_error_over_bound(draw, name, "blockwise"), draw) for draw in problems]
    over = [pair for pair in worst if not pair[0] <= 1]
    assert not over, over


def closed_form(name, k, n, tau):
    apart, own = -1 / (k - 1), 1
    if name == "proxy-anchor":
        return math.log1p(n * math.exp((0.1 - own) / tau)) + math.log1p(n * (k - 1) * math.exp((0.1 + apart) / tau))
    targets = {
        "cosface": [own - 0.35] * k, "ldam": (own - margins(k).double()).tolist(), "arcface": [math.cos(0.5)] * k,
        "logit-adjusted": [own] * k,
    }[name]  # fmt: skip
    b = biases(k).tolist() if name == "logit-adjusted" else [0] * k
    pushes = [sum(math.exp(apart / tau + b[j] - b[c]) for j in range(k) if j != c) for c in range(k)]
    return sum(math.log1p(push * math.exp(-t / tau)) for push, t in zip(pushes, targets, strict=True)) / k


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_simplex_etf(name, backend, tau):
    k, n = 6, 4
    frame, y = hc.simplex_etf(k, 9), torch.arange(k).repeat(n)
    loss = call(name, 5 * frame[y], 0.3 * frame, y, backend, temperature=tau)
    assert loss.item() == pytest.approx(closed_form(name, k, n, tau), abs=1e-6 if name == "arcface" else 1e-10)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_no_margin_and_no_bias_are_normface(backend):
    z, w, y = leaf(20, 6), leaf(7, 6), torch.randint(0, 7, (20,))
    want = results(hc.normface_loss(z, w, y, temperature=0.05), (z, w))
    for name, nothing in [
        ("cosface", {"margin": 0.0}),
        ("ldam", {"margin": torch.zeros(7)}),
        ("arcface", {"margin": 0}),
        ("logit-adjusted", {"bias": torch.full((7,), -3.0)}),
    ]:
        assert_equal(results(call(name, z, w, y, backend, temperature=0.05, **nothing), (z, w)), want)


def test_proxy_nca_is_nonl_of_samples():
    """Its squared distances of unit vectors are 2 - 2cos; the positive is not in the denominator."""
    z, w, y = leaf(20, 6), leaf(7, 6), torch.randint(0, 7, (20,))
    distances = torch.cdist(reference.unit_rows(z), reference.unit_rows(w)).square()
    own = torch.nn.functional.one_hot(y, 7).bool()
    want = distances[own] + (-distances).masked_fill(own, -torch.inf).logsumexp(1)
    assert_equal(results(hc.nonl_loss(z, w, y, anchor="sample", temperature=0.5), (z, w)), results(want.mean(), (z, w)))


def test_a_bias_is_learned():
    z, w, y, b = leaf(20, 6), leaf(7, 6), torch.randint(0, 7, (20,)), leaf(7)
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    got, want = (
        results(hc.logit_adjusted_loss(z, w, y, b, temperature=tau, backend=backend), (z, w, b, tau))
        for backend in ("blockwise", "reference")
    )
    assert_equal(got, want)


@pytest.mark.parametrize("least", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_a_bias_may_take_a_class_out(least):
    """As masks do: a finite bias, whatever its square."""
    z, w, y = leaf(9, 4, dtype=torch.float32), leaf(4, 4, dtype=torch.float32), torch.arange(9) % 3
    bias = torch.tensor([0.5, -1.0, 2.0, least])
    want = results(hc.logit_adjusted_loss(z, w[:3], y, bias[:3]), (z, w))
    for got, wanted in zip(results(hc.logit_adjusted_loss(z, w, y, bias), (z, w)), want, strict=True):
        torch.testing.assert_close(got, wanted)


def test_balanced_softmax_is_exact_for_rare_classes():
    """A posterior times prior: probabilities are those of Bayes' rule, for a prior of six orders of magnitude."""
    z, w, counts = torch.randn(9, 4), torch.randn(3, 4), torch.tensor([1_000_000.0, 1000.0, 1.0])
    y = torch.arange(9) % 3
    loss = hc.logit_adjusted_loss(z, w, y, counts.log(), temperature=0.5, reduction="none")
    odds = counts.double() * (reference.unit_rows(z.double()) @ reference.unit_rows(w.double()).T / 0.5).exp()
    want = -(odds / odds.sum(1, keepdim=True))[torch.arange(9), y].log()
    assert torch.allclose(loss.double(), want, rtol=2e-6, atol=1e-6)


def test_arcface_falls_past_pi():
    """Its target falls all the way from an angle of 0 to π, where cos(θ + m) alone would rise."""
    angle = torch.linspace(0.01, math.pi - 0.01, 500, dtype=torch.float64)
    z, w = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    loss = hc.arcface_loss(z, w, torch.zeros(500, dtype=torch.int64), temperature=0.5, reduction="none")
    target = -loss.expm1().log() * 0.5  # the other logit is zero
    assert (target.diff() < 0).all()
    early = angle < math.pi - 0.5
    assert torch.allclose(target[early], (angle + 0.5).cos()[early], atol=1e-12)


@pytest.mark.parametrize("m", [0.5, 3.0])
def test_arcface_has_a_gradient_at_its_ends(m):
    """At θ = 0 and π nothing is infinite, and nothing turns the vectors."""
    z = torch.tensor([[2.0, 1.0], [-2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[4.0, 2.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    _, *grads = results(hc.arcface_loss(z, w[:1], torch.zeros(2, dtype=torch.int64), margin=m), (z, w))
    assert all((grad == 0).all() for grad in grads)  # one class: no loss
    loss, grad = results(hc.arcface_loss(z, w, torch.zeros(2, dtype=torch.int64), margin=m), (z,))
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_arcface_leaves_out_a_direction_that_rounding_chose():
    """A sample at its prototype: the margin's gradient has a length, sin m, and in float32 no direction."""
    w = torch.randn(4, 16)
    z, y = (3.7 * w).requires_grad_(), torch.arange(4)
    (got,) = torch.autograd.grad(hc.arcface_loss(z, w, y, temperature=1.0), z)
    wide = z.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(hc.arcface_loss(wide, w.double(), y, temperature=1.0), wide)
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_a_temperature_of_half_precision_is_no_coarser(name):
    """What is made of it, as m/τ is, is not rounded to its dtype."""
    z, w, y = torch.randn(6, 4), torch.randn(3, 4), torch.arange(6) % 3
    tau = torch.tensor(0.07, dtype=torch.bfloat16, requires_grad=True)
    loss = call(name, z, w, y, temperature=tau)
    assert torch.equal(loss, call(name, z, w, y, temperature=tau.detach().float()))
    assert torch.autograd.grad(loss, tau)[0].dtype == torch.bfloat16


def test_ldam_margins():
    got = hc.ldam_margins(torch.tensor([16, 1, 81, 1]), max_margin=0.6)
    assert torch.allclose(got, torch.tensor([0.3, 0.6, 0.2, 0.6]))
    assert got.dtype == torch.float32


# Edges, for all


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("name", LOSSES)
def test_edges(name, backend):
    """Nothing in the batch, nothing that counts, one sample, one class, zero vectors, tiny temperatures: finite."""
    for n, k, labels in [(0, 3, None), (4, 3, -100), (1, 3, None), (5, 1, None), (5, 3, 1)]:
        z, w = leaf(n, 4, dtype=torch.float32), leaf(k, 4, dtype=torch.float32)
        y = torch.arange(n) % k if labels is None else torch.full((n,), labels)
        loss, *grads = results(call(name, z, w, y, backend, temperature=0.01), (z, w))
        assert all(torch.isfinite(x).all() for x in (loss, *grads))
        assert loss >= 0
        if n == 0 or labels == -100:
            assert loss == 0
            assert all((x == 0).all() for x in grads)
    z, w, y = torch.randn(6, 4), leaf(3, 4, dtype=torch.float32), torch.arange(6) % 3
    z[2] = 0
    loss, grad, _ = results(call(name, z.requires_grad_(), w, y, backend), (z, w))
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()
    assert (grad[2] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    z, w, y = leaf(8, 3), leaf(4, 3), torch.tensor([0, 0, 2, 2, 2, 1, 0, -100])
    tau = torch.tensor([[0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, w, tau: call(name, z, w, y, temperature=tau), (z, w, tau))


@pytest.mark.parametrize("name", [*LOSSES, "dcl"])
def test_compiles_whole(name):
    z, w, y = leaf(20, 2, 8, dtype=torch.float32), leaf(5, 8, dtype=torch.float32), torch.arange(20) % 5

    given = {} if name == "dcl" else LOSSES[name][1](5)

    def step(z, w):
        if name == "dcl":
            return hc.dcl_loss(z, backend="blockwise")
        return getattr(hc, LOSSES[name][0])(z[:, 0], w, y, backend="blockwise", temperature=0.1, **given)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = (z,) if name == "dcl" else (z, w)
    for got, want in zip(*(torch.autograd.grad(fn(z, w), leaves) for fn in (compiled, step)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("name", [*LOSSES, "dcl"])
def test_autocast_changes_nothing(name, backend):
    z, w, y = torch.randn(20, 2, 8), torch.randn(5, 8), torch.arange(20) % 5

    def value():
        if name == "dcl":
            return hc.dcl_loss(z, backend=backend)
        return call(name, z[:, 0], w, y, backend=backend)

    with torch.autocast("cpu", torch.bfloat16):
        inside = value()
    assert torch.equal(inside, value())


MODULES = {
    "cosface_loss": (hc.CosFaceLoss, {"margin": margins(5)}),
    "arcface_loss": (hc.ArcFaceLoss, {"margin": 0.3}),
    "logit_adjusted_loss": (hc.LogitAdjustedLoss, {"bias": biases(5).float()}),
    "proxy_anchor_loss": (hc.ProxyAnchorLoss, {"margin": 0.2, "normalize": False}),
    "dcl_loss": (hc.DCLLoss, {"reduction": "sum"}),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_equals_function(name):
    """By default and with options; tensors among them move with the module and are in no checkpoint."""
    kind, options = MODULES[name]
    z, w, y = torch.randn(20, 2, 8), torch.randn(5, 8), torch.arange(20) % 5
    given = (z,) if name == "dcl_loss" else (z[:, 0], w, y)
    needed = {"bias": options["bias"]} if "bias" in options else {}
    for held in (needed, {**options, "temperature": 0.2}):
        assert torch.equal(kind(**held)(*given), getattr(hc, name)(*given, **held))
    assert not kind(**options).state_dict()
    tensors = [x for x in kind(**options).double().buffers()]
    assert all(x.dtype == torch.float64 for x in tensors)
    assert len(tensors) == sum(isinstance(x, torch.Tensor) for x in options.values())


# Decoupled contrastive


@pytest.mark.parametrize("tau", [0.1, 0.01])
@pytest.mark.parametrize("learned", [False, True])
def test_dcl_equals_its_specification(tau, learned, regime):
    z = leaf(23, 2, 5)
    temperature = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    for reduction, normalize in itertools.product(("mean", "sum", "none"), (True, False)):
        options = {"temperature": temperature if learned else tau, "reduction": reduction, "normalize": normalize}
        leaves = (z, temperature) if learned else (z,)
        upstream = torch.rand(23, 2) if reduction == "none" else torch.ones(())
        got, want = (
            results(hc.dcl_loss(z, backend=b, **options), leaves, upstream) for b in ("blockwise", "reference")
        )
        assert_equal(got, want)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_dcl_edges(backend):
    same = torch.ones(6, 2, 3, dtype=torch.float64)
    assert hc.dcl_loss(same, backend=backend).item() == pytest.approx(math.log(10), abs=1e-12)
    nothing = leaf(0, 2, 3, dtype=torch.float32)
    loss, grad = results(hc.dcl_loss(nothing, backend=backend), (nothing,))
    assert loss == 0
    assert grad.shape == (0, 2, 3)
    one = leaf(1, 2, 3)
    loss, grad = results(hc.dcl_loss(one, temperature=0.2, backend=backend), (one,))
    assert loss.item() == pytest.approx(-torch.cosine_similarity(*one[0], dim=0).item() / 0.2, abs=1e-12)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_dcl_stays_on_the_features_device(backend):
    z = torch.randn(6, 2, 3)
    want = hc.dcl_loss(z, backend=backend)
    with torch.device("meta"):  # where tensors go of which nobody says where
        assert torch.allclose(hc.dcl_loss(z, backend=backend), want)


def test_dcl_gradcheck():
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, tau: hc.dcl_loss(z, temperature=tau), (leaf(5, 2, 3), tau))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tau", "spread"), [(0.1, 1.0), (0.01, 1.0), (0.1, 0.01), (0.01, 0.0)])
def test_dcl_rounds_no_more_than_eager(dtype, tau, spread):
    """Far from collapse, near it and at it, where the positive was ever so near to the sum it is left out of."""
    centre = torch.randn(40, 1, 16)
    z = (centre + spread * torch.randn(40, 2, 16)).to(dtype).requires_grad_()
    truth, eager = (
        results(hc.dcl_loss(x, temperature=tau, backend="reference"), (x,))
        for x in (z.detach().double().requires_grad_(), z)
    )
    actual = results(hc.dcl_loss(z, temperature=tau), (z,))
    units = (1 / tau, 80**0.5 / (80 * tau))

    def rows(values):
        return [values[0], *(x.flatten(0, 1) for x in values[1:])]

    assert error_over_bound(*map(rows, (actual, truth, eager)), rows([None, z])[1:], units, temperature=tau) <= 1


# Global batch

SPLITS = {2: [(9, 4), (5, 0), (0, 0)], 3: [(3, 8, 0)]}


def step_of(name, z, w, y, upstream, group):
    """Loss, and gradients as DDP averages them, of leaves, a learned temperature too; with "none" of any upstream."""
    world = 1 if group is None else torch.distributed.get_world_size()
    found = []
    for reduction, tau in (("mean", 0.1), ("mean", 0.01), ("sum", 0.01), ("none", 0.1)):
        if name == "proxy-anchor" and reduction != "mean":
            continue
        leaves = [x.clone().requires_grad_() for x in (z, w, torch.tensor(tau, dtype=z.dtype))]
        options = {"temperature": leaves[2] if tau == 0.01 else tau, "group": group}
        if name != "proxy-anchor":
            options["reduction"] = reduction
        if name == "dcl":
            loss = hc.dcl_loss(leaves[0], **options)
        else:
            loss = call(name, leaves[0][:, 0], leaves[1], y, **options)
        each = upstream if name == "dcl" else upstream[:, 0]
        objective = world * (loss * each).sum() if reduction == "none" else loss
        grads = torch.autograd.grad(objective, leaves, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
        found.append((reduction, loss.detach(), grads))
    return found


def errors_over_ranks(rank, world):
    worst = {}
    for sizes, name in itertools.product(SPLITS[world], [*LOSSES, "dcl"]):
        g = torch.Generator().manual_seed(2)
        z, upstream = (torch.randn(sum(sizes), 2, n, generator=g, dtype=torch.float64) for n in (5, 1))
        w, y = torch.randn(6, 5, generator=g, dtype=torch.float64), torch.arange(sum(sizes)) * 2 % 5
        y[::4] = -100
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        upstream = upstream[..., 0]
        got = step_of(name, z[mine], w, y[mine], upstream[mine], "auto")
        want = step_of(name, z, w, y, upstream, None)
        for (reduction, loss, grads), (_, whole, expected) in zip(got, want, strict=True):
            whole = whole[mine] if reduction == "none" else whole
            for x in grads[1:]:
                torch.distributed.all_reduce(x)
            pairs = [(loss, whole), (grads[0] / world, expected[0][mine])]
            pairs += [(x / world, e) for x, e in zip(grads[1:], expected[1:], strict=True)]
            error = max(((a - b).norm() / b.norm().clamp(min=1)).item() for a, b in pairs)
            worst[name, sizes] = max(worst.get((name, sizes), 0.0), error)
    return worst


@pytest.mark.parametrize("world", SPLITS)
def test_ranks_equal_one_process(world, tmp_path):
    """Uneven ranks, one without samples, all without."""
    for worst in ranks.spawn(errors_over_ranks, world, tmp_path):
        assert len(worst) == len(SPLITS[world]) * 6
        assert all(error <= 1e-12 for error in worst.values()), worst


def differing_calls(rank, world):
    """What every rank is told where their calls differ, or one alone is wrong."""
    z, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
    said = []
    for call_ in (
        lambda: hc.cosface_loss(z, w, y, margin=0.1 * (1 + rank)),
        lambda: hc.cosface_loss(z, w, y, margin=-0.1 if rank else 0.1),
        lambda: hc.dcl_loss(torch.randn(4, 2 + rank, 3)),
        lambda: hc.arcface_loss(z, w, y) if rank else hc.cosface_loss(z, w, y),
        lambda: hc.cosface_loss(z, w, y, margin=torch.full((5,), 0.1 + 0.1 * rank)),
        lambda: hc.logit_adjusted_loss(z, w, y, torch.arange(5.0) - rank),
        lambda: hc.normface_loss(z, w, y, weight=torch.arange(5.0) + rank),
        lambda: hc.normface_loss(z, w, y, temperature=torch.tensor([0.1 + 0.1 * rank])),
        lambda: hc.dcl_loss(torch.randn(4, 2, 3), temperature=0.1 + 0.1 * rank),
        # What is no difference: a number's last bits, a tensor's dtype and strides, the shape of a learned temperature.
        lambda: hc.cosface_loss(z, w, y, margin=0.3 if rank else 0.1 + 0.2),
        lambda: hc.normface_loss(z, w, y, weight=torch.ones(()).expand(5) if rank else torch.ones(5).double()),
        lambda: hc.normface_loss(z, w, y, temperature=torch.ones(1) if rank else torch.ones(())),
    ):
        try:
            call_()
            said.append("nothing")
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_ranks_compare_their_calls(tmp_path):
    for said in ranks.spawn(differing_calls, 2, tmp_path):
        assert "margin 0.1" in said[0]
        assert "margin 0.2" in said[0]
        assert "margin must be finite and not negative, got -0.1" in said[1]
        assert "features must have shape [B, 2, D], got [4, 3, 3]" in said[2]
        assert "arcface_loss" in said[3]
        for words, kind in zip(said[4:7], ("margin", "bias", "weight"), strict=True):
            assert len(set(re.findall(rf"{kind} tensor \[5\] with checksum (\w{{8}})", words))) == 2, words
        assert "temperature tensor of 0.1" in said[7]
        assert "temperature tensor of 0.2" in said[7]
        assert "temperature 0.2," in said[8]
        assert said[9:] == ["nothing"] * 3


# Memory


def peak_mib(name):
    """Of one step beyond its inputs, in a fresh process."""
    m, k, d = 16384, 2000, 64
    z, w, y = leaf(m // 2, 2, d, dtype=torch.float32), leaf(k, d, dtype=torch.float32), torch.arange(m) % k

    def step():
        if name == "dcl":
            return hc.dcl_loss(z).backward()
        return call(name, z.view(m, d), w, y).backward()

    def kib(file, field):
        return int(Path(file).read_text().split(f"{field}:")[1].split()[0])

    step()  # what is allocated once
    hc.set_memory_budget(hc.memory_budget())
    z.grad = w.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = kib("/proc/self/status", "VmRSS")
    step()
    return (kib("/proc/self/status", "VmHWM") - before) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "limit"),
    [("cosface", 30), ("proxy-anchor", 30), ("logit-adjusted", 60), pytest.param("dcl", 60, marks=pytest.mark.slow)],
)
def test_peak_is_linear(name, limit):
    """All logits would be 125 MiB, DCL's 1 GiB. What is there is gradients and a few tiles, with a bias copies too."""
    before = hc.memory_budget()
    hc.set_memory_budget(0)
    try:
        assert in_fresh_process(peak_mib, name) < limit
    finally:
        hc.set_memory_budget(before)


# Triton: on a GPU when there is one, else in the interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [*LOSSES, "dcl"])
def test_triton_equals_blockwise(name, dtype):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    z, w = (torch.randn(*s, device=device).to(dtype).requires_grad_() for s in ((40, 2, 20), (9, 20)))
    y = (torch.arange(40, device=device) * 2 % 7).masked_fill(torch.arange(40, device=device) % 6 == 0, -100)
    tau = torch.tensor(0.1, device=device, requires_grad=True)
    leaves = (z, tau) if name == "dcl" else (z, w, tau)
    for temperature in (tau, 0.1, 0.01):
        found = []
        for backend in ("triton", "blockwise"):
            if name == "dcl":
                loss = hc.dcl_loss(z, temperature=temperature, backend=backend)
            else:
                moved = {k: v.to(device) for k, v in LOSSES[name][1](9).items() if isinstance(v, torch.Tensor)}
                loss = call(name, z[:, 0], w, y, backend, temperature=temperature, **moved)
            given = leaves if temperature is tau else leaves[:-1]
            found.append([loss, *torch.autograd.grad(loss, given)])
        for got, want in zip(*found, strict=True):
            exact = 2e-4 if got.dtype == torch.float32 else 4e-3
            torch.testing.assert_close(got, want, rtol=exact, atol=exact * max(want.abs().max().item(), 1e-2))


def test_resolved_backends_are_used(monkeypatch):
    """Each loss asks for the backend it was given."""
    z, w, y = torch.randn(6, 2, 4), torch.randn(3, 4), torch.arange(6) % 3
    asked = []
    plain = _ops.lse
    monkeypatch.setattr(_ops, "lse", lambda *args: asked.append(args[-1]) or plain(*args))
    for name in LOSSES:
        call(name, z[:, 0], w, y, "blockwise")
    hc.dcl_loss(z, backend="blockwise")
    assert asked == ["blockwise"] * (len(LOSSES) + 2)


Z, W, Y, V = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 0, 1, 1]), torch.randn(4, 2, 3)
BAD = {
    "negative margin": (ValueError, "margin must be finite and not negative, got -0.1", lambda: hc.cosface_loss(Z, W, Y, margin=-0.1)),
    "margin NaN": (ValueError, "margin must be finite and not negative, got nan", lambda: hc.proxy_anchor_loss(Z, W, Y, margin=math.nan)),
    "margin of text": (TypeError, "margin must be a number", lambda: hc.cosface_loss(Z, W, Y, margin="0.1")),
    "margins of another length": (ValueError, r"margin must have shape \[2\], one class each, got \[3\]", lambda: hc.cosface_loss(Z, W, Y, margin=torch.ones(3))),
    "margins of integers": (TypeError, "margin must be a floating-point tensor, got torch.int64", lambda: hc.cosface_loss(Z, W, Y, margin=torch.ones(2).long())),
    "a negative one of them": (ValueError, "margin must be finite and not negative, got -1.0 for class 1", lambda: hc.cosface_loss(Z, W, Y, margin=torch.tensor([1.0, -1.0]))),
    "margins to learn": (ValueError, "margin must not require a gradient", lambda: hc.cosface_loss(Z, W, Y, margin=torch.ones(2, requires_grad=True))),
    "an angle of π": (ValueError, r"margin must lie in \[0, π\), got 3.2", lambda: hc.arcface_loss(Z, W, Y, margin=3.2)),
    "angles": (TypeError, "margin must be a number, got Tensor", lambda: hc.arcface_loss(Z, W, Y, margin=torch.ones(2))),
    "margins of Proxy-Anchor": (TypeError, "margin must be a number, got Tensor", lambda: hc.proxy_anchor_loss(Z, W, Y, margin=torch.ones(2))),
    "no tensor of biases": (TypeError, "bias must be a tensor, got list", lambda: hc.logit_adjusted_loss(Z, W, Y, [0.0, 1.0])),
    "too many biases": (ValueError, r"bias must have shape \[2\]", lambda: hc.logit_adjusted_loss(Z, W, Y, torch.ones(3))),
    "a class without samples": (ValueError, "bias must be finite, got -inf for class 1", lambda: hc.logit_adjusted_loss(Z, W, Y, torch.tensor([1.0, 0.0]).log())),
    "labels out of range": (ValueError, r"labels must lie in \[0, 2\), got 6", lambda: hc.cosface_loss(Z, W, Y + 6)),
    "NaN": (ValueError, "features must have finite norms", lambda: hc.arcface_loss(Z * math.nan, W, Y)),
    "NaN with a bias": (ValueError, "features must have finite norms", lambda: hc.logit_adjusted_loss(Z * math.inf, W, Y, torch.ones(2))),
    "too long with a bias": (ValueError, "features must have finite norms, got inf in row 0", lambda: hc.logit_adjusted_loss(Z * 1e30, W, Y, torch.ones(2))),
    "temperature": (ValueError, "temperature must be positive", lambda: hc.proxy_anchor_loss(Z, W, Y, temperature=0)),
    "weights": (ValueError, "weight must be finite and not negative", lambda: hc.arcface_loss(Z, W, Y, weight=torch.tensor([1.0, -1.0]))),
    "counts of nothing": (ValueError, "counts must be positive and finite, got 0 for class 1", lambda: hc.ldam_margins(torch.tensor([3, 0]))),
    "a list of counts": (TypeError, "counts must be a tensor, got list", lambda: hc.ldam_margins([3, 4])),
    "counts of pairs": (ValueError, r"counts must have shape \[K\], one class each", lambda: hc.ldam_margins(torch.ones(2, 2))),
    "no largest margin": (ValueError, "max_margin must be positive and finite, got 0", lambda: hc.ldam_margins(torch.ones(2), 0)),
    "a largest margin of text": (TypeError, "max_margin must be a number, got str", lambda: hc.ldam_margins(torch.ones(2), "a")),
    "one view": (ValueError, r"features must have shape \[B, 2, D\], got \[4, 3\]", lambda: hc.dcl_loss(Z)),
    "three views": (ValueError, r"features must have shape \[B, 2, D\], got \[4, 3, 3\]", lambda: hc.dcl_loss(torch.randn(4, 3, 3))),
    "views of integers": (TypeError, "features must be float32", lambda: hc.dcl_loss(V.long())),
    "no views": (TypeError, "features must be a tensor", lambda: hc.dcl_loss([1.0])),
    "NaN views": (ValueError, "must have finite norms", lambda: hc.dcl_loss(V * math.nan)),
    "views too long": (ValueError, "features must have finite norms, got inf in row 0", lambda: hc.dcl_loss(V * 1e30, backend="reference")),
    "DCL's reduction": (ValueError, "reduction must be one of", lambda: hc.dcl_loss(V, reduction="avg")),
    "DCL's temperature": (ValueError, "temperature must be positive", lambda: hc.dcl_loss(V, temperature=-1.0)),
    "DCL's backend": (ValueError, "backend must be one of", lambda: hc.dcl_loss(V, backend="cuda")),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    kind, message, call_ = BAD[case]
    with pytest.raises(kind, match=message):
        call_()
