"""The blockwise losses on random problems: shape, type, strides, temperature, collapse and the ends of the number range.

Each draw's loss and gradients are judged against float64 and against eager code of the same type: `oracle`. The same
for the kernels is in test_triton.py and test_triton_supcon.py.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import pytest
import test_supcon
import torch
from oracle import (
    LOSSES,
    REGIMES,
    draws,
    loss_and_gradients,
    prototype_error_over_bound,
    set_regime,
    truth_and_eager,
)

import hypercontrast as hc
from hypercontrast import functional

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fuzz_report(what: str, problems: Iterable, error_over_bound: Callable[..., float]) -> str:
    """How many draws there were and how near the worst came to its bound; fails naming every draw past it."""
    ratios = {problem: error_over_bound(problem) for problem in problems}
    failures = [f"{ratio:.3g} of the bound: {problem}" for problem, ratio in ratios.items() if not ratio <= 1]
    assert not failures, "\n".join(failures)
    return f"{what}: {len(ratios)} draws, {len(failures)} failures, worst error {max(ratios.values()):.2f} of its bound"


@contextmanager
def some_regime(draw):
    """One of the ways through the backend, chosen by the draw."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_regime(list(REGIMES)[draw.seed % len(REGIMES)], monkeypatch)
        yield


@pytest.mark.parametrize("count", [48, pytest.param(360, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LOSSES)
def test_prototype_losses(name, count, figure):
    function, specific = LOSSES[name]

    def error_over_bound(draw) -> float:
        tensors, options = draw.tensors(), {"temperature": draw.temperature}
        truth, eager = truth_and_eager(name, *tensors, **options)
        loss = getattr(functional, function)
        with some_regime(draw):
            actual = loss_and_gradients(loss, *tensors, **options, **specific, backend="blockwise")
        return prototype_error_over_bound(actual, truth, eager, tensors, temperature=draw.temperature)

    problems = draws(count, seed=list(LOSSES).index(name), dtypes=DTYPES)
    figure("R2", fuzz_report(f"{name}, blockwise", problems, error_over_bound))


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_pair_losses(count, figure):
    def error_over_bound(draw) -> float:
        with some_regime(draw):
            return test_supcon.draw_error_over_bound(draw, "blockwise")

    problems = test_supcon.draws(count, seed=1, dtypes=DTYPES)
    figure("R2", fuzz_report("SupCon, blockwise", problems, error_over_bound))


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_length_beyond_float32_is_refused(dtype, backend):
    """Of half types only bfloat16 has numbers whose squares do not fit; float16's largest are in the draws."""
    features, prototypes = torch.randn(5, 4), torch.randn(3, 4)
    features[2] = torch.finfo(dtype).max
    with pytest.raises(ValueError, match="features must have finite norms, got inf in row 2"):
        hc.ntce_loss(features.to(dtype), prototypes.to(dtype), torch.tensor([0, 1, 2, 0, 1]), backend=backend)


def test_a_length_beyond_float32_never_passes_for_none():
    """On a GPU no value is read, so the loss itself says it."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features, prototypes = torch.randn(5, 4, device=device), torch.randn(3, 4, device=device)
    features[2] = 1e20
    labels = torch.tensor([0, 1, 2, 0, 1], device=device)
    assert hc.ntce_loss(features, prototypes, labels, backend="triton").isnan()
    assert hc.supcon_loss(features, labels, backend="triton").isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_lengths_near_the_end_of_float32_change_nothing(name):
    """Folded into the products, e^(-1/τ) over a length of 1e18 would leave float32, and so would what it is to scale."""
    features, prototypes, labels = torch.randn(40, 8), torch.randn(6, 8), torch.randint(0, 6, (40,))
    function, specific = LOSSES[name]
    runs = []
    for length in (1.0, 2.0**60):
        leaves = [(x * length).requires_grad_() for x in (features, prototypes)]
        loss = getattr(functional, function)(*leaves, labels, temperature=0.02, backend="blockwise", **specific)
        runs.append((loss, *(grad * length for grad in torch.autograd.grad(loss, leaves))))
    for got, want in zip(*reversed(runs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
