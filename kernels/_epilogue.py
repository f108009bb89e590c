"""What follows the tiles: joining the partial results of splits, in a fixed order, and the gradient through the norm.

Write i = 1/|x| for a row x of an operand X and P[x] = Σ_j G[x, j] i_x i_j b_j for the gradient of its logits times the
other operand's rows b_j. Then

    t = x·P,    dX = (P - t i² x)/τ,    Σ_rows t / τ = Σ G∘s,

so the radial part is removed in fp32 from the sum itself, and the temperature's gradient costs nothing more.

Shapes: S splits, R rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._launch import cdiv
from ._tiles import add_exponentials, load_inverse_temperature, load_rows, log_sum

MAX_FIXED_SHIFT = 64.0  # |s| below this: exp(s) neither overflows a sum of 2^34 terms in fp32 nor underflows


@dataclass(frozen=True)
class Scaling:
    """What makes logits of products: s = a·b/(|a||b|τ), or a·b/τ when not `normalize`."""

    temperature: Tensor | None  # one fp32 value on the device; None to use the number
    inv_temperature: float
    normalize: bool

    def fixed_shift(self, dtype: torch.dtype, bound: float) -> bool:
        """Whether |s| <= bound, so that exp(s) needs no maximum. float32 keeps it, which is more exact."""
        bounded = self.normalize and self.temperature is None and self.inv_temperature <= bound
        return bounded and dtype.itemsize == 2

    def arguments(self) -> dict[str, Any]:
        """How the kernels learn the temperature."""
        return {
            "temperature_ptr": self.temperature,
            "inv_temperature": self.inv_temperature,
            "HAS_TEMPERATURE": self.temperature is not None,
        }

    def divide(self, x: Tensor) -> Tensor:
        """x/τ."""
        return x * self.inv_temperature if self.temperature is None else x / self.temperature.reshape(())


@dataclass(frozen=True)
class Gradient:
    """One operand in a backward, and where its gradient goes."""

    x: Tensor  # [R, D]
    inv: Tensor  # [R]
    grad: Tensor  # [R, D], written
    radial: Tensor  # [R], written: x·P

    def rows(self, part: slice) -> Gradient:
        return type(self)(*(None if tensor is None else tensor[part] for tensor in vars(self).values()))


@triton.jit
def _combine_kernel(
    partials_ptr,  # [S, R] fp32 log-sum-exps
    lse_ptr,  # [R] fp32, read as well when ACCUMULATE
    S,
    R,
    STEP: tl.constexpr,  # partial s holds rows from (s + 1) STEP on: column sums of a triangle
    ACCUMULATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """log Σ_s exp partials[s], in the order of s."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    if ACCUMULATE:
        maximum_R = tl.load(lse_ptr + row_R, mask=inside_R, other=float("-inf"))
    else:
        maximum_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total_R = tl.full((BLOCK_R,), 1.0, tl.float32)  # of exp(maximum): nothing where that is -inf
    if STEP > 0:
        S = tl.minimum(S, ((tl.program_id(0) + 1) * BLOCK_R - 1) // STEP)
    for start in range(0, S, BLOCK_S):
        split_S = start + tl.arange(0, BLOCK_S)
        inside_SR = (split_S < S)[:, None] & inside_R[None, :] & (row_R[None, :] >= ((split_S + 1) * STEP)[:, None])
        partials = partials_ptr + split_S.to(tl.int64)[:, None] * R + row_R[None, :]
        partial_SR = tl.load(partials, mask=inside_SR, other=float("-inf"))
        maximum_R, total_R = add_exponentials(maximum_R, total_R, partial_SR, 0, False)
    tl.store(lse_ptr + row_R, log_sum(maximum_R, total_R), mask=inside_R)


def combine(partials: Tensor, into: Tensor | None = None, step: int = 0) -> Tensor:
    """log Σ exp of [S, R] along S, joined to the log-sum-exps `into` [R] (in place) when given.

    With a step, partial s is read for rows from (s + 1)·step on and may be uninitialised before.
    """
    splits, num_rows = partials.shape
    lse = partials.new_empty(num_rows) if into is None else into
    _combine_kernel[(cdiv(num_rows, _launch.COMBINE_BLOCKS["BLOCK_R"]),)](
        partials_ptr=partials,
        lse_ptr=lse,
        S=splits,
        R=num_rows,
        STEP=step,
        ACCUMULATE=into is not None,
        **_launch.COMBINE_BLOCKS,
    )
    return lse


@triton.jit
def _sum_partials(
    partials_ptr, row_R, inside_R, d, D, S, stride_partials, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    depth = d + tl.arange(0, BLOCK_D)
    inside_RD = inside_R[:, None] & (depth < D)[None, :]
    partials = partials_ptr + row_R.to(tl.int64)[:, None] * D + depth[None, :]
    sum_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for _ in range(S):
        sum_RD += tl.load(partials, mask=inside_RD, other=0.0)
        partials += stride_partials
    return sum_RD


@triton.jit
def _finish_kernel(
    partials_ptr,  # [S, R, D] fp32: P, in S parts
    x_ptr,  # [R, D] the operand P is the gradient of
    inv_ptr,  # [R] fp32
    temperature_ptr,
    range_ptr,
    grad_ptr,  # [R, D]
    radial_ptr,  # [R] fp32
    S,
    R,
    D,
    stride_x,
    stride_partials,
    inv_temperature,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dX = (P - t i² x)/τ, t = x·P. P is read twice, the second time from cache."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    unscale = 1.0
    if HAS_RANGE:
        unscale = 1.0 / tl.load(range_ptr)

    radial_R = tl.zeros((BLOCK_R,), tl.float32)
    for d in range(0, D, BLOCK_D):
        sum_RD = _sum_partials(partials_ptr, row_R, inside_R, d, D, S, stride_partials, BLOCK_R, BLOCK_D)
        x_RD = load_rows(x_ptr, row_R, inside_R, stride_x, d, D, BLOCK_D).to(tl.float32)
        radial_R += tl.sum(x_RD * sum_RD, axis=1)
    radial_R *= unscale
    tl.store(radial_ptr + row_R, radial_R, mask=inside_R)
    inv_R = tl.load(inv_ptr + row_R, mask=inside_R, other=0.0)
    for d in range(0, D, BLOCK_D):
        sum_RD = _sum_partials(partials_ptr, row_R, inside_R, d, D, S, stride_partials, BLOCK_R, BLOCK_D) * unscale
        if NORMALIZE:
            x_RD = load_rows(x_ptr, row_R, inside_R, stride_x, d, D, BLOCK_D).to(tl.float32)
            sum_RD -= x_RD * (radial_R * inv_R * inv_R)[:, None]
        depth = d + tl.arange(0, BLOCK_D)
        grads = grad_ptr + row_R.to(tl.int64)[:, None] * D + depth[None, :]
        tl.store(grads, sum_RD * inv_temp, mask=inside_R[:, None] & (depth < D)[None, :])


def finish(scaling: Scaling, side: Gradient, partials: Tensor, fp16_range: Tensor | None) -> None:
    """side.grad and side.radial from P = Σ_s partials[s] [S, R, D], still scaled by fp16_range when that is given."""
    splits, num_rows, dim = partials.shape
    blocks = _launch.row_blocks(dim)
    _finish_kernel[(cdiv(num_rows, blocks["BLOCK_R"]),)](
        partials_ptr=partials,
        x_ptr=side.x,
        inv_ptr=side.inv,
        range_ptr=fp16_range,
        grad_ptr=side.grad,
        radial_ptr=side.radial,
        S=splits,
        R=num_rows,
        D=dim,
        stride_x=side.x.stride(0),
        stride_partials=num_rows * dim,
        HAS_RANGE=fp16_range is not None,
        NORMALIZE=scaling.normalize,
        **scaling.arguments(),
        **blocks,
    )


def fp16_range(dtype: torch.dtype, upstream: Iterable[Tensor | None], *inv_norms: Tensor) -> Tensor | None:
    """A power of two that brings the largest entry a rounded weight can have to about 2^13, on the device; fp16 only.

    G's entries are about 1/N^2, below fp16's smallest number; bfloat16 and float32 have the exponents for them.
    """
    if dtype != torch.float16:
        return None
    peak = torch.stack([g.abs().amax() for g in upstream if g is not None]).amax()
    for inv in inv_norms:
        peak = peak * inv.amax()
    exponent = (13.0 - torch.log2(peak).ceil()).clamp(-100.0, 100.0)
    return torch.exp2(exponent)


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """A·B summed and returned in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def unpadded(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient of the kernels' shape and type in those of x."""
    return grad[:, : x.shape[1]].to(x.dtype).contiguous()
