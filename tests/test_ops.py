"""The registered operators: opcheck, gradcheck in float64, torch.compile without graph breaks, saved memory."""

import pytest
import torch
from oracle import LOSSES

import hypercontrast as hc
from hypercontrast import _ops, functional

NAMES = list(LOSSES)


def lse_arguments(rows, cols, exclude_own, *, inv_temperature=5.0, temperature=None, keep_bytes=0, ignored=True):
    torch.manual_seed(0)
    features, prototypes = torch.randn(7, 4).double().requires_grad_(), torch.randn(5, 4).double().requires_grad_()
    labels = torch.tensor([0, 1, 1, 3, -100 if ignored else 0, 0, 3])
    counts = torch.bincount(labels[labels >= 0], minlength=5) if rows else None
    return (
        features, prototypes, labels, counts, temperature, inv_temperature, -100, rows, cols, exclude_own, True,
        keep_bytes, "blockwise",
    )  # fmt: skip


@pytest.mark.parametrize("exclude_own", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
@pytest.mark.parametrize("inv_temperature", [5.0, 100.0])
def test_opcheck_lse(rows, cols, exclude_own, keep_bytes, inv_temperature):
    arguments = lse_arguments(rows, cols, exclude_own, keep_bytes=keep_bytes, inv_temperature=inv_temperature)
    torch.library.opcheck(_ops.lse, arguments)


def test_opcheck_lse_learned_temperature():
    temperature = torch.tensor(0.2).double().requires_grad_()
    torch.library.opcheck(_ops.lse, lse_arguments(True, False, True, temperature=temperature))


def test_opcheck_the_others():
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in lse_arguments(True, True, True)]
    *statistics, inv_features, inv_prototypes, kept = _ops.lse(*arguments)
    features, prototypes, labels, counts, temperature, *options = arguments
    upstream = [torch.randn_like(s) for s in statistics]
    del options[-2]  # keep_bytes
    torch.library.opcheck(
        _ops.lse_backward,
        (features, prototypes, labels, *statistics, inv_features, inv_prototypes, kept, *upstream, counts, temperature,
         *options),
    )  # fmt: skip
    torch.library.opcheck(_ops.segment_sum, (torch.randn(7), labels, 5, -100, "blockwise"))
    torch.library.opcheck(_ops.class_sums, (features, inv_features, labels, 5, -100, "blockwise"))


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tau", [0.2, 0.01])
def test_gradcheck(name, reduction, tau, keep_bytes, monkeypatch):
    monkeypatch.setattr("hypercontrast.blockwise._budget_bytes", keep_bytes)
    function, specific = LOSSES[name]
    labels = torch.tensor([0, 1, 1, 2, -100, 0])
    features, prototypes = torch.randn(6, 3).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    weight = torch.tensor([1.0, 0.5, 2.0, 1.0]).double()

    def loss(z, w, t):
        options = {"temperature": t, "weight": weight, "reduction": reduction}
        return getattr(functional, function)(z, w, labels, **options, **specific)

    learned = torch.tensor(tau).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (features, prototypes, learned), eps=1e-7, atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradcheck(
        lambda z, w: loss(z, w, tau), (features, prototypes), eps=1e-7, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(name, reduction):
    function, specific = LOSSES[name]
    features, prototypes = torch.randn(20, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    labels = torch.randint(0, 5, (20,))

    def loss(z, w):
        value = getattr(functional, function)(3 * z, w, labels, reduction=reduction, **specific)
        return value.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, want in zip(
        torch.autograd.grad(compiled(features, prototypes), (features, prototypes)),
        torch.autograd.grad(loss(features, prototypes), (features, prototypes)),
        strict=True,
    ):
        torch.testing.assert_close(actual, want)


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    prototypes = torch.randn(5, 6)
    compiled = torch.compile(hc.nonl_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (7, 9, 33):
        features, labels = torch.randn(n, 6), torch.randint(0, 5, (n,))
        torch.testing.assert_close(compiled(features, prototypes, labels), hc.nonl_loss(features, prototypes, labels))


def test_values_are_still_checked_when_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(hc.ntce_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 7"):
        compiled(torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 7]))


def test_gradients_wanted_of_one_argument_only():
    features, prototypes, labels = torch.randn(9, 4), torch.randn(3, 4), torch.randint(0, 3, (9,))
    for needs in ((True, False), (False, True)):
        z, w = features.clone().requires_grad_(needs[0]), prototypes.clone().requires_grad_(needs[1])
        hc.nonl_loss(z, w, labels).backward()
        assert (z.grad is not None, w.grad is not None) == needs


def test_backward_twice_through_one_graph():
    """Kept exponentials must survive the first backward."""
    features, prototypes = torch.randn(9, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    loss = hc.nonl_loss(features, prototypes, torch.randint(0, 3, (9,)))
    first = torch.autograd.grad(loss, (features, prototypes), retain_graph=True)
    second = torch.autograd.grad(loss, (features, prototypes))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_kept_only_within_the_budget(monkeypatch):
    arguments = lse_arguments(True, False, True, keep_bytes=7 * 5 * 8)
    assert _ops.lse(*arguments)[-1].numel() == 7 * 5
    arguments = lse_arguments(True, False, True, keep_bytes=7 * 5 * 8 - 1)
    assert _ops.lse(*arguments)[-1].numel() == 0
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        hc.set_memory_budget(-1)


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    seen = []
    original = _ops.blockwise.lse_forward
    monkeypatch.setattr(
        _ops.blockwise, "lse_forward", lambda *a, **o: seen.append(o["keep_bytes"]) or original(*a, **o)
    )
    features, prototypes, labels = torch.randn(9, 4, requires_grad=True), torch.randn(3, 4), torch.randint(0, 3, (9,))
    hc.ntce_loss(features, prototypes, labels)
    with torch.no_grad():
        hc.ntce_loss(features, prototypes, labels)
    assert seen == [hc.memory_budget(), 0]
