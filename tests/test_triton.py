"""backend="triton" through the public functions: on a GPU when there is one, else in Triton's interpreter.

The interpreter computes bfloat16 wrongly, so kernels widen it there and only a GPU tests bfloat16 products.
"""

import pytest
import ranks
import torch
from oracle import LOSSES, draws, loss_and_gradients, prototype_error_over_bound, truth_and_eager
from test_fuzz import fuzz_report

import hypercontrast as hc
from hypercontrast import functional
from hypercontrast.kernels import _launch

pytest.importorskip("triton")
NAMES = list(LOSSES)
RULES = {  # rows, cols, exclude_own
    "normface": (False, True, False),
    "ntce": (True, False, False),
    "nonl": (True, False, True),
    "nonl-sample": (False, True, True),
    "nonl-both": (True, True, True),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE.type == "cuda" else ())
# Around a tile, primes, the degenerate ones, both sides of the change from narrow to wide.
SHAPES = ((0, 1, 2, 17, 100, 127, 252, 300), (1, 2, 3, 10, 33, 128, 257), (1, 3, 16, 33, 123, 200, 300, 513))
# A GPU compiles every kernel for each new width, type and option, a second each: few of them where minutes count.
QUICK, QUICK_SHAPES = 6, SHAPES if DEVICE.type == "cpu" else ((0, 17, 127, 300), (3, 10, 257), (33, 200, 300))


def call(name, *args, **options):
    function, specific = LOSSES[name]
    return getattr(functional, function)(*args, backend="triton", **specific, **options)


def draw_error_over_bound(draw, name) -> float:
    tensors = tuple(x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in draw.tensors())
    options = {"temperature": draw.temperature}
    truth, eager = truth_and_eager(name, *tensors, **options)
    actual = loss_and_gradients(lambda *a, **o: call(name, *a, **o), *tensors, **options)
    return prototype_error_over_bound(
        actual, truth, eager, tensors, temperature=draw.temperature, narrow_statistics=True
    )


def is_mixed(draw) -> bool:
    """Whether vectors differ in length by more than the one scale that float16 weights of the kernels share can span."""
    return draw.dtype == torch.float16 and draw.extreme in ("large", "small", "subnormal")


