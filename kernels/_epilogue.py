"""What follows the tiles: joining the partial results of splits, in a fixed order, and the gradient through the norm.

Write i = 1/|x| for a row x of an operand X and P[x] = Σ_j G[x, j] i_x i_j b_j for the gradient of its logits times the
other operand's rows b_j. Then

    t = x·P,    dX = (P - t i² x)/τ,    Σ_rows t / τ = Σ G∘s,

so the radial part is removed in fp32 from the sum itself, and the temperature's gradient costs nothing more.

Shapes: S splits, R rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._launch import cdiv
from ._tiles import add_exponentials, load_inverse_temperature, load_rows, log_sum

MAX_FIXED_SHIFT = 64.0  # |s| below this: exp(s) neither overflows a sum of 2^34 terms in fp32 nor underflows
# |s| below this: exp(s), exp(-lse) and their products with upstream gradients all stay in fp32's range.
MAX_BACKWARD_SHIFT = 32.0


@dataclass(frozen=True)
class Scaling:
    """What makes logits of products: s = a·b/(|a||b|τ), or a·b/τ when not `normalize`; and what scales gradients."""

    temperature: Tensor | None  # one fp32 value on the device; None to use the number
    inv_temperature: float
    normalize: bool
    # (g, M), fp32 on the device: all gradients are multiplied by g/M, last, which leaves G as it is; None for one.
    factor: tuple[Tensor, Tensor] | None = field(default=None, kw_only=True)

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

    def factor_arguments(self, used: bool = True) -> dict[str, Any]:
        """How the kernels that finish a gradient learn its factor."""
        used = used and self.factor is not None
        upstream, divisor = self.factor if used else (None, None)
        return {"upstream_ptr": upstream, "divisor_ptr": divisor, "HAS_FACTOR": used}

    def divide(self, x: Tensor) -> Tensor:
        """x/τ."""
        return x * self.inv_temperature if self.temperature is None else x / self.temperature.reshape(())


@dataclass(frozen=True)
class Gradient:
    """One operand in a backward, and where its gradient goes."""

    x: Tensor  # [R, D]
    inv: Tensor  # [R]
    grad: Tensor | None  # [R, D], written, or None where nobody asks for it
    radial: Tensor | None  # [R], written with it: x·P

    def rows(self, part: slice) -> Gradient:
        return type(self)(*(None if tensor is None else tensor[part] for tensor in vars(self).values()))


@triton.jit
def joined(
    partials_ptr,  # [S, R] fp32 log-sum-exps
    row,
    inside,
    S,
    R,
    BLOCK_S: tl.constexpr,
    so_far=None,  # log-sum-exps that they join, if there are any
    STEP: tl.constexpr = 0,  # partial s holds rows from (s + 1) STEP on: column sums of a triangle
):
    """log Σ_s exp partials[s, row], in the order of s; -inf outside."""
    maximum = tl.full(row.shape, float("-inf"), tl.float32) if so_far is None else so_far
    total = tl.full(row.shape, 1.0, tl.float32)  # of exp(maximum): nothing where that is -inf
    for start in range(0, S, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        partials = partials_ptr + split.to(tl.int64)[:, None] * R + row[None, :]
        there = (split < S)[:, None] & inside[None, :]
        if STEP > 0:
            there &= row[None, :] >= ((split + 1) * STEP)[:, None]
        partial = tl.load(partials, mask=there, other=float("-inf"))
        maximum, total = add_exponentials(maximum, total, partial, 0, False)
    return log_sum(maximum, total)


@triton.jit
def _combine_kernel(
    partials_ptr,
    lse_ptr,  # [R] fp32, read as well when ACCUMULATE
    S,
    R,
    STEP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    so_far_R = tl.load(lse_ptr + row_R, mask=inside_R, other=float("-inf")) if ACCUMULATE else None
    if STEP > 0:
        S = tl.minimum(S, ((tl.program_id(0) + 1) * BLOCK_R - 1) // STEP)
    tl.store(lse_ptr + row_R, joined(partials_ptr, row_R, inside_R, S, R, BLOCK_S, so_far_R, STEP), mask=inside_R)


def combine(partials: Tensor, into: Tensor | None = None, step: int = 0) -> Tensor:
    """log Σ exp of [S, R] along S, joined to the log-sum-exps `into` [R] (in place) when given; without a part [0].

    With a step, partial s is read for rows from (s + 1)·step on and may be uninitialised before.
    """
    splits, num_rows = partials.shape
    if splits < 2 and into is None:
        return partials.view(-1)
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
def load_factor(upstream_ptr, divisor_ptr, HAS_FACTOR: tl.constexpr):
    if HAS_FACTOR:
        return tl.load(upstream_ptr) / tl.load(divisor_ptr)
    else:
        return 1.0


@triton.jit
def _sum_partials(
    partials_ptr, row_R, inside_R, d, D, S, R, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Σ_s partials[s], BLOCK_S of them at a time: that many are on their way from memory at once."""
    depth = d + tl.arange(0, BLOCK_D)
    inside_RD = inside_R[:, None] & (depth < D)[None, :]
    offset_RD = row_R.to(tl.int64)[:, None] * D + depth[None, :]
    if BLOCK_S == 1:
        sum_RD = tl.load(partials_ptr + offset_RD, mask=inside_RD, other=0.0)
    else:
        sum_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start in range(0, S, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            # A cast, since R = 1 is a number of Python's, which has no `to`.
            offset = split.to(tl.int64)[:, None, None] * (tl.cast(R, tl.int64) * D) + offset_RD[None, :, :]
            mask = (split < S)[:, None, None] & inside_RD[None, :, :]
            sum_RD += tl.sum(tl.load(partials_ptr + offset, mask=mask, other=0.0), axis=0)
    return sum_RD


@triton.jit
def _finish_rows(
    block, partials_ptr, x_ptr, inv_ptr, grad_ptr, radial_ptr, S, R, D, stride, inv_temp, factor,
    NORMALIZE: tl.constexpr, ONCE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dX = (P - t i² x)/τ, t = x·P. Where rows are wider than a tile, P and x are read twice."""
    row_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    radial_R = tl.zeros((BLOCK_R,), tl.float32)
    for d in range(0, 1 if ONCE else D, BLOCK_D):
        sum_RD = _sum_partials(partials_ptr, row_R, inside_R, d, D, S, R, BLOCK_S, BLOCK_R, BLOCK_D)
        x_RD = load_rows(x_ptr, row_R, inside_R, stride, d, D, BLOCK_D).to(tl.float32)
        radial_R += tl.sum(x_RD * sum_RD, axis=1)
        if ONCE:
            _store_gradient(
                grad_ptr, radial_ptr, inv_ptr, sum_RD, x_RD, radial_R, row_R, inside_R, 0, D, inv_temp, factor,
                NORMALIZE, BLOCK_D,
            )  # fmt: skip
    if not ONCE:
        for d in range(0, D, BLOCK_D):
            sum_RD = _sum_partials(partials_ptr, row_R, inside_R, d, D, S, R, BLOCK_S, BLOCK_R, BLOCK_D)
            x_RD = load_rows(x_ptr, row_R, inside_R, stride, d, D, BLOCK_D).to(tl.float32)
            _store_gradient(
                grad_ptr, radial_ptr, inv_ptr, sum_RD, x_RD, radial_R, row_R, inside_R, d, D, inv_temp, factor,
                NORMALIZE, BLOCK_D,
            )  # fmt: skip


@triton.jit
def _store_gradient(
    grad_ptr, radial_ptr, inv_ptr, sum_RD, x_RD, radial_R, row_R, inside_R, d, D, inv_temp, factor,
    NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tl.store(radial_ptr + row_R, radial_R * factor, mask=inside_R)
    if NORMALIZE:
        inv_R = tl.load(inv_ptr + row_R, mask=inside_R, other=0.0)
        sum_RD -= x_RD * (radial_R * inv_R * inv_R)[:, None]
    depth = d + tl.arange(0, BLOCK_D)
    grads = grad_ptr + row_R.to(tl.int64)[:, None] * D + depth[None, :]
    tl.store(grads, sum_RD * (inv_temp * factor), mask=inside_R[:, None] & (depth < D)[None, :])


@triton.jit
def _finish_kernel(
    a_partials_ptr,  # [splits_a, rows_a, D] fp32: P, in splits_a parts
    a_ptr,  # [rows_a, D] the operand P is the gradient of
    inv_a_ptr,  # [rows_a] fp32
    a_grad_ptr,  # [rows_a, D]
    a_radial_ptr,  # [rows_a] fp32
    b_partials_ptr,  # and the same of another operand, if the grid reaches it
    b_ptr,
    inv_b_ptr,
    b_grad_ptr,
    b_radial_ptr,
    temperature_ptr,
    range_ptr,
    upstream_ptr,
    divisor_ptr,
    splits_a,
    rows_a,
    splits_b,
    rows_b,
    D,
    stride_a,
    stride_b,
    inv_temperature,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ONCE: tl.constexpr,  # a tile holds whole rows
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of one operand, or of two of one width."""
    inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    factor = load_factor(upstream_ptr, divisor_ptr, HAS_FACTOR)
    if HAS_RANGE:
        factor /= tl.load(range_ptr)
    block = tl.program_id(0)
    blocks_a = tl.cdiv(rows_a, BLOCK_R)
    if block < blocks_a:
        _finish_rows(
            block, a_partials_ptr, a_ptr, inv_a_ptr, a_grad_ptr, a_radial_ptr, splits_a, rows_a, D, stride_a,
            inv_temp, factor, NORMALIZE, ONCE, BLOCK_S, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    else:
        _finish_rows(
            block - blocks_a, b_partials_ptr, b_ptr, inv_b_ptr, b_grad_ptr, b_radial_ptr, splits_b, rows_b, D, stride_b,
            inv_temp, factor, NORMALIZE, ONCE, BLOCK_S, BLOCK_R, BLOCK_D,
        )  # fmt: skip


def finish(
    scaling: Scaling,
    fp16_range: Tensor | None,
    first: tuple[Gradient, Tensor],
    second: tuple[Gradient, Tensor] | None = None,
) -> None:
    """grad and radial of an operand, or of two in one launch, from P = Σ_s partials[s] [S, R, D], which is still scaled
    by fp16_range when that is given.
    """
    (a, a_partials), (b, b_partials) = first, second or first
    blocks = _launch.finish_blocks(a.x.shape[1], max(len(a_partials), len(b_partials)))
    programs = cdiv(len(a.x), blocks["BLOCK_R"]) + (cdiv(len(b.x), blocks["BLOCK_R"]) if second else 0)
    _finish_kernel[(programs,)](
        a_partials_ptr=a_partials,
        a_ptr=a.x,
        inv_a_ptr=a.inv,
        a_grad_ptr=a.grad,
        a_radial_ptr=a.radial,
        b_partials_ptr=b_partials,
        b_ptr=b.x,
        inv_b_ptr=b.inv,
        b_grad_ptr=b.grad,
        b_radial_ptr=b.radial,
        range_ptr=fp16_range,
        splits_a=len(a_partials),
        rows_a=len(a.x),
        splits_b=len(b_partials),
        rows_b=len(b.x),
        D=a.x.shape[1],
        stride_a=a.x.stride(0),
        stride_b=b.x.stride(0),
        HAS_RANGE=fp16_range is not None,
        NORMALIZE=scaling.normalize,
        **scaling.factor_arguments(),
        **scaling.arguments(),
        **blocks,
    )


@triton.jit
def _largest(x_ptr, size, BLOCK: tl.constexpr):
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x_ptr + index, mask=index < size, other=0.0)))
    return tl.max(largest, axis=0)


