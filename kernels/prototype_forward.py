"""Forward over prototypes and samples: norms, positives and log-sum-exps. The derivation is in prototype_lse.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._epilogue import MAX_FIXED_SHIFT
from ._launch import cdiv
from ._prototype_tiles import Operands, Options, load_classes, load_labels
from ._tiles import (
    LOG2E,
    add_exponentials,
    empty_sum,
    inverse,
    load_inverse_temperature,
    load_rows,
    log_sum,
    product,
    split_range,
)


@triton.jit(do_not_specialize=["ignored_class"])
def _inverse_norms_kernel(
    features_ptr,  # [N, D]
    prototypes_ptr,  # [K, D]
    labels_ptr,  # [N] int64
    temperature_ptr,  # [1] fp32 when HAS_TEMPERATURE
    inv_features_ptr,  # [N] fp32
    inv_prototypes_ptr,  # [K] fp32
    positives_ptr,  # [N] fp32
    sample_columns_ptr,  # [3, padded N] fp32, see `Norms`
    class_columns_ptr,  # [3, padded K] fp32 when COLUMNS_OF_CLASSES
    class_counts_ptr,  # [K] int32, added to, when HAS_COUNTS
    N,
    K,
    D,
    padded_N,
    padded_K,
    stride_features,
    stride_prototypes,
    ignored_class,
    inv_temperature,
    COLUMNS_OF_CLASSES: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    LOG2: tl.constexpr,  # logits of the columns are wanted in units of log 2
    HAS_TEMPERATURE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Inverse norms of both operands, every sample's positive, and what the tiles read of each column.

    A positive is a product of two rows, read here once; finding it in the tiles of the log-sum-exp would cost each
    tile a reduction across its rows. A label indexes memory only after it was found to lie in [0, K).
    """
    feature_blocks = tl.cdiv(padded_N, BLOCK_R)
    block = tl.program_id(0)
    inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
    squares_R = tl.zeros((BLOCK_R,), tl.float32)
    if block < feature_blocks:
        sample_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
        inside_R = sample_R < N
        label_R = load_labels(labels_ptr, sample_R, N, K, ignored_class)
        has_label_R = label_R >= 0
        products_R = tl.zeros((BLOCK_R,), tl.float32)
        own_squares_R = tl.zeros((BLOCK_R,), tl.float32)
        for d in range(0, D, BLOCK_D):
            z_RD = load_rows(features_ptr, sample_R, inside_R, stride_features, d, D, BLOCK_D).to(tl.float32)
            w_RD = load_rows(prototypes_ptr, label_R, has_label_R, stride_prototypes, d, D, BLOCK_D).to(tl.float32)
            squares_R += tl.sum(z_RD * z_RD, axis=1)
            own_squares_R += tl.sum(w_RD * w_RD, axis=1)
            products_R += tl.sum(z_RD * w_RD, axis=1)
        inv_R = inverse(squares_R, NORMALIZE)
        positives_R = products_R * inv_R * inverse(own_squares_R, NORMALIZE) * inv_temp
        tl.store(inv_features_ptr + sample_R, inv_R, mask=inside_R)
        tl.store(positives_ptr + sample_R, tl.where(has_label_R, positives_R, 0.0), mask=inside_R)
        if HAS_COUNTS:
            # Whole numbers: any order will do.
            tl.atomic_add(class_counts_ptr + label_R, 1, mask=has_label_R, sem="relaxed")
        _store_columns(sample_columns_ptr, sample_R, padded_N, inv_R, label_R)
    else:
        class_R = (block - feature_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside_R = class_R < K
        for d in range(0, D, BLOCK_D):
            w_RD = load_rows(prototypes_ptr, class_R, inside_R, stride_prototypes, d, D, BLOCK_D).to(tl.float32)
            squares_R += tl.sum(w_RD * w_RD, axis=1)
        inv_R = inverse(squares_R, NORMALIZE)
        tl.store(inv_prototypes_ptr + class_R, inv_R, mask=inside_R)
        if COLUMNS_OF_CLASSES:
            scale_R = inv_R * (inv_temp * LOG2E if LOG2 else inv_temp)
            _store_columns(class_columns_ptr, class_R, padded_K, scale_R, tl.where(inside_R, class_R, -2))


@triton.jit
def _store_columns(columns_ptr, column, padded, scale, label):
    tl.store(columns_ptr + column, scale, mask=column < padded)
    tl.store(columns_ptr + padded + column, label.to(tl.float32, bitcast=True), mask=column < padded)
    tl.store(columns_ptr + 2 * padded + column, tl.where(label >= 0, 0.0, float("-inf")), mask=column < padded)


@triton.jit(do_not_specialize=["ignored_class"])
def _lse_fwd_kernel(
    a_ptr,  # [R, D] operand whose rows are summed over B
    b_ptr,  # [C, D]
    inv_a_ptr,  # fp32, one a row of A
    columns_ptr,  # [3, padded C] fp32 of B, see `Norms`
    labels_ptr,  # [N] int64
    temperature_ptr,  # [1] fp32 when HAS_TEMPERATURE
    present_ptr,  # [R] int32, the class of each row, present ones first, when COMPACT
    num_present_ptr,  # [1] int32: rows from here on are of absent classes and take no part, when COMPACT
    lse_ptr,  # [S, R] fp32
    col_lse_ptr,  # [blocks of rows, C] fp32, when BOTH
    R,
    C,
    D,
    padded_C,
    num_classes,
    stride_a,
    stride_b,
    ignored_class,
    inv_temperature,
    A_IS_CLASSES: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    FIXED_SHIFT: tl.constexpr,  # exp(s) is summed as it is: |s| <= 64
    HAS_TEMPERATURE: tl.constexpr,
    COMPACT: tl.constexpr,
    BOTH: tl.constexpr,  # rows are classes, and every block of them leaves its part of the samples' sums
    NARROW: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = R
    if COMPACT:
        R = tl.load(num_present_ptr)
    if tl.program_id(0) * BLOCK_R >= R:
        return
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < R
    if A_IS_CLASSES:
        class_R = load_classes(present_ptr, row_R, R, COMPACT)
    else:
        class_R = load_labels(labels_ptr, row_R, R, num_classes, ignored_class)
    scale_R = tl.load(inv_a_ptr + row_R, mask=inside_R, other=0.0)
    if A_IS_CLASSES:
        inv_temp = load_inverse_temperature(temperature_ptr, inv_temperature, HAS_TEMPERATURE)
        scale_R *= inv_temp * LOG2E if FIXED_SHIFT else inv_temp
    if NARROW:
        a_RD = load_rows(a_ptr, row_R, inside_R, stride_a, 0, D, BLOCK_D)

    maximum_R, total_R = empty_sum(BLOCK_R, FIXED_SHIFT)
    first, last = split_range(C, BLOCK_C)
    for start in range(first, last, BLOCK_C):
        row_C = start + tl.arange(0, BLOCK_C)
        inside_C = row_C < C
        # Ready for use, and padded: every thread holds few rows of many columns, so what is done here is done often.
        scale_C = tl.load(columns_ptr + row_C)
        class_C = tl.load(columns_ptr + padded_C + row_C).to(tl.int32, bitcast=True)
        nothing_C = tl.load(columns_ptr + 2 * padded_C + row_C)
        if NARROW:
            b_CD = load_rows(b_ptr, row_C, inside_C, stride_b, 0, D, BLOCK_D)
            dots_RC = tl.dot(a_RD, b_CD.T, input_precision=INPUT_PRECISION)
        elif A_IS_CLASSES or b_ptr.dtype.element_ty != tl.float32:
            dots_RC = product(
                a_ptr, b_ptr, row_R, row_C, inside_R, inside_C, stride_a, stride_b, D,
                BLOCK_R, BLOCK_C, BLOCK_D, INPUT_PRECISION,
            )  # fmt: skip
        else:
            # Classes first, as in the backward: products of float32 depend, in their last bit, on which operand is.
            dots_CR = product(
                b_ptr, a_ptr, row_C, row_R, inside_C, inside_R, stride_b, stride_a, D,
                BLOCK_C, BLOCK_R, BLOCK_D, INPUT_PRECISION,
            )  # fmt: skip
            dots_RC = tl.trans(dots_CR)
        # The factors meet before the product: a logit then has the same bits whichever operand owns the rows.
        logits_RC = dots_RC * (scale_R[:, None] * scale_C[None, :]) + nothing_C[None, :]
        if FIXED_SHIFT:
            e_RC = tl.exp2(logits_RC)
            if EXCLUDE_OWN:
                e_RC = tl.where(class_R[:, None] == class_C[None, :], 0.0, e_RC)
            if BOTH:
                e_RC = tl.where(inside_R[:, None], e_RC, 0.0)
                total_C = tl.sum(e_RC, axis=0)
                col_lse_C = log_sum(tl.zeros_like(total_C), total_C)
            total_R += tl.sum(e_RC, axis=1)
        else:
            if EXCLUDE_OWN:
                logits_RC = tl.where(class_R[:, None] == class_C[None, :], float("-inf"), logits_RC)
            if BOTH:
                logits_RC = tl.where(inside_R[:, None], logits_RC, float("-inf"))
                maximum_C, total_C = empty_sum(BLOCK_C, False)
                maximum_C, total_C = add_exponentials(maximum_C, total_C, logits_RC, 0, False)
                col_lse_C = log_sum(maximum_C, total_C)
            maximum_R, total_R = add_exponentials(maximum_R, total_R, logits_RC, 1, False)
        if BOTH:
            tl.store(col_lse_ptr + tl.program_id(0).to(tl.int64) * C + row_C, col_lse_C, mask=inside_C)

    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * rows + row_R, log_sum(maximum_R, total_R), mask=inside_R)


@triton.jit
def _tile_sums(
    dots_RC,
    class_R,
    inside_R,
    scale_R,
    columns_ptr,
    col_lse_ptr,
    kept_R,  # where each row of the kept exponentials begins
    first_C,
    C,
    padded_C,
    stride_kept,
    HAS_COLS: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of exp(s) along the rows of these columns; store the logs of those along the columns, and exp(s) if kept."""
    row_C = first_C + tl.arange(0, BLOCK_C)
    scale_C = tl.load(columns_ptr + row_C)
    class_C = tl.load(columns_ptr + padded_C + row_C).to(tl.int32, bitcast=True)
    logits_RC = dots_RC * (scale_R[:, None] * scale_C[None, :])
    if not HAS_COLS:
        logits_RC += tl.load(columns_ptr + 2 * padded_C + row_C)[None, :]
    e_RC = tl.exp2(logits_RC)
    if EXCLUDE_OWN:
        e_RC = tl.where(class_R[:, None] == class_C[None, :], 0.0, e_RC)
    if KEEP:
        tl.store(kept_R[:, None] + row_C[None, :], e_RC, mask=inside_R[:, None] & (row_C < stride_kept)[None, :])
    if HAS_COLS:
        total_C = tl.sum(tl.where(inside_R[:, None], e_RC, 0.0), axis=0)
        tl.store(col_lse_ptr + row_C, log_sum(tl.zeros_like(total_C), total_C), mask=row_C < C)
        e_RC = tl.where((class_C >= 0)[None, :], e_RC, 0.0)  # ignored samples are in no row's sum
    return tl.sum(e_RC, axis=1)


@triton.jit
def _lse_fwd_tile_kernel(
    w_ptr,  # [R, D]
    z_ptr,  # [C, D]
    inv_w_ptr,
    columns_ptr,  # [3, padded C] fp32, see `Norms`
    present_ptr,
    num_present_ptr,
    row_lse_ptr,  # [tiles along C, R] fp32, when HAS_ROWS
    col_lse_ptr,  # [tiles along R, C] fp32, when HAS_COLS
    kept_ptr,  # [R, stride_kept] in the operand's type, when KEEP
    R,
    C,
    D,
    padded_C,
    stride_w,
    stride_z,
    stride_kept,
    inv_temperature,
    HAS_ROWS: tl.constexpr,
    HAS_COLS: tl.constexpr,
    EXCLUDE_OWN: tl.constexpr,
    COMPACT: tl.constexpr,
    KEEP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sums of exp(s) of one tile along rows and columns, and exp(s) kept for the backward. Fixed shift only."""
    row_blocks = tl.cdiv(R, BLOCK_R)
    first_R = tl.program_id(0) % row_blocks * BLOCK_R
    tile_C = tl.program_id(0) // row_blocks
    first_C = tile_C * BLOCK_C
    rows = R
    if COMPACT:
        R = tl.load(num_present_ptr)
    if first_R >= R:
        return
    row_R = first_R + tl.arange(0, BLOCK_R)
    row_C = first_C + tl.arange(0, BLOCK_C)
    inside_R = row_R < R
    dots_RC = product(
        w_ptr, z_ptr, row_R, row_C, inside_R, row_C < C, stride_w, stride_z, D,
        BLOCK_R, BLOCK_C, BLOCK_D, INPUT_PRECISION,
    )  # fmt: skip
    class_R = load_classes(present_ptr, row_R, R, COMPACT)
    scale_R = tl.load(inv_w_ptr + row_R, mask=inside_R, other=0.0) * (inv_temperature * LOG2E)
    kept_R = row_R
    if KEEP:
        kept_R = kept_ptr + row_R.to(tl.int64) * stride_kept
    if HAS_COLS:
        col_lse_ptr += (first_R // BLOCK_R).to(tl.int64) * C

    # In halves: what a whole tile needs of each column would leave no registers for the logits.
    left_RC, right_RC = tl.split(tl.permute(tl.reshape(dots_RC, (BLOCK_R, 2, BLOCK_C // 2)), (0, 2, 1)))
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    for half in tl.static_range(2):
        total_R += _tile_sums(
            left_RC if half == 0 else right_RC, class_R, inside_R, scale_R, columns_ptr, col_lse_ptr, kept_R,
            first_C + half * (BLOCK_C // 2), C, padded_C, stride_kept, HAS_COLS, EXCLUDE_OWN, KEEP, BLOCK_C // 2,
        )  # fmt: skip
    if HAS_ROWS:
        row_lse = row_lse_ptr + tile_C.to(tl.int64) * rows + row_R
        tl.store(row_lse, log_sum(tl.zeros_like(total_R), total_R), mask=inside_R)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


class Norms(NamedTuple):
    positives: Tensor  # [N] fp32
    inv_features: Tensor  # [N] fp32
    inv_prototypes: Tensor  # [K] fp32
    # What the tiles read of each column: scale (what makes its dot products logits, in units of log 2 where the shift
    # is fixed), class (int32 bits, negative where it takes no part) and 0, or -inf where it takes no part. Columns up
    # to a multiple of every tile are there.
    sample_columns: Tensor  # [3, padded N] fp32
    class_columns: Tensor | None  # [3, padded K] fp32
    counts: Tensor | None  # [K] int32, samples of each class


def inverse_norms(operands: Operands, options: Options, *, cols: bool, count: bool = False) -> Norms:
    """Inverse norms, positives and the columns that sums along rows, or along columns, stream: samples in any case,
    for a tile of its own takes them as columns.
    """
    features, prototypes = operands.features, operands.prototypes
    (num_samples, dim), num_classes = features.shape, len(prototypes)
    positives = torch.empty(num_samples, dtype=torch.float32, device=features.device)
    inv_features = torch.empty_like(positives)
    inv_prototypes = positives.new_empty(num_classes)
    padded = _launch.padded_columns(num_samples), _launch.padded_columns(num_classes)
    sample_columns = positives.new_empty(3, padded[0])
    class_columns = positives.new_empty(3, padded[1]) if cols else None
    counts = positives.new_zeros(num_classes, dtype=torch.int32) if count else None
    blocks = _launch.row_blocks(dim)
    _inverse_norms_kernel[(sum(cdiv(size, blocks["BLOCK_R"]) for size in padded),)](
        features_ptr=features,
        prototypes_ptr=prototypes,
        labels_ptr=operands.labels,
        temperature_ptr=options.temperature,
        inv_features_ptr=inv_features,
        inv_prototypes_ptr=inv_prototypes,
        positives_ptr=positives,
        sample_columns_ptr=sample_columns,
        class_columns_ptr=class_columns,
        class_counts_ptr=counts,
        N=num_samples,
        K=num_classes,
        D=dim,
        padded_N=padded[0],
        padded_K=padded[1],
        stride_features=features.stride(0),
        stride_prototypes=prototypes.stride(0),
        ignored_class=operands.ignored_class,
        inv_temperature=options.inv_temperature,
        COLUMNS_OF_CLASSES=cols,
        HAS_COUNTS=count,
        LOG2=options.fixed_shift(features.dtype, MAX_FIXED_SHIFT),
        HAS_TEMPERATURE=options.temperature is not None,
        NORMALIZE=options.normalize,
        **blocks,
    )
    return Norms(positives, inv_features, inv_prototypes, sample_columns, class_columns, counts)


def partials(
    operands: Operands, options: Options, norms: Norms, kept: Tensor, *, rows: bool, cols: bool, of_ignored: bool
) -> tuple[Tensor, Tensor]:
    """Parts of row_lse [S, R], for present classes alone if they are listed, and of col_lse [S, N], to be joined; no
    parts of what is not asked for. Fills `kept` with exp(s), if there is room in it. Where col_lse is not asked for
    `of_ignored` samples, one pass serves rows and columns.
    """
    if kept.numel() or _launch.sums_by_tiles(
        operands.features, len(operands.prototypes if operands.present is None else operands.present.classes),
        options.fixed_shift(operands.features.dtype, MAX_FIXED_SHIFT),
    ):  # fmt: skip
        return _partials_of_tiles(operands, options, norms, kept, rows=rows, cols=cols)
    if rows and cols and of_ignored:
        return tuple(_partials(operands, options, norms, a_is_classes=side, both=False)[0] for side in (True, False))
    of_a, of_columns = _partials(operands, options, norms, a_is_classes=rows, both=rows and cols)
    return (of_a, of_columns) if rows else (of_columns, of_a)


def _partials(
    operands: Operands, options: Options, norms: Norms, *, a_is_classes: bool, both: bool
) -> tuple[Tensor, Tensor]:
    """Parts of the log-sum-exps of the owned rows and, if `both` (rows are classes), of the columns in the pass."""
    if a_is_classes:
        a, inv_a = operands.listed(operands.prototypes), operands.listed(norms.inv_prototypes)
        b, columns = operands.features, norms.sample_columns
    else:
        a, inv_a = operands.features, norms.inv_features
        b, columns = operands.prototypes, norms.class_columns
    num_rows, (num_columns, dim) = len(a), b.shape
    config, narrow = _launch.forward_config(_launch.FORWARD_NARROW, _launch.FORWARD_WIDE, a, num_columns)
    row_blocks = cdiv(num_rows, config.block_r)
    splits = _launch.split_count(row_blocks, cdiv(num_columns, config.block_c), 4 * num_rows)
    partials = torch.empty(splits, num_rows, device=a.device)
    if operands.present is not None:
        partials.fill_(float("-inf"))  # rows of absent classes are not visited
    col_partials = partials.new_empty(row_blocks if both else 0, num_columns)
    if num_rows:
        _lse_fwd_kernel[(row_blocks, splits)](
            a_ptr=a,
            b_ptr=b,
            inv_a_ptr=inv_a,
            columns_ptr=columns,
            labels_ptr=operands.labels,
            lse_ptr=partials,
            col_lse_ptr=col_partials if both else None,
            R=num_rows,
            C=num_columns,
            D=dim,
            padded_C=columns.shape[1],
            stride_a=a.stride(0),
            stride_b=b.stride(0),
            A_IS_CLASSES=a_is_classes,
            FIXED_SHIFT=options.fixed_shift(a.dtype, MAX_FIXED_SHIFT),
            BOTH=both,
            NARROW=narrow,
            INPUT_PRECISION=_launch.input_precision(a.dtype),
            **operands.class_arguments(),
            **options.scalars(),
            **config.launch_options(),
        )
    return partials, col_partials


def _partials_of_tiles(
    operands: Operands, options: Options, norms: Norms, kept: Tensor, *, rows: bool, cols: bool
) -> tuple[Tensor, Tensor]:
    """The same by tiles that each have a program: one product serves rows, columns and what is kept."""
    features = operands.features
    prototypes, inv_prototypes = operands.listed(operands.prototypes), operands.listed(norms.inv_prototypes)
    num_rows, (num_samples, dim) = len(prototypes), features.shape
    tables = _launch.FORWARD_KEEP_WIDE_CROWDED if rows and cols else _launch.FORWARD_KEEP_WIDE
    config = _launch.wide_config(tables, prototypes, num_samples)
    row_tiles, col_tiles = cdiv(num_rows, config.block_r), cdiv(num_samples, config.block_c)
    row_partials = torch.empty(col_tiles if rows else 0, num_rows, device=features.device)
    col_partials = torch.empty(row_tiles if cols else 0, num_samples, device=features.device)
    if operands.present is not None:
        row_partials.fill_(float("-inf"))  # rows of absent classes are not visited
    _lse_fwd_tile_kernel[(row_tiles * col_tiles,)](
        w_ptr=prototypes,
        z_ptr=features,
        inv_w_ptr=inv_prototypes,
        columns_ptr=norms.sample_columns,
        row_lse_ptr=row_partials if rows else None,
        col_lse_ptr=col_partials if cols else None,
        kept_ptr=kept if kept.numel() else None,
        R=num_rows,
        C=num_samples,
        D=dim,
        padded_C=norms.sample_columns.shape[1],
        stride_w=prototypes.stride(0),
        stride_z=features.stride(0),
        stride_kept=kept.stride(0),
        inv_temperature=options.inv_temperature,
        HAS_ROWS=rows,
        HAS_COLS=cols,
        EXCLUDE_OWN=options.exclude_own,
        KEEP=kept.numel() > 0,
        INPUT_PRECISION=_launch.input_precision(features.dtype),
        **operands.present_arguments(),
        **config.launch_options(),
    )
    return row_partials, col_partials
