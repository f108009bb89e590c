"""What tiles of logits are made of, whichever samples, classes or pairs they belong to.

Shapes: R rows of the operand that a program owns, C rows of the one it streams, D width. Vectors over tile rows carry
_R, tiles _RC.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def load_rows(x_ptr, row, inside, stride, d, D, BLOCK_D: tl.constexpr):
    depth = d + tl.arange(0, BLOCK_D)
    start = row.to(tl.int64) * stride  # int64 first: row * stride passes 2^31
    return tl.load(x_ptr + start[:, None] + depth[None, :], mask=inside[:, None] & (depth < D)[None, :], other=0.0)


@triton.jit
def load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE: tl.constexpr):
    if HAS_TEMPERATURE:
        return 1.0 / tl.load(temperature_ptr)
    else:
        return inv_temperature


@triton.jit
def inverse(squares_R, NORMALIZE: tl.constexpr):
    if NORMALIZE:
        norm_R = tl.sqrt_rn(squares_R)
        inverse_R = tl.where(norm_R <= 1e-12, 0.0, 1.0 / norm_R)  # no direction: s = 0 and no gradient
        return tl.where(norm_R < float("inf"), inverse_R, float("nan"))  # no length either: not to pass for zero
    else:
        return tl.full(squares_R.shape, 1.0, tl.float32)


@triton.jit
def product(
    a_ptr,
    b_ptr,
    row_R,
    row_C,
    inside_R,
    inside_C,
    stride_a,
    stride_b,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A·Bᵀ for one tile, over D in steps."""
    dots_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for d in range(0, D, BLOCK_D):
        a_RD = load_rows(a_ptr, row_R, inside_R, stride_a, d, D, BLOCK_D)
        b_CD = load_rows(b_ptr, row_C, inside_C, stride_b, d, D, BLOCK_D)
        dots_RC = tl.dot(a_RD, b_CD.T, dots_RC, input_precision=INPUT_PRECISION)
    return dots_RC


@triton.jit
def split_range(C, BLOCK_C: tl.constexpr):
    """Columns [first, last) of this program's split; whole tiles, so the bounds depend on C alone."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    step = tl.cdiv(tl.cdiv(C, BLOCK_C), splits) * BLOCK_C
    return split * step, tl.minimum((split + 1) * step, C)


@triton.jit
def empty_sum(SIZE: tl.constexpr, FIXED_SHIFT: tl.constexpr):
    """(maximum, total) of a running Σ exp = total·exp(maximum) before the first term."""
    return tl.full((SIZE,), 0.0 if FIXED_SHIFT else float("-inf"), tl.float32), tl.zeros((SIZE,), tl.float32)


@triton.jit
def add_exponentials(maximum, total, logits, AXIS: tl.constexpr, FIXED_SHIFT: tl.constexpr):
    """The running sum with exp of all logits along AXIS. With a fixed shift they add as they are."""
    if FIXED_SHIFT:
        return maximum, total + tl.sum(exp(logits), axis=AXIS)
    else:
        higher = tl.maximum(maximum, tl.max(logits, axis=AXIS))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing summed so far: no inf - inf
        total *= exp(maximum - shift)
        return higher, total + tl.sum(exp(logits - tl.expand_dims(shift, AXIS)), axis=AXIS)


@triton.jit
def log_sum(maximum, total):
    """The running sum's logarithm, in nats: why not in units of log 2 is told by `_class_logits` and `pair_logits`."""
    return maximum + tl.log2(total) * LN2
