"""A loss against prototypes in one call of the C++ extension: for float32 on a CPU, one process, a fixed temperature.

What `_autograd.prototype_loss` makes of `blockwise` takes some 200 operators, each a few microseconds: more than the
products of a small batch. The extension does the same in one call, see csrc/prototype_loss.h; there the products are
the library's and everything else is a pass over memory or less.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hypercontrast import _extension, blockwise


@torch.compiler.assume_constant_result
def _is_built() -> bool:
    return _extension.quietly() is not None


def _extension_there() -> ModuleType:
    found = _extension.quietly()
    assert found is not None  # else `takes` would have said no
    return found


def takes(
    features: Tensor, prototypes: Tensor, temperature: Tensor | None, inv_temperature: float, normalize: bool
) -> bool:
    """Whether the extension is there and computes this."""
    return (
        features.device.type == "cpu"
        and features.dtype == prototypes.dtype == torch.float32
        and blockwise.is_bounded(temperature, inv_temperature, normalize)
        and _is_built()
    )


def _options(inv_temperature: float, ignore_index: int, rows: bool, cols: bool, exclude_own: bool) -> Any:
    tiling = blockwise.TILE_ELEMENTS, blockwise.PANEL_CLASSES, blockwise.MIN_BLOCK
    return _extension_there().PrototypeLoss(inv_temperature, ignore_index, rows, cols, exclude_own, *tiling)


def forward(
    features: Tensor, prototypes: Tensor, labels: Tensor, weight: Tensor | None, *,
    inv_temperature: float, ignore_index: int, rows: bool, cols: bool, exclude_own: bool,
    zero_empty: bool, mean: bool, keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `hypercontrast._ops.prototype_loss`."""
    found = _extension_there().prototype_loss(
        features.contiguous(), prototypes.contiguous(), labels.contiguous(), weight,
        _options(inv_temperature, ignore_index, rows, cols, exclude_own), zero_empty, mean,
        blockwise.keeps(len(features), len(prototypes), features.dtype, keep_bytes),
    )  # fmt: skip
    return *found, labels.new_empty(0)


def backward(
    grad_loss: Tensor, divisor: Tensor, features: Tensor, prototypes: Tensor, labels: Tensor, row_lse: Tensor,
    col_lse: Tensor, inv_features: Tensor, inv_prototypes: Tensor, kept: Tensor, grad_row: Tensor, grad_col: Tensor,
    grad_pos: Tensor, *, inv_temperature: float, ignore_index: int, rows: bool, cols: bool, exclude_own: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `hypercontrast._ops.prototype_loss_backward`."""
    return _extension_there().prototype_loss_backward(
        grad_loss.item() / divisor.item(), features.contiguous(), prototypes.contiguous(), labels.contiguous(),
        row_lse, col_lse, inv_features, inv_prototypes, kept, grad_row, grad_col, grad_pos,
        _options(inv_temperature, ignore_index, rows, cols, exclude_own), *wanted,
    )  # fmt: skip
