"""What every launcher needs: pinned block sizes, the split rule, and where to launch.

Block sizes are pinned by architecture, operand type and width, never tuned at run time, so results repeat from run to
run and every shipped configuration can be compiled and inspected ahead of time (`aot.aot_configurations`). Better ones
are looked for by `python -m bench tune`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Two programs for each of the 132 multiprocessors of an H100. A constant, not the device's own count: the order of
# summation follows from it and the tiles, so the same input gives the same bits on every GPU of an architecture.
TARGET_PROGRAMS = 264
SCRATCH_BYTES = 64 * 2**20  # of partial results that are there at once
CHUNK_BYTES = 256 * 2**20  # of H: fewer, larger chunks keep the library's products efficient and their sums few
CHUNK_COLUMNS = 8192  # of H over pairs, see `pair_chunks`
PADDING = 256  # of vectors that tiles read without a bound: a multiple of every tile's sides
COMPACT_FLOP = 2**33  # of the product with all classes: below it absent ones cost less than listing the present
MAX_COMPARISONS = 2**22  # of samples with classes, to count by: past it a histogram, which is one launch more
MAX_LOSS_COMPARISONS = 2**26  # the same where both sides are summed: past it the loss has no kernel of its own
MAX_POSITIVES_IN_TILES = 2**28  # pairs: comparing their classes takes as long as a sort, or less
# Of the kernels without a product.
COMBINE_BLOCKS = {"BLOCK_S": 32, "BLOCK_R": 64, "num_warps": 4}
RANGE_BLOCKS = {"BLOCK": 4096, "num_warps": 8}
COLUMN_BLOCKS = {"BLOCK": 256, "num_warps": 4}
SIDE_BLOCKS = {"BLOCK_R": 256, "num_warps": 4}
TOTALS_BLOCKS = {"BLOCK_B": 256, "num_warps": 4}
PAIR_LOSS_BLOCKS = {"BLOCK": 4096, "num_warps": 16}
CLASSES_BLOCKS = {"BLOCK": 32, "num_warps": 1}  # one sample a thread: each is a chain of dependent reads


@dataclass(frozen=True)
class Config:
    """One tile: rows owned by a program, columns streamed past them, depth of one step of the product."""

    block_r: int
    block_c: int
    block_d: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # 255 where ptxas would else spill to fit one more program on a multiprocessor

    def launch_options(self) -> dict[str, int | None]:
        return {
            "BLOCK_R": self.block_r,
            "BLOCK_C": self.block_c,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


ARCHITECTURES = (80, 90, 100)
Narrow = dict[int, Config]  # keyed by block_d >= D
Wide = dict[tuple[int, bool], Config]  # keyed by (bytes an element, whether large tiles would leave a GPU idle)

# One table a kernel and architecture, CROWDED for launches that bring more into a tile and have fewer registers left.
# Narrow (half types): a whole vector fits the tile, so the owned rows stay on chip. Wide: the product runs over D in
# steps.
_NARROW: Narrow = {
    16: Config(128, 64, 16, 8, 3),
    32: Config(128, 64, 32, 8, 3),
    64: Config(128, 64, 64, 8, 3),
    128: Config(128, 64, 128, 8, 3),
}
_WIDE: Wide = {
    (2, False): Config(128, 64, 64, 8, 3, max_registers=255),
    (2, True): Config(64, 64, 64, 4, 4, max_registers=255),
    (4, False): Config(64, 64, 16, 4, 3, max_registers=255),
    (4, True): Config(64, 64, 16, 4, 3, max_registers=255),
}
# A forward has no accumulator of width D: where the backward is wide already, its rows still fit, and a byte loaded
# serves at least twice the products that it would in a wide one.
_FORWARD_NARROW: Narrow = {**_NARROW, 256: Config(128, 32, 256, 8, 2)}
FORWARD_NARROW = {
    80: _FORWARD_NARROW,
    90: {**_FORWARD_NARROW, 128: Config(128, 128, 128, 4, 2)},
    100: _FORWARD_NARROW,
}
FORWARD_WIDE = {80: _WIDE, 90: {**_WIDE, (2, False): Config(128, 128, 64, 8, 3)}, 100: _WIDE}
# Wide forwards that keep exp(s). Tall tiles: what one needs of each column takes registers in every thread.
_FORWARD_KEEP: Wide = {(2, False): Config(256, 64, 64, 8, 3), (2, True): Config(64, 64, 64, 4, 4)}
FORWARD_KEEP_WIDE = {
    80: _FORWARD_KEEP,
    90: {**_FORWARD_KEEP, (2, False): Config(128, 256, 64, 8, 3)},
    100: {**_FORWARD_KEEP, (2, False): Config(256, 64, 64, 8, 3, max_registers=255)},
}
FORWARD_KEEP_WIDE_CROWDED = dict.fromkeys(ARCHITECTURES, _FORWARD_KEEP)
BACKWARD_KEPT = Config(64, 128, 0, 8, 1)  # no product, hence no depth
KEEP_WIDTH = 512  # of the products saved, from where on keeping pays: see `_keeping_pays`
KEEP_FLOP = 2**33  # of one product, 16 us at 550 TFLOP/s: below it launches count, not products
# Largest 1/τ at which exp(s) is kept. bfloat16 has float32's exponents. In float16 e^10 is finite and e^-10 lost half a
# bit to underflow. float32 is not kept: its accuracy would show that no maximum was subtracted before exp.
KEEP_INV_TEMPERATURE = {torch.bfloat16: 64.0, torch.float16: 10.0}
# A triangular forward needs block_c to divide block_r.
PAIR_TRIANGLE_NARROW = dict.fromkeys(ARCHITECTURES, _FORWARD_NARROW)
PAIR_TRIANGLE_WIDE = dict.fromkeys(ARCHITECTURES, _WIDE)
PAIR_FORWARD_NARROW = {
    80: _FORWARD_NARROW,
    90: _FORWARD_NARROW,
    100: {**_FORWARD_NARROW, 256: Config(128, 32, 256, 8, 2, max_registers=255)},
}
PAIR_FORWARD_WIDE = dict.fromkeys(ARCHITECTURES, _WIDE)

# The accumulator of a narrow backward is a tile of its own, and outside Hopper it is all in registers.
_BACKWARD_NARROW: Narrow = {
    **_NARROW,
    64: Config(128, 32, 64, 8, 3),
    128: Config(64, 64, 128, 8, 3, max_registers=255),
}
_BACKWARD_WIDE: Wide = {
    **_WIDE,
    (2, False): Config(128, 64, 64, 8, 3),
    (2, True): Config(64, 64, 64, 4, 4),
}
# On Hopper measured: two programs of few warps share a multiprocessor, so that one computes exponentials while the
# other waits for its products; wide tiles spread what is done to a row over more columns.
_BACKWARD_NARROW_90: Narrow = {**_NARROW, 128: Config(64, 128, 128, 4, 2)}
# On Blackwell both products of a tile come back into registers from a memory of their own.
_BACKWARD_NARROW_TIGHT: Narrow = {
    **{width: Config(128, 32, width, 8, 3, max_registers=255) for width in (16, 32, 64)},
    128: Config(64, 64, 128, 8, 3, max_registers=255),
}
BACKWARD_NARROW = {
    80: {**_BACKWARD_NARROW, 64: _BACKWARD_NARROW_TIGHT[64]},
    90: _BACKWARD_NARROW_90,
    100: _BACKWARD_NARROW_TIGHT,
}
BACKWARD_WIDE = {
    80: _BACKWARD_WIDE,
    90: {**_BACKWARD_WIDE, (2, False): Config(128, 128, 64, 4, 3)},
    100: _BACKWARD_WIDE,
}
# Column sums bring two more vectors of each sample, listed classes their rows' addresses, and columns that are not made
# ready all that is done to them.
BACKWARD_NARROW_CROWDED = {
    80: _BACKWARD_NARROW,
    90: {**_BACKWARD_NARROW, 128: Config(64, 128, 128, 4, 2)},
    100: _BACKWARD_NARROW_TIGHT,
}
# Sums along both sides bring all of that, of rows and of columns.
BACKWARD_NARROW_BOTH = {**BACKWARD_NARROW_CROWDED, 90: {**_BACKWARD_NARROW, 128: Config(64, 64, 128, 4, 3)}}
BACKWARD_WIDE_CROWDED = dict.fromkeys(ARCHITECTURES, _BACKWARD_WIDE)

_PAIR_BACKWARD_WIDE: Wide = {
    (2, False): Config(128, 64, 64, 8, 3),
    (2, True): Config(64, 64, 64, 8, 4, max_registers=255),
    (4, False): Config(64, 64, 16, 8, 3, max_registers=255),
    (4, True): Config(64, 64, 16, 8, 3, max_registers=255),
}
PAIR_BACKWARD_NARROW = {80: _BACKWARD_NARROW_TIGHT, 90: _NARROW, 100: _BACKWARD_NARROW_TIGHT}
PAIR_BACKWARD_WIDE = dict.fromkeys(ARCHITECTURES, _PAIR_BACKWARD_WIDE)
# Log-sum-exps of positives bring two more exponentials of each pair, masks two pointers.
_PAIR_BACKWARD_WIDE_CROWDED: Wide = {**_PAIR_BACKWARD_WIDE, (2, False): _PAIR_BACKWARD_WIDE[2, True]}
PAIR_BACKWARD_NARROW_CROWDED = dict.fromkeys(ARCHITECTURES, _BACKWARD_NARROW_TIGHT)
PAIR_BACKWARD_WIDE_CROWDED = dict.fromkeys(ARCHITECTURES, _PAIR_BACKWARD_WIDE_CROWDED)

# With a fixed shift (pair_fixed.py). The more rows of a tile a thread holds, the fewer shuffles a column
# sum takes: tall tiles, few warps.
_FORWARD_FIXED: Narrow = {
    16: Config(128, 64, 16, 4, 3),
    32: Config(128, 64, 32, 4, 3),
    64: Config(128, 64, 64, 4, 3),
    128: Config(128, 64, 128, 4, 3),
    256: Config(128, 64, 256, 8, 2),
}
PAIR_TRIANGLE_FIXED = {
    80: {**_FORWARD_FIXED, 128: Config(128, 64, 128, 8, 3)},
    90: {**_FORWARD_FIXED, 128: Config(128, 128, 128, 4, 2)},
    100: _FORWARD_FIXED,
}
# With sums of positives besides.
_TRIANGLE_FIXED_CROWDED: Narrow = {
    **{width: Config(128, 64, width, 8, 3, max_registers=255) for width in (16, 32, 64, 128)},
    256: Config(128, 32, 256, 8, 2, max_registers=255),
}
PAIR_TRIANGLE_FIXED_CROWDED = {80: _TRIANGLE_FIXED_CROWDED, 90: _FORWARD_FIXED, 100: _TRIANGLE_FIXED_CROWDED}
PAIR_RECTANGLE_FIXED = {
    80: _FORWARD_FIXED,
    90: _FORWARD_FIXED,
    100: {**_FORWARD_FIXED, 256: Config(128, 64, 256, 8, 2, max_registers=255)},
}
_BACKWARD_FIXED: Narrow = {
    16: Config(64, 64, 16, 4, 3),
    32: Config(64, 64, 32, 4, 3),
    64: Config(64, 64, 64, 4, 3),
    128: Config(64, 64, 128, 4, 3),
}
PAIR_BACKWARD_FIXED = {
    80: _BACKWARD_FIXED,
    90: {**_BACKWARD_FIXED, 128: Config(64, 128, 128, 4, 2)},
    100: _BACKWARD_FIXED,
}


def architecture(device: torch.device) -> int:
    """Whose tables a device takes: those of Ampere, which ask for the least, where it has none of its own.

    The interpreter runs Hopper's.
    """
    return _architecture_of_gpu(device) if device.type == "cuda" else 90


@functools.cache
def _architecture_of_gpu(device: torch.device) -> int:
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def is_narrow(tables: dict[int, Narrow], x: Tensor) -> bool:
    """Where recomputing logits from rows kept on chip beats passing H through memory: where that is pinned.

    float32 is wide at any D: its exact products are three, which leaves no registers for a second accumulator.
    """
    return x.dtype.itemsize == 2 and padded_width(x.shape[1]) in tables[architecture(x.device)]


def padded_width(dim: int) -> int:
    """The smallest power of two that holds `dim` and that a tensor core accepts."""
    return max(16, 1 << (dim - 1).bit_length())


def narrow_config(tables: dict[int, Narrow], x: Tensor) -> Config:
    return tables[architecture(x.device)][padded_width(x.shape[1])]


def narrow_backward(rows: bool, cols: bool, listed: bool) -> dict[int, Narrow]:
    """The tables for log-sum-exps of rows, of columns or of both; `listed`: the owned rows are classes of a list."""
    if rows and cols:
        return BACKWARD_NARROW_BOTH
    return BACKWARD_NARROW_CROWDED if cols or listed else BACKWARD_NARROW


def wide_config(tables: dict[int, Wide], x: Tensor, num_columns: int) -> Config:
    table, itemsize = tables[architecture(x.device)], x.dtype.itemsize
    large = table[itemsize, False]
    tiles = cdiv(len(x), large.block_r) * cdiv(num_columns, large.block_c)
    return table[itemsize, tiles < TARGET_PROGRAMS // 4]


def forward_config(
    narrow: dict[int, Narrow], wide: dict[int, Wide], x: Tensor, num_columns: int
) -> tuple[Config, bool]:
    """The tile of a forward that has both shapes, and whether it is a narrow one."""
    if is_narrow(narrow, x):
        return narrow_config(narrow, x), True
    return wide_config(wide, x, num_columns), False


def padded_columns(count: int) -> int:
    return cdiv(count, PADDING) * PADDING


def row_blocks(dim: int) -> dict[str, int]:
    """About 2048 elements a program, for kernels that go over rows and keep only a number of each.

    The register limit is not reached: with it ptxas stops spilling two registers for the sake of one more program.
    """
    depth = min(padded_width(dim), 1024)
    return {"BLOCK_R": 2048 // depth, "BLOCK_D": depth, "num_warps": 4, "maxnreg": 128}


def finish_blocks(dim: int, splits: int) -> dict[str, int | bool]:
    """2048 numbers a program; of split sums eight parts at once."""
    depth, parts = min(padded_width(dim), 2048), 1 if splits == 1 else 8
    blocks = {"BLOCK_S": parts, "BLOCK_R": max(1, 2048 // parts // depth), "BLOCK_D": depth}
    return {"ONCE": dim <= depth, **blocks, "num_warps": 4, "maxnreg": 128}  # see `row_blocks`


def segment_blocks(num_classes: int) -> dict[str, int]:
    """16,384 comparisons a step; few classes a program when there are few, so that all multiprocessors work."""
    classes = 4 if num_classes <= 4 * TARGET_PROGRAMS else 16
    return {"BLOCK_K": classes, "BLOCK_N": 16384 // classes, "num_warps": 8}


def joins_in_loss(num_samples: int, *splits: int) -> bool:
    """Whether the kernel of the loss itself joins the parts of log-sum-exps: every program of classes may read all of
    the samples' parts, and one program of samples reads theirs all.
    """
    return max(splits) > 1 and num_samples <= 1024 and max(splits) <= 32


def loss_blocks(num_classes: int, joins: bool) -> dict[str, int]:
    """Comparisons as in `segment_blocks`; joining, one program holds a small batch's samples and four parts of each.

    The register limit is what 16 warps can have at most.
    """
    classes = segment_blocks(num_classes)["BLOCK_K"]
    samples, splits = (1024, 4) if joins else (16384 // classes, 1)
    return {"BLOCK_K": classes, "BLOCK_N": samples, "BLOCK_S": splits, "num_warps": 16, "maxnreg": 128}


def class_sum_blocks(dim: int) -> dict[str, int]:
    depth = min(padded_width(dim), 256)
    return {"BLOCK_N": 4096 // depth, "BLOCK_D": depth, "num_warps": 4}


def skips_absent_classes(num_samples: int, num_classes: int, dim: int) -> bool:
    """Whether listing the present classes costs less than computing rows for all: a rule of shapes alone."""
    return num_classes > num_samples and 2 * num_classes * num_samples * dim > COMPACT_FLOP


def kept_shape(
    features: Tensor,
    prototypes: Tensor,
    *,
    counts: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: float,
    rows: bool,
    cols: bool,
    normalize: bool,
    keep_bytes: int,
) -> tuple[int, int]:
    """Shape of the exponentials that a forward keeps for its backward, (0, 0) when none are: a rule of shapes alone."""
    (num_samples, dim), num_classes = features.shape, prototypes.shape[0]
    if rows and not cols and counts is not None and skips_absent_classes(num_samples, num_classes, dim):
        num_classes = num_samples
    dtype, width = kernel_dtype(features), cdiv(num_samples, 64) * 64
    exact = normalize and temperature is None and inv_temperature <= KEEP_INV_TEMPERATURE.get(dtype, 0.0)
    pays = _keeping_pays(num_samples, num_classes, dim, rows, cols)
    fits = 0 < num_classes * width * dtype.itemsize <= keep_bytes
    return (num_classes, width) if exact and pays and fits else (0, 0)


def sums_by_tiles(features: Tensor, num_classes: int, fixed_shift: bool) -> bool:
    """Whether every tile of a wide forward is a program's, which leaves a sum of each row: a loop over tiles starts its
    pipeline anew for each. As long as these sums fit the scratch memory, and where there are any: without samples there
    is no tile, and no program to leave a row's sum.
    """
    wide = features.dtype.itemsize == 2 and not is_narrow(FORWARD_NARROW, features)
    return wide and fixed_shift and 0 < 4 * num_classes * cdiv(features.shape[0], 64) <= SCRATCH_BYTES


def prepares_columns(features: Tensor, num_classes: int) -> bool:
    """Whether the tiles of a wide backward are many enough to repay the launch that makes columns ready for them."""
    return features.dtype.itemsize == 2 and 2 * features.numel() * num_classes >= KEEP_FLOP


def _keeping_pays(num_samples: int, num_classes: int, dim: int, rows: bool, cols: bool) -> bool:
    """For each logit keeping moves 4 bytes more (exp(s) written and read; both ways write H), recomputing takes 2D more
    operations. At 3.0 TB/s and 550 TFLOP/s, 70 % of a library product's, those meet at D = 370: arithmetic, to be
    measured. With sums along both sides one product serves both, so that keeping saves two.
    """
    return dim * (2 if rows and cols else 1) >= KEEP_WIDTH and 2 * num_samples * num_classes * dim >= KEEP_FLOP


def loss_follows_lse(num_samples: int, num_classes: int, dim: int, rows: bool, cols: bool) -> bool:
    """Whether the kernel of the loss takes the batch: where no absent classes are to be skipped, and where sums along
    both sides need few comparisons of every sample with every class. A rule of shapes alone.
    """
    if rows and cols:
        return num_samples * num_classes <= MAX_LOSS_COMPARISONS
    return not rows or not skips_absent_classes(num_samples, num_classes, dim)


def chunks(num_rows: int, num_columns: int, itemsize: int, dim: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of matrices that hold at most CHUNK_BYTES, as do their fp32 products with the shorter side (one
    strip of 128 at the least), cut along the longer side: the shorter side's sum is the smaller one to keep between
    chunks."""
    longer, shorter = max(num_rows, num_columns), min(num_rows, num_columns)
    length = max(128, CHUNK_BYTES // max(itemsize * shorter, 4 * dim) // 128 * 128)
    for start in range(0, longer, length):
        part = slice(start, min(start + length, longer))
        yield (part, slice(0, num_columns)) if num_rows > num_columns else (slice(0, num_rows), part)


def row_chunks(num_rows: int, bytes_a_row: int) -> Iterator[slice]:
    """Rows of matrices that hold at most SCRATCH_BYTES (128 rows at the least)."""
    length = max(128, SCRATCH_BYTES // bytes_a_row // 128 * 128)
    for start in range(0, num_rows, length):
        yield slice(start, min(start + length, num_rows))


def strip_groups(num_rows: int, block: int, padding: int = 1) -> Iterator[tuple[int, int]]:
    """Rows [first, last) of strips of `block` rows whose sums of every column from there on fit SCRATCH_BYTES together
    (one strip at the least), of columns up to a multiple of `padding`.
    """
    first = 0
    while first < num_rows:
        columns = cdiv(num_rows - first, padding) * padding
        last = min(first + max(1, SCRATCH_BYTES // (4 * columns)) * block, num_rows)
        yield first, last
        first = last


def pair_chunks(num_rows: int, num_columns: int, itemsize: int, dim: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows, and the columns in parts: matrices of at most SCRATCH_BYTES (128 rows at the least), as are the rows' fp32
    sums, about square, so that library products over their columns have enough rows to fill a GPU."""
    parts = [slice(start, min(start + CHUNK_COLUMNS, num_columns)) for start in range(0, num_columns, CHUNK_COLUMNS)]
    for rows in row_chunks(num_rows, max(itemsize * min(num_columns, CHUNK_COLUMNS), 4 * dim)):
        yield rows, parts


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def split_count(row_blocks: int, column_tiles: int, bytes_a_split: int, waves: int = 1) -> int:
    """How many programs share a block of rows: enough to fill a GPU, few enough that the partial results stay small."""
    programs = waves * TARGET_PROGRAMS
    # Rounded down: a program more than a GPU holds would take a time of its own.
    wanted = min(programs // max(row_blocks, 1), SCRATCH_BYTES // max(bytes_a_split, 1), column_tiles)
    return cdiv(column_tiles, cdiv(column_tiles, max(wanted, 1))) if column_tiles else 1


def input_precision(dtype: torch.dtype) -> str:
    """Of float32 products: TF32 when PyTorch's own matmul may use it, else three TF32 products, exact to about 1e-6."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def kernel_dtype(x: Tensor) -> torch.dtype:
    """Triton's interpreter misreads bfloat16, so without a GPU it is computed in float32."""
    return torch.float32 if x.dtype == torch.bfloat16 and not x.is_cuda else x.dtype


def row_major(x: Tensor) -> Tensor:
    """x itself whenever its last dimension is contiguous: the kernels take any row stride."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """x [rows, D] with D rounded up to a multiple of 16 by zeros, and rows that begin on 16 bytes.

    x itself when that already holds, as it does for the usual widths. Otherwise a padded copy: it is read once, while
    unaligned tiles would be read two bytes at a time in every pass. Zeros change neither products nor norms.
    """
    x = row_major(x)
    rows, dim = x.shape
    if dim % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(rows, cdiv(dim, 16) * 16)
    padded[:, :dim] = x
    return padded
