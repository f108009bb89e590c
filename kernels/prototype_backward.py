"""Backward over prototypes and samples: the gradients of both. The derivation is in prototype_lse.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._epilogue import finish, fp16_range, load_factor, mm_fp32
from ._launch import cdiv
from ._prototype_tiles import Operands, Options, load_classes, load_labels
from ._tiles import LOG2E, exp, load_inverse_temperature, load_rows, product, split_range
from .prototype_columns import Columns, Side, column_weights, columns, load_side


@triton.jit
def _class_logits(dots_RC, inv_R, inv_C, inv_temp):
    """s from the bare products, rows of classes against columns of samples.

    As in the forward the temperature joins the classes, and the factors meet before the product: a logit then has the
    bits that it was summed with, whichever operand owned the rows there, and exp(s - lse) suffers only the rounding of
    lse. That is also why logits are kept in nats, not in units of log 2: converting lse, and back, would be the largest
    error at small τ.
    """
    return dots_RC * ((inv_R * inv_temp)[:, None] * inv_C[None, :])


@triton.jit
def _logit_grads(
    logits_RC,
    class_R,
    class_C,
    lse_R,
    grad_R,
    lse_C,
    grad_C,
    positive_RC,  # g_pos, broadcast along the classes
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
):
    """G of one tile in fp32, positives included."""
    grads_RC = tl.zeros_like(logits_RC)
    if HAS_A:
        grads_RC += grad_R[:, None] * exp(logits_RC - lse_R[:, None])
    if HAS_B:
        grads_RC += grad_C[None, :] * exp(logits_RC - lse_C[None, :])
    return _with_positives(grads_RC, class_R, class_C, positive_RC, EXCLUDE_OWN)


@triton.jit
def _kept_logit_grads(
    e_RC,  # exp(s) as it was kept
    own_C,  # s of each sample and its own class
    class_R,
    class_C,
    lse_R,
    grad_R,
    lse_C,
    grad_C,
    positive_RC,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
):
    """The same from kept exponentials. A sample's own entry cancels against g_pos: it must not be a rounded one."""
    e_RC = tl.where(class_R[:, None] == class_C[None, :], exp(own_C)[None, :], e_RC)
    grads_RC = tl.zeros_like(e_RC)
    if HAS_A:
        grads_RC += grad_R[:, None] * (e_RC * exp(-lse_R)[:, None])  # in this order: exp(-lse) alone may be e^-80
    if HAS_B:
        grads_RC += grad_C[None, :] * (e_RC * exp(-lse_C)[None, :])
    return _with_positives(grads_RC, class_R, class_C, positive_RC, EXCLUDE_OWN)


@triton.jit
def _with_positives(grads_RC, class_R, class_C, positive_RC, EXCLUDE_OWN: tl.constexpr):
    own_RC = class_R[:, None] == class_C[None, :]
    if EXCLUDE_OWN:
        grads_RC = tl.where(own_RC, positive_RC, grads_RC)
    else:
        grads_RC = tl.where(own_RC, grads_RC + positive_RC, grads_RC)
    return tl.where((class_R >= 0)[:, None] & (class_C >= 0)[None, :], grads_RC, 0.0)


