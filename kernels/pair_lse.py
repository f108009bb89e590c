"""Log-sum-exps of cosine logits of samples against samples, their positives, and the exact gradient of the rows.

Derivation. With u_k = x_k/|x_k| the logits are s[k, j] = u_k·u_j/τ, n rows by m columns. A pair is valid when both
samples are there and j is not k's own column, and positive, P[k, j], when it is valid and both are of one class (or the
mask says so). Forward gives for every row k

    lse[k] = log Σ_j exp s[k, j]  over valid j,
    positives[k] = Σ_p s[k, p]  or, `inside`,  log Σ_p exp s[k, p]  over its positives.

Let g and q be the upstream gradients of the two. A sample meets s as a row and, where the columns are samples whose own
log-sum-exps are part of the loss, as a column too. As s is symmetric, both parts of its gradient come from one pass:

    G[k, j] = g_k exp(s - lse_k) + P[k, j] q_k  +  g_j exp(s - lse_j) + P[j, k] q_j        on valid pairs
    (`inside`: q exp(s - positives) in the place of q),

of which the first half is the rows' side and the second the columns'. No transposed pass, and no gradient of columns to
send anywhere: in a global batch the rows are one rank's samples, the columns everyone's. The rest is as for prototypes:
H[k, j] = G[k, j] i_k i_j with i = 1/|x|, P = H X, and the gradient through the norm as in _epilogue.py.

Precision. Positives enter G in fp32, before it is rounded to the operand's type: near collapse G's entries cancel.

With a fixed shift (half types and 1/τ small) exp(s - lse_k) is exp(s) exp(-lse_k): one exponential serves both sides.

Shapes: n rows, m columns, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _launch, pair_backward, pair_fixed, pair_forward
from ._epilogue import MAX_BACKWARD_SHIFT, Gradient, Scaling, unpadded
from .pair_backward import Backward, Side
from .pair_forward import Pairs

__all__ = ["Side", "against_itself", "gradient", "launch_bwd", "launch_fwd"]


def launch_fwd(
    anchors: Tensor,
    columns: Tensor | None,
    anchor_ids: Tensor | None,
    column_ids: Tensor | None,
    mask: Tensor | None,
    *,
    offset: int | None,
    temperature: Tensor | None,
    inv_temperature: float,
    normalize: bool,
    inside: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps and positives of every anchor, and the inverse norms.

    Args:
        anchors: [n, D] float32, bfloat16 or float16, any strides. Products are taken in their type, summed in fp32.
        columns: [m, D]; None when they are the anchors, which halves the work.
        anchor_ids, column_ids: [n] and [m] int64 class ids in [0, n + m), or in [0, n) without columns; negative for
            samples that are not there. None exactly when a mask is given, and then all samples are there.
        mask: [n, m] bool, any strides: which columns are an anchor's positives.
        offset: column offset + k is anchor k's own and in none of its sums; None when no column is. 0 without columns.
        temperature: one fp32 value on the device, read by the kernels; None to use the number `inv_temperature`.
        inside: the positives' log-sum-exp instead of their sum.

    Returns (fp32): lse [n], -inf where nothing was summed; positives [n], 0 (`inside`: -inf) where there are none;
        inverse norms [n] and [m] (the same tensor without columns), ones when not `normalize`, zero for vectors no
        longer than 1e-12.
    """
    scaling = Scaling(temperature, inv_temperature, normalize)
    symmetric = columns is None
    if symmetric:
        columns, column_ids, offset = anchors, anchor_ids, 0
    pairs = _pairs(anchors, columns, anchor_ids, column_ids, offset, _launch.kernel_dtype(anchors))
    nothing = not len(anchors) or not len(columns)
    fixed = mask is None and pair_fixed.serves(scaling, pairs.rows, _launch.PAIR_RECTANGLE_FIXED)
    with _launch.on_device(anchors):
        if fixed and not nothing:
            return _fixed_fwd(scaling, pairs, inside)
        inv_anchors = pair_forward.inverse_norms(scaling, pairs.rows)
        inv_columns = inv_anchors if symmetric else pair_forward.inverse_norms(scaling, pairs.columns)
        if nothing:
            empty = inv_anchors.new_full((len(anchors),), float("-inf"))
            return empty, empty.clone() if inside else torch.zeros_like(empty), inv_anchors, inv_columns
        if inside or mask is not None:
            lse, positives = pair_forward.rectangle(scaling, pairs, inv_anchors, inv_columns, mask, inside)
        else:
            positives = pair_forward.class_positives(scaling, pairs, inv_anchors, inv_columns)
            if symmetric:
                lse = pair_forward.triangle(scaling, pairs, inv_anchors)
            else:
                lse, _ = pair_forward.rectangle(scaling, pairs, inv_anchors, inv_columns, None, False)
    return lse, positives, inv_anchors, inv_columns


