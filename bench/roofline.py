"""How far a loss is from what the machine can do: `python -m bench roofline`.

One run times three probes and ours in turn, so that their ratios hold on a noisy machine: a matrix product (a large
square one, and those of the case itself), a copy far larger than any cache, exponentials that wait for no memory. Each
probe's rate turns the least work of a pass into a floor of its time; the largest floor is what limits the pass.

Least work, with N samples, K classes (NTCE and NONL: those in the batch), D width, F1 = 2NKD, E = NK:

    pass                 FLOP     exponentials   bytes
    forward              F1       E              inputs read
    forward + backward
      kept               3 F1     E              inputs read twice, gradients written, E exponentials written and read
      recomputed         4 F1     2 E            inputs read twice, gradients written
    supcon forward       N²D      N²/2           inputs read: half of the pairs, for they are symmetric
    supcon both, CPU                             half of the pairs in both passes
      kept               3 N²D    N²/2           inputs read twice, gradient written, N²/2 exponentials written and read
      recomputed         4 N²D    N²             inputs read twice, gradient written
    supcon both, GPU     5 N²D    3N²/2          the same: all pairs in the backward, where half would need atomics

Of kept and recomputed that with the smaller floor counts, whatever the code does: a floor is the problem's own. But of
SupCon only what fits the memory budget counts as kept, for its memory must not grow as N². Inputs are features,
prototypes and labels in their own dtype; kept exponentials take the dtype that products are computed in: on a CPU
float32 (so its matrix probe is float32 as well), on a GPU the inputs'. There our exact float32 products run on tensor
cores, which the library's do not, so a share of more than 100 % is possible.

Writes roofline.csv, a `Point` a line, and its picture. Exit code 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import hypercontrast as hc
from bench import forms, plot, record, verdict
from bench.arguments import add_output, at_least, new_folder, non_negative, writable
from bench.measure import Run, clock, interleaved, reduced_inputs
from bench.peers import OURS
from bench.record import Case, Point
from hypercontrast import blockwise_pairs
from hypercontrast.tiles import product_

PASSES = ("forward", "forward + backward")
DTYPES = ("float32", "bfloat16", "float16")
ROUNDS = 5  # at least


@dataclass(frozen=True)
class Work:
    """What a pass cannot do without."""

    flop: float
    bytes: float
    exps: float


@dataclass(frozen=True)
class Rates:
    """What the probes reached, a second."""

    matmul: float  # FLOP
    copy: float  # bytes read or written
    exp: float  # exponentials

    def floors(self, work: Work) -> dict[str, float]:
        """The least milliseconds that each kind of work takes."""
        seconds = {"matmul": work.flop / self.matmul, "bytes": work.bytes / self.copy, "exp": work.exps / self.exp}
        return {kind: 1e3 * floor for kind, floor in seconds.items()}


def methods(case: Case, passes: str, present: int, on_gpu: bool) -> dict[str, Work]:
    """The ways to do a pass; `present` classes take part in it."""
    n, k, d = case.n, case.k, case.d
    item = forms.DTYPES[case.dtype].itemsize
    if case.op == "supcon":
        inputs, pairs = n * d * item + 8 * n, n * n
        if passes == "forward":
            return {"half": Work(pairs * d, inputs, pairs / 2)}
        moved = 2 * inputs + n * d * item
        if on_gpu:
            return {"half, then all": Work(5 * pairs * d, moved, 1.5 * pairs)}
        ways = {"recomputed": Work(4 * pairs * d, moved, pairs)}
        if blockwise_pairs.kept_elements(n, torch.float32, hc.memory_budget()):
            ways["kept"] = Work(3 * pairs * d, moved + 4 * pairs, pairs / 2)
        return ways
    inputs, exps = (n + present) * d * item + 8 * n, n * present
    f1 = 2 * exps * d
    if passes == "forward":
        return {"once": Work(f1, inputs, exps)}
    moved = 2 * inputs + (n + k) * d * item
    kept = 2 * exps * (item if on_gpu else 4)
    return {"kept": Work(3 * f1, moved + kept, exps), "recomputed": Work(4 * f1, moved, 2 * exps)}


def least(ways: dict[str, Work], rates: Rates) -> tuple[str, Work, dict[str, float]]:
    """(name, work, floors) of the way whose largest floor is the smallest."""
    name = min(ways, key=lambda way: max(rates.floors(ways[way]).values()))
    return name, ways[name], rates.floors(ways[name])


def square_probe(size: int, dtype: torch.dtype, device: str) -> tuple[Run, float]:
    """A product of two square matrices, and its FLOP."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: product_(a, b, out), 2.0 * size**3


