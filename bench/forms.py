"""What the bench runs: the losses as eager code writes them, ours, their inputs, a step, its error and its bound.

A form is a function of (*leaves, labels): leaves are (features, prototypes) for the prototype losses, (features,) for
SupCon. Eager forms compute in the inputs' dtype and reduce in float32, as a careful user would write them; of NTCE and
SupCon there is also the one of their published code. The last one of a loss does the least work: it is the yardstick of
errors and the honest baseline of times. Classes that a batch lacks take no part in NTCE and NONL: where there are more
classes than samples, their forms compute a row a sample. A list of the classes that are there would save a few rows
more, but a GPU's host waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

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
EPS = 2**-23  # of float32
TF32_EPS = 2**-10
ERROR_LOGITS = 1 << 22  # that a float64 truth is computed of
ERROR_SAMPLES = (1024, 4096)  # of a prototype loss, whose specification may be N x N: at least, at most
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
    y = _labels(labels, name, m, k, g)
    w = torch.randn(k, d, generator=g, device=device)
    z = torch.randn(m, d, generator=g, device=device)
    if spread is not None:
        z = w[y] + spread * z
    leaves = (z, w) if name in PROTOTYPE_LOSSES else (z,)
    return tuple(x.to(dtype).requires_grad_() for x in leaves), y


def _labels(kind: str, name: str, m: int, k: int, g: torch.Generator) -> Tensor:
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
    views = 2 if name == "supcon" else 1
    if m != views * k:
        raise ValueError(f"labels=instances needs N = {views}K for {name}, got N={m} K={k}")
    return torch.arange(k, device=g.device).repeat(views)


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


def reduced(case: Case) -> Case:
    """The case at a size that float64 can do: fewer samples, of the same classes, width and temperature. SupCon's
    classes shrink with its samples, so that an anchor keeps its number of positives.
    """
    low, high = ERROR_SAMPLES
    enough = math.isqrt(ERROR_LOGITS) if case.op == "supcon" else min(max(low, ERROR_LOGITS // case.k), high)
    least = min(case.n, enough)
    if case.op != "supcon" and case.labels != "instances":
        return case._replace(n=least)
    views = case.n // case.k if case.labels == "instances" else 1
    return case._replace(n=least // views * views, k=max(min(2, case.k), case.k * least // case.n))


def logits(case: Case) -> int:
    """How many logits a loss has."""
    return case.n * (case.n if case.op == "supcon" else case.k)


def tangential(gradient: Tensor, vectors: Tensor) -> Tensor:
    """Each row g of a gradient without its part along its own vector x: g - (g·x) x/|x|².

    A loss of directions does not change with a vector's length, so its true gradient is all tangential; a part along
    the vector is rounding, large where the gradient is small. Near collapse what turns a vector is all that matters.
    """
    along = (gradient * vectors).sum(1, keepdim=True) / (vectors * vectors).sum(1, keepdim=True)
    return gradient - along * vectors


def columns(op: str, leaves: Sequence[Tensor], y: Tensor) -> Tensor:
    """What the samples' logits are with: prototypes, of NTCE and NONL those of classes in the batch; or the samples."""
    return leaves[-1][y.unique()] if op in ("ntce", "nonl") else leaves[-1]


