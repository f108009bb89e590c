"""Every configuration the launchers can ask for, for compiling and inspecting them ahead of time, without a GPU."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from . import (
    _epilogue,
    _launch,
    class_sums,
    pair_backward,
    pair_fixed,
    pair_forward,
    pair_loss,
    prototype_backward,
    prototype_columns,
    prototype_forward,
    prototype_loss,
)
from ._launch import ARCHITECTURES

_MODULES = (
    _epilogue, class_sums, pair_backward, pair_fixed, pair_forward, pair_loss, prototype_backward, prototype_columns,
    prototype_forward, prototype_loss,
)  # fmt: skip
_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_OPERANDS = {"a_ptr", "b_ptr", "w_ptr", "z_ptr", "h_ptr", "kept_ptr", "x_ptr", "features_ptr", "prototypes_ptr"}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
# The launchers align these to 16 whatever the caller passes, and D and every stride; any other argument may not be.
_GRADIENTS = {"grad_ptr", "a_grad_ptr"}
_PADDED = {
    "factor_ptr", "bias_ptr", "row_factor_ptr", "row_bias_ptr", "col_factor_ptr", "col_bias_ptr",
    "row_terms_ptr", "col_terms_ptr", "classes_ptr", "row_classes_ptr", "col_classes_ptr",
    "row_sums_ptr", "col_sums_ptr", "padded_N", "padded_R", "padded_C", "padded_K",
    "columns_ptr", "sides_ptr", "sample_columns_ptr", "sample_sides_ptr", "class_columns_ptr", "class_sides_ptr",
}  # fmt: skip
_ALWAYS_ALIGNED = (
    _OPERANDS | _GRADIENTS | _PADDED | {"b_grad_ptr", "partials_ptr", "a_partials_ptr", "b_partials_ptr", "D"}
)
_NEVER_SPECIALIZED = {
    "ignore_index", "ignored_class", "first_counted", "shift", "row_start", "inv_temperature", "scale", "offset",
    "first_class", "last_class",
    "mask_row_step", "mask_col_step",
    "row_mask_row_step", "row_mask_col_step", "col_mask_row_step", "col_mask_col_step",
}  # fmt: skip
_INT64 = {
    "labels_ptr",
    "extremes_ptr",
    "all_extremes_ptr",
    "order_ptr",
    "bounds_ptr",
    "ids_ptr",
    "alone_ptr",
    "row_ids_ptr",
    "col_ids_ptr",
}
_BYTES = {"mask_ptr", "row_mask_ptr", "col_mask_ptr"}
# Pointers that are None unless all flags named are set, or, after a minus, are not.
_OPTIONAL = {
    "temperature_ptr": "HAS_TEMPERATURE",
    "class_columns_ptr": "COLUMNS_OF_CLASSES",
    "range_ptr": "HAS_RANGE",
    "upstream_ptr": "HAS_FACTOR",
    "divisor_ptr": "HAS_FACTOR",
    "weight_ptr": "HAS_WEIGHT",
    "class_counts_ptr": "HAS_COUNTS",
    "row_partials_ptr": "HAS_ROWS",
    "col_partials_ptr": "HAS_COLS",
    "present_ptr": "COMPACT",
    "num_present_ptr": "COMPACT",
    "lse_a_ptr": "HAS_A",
    "grad_a_ptr": "HAS_A",
    "row_lse_ptr": "HAS_ROWS",
    "grad_row_ptr": "HAS_ROWS",
    "col_lse_ptr": "HAS_COLS BOTH",
    "columns_ptr": "LEAN",
    "sides_ptr": "HAS_B HAS_COLS LEAN",
    "sample_sides_ptr": "HAS_COLS",
    "class_sides_ptr": "HAS_ROWS",
    "sample_range_ptr": "HAS_RANGE",
    "class_range_ptr": "HAS_RANGE",
    "grad_col_ptr": "HAS_COLS",
    "partials_ptr": "SPLIT",
    "kept_ptr": "KEPT KEEP",
    "positives_ptr": "HAS_POSITIVES KEPT USED",
    "lse_ptr": "USED",
    "grad_lse_ptr": "USED",
    "grad_positives_ptr": "USED",
    "grad_row_lse_ptr": "HAS_ROWS",
    "row_positives_ptr": "HAS_ROWS",
    "grad_row_positives_ptr": "HAS_ROWS",
    "grad_col_lse_ptr": "HAS_COLS",
    "col_positives_ptr": "HAS_COLS",
    "grad_col_positives_ptr": "HAS_COLS",
    "mask_ptr": "HAS_MASK",
    "row_mask_ptr": "HAS_MASK HAS_ROWS",
    "col_mask_ptr": "HAS_MASK HAS_COLS",
    "row_ids_ptr": "-HAS_MASK",
    "col_ids_ptr": "-HAS_MASK",
}
# (rows, cols, exclude_own) of the losses: NTCE, NONL, NormFace, NONL with sample anchors, NONL with both.
_RULES = [(True, False, False), (True, False, True), (False, True, False), (False, True, True), (True, True, True)]


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes of a multiprocessor."""

    registers: int  # a thread
    spills: int  # instructions that store or load what found no register
    stack: int  # bytes a thread
    shared: int  # bytes of shared memory a program
    tensor_columns: int  # of Blackwell's tensor memory a program
    wgmma: int  # instructions of Hopper's tensor cores