def products_probe(op: str, leaves: Sequence[torch.Tensor], y: torch.Tensor) -> tuple[Run, float]:
    """The products of the case, and their FLOP."""
    flop = (4.0 if op == "supcon" else 6.0) * leaves[0].numel() * len(forms.columns(op, leaves, y))
    return forms.products(op, leaves, y), flop


def copy_probe(num_bytes: int, device: str) -> tuple[Run, float]:
    """A copy, and the bytes it reads and writes."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * num_bytes


def exp_probe(device: str) -> tuple[Run, float]:
    """Exponentials in float32, and how many: of a tile in cache, or on a GPU many of a number in a register."""
    if device == "cpu":
        x, repeats = torch.randn(1 << 18), 32
        out = torch.empty_like(x)

        def tile():
            for _ in range(repeats):
                torch.exp(x, out=out)

        return tile, float(repeats * x.numel())
    x, repeats = torch.randn(1 << 24, device=device), 64

    # One kernel: a number read and written for 64 exponentials, so that memory cannot be what limits it.
    @torch.compile
    def chain(x):
        for _ in range(repeats):
            x = torch.exp2(-x)
        return x

    return lambda: chain(x), float(repeats * x.numel())


def measure(case: Case, device: str, seconds: float, square: int, copy_bytes: int) -> list[Point]:
    """Both passes of ours beside the probes of the same rounds. `square` is the edge of the large product."""
    leaves, y = forms.of_case(case, device)
    ours = forms.ours(case.op, temperature=case.temperature)
    of_products = leaves[0].dtype if device == "cuda" else torch.float32
    probes = {
        "square": square_probe(square, of_products, device),
        "products": products_probe(case.op, leaves, y),
        "copy": copy_probe(copy_bytes, device),
        "exp": exp_probe(device),
    }

    @torch.no_grad()
    def forward() -> None:
        ours(*leaves, y)

    runs = {name: probe for name, (probe, _) in probes.items()}
    runs |= {"forward": forward, "forward + backward": lambda: forms.step(ours, leaves, y)}
    times = interleaved(runs, seconds, clock(device), ROUNDS)
    rate = {name: 1e3 * amount / statistics.median(times[name]) for name, (_, amount) in probes.items()}
    rates = Rates(max(rate["square"], rate["products"]), rate["copy"], rate["exp"])
    present = len(forms.columns(case.op, leaves, y))
    shared = {
        "square_tflops": rate["square"] / 1e12, "products_tflops": rate["products"] / 1e12,
        "copy_gbs": rate["copy"] / 1e9, "exp_gexps": rate["exp"] / 1e9, **_judged(case, ours, device),
        "rounds": len(times["square"]), **record.environment(device),
    }  # fmt: skip
    points = []
    for passes in PASSES:
        method, work, floors = least(methods(case, passes, present, on_gpu=device == "cuda"), rates)
        limit = max(floors, key=floors.__getitem__)
        time = statistics.median(times[passes])
        low, *_, high = statistics.quantiles(times[passes], n=5, method="inclusive")
        mine = {"time_ms": time, "p20_ms": low, "p80_ms": high, "limit": limit, "share": floors[limit] / time}
        mine |= {f"{kind}_ms": floor for kind, floor in floors.items()}
        point = Point(case.op, passes, case.n, case.k, case.d, case.dtype, method, **vars(work), **mine, **shared)
        points.append(point)
    return points


def _judged(case: Case, ours: Callable, device: str) -> dict[str, float | str]:
    """Errors of ours at a size that float64 can do, beside eager code's."""
    name = forms.yardstick(case.op)
    eager = partial(forms.EAGER[case.op][name], temperature=case.temperature)
    with reduced_inputs(case, device) as (small, leaves, y):
        steps = {name: forms.step(eager, leaves, y), OURS: forms.step(ours, leaves, y)}
    found = verdict.judge(small, leaves, y, steps)[OURS]
    return {"error": found.error, "tangential_error": found.tangential_error, "wrong": found.reason}