def deviation(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """Largest relative difference (Frobenius); NaN where one is not a number."""
    found = [_relative((a.double() - b).norm().item(), b.norm().item()) for a, b in zip(got, want, strict=True)]
    return math.nan if any(map(math.isnan, found)) else max(found)


def _relative(distance: float, size: float) -> float:
    return distance / size if size else math.inf if distance else 0.0


class Judged(NamedTuple):
    """Errors of a step against float64, as in `record.Row`, and why it is wrong, if it is.

    apart: how far it may be from the yardstick's step, in units of `_rounding`, a number for each part: as far as it
    may be from float64 and the yardstick is.
    """

    error: float
    tangential_error: float
    reason: str
    apart: tuple[float, ...] = ()


def judge(case: Case, leaves: Sequence[Tensor], y: Tensor, steps: Mapping[str, Sequence[Tensor]]) -> dict[str, Judged]:
    """Of each form's loss and gradients on the same inputs. The eager forms among them set the limits, and are never
    wrong themselves.
    """
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = _parts(step(truth(case.op, case.temperature), wide, y), leaves)
    got = {name: _parts(outputs, leaves) for name, outputs in steps.items()}
    eager = [got[name] for name in EAGER[case.op] if name in got]
    floors = _rounding(case, leaves, y, want)
    limits = [
        max(2 * min((d for of in eager if math.isfinite(d := _distance(of[i], want[i]))), default=0.0), floor)
        for i, floor in enumerate(floors)
    ]
    nearest = got.get(yardstick(case.op), want)
    apart = tuple(
        (limit + _distance(a, b)) / floor if floor else math.inf
        for limit, floor, a, b in zip(limits, floors, nearest, want, strict=True)
    )
    first = 1 + len(leaves)
    return {
        name: Judged(
            deviation(mine[:first], want[:first]),
            deviation(mine[first:], want[first:]),
            "" if name in EAGER[case.op] else _excess(mine, want, limits),
            apart,
        )
        for name, mine in got.items()
    }


def differs(
    case: Case,
    leaves: Sequence[Tensor],
    y: Tensor,
    apart: Sequence[float],
    got: Sequence[Tensor],
    eager: Sequence[Tensor],
) -> str:
    """Why a step is wrong beside the yardstick's of the same inputs, if it is: at a size that float64 cannot do.

    `apart` is that of the reduced case. A loss may be off by a rounding of a logit in either form, for in one number
    the errors of fewer samples may have cancelled. Roundings that samples share, as of a prototype's direction, add up
    where a gradient's own terms cancel, by the root of their number; and a class's positives are summed one by one.
    Of float16 the loss alone is compared: what a logit of many samples has of a gradient is less than its smallest
    number, and eager gradients vanish.
    """
    want = _parts(eager, leaves)
    if not all(x.isfinite().all() for x in want):
        return ""
    more, one_by_one = math.sqrt(case.n / reduced(case).n), EPS * y.bincount().max().item()
    limits = [
        more * times * floor + one_by_one * unit
        for times, floor, unit in zip(apart, _rounding(case, leaves, y, want), _units(case, leaves, y), strict=True)
    ]
    limits[0] += 2 * torch.finfo(DTYPES[case.dtype]).eps / case.temperature
    compared = 1 if case.dtype == "float16" else len(limits)
    reason = _excess(_parts(got, leaves)[:compared], want[:compared], limits[:compared])
    return reason and f"at full size, beside {yardstick(case.op)}, {reason}"


def _parts(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """In float64: the loss, the gradients, and the gradients' tangential parts."""
    loss, *gradients = (x.double() for x in outputs)
    return [loss, *gradients, *(tangential(g, x.detach().double()) for g, x in zip(gradients, leaves, strict=True))]


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).norm().item()


def _units(case: Case, leaves: Sequence[Tensor], y: Tensor) -> list[float]:
    """How large what cancels in each of the parts is: a logit, or the positives' share of a gradient."""
    scale = 1 / case.temperature
    lengths = [x.detach().double().norm(dim=1) for x in leaves]
    shares = [torch.full_like(lengths[0], 2 if case.op == "supcon" else 1), torch.bincount(y, minlength=case.k)]
    positive = [(share / length).norm().item() * scale / case.n for share, length in zip(shares, lengths, strict=False)]
    return [scale, *positive, *positive]


def _rounding(case: Case, leaves: Sequence[Tensor], y: Tensor, want: Sequence[Tensor]) -> list[float]:
    """How far rounding alone may take each of the parts from float64's.

    A logit of size 1/τ is rounded in float32, hence so are the loss and every exponential: by a unit in the last place,
    five times what all forms do on random features. A probability near 1 less its positive's 1 leaves roundings of one
    positive's gradient, up to 8, which is all that counts near collapse. Results are rounded to their dtype and to its
    smallest numbers.
    """
    info = torch.finfo(DTYPES[case.dtype])
    found = []
    for i, (part, unit) in enumerate(zip(want, _units(case, leaves, y), strict=True)):
        size = part.norm().item()
        floor = EPS * (size * (1 + 1 / case.temperature) + (8 if i else 1) * unit)
        if case.dtype == "tf32":
            floor += TF32_EPS * (size + unit)
        elif i:
            floor += info.eps * (size + info.smallest_normal * math.sqrt(part.numel()))
        found.append(floor)
    return found


def _excess(got: Sequence[Tensor], want: Sequence[Tensor], limits: Sequence[float]) -> str:
    names = ["loss", *(f"{kind} {i}" for kind in ("gradient", "tangential gradient") for i in range(len(want) // 2))]
    for name, a, b, limit in zip(names, got, want, limits, strict=True):
        if not _distance(a, b) <= limit:  # so that NaN is wrong too
            return f"{name} is off by {_distance(a, b):.1e} of {b.norm().item():.1e}, {limit:.1e} allowed"
    return ""


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
