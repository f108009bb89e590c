"""Whether a form is right: its errors against float64, and the bound past which it is wrong.

Float64 cannot do a large case, so `judge` looks at the case of `reduced`: fewer samples, the same classes, width and
temperature. `differs` looks at the case itself, beside the eager form that does the least work. Compared are the loss,
each gradient and its tangential part as a whole, and both row by row: of thousands of rows a wrong one is little.
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

    apart: how far it may be from the yardstick's step, for each of `_parts` and in units of `_rounding`: its own limit,
    and how far the yardstick is from float64.
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
    floors = _rounding(case, leaves, y, want)
    off = {
        name: [_times(a, b, floor) for a, b, floor in zip(mine, want, floors, strict=True)]
        for name, mine in got.items()
    }
    eager = [
        [x for name in forms.EAGER[case.op] if name in got and math.isfinite(x := off[name][i])]
        for i in range(len(floors))
    ]
    times = [max(1.0, 2 * min(found, default=0.0)) for found in eager]
    nearest = off.get(forms.yardstick(case.op), [0.0] * len(floors))
    limits = [most * floor for most, floor in zip(times, floors, strict=True)]
    apart = tuple(most + yardstick for most, yardstick in zip(times, nearest, strict=True))
    first, rows = 1 + len(leaves), 1 + 2 * len(leaves)
    return {
        name: Judged(
            deviation(mine[:first], want[:first]),
            deviation(mine[first:rows], want[first:rows]),
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
    """In float64: the loss, the gradients and their tangential parts; the last two again, to be judged row by row."""
    loss, *gradients = (x.double() for x in outputs)
    gradients += [tangential(g, x.detach().double()) for g, x in zip(gradients, leaves, strict=True)]
    return [loss, *gradients, *gradients]


def _size(x: Tensor, like: Tensor) -> Tensor:
    """The norm of a part, or those of its rows."""
    return x.norm(dim=1) if like.ndim else x.norm()


def _at_least_usual(rows: Tensor) -> Tensor:
    """What is allowed to a row follows its size; to one whose terms cancel, that of a row on average (RMS)."""
    return rows.clamp(min=rows.square().mean().sqrt())


def _times(a: Tensor, b: Tensor, floor: Tensor) -> float:
    """How many times its floor the part, or the worst row of those that have one, is off."""
    return torch.where(floor > 0, _size(a - b, floor) / floor, 0.0).max().item()


def _units(case: Case, leaves: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    """How large what cancels in each of the parts is: a logit, or the positives' share of a gradient or of its rows."""
    scale = torch.tensor(1 / case.temperature, dtype=torch.float64)
    lengths = [x.detach().double().norm(dim=1) for x in leaves]
    shares = [torch.full_like(lengths[0], 2 if case.op == "supcon" else 1), torch.bincount(y, minlength=case.k)]
    positive = [(share / length).norm() * scale / case.n for share, length in zip(shares, lengths, strict=False)]
    # A class without positives still has its probabilities: on average those of N/K samples.
    rows = [
        _at_least_usual(share.clamp(min=case.n / len(share)) / length * scale / case.n)
        for share, length in zip(shares, lengths, strict=False)
    ]
    return [scale, *positive, *positive, *rows, *rows]


def _rounding(case: Case, leaves: Sequence[Tensor], y: Tensor, want: Sequence[Tensor]) -> list[Tensor]:
    """How far rounding alone may take each of the parts from float64's.

    A logit of size 1/τ is rounded in float32, hence so are the loss and every exponential: by a unit in the last place,
    five times what all forms do on random features. A probability near 1 less its positive's 1 leaves roundings of one
    positive's gradient, up to 8, which is all that counts near collapse. Results are rounded to their dtype and to its
    smallest numbers. In the worst of thousands of rows the first two may be four times as much.
    """
    info = torch.finfo(forms.DTYPES[case.dtype])
    found = []
    for i, (part, unit) in enumerate(zip(want, _units(case, leaves, y), strict=True)):
        size, times, numbers = part.norm(), 1, part.numel()
        if unit.ndim:
            size, times, numbers = _at_least_usual(part.norm(dim=1)), 4, part.shape[1]
        floor = EPS * (size * (1 + times / case.temperature) + (8 if i else 1) * times * unit)
        if case.dtype == "tf32":
            floor += TF32_EPS * (size + unit)
        elif i:
            floor += info.eps * (size + info.smallest_normal * math.sqrt(numbers))
        found.append(floor)
    return found


def _excess(got: Sequence[Tensor], want: Sequence[Tensor], limits: Sequence[Tensor]) -> str:
    kinds, leaves = ("gradient", "tangential gradient"), len(want) // 4
    names = ["loss", *[f"{kind} {i}" for kind in kinds for i in range(leaves)] * 2]
    for name, a, b, limit in zip(names, got, want, limits, strict=True):
        off, size = _size(a - b, limit), _size(b, limit)
        if not (off <= limit).all():  # so that NaN is wrong too
            if limit.ndim:
                row = int((~(off <= limit)).nonzero()[0, 0])
                name, off, size, limit = f"row {row} of {name}", off[row], size[row], limit[row]
            return f"{name} is off by {off:.1e} of {size:.1e}, {limit:.1e} allowed"
    return ""


def tangential(gradient: Tensor, vectors: Tensor) -> Tensor:
    """Each row g of a gradient without its part along its own vector x: g - (g·x) x/|x|².

    A loss of directions does not change with a vector's length, so its true gradient is all tangential; a part along
    the vector is rounding, large where the gradient is small. Near collapse what turns a vector is all that matters.
    """
    along = (gradient * vectors).sum(1, keepdim=True) / (vectors * vectors).sum(1, keepdim=True)
    return gradient - along * vectors
