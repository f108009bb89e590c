"""What could be pinned in each cell of the tables of kernels/_launch.py, and what the compiler makes of it.

No GPU is needed. The evidence is of the kernel's hardest flags, so it bounds what a usual launch takes; what is pinned
in the end is compiled with all flags by tests/test_aot.py. The tables of pair_fixed.py are not among the cells yet.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from bench.occupancy import MULTIPROCESSORS
from hypercontrast.kernels import _launch
from hypercontrast.kernels._launch import Config

# The kernels a training run spends most of its time in come first.
KERNELS = (
    "lse_fwd", "lse_bwd", "pair_triangle", "pair_bwd", "lse_fwd_tile", "lse_bwd_tile", "pair_bwd_tile", "pair_fwd",
)  # fmt: skip
BUCKETS: tuple[int | str, ...] = (128, "large", 256, 64, "small", 32, 16)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TRITON_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_TABLES = {
    "lse_fwd": "FORWARD", "lse_fwd_tile": "FORWARD_KEEP", "lse_bwd": "BACKWARD", "lse_bwd_tile": "BACKWARD",
    "pair_fwd": "PAIR_FORWARD", "pair_triangle": "PAIR_TRIANGLE",
    "pair_bwd": "PAIR_BACKWARD", "pair_bwd_tile": "PAIR_BACKWARD",
}  # fmt: skip
# fp32 numbers of its tiles that a thread holds: fewer do not repay loading the operands, more leave no other registers.
ACCUMULATORS = (16, 192)
ENOUGH_WARPS = 16  # four a partition: while one waits for its products, others compute exponentials


@dataclass(frozen=True)
class Cell:
    """A place in the pinned tables."""

    kernel: str
    architecture: int
    dtype: str
    bucket: int | str  # narrow: the padded width; wide: large, or small where large tiles would leave a GPU idle
    crowded: bool = False

    @property
    def narrow(self) -> bool:
        return isinstance(self.bucket, int)

    @property
    def backward(self) -> bool:
        return "bwd" in self.kernel

    @property
    def key(self) -> Any:
        return self.bucket if self.narrow else (DTYPES[self.dtype].itemsize, self.bucket == "small")

    @property
    def table(self) -> str:
        """Its name in _launch.py."""
        return f"{_TABLES[self.kernel]}_{'NARROW' if self.narrow else 'WIDE'}{'_CROWDED' if self.crowded else ''}"

    def pinned(self) -> Config | None:
        return getattr(_launch, self.table)[self.architecture].get(self.key)

    def replaced(self, config: Config | None) -> AbstractContextManager:
        """A context in which launches take `config` here and in the cell's neighbours, crowded or small; with None
        they find the cell empty, and take the wide kernels.
        """
        keys = [self.key] if self.narrow else [(self.key[0], small) for small in (False, True)]
        names = {f"{self.table.removesuffix('_CROWDED')}{more}" for more in ("", "_CROWDED", "_BOTH")}
        patches = {}
        for name in names & vars(_launch).keys():
            tables = getattr(_launch, name)
            table = {key: pinned for key, pinned in tables[self.architecture].items() if key not in keys}
            if config is not None:
                table |= dict.fromkeys(keys, config)
            patches[name] = {**tables, self.architecture: table}
        return mock.patch.multiple(_launch, **patches)

    def candidates(self) -> list[Config]:
        """What is pinned, and every configuration that could fit, by a rule of its sizes alone."""
        found = [config for config in _configs(self) if _fits(self, config)]
        pinned = self.pinned()
        return list(dict.fromkeys(found if pinned is None else [pinned, *found]))

    def flop_per_byte(self, config: Config) -> float:
        """Of the products of a tile, over the bytes it loads for them. Rows that stay on chip are not loaded."""
        loaded = config.block_c if self.narrow else config.block_r + config.block_c
        products = 2 if self.narrow and self.backward else 1
        return 2 * products * config.block_r * config.block_c / (loaded * DTYPES[self.dtype].itemsize)


def cells(
    kernels: Sequence[str] = KERNELS,
    dtype: str = "bfloat16",
    widths: Sequence[int] = (),
    architecture: int = 90,
) -> list[Cell]:
    """Those of these kernels and widths (all, when none is given), in order of importance."""
    wanted = set(BUCKETS) if not widths else {bucket for width in widths for bucket in _buckets(width, dtype)}
    found = []
    for bucket, kernel in itertools.product(BUCKETS, KERNELS):
        narrow = isinstance(bucket, int)
        only_narrow, only_wide = kernel in ("lse_bwd", "pair_bwd"), kernel.endswith("_tile")
        fits = not only_wide and dtype != "float32" if narrow else not only_narrow
        fits &= kernel != "lse_fwd_tile" or DTYPES[dtype] in _launch.KEEP_INV_TEMPERATURE
        if kernel in kernels and bucket in wanted and fits:
            for crowded in (False, True) if "bwd" in kernel or kernel == "lse_fwd_tile" else (False,):
                found.append(Cell(kernel, architecture, dtype, bucket, crowded))
    return found


def _buckets(width: int, dtype: str) -> set[int | str]:
    padded = _launch.padded_width(width)
    return {padded} if padded in BUCKETS and dtype != "float32" else {"large", "small"}


def _configs(cell: Cell) -> Iterator[Config]:
    if cell.narrow:
        sizes = itertools.product((64, 128), (32, 64, 128), (cell.bucket,), (4, 8), (2, 3))
    elif cell.dtype == "float32":
        rows, columns = ((64,), (32, 64)) if cell.bucket == "small" else ((64, 128), (64, 128))
        sizes = itertools.product(rows, columns, (16, 32), (4, 8), (3, 4))
    else:
        rows, columns = ((64,), (32, 64)) if cell.bucket == "small" else ((64, 128, 256), (64, 128, 256))
        sizes = itertools.product(rows, columns, (64, 128), (4, 8), (3, 4))
    return itertools.starmap(Config, sizes)


def _fits(cell: Cell, config: Config) -> bool:
    rows, columns, depth, itemsize = config.block_r, config.block_c, config.block_d, DTYPES[cell.dtype].itemsize
    numbers = rows * columns + (rows * depth if cell.narrow and cell.backward else 0)
    least, most = ACCUMULATORS
    # One buffer of the pipeline may be spared; the rows that stay may not.
    loaded = (config.num_stages - 1) * columns * depth + rows * depth * (1 if cell.narrow else config.num_stages - 1)
    return (
        least <= numbers // (32 * config.num_warps) <= most
        and loaded * itemsize <= MULTIPROCESSORS[cell.architecture].shared_a_program
        and (cell.kernel != "pair_triangle" or rows % columns == 0)
    )


@dataclass(frozen=True)
class Evidence:
    """What the compiler made of a candidate, or why there is none of it."""

    registers: int | None = None  # a thread
    spills: int | None = None  # instructions
    shared: int | None = None  # bytes a program
    wgmma: int | None = None  # instructions of Hopper's tensor cores
    programs: int | None = None  # a multiprocessor holds at once
    warps: int | None = None  # of these programs
    flop_per_byte: float | None = None
    score: float | None = None  # to rank by: FLOP a byte loaded, less where warps are too few to hide their waiting
    fault: str = ""  # why it cannot be pinned

    @property
    def rank(self) -> tuple:
        """Sorts the best first; of equals, the one that leaves more to others."""
        return (bool(self.fault), -(self.score or 0), -(self.warps or 0), self.shared or 0, self.registers or 0)


@functools.cache
def _template(cell: Cell) -> Any:
    """The cell's kernel with the flags that cost most, as tests/test_aot.py chooses them."""
    # Not at the top: the process that compiles imports Triton without its interpreter.
    from hypercontrast.kernels.aot import aot_configurations

    prefix = f"{cell.kernel}-{_TRITON_NAMES[cell.dtype]}-"
    alike = [
        c
        for c in aot_configurations()
        if c.name.startswith(prefix)
        and cell.architecture in c.architectures
        and c.crowded == cell.crowded
        and c.constexprs.get("NARROW", cell.narrow) == cell.narrow
    ]
    return max(alike, key=lambda c: sum(value is True for value in c.constexprs.values()))