@triton.jit(do_not_specialize=["ignored_class"])
def _lse_bwd_kernel(
    a_ptr,  # [R, D] operand whose gradient this program sums
    b_ptr,  # [C, D]
    inv_a_ptr,
    columns_ptr,  # of B, see prototype_columns.py
    sides_ptr,
    labels_ptr,  # [N] int64
    lse_a_ptr,  # fp32, one a row of A, when HAS_A
    grad_a_ptr,  # upstream gradient of lse_a
    grad_pos_ptr,  # [N] fp32
    temperature_ptr,
    present_ptr,
    num_present_ptr,
    range_ptr,  # [1] fp32 power of two that brings G into fp16's range, when HAS_RANGE
    upstream_ptr,  # [1] fp32 each, when HAS_FACTOR: the gradient is multiplied by upstream/divisor
    divisor_ptr,
    grad_ptr,  # [R, D]: dA
    radial_ptr,  # [R] fp32: x·P, see _epilogue.py
    partials_ptr,  # [S, R, D] fp32 when SPLIT: P of this split
    R,
    C,
    D,
    num_classes,
    stride_a,
    stride_b,
    stride_partials,
    ignored_class,
    inv_temperature,
    A_IS_CLASSES: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    COMPACT: tl.constexpr,
    SPLIT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if COMPACT:
        if A_IS_CLASSES:
            R = tl.load(num_present_ptr)
        else:
            C = tl.load(num_present_ptr)
    if tl.program_id(0) * BLOCK_R >= R:
        return
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    if A_IS_CLASSES:
        class_R = load_classes(present_ptr, row_R, R, COMPACT)
    else:
        class_R = load_labels(labels_ptr, row_R, R, num_classes, ignored_class)
    inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    inv_a_R = tl.load(inv_a_ptr + row_R, mask=inside_R, other=0.0)
    scale_R = inv_a_R
    if A_IS_CLASSES:
        scale_R *= inv_temp * LOG2E
    fp16_range = 1.0
    if HAS_RANGE:
        fp16_range = tl.load(range_ptr)
    lse_R, grad_R = load_side(lse_a_ptr, grad_a_ptr, row_R, inside_R, HAS_A)
    lse_R *= LOG2E
    grad_R *= fp16_range
    a_RD = load_rows(a_ptr, row_R, inside_R, stride_a, 0, D, BLOCK_D)
    positive_R = grad_R
    if not A_IS_CLASSES:
        positive_R = tl.load(grad_pos_ptr + row_R, mask=inside_R, other=0.0) * fp16_range

    sum_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    first, last = split_range(C, BLOCK_C)
    for start in range(first, last, BLOCK_C):
        row_C = start + tl.arange(0, BLOCK_C)
        b_CD = load_rows(b_ptr, row_C, row_C < C, stride_b, 0, D, BLOCK_D)
        dots_RC = tl.dot(a_RD, b_CD.T, input_precision=INPUT_PRECISION)
        weights_RC = column_weights(
            dots_RC, row_C, columns_ptr, sides_ptr, class_R, scale_R, lse_R, grad_R, positive_R,
            HAS_A, HAS_B, EXCLUDE_OWN, not A_IS_CLASSES, BLOCK_C,
        )  # fmt: skip
        sum_RD = tl.dot(weights_RC.to(b_CD.dtype), b_CD, sum_RD, input_precision=INPUT_PRECISION)

    sum_RD = tl.where((class_R >= 0)[:, None], sum_RD * (inv_a_R / fp16_range)[:, None], 0.0)
    # What follows is counted from the program's first row: what was known before the loop would have held registers all
    # through it. And one address in int64, with those of a tile's entries relative to it, takes fewer.
    depth, own_R = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    left_R = own_R < R - tl.program_id(0) * BLOCK_R
    inside_RD = left_R[:, None] & (depth < D)[None, :]
    first = tl.program_id(0).to(tl.int64) * BLOCK_R * D
    offset_RD = own_R[:, None] * D + depth[None, :]
    if SPLIT:
        partials_ptr += tl.program_id(1).to(tl.int64) * stride_partials + first
        tl.store(partials_ptr + offset_RD, sum_RD, mask=inside_RD)
    else:
        # Read again, from cache, for the same reason.
        a_ptr += tl.program_id(0).to(tl.int64) * BLOCK_R * stride_a
        x_RD = load_rows(a_ptr, own_R, left_R, stride_a, 0, D, BLOCK_D).to(tl.float32)
        radial_R = tl.sum(x_RD * sum_RD, axis=1)
        if NORMALIZE:
            sum_RD -= x_RD * (radial_R * inv_a_R * inv_a_R)[:, None]
        factor = load_factor(upstream_ptr, divisor_ptr, HAS_FACTOR)
        tl.store(grad_ptr + first + offset_RD, sum_RD * (inv_temp * factor), mask=inside_RD)
        tl.store(radial_ptr + row_R, radial_R * factor, mask=left_R)


@triton.jit(do_not_specialize=["ignored_class", "row_start"])
def _lse_bwd_tile_kernel(
    w_ptr,  # [R, D]: this chunk of classes, and so are all vectors over classes but present_ptr
    z_ptr,  # [C, D]: this chunk of samples, and so are all vectors over samples
    inv_w_ptr,
    inv_z_ptr,
    labels_ptr,
    row_lse_ptr,
    col_lse_ptr,
    grad_row_ptr,
    grad_col_ptr,
    grad_pos_ptr,
    temperature_ptr,
    present_ptr,
    num_present_ptr,
    range_ptr,
    columns_ptr,  # of this chunk of samples, see prototype_columns.py, when LEAN
    sides_ptr,
    kept_ptr,  # [R, C] exp(s) in the operand's type, when KEPT: then no product is taken
    positives_ptr,  # [C] fp32, when KEPT
    h_ptr,  # [R, C] in the operand's type
    R,
    C,
    D,
    row_start,  # of this chunk among the (present) classes
    num_classes,
    stride_w,
    stride_z,
    stride_kept,
    stride_h,
    ignored_class,
    inv_temperature,
    HAS_ROWS: tl.constexpr,
    HAS_COLS: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_RANGE: tl.constexpr,
    COMPACT: tl.constexpr,
    KEPT: tl.constexpr,
    LEAN: tl.constexpr,  # columns are ready; never for float32: its logits stay in nats, which is more exact
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """H of one tile. Rows past the present classes are written as zeros: the library products read them."""
    row_blocks = tl.cdiv(R, BLOCK_R)
    first_R = tl.program_id(0) % row_blocks * BLOCK_R
    row_R = first_R + tl.arange(0, BLOCK_R)
    row_C = tl.program_id(0) // row_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    members, depth = R, D
    if COMPACT:
        members = tl.minimum(R, tl.load(num_present_ptr) - row_start)
        depth = tl.where(first_R < members, D, 0)  # a block of absent classes: no product
    inside_R, inside_C = row_R < members, row_C < C
    class_R = load_classes(present_ptr, row_start + row_R, row_start + members, COMPACT)
    inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    if not KEPT:
        dots_RC = product(
            w_ptr, z_ptr, row_R, row_C, inside_R, inside_C, stride_w, stride_z, depth,
            BLOCK_R, BLOCK_C, BLOCK_D, INPUT_PRECISION,
        )  # fmt: skip
    inv_w_R = tl.load(inv_w_ptr + row_R, mask=inside_R, other=0.0)
    lse_R, grad_R = load_side(row_lse_ptr, grad_row_ptr, row_R, inside_R, HAS_ROWS)
    fp16_range = 1.0
    if HAS_RANGE:
        fp16_range = tl.load(range_ptr)
    # Rows of H and of what is kept are padded: a bound of whole vectors lets memory move in them.
    in_padded_C = row_C < stride_h
    if LEAN:
        weights_RC = column_weights(
            dots_RC, row_C, columns_ptr, sides_ptr, class_R, inv_w_R * (inv_temp * LOG2E), lse_R * LOG2E,
            grad_R * fp16_range, grad_R, HAS_ROWS, HAS_COLS, EXCLUDE_OWN, False, BLOCK_C,
        )  # fmt: skip
        h_RC = tl.where(inside_R[:, None], weights_RC * inv_w_R[:, None], 0.0)
    else:
        class_C = load_labels(labels_ptr, row_C, C, num_classes, ignored_class)
        inv_z_C = tl.load(inv_z_ptr + row_C, mask=inside_C, other=0.0)
        lse_C, grad_C = load_side(col_lse_ptr, grad_col_ptr, row_C, inside_C, HAS_COLS)
        positive_RC = tl.load(grad_pos_ptr + row_C, mask=inside_C, other=0.0)[None, :]
        if KEPT:
            own_C = tl.load(positives_ptr + row_C, mask=inside_C, other=0.0)
            kept_ptrs = kept_ptr + row_R.to(tl.int64)[:, None] * stride_kept + row_C[None, :]
            e_RC = tl.load(kept_ptrs, mask=inside_R[:, None] & in_padded_C[None, :], other=0.0).to(tl.float32)
            grads_RC = _kept_logit_grads(
                e_RC, own_C, class_R, class_C, lse_R, grad_R, lse_C, grad_C, positive_RC,
                HAS_ROWS, HAS_COLS, EXCLUDE_OWN,
            )  # fmt: skip
        else:
            logits_RC = _class_logits(dots_RC, inv_w_R, inv_z_C, inv_temp)
            grads_RC = _logit_grads(
                logits_RC, class_R, class_C, lse_R, grad_R, lse_C, grad_C, positive_RC,
                HAS_ROWS, HAS_COLS, EXCLUDE_OWN,
            )  # fmt: skip
        h_RC = grads_RC * (inv_w_R * fp16_range)[:, None] * inv_z_C[None, :]
    h_ptrs = h_ptr + row_R.to(tl.int64)[:, None] * stride_h + row_C[None, :]
    tl.store(h_ptrs, h_RC, mask=(row_R < R)[:, None] & in_padded_C[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


@dataclass(frozen=True)
class Kept:
    """What a forward left so that H needs no product."""

    exponentials: Tensor  # [R, N] exp(s) in the operand's type, rows of it padded
    positives: Tensor  # [N] fp32

    def part(self, rows: slice, columns: slice) -> Kept:
        return Kept(self.exponentials[rows, columns], self.positives[columns])


def narrow(operands: Operands, options: Options, classes: Side, samples: Side, grad_pos: Tensor) -> None:
    upstream = classes.upstream, samples.upstream, grad_pos
    ranges = tuple(fp16_range(samples.x.dtype, upstream, side.inv) for side in (samples, classes))
    both = columns(operands, options, classes, samples, grad_pos, ranges, of_classes=True)
    parts = [
        (a, _launch_narrow(operands, options, a, b, grad_pos, of_b, weights_range, a_is_classes=a is classes))
        for a, b, of_b, weights_range in zip((classes, samples), (samples, classes), both, ranges, strict=True)
        if a.grad is not None
    ]
    split = [(side, part) for side, part in parts if part is not None]
    if split:
        finish(options, None, *split)  # the kernel has undone the scale of fp16


def _launch_narrow(
    operands: Operands,
    options: Options,
    a: Side,
    b: Side,
    grad_pos: Tensor,
    of_b: Columns,
    weights_range: Tensor | None,
    *,
    a_is_classes: bool,
) -> Tensor | None:
    """dA, by recomputing the logits; or, when splits share its columns, their parts of P [S, R, D]."""
    num_rows, (num_columns, dim) = len(a.x), b.x.shape
    rows, cols = (side.lse is not None for side in ((a, b) if a_is_classes else (b, a)))
    tables = _launch.narrow_backward(rows, cols, listed=a_is_classes and operands.present is not None)
    config = _launch.narrow_config(tables, a.x)
    row_blocks = cdiv(num_rows, config.block_r)
    splits = _launch.split_count(row_blocks, cdiv(num_columns, config.block_c), 4 * num_rows * dim)
    new = torch.empty if operands.present is None else torch.zeros  # rows of absent classes are not visited
    partials = new(splits, num_rows, dim, device=a.x.device) if splits > 1 else None
    _lse_bwd_kernel[(row_blocks, splits)](
        a_ptr=a.x,
        b_ptr=b.x,
        inv_a_ptr=a.inv,
        **of_b.arguments(),
        labels_ptr=operands.labels,
        lse_a_ptr=a.lse,
        grad_a_ptr=a.upstream,
        grad_pos_ptr=grad_pos,
        range_ptr=weights_range,
        grad_ptr=a.grad,
        radial_ptr=a.radial,
        partials_ptr=partials,
        R=num_rows,
        C=num_columns,
        D=dim,
        stride_a=a.x.stride(0),
        stride_b=b.x.stride(0),
        stride_partials=num_rows * dim,
        A_IS_CLASSES=a_is_classes,
        HAS_A=a.lse is not None,
        HAS_B=b.lse is not None,
        HAS_RANGE=weights_range is not None,
        SPLIT=splits > 1,
        # Partial results the next kernel frees of their radial part and multiplies by their factor.
        NORMALIZE=options.normalize and splits == 1,
        **options.factor_arguments(used=splits == 1),
        INPUT_PRECISION=_launch.input_precision(a.x.dtype),
        **operands.class_arguments(),
        **options.scalars(),
        **config.launch_options(),
    )
    return partials


def wide(
    operands: Operands, options: Options, classes: Side, samples: Side, grad_pos: Tensor, kept: Kept | None
) -> None:
    """Both gradients through H, a bounded chunk at a time along the longer side; the other side's sum stays in fp32."""
    dtype, num_rows, num_samples = samples.x.dtype, len(classes.x), len(samples.x)
    weights_range = fp16_range(dtype, (classes.upstream, samples.upstream, grad_pos), classes.inv, samples.inv)
    of_samples = None
    if kept is None and _launch.prepares_columns(samples.x, num_rows):
        of_samples, _ = columns(
            operands, options, classes, samples, grad_pos, (weights_range, weights_range), of_classes=False
        )
    shorter = 1 if num_rows > num_samples else 0  # of (classes, samples): the side that every chunk holds whole

    def add_chunk(rows: slice, part: slice, whole_sum: Tensor | None) -> Tensor | None:
        """The shorter side's sum with this chunk. All else that it takes is gone before the next one begins."""
        w, z = classes.rows(rows), samples.rows(part)
        h = _launch_tile(
            operands, options, w, z, part, rows.start, grad_pos, weights_range,
            None if kept is None else kept.part(rows, part), None if of_samples is None else of_samples.part(part),
        )  # fmt: skip
        is_last = (rows.stop, part.stop) == (num_rows, num_samples)
        whole = []
        for i, (side, a, b) in enumerate(((w, h, z.x), (z, h.T, w.x))):
            if side.grad is None:
                continue
            total = mm_fp32(a, b, whole_sum if i == shorter else None)
            if i == shorter:
                whole_sum = total
            if i != shorter or is_last:
                whole.append((side, total[None]))
        if whole:
            finish(options, weights_range, *whole)
        return whole_sum

    whole_sum = None
    for rows, part in _launch.chunks(num_rows, num_samples, dtype.itemsize, samples.x.shape[1]):
        whole_sum = add_chunk(rows, part, whole_sum)


def _launch_tile(
    operands: Operands,
    options: Options,
    classes: Side,
    samples: Side,
    part: slice,
    row_start: int,
    grad_pos: Tensor,
    weights_range: Tensor | None,
    kept: Kept | None,
    of_samples: Columns | None,
) -> Tensor:
    """H of a chunk of classes and samples, in the operand's type."""
    num_rows, (num_columns, dim) = len(classes.x), samples.x.shape
    if kept is None:
        crowded = samples.lse is not None or (of_samples is None and samples.x.dtype.itemsize == 2)
        tables = _launch.BACKWARD_WIDE_CROWDED if crowded else _launch.BACKWARD_WIDE
        config = _launch.wide_config(tables, classes.x, num_columns)
    else:
        config = _launch.BACKWARD_KEPT
    h = samples.x.new_empty(num_rows, cdiv(num_columns, 64) * 64)  # padded: library products want aligned rows
    _lse_bwd_tile_kernel[(cdiv(num_rows, config.block_r) * cdiv(num_columns, config.block_c),)](
        w_ptr=classes.x,
        z_ptr=samples.x,
        inv_w_ptr=classes.inv,
        inv_z_ptr=samples.inv,
        labels_ptr=operands.labels[part],
        row_lse_ptr=classes.lse,
        col_lse_ptr=samples.lse,
        grad_row_ptr=classes.upstream,
        grad_col_ptr=samples.upstream,
        grad_pos_ptr=grad_pos[part],
        range_ptr=weights_range,
        columns_ptr=None if of_samples is None else of_samples.columns,
        sides_ptr=None if of_samples is None else of_samples.sides,
        kept_ptr=None if kept is None else kept.exponentials,
        positives_ptr=None if kept is None else kept.positives,
        h_ptr=h,
        R=num_rows,
        C=num_columns,
        D=dim,
        row_start=row_start,
        stride_w=classes.x.stride(0),
        stride_z=samples.x.stride(0),
        stride_kept=0 if kept is None else kept.exponentials.stride(0),
        stride_h=h.stride(0),
        HAS_ROWS=classes.lse is not None,
        HAS_COLS=samples.lse is not None,
        HAS_RANGE=weights_range is not None,
        KEPT=kept is not None,
        LEAN=of_samples is not None,
        INPUT_PRECISION=_launch.input_precision(samples.x.dtype),
        **operands.class_arguments(),
        **options.scalars(),
        **config.launch_options(),
    )
    return h[:, :num_columns]
