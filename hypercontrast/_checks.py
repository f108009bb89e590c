"""Argument checks shared by the public functions: each error names the argument, the rule and the value.

Checks of shape, type and option run everywhere. Checks that read values (label range, finite norms) run inside the
ops (`_ops.py`) on the CPU, where reading is free; on a GPU the labels are watched without stalling (`watch_labels`).
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Below it the rounding of a float32 cosine alone is more than one in the logits; far below, logits overflow to NaN.
LEAST_TEMPERATURE = torch.finfo(torch.float32).eps

# Seconds: the system counts a wait's milliseconds in 32 bits.
LONGEST_WAIT = (2**31 - 1) // 1000


def check_option(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value: float, what: str = "a number") -> None:
    """A bool is an int to Python, and hardly ever meant as one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")


def check_integer(name: str, value: int, least: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_sizes(dim: int, num_classes: int) -> None:
    if any(isinstance(size, bool) or not isinstance(size, int) for size in (dim, num_classes)):
        raise TypeError(f"dim and num_classes must be integers, got {dim!r} and {num_classes!r}")
    if dim < 1 or num_classes < 1:
        raise ValueError(f"dim and num_classes must be at least 1, got {dim} and {num_classes}")


def check_matrix(name: str, x: Tensor, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one dimension, got {list(x.shape)}")


def check_features(features: Tensor, dim: int) -> None:
    """Of an object that was made for vectors of this dimension."""
    check_matrix("features", features, "[N, D]")
    if features.shape[1] != dim:
        raise ValueError(f"features must have dimension {dim}, got {list(features.shape)}")


def check_labels(labels: Tensor, num_samples: int, device: torch.device, name: str = "labels") -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        whole = not (labels.is_floating_point() or labels.is_complex())
        raise TypeError(f"{name} must be int64, got {labels.dtype}{': pass labels.long()' if whole else ''}")
    if labels.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {labels.layout}")
    if labels.shape != (num_samples,):
        matched = name.replace("labels", "features")
        raise ValueError(f"{name} must have shape [{num_samples}] to match {matched}, got {list(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"{name} must be on the features' device {device}, got {labels.device}")


def check_temperature(temperature: float | Tensor, device: torch.device) -> None:
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            got = f"{temperature.dtype} {list(temperature.shape)}"
            raise ValueError(f"temperature must be a number or a tensor of one float, got {got}")
        if temperature.device != device:
            raise ValueError(f"temperature must be on the features' device {device}, got {temperature.device}")
        return
    check_number("temperature", temperature, "a number or a tensor of one float")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if temperature < LEAST_TEMPERATURE:
        raise ValueError(f"temperature must be at least {LEAST_TEMPERATURE:.1e}, got {temperature}")


def split_temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """(the tensor to read and to learn, or None; the 1/τ that stands for it)."""
    return (temperature, 1.0) if isinstance(temperature, Tensor) else (None, 1.0 / temperature)


def as_scalar(temperature: float | Tensor, features: Tensor) -> float | Tensor:
    """A tensor of one float without dimensions, in the accumulator's dtype: nothing made of it is rounded to a narrower
    one. A number as it is.
    """
    return temperature.to(accumulator(features)).reshape(()) if isinstance(temperature, Tensor) else temperature


def check_weight(weight: Tensor | None, num_classes: int, device: torch.device) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor of class weights, got {type(weight).__name__}")
    check_per_class("weight", weight, num_classes, device)
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: class weights are constants of the loss")


def check_per_class(name: str, x: Tensor, num_classes: int, device: torch.device, signed: bool = False) -> None:
    """One finite number a class [K], `signed` or not negative."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.shape != (num_classes,):
        raise ValueError(f"{name} must have shape [{num_classes}], one class each, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on the features' device {device}, got {x.device}")
    if can_be_read(x):
        bad = ~(torch.isfinite(x) & (x >= (-torch.inf if signed else 0)))
        if bad.any():
            c = int(bad.nonzero()[0])
            rule = "finite" if signed else "finite and not negative"
            raise ValueError(f"{name} must be {rule}, got {x[c].item()} for class {c}")


def check_ignore_index(ignore_index: int) -> None:
    check_integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit int64, got {ignore_index}")


def check_prototypes(prototypes: Tensor, features: Tensor) -> None:
    check_matrix("prototypes", prototypes, "[K, D]")
    if prototypes.shape[0] == 0:
        raise ValueError(f"prototypes must hold at least one class, got {list(prototypes.shape)}")
    if prototypes.shape[1] != features.shape[1]:
        raise ValueError(
            f"prototypes must have the features' dimension {features.shape[1]}, got {list(prototypes.shape)}"
        )
    if prototypes.device != features.device:
        raise ValueError(f"prototypes must be on the features' device {features.device}, got {prototypes.device}")


def check_prototype_inputs(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    normalize: bool,
) -> None:
    """Everything a prototype loss can check without reading a value from the device."""
    check_matrix("features", features, "[N, D]")
    check_prototypes(prototypes, features)
    if (features.dtype == torch.float64) != (prototypes.dtype == torch.float64):
        raise TypeError(f"prototypes must be float64 exactly when features are, got {prototypes.dtype}")
    check_labels(labels, features.shape[0], features.device)
    check_temperature(temperature, features.device)
    check_weight(weight, prototypes.shape[0], features.device)
    check_ignore_index(ignore_index)
    check_option("reduction", reduction, ("mean", "sum", "none"))
    check_flag("normalize", normalize)


def check_pair_features(features: Tensor) -> None:
    rows = features.flatten(0, 1) if isinstance(features, Tensor) and features.dim() == 3 else features
    check_matrix("features", rows, "[N, D] or [B, V, D]")


def check_supcon_inputs(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    ref_features: Tensor | None,
    ref_labels: Tensor | None,
    temperature: float | Tensor,
    base_temperature: float | None,
    variant: str,
    singletons: str,
    reduction: str,
    normalize: bool,
) -> None:
    """Everything SupCon can check without reading a value from the device."""
    check_pair_features(features)
    samples, device = features.shape[0], features.device
    if labels is not None and mask is not None:
        raise ValueError("labels and mask must not both be given: each says which pairs are positive")
    if labels is not None:
        check_labels(labels, samples, device)
    elif mask is None and features.dim() == 2:
        raise ValueError(f"labels or mask must be given for features [N, D], got neither for {list(features.shape)}")
    others = samples
    if ref_features is not None:
        check_matrix("ref_features", ref_features, "[R, D]")
        others = ref_features.shape[0]
        if ref_features.shape[1] != features.shape[-1]:
            raise ValueError(
                f"ref_features must have the features' dimension {features.shape[-1]}, got {list(ref_features.shape)}"
            )
        if ref_features.device != device:
            raise ValueError(f"ref_features must be on the features' device {device}, got {ref_features.device}")
        if (features.dtype == torch.float64) != (ref_features.dtype == torch.float64):
            raise TypeError(f"ref_features must be float64 exactly when features are, got {ref_features.dtype}")
        if (ref_labels is None) != (labels is None):
            raise ValueError("ref_labels must be given exactly when ref_features are contrasted by labels")
    if ref_labels is not None:
        if ref_features is None:
            raise ValueError("ref_labels must come with ref_features, got labels alone")
        check_labels(ref_labels, others, device, name="ref_labels")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != (samples, others):
            raise ValueError(f"mask must have shape [{samples}, {others}], got {list(mask.shape)}")
        if mask.device != device:
            raise ValueError(f"mask must be on the features' device {device}, got {mask.device}")
    elif ref_features is not None and labels is None:
        raise ValueError("labels and ref_labels, or mask, must be given with ref_features, got neither")
    check_temperature(temperature, device)
    if base_temperature is not None:
        check_number("base_temperature", base_temperature, "a number or None")
        if not 0 < base_temperature < math.inf:
            raise ValueError(f"base_temperature must be positive and finite, got {base_temperature}")
    check_option("variant", variant, ("out", "in"))
    check_option("singletons", singletons, ("exclude", "zero", "error"))
    check_option("reduction", reduction, ("mean", "sum", "none"))
    check_flag("normalize", normalize)


def check_queue(queue: tuple[Tensor, Tensor], features: Tensor) -> None:
    """(features [Q, D], labels [Q]) of past samples against the present ones."""
    past, labels = queue
    check_matrix("queue features", past, "[Q, D]")
    if past.shape[1] != features.shape[-1]:
        raise ValueError(f"queue must hold features of dimension {features.shape[-1]}, got {list(past.shape)}")
    if past.device != features.device:
        raise ValueError(f"queue must be on the features' device {features.device}, got {past.device}")
    if past.requires_grad:
        raise ValueError("queue must not require a gradient: past features are constants of the loss")
    check_labels(labels, past.shape[0], past.device, name="queue labels")


def check_label_range(labels: Tensor, num_classes: int, ignore_index: int, name: str = "labels") -> None:
    """Read the labels (so: off-GPU only) and name the first that is neither a class nor ignored."""
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if bad.any():
        raise ValueError(f"{name} must lie in [0, {num_classes}), got {labels[bad][0].item()}")


def in_range(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Which samples count [N]: not those ignored, nor, where labels are not read, those of no class."""
    return (labels != ignore_index) & (labels >= 0) & (labels < num_classes)


def can_be_read(x: Tensor) -> bool:
    """Whether there are values, and reading them costs no wait: not on a GPU, when compiled, transformed or fake."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not (isinstance(x, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(x))


def norms(x: Tensor) -> Tensor:
    """|x| along the last dimension, in the accumulator's dtype."""
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=accumulator(x))


def check_finite_norms(name: str, norms: Tensor) -> None:
    """Read the norms (so: off-GPU only) and name the first row whose norm is NaN or infinite."""
    if math.isfinite(norms.sum().item()):  # a number tells, but where finite norms have an infinite sum
        return
    bad = (~torch.isfinite(norms)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"{name} must have finite norms, got {norms[row].item()} in row {row}")


def accumulator(x: Tensor) -> torch.dtype:
    """What sums over x run in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_temperature_value(temperature: float | Tensor | None) -> None:
    """Read a tensor temperature (so: off-GPU only)."""
    if isinstance(temperature, Tensor):
        check_temperature(temperature.item(), temperature.device)


class LabelWatch:
    """Notices out-of-range labels on a GPU without a host sync.

    Every call copies the smallest and largest label to pinned memory behind the kernels; later calls read the copies
    that have arrived. So an error is raised a step or more late, and the kernels, which only compare labels, stay in
    bounds. Pinned memory and events are used again: to make them takes longer than the copy.
    """

    def __init__(self) -> None:
        self._pending: dict[torch.device, deque[tuple[torch.cuda.Event, Tensor, int]]] = defaultdict(deque)
        self._free: dict[torch.device, list[tuple[torch.cuda.Event, Tensor]]] = defaultdict(list)

    def __call__(self, labels: Tensor, num_classes: int, ignore_index: int, extremes: Tensor | None = None) -> None:
        """`extremes`: smallest and largest label, ignored ones taken for zero, where a kernel has found them anyway."""
        if not labels.is_cuda or labels.numel() == 0 or torch.compiler.is_compiling():
            return
        if torch.cuda.is_current_stream_capturing():  # no event of a capture can be asked, and a replay checks nothing
            return
        pending, free = self._pending[labels.device], self._free[labels.device]
        while pending and pending[0][0].query():
            arrived, seen, limit = pending.popleft()
            low, high = seen.tolist()
            free.append((arrived, seen))
            if low < 0 or high >= limit:
                raise ValueError(f"labels must lie in [0, {limit}), got {low if low < 0 else high}")
        if extremes is None:
            extremes = torch.stack(torch.aminmax(torch.where(labels == ignore_index, 0, labels)))
        arrived, seen = free.pop() if free else (torch.cuda.Event(), torch.empty(2, dtype=torch.int64, pin_memory=True))
        seen.copy_(extremes, non_blocking=True)
        arrived.record(torch.cuda.current_stream(labels.device))
        pending.append((arrived, seen, num_classes))


watch_labels = LabelWatch()
