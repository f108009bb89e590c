"""SupCon with backend="triton" through the public function: on a GPU when there is one, else in Triton's interpreter."""

import pytest
import torch
from test_fuzz import fuzz_report
from test_supcon import Draw, draw_error_over_bound, draws
from test_triton import DEVICE, DTYPES, QUICK, is_mixed

import hypercontrast as hc
from hypercontrast.kernels import _launch

pytest.importorskip("triton")
SIZES = (0, 1, 2, 17, 100, 127, 252, 300)


@pytest.mark.parametrize("count", [QUICK, pytest.param(220, marks=pytest.mark.slow)])
def test_fuzz(count, figure):
    problems = [draw for draw in draws(count, 31, DTYPES, SIZES) if not is_mixed(draw)]
    figure(
        "R2", fuzz_report(f"SupCon, Triton on {DEVICE}", problems, lambda d: draw_error_over_bound(d, "triton", DEVICE))
    )


def test_repeats_bitwise():
    z, y = torch.randn(300, 40, device=DEVICE, requires_grad=True), torch.randint(0, 9, (300,), device=DEVICE)
    runs = []
    for _ in range(3):
        loss = hc.supcon_loss(z, y, backend="triton")
        runs.append((loss.detach(), *torch.autograd.grad(loss, z)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("base_temperature", [None, 0.07])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("singletons", ["exclude", "zero"])
def test_singletons_and_scale_equal_blockwise(singletons, reduction, base_temperature, monkeypatch):
    """Also where all anchors are singletons. The kernel of the loss takes several steps."""
    monkeypatch.setattr(_launch, "PAIR_LOSS_BLOCKS", {"BLOCK": 16, "num_warps": 4})
    options = {"singletons": singletons, "reduction": reduction, "base_temperature": base_temperature}
    z = torch.randn(40, 12, device=DEVICE, requires_grad=True)
    for num_classes in (25, 2**62):
        y = torch.randint(-num_classes, num_classes, (40,), device=DEVICE)
        results = []
        for backend in ("triton", "blockwise"):
            loss, alone = hc.supcon_loss(z, y, return_singletons=True, backend=backend, **options)
            upstream = torch.linspace(0.5, 2, loss.numel(), device=DEVICE).reshape(loss.shape)
            results.append((loss.detach(), alone, *torch.autograd.grad(loss, z, upstream)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["labels", "refs", "queue"])
def test_learned_temperature_equals_blockwise(form):
    leaves, _ = Draw(form, 60, 4, 20, torch.float32, 0.1, None, None, "contiguous", "out", "exclude", "mean", 3).make(
        DEVICE
    )
    y = torch.randint(0, 4, (60,), device=DEVICE)
    extra = {"refs": {"ref_features": leaves[1], "ref_labels": y}, "queue": {"queue": (leaves[1].detach(), y)}}
    results = []
    for backend in ("triton", "blockwise"):
        tau = torch.tensor(0.2, device=DEVICE, requires_grad=True)
        loss = hc.supcon_loss(leaves[0], y, temperature=tau, backend=backend, **extra.get(form, {}))
        results.append((loss.detach(), *torch.autograd.grad(loss, (leaves[0], tau))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1, want.abs().max().item()))


@pytest.mark.parametrize("inside", [False, True])
def test_opcheck(inside):
    z, ref = (torch.randn(n, 6, device=DEVICE, requires_grad=True) for n in (9, 5))
    y = torch.arange(9, device=DEVICE) % 3
    for args in ((z, None, y, y, None, None, 0), (z, ref, y, y[:5], None, None, None)):
        torch.library.opcheck(torch.ops.hypercontrast.pair_lse.default, (*args, 5.0, True, inside, "triton"))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("form", ["labels", "views", "mask", "refs", "queue"])
def test_no_host_sync(form):
    leaves, loss = Draw(form, 64, 5, 32, torch.bfloat16, 0.1, None, None, "contiguous", "out", "zero", "mean", 7).make(
        DEVICE
    )
    loss(*leaves, "triton").backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(*leaves, "triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
