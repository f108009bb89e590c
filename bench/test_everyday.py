"""Small everyday cases for pytest-benchmark, each checked before it is timed: `python -m pytest bench`.

A form must be within the limits of `verdict.judge`, or its time counts for nothing. Times of one case stand
beside each other; the bigger picture, interleaved, is `python -m bench`.
"""

import pytest
import torch

from bench import forms, verdict
from bench.buffer import TWIN, Ours, operators, step
from bench.peers import OURS
from bench.record import Case, this_device
from hypercontrast.reference import unit_rows

pytest.importorskip("pytest_benchmark")

DEVICE = this_device()
# N, K, D: a batch and classes of CIFAR at a backbone's width, of a projection head, of ImageNet-1k.
SHAPES = [(256, 10, 512), (256, 100, 128), (256, 1000, 512)]
PAIRS = [(256, 10, 128), (1024, 100, 128)]
CASES = [Case(op, *shape) for op in forms.EAGER for shape in (PAIRS if op == "supcon" else SHAPES)]


def named(case):
    return f"{case.op}-{case.n}x{case.k}x{case.d}"


def on_device(work, *arguments):
    """Ends when the device does."""
    result = work(*arguments)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("form", ["eager", OURS])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_step(benchmark, case, form):
    """Forward and backward."""
    leaves, y = forms.of_case(case, DEVICE)
    eager = forms.yardstick(case.op)
    run = forms.ours(case.op) if form == OURS else forms.EAGER[case.op][eager]
    steps = {eager: forms.step(forms.EAGER[case.op][eager], leaves, y), form: forms.step(run, leaves, y)}
    assert not verdict.judge(case, leaves, y, steps)[form].reason
    benchmark.group = named(case)
    benchmark(on_device, forms.step, run, leaves, y)


@pytest.mark.parametrize("form", [TWIN, OURS])
def test_a_buffer(benchmark, form):
    """Gather and push of 256 samples with a queue of 4,096."""
    if operators(form) is None:
        pytest.skip("python setup.py build_ext --inplace")
    exchange = Ours(Case("buffer", 256, 4096, 128), DEVICE, operators(form))
    z, y = torch.randn(256, 128, device=DEVICE), torch.arange(256, device=DEVICE)
    want = unit_rows(z.double())
    assert verdict.deviation([exchange.gather(z, y)], [want]) <= torch.finfo(z.dtype).eps
    exchange.push()
    kept, labels = exchange.buffer.queued()
    assert torch.equal(labels[:256], y)
    assert torch.equal(kept[:256], exchange.gather(z, y))
    benchmark.group = "buffer"
    benchmark(on_device, step, exchange, z, y)
