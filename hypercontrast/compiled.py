"""A loss in one call of the C++ extension: for float32 on a CPU, one process, a fixed temperature.

What `_autograd.prototype_loss` makes of `blockwise`, and `_supcon` of `blockwise_pairs`, takes some 200 operators, each
a few microseconds: more than the products of a small batch. The extension does the same in one call, see
csrc/prototype_loss.h and csrc/pair_loss.h; there the products are the library's and everything else is a pass over
memory or less.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hypercontrast import _extension, blockwise, blockwise_pairs
from hypercontrast.distributed import ABSENT


def is_built() -> bool:
    return _extension.quietly() is not None


# torch.compile cannot trace an import. What torch.compiler.assume_constant_result does, which takes 1.8 s to import.
is_built._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _extension_there() -> ModuleType:
    found = _extension.quietly()
    assert found is not None  # else `takes` would have said no
    return found


def takes(temperature: Tensor | None, inv_temperature: float, normalize: bool, *operands: Tensor) -> bool:
    """Whether the extension is there and computes losses of these."""
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 for x in operands)
        and blockwise.is_bounded(temperature, inv_temperature, normalize)
        and is_built()
    )


def _prototype_options(inv_temperature: float, ignore_index: int, rows: bool, cols: bool, exclude_own: bool) -> Any:
    tiling = blockwise.TILE_ELEMENTS, blockwise.PANEL_CLASSES, blockwise.MIN_BLOCK
    return _extension_there().PrototypeLoss(inv_temperature, ignore_index, rows, cols, exclude_own, *tiling)


def prototype_loss(
    features: Tensor, prototypes: Tensor, labels: Tensor, weight: Tensor | None, *,
    inv_temperature: float, ignore_index: int, rows: bool, cols: bool, exclude_own: bool,
    zero_empty: bool, mean: bool, keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `hypercontrast._ops.prototype_loss`."""
    found = _extension_there().prototype_loss(
        features.contiguous(), prototypes.contiguous(), labels.contiguous(), weight,
        _prototype_options(inv_temperature, ignore_index, rows, cols, exclude_own), zero_empty, mean,
        blockwise.kept_elements(len(features), len(prototypes), features.dtype, keep_bytes),
    )  # fmt: skip
    return *found, labels.new_empty(0)


def prototype_loss_backward(
    grad_loss: Tensor, divisor: Tensor, features: Tensor, prototypes: Tensor, labels: Tensor, row_lse: Tensor,
    col_lse: Tensor, inv_features: Tensor, inv_prototypes: Tensor, kept: Tensor, grad_row: Tensor, grad_col: Tensor,
    grad_pos: Tensor, *, inv_temperature: float, ignore_index: int, rows: bool, cols: bool, exclude_own: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `hypercontrast._ops.prototype_loss_backward`."""
    return _extension_there().prototype_loss_backward(
        grad_loss.item() / divisor.item(), features.contiguous(), prototypes.contiguous(), labels.contiguous(),
        row_lse, col_lse, inv_features, inv_prototypes, kept, grad_row, grad_col, grad_pos,
        _prototype_options(inv_temperature, ignore_index, rows, cols, exclude_own), *wanted,
    )  # fmt: skip


def pair_loss(
    features: Tensor,
    labels: Tensor,
    *,
    inv_temperature: float,
    scale: float,
    exclude: bool,
    mean: bool,
    keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `hypercontrast._pair_ops.pair_loss`."""
    found = _extension_there().pair_loss(
        features.contiguous(), labels.contiguous(), ABSENT, inv_temperature, scale, exclude, mean, blockwise_pairs.EDGE,
        blockwise_pairs.kept_elements(len(features), features.dtype, keep_bytes),
    )  # fmt: skip
    return tuple(found)


def pair_loss_backward(
    grad_loss: Tensor, divisor: Tensor, features: Tensor, ids: Tensor, lse: Tensor, inv_norms: Tensor,
    grad_lse: Tensor, grad_positives: Tensor, kept: Tensor, *, inv_temperature: float,
) -> Tensor:  # fmt: skip
    """See `hypercontrast._pair_ops.pair_loss_backward`."""
    return _extension_there().pair_loss_backward(
        grad_loss.item() / divisor.item(), features.contiguous(), ids, lse, inv_norms, grad_lse, grad_positives,
        kept, inv_temperature, blockwise_pairs.EDGE,
    )  # fmt: skip
