"""What a tile of logits goes through between two matrix products on the CPU: exponentials, sums, weights, projections.

Each is one pass in the C++ extension where operators take several, so that the time of a loss is that of its products.
Without the extension, and for float64 or another device, the operators run: the same sums in another order.

A tile is [B, P]: rows of one operand against columns of another, logits bounded by 88 in magnitude. Sums are float64.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from hypercontrast import _extension

NOTHING = -1000.0  # a logit that is no part of a sum: its exponential is zero, in float64 too


def _compiled(*tensors: Tensor | None) -> ModuleType | None:
    """The extension, where it can work on all of these."""
    usable = all(
        x is None or (x.device.type == "cpu" and x.is_contiguous() and x.dtype != torch.float64) for x in tensors
    )
    return _extension.quietly() if usable else None


def reusable(elements: int, like: Tensor) -> Tensor:
    """An uninitialised vector, whose memory the next call gets once it is gone: fresh pages cost more than writing."""
    if elements and like.dtype == torch.float32 and (extension := _compiled(like)) is not None:
        return extension.reusable(elements)
    return like.new_empty(elements)


def release() -> None:
    """Give back what waits for the next `reusable`."""
    if (extension := _extension.quietly()) is not None:
        extension.release()


def product_(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out <- a b, or out + a b: with the extension by whichever of PyTorch's libraries is the faster one here."""
    if out.dtype == torch.float32 and out.device.type == "cpu" and (extension := _extension.quietly()) is not None:
        extension.product(a, b, out, add)
        return out
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def exponentiate_(
    tile: Tensor,
    factors: Tensor | None,
    own: Tensor | None,
    positives: Tensor | None,
    exclude_own: bool,
    row_sums: Tensor | None,
    column_sums: Tensor | None,
) -> None:
    """tile <- exp(factors·tile), of products to exponentials; what was summed joins row_sums [B] and column_sums [P].

    own [B] int64 is the column of each row's positive, -1 where this tile has none. That logit is written to positives
    [B], and with `exclude_own` its exponential is zero.
    """
    if (extension := _compiled(tile, factors, positives)) is not None:
        extension.exponentiate(tile, factors, own, positives, exclude_own, row_sums, column_sums)
        return
    if factors is not None:
        tile.mul_(factors[:, None])
    if own is not None and positives is not None:
        take_positives_(tile, own, positives, -torch.inf if exclude_own else None)
    tile.exp_()
    if row_sums is not None:
        row_sums += tile.sum(1)
    if column_sums is not None:
        column_sums += tile.sum(0)


def take_positives_(tile: Tensor, own: Tensor, positives: Tensor, fill: float | None) -> None:
    """Write the entries at `own` to positives [B], and `fill` in their place."""
    rows, columns = entries(own)
    positives[rows] = tile[rows, columns]
    if fill is not None:
        tile[rows, columns] = fill


def entries(own: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the entries at `own`."""
    rows = (own >= 0).nonzero()[:, 0]
    return rows, own[rows]


def weigh(
    tile: Tensor,
    factors: Tensor | None,
    are_exponentials: bool,
    row_weights: Tensor | None,
    column_weights: Tensor | None,
    out: Tensor,
) -> Tensor:
    """out <- e (row_weights + column_weights), e the tile or exp(factors·tile) with the bits of `exponentiate_`."""
    if (extension := _compiled(tile, factors, row_weights, column_weights, out)) is not None:
        extension.weigh(tile, factors, are_exponentials, row_weights, column_weights, out)
        return out
    if not are_exponentials:
        tile = torch.exp(tile if factors is None else tile * factors[:, None], out=out)
    weights = row_weights[:, None] if row_weights is not None else 0.0
    return torch.mul(tile, weights if column_weights is None else weights + column_weights, out=out)


def through_norm_(grad: Tensor, x: Tensor, inv_norms: Tensor, outer: Tensor, project: bool) -> float | Tensor:
    """grad <- outer (grad - (x·grad) inv² x), the last part if `project`; returns Σ outer (x·grad)."""
    if (extension := _compiled(grad, x, inv_norms, outer)) is not None:
        return extension.through_norm(grad, x, inv_norms, outer, project, 1.0)
    radial = (x * grad).sum(1)
    if project:
        grad.addcmul_(x, (radial * inv_norms * inv_norms)[:, None], value=-1)
    grad.mul_(outer[:, None])
    return (radial * outer).sum()
