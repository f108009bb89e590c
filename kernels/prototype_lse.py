"""Log-sum-exps of cosine logits along rows and columns, and their exact gradient, without storing the logits.

Derivation. With ŵ_c = w_c/|w_c| and u_j = z_j/|z_j| the logits are s[c, j] = ŵ_c·u_j/τ, of shape K x N. Forward gives

    row_lse[c] = log Σ_j exp s[c, j]  over valid samples,      col_lse[j] = log Σ_c exp s[c, j],
    positives[j] = s[y_j, j],

without the entries y_j = c in both sums when `exclude_own`. For upstream gradients g_row, g_col, g_pos
of the three, that of s is

    G[c, j] = m (g_row[c] exp(s - row_lse[c]) + g_col[j] exp(s - col_lse[j])) + [y_j = c] g_pos[j],

m = 0 for invalid samples and, when `exclude_own`, for y_j = c. The log-sum-exps are all that a backward has to keep.
Write i_w = 1/|w|, i_z = 1/|z| and H[c, j] = G[c, j] i_w[c] i_z[j]. Then P_Z = Hᵀ W and P_W = H Z are the gradients
before the projection of the normalisation, both up to 1/τ: what is left to do with them stands in _epilogue.py.

Precision. Positives enter G in fp32, before it is rounded to the operand's type: near collapse G's entries cancel, and
adding the positive term after the product loses the tangential part altogether in bfloat16.

Cost in products, F1 = 2KND operations: forward F1 for each side that is summed, backward 3 F1. The forward of wide
operands may keep exp(s) in their type (`_launch.kept_shape`): then one F1 serves both sides and the backward takes 2.
What rounding exp(s) loses, rounding H loses again; not at a sample's own entry, where g_row exp(s - row_lse) + g_pos
cancels, so that one comes from the positives, kept in fp32. What is kept is never written again: a graph may be walked
twice.

Two shapes of program. Narrow (half types, D as pinned): a program owns a block of rows of one operand A, streams those
of the other, B, and keeps A and its accumulator on chip, as attention does. Wide: the product runs over D in steps, and
the backward stores H for a bounded chunk and leaves P to two library products. Both operands take the part of A:
prototypes for the row sums and dW, features for the column sums and dZ; `A_IS_CLASSES` tells which.

Splits of the streamed side leave partial results that another kernel adds in a fixed order: no atomics, the same bits
every time. Where most classes are absent from the batch, the launchers gather the present ones first (`Present`).

Shapes: N samples, K classes, D width; R rows of A, C rows of B; S splits. Vectors over tile rows carry _R, tiles _RC.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _launch, prototype_backward, prototype_forward
from ._epilogue import combine, unpadded
from ._prototype_tiles import Operands, Options, Present
from .class_sums import class_sums, segment_sum
from .prototype_backward import Kept
from .prototype_columns import Side

__all__ = ["class_sums", "launch_bwd", "launch_fwd", "segment_sum"]


def launch_fwd(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    counts: Tensor | None = None,
    temperature: Tensor | None = None,
    inv_temperature: float,
    ignore_index: int,
    rows: bool,
    cols: bool,
    exclude_own: bool,
    normalize: bool,
    keep_bytes: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps of s = ŵ·u/τ along rows and columns, the positives and the inverse norms.

    Args:
        features, prototypes: [N, D] and [K, D] float32, bfloat16 or float16, any row stride. Products are taken in the
            type of the features and summed in fp32.
        labels: [N] int64. `ignore_index` and anything outside [0, K) is left out of every row sum and has no positive.
        counts: [K] int64, samples of each class in the batch, N of them present at most. With rows alone and K large,
            rows of absent classes are skipped and their row_lse is -inf.
        temperature: one fp32 value on the device, read by the kernels; None to use the number `inv_temperature`.
        keep_bytes: room for exponentials, kept for the backward where `_launch.kept_shape` finds that to pay.

    Returns (fp32): row_lse [K] or [0]; col_lse [N] or [0], both -inf where nothing was summed; positives [N], zero for
        ignored samples; inverse norms [N] and [K], ones when not `normalize`, zero for vectors no longer than 1e-12.
        Last, in the operand's type, the kept exponentials [K, N] (rows padded; of the present classes, where absent
        ones are skipped) or an empty tensor.
    """
    operands = prepare(features, prototypes, labels, counts, ignore_index, rows_only=rows and not cols)
    options = Options(temperature, inv_temperature, normalize, exclude_own)
    shape = _launch.kept_shape(
        features, prototypes, counts=counts, temperature=temperature, inv_temperature=inv_temperature, rows=rows,
        cols=cols, normalize=normalize, keep_bytes=keep_bytes,
    )  # fmt: skip
    kept = operands.features.new_empty(shape)
    with _launch.on_device(features):
        norms = prototype_forward.inverse_norms(operands, options, cols=cols)
        parts = prototype_forward.partials(operands, options, norms, kept, rows=rows, cols=cols, of_ignored=True)
        row_lse, col_lse = map(combine, parts)
        if rows and operands.present is not None:
            row_lse = operands.present.spread(row_lse, len(prototypes), float("-inf"))
    return row_lse, col_lse, norms.positives, norms.inv_features, norms.inv_prototypes, kept


