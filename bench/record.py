"""One row a measurement and one schema for all of them: what the bench writes, draws, compares and shows.

The roofline's points are written and read the same way.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch

from hypercontrast.config import UsageError, access

ROOT = Path(__file__).parents[1]


class Case(NamedTuple):
    """What two rows must share to be compared. See `Row`."""

    op: str
    n: int
    k: int
    d: int
    dtype: str = "float32"
    labels: str = "uniform"
    temperature: float = 0.1
    features: str = "random"
    ranks: int = 1


@dataclass(frozen=True)
class Row:
    """A form of an op on one case, or the reason why there is none. Empty cells were not measured.

    Times are milliseconds, median and 20th and 80th percentile, on a GPU the device's; memory is MiB beyond the inputs;
    effective TFLOP/s count 2·n·k·d forward and three times that with the backward (supcon: 2n²d), whatever a form
    computes twice; of NTCE and NONL k are the classes in the batch (records to 2026-11-28: all). A buffer's forward is
    a gather, its forward and backward a gather and a push.
    """

    op: str  # nonl, ntce, normface, supcon, buffer, step
    form: str  # ours, an eager form, compiled, or a peer's name
    n: int  # samples (supcon: anchors; buffer: of a rank)
    k: int  # classes (buffer: rows of the queue)
    d: int  # width
    dtype: str  # float32, tf32 (float32 whose products may use it), bfloat16, float16
    labels: str = "uniform"  # how classes share the samples: uniform, longtail, single, instances
    temperature: float = 0.1
    features: str = "random"  # or collapsed: close to the prototype of their class
    ranks: int = 1
    status: str = "ok"  # ok, absent, out of memory, wrong (an error past its bound), failed
    reason: str = ""  # of any other status than ok, or of empty graph times
    fwd_ms: float | None = None
    fwd_p20: float | None = None
    fwd_p80: float | None = None
    fwd_bwd_ms: float | None = None
    fwd_bwd_p20: float | None = None
    fwd_bwd_p80: float | None = None
    host_ms: float | None = None  # issuing a forward and backward to a GPU, without waiting for it
    graph_ms: float | None = None  # forward and backward replayed as a CUDA graph
    graph_fwd_ms: float | None = None  # a forward without gradients, likewise
    # Kernels, copies and fills. A forward of ours outside of a CUDA graph copies the labels' range, to be checked.
    launches: int | None = None
    launches_bwd: int | None = None
    outputs_mib: float | None = None  # loss and gradients
    scratch_mib: float | None = None  # peak beyond inputs and outputs
    tflops_fwd: float | None = None
    tflops: float | None = None
    matmul_share: float | None = None  # time of the least products of a step (supcon: 4n²d), same round, over its time
    speedup: float | None = None  # records to 2026-11-28: the case's first eager form's time over this form's
    fwd_ratio: float | None = None  # this form's time over ours, median over the rounds that both had
    fwd_bwd_ratio: float | None = None
    # Largest relative error (Frobenius) of loss and gradients against float64, of 4,096 samples at most (SupCon 2,048).
    # At the size that is timed a step is compared with the yardstick's instead, and wrong past the rounding of both.
    error: float | None = None
    tangential_error: float | None = None  # the same of the gradients' part at right angles to their vectors
    repeats: bool | None = None  # the same bits twice
    rounds: int | None = None
    device: str = ""
    threads: int | None = None  # of the CPU
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""

    @property
    def case(self) -> Case:
        return Case(*(getattr(self, name) for name in Case._fields))


@dataclass(frozen=True)
class Point:
    """One pass of ours beside its floors: a line of roofline.csv. Times are milliseconds, medians of rounds."""

    op: str
    passes: str  # forward, forward + backward
    n: int
    k: int
    d: int
    dtype: str
    method: str  # that of the least time: once, kept, recomputed; of pairs also half, or half, then all
    flop: float
    bytes: float
    exps: float
    square_tflops: float  # of the large square product
    products_tflops: float  # of the case's own products
    copy_gbs: float  # 1e9 bytes read or written a second
    exp_gexps: float  # 1e9 exponentials a second
    matmul_ms: float  # floor at the faster of the two products
    bytes_ms: float
    exp_ms: float
    limit: str  # the largest floor: matmul, bytes, exp
    share: float  # the largest floor over the time
    time_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    error: float  # as in a Row of the matrix
    tangential_error: float
    wrong: str  # why the times count for nothing, if they do
    device: str = ""
    threads: int | None = None
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


def columns(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


COLUMNS = columns(Row)
Record = TypeVar("Record")


def this_device() -> str:
    """What is measured: the GPU, where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def environment(device: str) -> dict[str, Any]:
    """The last columns of a row: where and with what it was measured."""
    on_gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """The processor and the vector instructions that PyTorch takes there: "AMD EPYC" alone names many."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [f"model name: {platform.processor()}"]
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, '') or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def commit() -> str:
    """The checkout's commit, with a plus sign when it was changed since."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except OSError:
        return "unknown"
    return f"{head}+" if head and changed else head or "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a CSV file; its names too, where the file is new or empty."""
    with access(path, "written"), path.open("a", newline="") as file:
        writer = csv.DictWriter(file, line)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(line)


