"""What the bench runs: the losses as eager code writes them, ours, their inputs, a step, and its bare products.

A form is a function of (*leaves, labels): leaves are (features, prototypes) for the prototype losses, (features,) for
SupCon. Eager forms compute in the inputs' dtype and reduce in float32, as a careful user would write them; of NTCE and
SupCon there is also the one of their published code. The last one of a loss does the least work: it is the yardstick of
errors and the honest baseline of times. Classes that a batch lacks take no part in NTCE and NONL: where there are more
classes than samples, their forms compute a row a sample. A list of the classes that are there would save a few rows
more, but a GPU's host waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import hypercontrast as hc
from bench.record import Case
from hypercontrast import reference
from hypercontrast.config import UsageError
from hypercontrast.tiles import product_

TAU = 0.1
COLLAPSED = 1e-2  # distance of collapsed features from their class's direction, in units of its length
TAIL = 0.01  # the rarest class's share of the most frequent one's samples, in a long tail
LABELS = ("uniform", "longtail", "single", "instances")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRODUCT_LOGITS = 1 << 26  # that bare products are computed of at once


def _logits(z, w, temperature):
    return (F.normalize(w, dim=1) @ F.normalize(z, dim=1).T / temperature).float()


def _own(s, y):
    return s[y, torch.arange(len(y), device=y.device)]


def ntce_pairwise(z, w, y, temperature=TAU):
    """NTCE as an M x M matrix: the prototype of each sample against all samples."""
    s = _logits(z, w[y], temperature)
    return (s.logsumexp(1) - s.diagonal()).mean()


def ntce_eager(z, w, y, temperature=TAU):
    """NTCE with each class's row computed once or, of more classes than samples, each sample's."""
    if len(w) > len(y):
        return ntce_pairwise(z, w, y, temperature)
    s = _logits(z, w, temperature)
    return (s.logsumexp(1)[y] - _own(s, y)).mean()


def nonl_pairwise(z, w, y, temperature=TAU):
    s = _logits(z, w[y], temperature)
    return (s.masked_fill(y[:, None] == y, -torch.inf).logsumexp(1) - s.diagonal()).mean()


def nonl_eager(z, w, y, temperature=TAU):
    """NONL, likewise."""
    if len(w) > len(y):
        return nonl_pairwise(z, w, y, temperature)
    s = _logits(z, w, temperature)
    own = y[None, :] == torch.arange(len(w), device=y.device)[:, None]
    return (s.masked_fill(own, -torch.inf).logsumexp(1)[y] - _own(s, y)).mean()


def normface_eager(z, w, y, temperature=TAU):
    return F.cross_entropy((F.normalize(z, dim=1) @ F.normalize(w, dim=1).T / temperature).float(), y)


def supcon_published(z, y, temperature=TAU):
    """SupCon with the N x N matrices that its published code makes: logits less their row maximum, two masks, their
    exponentials and the log-probabilities of all pairs. Anchors without positives are left out of the mean.
    """
    u = F.normalize(z, dim=1)
    s = (u @ u.T / temperature).float()
    s = s - s.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(y), device=y.device)
    positive = (y[:, None] == y).float() * others
    log_prob = s - (s.exp() * others).sum(1, keepdim=True).log()
    count = positive.sum(1)
    return -((positive * log_prob).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum()


def supcon_lean(z, y, temperature=TAU):
    """SupCon with one N x N matrix: its rows' logsumexp without the diagonal, and the positives of an anchor by the sum
    of its class. Labels lie below N.
    """
    u = F.normalize(z, dim=1)
    lse = ((u / temperature) @ u.T).float().fill_diagonal_(-torch.inf).logsumexp(1)
    u = u.float()
    own = torch.zeros_like(u).index_add(0, y, u)[y] - u
    count = torch.zeros_like(lse).index_add(0, y, torch.ones_like(lse))[y] - 1
    positive = (u * own).sum(1) / temperature / count.clamp(min=1)
    return ((lse - positive) * (count > 0)).sum() / (count > 0).sum()


EAGER: dict[str, dict[str, Callable]] = {
    "ntce": {"eager M x M": ntce_pairwise, "eager K x M": ntce_eager},
    "nonl": {"eager K x M": nonl_eager},
    "normface": {"eager K x M": normface_eager},
    "supcon": {"published N x N": supcon_published, "eager N x N": supcon_lean},
}
PROTOTYPE_LOSSES = ("ntce", "nonl", "normface")


def yardstick(op: str) -> str:
    """The name of the eager form that does the least work."""
    return list(EAGER[op])[-1]


def ours(name: str, backend: str = "auto", temperature: float = TAU) -> Callable:
    return partial(getattr(hc, f"{name}_loss"), temperature=temperature, backend=backend)


def truth(name: str, temperature: float = TAU) -> Callable:
    """The specification, for float64 leaves."""
    loss = partial(getattr(reference, f"{name}_loss"), temperature=temperature)
    return (lambda *inputs: loss(*inputs)[0]) if name == "supcon" else loss


def inputs(
    name: str, m: int, k: int, d: int, *, spread: float | None = None, device="cpu", dtype=torch.float32,
    labels: str = "uniform",
) -> tuple[tuple[Tensor, ...], Tensor]:  # fmt: skip
    """(leaves, labels): random features, or features within `spread` of their class's direction."""
    g = torch.Generator(device).manual_seed(0)
    y = _labels(labels, m, k, g)
    w = torch.randn(k, d, generator=g, device=device)
    z = torch.randn(m, d, generator=g, device=device)
    if spread is not None:
        z = w[y] + spread * z
    leaves = (z, w) if name in PROTOTYPE_LOSSES else (z,)
    return tuple(x.to(dtype).requires_grad_() for x in leaves), y


