"""Upstream gradients of every memory layout, against float64: `gradcheck` tries contiguous ones alone."""

import pytest
import torch
from oracle import LOSSES

import hypercontrast as hc
from hypercontrast import functional

N, K = 24, 5
# layout → (an upstream gradient of N losses, one of their sum), as parts of a tensor [2N, 3]
LAYOUTS = {
    "contiguous": (lambda x: x[:N, 0].contiguous(), lambda x: x[0, 0].clone()),
    "transposed": (lambda x: x[:N].T[1], lambda x: x.T[1, 2]),
    "expanded": (lambda x: x[1, 1].expand(N), lambda x: x[:1, 1].expand(2)[1]),
    "sliced": (lambda x: x[1::2, 2], lambda x: x[4:, 1:][3, 1]),
}
SUPCON = {"supcon-out": {"variant": "out"}, "supcon-in": {"variant": "in"}}


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
@pytest.mark.parametrize("name", [*LOSSES, *SUPCON])
def test_upstream_layouts(name, backend, figure):
    dtype, tolerance, device = torch.float64, 1e-12, torch.device("cpu")
    if backend == "triton":
        pytest.importorskip("triton")
        dtype, tolerance, device = torch.float32, 1e-4, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = torch.randint(0, K, (N,), device=device)
    features, prototypes = (torch.randn(rows, 6, dtype=dtype, device=device) for rows in (N, K))

    def gradients(backend, dtype, upstream, reduction):
        leaves = [x.to(dtype).requires_grad_() for x in (features, prototypes)]
        options = {"temperature": 0.2, "reduction": reduction, "backend": backend}
        if name in SUPCON:
            del leaves[1]
            loss = hc.supcon_loss(*leaves, labels, **options, **SUPCON[name])
        else:
            function, specific = LOSSES[name]
            loss = getattr(functional, function)(*leaves, labels, **options, **specific)
        return torch.autograd.grad(loss, leaves, upstream)

    held = []
    for layout, parts in LAYOUTS.items():
        for reduction, part in zip(("none", "sum"), parts, strict=True):
            upstream = part(torch.randn(2 * N, 3, dtype=dtype, device=device))
            got = gradients(backend, dtype, upstream, reduction)
            want = gradients("reference", torch.float64, upstream.double(), reduction)
            assert all((a.double() - b).norm() <= tolerance * b.norm() for a, b in zip(got, want, strict=True)), (
                f"{layout} upstream gradient, reduction={reduction!r}"
            )
        held.append(layout)
    figure("R3", f"{name}, {backend}: {len(held)}/{len(LAYOUTS)} layouts, each with reduction none and sum")
