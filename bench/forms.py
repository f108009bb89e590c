"""What the benchmarks run: the losses as eager code writes them, ours, their inputs, a step, an error.

A form is a function of (*leaves, labels): leaves are (features, prototypes) for the prototype losses, (features,) for
SupCon. Eager forms compute in the inputs' dtype and reduce in float32, as a careful user would write them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import hypercontrast as hc
from hypercontrast import reference

TAU = 0.1


def _logits(z, w):
    return (F.normalize(w, dim=1) @ F.normalize(z, dim=1).T / TAU).float()


def _own(s, y):
    return s[y, torch.arange(len(y), device=y.device)]


def ntce_pairwise(z, w, y):
    """NTCE as an M x M matrix: the prototype of each sample against all samples."""
    s = _logits(z, w[y])
    return (s.logsumexp(1) - s.diagonal()).mean()


def ntce_eager(z, w, y):
    """NTCE with each class's row computed once."""
    s = _logits(z, w)
    return (s.logsumexp(1)[y] - _own(s, y)).mean()


def nonl_eager(z, w, y):
    s = _logits(z, w)
    own = y[None, :] == torch.arange(len(w), device=y.device)[:, None]
    return (s.masked_fill(own, -torch.inf).logsumexp(1)[y] - _own(s, y)).mean()


def normface_eager(z, w, y):
    return F.cross_entropy((F.normalize(z, dim=1) @ F.normalize(w, dim=1).T / TAU).float(), y)


def supcon_dense(z, y):
    """SupCon with the N x N matrices that its published code makes: logits less their row maximum, two masks, their
    exponentials and the log-probabilities of all pairs.
    """
    u = F.normalize(z, dim=1)
    s = (u @ u.T / TAU).float()
    s = s - s.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(y), device=y.device)
    positive = (y[:, None] == y).float() * others
    log_prob = s - (s.exp() * others).sum(1, keepdim=True).log()
    return -((positive * log_prob).sum(1) / positive.sum(1)).mean()


EAGER: dict[str, dict[str, Callable]] = {
    "ntce": {"eager M x M": ntce_pairwise, "eager K x M": ntce_eager},
    "nonl": {"eager K x M": nonl_eager},
    "normface": {"eager K x M": normface_eager},
    "supcon": {"dense N x N": supcon_dense},
}
PROTOTYPE_LOSSES = ("ntce", "nonl", "normface")


def ours(name: str, backend: str) -> Callable:
    loss = getattr(hc, f"{name}_loss")
    return lambda *leaves_and_labels: loss(*leaves_and_labels, temperature=TAU, backend=backend)


def truth(name: str) -> Callable:
    """The loss to compare with, for float64 leaves: the specification, or blockwise where that would not fit."""
    if name == "supcon":
        return ours(name, "blockwise")
    return lambda z, w, y: getattr(reference, f"{name}_loss")(z, w, y, temperature=TAU)


def inputs(
    name: str, m: int, k: int, d: int, *, spread: float | None = None, device="cpu", dtype=torch.float32
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(leaves, labels): random features, or features within `spread` of their class's direction."""
    g = torch.Generator(device).manual_seed(0)
    y = torch.randint(0, k, (m,), generator=g, device=device)
    w = torch.randn(k, d, generator=g, device=device)
    z = torch.randn(m, d, generator=g, device=device)
    if spread is not None:
        z = w[y] + spread * z
    leaves = (z, w) if name in PROTOTYPE_LOSSES else (z,)
    return tuple(x.to(dtype).requires_grad_() for x in leaves), y


def step(form: Callable, leaves: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    """Loss and gradients."""
    loss = form(*leaves, y)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def relative_error(name: str, form: Callable, leaves: Sequence[Tensor], y: Tensor) -> float:
    """Largest relative error (Frobenius) of loss and gradients against float64 on the same inputs."""
    wide = [x.detach().double().requires_grad_() for x in leaves]
    got, want = step(form, leaves, y), step(truth(name), wide, y)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def products(name: str, leaves: Sequence[Tensor]) -> Callable[[], None]:
    """The matrix products alone that a step cannot do without: 3·2MKD, or 4·A²D for pairs against themselves."""
    z, other = leaves[0].detach(), leaves[-1].detach()
    s, out = z.new_empty(len(z), len(other)), torch.empty_like(z)
    weights = torch.randn_like(s)
    if name == "supcon":

        def run():
            torch.mm(z, z.T, out=s)
            torch.mm(weights, z, out=out)

        return run
    out_other = torch.empty_like(other)

    def run():
        torch.mm(z, other.T, out=s)
        torch.mm(weights, other, out=out)
        torch.mm(weights.T, z, out=out_other)

    return run