def examine(cell: Cell, config: Config) -> Evidence:
    """Compile a candidate, in a process that imported Triton without its interpreter."""
    template, options = _template(cell), config.launch_options()
    blocks = {name: options.pop(name) for name in tuple(options) if name in template.constexprs}
    configuration = dataclasses.replace(template, constexprs={**template.constexprs, **blocks}, options=options)
    try:
        compiled = configuration.compiled(cell.architecture, aligned=True)
    except Exception as error:  # whatever the compiler raises: the next candidate may do
        lines = str(error).strip().splitlines() or [""]
        return Evidence(fault=f"does not compile: {type(error).__name__} {lines[0]}".strip())
    multiprocessor = MULTIPROCESSORS[cell.architecture]
    programs = multiprocessor.resident(
        warps=config.num_warps,
        registers=compiled.registers,
        shared=compiled.shared,
        tensor_columns=compiled.tensor_columns,
    )
    reuse, warps = cell.flop_per_byte(config), programs * config.num_warps
    fault = ""
    if compiled.spills or compiled.stack:
        fault = "spills"
    elif compiled.shared > multiprocessor.shared_a_program:
        fault = "too much shared memory"
    elif not programs:
        fault = "does not fit a multiprocessor"
    elif cell.architecture == 90 and cell.dtype != "float32" and not compiled.wgmma:
        fault = "no wgmma"
    return Evidence(
        compiled.registers,
        compiled.spills,
        compiled.shared,
        compiled.wgmma,
        programs,
        warps,
        reuse,
        reuse * min(warps, ENOUGH_WARPS) / ENOUGH_WARPS,
        fault,
    )
