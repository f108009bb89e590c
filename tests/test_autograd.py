"""What autograd does with a loss: checkpoints and hooks, threads, upstream gradients that are absent or tiny, transforms."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from oracle import (
    LOSSES,
    REGIMES,
    loss_and_gradients,
    near_collapse,
    prototype_error_over_bound,
    set_regime,
    truth_and_eager,
)
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import hypercontrast as hc
from hypercontrast import functional

CALLS = {name: partial(getattr(functional, function), **options) for name, (function, options) in LOSSES.items()}
CALLS["supcon"] = lambda z, w, y, **options: hc.supcon_loss(z, y, **options)
LEAST_FIXED = 1 / 64  # the temperature below which exponentials are shifted


def problem(n=60, k=9, d=12):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, k, (n,), generator=g)
    return torch.randn(n, d, generator=g), torch.randn(k, d, generator=g), labels


def gradients(loss, *leaves, **options):
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True, **options)


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    set_regime(request.param, monkeypatch)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_inside_a_checkpoint(regime, name, reduction):
    z, w, y = problem()
    leaves = z.requires_grad_(), w.requires_grad_(), torch.tensor(0.2, requires_grad=True)

    def loss(z, w, tau):
        return CALLS[name](1 * z, w, y, temperature=tau, reduction=reduction).sum()

    expected = gradients(loss(*leaves), *leaves)
    for reentrant in (False, True):
        for leaf in leaves:
            leaf.grad = None
        checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_what_is_saved_is_unpacked_once(name):
    z, w, y = problem()
    count = {"packed": 0, "unpacked": 0}

    def counted(what, x):
        count[what] += 1
        return x

    with torch.autograd.graph.saved_tensors_hooks(partial(counted, "packed"), partial(counted, "unpacked")):
        loss = CALLS[name](z.requires_grad_(), w, y)
    loss.backward()
    assert count["packed"] == count["unpacked"] > 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_no_upstream_gradient(regime, name, reduction):
    """A function that hands on None says that its input has none."""

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    z, w, y = problem()
    leaves = z.requires_grad_(), w.requires_grad_(), torch.tensor(0.2, requires_grad=True)
    loss = CALLS[name](*leaves[:2], y, temperature=leaves[2], reduction=reduction)
    assert all((grad == 0).all() for grad in gradients(Drop.apply(loss).sum(), *leaves))


@pytest.mark.parametrize("name", CALLS)
def test_threads_that_walk_one_graph(regime, name):
    """What the forward kept is as it was for everyone."""
    z, w, y = problem(n=500, k=60, d=32)
    leaves = z.requires_grad_(), w.requires_grad_()
    loss = CALLS[name](*leaves, y)
    alone = gradients(loss, *leaves, retain_graph=True)
    with ThreadPoolExecutor(4) as pool:
        walks = [pool.submit(gradients, loss, *leaves, retain_graph=True) for _ in range(16)]
        together = [walk.result() for walk in walks]
    together.append(gradients(loss, *leaves))
    assert all(torch.equal(a, b) for grads in together for a, b in zip(grads, alone, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_many_upstream_gradients_at_once(regime, name, reduction):
    """As for a Jacobian: torch hands a batch of them to one backward."""
    z, w, y = problem()
    leaves = z.requires_grad_(), w.requires_grad_(), torch.tensor(0.2, requires_grad=True)
    loss = CALLS[name](*leaves[:2], y, temperature=leaves[2], reduction=reduction)
    many = torch.randn(3, *loss.shape)
    batched = gradients(loss, *leaves, grad_outputs=many, is_grads_batched=True, retain_graph=True)
    alone = [gradients(loss, *leaves, grad_outputs=one, retain_graph=True) for one in many]
    for got, want in zip(batched, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got.expand(3, *want[0].shape), torch.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_a_tiny_upstream_gradient(name):
    """Scales the gradient and nothing else: in the weights of exponentials of up to e^64 it would underflow."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 20, (256,), generator=g)
    z, w = (x.float().requires_grad_() for x in near_collapse(y, 20, 32, 0.03, g))
    for scale in (2.0**-30, 2.0**-60):
        loss = CALLS[name](z, w, y, temperature=LEAST_FIXED)
        expected = gradients(loss, z, w, retain_graph=True)
        for grad, want in zip(gradients(scale * loss, z, w), expected, strict=True):
            # Exactly, but for numbers that are themselves too small for float32.
            assert ((grad / scale - want).abs() <= torch.finfo(torch.float32).smallest_normal / scale).all()


@pytest.mark.parametrize("name", LOSSES)
def test_short_vectors(regime, name):
    """Of lengths that are still a direction, with weights as large as a temperature of 1/64 makes them."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(8) % 2
    w = torch.randn(1, 3, generator=g) * torch.tensor([[1.0], [-1.0]])
    z = w[y] + 0.01 * torch.randn(8, 3, generator=g)
    options = {"temperature": LEAST_FIXED}
    for lengths in ((1, 1e-10), (2e-12, 1)):
        scaled = (length * x / x.norm(dim=1, keepdim=True) for x, length in zip((z, w), lengths, strict=True))
        tensors = (*(x.requires_grad_() for x in scaled), y)
        actual = loss_and_gradients(CALLS[name], *tensors, **options)
        truth, eager = truth_and_eager(name, *tensors, **options)
        assert prototype_error_over_bound(actual, truth, eager, tensors, **options) <= 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_no_derivative_is_not_a_derivative_of_zero(regime, name, reduction):
    z, w, y = problem()

    def loss(z):
        return CALLS[name](z, w, y, reduction=reduction).sum()

    def loss_of(tau):
        return CALLS[name](z, w, y, temperature=tau, reduction=reduction).sum()

    for transformed in (
        lambda: torch.func.jvp(loss, (z,), (z,)),
        lambda: torch.func.grad(loss)(z),
        lambda: torch.func.jacfwd(loss_of)(torch.tensor(0.3)),
    ):
        with pytest.raises(NotImplementedError, match="need backend='reference'"):
            transformed()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="need backend='reference'"):
        loss(forward_ad.make_dual(z, torch.ones_like(z)))
    with forward_ad.dual_level():
        assert torch.isfinite(loss(z))  # nobody asks for a derivative


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_that_is_negated_later(name):
    """What reads its memory would find it as it was before; a backward reads more of it than a forward."""
    z, w, y = problem()

    def outcome(negated):
        leaves = z.clone().requires_grad_(), w.clone().requires_grad_()
        loss = CALLS[name](*map(negated, leaves), y)
        return loss.detach(), *gradients(loss, *leaves)

    for got, want in zip(outcome(torch._neg_view), outcome(torch.neg), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_can_be_resized(name):
    z, w, y = problem()
    CALLS[name](z.requires_grad_(), w, y).backward()
    before = z.grad.clone()
    z.grad.resize_(2 * len(z), z.shape[1])
    assert torch.equal(z.grad[: len(z)], before)
    z.grad.untyped_storage().resize_(0)