def _fixed_fwd(scaling: Scaling, pairs: Pairs, inside: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    symmetric = pairs.rows is pairs.columns
    rows = pair_fixed.prepare(pairs.rows, pairs.row_ids)
    columns = rows if symmetric else pair_fixed.prepare(pairs.columns, pairs.column_ids)
    in_tiles = inside or pair_fixed.sums_positives(len(rows.x), len(columns.x))
    if inside or not symmetric:
        results = pair_fixed.rectangle(scaling, rows, columns, pairs.own_offset, in_tiles, inside)
    else:
        results = pair_fixed.triangle(scaling, rows, in_tiles)
    lse = results[0]
    positives = results[1] if in_tiles else pair_forward.class_positives(scaling, pairs, rows.inv, columns.inv)
    return lse, positives, rows.inv, columns.inv


def launch_bwd(
    rows: Tensor,
    columns: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    inv_rows: Tensor,
    inv_columns: Tensor,
    row_side: Side | None,
    column_side: Side | None,
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    *,
    offset: int | None,
    temperature: Tensor | None,
    inv_temperature: float,
    normalize: bool,
    inside: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows, for upstream gradients of the log-sum-exps and positives of either side or both.

    Args: as in `launch_fwd`, and
        row_side, column_side: what the rows, and the columns, are as anchors; None when they are none. Products are
            taken in the anchors' type: that of the columns when they alone are anchors.
        row_mask, column_mask: [n, m] bool, any strides: which columns are a row's positives, which rows a column's.

    Returns: the gradient [n, D] in the rows' type, summed in fp32; Σ G∘s, an fp32 scalar.
    """
    scaling = Scaling(temperature, inv_temperature, normalize)
    if columns is None:
        columns, column_ids, offset = rows, row_ids, 0
    dtype = _launch.kernel_dtype(columns if row_side is None else rows)
    pairs = _pairs(rows, columns, row_ids, column_ids, offset, dtype)
    row_side, column_side = (None if side is None else Side.of(side) for side in (row_side, column_side))
    if pairs.rows is pairs.columns and row_side is not None and column_side is not None:
        column_side = row_side  # of the same samples
    if row_side is None:
        row_mask = None
    if column_side is None:
        column_mask = None
    backward = Backward(pairs, inv_rows, inv_columns, row_side, column_side, row_mask, column_mask, inside)
    grad, radial = gradient(scaling, backward, rows)
    return grad, scaling.divide(radial.sum())


def gradient(scaling: Scaling, backward: Backward, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [n, D] of the rows, as they came, and fp32 [n], whose sum over τ is Σ G∘s."""
    pairs, inv = backward.pairs, backward.inv_rows
    if not len(rows) or not len(pairs.columns):
        return torch.zeros_like(rows, memory_format=torch.contiguous_format), torch.zeros_like(inv)
    grad = torch.empty(pairs.rows.shape, dtype=_launch.kernel_dtype(rows), device=rows.device)
    written = Gradient(pairs.rows, inv, grad, torch.empty_like(inv))
    with _launch.on_device(rows):
        if backward.has_mask or not _launch.is_narrow(_launch.PAIR_BACKWARD_NARROW, pairs.rows):
            pair_backward.wide(scaling, backward, written)
        elif pair_fixed.serves(scaling, pairs.rows, _launch.PAIR_BACKWARD_FIXED, MAX_BACKWARD_SHIFT):
            pair_fixed.backward(scaling, backward, written)
        else:
            pair_backward.narrow(scaling, backward, written)
    return unpadded(grad, rows), written.radial


def against_itself(x: Tensor, ids: Tensor) -> Pairs:
    return _pairs(x, x, ids, ids, 0, _launch.kernel_dtype(x))


def _pairs(
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    offset: int | None,
    dtype: torch.dtype,
) -> Pairs:
    aligned_rows = _launch.aligned(rows.to(dtype))
    return Pairs(
        aligned_rows,
        aligned_rows if columns is rows else _launch.aligned(columns.to(dtype)),
        None if row_ids is None else row_ids.contiguous(),
        None if column_ids is None else column_ids.contiguous(),
        offset,
    )
