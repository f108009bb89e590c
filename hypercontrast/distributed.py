"""The few collectives there are: per-class sums and scalars, never features.

Every function takes `group=None` for "this rank alone" and is then the identity.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

GroupLike = dist.ProcessGroup | str | None


def resolve_group(group: GroupLike) -> dist.ProcessGroup | None:
    """The process group a loss spans: "auto" is the default group when there is one, None is this rank alone.

    Raises ValueError for another string, TypeError for anything that is not a group.
    """
    if group is None:
        return None
    if isinstance(group, str):
        if group != "auto":
            raise ValueError(f"group must be 'auto', None or a process group, got {group!r}")
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    elif not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be 'auto', None or a process group, got {type(group).__name__}")
    return group if dist.get_world_size(group) > 1 else None


def world_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def all_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of x over the ranks, a constant for autograd."""
    x = x.detach()
    if group is not None:
        x = x.clone()
        dist.all_reduce(x, group=group)
    return x


class _GlobalLSE(torch.autograd.Function):
    """ℓ_c over all ranks from every rank's own ℓ_c, [K] → [K].

    The upstream gradient is dL/dℓ_c of the loss as DDP will average it. Where each rank already knows the global one
    (the
    mean loss does: n_c/M times the world size) nothing is exchanged; where it knows only its own samples' part,
    `sum_gradients` adds the ranks' parts up.
    """

    @staticmethod
    def forward(ctx, lse: Tensor, group: dist.ProcessGroup, bounded: bool, sum_gradients: bool) -> Tensor:
        if bounded:  # |s| is small enough for plain sums, so one exchange will do
            total = lse.exp()
            dist.all_reduce(total, group=group)
            out = total.log()
        else:
            peak = lse.clone()
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            shift = torch.where(peak == -torch.inf, 0, peak)
            total = (lse - shift).exp()
            dist.all_reduce(total, group=group)
            out = shift + total.log()
        ctx.group = group if sum_gradients else None
        ctx.save_for_backward(torch.where(out == -torch.inf, 0, (lse - out).exp()))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (share,) = ctx.saved_tensors
        return all_sum(grad, ctx.group) * share, None, None, None


def global_lse(lse: Tensor, group: dist.ProcessGroup | None, *, bounded: bool, sum_gradients: bool) -> Tensor:
    """Log-sum-exp over all ranks' samples from each rank's own. See `_GlobalLSE`."""
    return lse if group is None else _GlobalLSE.apply(lse, group, bounded, sum_gradients)
