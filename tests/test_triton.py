"""backend="triton" through the public functions: on a GPU when there is one, else in Triton's interpreter.

The interpreter computes bfloat16 wrongly, so kernels widen it there and only a GPU tests bfloat16 products.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import LOSSES, assert_within, draws, loss_and_gradients, truth_and_eager

import hypercontrast as hc
from hypercontrast import _ops, functional
from hypercontrast.kernels import _launch

pytest.importorskip("triton")
NAMES = list(LOSSES)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE.type == "cuda" else ())
# Around a tile, primes, the degenerate ones, both sides of the change from narrow to wide.
SHAPES = ((1, 2, 17, 100, 127, 252, 300), (1, 2, 3, 10, 33, 128, 257), (1, 3, 16, 33, 123, 200, 300, 513))
FEW, MANY = 20, 200


def call(name, *args, **options):
    function, specific = LOSSES[name]
    return getattr(functional, function)(*args, backend="triton", **specific, **options)


def check(draw, name):
    tensors = tuple(x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in draw.tensors())
    options = {"temperature": draw.temperature}
    truth, eager = truth_and_eager(name, *tensors, **options)
    actual = loss_and_gradients(lambda *a, **o: call(name, *a, **o), *tensors, **options)
    assert_within(actual, truth, eager, tensors, temperature=draw.temperature, context=draw)


@pytest.mark.parametrize("name", NAMES)
def test_fuzz(name):
    for draw in draws(FEW, seed=10 + NAMES.index(name), dtypes=DTYPES, shapes=SHAPES):
        check(draw, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fuzz_many(name):
    for draw in draws(MANY, seed=20 + NAMES.index(name), dtypes=DTYPES, shapes=SHAPES):
        check(draw, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_blockwise_with_every_option(name, reduction):
    """Class weights, ignored samples, a learned temperature, class means, upstream gradients of every layout."""
    n, k, d = 60, 9, 20
    features = torch.randn(n, d, device=DEVICE, requires_grad=True)
    prototypes = torch.randn(k, d, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, k, (n,), device=DEVICE)
    tau = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    options = {"temperature": tau, "weight": torch.rand(k, device=DEVICE), "ignore_index": 3, "reduction": reduction}
    function, specific = LOSSES[name]
    shape = (n,) if reduction == "none" else ()
    for upstream in (torch.randn(*shape, 2, device=DEVICE)[..., 0], torch.ones((), device=DEVICE).expand(shape)):
        results = []
        for backend in ("triton", "blockwise"):
            means = hc.ClassMeans(k, d).to(DEVICE)
            loss = getattr(functional, function)(
                features, prototypes, labels, **options, **specific, backend=backend, class_means=means
            )
            grads = torch.autograd.grad(loss, (features, prototypes, tau), upstream)
            results.append((loss.detach(), *grads, means.sums, means.counts))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1, want.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_learned_temperature_of_any_float_type(dtype):
    """The kernels read float32; the gradient comes back in the parameter's own type."""
    features, prototypes = torch.randn(20, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    labels = torch.randint(0, 5, (20,), device=DEVICE)
    taus = [torch.tensor(0.25, dtype=d, device=DEVICE, requires_grad=True) for d in (dtype, torch.float32)]
    losses = [call("nonl", features, prototypes, labels, temperature=tau) for tau in taus]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert taus[0].grad.dtype == dtype
    torch.testing.assert_close(taus[0].grad.float(), taus[1].grad, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_repeats_bitwise(name):
    features = torch.randn(300, 40, device=DEVICE, requires_grad=True)
    prototypes = torch.randn(50, 40, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 50, (300,), device=DEVICE)
    runs = [loss_and_gradients(lambda *a: call(name, *a), features, prototypes, labels) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    ("rows", "cols", "exclude_own"), [(True, False, True), (False, True, False), (True, True, True)]
)
def test_opcheck(rows, cols, exclude_own):
    features = torch.randn(9, 6, device=DEVICE, requires_grad=True)
    prototypes = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 4, (9,), device=DEVICE)
    counts = torch.bincount(labels, minlength=4)
    options = (None, 5.0, -100, rows, cols, exclude_own, True, 0, "triton")
    torch.library.opcheck(_ops.lse, (features, prototypes, labels, counts, *options))


def equals_another_backend_where_absent_classes_are_skipped(other, labels, k, **options):
    _launch.COMPACT_FLOP = 0  # of this process alone
    g = torch.Generator().manual_seed(0)
    features = torch.randn(len(labels), 20, generator=g).to(DEVICE).requires_grad_()
    prototypes = torch.randn(k, 20, generator=g).to(DEVICE).requires_grad_()
    runs = [
        loss_and_gradients(lambda *a, b=b: hc.nonl_loss(*a, backend=b, **options), features, prototypes, labels)
        for b in ("triton", other)
    ]
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_queue_shorter_than_the_batch_meets_all_its_classes(monkeypatch):
    monkeypatch.setattr(_launch, "COMPACT_FLOP", 0)
    labels = 2 * torch.arange(30, device=DEVICE)
    queue = torch.randn(10, 20, device=DEVICE), torch.arange(10, device=DEVICE)
    equals_another_backend_where_absent_classes_are_skipped("reference", labels, 70, queue=queue)


def other_classes_elsewhere(rank, path):
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    try:
        labels = torch.arange(30, device=DEVICE) + 30 * rank
        equals_another_backend_where_absent_classes_are_skipped("blockwise", labels, 70)
    finally:
        dist.destroy_process_group()


def test_classes_of_other_ranks_are_present(tmp_path):
    mp.spawn(other_classes_elsewhere, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="labels are read directly on the CPU")
def test_out_of_range_label_is_reported_by_a_later_call():
    features, prototypes = torch.randn(4, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    bad, good = torch.tensor([0, 1, 7, 2], device=DEVICE), torch.tensor([0, 1, 0, 2], device=DEVICE)
    assert torch.isfinite(hc.ntce_loss(features, prototypes, bad))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 7"):
        hc.ntce_loss(features, prototypes, good)
    hc.ntce_loss(features, prototypes, good)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_no_host_sync(name):
    features = torch.randn(64, 32, device=DEVICE, requires_grad=True)
    prototypes = torch.randn(10, 32, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 10, (64,), device=DEVICE)
    call(name, features, prototypes, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(name, features, prototypes, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
