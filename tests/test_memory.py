"""The blockwise backend's memory: flat in batch x classes once past the budget. Peaks are read in fresh processes."""

import sys
from pathlib import Path

import pytest
import torch

import hypercontrast as hc
from bench.measure import _kib, in_fresh_process, peak_of_step
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


@needs_proc
@pytest.mark.parametrize("name", ["ntce", "nonl", "normface"])
def test_peak_of_few_classes_holds_no_second_copy_of_the_features(name, peak_mib):
    m, k, d = 65_536, 4, 256  # 64 MiB
    assert peak_mib(name, m, k, d, budget=0) < m * d * 4 / 2**20 + 6 * 8


def peak_of_forward(n, d):
    """In MiB beyond the inputs, of bfloat16."""
    features, prototypes = (torch.ones(rows, d, dtype=torch.bfloat16) for rows in (n, 4))
    labels = torch.arange(n) % 4
    hc.ntce_loss(features[:100], prototypes, labels[:100])  # what is allocated once
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _kib("/proc/self/status", "VmRSS")
    hc.ntce_loss(features, prototypes, labels)
    return (_kib("/proc/self/status", "VmHWM") - before) / 1024


@needs_proc
def test_half_precision_is_widened_a_block_at_a_time():
    assert in_fresh_process(peak_of_forward, 65_536, 256) < 6 * 8  # the features are 64 MiB in float32


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
