"""Sums within classes: of numbers [N] and of unit features [N, D]. Both in an order that never changes: no atomics.

And the classes of labels of any values, by a hash table: its atomics are of integers, whose order is no matter.

`segment_sum` compares every label with every class, for it has only numbers to read. `class_sums` reads vectors, so it
first brings the samples of a class together with a stable sort, after which each class reads its own rows and nothing
else; a scan of all labels by every class would cost K·N reads, far more than the features themselves at K = 10^5.

Shapes: N samples, K classes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._launch import cdiv

_GOLDEN = tl.constexpr(-7046029254386353131)  # 2^64 over the golden ratio, odd, as a signed number


@triton.jit(do_not_specialize=["ignore_index"])
def _segment_sum_kernel(
    values_ptr,  # [N] fp32
    labels_ptr,  # [N] int64
    sums_ptr,  # [K] fp32
    N,
    K,
    ignore_index,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    classes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, N, BLOCK_N):
        samples = start + tl.arange(0, BLOCK_N)
        inside = samples < N
        labels = tl.load(labels_ptr + samples, mask=inside, other=-1)
        values = tl.load(values_ptr + samples, mask=inside & (labels != ignore_index), other=0.0)
        sums += tl.sum(tl.where(classes[:, None] == labels[None, :], values[None, :], 0.0), axis=1)
    tl.store(sums_ptr + classes, sums, mask=classes < K)


@triton.jit
def _class_sums_kernel(
    features_ptr,  # [N, D]
    inv_norms_ptr,  # [N] fp32
    order_ptr,  # [N] int64: samples sorted by class
    bounds_ptr,  # [K + 1] int64: where each class begins in `order`
    sums_ptr,  # [K, D] fp32
    D,
    stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    label = tl.program_id(0)
    depth = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(bounds_ptr + label)
    last = tl.load(bounds_ptr + label + 1)
    sums_D = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        inside = position < last
        sample = tl.load(order_ptr + position, mask=inside, other=0)
        inv_N = tl.load(inv_norms_ptr + sample, mask=inside, other=0.0)
        x_ND = tl.load(
            features_ptr + sample[:, None] * stride + depth[None, :],
            mask=inside[:, None] & (depth < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        sums_D += tl.sum(x_ND * inv_N[:, None], axis=0)
    tl.store(sums_ptr + label.to(tl.int64) * D + depth, sums_D, mask=depth < D)


def segment_sum(values: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Σ of values [N] fp32 over each class → [K] fp32, without ignore_index and labels outside [0, K)."""
    sums = values.new_empty(num_classes)
    blocks = _launch.segment_blocks(num_classes)
    with _launch.on_device(values):
        _segment_sum_kernel[(cdiv(num_classes, blocks["BLOCK_K"]),)](
            values_ptr=values.contiguous(),
            labels_ptr=labels.contiguous(),
            sums_ptr=sums,
            N=len(values),
            K=num_classes,
            ignore_index=ignore_index,
            **blocks,
        )
    return sums


@triton.jit(do_not_specialize=["first_counted", "shift"])
def _classes_kernel(
    labels_ptr,  # [N] int64
    ids_ptr,  # [N] int64
    table_ptr,  # [slots] int32, zeros: one more than the sample that stands for the class whose slot it is
    counts_ptr,  # [N] int32, zeros: written for samples that stand for a class
    N,
    slots,  # a power of two
    first_counted,
    shift,  # of 64-bit hashes, to the bits of a slot
    ABSENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A sample of each sample's label, the same for all of them; how many from first_counted on have it.

    Programs race for the slots, hence which sample stands for a class is chance. Its label, all slots tell alike.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row, mask=row < N, other=ABSENT)
    here = label != ABSENT
    slot = ((label * _GOLDEN >> shift) & (slots - 1)).to(tl.int32)
    id = tl.full((BLOCK,), -1, tl.int32)
    pending = here
    while tl.max(pending.to(tl.int32), axis=0) > 0:
        # Read first: all samples of a class at once would wait for one another's atomics.
        first = tl.load(table_ptr + slot, mask=pending, other=1)
        empty = first == 0
        # There is no mask: where nothing is empty, a swap of a number with itself, of different slots.
        found = tl.atomic_cas(
            table_ptr + tl.where(empty, slot, row), tl.where(empty, 0, row + 1), row + 1, sem="relaxed"
        )
        first = tl.where(empty, tl.where(found == 0, row + 1, found), first)
        same = pending & (tl.load(labels_ptr + first - 1, mask=pending, other=ABSENT) == label)
        id = tl.where(same, first - 1, id)
        pending = pending & (id < 0)
        slot = (slot + 1) & (slots - 1)
    tl.store(ids_ptr + row, id.to(tl.int64), mask=row < N)
    tl.atomic_add(counts_ptr + id, 1, mask=here & (row >= first_counted), sem="relaxed")


