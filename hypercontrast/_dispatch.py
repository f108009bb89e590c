"""What a public loss does before it computes: check its arguments, let the ranks agree on the call, pick who computes.

A rank that finds a fault of its own must not raise while the others wait in a collective: what one rank can see is
checked in `described`, which `agree` runs, and by everyone again where there is one rank, or a compiler.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hypercontrast import _checks, blockwise
from hypercontrast._agreement import agree
from hypercontrast._autograd import Options, has_backward
from hypercontrast._ops import in_full_precision, resolve_backend
from hypercontrast.buffer import NegativeBuffer
from hypercontrast.distributed import ABSENT, GroupLike, resolve_group
from hypercontrast.prototypes import ClassMeans
from hypercontrast.reference import in_dtype_of

Queue = NegativeBuffer | tuple[Tensor, Tensor] | None


def prototype_loss(
    specification: Callable[..., Tensor],
    compute: Callable[..., Tensor],
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    normalize: bool,
    group: GroupLike,
    backend: str,
    queue: Queue = None,
    class_means: ClassMeans | None = None,
    check: Callable[[], None] = lambda: None,
    **own: Any,
) -> Tensor:
    """Validate and dispatch: to the specification for backend="reference", else to what computes it from the primitive.

    `own` are the arguments of this loss alone, which both take; `check` looks at them, once those of all losses are
    known to be right.
    """
    process_group = resolve_group(group)

    def checked() -> tuple[str, tuple[Tensor, Tensor] | None]:
        _checks.check_prototype_inputs(
            features, prototypes, labels, temperature, weight, ignore_index, reduction, normalize
        )
        check()
        if class_means is not None and not isinstance(class_means, ClassMeans):
            raise TypeError(f"class_means must be ClassMeans or None, got {type(class_means).__name__}")
        if class_means is not None and class_means.sums.shape != prototypes.shape:
            raise ValueError(
                f"class_means must hold {list(prototypes.shape)} like prototypes, got {list(class_means.sums.shape)}"
            )
        if isinstance(queue, NegativeBuffer) and queue.group is not None and process_group is not None:
            raise ValueError("queue must hold this rank's samples alone, got one of all ranks: make it with group=None")
        past = queued(queue, features, normalize)
        if past is not None and _checks.can_be_read(past[1]):
            ignored = torch.where(past[1] == ABSENT, ignore_index, past[1])
            _checks.check_label_range(ignored, len(prototypes), ignore_index, name="queue labels")
        return resolve_backend(backend, features), past

    def check_all_values() -> None:
        if features.device.type == "cpu":
            _checks.check_label_range(labels, len(prototypes), ignore_index)
        check_values(temperature, features, prototypes=prototypes)

    def described() -> str:
        """What the collectives rest on, once nothing can fail halfway through them."""
        chosen, _ = checked()
        check_group(process_group, chosen)
        check_all_values()
        bounded = blockwise.is_bounded(*_checks.split_temperature(temperature), normalize)
        return (
            f"{specification.__name__} of {features.dtype} features [n, {features.shape[1]}] and {prototypes.dtype}"
            f" prototypes {list(prototypes.shape)}, {''.join(f'{k} {told(v)}, ' for k, v in own.items())}"
            f"temperature {told(temperature)}, reduction {reduction}, backend {chosen}, normalize {normalize},"
            f" ignore_index {ignore_index}, weight {told(weight)},"
            f" {'small' if bounded else 'large or unknown'} logits,"
            f" {gradient(features, prototypes, temperature)} gradient"
        )

    if process_group is not None:
        agree(described, process_group, features)
    chosen, past = checked()
    temperature = _checks.as_scalar(temperature, features)
    if chosen == "reference":
        check_all_values()
        past_samples = {} if past is None else {"queue": present(past)}
        with in_full_precision(features):
            loss = specification(
                features, prototypes, labels, temperature=temperature, weight=weight, ignore_index=ignore_index,
                reduction=reduction, normalize=normalize, **past_samples, **own,
            )  # fmt: skip
        if class_means is not None:
            class_means.update(features.detach(), labels, ignore_index=ignore_index)
        return loss
    options = Options(temperature, weight, ignore_index, reduction, normalize, past, process_group, class_means, chosen)
    return compute(features, prototypes, labels, options, **own)


def told(option: Any) -> str:
    """An option as ranks compare it: a number to nine digits, since it may have been computed; a tensor's size, and on
    the CPU, where reading is free, its values.
    """
    if not isinstance(option, Tensor):
        return f"{option:.9g}" if isinstance(option, (int, float)) else str(option)
    if option.device.type != "cpu":
        return f"tensor of {option.numel()}"
    values = option.detach().double()
    if values.numel() == 1:
        return f"tensor of {values.item():.9g}"
    return f"tensor {list(values.shape)} with checksum {zlib.crc32(values.numpy().tobytes()):08x}"


def queued(queue: Queue, features: Tensor, normalize: bool) -> tuple[Tensor, Tensor] | None:
    """Past features [Q, D] and their labels [Q], ABSENT in places not yet used."""
    if queue is None:
        return None
    past = queue.queued() if isinstance(queue, NegativeBuffer) else queue
    if not isinstance(past, tuple) or len(past) != 2:
        raise TypeError(f"queue must be a NegativeBuffer or a pair (features, labels), got {type(queue).__name__}")
    _checks.check_queue(past, features)
    if _checks.can_be_read(past[0]) and not isinstance(queue, NegativeBuffer):  # which has checked what it took
        # Places not yet used too: kernels multiply by them, and NaN times zero is NaN.
        _checks.check_finite_norms("queue", _checks.norms(past[0]))
    check_range("queue", past[0], features, normalize)
    return past


def check_range(name: str, x: Tensor, features: Tensor, normalize: bool) -> None:
    """Further columns are multiplied in the features' dtype, which may end before they do."""
    if torch.finfo(features.dtype).max >= torch.finfo(x.dtype).max or not _checks.can_be_read(x):
        return
    lengths = _checks.norms(in_dtype_of(features, x, normalize))
    if not lengths.isfinite().all():
        _checks.check_finite_norms(name, _checks.norms(x))
        _checks.check_finite_norms(f"{name} in {features.dtype}", lengths)


def present(past: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Without the places not yet used."""
    used = past[1] != ABSENT
    return past[0][used], past[1][used]


def gradient(*inputs: Any) -> str:
    return "with" if has_backward(*inputs) else "without"


def check_group(group: dist.ProcessGroup | None, backend: str) -> None:
    if group is not None and backend == "reference":
        raise ValueError("backend='reference' computes over one process, got a group of several: pass group=None")


def check_values(temperature: float | Tensor, features: Tensor, **others: Tensor | None) -> None:
    """What operators check by themselves where there is one process, and reading is free."""
    for name, x in {"features": features, **others}.items():
        if x is not None and _checks.can_be_read(x):
            _checks.check_finite_norms(name, _checks.norms(x).flatten())
    if _checks.can_be_read(features):
        _checks.check_temperature_value(temperature)
