"""How many kernels a small batch launches: ours, counted as they start, and PyTorch's, counted by its profiler.

Without a GPU the interpreter stands in for Triton, and every PyTorch operator that writes a tensor counts as a launch.
"""

import pytest
import torch
from cases import TWO, quick
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

pytest.importorskip("triton")

from test_kernels import DEVICE
from test_triton import NAMES, call

import hypercontrast as hc
from hypercontrast import _checks
from hypercontrast.kernels import _launch, aot, prototype_backward

OURS, PRODUCT = "a kernel of ours", "a library product"
# Operators that make or reshape a tensor, or return the very one they were given.
FREE = {
    f"aten::{name}"
    for name in (
        "empty", "empty_strided", "empty_like", "new_empty", "resize_", "view", "as_strided", "reshape", "slice",
        "select", "unsqueeze", "squeeze", "expand", "t", "transpose", "detach", "detach_", "alias", "view_as", "to",
        "float", "contiguous", "resolve_conj", "lift_fresh", "set_",
    )
}  # fmt: skip


class Marked:
    """A kernel whose launches the profiler shows."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return marked(OURS, self.kernel[grid])


def marked(name, function):
    def call(*args, **arguments):
        with record_function(name):
            return function(*args, **arguments)

    return call


@pytest.fixture
def _marks(monkeypatch):
    for module, name in aot.kernels():
        monkeypatch.setattr(module, name, Marked(getattr(module, name)))
    if DEVICE == "cpu":  # a CPU has no product of half types with an fp32 result, and reads what a GPU does not
        monkeypatch.setattr(prototype_backward, "mm_fp32", marked(PRODUCT, prototype_backward.mm_fp32))
        for reader in ("check_label_range", "check_temperature_value", "check_weight"):
            monkeypatch.setattr(_checks, reader, lambda *_: None)


def count_launches(work) -> tuple[int, list[str]]:
    """How many kernels of ours a call launches, and the names of all others, after one call to warm up."""
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
            work()
            torch.cuda.synchronize()
        names = [e.name for e in profiled.events() if e.device_type == DeviceType.CUDA and e.name != OURS]
        kernels = {name for _, name in aot.kernels()}
        others = [name for name in names if name not in kernels and not name.startswith(("Memcpy", "Memset"))]
        return sum(name in kernels for name in names), others
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        work()
    ours, others = 0, []
    for event in profiled.events():
        is_leaf = not any(child.name.startswith("aten::") for child in event.cpu_children)
        if event.name == OURS:
            ours += 1
        elif event.name == PRODUCT or (
            event.name.startswith("aten::") and is_leaf and event.name not in FREE and not within_marks(event)
        ):
            others.append(event.name)
    return ours, others


def within_marks(event) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name in (OURS, PRODUCT) or within_marks(parent))


@pytest.mark.usefixtures("_marks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.float32, 64),
        pytest.param(torch.float32, 144, marks=pytest.mark.slow),
        (torch.float16, 64),  # the narrow path of half types, and the wide one
        (torch.float16, 144),
    ],
)
@pytest.mark.parametrize("name", quick(NAMES, (*TWO, "normface")))
def test_small_batch(name, dtype, width, monkeypatch):
    """Three in the forward, class weights and ignored samples included, and nothing else; in the backward at most four,
    and for float16 the scales that keep G in its range."""
    monkeypatch.setattr(_launch, "TARGET_PROGRAMS", 8)  # splits as on a GPU, by fewer programs
    n, k = 150, 130
    features = torch.randn(n, width, device=DEVICE, dtype=dtype, requires_grad=True)
    prototypes = torch.randn(k, width, device=DEVICE, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, k, (n,), device=DEVICE)
    labels[::9] = -100
    weight, upstream = torch.rand(k, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    losses = []

    def forward():
        losses.append(call(name, features, prototypes, labels, weight=weight))

    def backward():
        torch.autograd.grad(losses[-1], (features, prototypes), upstream, retain_graph=True)

    ours, others = count_launches(forward)
    assert (ours, others) == (3, [])
    ours, others = count_launches(backward)
    if _launch.is_narrow(
        _launch.BACKWARD_NARROW, features
    ):  # what tiles read of columns, the gradients' two kernels and one that finishes both; a range for each
        assert ours == (6 if dtype == torch.float16 else 4)
        assert not others
    else:  # H, two products of the library (which may follow each with a sum over its splits), one that finishes both
        assert ours == (3 if dtype == torch.float16 else 2)
        assert len(others) == 2 or (DEVICE == "cuda" and len(others) <= 4)


@pytest.mark.usefixtures("_marks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("singletons", ["exclude", "zero"])
@pytest.mark.parametrize("variant", ["out", "in"])
def test_supcon_whose_exponentials_need_no_maximum(variant, singletons, monkeypatch):
    """Six in the forward: zeros for the hash table, classes, what tiles read of samples, tiles, joined parts, the loss.
    Three in the backward: what tiles read, tiles, what finishes; and for float16 the scale that keeps G in its range.
    """
    monkeypatch.setattr(_launch, "TARGET_PROGRAMS", 8)
    features = torch.randn(300, 64, device=DEVICE, dtype=torch.float16, requires_grad=True)
    labels, upstream = torch.randint(0, 200, (300,), device=DEVICE), torch.tensor(0.5, device=DEVICE)
    losses = []

    def forward():
        losses.append(hc.supcon_loss(features, labels, variant=variant, singletons=singletons, backend="triton"))

    def backward():
        torch.autograd.grad(losses[-1], features, upstream, retain_graph=True)

    ours, others = count_launches(forward)
    assert ours == 5
    assert len(others) <= 1  # on a GPU zeros are no kernel
    assert count_launches(backward) == (4, [])