@dataclass(frozen=True)
class AotConfiguration:
    name: str
    kernel: Any
    signature: dict[str, str]  # argument → Triton type, "constexpr" for those in `constexprs`
    constexprs: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages, maxnreg
    architectures: tuple[int, ...]
    crowded: bool  # of its kernel's two tables, the one for launches that bring more into a tile

    def aligned_arguments(self, aligned: bool) -> list[str]:
        """Arguments that Triton may take for multiples of 16: all it looks at, or those that the launchers align."""
        varying = [
            name for name, kind in self.signature.items() if kind != "constexpr" and name not in _NEVER_SPECIALIZED
        ]
        return [name for name in varying if aligned or name in _ALWAYS_ALIGNED or name.startswith("stride_")]

    @property
    def sizes(self) -> list[str]:
        """Arguments that may be 1, which Triton then takes for a constant."""
        known = _NEVER_SPECIALIZED | _ALWAYS_ALIGNED
        integers = [name for name, kind in self.signature.items() if kind == "i32"]
        return [name for name in integers if name not in known and not name.startswith("stride_")]

    def lower(self, ones: Collection[str]) -> None:
        """Compile up to Triton's own code, where an argument that is a constant and no tensor fails. `ones` are 1."""
        signature = self.signature | dict.fromkeys(ones, "constexpr")
        source = ASTSource(self.kernel, signature, self.constexprs | dict.fromkeys(ones, 1), {})
        target, context = GPUTarget("cuda", self.architectures[0], 32), ir.context()
        backend = make_backend(target)
        ir.load_dialects(context)
        backend.load_dialects(context)
        options = backend.parse_options(self.options)
        codegen = backend.get_codegen_implementation(options)
        source.make_ir(target, options, codegen, backend.get_module_map(), context)

    def compiled(self, architecture: int, aligned: bool) -> Compiled:
        """Without a GPU; Triton must have been imported without its interpreter."""
        index = self.kernel.arg_names.index
        attributes = {(index(name),): [["tt.divisibility", 16]] for name in self.aligned_arguments(aligned)}
        source = ASTSource(self.kernel, self.signature, self.constexprs, attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=self.options)
        usage = _disassembled(binary.asm["cubin"], "-res-usage")
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        # What is spilled lies on the stack. To disassemble takes as long as to compile: done where there is one.
        sass = _disassembled(binary.asm["cubin"], "-sass") if stack + local else ""
        return Compiled(
            registers=registers,
            spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
            stack=stack + local,
            shared=binary.metadata.shared,
            tensor_columns=binary.metadata.tmem_size,
            wgmma=binary.asm["ptx"].count("wgmma.mma_async"),
        )