def classes(labels: Tensor, first_counted: int, absent: int) -> tuple[Tensor, Tensor]:
    """Of labels [N] int64 with any values: for each a number in [0, N) that equals that of equal labels alone, -1 for
    `absent`; and int32 [N], where the i-th is how many of labels[first_counted:] have the number i.

    Which of a class's members gives it its number is not the same from run to run: it is for comparing, and for sorts
    that are stable.
    """
    num_labels = len(labels)
    bits = max(num_labels - 1, 31).bit_length() + 2  # a quarter of the slots at most are taken
    counts, table = labels.new_zeros(num_labels + 2**bits, dtype=torch.int32).split([num_labels, 2**bits])
    ids = torch.empty_like(labels)
    with _launch.on_device(labels):
        _classes_kernel[(max(cdiv(num_labels, _launch.CLASSES_BLOCKS["BLOCK"]), 1),)](
            labels_ptr=labels,
            ids_ptr=ids,
            table_ptr=table,
            counts_ptr=counts,
            N=num_labels,
            slots=2**bits,
            first_counted=first_counted,
            shift=64 - bits,
            ABSENT=absent,
            **_launch.CLASSES_BLOCKS,
        )
    return ids, counts


@dataclass(frozen=True)
class Members:
    """The samples of each class, side by side."""

    order: Tensor  # [N] int64: samples sorted by class
    bounds: Tensor  # [K + 1] int64: where each class begins in `order`

    def classes(self, first: int, last: int) -> Members:
        return Members(self.order, self.bounds[first : last + 1])


def by_class(labels: Tensor, num_classes: int, ignore_index: int = -1) -> Members:
    """Samples by class, without ignore_index and labels outside [0, K)."""
    valid = (labels != ignore_index) & (labels >= 0) & (labels < num_classes)
    # A radix sort of 32 bits takes half as long as one of 64.
    sorted_labels, order = torch.where(valid, labels, num_classes).int().sort(stable=True)
    bounds = torch.searchsorted(sorted_labels, torch.arange(num_classes + 1, dtype=torch.int32, device=labels.device))
    return Members(order, bounds)


def sum_members(features: Tensor, inv_norms: Tensor, members: Members) -> Tensor:
    """Σ of features [N, D], contiguous along D, times inv_norms [N] over each class's members → [K, D] fp32."""
    dim, num_classes = features.shape[1], len(members.bounds) - 1
    sums = torch.empty(num_classes, dim, device=features.device)
    blocks = _launch.class_sum_blocks(dim)
    _class_sums_kernel[(num_classes, cdiv(dim, blocks["BLOCK_D"]))](
        features_ptr=features,
        inv_norms_ptr=inv_norms,
        order_ptr=members.order,
        bounds_ptr=members.bounds,
        sums_ptr=sums,
        D=dim,
        stride=features.stride(0),
        **blocks,
    )
    return sums


def class_sums(
    features: Tensor, inv_norms: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Σ of features [N, D] times inv_norms [N] over the samples of each class → [K, D] fp32, and counts [K] int64.

    Labels outside [0, K) and ignore_index are left out.
    """
    members = by_class(labels, num_classes, ignore_index)
    with _launch.on_device(features):
        sums = sum_members(_launch.row_major(features), inv_norms, members)
    return sums, members.bounds.diff()
