"""What the kernels take beside their results: bounded pieces of memory, each gone before the next one is made."""

import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton")

from test_kernels import DEVICE

import hypercontrast as hc
from hypercontrast.kernels import _launch, aot, pair_backward, pair_fixed, pair_forward, prototype_backward

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")


def ntce(dtype, tau):
    x, w = (torch.randn(n, 20, device=DEVICE, dtype=dtype, requires_grad=True) for n in (300, 30))
    return hc.ntce_loss(x, w, torch.arange(300, device=DEVICE) % 30, temperature=tau, backend="triton")


def supcon(dtype, tau):
    x = torch.randn(300, 20, device=DEVICE, dtype=dtype, requires_grad=True)
    return hc.supcon_loss(x, torch.arange(300, device=DEVICE) % 30, temperature=tau, backend="triton")


PIECES = [
    (prototype_backward, "_lse_bwd_tile_kernel", "h_ptr", ntce, torch.float32, 0.1),
    (pair_forward, "_pair_triangle_kernel", "col_lse_ptr", supcon, torch.float32, 0.1),
    (pair_forward, "_class_positives_kernel", "sums_ptr", supcon, torch.float32, 0.1),
    (pair_backward, "_pair_bwd_tile_kernel", "h_ptr", supcon, torch.float32, 0.1),
    (pair_backward, "_pair_bwd_kernel", "partials_ptr", supcon, torch.float16, 0.02),
    (pair_fixed, "_triangle_fixed_kernel", "col_sums_ptr", supcon, torch.float16, 0.1),
    (pair_fixed, "_bwd_fixed_kernel", "partials_ptr", supcon, torch.float16, 0.1),
]


@pytest.mark.parametrize(
    ("module", "kernel", "memory", "loss", "dtype", "tau"), PIECES, ids=[kernel for _, kernel, *_ in PIECES]
)
def test_one_piece_at_a_time(module, kernel, memory, loss, dtype, tau, monkeypatch):
    monkeypatch.setattr(_launch, "SCRATCH_BYTES", 4096)
    monkeypatch.setattr(_launch, "CHUNK_BYTES", 4096)
    launch, new_empty, pieces, left = getattr(module, kernel), torch.Tensor.new_empty, [], []

    def allocate(*args, **options):
        left[:] = [piece for piece in pieces if piece() is not None]
        return new_empty(*args, **options)

    class Watched:
        def __getitem__(self, grid):
            def call(**arguments):
                assert not left  # of earlier pieces, when this one was made
                launch[grid](**arguments)
                pieces.append(weakref.ref(arguments[memory]))

            return call

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)
    monkeypatch.setattr(module, kernel, Watched())
    loss(dtype, tau).backward()
    assert len(pieces) > 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [64, 512, 2048])
@pytest.mark.parametrize("rows", [100, 70_000, 1_000_000])
@pytest.mark.parametrize("columns", [100, 4096, 100_000])
def test_pieces_are_bounded_and_cover_all(rows, columns, dim, itemsize):
    covered = 0
    for part, others in _launch.chunks(rows, columns, itemsize, dim):
        height, width = part.stop - part.start, others.stop - others.start
        covered += height * width
        longer, shorter = (height, width) if rows > columns else (width, height)
        assert longer <= 128 or max(itemsize * height * width, 4 * dim * longer) <= _launch.CHUNK_BYTES
        assert shorter == min(rows, columns)
    assert covered == rows * columns

    covered = 0
    for part, parts in _launch.pair_chunks(rows, columns, itemsize, dim):
        height = part.stop - part.start
        for others in parts:
            width = others.stop - others.start
            covered += height * width
            assert height <= 128 or max(itemsize * height * width, 4 * dim * height) <= _launch.SCRATCH_BYTES
    assert covered == rows * columns


class Idle:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda **arguments: None


@pytest.fixture
def scratch_mib(monkeypatch):
    """The peak of a step beside its inputs and outputs, by what it allocates while nothing is computed."""
    for module, name in aot.kernels():
        monkeypatch.setattr(module, name, Idle())
    for module in (prototype_backward, pair_backward):
        monkeypatch.setattr(module, "mm_fp32", _sum_of_products)
    monkeypatch.setattr(_launch, "kernel_dtype", lambda x: x.dtype)

    def measured(name, *shapes):
        leaves = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        labels = torch.arange(len(leaves[0])) % len(leaves[-1])
        loss = getattr(hc, f"{name}_loss")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            outputs = loss(*leaves, labels, backend="triton")
            outputs = [outputs, *torch.autograd.grad(outputs, leaves)]
        now = peak = 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return (peak - sum(x.numel() * x.itemsize for x in outputs)) / 2**20

    return measured


def _sum_of_products(a, b, into=None):
    return a.new_empty(len(a), b.shape[1], dtype=torch.float32) if into is None else into


@pytest.mark.skipif(DEVICE == "cuda", reason="the bench measures it there")
@pytest.mark.parametrize(
    ("name", "shapes", "measured"),
    [
        ("ntce", [(4096, 2048), (1000, 2048)], 55.9),
        ("ntce", [(65536, 128), (1000, 128)], 9.9),
        ("normface", [(65536, 128), (1000, 128)], 10.8),
        ("normface", [(256, 2048), (1000, 2048)], 10.3),
    ],
)
def test_scratch_is_what_a_gpu_measured(name, shapes, measured, scratch_mib):
    """bench/results/2026-11-28-NVIDIA-H200, so that what is said of other shapes can be believed."""
    assert scratch_mib(name, *shapes) == pytest.approx(measured, abs=0.5)


@pytest.mark.skipif(DEVICE == "cuda", reason="the bench measures it there")
@pytest.mark.parametrize(
    ("name", "shapes", "most"),
    [
        ("normface", [(32768, 512), (100_000, 512)], 256 + 64 + 12),  # a chunk, the features' sum, and the chunk's
        ("ntce", [(131_072, 2048), (500, 2048)], 256 + 32 + 12),  # whose product is larger than the chunk
        ("supcon", [(262_144, 128)], 64 + 20),
        ("supcon", [(65536, 512)], 64 + 20),
    ],
)
def test_scratch_is_bounded(name, shapes, most, scratch_mib):
    assert scratch_mib(name, *shapes) < most