class Writer:
    """A CSV file that has every row as soon as it was measured."""

    def __init__(self, path: Path, kind: type = Row) -> None:
        self.path = path
        with access(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.writer(file).writerow(columns(kind))

    def add(self, row: Any) -> None:
        append(self.path, dataclasses.asdict(row))


def read(path: Path, kind: type[Record] = Row) -> list[Record]:
    """The rows of a CSV file. A record made before a column was added lacks it: there the row's default stands.

    Raises: UsageError for a file that cannot be read, or is not one of `kind`.
    """
    kinds = get_type_hints(kind)
    added = {field.name for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    with access(path, "read"), path.open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader.fieldnames or ())
        if found != [name for name in columns(kind) if name in found or name not in added]:
            raise UsageError(f"{path} must have the columns of a {kind.__name__}, got {found}")
        try:
            return [kind(**{name: _parsed(text, kinds[name]) for name, text in line.items()}) for line in reader]
        except (csv.Error, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} must have a {kind.__name__} a line, got another in line {reader.line_num}"
            ) from error


def _parsed(text: str | None, kind: Any) -> Any:
    if text is None:
        raise ValueError("a line has fewer cells than there are columns")
    if kind is str:
        return text
    if text == "" and "None" in str(kind):
        return None
    if "bool" in str(kind):
        return {"True": True, "False": False}[text]
    return int(text) if "int" in str(kind) else float(text)


# What a reader wants to see at a glance; the file has the rest.
_SHOWN = {
    "op": "op", "form": "form", "n": "n", "k": "k", "d": "d", "dtype": "dtype", "features": "features",
    "fwd_ms": "fwd ms", "fwd_bwd_ms": "fwd+bwd ms", "host_ms": "host ms", "fwd_bwd_ratio": "/ ours",
    "matmul_share": "of products", "scratch_mib": "scratch MiB", "error": "error", "tangential_error": "tangential",
    "repeats": "repeats",
}  # fmt: skip
_FORMATS = {
    "fwd_bwd_ratio": "{:.2f}", "matmul_share": "{:.0%}", "scratch_mib": "{:.0f}",
    "error": "{:.1e}", "tangential_error": "{:.1e}",
}  # fmt: skip


def markdown(rows: Iterable[Row]) -> str:
    """A table of what matters most; a row that is not ok says why in the place of its times."""
    lines = ["| " + " | ".join(_SHOWN.values()) + " |", "|" + "---|" * len(_SHOWN)]
    return "\n".join(lines + [markdown_line(row) for row in rows])


def markdown_line(row: Row) -> str:
    cells = []
    for name in _SHOWN:
        value = getattr(row, name)
        if name in ("fwd_ms", "fwd_bwd_ms", "host_ms") and value is not None:
            value = short(value)
        if name == "fwd_bwd_ms" and row.status != "ok":
            why = row.status + (f": {row.reason}" if row.reason else "")
            cells.append(why if value is None else f"{value} ({why})")
        else:
            cells.append("" if value is None else _FORMATS.get(name, "{}").format(value))
    return "| " + " | ".join(cells) + " |"


def short(value: float) -> str:
    """Three digits, or more before the point; never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
