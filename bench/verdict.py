"""Whether a form is right: its errors against float64, and the bound past which it is wrong.

Float64 cannot do a large case, so `judge` looks at the case of `reduced`: fewer samples, the same classes, width and
temperature. `differs` looks at the case itself, beside the eager form that does the least work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench import forms
from bench.record import Case

EPS = 2**-23  # of float32
TF32_EPS = 2**-10
ERROR_LOGITS = 1 << 22  # that a float64 truth is computed of
ERROR_SAMPLES = (1024, 4096)  # of a prototype loss, whose specification may be N x N: at least, at most


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


def deviation(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """Largest relative difference (Frobenius); NaN where one is not a number."""
    found = [_relative((a.double() - b).norm().item(), b.norm().item()) for a, b in zip(got, want, strict=True)]
    return math.nan if any(map(math.isnan, found)) else max(found)


def _relative(distance: float, size: float) -> float:
    return distance / size if size else math.inf if distance else 0.0


class Judged(NamedTuple):
    """Errors of a step against float64, as in `record.Row`, and why it is wrong, if it is.

    apart: how far it may be from the yardstick's step, for each part and in units of `_rounding`: its own limit, and
    how far the yardstick is from float64.
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
    want = _parts(forms.step(forms.truth(case.op, case.temperature), wide, y), leaves)
    got = {name: _parts(outputs, leaves) for name, outputs in steps.items()}
    eager = [got[name] for name in forms.EAGER[case.op] if name in got]
    floors = _rounding(case, leaves, y, want)
    limits = [
        max(2 * min((d for of in eager if math.isfinite(d := _distance(of[i], want[i]))), default=0.0), floor)
        for i, floor in enumerate(floors)
    ]
    nearest = got.get(forms.yardstick(case.op), want)
    apart = tuple(
        (limit + _distance(a, b)) / floor if floor else math.inf
        for limit, floor, a, b in zip(limits, floors, nearest, want, strict=True)
    )
    first = 1 + len(leaves)
    return {
        name: Judged(
            deviation(mine[:first], want[:first]),
            deviation(mine[first:], want[first:]),
            "" if name in forms.EAGER[case.op] else _excess(mine, want, limits),
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
    limits[0] += 2 * torch.finfo(forms.DTYPES[case.dtype]).eps / case.temperature
    compared = 1 if case.dtype == "float16" else len(limits)
    reason = _excess(_parts(got, leaves)[:compared], want[:compared], limits[:compared])
    return reason and f"at full size, beside {forms.yardstick(case.op)}, {reason}"


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
    info = torch.finfo(forms.DTYPES[case.dtype])
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


def tangential(gradient: Tensor, vectors: Tensor) -> Tensor:
    """Each row g of a gradient without its part along its own vector x: g - (g·x) x/|x|².

    A loss of directions does not change with a vector's length, so its true gradient is all tangential; a part along
    the vector is rounding, large where the gradient is small. Near collapse what turns a vector is all that matters.
    """
    along = (gradient * vectors).sum(1, keepdim=True) / (vectors * vectors).sum(1, keepdim=True)
    return gradient - along * vectors
