"""No kernel touches memory outside its arguments, whatever the labels say: every access of the interpreter is checked.

The interpreter itself reads and writes wherever a pointer leads. Here the addresses of every load, store and atomic are
compared with the extents of the tensors of the launch, so neighbours in the same storage count as outside.
"""

import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import TWO, quick

from hypercontrast import _checks

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("of the interpreter; compute-sanitizer does this on a GPU", allow_module_level=True)

import test_kernels
import test_pair_kernels
import triton
import triton.language as tl
from triton.runtime import interpreter

from hypercontrast.kernels import _launch, class_sums

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]
ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (-1, -2, 2**31, 2**40, 2**63 - 1, -(2**63))


class Accesses:
    """Counts accesses of the kernels, and collects those outside the tensors of their launch."""

    def __init__(self):
        self.checked, self.outside, self._extents = 0, [], np.zeros((0, 2), np.uint64)

    def launched(self, arguments):
        tensors = [x for x in arguments if isinstance(x, torch.Tensor) and x.numel()]
        reach = [sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 for x in tensors]
        ends = [(x.data_ptr(), x.data_ptr() + n * x.element_size()) for x, n in zip(tensors, reach, strict=True)]
        self._extents = np.array(ends, np.uint64).reshape(-1, 2)

    def check(self, what, pointers, mask):
        addresses = pointers.data[... if mask is None else mask.data.astype(bool)].astype(np.uint64)
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for first, end in self._extents:
            inside |= (addresses >= first) & (addresses + size <= end)
        self.checked += len(addresses)
        if not inside.all():
            self.outside.append(f"{what} of {int((~inside).sum())} addresses")


@pytest.fixture
def accesses(monkeypatch):
    found = Accesses()
    builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    swap, add = builder.create_atomic_cas, builder.create_atomic_rmw

    def launched(self, *args, **kwargs):
        found.launched([*args, *kwargs.values()])
        return launch(self, *args, **kwargs)

    def loaded(self, pointers, mask, *rest):
        found.check("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def stored(self, pointers, value, mask, *rest):
        found.check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def swapped(self, pointers, *rest):
        found.check("swap", pointers, None)
        return swap(self, pointers, *rest)

    def added(self, operation, pointers, value, mask, *rest):
        found.check("sum", pointers, mask)
        return add(self, operation, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)
    monkeypatch.setattr(builder, "create_atomic_cas", swapped)
    monkeypatch.setattr(builder, "create_atomic_rmw", added)
    return found


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place), mask=place < N)