def _labels(kind: str, m: int, k: int, g: torch.Generator) -> Tensor:
    """[m]: every class as likely; exponentially rarer ones; one class; or a class an instance (SupCon: its two views).

    The last makes NormFace square InfoNCE and SupCon NT-Xent, so that losses of images and texts, or of views, compare.
    """
    if kind == "uniform":
        return torch.randint(0, k, (m,), generator=g, device=g.device)
    if kind == "longtail":
        share = TAIL ** torch.linspace(0, 1, k, device=g.device)
        return torch.multinomial(share, m, replacement=True, generator=g)
    if kind == "single":
        return torch.zeros(m, dtype=torch.int64, device=g.device)
    return torch.arange(k, device=g.device).repeat(m // k)


def check(case: Case) -> None:
    """UsageError, which names the argument, for a case that no form can have."""
    if min(case.n, case.k, case.d) < 1:
        raise UsageError(f"--shape must be positive, got {case.n} {case.k} {case.d}")
    if not 0 < case.temperature < math.inf:
        raise UsageError(f"--temperature must be positive and finite, got {case.temperature}")
    if case.op == "buffer" and case != Case(*case[:5], ranks=case.ranks):  # which it would not heed
        raise UsageError("--op buffer has one kind of samples: leave out --labels, --temperature, --features")
    views = 2 if case.op == "supcon" else 1
    if case.op == "supcon" and case.k > case.n:  # whose eager form sums classes into N rows
        raise UsageError(f"--shape needs K <= N for supcon, got {case.n} {case.k}")
    if case.labels == "instances" and case.op in EAGER and case.n != views * case.k:
        raise UsageError(f"--labels instances needs N = {views}K for {case.op}, got {case.n} {case.k}")


def of_case(case: Case, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """`inputs` of a case."""
    spread = COLLAPSED if case.features == "collapsed" else None
    options = {"spread": spread, "device": device, "dtype": DTYPES[case.dtype], "labels": case.labels}
    return inputs(case.op, case.n, case.k, case.d, **options)


def step(form: Callable, leaves: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    """Loss and gradients."""
    loss = form(*leaves, y)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def columns(op: str, leaves: Sequence[Tensor], y: Tensor) -> Tensor:
    """What the samples' logits are with: prototypes, of NTCE and NONL those of classes in the batch; or the samples."""
    return leaves[-1][y.unique()] if op in ("ntce", "nonl") else leaves[-1]


def products(name: str, leaves: Sequence[Tensor], y: Tensor) -> Callable[[], None]:
    """The matrix products alone that a step cannot do without: 3·2MKD, or 4·A²D for pairs against themselves.

    K are the classes of `columns`. By rows, where all logits would take more than PRODUCT_LOGITS. On a CPU by the
    library that ours takes, which need not be that of torch.mm, and in float32 as ours: torch's products of half types
    take many times as long there.
    """
    z, other = leaves[0].detach(), columns(name, leaves, y).detach()
    if z.device.type == "cpu":
        z, other = z.float(), other.float()
    rows = min(len(z), max(1024, PRODUCT_LOGITS // len(other)))
    s, out = z.new_empty(rows, len(other)), torch.empty_like(z)
    weights = torch.randn_like(s)
    out_other = torch.zeros_like(other)

    def run() -> None:
        for z_R, out_R in zip(z.split(rows), out.split(rows), strict=True):
            s_R, weights_R = s[: len(z_R)], weights[: len(z_R)]
            product_(z_R, other.T, s_R)
            product_(weights_R, other, out_R)
            if name in PROTOTYPE_LOSSES:
                product_(weights_R.T, z_R, out_other, add=rows < len(z))

    return run