def _disassembled(cubin: bytes, what: str) -> str:
    """Resource usage or SASS, by the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def kernels() -> list[tuple[ModuleType, str]]:
    """Every kernel, as the module that launches it and its name there."""
    return [(module, name) for module in _MODULES for name in vars(module) if name.endswith("_kernel")]


def aot_configurations() -> list[AotConfiguration]:
    """All kernels in all pinned configurations and all combinations of flags that a loss can reach."""
    families = (
        _forward(), _forward_keep(), _backward_narrow(), _backward_wide(), _pair_forward(), _pair_backward(),
        _pair_fixed(), _over_rows(), _sums(), _loss(),
    )  # fmt: skip
    return list({c.name: c for c in itertools.chain.from_iterable(families)}.values())


def _configuration(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    meta: dict[str, Any],
    grad_dtype: torch.dtype | None = None,
    archs: tuple[int, ...] = ARCHITECTURES,
    crowded: bool = False,
) -> AotConfiguration:
    constexprs = {key: value for key, value in meta.items() if key not in _OPTIONS}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif _is_none(argument, constexprs):
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
        crowded,
    )


def _is_none(argument: str, constexprs: dict[str, Any]) -> bool:
    conditions = _OPTIONAL.get(argument, "").split()
    return any(constexprs.get(condition.lstrip("-")) is condition.startswith("-") for condition in conditions)


def _argument_type(argument: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> str:
    if argument in _OPERANDS:
        return "*" + _TRITON_NAMES[dtype]
    if argument in _GRADIENTS:
        return "*" + _TRITON_NAMES[grad_dtype]
    if argument == "b_grad_ptr":
        return "*" + _TRITON_NAMES[dtype]
    if argument in ("present_ptr", "num_present_ptr", "table_ptr", "counts_ptr") or argument.endswith("classes_ptr"):
        return "*i32"
    if argument in _INT64:
        return "*i64"
    if argument in _BYTES:
        return "*u8"
    if argument.endswith("_ptr"):
        return "*fp32"
    return "fp32" if argument in ("inv_temperature", "scale") else "i32"


def _flags(rows: bool, cols: bool) -> Iterator[tuple[bool, bool]]:
    """(HAS_TEMPERATURE, COMPACT) a rule can meet: compaction is for row sums alone."""
    return itertools.product((False, True), (False, True) if rows and not cols else (False,))


def _forward() -> Iterator[AotConfiguration]:
    for dtype in _TRITON_NAMES:
        configs = _forward_configs(_launch.FORWARD_NARROW, _launch.FORWARD_WIDE, dtype)
        for (config, is_narrow, archs), (rows, cols, exclude_own) in itertools.product(configs, _RULES):
            for tensor_temperature, compact in _flags(rows, cols):
                for (a_is_classes, both), fixed_shift in itertools.product(
                    [(True, False)] * rows + [(False, False)] * cols + [(True, True)] * (rows and cols),
                    [False] if tensor_temperature or dtype == torch.float32 else [False, True],
                ):
                    meta = {
                        "A_IS_CLASSES": a_is_classes,
                        "EXCLUDE_OWN": exclude_own,
                        "FIXED_SHIFT": fixed_shift,
                        "HAS_TEMPERATURE": tensor_temperature,
                        "COMPACT": compact,
                        "BOTH": both,
                        "NARROW": is_narrow,
                        "INPUT_PRECISION": _launch.input_precision(dtype),
                        **config.launch_options(),
                    }
                    yield _configuration("lse_fwd", prototype_forward._lse_fwd_kernel, dtype, meta, archs=archs)


def _forward_keep() -> Iterator[AotConfiguration]:
    for dtype, (rows, cols, exclude_own), keep in itertools.product(
        _launch.KEEP_INV_TEMPERATURE, _RULES, (True, False)
    ):
        crowded = rows and cols
        configs = _pinned(_launch.FORWARD_KEEP_WIDE_CROWDED if crowded else _launch.FORWARD_KEEP_WIDE, dtype)
        compaction = (False, True) if rows and not cols else (False,)
        for (config, archs), compact in itertools.product(configs, compaction):
            meta = {
                "HAS_ROWS": rows,
                "HAS_COLS": cols,
                "EXCLUDE_OWN": exclude_own,
                "COMPACT": compact,
                "KEEP": keep,
                "INPUT_PRECISION": _launch.input_precision(dtype),
                **config.launch_options(),
            }
            kernel = prototype_forward._lse_fwd_tile_kernel
            yield _configuration("lse_fwd_tile", kernel, dtype, meta, archs=archs, crowded=crowded)


def _forward_configs(
    narrow: dict[int, _launch.Narrow], wide: dict[int, _launch.Wide], dtype: torch.dtype
) -> list[tuple[_launch.Config, bool, tuple[int, ...]]]:
    """(configuration, whether it is a narrow one, where it is chosen)."""
    configs = [(config, False, archs) for config, archs in _pinned(wide, dtype)]
    return configs + [(config, True, archs) for config, archs in _pinned(narrow, dtype) if dtype.itemsize == 2]


def _pinned(
    tables: dict[int, _launch.Narrow] | dict[int, _launch.Wide], dtype: torch.dtype
) -> list[tuple[_launch.Config, tuple[int, ...]]]:
    """The configurations of a kernel for a type, and the architectures that choose each."""
    chosen: dict[_launch.Config, set[int]] = {}
    for architecture, table in tables.items():
        for key, config in table.items():
            if not isinstance(key, tuple) or key[0] == dtype.itemsize:
                chosen.setdefault(config, set()).add(architecture)
    return [(config, tuple(sorted(architectures))) for config, architectures in chosen.items()]


def _backward_narrow() -> Iterator[AotConfiguration]:
    for dtype, (rows, cols, exclude_own) in itertools.product((torch.bfloat16, torch.float16), _RULES):
        # (SPLIT, NORMALIZE, HAS_FACTOR)
        endings = [(True, False, False), *((False, *flags) for flags in itertools.product((True, False), repeat=2))]
        for (tensor_temperature, compact), a_is_classes in itertools.product(_flags(rows, cols), (True, False)):
            tables = _launch.narrow_backward(rows, cols, listed=compact and a_is_classes)
            crowded = tables is not _launch.BACKWARD_NARROW
            for (config, archs), (split, normalize, factor) in itertools.product(_pinned(tables, dtype), endings):
                if compact and factor:
                    continue  # absent classes are not skipped where the loss has a kernel of its own
                meta = {
                    "A_IS_CLASSES": a_is_classes,
                    "EXCLUDE_OWN": exclude_own,
                    "HAS_A": rows if a_is_classes else cols,
                    "HAS_B": cols if a_is_classes else rows,
                    "HAS_TEMPERATURE": tensor_temperature,
                    "HAS_RANGE": dtype == torch.float16,
                    "HAS_FACTOR": factor,
                    "COMPACT": compact,
                    "SPLIT": split,
                    "NORMALIZE": normalize,
                    "INPUT_PRECISION": _launch.input_precision(dtype),
                    **config.launch_options(),
                }
                # fp32 prototypes of half features: their gradient stays fp32.
                for grad_dtype in (None, torch.float32) if a_is_classes and not split else (None,):
                    yield _configuration(
                        "lse_bwd", prototype_backward._lse_bwd_kernel, dtype, meta, grad_dtype, archs, crowded
                    )


def _backward_wide() -> Iterator[AotConfiguration]:
    for dtype, (rows, cols, exclude_own) in itertools.product(_TRITON_NAMES, _RULES):
        half = dtype in _launch.KEEP_INV_TEMPERATURE
        choices = []
        for lean in (False, True)[: 1 + half]:
            crowded = cols or (half and not lean)
            tables = _launch.BACKWARD_WIDE_CROWDED if crowded else _launch.BACKWARD_WIDE
            choices += [(config, archs, crowded, False, lean) for config, archs in _pinned(tables, dtype)]
        choices += [(_launch.BACKWARD_KEPT, ARCHITECTURES, True, True, False)] * half
        for (config, archs, crowded, kept, lean), (tensor_temperature, compact) in itertools.product(
            choices, _flags(rows, cols)
        ):
            if kept and tensor_temperature:
                continue
            meta = {
                "HAS_ROWS": rows,
                "HAS_COLS": cols,
                "EXCLUDE_OWN": exclude_own,
                "HAS_TEMPERATURE": tensor_temperature,
                "HAS_RANGE": dtype == torch.float16,
                "COMPACT": compact,
                "KEPT": kept,
                "LEAN": lean,
                "INPUT_PRECISION": _launch.input_precision(dtype),
                **config.launch_options(),
            }
            yield _configuration(
                "lse_bwd_tile",
                prototype_backward._lse_bwd_tile_kernel,
                dtype,
                meta,
                archs=archs,
                crowded=crowded,
            )


def _pair_scalings(dtype: torch.dtype) -> list[tuple[bool, bool]]:
    """(FIXED_SHIFT, HAS_TEMPERATURE): a fixed shift takes half types, and a temperature known to be large."""
    return [(False, True), (False, False)] + [(True, False)] * (dtype.itemsize == 2)


def _pair_forward() -> Iterator[AotConfiguration]:
    triangle = "pair_triangle", pair_forward._pair_triangle_kernel
    rectangle = "pair_fwd", pair_forward._pair_fwd_kernel
    positives = [
        {"HAS_MASK": has_mask, "HAS_POSITIVES": has_mask or inside, "INSIDE": inside}
        for has_mask, inside in itertools.product((True, False), repeat=2)
    ]
    families = (
        (*triangle, _launch.PAIR_TRIANGLE_NARROW, _launch.PAIR_TRIANGLE_WIDE, [{}]),
        (*rectangle, _launch.PAIR_FORWARD_NARROW, _launch.PAIR_FORWARD_WIDE, positives),
    )
    for (name, kernel, narrow, wide, flags), dtype in itertools.product(families, _TRITON_NAMES):
        combinations = itertools.product(_forward_configs(narrow, wide, dtype), _pair_scalings(dtype), flags)
        for (config, is_narrow, archs), (fixed_shift, tensor_temperature), more in combinations:
            if is_narrow and fixed_shift and not more.get("HAS_MASK"):
                continue  # which has kernels of its own
            meta = {
                **more,
                "FIXED_SHIFT": fixed_shift,
                "HAS_TEMPERATURE": tensor_temperature,
                "NARROW": is_narrow,
                "INPUT_PRECISION": _launch.input_precision(dtype),
                **config.launch_options(),
            }
            yield _configuration(name, kernel, dtype, meta, archs=archs)


def _pair_backward() -> Iterator[AotConfiguration]:
    sides = [(True, True), (True, False), (False, True)]
    for dtype in _TRITON_NAMES:
        combinations = itertools.product(sides, (True, False), _pair_scalings(dtype))
        for (rows, cols), inside, (fixed_shift, tensor_temperature) in combinations:
            shared = {
                "HAS_ROWS": rows,
                "HAS_COLS": cols,
                "INSIDE": inside,
                "HAS_TEMPERATURE": tensor_temperature,
                "HAS_RANGE": dtype == torch.float16,
                "INPUT_PRECISION": _launch.input_precision(dtype),
            }
            if dtype.itemsize == 2 and not fixed_shift:  # which has kernels of its own
                crowded = inside or not rows
                tables = _launch.PAIR_BACKWARD_NARROW_CROWDED if crowded else _launch.PAIR_BACKWARD_NARROW
                for config, archs in _pinned(tables, dtype):
                    meta = {**shared, **config.launch_options()}
                    yield _configuration(
                        "pair_bwd", pair_backward._pair_bwd_kernel, dtype, meta, archs=archs, crowded=crowded
                    )
            for has_mask in (False, True):
                crowded = inside or has_mask
                tables = _launch.PAIR_BACKWARD_WIDE_CROWDED if crowded else _launch.PAIR_BACKWARD_WIDE
                for config, archs in _pinned(tables, dtype):
                    meta = {**shared, "FIXED_SHIFT": fixed_shift, "HAS_MASK": has_mask, **config.launch_options()}
                    yield _configuration(
                        "pair_bwd_tile", pair_backward._pair_bwd_tile_kernel, dtype, meta, archs=archs, crowded=crowded
                    )


def _pair_fixed() -> Iterator[AotConfiguration]:
    for dtype in (torch.bfloat16, torch.float16):
        for positives, tables in ((False, _launch.PAIR_TRIANGLE_FIXED), (True, _launch.PAIR_TRIANGLE_FIXED_CROWDED)):
            for config, archs in _pinned(tables, dtype):
                meta = {"POSITIVES": positives, **config.launch_options()}
                kernel = pair_fixed._triangle_fixed_kernel
                yield _configuration("pair_triangle_fixed", kernel, dtype, meta, archs=archs, crowded=positives)
        for config, archs in _pinned(_launch.PAIR_RECTANGLE_FIXED, dtype):
            for positives, inside in ((False, False), (True, False), (True, True)):
                meta = {"POSITIVES": positives, "INSIDE": inside, **config.launch_options()}
                kernel = pair_fixed._rectangle_fixed_kernel
                yield _configuration("pair_fwd_fixed", kernel, dtype, meta, archs=archs)
        for inside in (False, True):
            has_range = dtype == torch.float16
            for config, archs in _pinned(_launch.PAIR_BACKWARD_FIXED, dtype):
                meta = {"INSIDE": inside, "HAS_RANGE": has_range, **config.launch_options()}
                yield _configuration("pair_bwd_fixed", pair_fixed._bwd_fixed_kernel, dtype, meta, archs=archs)
            for used in (False, True):
                meta = {"USED": used, "INSIDE": inside, "HAS_RANGE": has_range, **_launch.SIDE_BLOCKS}
                yield _configuration("prepare_side", pair_fixed._prepare_side_kernel, dtype, meta)
        for dim in _launch.PAIR_RECTANGLE_FIXED[90]:
            yield _configuration("prepare", pair_fixed._prepare_kernel, dtype, _launch.row_blocks(dim))
    triangles = (*_launch.PAIR_TRIANGLE_FIXED.values(), *_launch.PAIR_TRIANGLE_FIXED_CROWDED.values())
    steps = {config.block_r for table in triangles for config in table.values()}
    # (STEP, ACCUMULATE, INSIDE)
    joins = [(0, False, False), (0, False, True), *itertools.product(sorted(steps), (False, True), (False,))]
    for step, accumulate, inside in joins:
        meta = {"STEP": step, "ACCUMULATE": accumulate, "INSIDE": inside, **_launch.COMBINE_BLOCKS}
        yield _configuration("join", pair_fixed._join_kernel, torch.float32, meta)
    for inside, exclude, mean in itertools.product((False, True), repeat=3):
        meta = {"INSIDE": inside, "EXCLUDE": exclude, "MEAN": mean, **_launch.PAIR_LOSS_BLOCKS}
        yield _configuration("pair_loss", pair_loss._pair_loss_kernel, torch.float32, meta)


def _over_rows() -> Iterator[AotConfiguration]:
    backwards = (_launch.BACKWARD_NARROW, _launch.PAIR_BACKWARD_NARROW)
    narrow_widths = {width for tables in backwards for table in tables.values() for width in table}
    for dtype, dim in itertools.product(_TRITON_NAMES, (16, 32, 64, 128, 256, 512, 1024)):
        blocks = _launch.row_blocks(dim)
        for tensor_temperature in (False, True):
            temperature = {"HAS_TEMPERATURE": tensor_temperature}
            yield _configuration(
                "class_positives", pair_forward._class_positives_kernel, dtype, {**temperature, **blocks}
            )
            for normalize in (False, True):
                log2 = dtype != torch.float32 and normalize and not tensor_temperature
                for of_classes, counts in ((False, False), (False, True), (True, False)):
                    flags = {"COLUMNS_OF_CLASSES": of_classes, "HAS_COUNTS": counts, "LOG2": log2}
                    meta = {**temperature, **flags, "NORMALIZE": normalize, **blocks}
                    yield _configuration("inverse_norms", prototype_forward._inverse_norms_kernel, dtype, meta)
        for normalize in (False, True):
            yield _configuration("norms", pair_forward._norms_kernel, dtype, {"NORMALIZE": normalize, **blocks})
    for dtype, dim in itertools.product(_TRITON_NAMES, (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)):
        # Library products leave the scale of fp16 to be undone; the narrow backwards undo it themselves.
        narrow = dim in narrow_widths and dtype != torch.float32
        ranges = [False] * (narrow or dtype != torch.float16) + [True] * (dtype == torch.float16)
        flags = itertools.product((False, True), ranges, (False, True), (False, True), {None, _other_grad_dtype(dtype)})
        for tensor_temperature, has_range, factor, normalize, grad_dtype in flags:
            for splits in (1, 2)[: 1 + narrow]:
                meta = {
                    "HAS_TEMPERATURE": tensor_temperature, "HAS_RANGE": has_range, "HAS_FACTOR": factor,
                    "NORMALIZE": normalize, **_launch.finish_blocks(dim, splits),
                }  # fmt: skip
                yield _configuration("finish", _epilogue._finish_kernel, dtype, meta, grad_dtype)
    triangles = (*_launch.PAIR_TRIANGLE_NARROW.values(), *_launch.PAIR_TRIANGLE_WIDE.values())
    steps = {config.block_r for table in triangles for config in table.values()}  # one a block of rows
    for step, accumulate in [(0, False), (0, True), *((step, True) for step in sorted(steps))]:
        meta = {"STEP": step, "ACCUMULATE": accumulate, **_launch.COMBINE_BLOCKS}
        yield _configuration("combine", _epilogue._combine_kernel, torch.float32, meta)
    yield _configuration("range", _epilogue._range_kernel, torch.float32, _launch.RANGE_BLOCKS)


def _other_grad_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """float32 prototypes of half features keep a float32 gradient."""
    return None if dtype == torch.float32 else torch.float32


def _sums() -> Iterator[AotConfiguration]:
    for dtype, dim in itertools.product(_TRITON_NAMES, (16, 32, 64, 128, 256)):
        yield _configuration("class_sums", class_sums._class_sums_kernel, dtype, _launch.class_sum_blocks(dim))
    meta = {"ABSENT": -(2**63), **_launch.CLASSES_BLOCKS}
    yield _configuration("classes", class_sums._classes_kernel, torch.float32, meta)
    for num_classes in (10, 10**5):
        blocks = _launch.segment_blocks(num_classes)
        yield _configuration("segment_sum", class_sums._segment_sum_kernel, torch.float32, blocks)


def _loss() -> Iterator[AotConfiguration]:
    sides = [(True, False), (False, True), (True, True)]
    for num_classes, joins in itertools.product((10, 10**5), (False, True)):
        blocks = _launch.loss_blocks(num_classes, joins)
        for (rows, cols), weight, zero_empty, mean in itertools.product(sides, *[(False, True)] * 3):
            flags = {"HAS_ROWS": rows, "HAS_COLS": cols, "HAS_WEIGHT": weight, "ZERO_EMPTY": zero_empty, "MEAN": mean}
            for counts in (False, True)[: 1 + (rows and not cols)]:
                meta = {**flags, "HAS_COUNTS": counts, **blocks}
                yield _configuration("loss", prototype_loss._loss_kernel, torch.float32, meta)
    for (rows, cols, _), (tensor_temperature, has_range) in itertools.product(
        _RULES, itertools.product((False, True), repeat=2)
    ):
        for compact in (False, True)[: 1 + (rows and not cols)]:
            meta = {
                "HAS_ROWS": rows, "HAS_COLS": cols, "HAS_TEMPERATURE": tensor_temperature, "HAS_RANGE": has_range,
                "COMPACT": compact, **_launch.COLUMN_BLOCKS,
            }  # fmt: skip
            yield _configuration("columns", prototype_columns._columns_kernel, torch.float32, meta)
    for mean in (False, True):
        meta = {"MEAN": mean, **_launch.TOTALS_BLOCKS}
        yield _configuration("totals", prototype_loss._totals_kernel, torch.float32, meta)