@pytest.mark.parametrize(
    ("count", "shapes"), [(QUICK, QUICK_SHAPES), pytest.param(200, SHAPES, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", NAMES)
def test_fuzz(name, count, shapes, figure):
    problems = [d for d in draws(count, seed=10 + NAMES.index(name), dtypes=DTYPES, shapes=shapes) if not is_mixed(d)]
    figure("R2", fuzz_report(f"{name}, Triton on {DEVICE}", problems, lambda draw: draw_error_over_bound(draw, name)))


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("dtype", "count"), [(torch.float16, 40), (torch.float32, 150)], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", ["ntce", "nonl-both"])
def test_a_gradient_that_nobody_asks_for(name, dtype, count, reduction, monkeypatch):
    """Is left out, and the others, with that of a learned temperature, are what they are together."""
    monkeypatch.setattr(_launch, "CHUNK_BYTES", 4 * 64 * 32)  # several chunks of the wide path
    g = torch.Generator().manual_seed(0)
    inputs = [torch.rand(rows, 20, generator=g).sub(0.3).to(DEVICE) for rows in (count, 20)]
    inputs.append(torch.tensor(0.2).to(DEVICE))
    labels = (torch.arange(count) % 17).to(DEVICE)

    def gradients(*wanted):
        leaves = [x.to(dtype if i < 2 else x.dtype).requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        loss = call(name, *leaves[:2], labels, temperature=leaves[2], reduction=reduction).sum()
        return dict(zip(wanted, torch.autograd.grad(loss, [leaves[i] for i in wanted]), strict=True))

    together = gradients(0, 1, 2)
    for wanted in ((0,), (1,), (2,)):
        for i, grad in gradients(*wanted).items():
            torch.testing.assert_close(grad, together[i], rtol=1e-6, atol=0)  # parts may be added in another order


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
    torch.library.opcheck(torch.ops.hypercontrast.lse.default, (features, prototypes, labels, counts, *options))


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


def other_classes_elsewhere(rank, world):
    labels = torch.arange(30, device=DEVICE) + 30 * rank
    equals_another_backend_where_absent_classes_are_skipped("blockwise", labels, 70)


def test_classes_of_other_ranks_are_present(tmp_path):
    ranks.spawn(other_classes_elsewhere, 2, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(name, dynamic):
    prototypes = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    weight = torch.rand(5, device=DEVICE)
    torch._dynamo.reset()

    def loss(z, w, y):
        return call(name, 3 * z, w, y, weight=weight).square()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for i, n in enumerate((7, 33) if dynamic else (20,)):
        features = torch.randn(n, 16, device=DEVICE, requires_grad=True)
        labels = torch.randint(0, 5, (n,), device=DEVICE)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):  # one graph serves every batch size
            actual = loss_and_gradients(compiled, features, prototypes, labels)
        want = loss_and_gradients(loss, features, prototypes, labels)
        for a, b in zip(actual, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_of_one_operator_equals_that_of_statistics(name, reduction, monkeypatch):
    """Batches past the kernel of the loss, groups and queues take the other way to the same numbers."""
    features = torch.randn(90, 24, device=DEVICE, requires_grad=True)
    prototypes = torch.randn(40, 24, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 40, (90,), device=DEVICE)
    labels[::8] = -100
    tau = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    options = {"weight": torch.rand(40, device=DEVICE).double(), "temperature": tau, "reduction": reduction}
    calls, results = [], []
    for taken in (True, False):
        monkeypatch.setattr(_launch, "loss_follows_lse", lambda *shape, taken=taken: calls.append(taken) or taken)
        loss = call(name, features, prototypes, labels, **options)
        results.append((loss, *torch.autograd.grad(loss, (features, prototypes, tau))))
    assert calls == [True, False]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize(("empty", "want"), [("align", -8.0), ("zero", 0.0)])
@pytest.mark.parametrize("anchor", ["prototype", "sample", "both"])
def test_nothing_to_push_from(anchor, empty, want):
    features = torch.tensor([[0.8, 0.6], [1.6, 1.2]], device=DEVICE, requires_grad=True)
    prototypes = torch.tensor([[2.0, 0.0]], device=DEVICE, requires_grad=True)
    labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    options = {"anchor": anchor, "backend": "triton", "temperature": 0.1}
    loss = hc.nonl_loss(features, prototypes, labels, empty=empty, **options)
    assert loss.item() == pytest.approx(want, rel=1e-6)
    for grad in torch.autograd.grad(loss, (features, prototypes)):
        assert torch.isfinite(grad).all()
        assert (grad == 0).all() == (empty == "zero")
    with pytest.raises(ValueError, match="empty='error'"):
        hc.nonl_loss(features, prototypes, labels, empty="error", **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_to_average(name, reduction):
    """No samples, all ignored, or all of weight zero."""
    prototypes = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    zeros = torch.zeros(3, device=DEVICE)
    for n, label, weight in ((0, 0, None), (5, -100, None), (5, 1, zeros)):
        features = torch.randn(n, 4, device=DEVICE, requires_grad=True)
        labels = torch.full((n,), label, device=DEVICE)
        loss = call(name, features, prototypes, labels, reduction=reduction, weight=weight)
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, (features, prototypes)):
            assert (grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_class_weights_of_any_layout(name):
    features, prototypes = torch.randn(40, 16, device=DEVICE), torch.randn(7, 16, device=DEVICE)
    labels = torch.randint(0, 7, (40,), device=DEVICE)
    for weight in (torch.rand(7, 2, device=DEVICE)[:, 1], torch.rand(1, device=DEVICE).expand(7)):
        loss, expected = (call(name, features, prototypes, labels, weight=w) for w in (weight, weight.contiguous()))
        assert loss == expected


def test_float32_products_follow_either_switch_of_torch():
    matmul = torch.backends.cuda.matmul
    for switch, on, off in (("fp32_precision", "tf32", "none"), ("allow_tf32", True, False)):
        assert _launch.input_precision(torch.float32) == "tf32x3"
        try:
            setattr(matmul, switch, on)
            assert _launch.input_precision(torch.float32) == "tf32"
        finally:
            setattr(matmul, switch, off)


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
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_no_host_sync(name, reduction):
    features = torch.randn(64, 32, device=DEVICE, requires_grad=True)
    prototypes = torch.randn(10, 32, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 10, (64,), device=DEVICE)
    call(name, features, prototypes, labels, reduction=reduction).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(name, features, prototypes, labels, reduction=reduction).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(("shape", "dtype"), [((256, 1000, 2048), torch.bfloat16), ((200, 30, 64), torch.float16)])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph_of_forward_and_backward(name, learned, shape, dtype):
    """A replay on new inputs gives the bits of eager execution."""
    n, k, d = shape
    features = torch.randn(n, d, device=DEVICE, dtype=dtype, requires_grad=True)
    prototypes = torch.randn(k, d, device=DEVICE, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, k, (n,), device=DEVICE)
    tau = torch.tensor(0.2, device=DEVICE, requires_grad=True) if learned else 0.2
    leaves = (features, prototypes, tau) if learned else (features, prototypes)

    def step():
        loss = call(name, features, prototypes, labels, temperature=tau)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and the library's workspace is made before the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            features.normal_()
            prototypes.normal_()
            labels.random_(0, k)
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
