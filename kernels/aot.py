"""Every configuration the launchers can ask for, for compiling and inspecting them ahead of time, without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import _launch, class_sums, prototype_lse

ARCHITECTURES = (80, 90, 100)
_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_OPERANDS = {"a_ptr", "b_ptr", "w_ptr", "z_ptr", "h_ptr", "x_ptr", "features_ptr", "prototypes_ptr"}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
# The launchers align these to 16 whatever the caller passes, and D and every stride; any other argument may not be.
_ALWAYS_ALIGNED = _OPERANDS | {"grad_ptr", "partials_ptr", "D"}
_NEVER_SPECIALIZED = {"ignore_index", "row_start", "inv_temperature"}
_INT64 = {"labels_ptr", "order_ptr", "bounds_ptr"}
# Pointers that are None unless a flag is set.
_OPTIONAL = {
    "temperature_ptr": "HAS_TEMPERATURE",
    "range_ptr": "HAS_RANGE",
    "present_ptr": "COMPACT",
    "num_present_ptr": "COMPACT",
    "lse_a_ptr": "HAS_A",
    "grad_a_ptr": "HAS_A",
    "lse_b_ptr": "HAS_B",
    "grad_b_ptr": "HAS_B",
    "row_lse_ptr": "HAS_ROWS",
    "grad_row_ptr": "HAS_ROWS",
    "col_lse_ptr": "HAS_COLS",
    "grad_col_ptr": "HAS_COLS",
    "partials_ptr": "SPLIT",
}
# (rows, cols, exclude_own) of the losses: NTCE, NONL, NormFace, NONL with sample anchors, NONL with both.
_RULES = [(True, False, False), (True, False, True), (False, True, False), (False, True, True), (True, True, True)]


@dataclass(frozen=True)
class AotConfiguration:
    name: str
    kernel: Any
    signature: dict[str, str]  # argument → Triton type, "constexpr" for those in `constexprs`
    constexprs: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages, maxnreg
    architectures: tuple[int, ...]

    def aligned_arguments(self, aligned: bool) -> list[str]:
        """Arguments that Triton may take for multiples of 16: all it looks at, or those that the launchers align."""
        varying = [
            name for name, kind in self.signature.items() if kind != "constexpr" and name not in _NEVER_SPECIALIZED
        ]
        return [name for name in varying if aligned or name in _ALWAYS_ALIGNED or name.startswith("stride_")]


def aot_configurations() -> list[AotConfiguration]:
    """All kernels in all pinned configurations and all combinations of flags that a loss can reach."""
    families = (_forward(), _backward_narrow(), _backward_wide(), _over_rows(), _sums())
    return list({c.name: c for c in itertools.chain.from_iterable(families)}.values())


def _configuration(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    meta: dict[str, Any],
    grad_dtype: torch.dtype | None = None,
    archs: tuple[int, ...] = ARCHITECTURES,
) -> AotConfiguration:
    constexprs = {key: value for key, value in meta.items() if key not in _OPTIONS}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument in _OPTIONAL and constexprs.get(_OPTIONAL[argument]) is False:
            signature[argument], constexprs[argument] = "constexpr", None
        else:
            signature[argument] = _argument_type(argument, dtype, grad_dtype or dtype)
    options = "-".join(f"{key.lower()}={value}" for key, value in meta.items())
    return AotConfiguration(
        f"{name}-{_TRITON_NAMES[dtype]}{'-grad=fp32' if grad_dtype else ''}-{options}",
        kernel,
        signature,
        constexprs,
        {key: value for key, value in meta.items() if key in _OPTIONS},
        archs,
    )


def _argument_type(argument: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> str:
    if argument in _OPERANDS:
        return "*" + _TRITON_NAMES[dtype]
    if argument == "grad_ptr":
        return "*" + _TRITON_NAMES[grad_dtype]
    if argument in ("present_ptr", "num_present_ptr"):
        return "*i32"
    if argument in _INT64:
        return "*i64"
    if argument.endswith("_ptr"):
        return "*fp32"
    return "fp32" if argument == "inv_temperature" else "i32"


def _flags(rows: bool, cols: bool) -> Iterator[tuple[bool, bool]]:
    """(HAS_TEMPERATURE, COMPACT) a rule can meet: compaction is for row sums alone."""
    return itertools.product((False, True), (False, True) if rows and not cols else (False,))


def _forward() -> Iterator[AotConfiguration]:
    for dtype in _TRITON_NAMES:
        narrow = [(c, True, ARCHITECTURES) for c in _launch.FORWARD_NARROW.values() if dtype.itemsize == 2]
        tables = [_of_type(t, dtype) for t in (_launch.FORWARD_WIDE, _launch.FORWARD_WIDE_TIGHT)]
        wide = [(c, False, archs) for c, archs in _by_architecture(*tables, samples_summed=False)]
        for (config, is_narrow, archs), (rows, cols, exclude_own) in itertools.product(narrow + wide, _RULES):
            for tensor_temperature, compact in _flags(rows, cols):
                for a_is_classes, fixed_shift in itertools.product(
                    [True] * rows + [False] * cols,
                    [False] if tensor_temperature or dtype == torch.float32 else [False, True],
                ):
                    meta = {
                        "A_IS_CLASSES": a_is_classes,
                        "EXCLUDE_OWN": exclude_own,
                        "FIXED_SHIFT": fixed_shift,
                        "HAS_TEMPERATURE": tensor_temperature,
                        "COMPACT": compact,
                        "NARROW": is_narrow,
                        "INPUT_PRECISION": _launch.input_precision(dtype),
                        **config.launch_options(),
                    }
                    yield _configuration("lse_fwd", prototype_lse._lse_fwd_kernel, dtype, meta, archs=archs)


def _of_type(table: dict[tuple[int, bool], _launch.Config], dtype: torch.dtype) -> dict[bool, _launch.Config]:
    return {small: config for (itemsize, small), config in table.items() if itemsize == dtype.itemsize}


def _by_architecture(usual: dict, tight: dict, samples_summed: bool) -> list[tuple[_launch.Config, tuple[int, ...]]]:
    """The configurations of two tables and where `_launch.is_tight` chooses each."""
    choices = [(tight, ARCHITECTURES)] if samples_summed else [(usual, (90,)), (tight, (80, 100))]
    chosen: dict[_launch.Config, tuple[int, ...]] = {}
    for table, archs in choices:
        for config in dict.fromkeys(table.values()):
            chosen[config] = tuple(sorted({*chosen.get(config, ()), *archs}))
    return list(chosen.items())


def _backward_narrow() -> Iterator[AotConfiguration]:
    for dtype, (rows, cols, exclude_own) in itertools.product((torch.bfloat16, torch.float16), _RULES):
        configs = _by_architecture(_launch.BACKWARD_NARROW, _launch.BACKWARD_NARROW_TIGHT, cols)
        for (config, archs), (tensor_temperature, compact) in itertools.product(configs, _flags(rows, cols)):
            for a_is_classes, split, normalize in itertools.product((True, False), repeat=3):
                meta = {
                    "A_IS_CLASSES": a_is_classes,
                    "EXCLUDE_OWN": exclude_own,
                    "HAS_A": rows if a_is_classes else cols,
                    "HAS_B": cols if a_is_classes else rows,
                    "HAS_TEMPERATURE": tensor_temperature,
                    "HAS_RANGE": dtype == torch.float16,
                    "COMPACT": compact,
                    "SPLIT": split,
                    "NORMALIZE": normalize,
                    "INPUT_PRECISION": _launch.input_precision(dtype),
                    **config.launch_options(),
                }
                yield _configuration("lse_bwd", prototype_lse._lse_bwd_kernel, dtype, meta, archs=archs)
                if a_is_classes and not split:  # fp32 prototypes of half features: their gradient stays fp32
                    yield _configuration("lse_bwd", prototype_lse._lse_bwd_kernel, dtype, meta, torch.float32, archs)


def _backward_wide() -> Iterator[AotConfiguration]:
    for dtype, (rows, cols, exclude_own) in itertools.product(_TRITON_NAMES, _RULES):
        tables = [_of_type(t, dtype) for t in (_launch.BACKWARD_WIDE, _launch.BACKWARD_WIDE_TIGHT)]
        configs = _by_architecture(*tables, cols)
        for (config, archs), (tensor_temperature, compact) in itertools.product(configs, _flags(rows, cols)):
            meta = {
                "HAS_ROWS": rows,
                "HAS_COLS": cols,
                "EXCLUDE_OWN": exclude_own,
                "HAS_TEMPERATURE": tensor_temperature,
                "HAS_RANGE": dtype == torch.float16,
                "COMPACT": compact,
                "INPUT_PRECISION": _launch.input_precision(dtype),
                **config.launch_options(),
            }
            yield _configuration("lse_bwd_tile", prototype_lse._lse_bwd_tile_kernel, dtype, meta, archs=archs)


def _over_rows() -> Iterator[AotConfiguration]:
    for dtype, dim in itertools.product(_TRITON_NAMES, (16, 32, 64, 128, 256, 512, 1024)):
        for tensor_temperature, normalize in itertools.product((False, True), repeat=2):
            meta = {"HAS_TEMPERATURE": tensor_temperature, "NORMALIZE": normalize, **_launch.row_blocks(dim)}
            yield _configuration("inverse_norms", prototype_lse._inverse_norms_kernel, dtype, meta)
            # The narrow backward undoes the scale of fp16 itself.
            meta["HAS_RANGE"] = dtype == torch.float16 and not _launch.is_narrow(dtype, dim)
            for grad_dtype in {None, None if dtype == torch.float32 else torch.float32}:
                yield _configuration("finish", prototype_lse._finish_kernel, dtype, meta, grad_dtype)
    yield _configuration("combine", prototype_lse._combine_kernel, torch.float32, _launch.COMBINE_BLOCKS)


def _sums() -> Iterator[AotConfiguration]:
    for dtype, dim in itertools.product(_TRITON_NAMES, (16, 32, 64, 128, 256)):
        yield _configuration("class_sums", class_sums._class_sums_kernel, dtype, _launch.class_sum_blocks(dim))
    for num_classes in (10, 10**5):
        blocks = _launch.segment_blocks(num_classes)
        yield _configuration("segment_sum", class_sums._segment_sum_kernel, torch.float32, blocks)