def launch_bwd(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    positives: Tensor | None,
    inv_norm_features: Tensor,
    inv_norm_prototypes: Tensor,
    kept: Tensor | None,
    grad_row: Tensor,
    grad_col: Tensor,
    grad_pos: Tensor,
    *,
    counts: Tensor | None = None,
    temperature: Tensor | None = None,
    inv_temperature: float,
    ignore_index: int,
    rows: bool,
    cols: bool,
    exclude_own: bool,
    normalize: bool,
    factor: tuple[Tensor, Tensor] | None = None,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient for upstream gradients of row_lse, col_lse and positives (contiguous fp32; unused sides are not read).

    With a factor (g, M) of fp32 numbers on the device all of it is multiplied by g/M. Positives are read where
    exponentials were kept.

    Returns: grad_features [N, D] and grad_prototypes [K, D], summed in fp32, in the types of their inputs; and of every
        sample τ Σ_c (G∘s)[c, j], fp32 [N]: dL/dτ is minus their sum over τ². The gradients of features and of
        prototypes are computed where `wanted`, else empty, and without the first so is the last.
    """
    operands = prepare(features, prototypes, labels, counts, ignore_index, rows_only=rows and not cols)
    options = Options(temperature, inv_temperature, normalize, exclude_own, factor=factor)
    present, listed = operands.present, operands.listed
    # Rows of absent classes are not visited, and without samples none is: they keep the zeros they start from.
    new = torch.empty if present is None and len(features) else torch.zeros
    classes = _side(
        prototypes, listed(operands.prototypes), listed(inv_norm_prototypes), listed(row_lse) if rows else None,
        listed(grad_row) if rows else None, new if wanted[1] else None,
    )  # fmt: skip
    samples = _side(
        features, operands.features, inv_norm_features, col_lse if cols else None, grad_col if cols else None,
        new if wanted[0] else None,
    )  # fmt: skip
    if len(features) and any(wanted):
        shared = (operands, options, classes, samples, grad_pos)
        with _launch.on_device(features):
            if _launch.is_narrow(_launch.BACKWARD_NARROW, operands.features):
                prototype_backward.narrow(*shared)
            else:
                prototype_backward.wide(*shared, Kept(kept, positives) if kept is not None and kept.numel() else None)
    grad_features = grad_prototypes = features.new_empty(0)
    radial = inv_norm_features.new_empty(0)
    if samples.grad is not None and samples.radial is not None:
        grad_features, radial = unpadded(samples.grad, features), samples.radial
    if classes.grad is not None:
        of_all = classes.grad if present is None else present.spread(classes.grad, len(prototypes), 0.0)
        grad_prototypes = unpadded(of_all, prototypes)
    return grad_features, grad_prototypes, radial


def _side(
    x: Tensor, operand: Tensor, inv: Tensor, lse: Tensor | None, upstream: Tensor | None,
    new: Callable[..., Tensor] | None,
) -> Side:  # fmt: skip
    """One side, with room for the gradient of x in x's type and the operand's (padded) shape, if it is wanted."""
    if new is None:
        return Side(operand, inv, None, None, lse, upstream)
    grad = new(operand.shape, dtype=_launch.kernel_dtype(x), device=x.device)
    return Side(operand, inv, grad, new(len(operand), dtype=torch.float32, device=x.device), lse, upstream)


def prepare(
    features: Tensor, prototypes: Tensor, labels: Tensor, counts: Tensor | None, ignore_index: int, rows_only: bool
) -> Operands:
    dtype = _launch.kernel_dtype(features)
    present = None
    if rows_only and counts is not None and _launch.skips_absent_classes(len(features), *prototypes.shape):
        present_first = torch.argsort((counts == 0).to(torch.int8), stable=True)
        present = Present(present_first[: len(features)], (counts != 0).sum().to(torch.int32))
    return Operands(
        _launch.aligned(features.to(dtype)),
        _launch.aligned(prototypes.to(dtype)),
        labels.contiguous(),
        present,
        ignore_index if 0 <= ignore_index < len(prototypes) else -1,
    )
