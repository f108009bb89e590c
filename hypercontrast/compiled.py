"""A loss in one call of the C++ extension: for float32 on a CPU and one process.

What `_autograd.prototype_loss` makes of `blockwise`, and `_supcon` of `blockwise_pairs`, takes some 200 operators, each
a few microseconds: more than the products of a small batch. The extension does the same in one call, see
csrc/prototype_loss.h and csrc/pair_loss.h; there the products are the library's and everything else is a pass over
memory or less.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hypercontrast import _extension, blockwise, blockwise_pairs
from hypercontrast._operator import is_traced
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
    if not all(x.device.type == "cpu" and x.dtype == torch.float32 for x in operands) or not is_built():
        return False
    if temperature is not None and is_traced(temperature):
        return False  # its value is not known yet
    return blockwise.is_bounded(None, _inverse(temperature, inv_temperature), normalize)


def _inverse(temperature: Tensor | None, inv_temperature: float) -> float:
    """1/τ, read from the tensor if there is one; infinite where that is no temperature."""
    if temperature is None:
        return inv_temperature
    value = temperature.item()
    return 1 / value if 0 < value < math.inf else math.inf


def kept_elements(num_samples: int, num_classes: int, rows: bool, cols: bool, keep_bytes: int) -> int:
    """Room for the exponentials of a loss against prototypes. Of few samples and prototype anchors absent classes are
    left out, and at most twice as many classes as samples computed.
    """
    classes = min(num_classes, 2 * num_samples) if rows and not cols else num_classes
    return blockwise.kept_elements(num_samples, classes, torch.float32, keep_bytes)


def _prototype_options(
    temperature: Tensor | None, inv_temperature: float, ignore_index: int, rows: bool, cols: bool, exclude_own: bool
) -> Any:
    tiling = blockwise.TILE_ELEMENTS, blockwise.PANEL_CLASSES, blockwise.MIN_BLOCK
    inv = _inverse(temperature, inv_temperature)
    return _extension_there().PrototypeLoss(inv, ignore_index, rows, cols, exclude_own, *tiling)


def prototype_loss(
    features: Tensor, prototypes: Tensor, labels: Tensor, weight: Tensor | None, *, temperature: Tensor | None,
    inv_temperature: float, ignore_index: int, rows: bool, cols: bool, exclude_own: bool,
    zero_empty: bool, mean: bool, keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `hypercontrast._ops.prototype_loss`."""
    found = _extension_there().prototype_loss(
        features.contiguous(), prototypes.contiguous(), labels.contiguous(), weight,
        _prototype_options(temperature, inv_temperature, ignore_index, rows, cols, exclude_own), zero_empty, mean,
        kept_elements(len(features), len(prototypes), rows, cols, keep_bytes),
    )  # fmt: skip
    return *found, labels.new_empty(0)


def prototype_loss_backward(
    grad_loss: Tensor, divisor: Tensor, features: Tensor, prototypes: Tensor, labels: Tensor, row_lse: Tensor,
    col_lse: Tensor, inv_features: Tensor, inv_prototypes: Tensor, kept: Tensor, grad_row: Tensor, grad_col: Tensor,
    grad_pos: Tensor, *, temperature: Tensor | None, inv_temperature: float, ignore_index: int, rows: bool, cols: bool,
    exclude_own: bool, wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `hypercontrast._ops.prototype_loss_backward`."""
    grad_features, grad_prototypes, logit_grad_sum = _extension_there().prototype_loss_backward(
        grad_loss.item() / divisor.item(), features.contiguous(), prototypes.contiguous(), labels.contiguous(),
        row_lse, col_lse, inv_features, inv_prototypes, kept, grad_row, grad_col, grad_pos,
        _prototype_options(temperature, inv_temperature, ignore_index, rows, cols, exclude_own), *wanted,
    )  # fmt: skip
    radial = features.new_empty(0) if temperature is None else temperature.float().reshape(1) * logit_grad_sum
    return grad_features, grad_prototypes, radial


def pair_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: Tensor | None,
    inv_temperature: float,
    scale: float,
    exclude: bool,
    mean: bool,
    keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `hypercontrast._pair_ops.pair_loss`."""
    found = _extension_there().pair_loss(
        features.contiguous(), labels.contiguous(), ABSENT, _inverse(temperature, inv_temperature), scale, exclude,
        mean, blockwise_pairs.EDGE, blockwise_pairs.kept_elements(len(features), features.dtype, keep_bytes),
    )  # fmt: skip
    return tuple(found)


def pair_loss_backward(
    grad_loss: Tensor, divisor: Tensor, features: Tensor, ids: Tensor, lse: Tensor, inv_norms: Tensor,
    grad_lse: Tensor, grad_positives: Tensor, kept: Tensor, *, temperature: Tensor | None, inv_temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `hypercontrast._pair_ops.pair_loss_backward`."""
    grad, logit_grad_sum = _extension_there().pair_loss_backward(
        grad_loss.item() / divisor.item(), features.contiguous(), ids, lse, inv_norms, grad_lse, grad_positives,
        kept, _inverse(temperature, inv_temperature), blockwise_pairs.EDGE, temperature is not None,
    )  # fmt: skip
    return grad, features.new_full((0 if temperature is None else 1,), logit_grad_sum)