@triton.jit
def _atomics_kernel(x_ptr, N, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.atomic_cas(x_ptr + place, place, place)
    tl.atomic_add(x_ptr + place, 1, mask=place < N)


def test_an_access_outside_is_noticed(accesses):
    x, y = torch.zeros(12), torch.zeros(12)
    _copy_kernel[(1,)](x[:6], y[:6], 6, BLOCK=8)
    assert accesses.outside == ["load of 2 addresses"]
    _copy_kernel[(1,)](x[:8], y[:6], 8, BLOCK=8)
    assert accesses.outside[1:] == ["store of 2 addresses"]
    _copy_kernel[(1,)](x[2:10], y[:6], 6, BLOCK=8)
    assert len(accesses.outside) == 2
    _atomics_kernel[(1,)](torch.zeros(12, dtype=torch.int32)[:6], 7, BLOCK=8)
    assert accesses.outside[2:] == ["swap of 2 addresses", "sum of 1 addresses"]


@pytest.mark.parametrize("rule", quick(test_kernels.RULES, TWO))
def test_labels_of_no_class(rule, accesses, figure):
    """The samples count as ignored: the same bits as with ignore_index in their place, and no access outside."""
    for seed, shape in enumerate([(37, 9, 20), (20, 5, 130), (9, 300, 16)]):
        case, generator = test_kernels.make_case(seed, shape=shape, dtype=torch.float32, rule=rule)
        upstream = test_kernels.random_upstream(case, generator)
        bad, ignored = case.labels.clone(), case.labels.clone()
        bad[: len(OUTSIDE) + 1] = torch.tensor([*OUTSIDE, shape[1]])
        ignored[: len(OUTSIDE) + 1] = case.ignore_index
        results = [
            test_kernels.run_kernels(replace(case, labels=labels, counts=None), upstream) for labels in (bad, ignored)
        ]
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name
        values = torch.randn(shape[0])
        for labels, other in ((bad, ignored),):
            sums = [class_sums.segment_sum(values, y, shape[1], case.ignore_index) for y in (labels, other)]
            assert torch.equal(*sums)
            inv = torch.ones(shape[0])
            means = [class_sums.class_sums(case.features, inv, y, shape[1], case.ignore_index) for y in (labels, other)]
            assert all(torch.equal(a, b) for a, b in zip(*means, strict=True))
    assert accesses.outside == []
    assert accesses.checked > 1000
    figure("R1", f"{rule}: labels -1, K, 2^31, 2^40, 2^63-1, -2^63: {accesses.checked} accesses, 0 out of bounds")


def test_pairs_stay_inside(accesses, figure):
    """SupCon's kernels compare ids of any value."""
    cases = 0
    for seed in range(12):
        case, generator = test_pair_kernels.make_case(seed, shape=(33, 20), dtype=torch.float32)
        if case.setting == "global":
            continue
        cases += 1
        test_pair_kernels.run_kernels(case, test_pair_kernels.random_upstream(case, generator))
    assert accesses.outside == []
    assert cases > 3
    figure("R1", f"pairs: {accesses.checked} accesses of {cases} cases, 0 out of bounds")


def test_labels_of_no_class_are_not_counted(accesses, monkeypatch):
    """By the atomics that count the samples of each class for a loss of many comparisons."""
    monkeypatch.setattr(_launch, "MAX_COMPARISONS", 0)
    case, _ = test_kernels.make_case(0, shape=(20, 5, 16), dtype=torch.float32, rule="ntce")
    case.labels[: len(OUTSIDE) + 1] = torch.tensor([*OUTSIDE, 5])
    test_kernels.run_loss(case, weighted=False, mean=True)
    assert accesses.outside == []


@pytest.mark.parametrize("n", [1, 2, 33])
def test_classes_of_few_labels_stay_inside(n, accesses):
    """Also where a program's block of labels is longer than they are."""
    class_sums.classes(torch.randint(-(2**63), 2**63 - 1, (n,)), 0, absent=-1)
    assert accesses.outside == []
    assert accesses.checked


def test_tiles_of_splits_stay_inside(accesses, monkeypatch):
    """Where exp(s) needs no maximum, and the splits together would be longer than the padded columns."""
    monkeypatch.setattr(_launch, "TARGET_PROGRAMS", 6)
    case = test_pair_kernels.clustered(5, 16, torch.float16, setting="others")
    x = torch.randn(1000, 16).half()
    case = replace(case, columns=x, column_ids=torch.arange(1000) % 5)
    test_pair_kernels.run_kernels(case, test_pair_kernels.random_upstream(case))
    assert accesses.outside == []


class Event:
    """A GPU's event that arrives when it is told to, and cannot be waited for."""

    arrived = False

    def record(self, stream=None):
        pass

    def query(self):
        return self.arrived

    def synchronize(self):
        raise AssertionError("the host waited")


def test_labels_are_watched_without_waiting(monkeypatch):
    """A bad label in any step is reported, also if the GPU is several steps behind; no step waits for it."""
    empty, events = torch.empty, []

    def event():
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    watch = _checks.LabelWatch()
    for labels in ([0, 1], [0, 2**40], [1, -100], [1, 1]):
        watch(torch.tensor(labels), 2, -100)
    events[0].arrived = True
    watch(torch.tensor([0, 0]), 2, -100)
    events[1].arrived = True
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 2\), got {2**40}"):
        watch(torch.tensor([0, 1]), 2, -100)
    deque(setattr(e, "arrived", True) for e in events)
    watch(torch.tensor([1, 1]), 2, -100)
    assert len(events) == 4  # used again once they have arrived


SANITIZED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl, triton_viz
from triton_viz.clients import Sanitizer
from triton_viz.clients.sanitizer.sanitizer import SymbolicSanitizer
from triton_viz.core.callbacks import ForLoopCallbacks

# Loops as they run, not one symbol for all their turns, which masks that depend on loaded labels cannot be.
SymbolicSanitizer.register_for_loop_callback = lambda self: ForLoopCallbacks()
traced = triton_viz.trace(client=Sanitizer(abort_on_error=True))

@traced
@triton.jit
def outside(x_ptr, N, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)

try:
    outside[(1,)](torch.zeros(6), 6, BLOCK=8)
except SystemExit:
    print("noticed")

from hypercontrast.kernels import class_sums
class_sums._segment_sum_kernel = traced(class_sums._segment_sum_kernel)
for n, k in ((5, 3), (300, 70)):
    class_sums.segment_sum(torch.randn(n), torch.randint(k, (n,)), k, -100)
print("silent")
"""


def test_the_sanitizer_of_triton_viz_is_silent(figure):
    """Of the one kernel that its version 3.0 can follow: the others have loops between bounds that are computed or
    loaded, and functions in other modules, at which it stops. `Accesses` follows them all.
    """
    pytest.importorskip("triton_viz", reason="needs triton-viz")
    done = subprocess.run([sys.executable, "-c", SANITIZED], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "silent", done.stdout
    assert "noticed" in done.stdout
    figure("R1", "triton-viz's sanitizer: silent on segment_sum, and notices an access outside")
