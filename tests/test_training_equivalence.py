"""A hundred steps of training with the fused losses and with eager ones: the same curve, not only the same first step."""

import pytest
import torch
from oracle import LOSSES
from torch import nn

import hypercontrast as hc
from hypercontrast import functional

STEPS, SAMPLES, CLASSES, PIXELS, DIM = 100, 64, 10, 32, 16
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
SUPCON = {"supcon-out": {"variant": "out"}, "supcon-in": {"variant": "in"}}
TRITON = pytest.param("triton", marks=() if torch.cuda.is_available() else pytest.mark.slow)


class Network(nn.Module):
    """Two layers and prototypes: bfloat16 under autocast, as in training, with weights in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 48), nn.ReLU(), nn.Linear(48, DIM))
        self.prototypes = nn.Parameter(torch.randn(CLASSES, DIM))


def curve(name: str, backend: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    """The losses of training on clusters that overlap, every run with the same batches."""
    network = Network().to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(CLASSES, PIXELS, generator=generator)
    losses = []
    for _ in range(STEPS):
        labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        images = centres[labels] + torch.randn(SAMPLES, PIXELS, generator=generator)
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            features = network.encoder(images)
        assert features.dtype == dtype
        if name in SUPCON:
            loss = hc.supcon_loss(features, labels, backend=backend, **SUPCON[name])
        else:
            function, specific = LOSSES[name]
            loss = getattr(functional, function)(features, network.prototypes, labels, backend=backend, **specific)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", ["blockwise", TRITON])
@pytest.mark.parametrize("name", [*LOSSES, *SUPCON])
def test_fused_and_eager_losses_train_alike(name, backend, dtype, figure):
    device = "cpu"
    if backend == "triton":
        pytest.importorskip("triton")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    fused, eager = (curve(name, b, dtype, device) for b in (backend, "reference"))
    assert eager[-10:].mean() < eager[:10].mean() - 0.1, "nothing was learned, so nothing was compared"
    # Relative to the curve's own size: NONL passes through zero on its way.
    gap = ((fused - eager).abs() / eager.abs().clamp(min=1)).max().item()
    assert gap <= TOLERANCES[dtype]
    what = str(dtype).removeprefix("torch.")
    figure(
        "R16",
        f"{name}, {backend} on {device}, {what}: {len(fused)} steps, largest gap {gap:.1e} of {TOLERANCES[dtype]:.0e}",
    )
