"""What the tiles of both passes over pairs share: class ids, which pairs count, logits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_ids(ids_ptr, index, inside, HAS_MASK: tl.constexpr):
    """Class ids, int32; -1 for samples that are not there. Under a mask there are none, and all samples are there."""
    if HAS_MASK:
        return tl.where(inside, 0, -1)
    else:
        class_id = tl.load(ids_ptr + index, mask=inside, other=-1)
        return tl.where(class_id < 0, -1, class_id).to(tl.int32)  # compared in int64: -2^63 narrowed would be class 0


@triton.jit
def valid_pairs(id_R, id_C, own_R, row_C):
    return (id_R >= 0)[:, None] & (id_C >= 0)[None, :] & (own_R[:, None] != row_C[None, :])


@triton.jit
def load_mask(mask_ptr, row_R, row_C, inside_R, inside_C, stride_r, stride_c):
    offsets = row_R.to(tl.int64)[:, None] * stride_r + row_C.to(tl.int64)[None, :] * stride_c
    return tl.load(mask_ptr + offsets, mask=inside_R[:, None] & inside_C[None, :], other=0) != 0


@triton.jit
def pair_logits(dots_RC, inv_R, inv_C, inv_temp):
    """s from the bare products, in nats.

    Half of the temperature joins either side before they meet, so that s[k, j] and s[j, k] have the same bits: the
    log-sum-exp of a row is then met by the very logits it was summed from wherever the row appears as a column. Units
    of log 2 would need lse converted, and that would be the largest error at small τ.
    """
    root = tl.sqrt_rn(inv_temp)
    return dots_RC * ((inv_R * root)[:, None] * (inv_C * root)[None, :])