@triton.jit
def _range_kernel(
    g1_ptr,  # fp32 upstream gradients and how many; those not there have none
    g2_ptr,
    g3_ptr,
    g4_ptr,
    i1_ptr,  # fp32 inverse norms and how many
    i2_ptr,
    range_ptr,  # [1] fp32, written
    size_g1,
    size_g2,
    size_g3,
    size_g4,
    size_i1,
    size_i2,
    BLOCK: tl.constexpr,
):
    of_first = tl.maximum(_largest(g1_ptr, size_g1, BLOCK), _largest(g2_ptr, size_g2, BLOCK))
    of_last = tl.maximum(_largest(g3_ptr, size_g3, BLOCK), _largest(g4_ptr, size_g4, BLOCK))
    peak = tl.maximum(of_first, of_last) * _largest(i1_ptr, size_i1, BLOCK)
    if size_i2 > 0:
        peak *= _largest(i2_ptr, size_i2, BLOCK)
    floor_log2 = (peak.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(12 - floor_log2, -100), 100)
    tl.store(range_ptr, ((exponent + 127) << 23).to(tl.float32, bitcast=True))


def fp16_range(dtype: torch.dtype, upstream: Iterable[Tensor | None], *inv_norms: Tensor) -> Tensor | None:
    """A power of two that brings the largest entry a rounded weight can have to about 2^13, on the device; fp16 only.

    G's entries are about 1/N^2, below fp16's smallest number; bfloat16 and float32 have the exponents for them.
    """
    if dtype != torch.float16:
        return None
    given = [g for g in upstream if g is not None]
    nothing = given[0].new_empty(0)
    vectors = {f"g{i + 1}": given[i] if i < len(given) else nothing for i in range(4)}
    vectors |= {f"i{i + 1}": inv_norms[i] if i < len(inv_norms) else nothing for i in range(2)}
    fp16_range = nothing.new_empty(1)
    _range_kernel[(1,)](
        range_ptr=fp16_range,
        **{f"{name}_ptr": vector for name, vector in vectors.items()},
        **{f"size_{name}": len(vector) for name, vector in vectors.items()},
        **_launch.RANGE_BLOCKS,
    )
    return fp16_range


def mm_fp32(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """A·B summed and returned in fp32, added to `into` (in place) when given."""
    if a.is_cuda and a.dtype != torch.float32:
        if into is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    return a.float() @ b.float() if into is None else into.addmm_(a.float(), b.float())


def unpadded(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient of the kernels' shape and type in those of x."""
    return grad[:, : x.shape[1]].to(x.dtype).contiguous()
