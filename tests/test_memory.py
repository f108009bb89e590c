"""The blockwise backend's memory: flat in batch x classes once past the budget. Peaks are read in fresh processes."""

import sys

import pytest
import torch

import hypercontrast as hc
from bench.measure import in_fresh_process, peak_of_step
from bench.peers import OURS
from bench.record import Case

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def peak_mib():
    """Peak of a step beyond its inputs, gradients included, under a budget."""
    before = hc.memory_budget()

    def measured(name, m, k, d, budget):
        hc.set_memory_budget(budget)
        return sum(in_fresh_process(peak_of_step, Case(name, m, k, d), OURS).values())

    yield measured
    hc.set_memory_budget(before)


@needs_proc
@pytest.mark.parametrize("samples", [8192, pytest.param(32768, marks=pytest.mark.slow)])
def test_peak_of_pairs_is_linear(samples, peak_mib):
    """All logits would be 256 MiB and 4 GiB, whose half does not fit the budget; unit rows, their gradient and its copy
    in the samples' order are left.
    """
    d = 128
    rows = samples * d * 4 / 2**20
    assert peak_mib("supcon", samples, 100, d, budget=64 * 2**20) < min(3 * rows + 12, 64)


@needs_proc
def test_pairs_that_fit_are_kept(peak_mib):
    needed = (4096**2 + 6 * 640**2 + 256**2) // 2 * 4  # 36.8 MiB: six whole tiles along the diagonal and a rest
    kept = needed / 2**20
    assert kept < peak_mib("supcon", 4096, 100, 16, budget=needed) < kept + 16
    assert peak_mib("supcon", 4096, 100, 16, budget=needed - 1) < 16


@needs_proc
@pytest.mark.parametrize("name", ["ntce", "nonl", "normface"])
def test_peak_is_flat(name, peak_mib):
    m, k, d = 16384, 2000, 64  # all logits would be 125 MiB
    gradients = (m + k) * d * 4 / 2**20
    tile = 8  # MiB; a few of them pass through the allocator
    assert peak_mib(name, m, k, d, budget=0) < gradients + 4 * tile + 16
    for budget in (64, 128):
        kept = min(m * k * 4 / 2**20, budget)
        assert kept - tile < peak_mib(name, m, k, d, budget=budget * 2**20) < kept + gradients + 4 * tile + 16


@pytest.mark.parametrize("function", [hc.normface_loss, hc.ntce_loss, hc.nonl_loss])
def test_a_million_classes(function):
    """Panels of classes; NTCE and NONL touch the few that are present."""
    k, d = 1_000_000, 8
    prototypes = torch.randn(k, d, requires_grad=True)
    features, labels = torch.randn(32, d, requires_grad=True), torch.randint(0, k, (32,))
    loss = function(features, prototypes, labels)
    loss.backward()
    assert torch.isfinite(loss)
    moved = prototypes.grad.abs().sum(1) > 0
    assert moved.sum() == (k if function is hc.normface_loss else len(labels.unique()))
