"""The few collectives there are: per-class sums and scalars for our prototype losses, rows for losses over pairs.

Every one takes `group=None` for "this rank alone" and is then the identity.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from hypercontrast import _checks
from hypercontrast._agreement import LostRankError as LostRankError  # offered from here
from hypercontrast._agreement import agree, carriers, connected

GroupLike = dist.ProcessGroup | str | None

# The label of a row that is not there: slots of a batch that is not full, a queue's places not yet used.
ABSENT = -(2**63)


def resolve_group(group: GroupLike) -> dist.ProcessGroup | None:
    """The process group a loss spans: "auto" is the default group when there is one, None is this rank alone.

    Raises ValueError for another string and on a rank outside the group, TypeError for anything that is not a group.
    """
    if group is None:
        return None
    if isinstance(group, str):
        if group != "auto":
            raise ValueError(f"group must be 'auto', None or a process group, got {group!r}")
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    elif group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must have this rank as a member, got what new_group gives the other ranks")
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
        with connected():
            dist.all_reduce(x, group=group)
    return x


class _GlobalLSE(torch.autograd.Function):
    """ℓ_c over all ranks from every rank's own ℓ_c, [K] → [K], and the sums of further numbers [E] on the same journey:
    a collective's price is hardly that of its bytes. The sums are constants for autograd.

    The upstream gradient is dL/dℓ_c of the loss as DDP will average it. Where each rank already knows the global one
    (the mean loss does: n_c/M times the world size) nothing is exchanged; where it knows only its own samples' part,
    `sum_gradients` adds the ranks' parts up.
    """

    @staticmethod
    def forward(ctx, lse: Tensor, beside: Tensor, group: dist.ProcessGroup, bounded: bool, sum_gradients: bool):
        shifted = lse
        with connected():
            if not bounded:  # else |s| is small enough for plain sums, and one exchange will do
                peak = lse.clone()
                dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
                shift = torch.where(peak == -torch.inf, 0, peak)
                shifted = lse - shift
            sums = torch.cat([shifted.exp(), beside])
            dist.all_reduce(sums, group=group)
        total, beside = sums.split([len(lse), len(beside)])
        out = total.log() if bounded else shift + total.log()
        ctx.group = group if sum_gradients else None
        ctx.save_for_backward(torch.where(out == -torch.inf, 0, (lse - out).exp()))
        ctx.mark_non_differentiable(beside)
        return out, beside

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        (share,) = ctx.saved_tensors
        if ctx.group is not None:
            agree(lambda: "backward of a prototype loss", ctx.group, grad)
        return all_sum(grad, ctx.group) * share, None, None, None, None


def global_lse(
    lse: Tensor, beside: Tensor, group: dist.ProcessGroup | None, *, bounded: bool, sum_gradients: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all ranks' samples from each rank's own, and the sums of `beside`. See `_GlobalLSE`."""
    beside = beside.detach()
    return (lse, beside) if group is None else _GlobalLSE.apply(lse, beside, group, bounded, sum_gradients)


def gather_rows(x: Tensor, rows: list[int], group: dist.ProcessGroup) -> Tensor:
    """rows[r] rows of each rank r, in rank order: those of its x, then zeros if there are fewer. Without a gradient.

    Rows travel in slots as long as the longest rank's, because collectives want equal sizes.
    """
    slot = x.new_zeros(max(rows), *x.shape[1:])
    slot[: x.shape[0]] = x
    slots = slot.new_empty(len(rows) * max(rows), *x.shape[1:])
    with connected():  # as bytes, since a backend does not know every dtype
        dist.all_gather_into_tensor(slots.view(torch.uint8), slot.view(torch.uint8), group=group)
    slots = slots.unflatten(0, (len(rows), max(rows)))
    return torch.cat([slot[:n] for slot, n in zip(slots, rows, strict=True)])


class GatherWithGrad(torch.autograd.Function):
    """All ranks' rows in rank order; the backward sums the ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.rows, ctx.group = rows, group
        return gather_rows(x, rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        agree(lambda: "backward of gather_with_grad", ctx.group, grad)
        # Many ranks' gradients add up here: in half precision every addition would round.
        slots = pad_sequence(grad.to(_checks.accumulator(grad)).split(ctx.rows), batch_first=True)
        mine = slots.new_empty(slots.shape[1:])
        with connected():
            dist.reduce_scatter_tensor(mine, slots.flatten(0, 1), group=ctx.group)
        return mine[: ctx.rows[dist.get_rank(ctx.group)]].to(grad.dtype), None, None


def row_counts(x: Tensor, group: dist.ProcessGroup) -> list[int]:
    """Rows of x on each rank. The host waits for them."""
    mine = torch.tensor([x.shape[0]], device=x.device)
    return gather_rows(mine, [1] * dist.get_world_size(group), group).tolist()


def gather_with_grad(x: Tensor, group: GroupLike = "auto") -> Tensor:
    """Every rank's rows, in rank order, with their gradients: what a loss over pairs needs to span the global batch.

        A = concat_r x_r        backward: dL/dx_r = Σ_q dL_q/dA[rows of r], q over the ranks

    `dist.all_gather` returns constants. The loss of this rank's anchors against them lacks what other ranks' anchors
    ask of this rank's rows: in one measurement on SupCon the gradient was 28 % off, in direction, so that no learning
    rate repairs it, and no error is raised.

    Under DDP, compute the loss from the gathered rows, identically on every rank::

        loss = my_loss(hc.gather_with_grad(features), hc.gather_with_grad(labels))

    The backward adds up W equal gradients and DDP divides by W, so parameters below the features, and those in the
    loss, get the gradient of one process with the whole batch. `hc.supcon_loss` needs none of this; `hc.check_ddp`
    tells whether a loss of your own is right.

    Args:
        x: [n, ...], any number of rows on each rank, none included; of any dtype, integer labels too. It travels in its
            own dtype; gradients add up in float32 at least.
        group: the ranks to gather from; "auto" is the default group if there is one. A rank alone gets x back.

    The row counts are exchanged first, which makes the host wait for the device. The backward is a collective too:
    every rank must run it, and it cannot be differentiated again.

    Returns:
        [Σ n, ...], x's dtype and device.

    Raises:
        ValueError: if x has no rows to speak of (a scalar) or is where the group carries nothing; on every rank, before
            data moves, if dtype, trailing shape or the wish for a gradient differ between ranks, or one of them has a
            bad x.
        TypeError: if x is not a dense tensor.
        LostRankError: if another rank ended or does not answer.
    """
    group = resolve_group(group)

    def described() -> str:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise TypeError(f"x must be a dense tensor, got {x.layout}")
        if group is not None and x.device.type not in (carried := carriers(group)):
            raise ValueError(f"x must be on a device that the group carries, {' or '.join(carried)}, got {x.device}")
        if x.dim() == 0:
            raise ValueError("x must have shape [n, ...], got []")
        with_grad = "with" if torch.is_grad_enabled() and x.requires_grad else "without"
        return f"gather_with_grad of {x.dtype} [rows{''.join(f', {n}' for n in x.shape[1:])}] {with_grad} gradient"

    if group is None:
        described()
        return x
    agree(described, group, x)
    return GatherWithGrad.apply(x, row_counts(x, group), group)


def leave_group() -> None:
    """End this process's part in the default group."""
    is_gloo = dist.get_backend() == "gloo"
    dist.destroy_process_group()
    if is_gloo:
        # Its threads let go of the last collective's tensors, for which they take the interpreter's lock: one that
        # finds the interpreter ended aborts the process (pytorch/pytorch, pull request 179291).
        time.sleep(0.1)
