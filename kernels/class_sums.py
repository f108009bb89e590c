"""Sums within classes: of numbers [N] and of unit features [N, D]. Both in an order that never changes: no atomics.

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


@triton.jit(do_not_specialize=["first_counted"])
def _classes_kernel(
    labels_ptr,  # [N] int64
    ids_ptr,  # [N] int64
    counts_ptr,  # [N] int64
    N,
    first_counted,
    ABSENT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first sample of each sample's label, and how many from first_counted on have it."""
    row_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    label_K = tl.load(labels_ptr + row_K, mask=row_K < N, other=ABSENT)
    first_K = tl.full((BLOCK_K,), 2**31 - 1, tl.int32)
    count_K = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, N, BLOCK_N):
        row_N = start + tl.arange(0, BLOCK_N)
        label_N = tl.load(labels_ptr + row_N, mask=row_N < N, other=ABSENT)
        same_KN = label_K[:, None] == label_N[None, :]
        first_K = tl.minimum(first_K, tl.min(tl.where(same_KN, row_N[None, :], 2**31 - 1), axis=1))
        counted_N = tl.where(row_N >= first_counted, 1, 0)
        count_K += tl.sum(tl.where(same_KN, counted_N[None, :], 0), axis=1)
    here_K = label_K != ABSENT
    tl.store(ids_ptr + row_K, tl.where(here_K, first_K, -1).to(tl.int64), mask=row_K < N)
    tl.store(counts_ptr + row_K, tl.where(here_K, count_K, 0).to(tl.int64), mask=row_K < N)


def classes(labels: Tensor, first_counted: int, absent: int) -> tuple[Tensor, Tensor]:
    """Of labels [N] int64 with any values: a number in [0, N) for each that equals that of equal labels alone, -1 for
    `absent`; and how many of labels[first_counted:] equal it, 0 for `absent`. Compares all with all: for few samples.
    """
    ids, counts = torch.empty_like(labels), torch.empty_like(labels)
    with _launch.on_device(labels):
        _classes_kernel[(cdiv(len(labels), _launch.CLASSES_BLOCKS["BLOCK_K"]),)](
            labels_ptr=labels,
            ids_ptr=ids,
            counts_ptr=counts,
            N=len(labels),
            first_counted=first_counted,
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
    sorted_labels, order = torch.where(valid, labels, num_classes).sort(stable=True)
    bounds = torch.searchsorted(sorted_labels, torch.arange(num_classes + 1, device=labels.device))
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