HEADER = (
    "| op | pass | n | k | d | least work | matmul ms | bytes ms | exp ms | time ms | limited by | share | error |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def markdown_line(p: Point) -> str:
    times = " | ".join(map(record.short, (p.matmul_ms, p.bytes_ms, p.exp_ms, p.time_ms)))
    case = f"{p.op} | {p.passes} | {p.n} | {p.k} | {p.d} | {p.method}"
    return f"| {case} | {times} | {p.limit} | {p.share:.0%} | {p.error:.1e} |"


def probes_line(p: Point) -> str:
    return (
        f"{p.op} beside: square product {p.square_tflops:.3g} TFLOP/s, its own {p.products_tflops:.3g} TFLOP/s, "
        f"copy {p.copy_gbs:.3g} GB/s, {p.exp_gexps:.3g}e9 exp/s; {p.rounds} rounds"
    )


# By device: the largest case of the targets that a quick look can afford, and probes that fill the machine.
SHAPES = {"cpu": (4096, 1000, 512), "cuda": (65536, 1000, 128)}
PAIRS = {"cpu": (8192, 100, 128), "cuda": (65536, 1000, 128)}  # supcon's
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
SQUARE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Shape and dtype of a case, for `case_of`; by default what suits the device."""
    defaults = (" ".join(map(str, shapes[device])) for device in ("cpu", "cuda") for shapes in (SHAPES, PAIRS))
    parser.add_argument(
        "--shape", type=at_least(1), nargs=3, metavar=("N", "K", "D"),
        help="samples, classes, width (default: {}, supcon {}; on a GPU {}, supcon {})".format(*defaults),
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of the inputs (default: float32; on a GPU bfloat16)")


def case_of(args: argparse.Namespace, op: str, device: str) -> Case:
    shape = args.shape or (SHAPES if op in forms.PROTOTYPE_LOSSES else PAIRS)[device]
    case = Case(op, *shape, args.dtype or DTYPE[device])
    forms.check(case)
    return case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ops = list(forms.EAGER)
    parser.add_argument(
        "--op", nargs="+", choices=ops, default=ops, metavar="OP", help=f"of {', '.join(ops)} (default: all)"
    )
    add_case_arguments(parser)
    parser.add_argument("--seconds", type=non_negative, default=8, metavar="S", help="of rounds an op (default: 8)")
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    device = record.this_device()
    cases = [case_of(args, op, device) for op in args.op]
    folder = args.output or new_folder(record.environment(device)["device"])
    writer = record.Writer(writable(folder / "roofline.csv"), Point)
    probes, wrong = [], []
    print(HEADER, flush=True)
    for case in cases:
        points = measure(case, device, args.seconds, SQUARE[device], COPY_BYTES[device])
        for point in points:
            writer.add(point)
            print(markdown_line(point), flush=True)
        probes.append(probes_line(points[0]))
        if points[0].wrong:
            wrong.append(f"{case.op} is wrong: {points[0].wrong}")
    print("", *probes, "", writer.path, *plot.draw_beside(writer.path), sep="\n")
    for reason in wrong:
        print(f"bench: {reason}", file=sys.stderr)
    return int(bool(wrong))
