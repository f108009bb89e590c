"""The prototype losses against closed forms, float64 truth and the edge policy, through the public functions."""

import inspect
import math

import pytest
import torch
from oracle import (
    LOSSES,
    REGIMES,
    laid_out,
    loss_and_gradients,
    prototype_error_over_bound,
    set_regime,
    truth_and_eager,
)

import hypercontrast as hc
from hypercontrast import blockwise, functional, reference

NAMES = list(LOSSES)
BACKENDS = ["reference", "blockwise"]


def call(name, *args, **options):
    function, specific = LOSSES[name]
    return getattr(functional, function)(*args, **specific, **options)


@pytest.fixture(params=REGIMES)
def regime(request, monkeypatch):
    set_regime(request.param, monkeypatch)


def closed_form(name, k, n, tau):
    delta = k / ((k - 1) * tau)
    ce = math.log1p((k - 1) * math.exp(-delta))
    return {
        "normface": ce,
        "ntce": ce + math.log(n),
        "nonl": -delta + math.log(n * (k - 1)),
        "nonl-sample": -delta + math.log(k - 1),
        "nonl-both": -delta + math.log((n + 1) * (k - 1)),
    }[name]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_simplex_etf(name, backend, tau):
    k, n = 6, 4
    frame = hc.simplex_etf(k, 9)
    labels = torch.arange(k).repeat(n)
    loss = call(name, 5 * frame[labels], 0.3 * frame, labels, temperature=tau, backend=backend)
    assert loss.item() == pytest.approx(closed_form(name, k, n, tau), abs=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_nobody_asks_for(regime, name, reduction):
    """Is left out, and the others, with that of a learned temperature, are what they are together."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 6, generator=g), torch.randn(7, 6, generator=g), torch.tensor(0.2)
    labels = torch.arange(40) % 5

    def gradients(*wanted):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        loss = call(name, *leaves[:2], labels, temperature=leaves[2], reduction=reduction, backend="blockwise")
        return dict(zip(wanted, torch.autograd.grad(loss.sum(), [leaves[i] for i in wanted]), strict=True))

    together = gradients(0, 1, 2)
    for wanted in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        for i, grad in gradients(*wanted).items():
            assert torch.equal(grad, together[i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_all_vectors_equal(name, backend):
    k, labels = 5, torch.tensor([0, 0, 0, 1, 2, 2, 4])
    m = len(labels)
    n = torch.bincount(labels, minlength=k)[labels].double()
    want = {
        "normface": math.log(k),
        "ntce": math.log(m),
        "nonl": (m - n).log().mean().item(),
        "nonl-sample": math.log(k - 1),
        "nonl-both": (m - n + k - 1).log().mean().item(),
    }[name]
    same = torch.ones(m, 3, dtype=torch.float64)
    assert call(name, same, same[:k], labels, backend=backend).item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_reductions_and_weights(name, reduction, tau, regime):
    """Against the specification in float64, with class weights and ignored samples."""
    n, k, d = 37, 9, 5
    features, prototypes = torch.randn(n, d).double().requires_grad_(), torch.randn(k, d).double().requires_grad_()
    labels = torch.randint(0, 7, (n,))  # classes 7 and 8 are absent
    labels[::6] = 3
    options = {"temperature": tau, "weight": torch.rand(k).double(), "ignore_index": 3, "reduction": reduction}
    shape = (n,) if reduction == "none" else ()
    upstream = torch.randn(shape).double()
    function, specific = LOSSES[name]
    want, got = (
        loss_and_gradients(getattr(module, function), features, prototypes, labels, upstream, **options, **specific)
        for module in (reference, functional)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    if name in ("ntce", "nonl"):
        assert (got[2][7:] == 0).all(), "prototypes of absent classes must not move"


@pytest.mark.parametrize("name", NAMES)
def test_learned_temperature(name, regime):
    features, prototypes = torch.randn(20, 4).double(), torch.randn(6, 4).double()
    labels = torch.randint(0, 6, (20,))
    grads = []
    for backend in BACKENDS:
        tau = torch.tensor(0.2).double().requires_grad_()
        call(name, features, prototypes, labels, temperature=tau, backend=backend).backward()
        grads.append(tau.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=0)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize("name", [*NAMES, "supcon"])
def test_shape_of_a_learned_temperature(name, shape):
    """A tensor of one float is a number, whatever its dimensions."""
    features, prototypes, labels = torch.randn(20, 4), torch.randn(6, 4), torch.randint(0, 6, (20,))
    found = []
    for tau in (torch.tensor(0.2, requires_grad=True), torch.full(shape, 0.2, requires_grad=True)):
        if name == "supcon":
            loss = hc.supcon_loss(features, labels, temperature=tau, base_temperature=0.07)
        else:
            loss = call(name, features, prototypes, labels, temperature=tau)
        loss.backward()
        found.append((loss, tau.grad.reshape(())))
        assert tau.grad.shape == tau.shape
    assert torch.equal(*map(torch.stack, found))


@pytest.mark.parametrize("name", NAMES)
def test_without_normalisation(name, regime):
    """Long vectors make logits far beyond 1/τ: the running maximum must carry them."""
    features, prototypes = laid_out(30 * torch.randn(25, 6), "contiguous"), laid_out(torch.randn(8, 6), "contiguous")
    labels = torch.randint(0, 8, (25,))
    tensors, options = (features, prototypes, labels), {"temperature": 0.1, "normalize": False}
    truth, eager = truth_and_eager(name, *tensors, **options)
    actual = loss_and_gradients(lambda *a, **o: call(name, *a, **o), *tensors, **options)
    assert prototype_error_over_bound(actual, truth, eager, tensors, temperature=1e-3) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("empty", "want"), [("align", -8.0), ("zero", 0.0)])
@pytest.mark.parametrize("anchor", ["prototype", "sample", "both"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_nothing_to_push_from(backend, empty, want, anchor, reduction, tau):
    """One class in batch and prototypes: the policy decides, and loss and gradients are finite."""
    features = torch.tensor([[0.8, 0.6], [1.6, 1.2]], requires_grad=True)
    prototypes = torch.tensor([[2.0, 0.0]], requires_grad=True)
    labels = torch.zeros(2, dtype=torch.int64)
    options = {"anchor": anchor, "reduction": reduction, "backend": backend, "temperature": tau}
    loss = hc.nonl_loss(features, prototypes, labels, empty=empty, **options)
    assert loss.mean().item() == pytest.approx(want * 0.1 / tau, rel=1e-6)
    for grad in torch.autograd.grad(loss.sum(), (features, prototypes)):
        assert torch.isfinite(grad).all()
        assert (grad == 0).all() == (empty == "zero")
    with pytest.raises(ValueError, match="empty='error'"):
        hc.nonl_loss(features, prototypes, labels, empty="error", **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("anchor", ["prototype", "sample", "both"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ignored_sample_needs_no_negative(backend, anchor, reduction):
    features, prototypes, labels = torch.randn(4, 3), torch.randn(3, 3), torch.tensor([0, 1, -100, 2])
    options = {"anchor": anchor, "reduction": reduction, "backend": backend}
    want = hc.nonl_loss(features, prototypes, labels, **options)
    torch.testing.assert_close(hc.nonl_loss(features, prototypes, labels, empty="error", **options), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_means_leave_out_what_the_loss_ignores(backend, reduction):
    features, prototypes, labels = torch.randn(5, 3), torch.randn(3, 3), torch.tensor([0, 1, 7, 2, 7])
    means = hc.ClassMeans(3, 3)
    hc.ntce_loss(features, prototypes, labels, ignore_index=7, reduction=reduction, class_means=means, backend=backend)
    assert means.counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_does_not_see_the_scale_of_the_weights(name, backend):
    features, prototypes = (torch.randn(n, 4, dtype=torch.float64) for n in (9, 3))
    labels = torch.arange(9) % 3
    want = call(name, features, prototypes, labels, backend=backend)
    for scale in (1e-3, 1e3):
        got = call(
            name, features, prototypes, labels, weight=torch.full((3,), scale, dtype=torch.float64), backend=backend
        )
        assert got.item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_samples_and_all_ignored(name, backend, reduction):
    prototypes = torch.randn(3, 4, requires_grad=True)
    for n in (0, 5):
        features = torch.randn(n, 4, requires_grad=True)
        labels = torch.full((n,), -100)
        loss = call(name, features, prototypes, labels, reduction=reduction, backend=backend)
        assert loss.shape == ((n,) if reduction == "none" else ())
        assert (loss == 0).all()
        for grad in torch.autograd.grad(loss.sum(), (features, prototypes)):
            assert (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_vectors_longer_than_their_dtype_reaches(name, backend):
    """float16 ends at 65504, which lengths of features in it exceed, and so do entries of prototypes in float32."""
    z, w, y = torch.randn(20, 64).clamp(-3, 3).half(), torch.randn(4, 64), torch.arange(20) % 4
    want = call(name, z, w, y, backend=backend)
    got = call(name, z * 2**14, w * 2**17, y, backend=backend)
    assert got.item() == pytest.approx(want.item(), rel=1e-3)


@pytest.mark.parametrize("length", [0, 9e-13])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_zero_vectors_have_no_direction(name, backend, length):
    features, prototypes = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        features[2], prototypes[1] = length / 2, length / 2
    loss = call(name, features, prototypes, torch.tensor([0, 1, 2, 0, 1, 2]), backend=backend)
    grads = torch.autograd.grad(loss, (features, prototypes))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][2] == 0).all()
    assert (grads[1][1] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_block_sizes_do_not_matter(name, monkeypatch):
    features, prototypes = torch.randn(50, 6).double(), torch.randn(20, 6).double()
    labels = torch.randint(0, 20, (50,))
    want = call(name, features, prototypes, labels)
    monkeypatch.setattr(blockwise, "PANEL_CLASSES", 3)
    monkeypatch.setattr(blockwise, "MIN_BLOCK", 7)
    monkeypatch.setattr(blockwise, "TILE_ELEMENTS", 1)
    torch.testing.assert_close(call(name, features, prototypes, labels), want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_gradients_keep_their_dtype(name):
    features = torch.randn(12, 8, dtype=torch.bfloat16, requires_grad=True)
    prototypes = torch.randn(4, 8, requires_grad=True)
    loss = call(name, features, prototypes, torch.randint(0, 4, (12,)))
    grads = torch.autograd.grad(loss, (features, prototypes))
    assert loss.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    features, prototypes = torch.randn(12, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    labels = torch.randint(0, 4, (12,))
    plain = loss_and_gradients(lambda *a: call(name, *a), features, prototypes, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = call(name, features, prototypes, labels)
        grads = torch.autograd.grad(loss, (features, prototypes))
    for a, b in zip(plain, (loss, *grads), strict=True):
        assert torch.equal(a, b.double())


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing_in_the_reference(name):
    """Whose backward is torch's own, and belongs outside."""
    features, prototypes = torch.randn(12, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    labels = torch.randint(0, 4, (12,))
    plain = loss_and_gradients(lambda *a: call(name, *a, backend="reference"), features, prototypes, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = call(name, features, prototypes, labels, backend="reference")
    for a, b in zip(plain, (loss, *torch.autograd.grad(loss, (features, prototypes))), strict=True):
        assert torch.equal(a, b.double())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_class_means_ride_along(name, backend, normalize):
    """They are of unit features, whatever the loss takes."""
    features, labels = torch.randn(30, 5), torch.randint(0, 4, (30,))
    labels[::5] = -100
    riding, direct = hc.ClassMeans(4, 5), hc.ClassMeans(4, 5)
    features[1] = 0
    options = {"normalize": normalize, "backend": backend}
    call(name, features, torch.randn(4, 5), labels, class_means=riding, **options)
    direct.update(features, labels)
    assert torch.equal(riding.counts, direct.counts)
    torch.testing.assert_close(riding.sums, direct.sums, rtol=1e-5, atol=1e-6)


def test_class_means_of_large_collapsed_classes():
    """The same number thousands of times, which float32 would round the same way every time."""
    features, labels = torch.randn(2, 8).repeat(8192, 1), torch.arange(2).repeat(8192)
    riding = hc.ClassMeans(2, 8)
    hc.ntce_loss(features, torch.randn(2, 8), labels, class_means=riding)
    want = torch.nn.functional.normalize(features[:2].double(), dim=1)
    torch.testing.assert_close(riding.sums.double() / 8192, want, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_class_means_of_a_loss_that_raises(backend):
    means, labels = hc.ClassMeans(4, 5), torch.ones(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="empty='error'"):
        hc.nonl_loss(torch.randn(6, 5), torch.randn(4, 5), labels, empty="error", class_means=means, backend=backend)
    assert means.counts.sum() == 0


def test_module_equals_function():
    features, prototypes, labels = torch.randn(9, 4), torch.randn(3, 4), torch.randint(0, 3, (9,))
    weight = torch.tensor([1.0, 2.0, 3.0])
    pairs = [
        (hc.NormFaceLoss(0.3, weight=weight), hc.normface_loss, {}),
        (hc.NTCELoss(temperature=0.3, weight=weight), hc.ntce_loss, {}),
        (hc.NONLLoss(0.3, weight=weight, anchor="both", empty="zero"), hc.nonl_loss, {"anchor": "both"}),
    ]
    for module, function, options in pairs:
        want = function(features, prototypes, labels, temperature=0.3, weight=weight, **options)
        assert torch.equal(module(features, prototypes, labels), want)
        assert not module.state_dict(), "a loss has no state"
    learned = hc.NTCELoss(torch.nn.Parameter(torch.tensor(0.2)))
    learned(features, prototypes, labels).backward()
    assert learned.temperature.grad.abs() > 0


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (hc.NormFaceLoss, hc.normface_loss),
        (hc.NTCELoss, hc.ntce_loss),
        (hc.NONLLoss, hc.nonl_loss),
        (hc.SupConLoss, hc.supcon_loss),
        (hc.CosFaceLoss, hc.cosface_loss),
        (hc.ArcFaceLoss, hc.arcface_loss),
        (hc.LogitAdjustedLoss, hc.logit_adjusted_loss),
        (hc.ProxyAnchorLoss, hc.proxy_anchor_loss),
        (hc.DCLLoss, hc.dcl_loss),
    ],
)
def test_a_module_has_the_defaults_of_its_function(module, function):
    ours, theirs = inspect.signature(module).parameters, inspect.signature(function).parameters
    assert {name: p.default for name, p in ours.items()} == {name: theirs[name].default for name in ours}


def test_driver_baselines():
    logits, labels = torch.randn(7, 3), torch.randint(0, 3, (7,))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got -100"):  # none is ignored
        hc.CELoss()(logits, torch.tensor([0, 1, 2, 0, 1, 2, -100]))
    assert torch.equal(hc.CELoss()(logits, labels), torch.nn.functional.cross_entropy(logits, labels))
    half = logits.bfloat16()
    assert torch.equal(hc.CELoss()(half, labels), torch.nn.functional.cross_entropy(half.float(), labels))
    weighted = hc.CELoss(torch.tensor([0.5, 1.0, 2.0]))
    want = weighted(logits.bfloat16(), labels)
    assert torch.equal(weighted.bfloat16()(logits.bfloat16(), labels), want)
    frame = hc.simplex_etf(3, 4)
    assert hc.ETFDRLoss()(2 * frame[labels], frame, labels).item() == pytest.approx(0, abs=1e-12)
    assert hc.ETFDRLoss()(-frame[labels], frame, labels).item() == pytest.approx(2)


@pytest.mark.parametrize("name", ["ntce", "nonl"])
def test_a_queue_may_hold_classes_that_the_batch_has_not(name):
    labels, queue = 2 * torch.arange(30), (torch.randn(10, 20), torch.arange(10))
    tensors = torch.randn(30, 20, requires_grad=True), torch.randn(70, 20, requires_grad=True), labels
    actual, expected = (
        loss_and_gradients(lambda *a, b=b: call(name, *a, backend=b, queue=queue), *tensors)
        for b in ("blockwise", "reference")
    )
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ntce", "nonl"])
@pytest.mark.parametrize("n", [0, 2])
def test_nothing_to_average_beside_a_queue(name, backend, n):
    z, w = torch.randn(n, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    tau = torch.tensor(0.1, requires_grad=True)
    past = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    torch.use_deterministic_algorithms(True)  # memory that nothing has written then holds NaN
    try:
        loss = call(name, z, w, torch.full((n,), -100), temperature=tau, queue=past, backend=backend)
        grads = torch.autograd.grad(loss, (z, w, tau))
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss == 0
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, w, y, **options: hc.nonl_loss(z, w, y, **options),
        lambda z, w, y, **options: hc.cosface_loss(z, w, y, **options),
        lambda z, w, y, **options: hc.arcface_loss(z, w, y, **options),
        lambda z, w, y, **options: hc.proxy_anchor_loss(z, w, y, **options),
        lambda z, w, y, **options: hc.supcon_loss(z, y, base_temperature=0.07, **options),
        lambda z, w, y, **options: hc.dcl_loss(z.view(-1, 2, 6), **options),
    ],
    ids=["nonl", "cosface", "arcface", "proxy-anchor", "supcon", "dcl"],
)
def test_a_temperature_of_another_dtype_is_what_it_says(loss, dtype, backend):
    """Nothing that is made of it is rounded to its dtype, and the loss keeps the features'."""
    torch.manual_seed(0)
    z, w, y = torch.randn(8, 6), torch.randn(3, 6), torch.arange(8) % 3
    tau = torch.tensor(0.0371, dtype=dtype, requires_grad=True)
    found = loss(z, w, y, temperature=tau, backend=backend)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss(z, w, y, temperature=tau.item(), backend=backend).item(), rel=2e-6)
    assert torch.autograd.grad(found, tau)[0].dtype == dtype
