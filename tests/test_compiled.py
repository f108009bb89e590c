"""Losses in one call of the extension: what takes that way, what it leaves out, and the memory it uses again.

How exact they are is judged where all ways through the blockwise backend are: `oracle.REGIMES`.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from oracle import LOSSES

import hypercontrast as hc
from hypercontrast import _extension, compiled, functional

pytestmark = pytest.mark.skipif(_extension.quietly() is None, reason="the C++ extension is not built")

CALLS = {name: partial(getattr(functional, function), **options) for name, (function, options) in LOSSES.items()}


def problem(n=300, k=37, d=48):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, k // 2, (n,), generator=g)  # half the classes are absent
    y[::9] = -100
    return torch.randn(n, d, generator=g), torch.randn(k, d, generator=g), y


@pytest.fixture
def taken(monkeypatch):
    """Names of the calls that went to the extension."""
    names = []
    for name in ("prototype_loss", "pair_loss"):
        original = getattr(compiled, name)

        def spy(*args, name=name, original=original, **options):
            names.append(name)
            return original(*args, **options)

        monkeypatch.setattr(compiled, name, spy)
    return names


@pytest.mark.parametrize("name", CALLS)
def test_what_is_computed_there(name, taken):
    z, w, y = problem()
    CALLS[name](z, w, y)
    CALLS[name](z, w, y, reduction="sum", temperature=1 / 64, weight=torch.rand(len(w)))
    CALLS[name](z.T.contiguous().T, w, y)
    CALLS[name](z, w, y, temperature=torch.tensor([0.1]))
    assert taken == ["prototype_loss"] * 4
    for inputs, options in [
        ((z, w, y), {"reduction": "none"}),
        ((z, w, y), {"temperature": 0.01}),
        ((z, w, y), {"temperature": torch.tensor(0.01)}),
        ((z, w, y), {"normalize": False}),
        ((z.double(), w.double(), y), {}),
        ((z.bfloat16(), w, y), {}),
        ((z, w.bfloat16(), y), {}),
    ]:
        CALLS[name](*inputs, **options)
    assert len(taken) == 4


@pytest.mark.parametrize("name", CALLS)
def test_only_the_ratios_of_class_weights_matter(name):
    """Those of 1e-21 times exp(-64) are below float32, in which exponentials are weighed."""
    _, w, y = problem()
    z, weight = w[y.clamp(min=0)], torch.rand(len(w))

    def gradients(weight):
        leaves = z.clone().requires_grad_(), w.clone().requires_grad_()
        loss = CALLS[name](*leaves, y, temperature=1 / 64, weight=weight)
        return torch.autograd.grad(loss, leaves)

    for small, want in zip(gradients(2.0**-70 * weight), gradients(weight), strict=True):
        assert torch.equal(small, want)


@pytest.mark.parametrize("name", ["ntce", "supcon"])
@pytest.mark.parametrize("d", [257, 600])
def test_norms_of_several_parts(name, d, taken):
    """Wide vectors, whose last element is the longest."""
    z, w, y = problem(n=40, k=8, d=d)
    z, w = (torch.cat([x[:, :-1], 9 + x[:, -1:]], 1) for x in (z, w))
    loss = CALLS.get(name, lambda z, _, y: hc.supcon_loss(z, y))
    torch.testing.assert_close(loss(z, w, y).double(), loss(z.double(), w.double(), y).double(), rtol=2e-6, atol=0)
    assert len(taken) == 1


def test_what_is_computed_there_of_pairs(taken):
    z, _, y = problem()
    hc.supcon_loss(z, y)
    hc.supcon_loss(z, y, base_temperature=0.07, singletons="zero", reduction="sum")
    hc.supcon_loss(z, y, temperature=torch.tensor([0.1]), base_temperature=0.07)
    assert taken == ["pair_loss"] * 3
    for options in ({"variant": "in"}, {"reduction": "none"}, {"temperature": 0.01}, {"queue": (z[:9], y[:9])}):
        hc.supcon_loss(z, y, **options)
    assert len(taken) == 3


BUDGETS = {"none kept": 0, "some kept": 10_000, "all kept": 1 << 20}


@pytest.fixture(params=BUDGETS)
def _budget(request, monkeypatch):
    """In bytes; tiles have 64 samples."""
    monkeypatch.setattr("hypercontrast.blockwise._budget_bytes", BUDGETS[request.param])
    monkeypatch.setattr("hypercontrast.blockwise.TILE_ELEMENTS", 64 * 48)
    monkeypatch.setattr("hypercontrast.blockwise.MIN_BLOCK", 1)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("_budget")
def test_a_gradient_alone_is_that_of_both(name):
    z, w, y = problem()
    both = [x.clone().requires_grad_() for x in (z, w)]
    together = torch.autograd.grad(CALLS[name](*both, y), both)
    for i in range(2):
        leaves = [z.clone(), w.clone()]
        leaves[i].requires_grad_()
        (alone,) = torch.autograd.grad(CALLS[name](*leaves, y), leaves[i])
        assert torch.equal(alone, together[i])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("tau", [0.3, 1 / 64])
def test_a_learned_temperature(name, tau, taken):
    z, w, y = problem()

    def gradients(dtype, wanted):
        leaves = [x.to(dtype) for x in (z, w, torch.tensor(tau))]
        for i in wanted:
            leaves[i].requires_grad_()
        loss = CALLS[name](*leaves[:2], y, temperature=leaves[2])
        return torch.autograd.grad(loss, [leaves[i] for i in wanted])

    of_all = gradients(torch.float32, (0, 1, 2))
    for got, want in zip(of_all, gradients(torch.float64, (0, 1, 2)), strict=True):
        assert (got - want).norm() <= 2e-6 * want.norm()
    assert torch.equal(gradients(torch.float32, (2,))[0], of_all[2]), "alone it is the same"
    assert len(taken) == 2


@pytest.mark.parametrize("edge", [64, 1024])  # several tiles, or one
@pytest.mark.parametrize("base_temperature", [None, 0.07])
@pytest.mark.parametrize("tau", [0.3, 1 / 64])
def test_a_learned_temperature_of_pairs(tau, base_temperature, edge, taken, monkeypatch):
    monkeypatch.setattr("hypercontrast.blockwise_pairs.EDGE", edge)
    z, _, y = problem()

    def gradients(dtype, wanted, backend="auto"):
        leaves = [x.to(dtype) for x in (z, torch.tensor(tau))]
        for i in wanted:
            leaves[i].requires_grad_()
        options = {"temperature": leaves[1], "base_temperature": base_temperature, "backend": backend}
        loss = hc.supcon_loss(leaves[0], y, **options)
        return torch.autograd.grad(loss, [leaves[i] for i in wanted]), loss.item()

    of_all, _ = gradients(torch.float32, (0, 1))
    (eager, _), (exact, loss) = gradients(torch.float32, (0, 1), "reference"), gradients(torch.float64, (0, 1))
    # With a base temperature τ's gradient is the difference of two terms, one of which is loss/τ.
    rounding = torch.finfo(torch.float32).eps * torch.tensor([8 * exact[0].norm(), abs(loss) / tau])
    for got, other, want, unit in zip(of_all, eager, exact, rounding, strict=True):
        assert (got - want).norm() <= 2 * (other - want).norm() + unit
    assert torch.equal(gradients(torch.float32, (1,))[0][0], of_all[1]), "alone it is the same"
    assert len(taken) == 2


@pytest.mark.parametrize("name", CALLS)
def test_a_learned_temperature_of_a_compiled_loss(name):
    """A compiler does not know its value, so the loss goes another way."""
    z, w, y = problem()
    tau = torch.tensor(0.2, requires_grad=True)
    found = []
    for call in (CALLS[name], torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")):
        loss = call(z, w, y, temperature=tau)
        found.append((loss, *torch.autograd.grad(loss, tau)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", [*CALLS, "supcon"])
@pytest.mark.usefixtures("_budget")
def test_a_graph_walked_again(name):
    z, w, y = problem()
    leaves = [x.clone().requires_grad_() for x in ((z, w) if name in CALLS else (z,))]
    loss = CALLS.get(name, hc.supcon_loss)(*leaves, y)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for again in (torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(loss, leaves)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # The loss's own gradient is a factor, here a power of two.
    loss = 4 * CALLS.get(name, hc.supcon_loss)(*leaves, y)
    assert all(torch.equal(4 * a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))


@pytest.mark.parametrize("name", [*CALLS, "supcon"])
def test_results_in_use_are_nobody_elses_memory(name):
    """Memory waits for the next step: not that of a gradient somebody holds, nor of a graph not walked yet."""
    z, w, y = problem()

    def step(scale):
        leaves = [(scale * x).requires_grad_() for x in ((z, w) if name in CALLS else (z,))]
        return leaves, CALLS.get(name, hc.supcon_loss)(*leaves, y)

    leaves, loss = step(1)
    want = [x.clone() for x in torch.autograd.grad(loss, leaves)]
    leaves, loss = step(1)
    held = None
    for _ in range(4):
        others, other_loss = step(3)  # other numbers
        if held is None:
            held = torch.autograd.grad(loss, leaves)
        torch.autograd.grad(other_loss, others)
        assert all(torch.equal(a, b) for a, b in zip(held, want, strict=True))


def test_threads_do_not_share():
    z, w, y = problem()

    def gradients(seed):
        g = torch.Generator().manual_seed(seed)
        leaves = [x[torch.randperm(len(x), generator=g)].clone().requires_grad_() for x in (z, w)]
        return torch.autograd.grad(hc.ntce_loss(*leaves, y), leaves)

    want = [gradients(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, expected in zip(pool.map(gradients, range(8)), want, strict=True):
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(
                        a, b, rtol=1e-4, atol=1e-7
                    )  # in a thread of its own sums may have one part


def test_bad_values_are_named():
    z, w, y = problem()
    y[5] = 37
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 37\), got 37"):
        hc.ntce_loss(z, w, y)
    y[5] = 0
    for bad, text in ((torch.nan, "nan"), (torch.inf, "inf"), (2e19, "inf")):
        for which, name in enumerate(("features", "prototypes")):
            leaves = [z.clone(), w.clone()]
            leaves[which][3, 7] = bad
            with pytest.raises(ValueError, match=f"{name} must have finite norms, got {text} in row 3"):
                hc.nonl_loss(*leaves, y)
    z[3, 7] = torch.nan
    with pytest.raises(ValueError, match="features must have finite norms, got nan in row 3"):
        hc.supcon_loss(z, y)


@pytest.mark.parametrize("name", [*CALLS, "supcon"])
def test_autocast_changes_nothing(name):
    z, w, y = problem()

    def step():
        leaves = [x.clone().requires_grad_() for x in ((z, w) if name in CALLS else (z,))]
        loss = CALLS.get(name, hc.supcon_loss)(*leaves, y)
        return [loss, *torch.autograd.grad(loss, leaves)]

    plain = step()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(step(), plain, strict=True))
