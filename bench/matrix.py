"""The matrix: which cases, the table, the CSV file, the pictures, and a non-zero exit where a form of ours is wrong.

Without options: the standard cases of this machine, a GPU's or a CPU's. --quick: few of a CPU's, under 3 minutes on two
cores; on a slow machine those that would begin too late are named and left out. --op alone selects among them; --shape,
--dtype, --labels, --temperature and --features make cases of their own.

A form is judged by the error and the tangential error of its loss, its gradients and their rows: against float64 of
4,096 samples at most, and at full size beside the yardstick, the eager form that does the least work, where that fits
into memory. A peer past a bound is a finding, one of ours past it, or failing, ends the run with exit code 1. What does
not fit into memory is a result.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import forms, peers, plot
from bench.arguments import add_output, at_least, new_folder, non_negative, writable
from bench.measure import measure, reason_of, row
from bench.peers import OURS
from bench.record import Case, Row, Writer, environment, markdown, markdown_line, short, this_device
from hypercontrast.config import UsageError

OPS = ("nonl", "ntce", "normface", "supcon", "buffer", "step")
# Where --shape is not given: N, K (supcon: classes, buffer: rows of its queue), D.
SHAPES = {"supcon": (8192, 100, 128), "buffer": (512, 16_384, 128)}
SHAPE = (4096, 1000, 512)
PUBLISHED = ("eager M x M", "published N x N")  # what papers' code computes
QUICK_SECONDS = 130  # within which its cases begin; the last, which takes longest, half a minute or, later, none
STEP = Case("step", 512, 10, 512)  # stands for those of bench/step.py


@dataclass(frozen=True)
class Entry:
    """A case and which eager forms and peers to measure beside the yardstick and ours; None: all that fit."""

    case: Case
    vs: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return _short(self.case) + (f" against {', '.join(self.vs)}" if self.vs else "")


def quick() -> list[Entry]:
    """The headline ratios, collapse, peers, the buffer; then growth with N, of exponentials kept and recomputed."""
    entries = [Entry(Case("ntce", *SHAPE), (*PUBLISHED, "compiled"))]
    entries += [Entry(Case(op, *SHAPES.get(op, SHAPE)), ()) for op in ("supcon", "nonl", "normface")]
    entries += [Entry(Case(op, 1024, 100, 128, features="collapsed"), ()) for op in forms.EAGER]
    entries += [Entry(Case("supcon", 2048, 1024, 128, labels="instances"), ("lightly", "pytorch-metric-learning"))]
    entries += [Entry(Case("buffer", *SHAPES["buffer"]))]
    entries += [Entry(Case("supcon", n, 100, 128), PUBLISHED) for n in (1024, 2048, 4096)]
    sizes = (256, 1024, 4096, 16384, 65536)
    return entries + [Entry(Case("ntce", n, 1000, 128), PUBLISHED if n <= 4096 else ()) for n in sizes]


def standard_cpu() -> list[Entry]:
    entries = [Entry(Case(op, *SHAPES.get(op, SHAPE))) for op in forms.EAGER]
    for op, n, d in itertools.product(forms.PROTOTYPE_LOSSES, (256, 1024, 4096, 16384, 65536), (128, 512)):
        entries.append(Entry(Case(op, n, 1000, d), PUBLISHED))
    entries += [Entry(Case("supcon", n, 100, 128), ("pytorch-metric-learning",)) for n in (1024, 2048, 4096, 32768)]
    for op in forms.EAGER:
        case = Case(op, *((4096, 100, 128) if op == "supcon" else SHAPE))
        variants = [{"features": "collapsed"}, {"labels": "longtail"}, {"labels": "single"}, {"temperature": 0.01}]
        entries += [Entry(case._replace(**variant), ()) for variant in variants]
    entries += [Entry(Case("supcon", 2 * n, n, 128, labels="instances")) for n in (1024, 4096)]
    entries += [Entry(Case("normface", 4096, 4096, 256, labels="instances"))]
    entries += [Entry(Case("buffer", *SHAPES["buffer"], ranks=ranks)) for ranks in (1, 2)]
    return [*_once(entries), Entry(STEP)]


def standard_gpu() -> list[Entry]:
    """The table of targets in bfloat16, what qualifies it, and last, as it takes longest, torch.compile of it."""
    shapes = [(4096, 1000, 2048), (65536, 1000, 128), (32768, 100_000, 512), (256, 1000, 2048)]
    table = [Case(op, *shape, "bfloat16") for shape in shapes for op in forms.PROTOTYPE_LOSSES]
    table += [Case("supcon", n, 1000, 128, "bfloat16") for n in (8192, 65536, 262144)]
    uncompiled = (*PUBLISHED, *(name for name in peers.PEERS if name != "compiled"))
    entries = [Entry(case, uncompiled) for case in table]
    entries += [Entry(STEP), Entry(Case("buffer", *SHAPES["buffer"], "bfloat16"))]
    for case in (table[0], table[1], table[2], table[-3]):
        variants = [{"features": "collapsed"}, {"dtype": "tf32"}, {"dtype": "float32"}, {"dtype": "float16"}]
        entries += [Entry(case._replace(**variant), ()) for variant in variants]
    entries += [Entry(Case("normface", 16384, 16384, 256, "bfloat16", "instances"), uncompiled)]
    entries += [Entry(Case("supcon", 8192, 4096, 128, "bfloat16", "instances"), uncompiled)]
    entries += [Entry(Case("ntce", n, 1000, 512, "bfloat16"), PUBLISHED) for n in (1024, 4096, 16384, 65536, 262144)]
    return entries + [Entry(case, ("compiled",)) for case in table]


def _once(entries: Iterable[Entry]) -> list[Entry]:
    """Every case where it comes first."""
    return list({entry.case: entry for entry in reversed(list(entries))}.values())[::-1]


@dataclass
class Outcome:
    rows: list[Row]
    skipped: list[Entry]

    @property
    def wrong(self) -> list[Row]:
        """Rows of ours that count against us; of a buffer its twin is ours too."""
        return [x for x in self.rows if x.status in ("wrong", "failed") and (x.form == OURS or x.op == "buffer")]


def measure_all(
    entries: Sequence[Entry], csv: Path, device: str, seconds: float, limit: float | None = None, memory: bool = True
) -> Outcome:
    """Every entry's rows, to the file and the terminal as they come; cases that would begin past `limit` seconds are
    skipped.
    """
    writer, outcome, start = Writer(csv), Outcome([], []), time.perf_counter()
    print(markdown([]), flush=True)
    for entry in entries:
        if limit is not None and time.perf_counter() - start > limit:
            outcome.skipped.append(entry)
            continue
        # A case that returns for one more peer keeps its rows. The peer's own has its ratio to ours of that return.
        known = {(x.case, x.form) for x in outcome.rows}
        for found in _rows(entry, device, seconds, memory):
            if (found.case, found.form) not in known:
                writer.add(found)
                outcome.rows.append(found)
                print(markdown_line(found), flush=True)
    if outcome.skipped:
        print(f"not begun after {limit:.0f} s: " + "; ".join(map(str, outcome.skipped)))
    return outcome


def _rows(entry: Entry, device: str, seconds: float, memory: bool) -> list[Row]:
    case = entry.case
    try:
        if case.op == "buffer":
            from bench import buffer

            return buffer.measure(case, device, seconds)
        if case.op == "step":
            return _steps(device)
        return measure(case, peers.candidates(case, device, entry.vs), device, seconds, memory)
    except Exception as error:  # one case must not take the others with it
        return [row(case, OURS, device, {"status": "failed", "reason": reason_of(error)})]


def _steps(device: str) -> list[Row]:
    """The training step has cases of its own."""
    from bench import step

    if missing := step.missing():
        return [row(STEP, OURS, device, {"status": "absent", "reason": missing})]
    return list(step.rows(device, quick=False))


def _short(case: Case) -> str:
    shared = Case(case.op, case.n, case.k, case.d)
    special = [str(value) for value, usual in zip(case, shared, strict=True) if value != usual]
    return " ".join([f"{case.op} {case.n} x {case.k} x {case.d}", *special])


def headlines(rows: Sequence[Row]) -> str:
    """Ours beside every other form of its case: how many times as fast, forward and backward, and whose error."""
    lines = [
        "| case | ours against | speed | error, ours / theirs | scratch MiB, ours / theirs |",
        "|---|---|---|---|---|",
    ]
    ours = {x.case: x for x in rows if x.form == OURS}
    for theirs in rows:
        mine = ours.get(theirs.case)
        if mine is None or theirs.form == OURS or not theirs.fwd_bwd_ratio:
            continue
        errors = _both(mine.error, theirs.error, "{:.1e}".format)
        scratch = _both(mine.scratch_mib, theirs.scratch_mib, short)
        form = theirs.form + f" ({theirs.status})" * (theirs.status != "ok")  # a wrong result may be a fast one
        lines.append(f"| {_short(mine.case)} | {form} | {theirs.fwd_bwd_ratio:.2f}x | {errors} | {scratch} |")
    return "\n".join(lines)


def _both(mine: float | None, theirs: float | None, shown: Callable[[float], str]) -> str:
    return "" if mine is None or theirs is None else f"{shown(mine)} / {shown(theirs)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="few cases of a CPU, under 3 minutes on two cores")
    parser.add_argument("--op", nargs="+", choices=OPS, metavar="OP", help=f"of {', '.join(OPS)} (default: all)")
    parser.add_argument(
        "--shape", nargs=3, type=int, action="append", metavar=("N", "K", "D"),
        help="samples, classes (buffer: rows of its queue) and width; again for more",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=forms.DTYPES, metavar="DTYPE", help=", ".join(forms.DTYPES))
    parser.add_argument("--labels", nargs="+", choices=forms.LABELS, metavar="LABELS", help=", ".join(forms.LABELS))
    parser.add_argument("--temperature", nargs="+", type=float, metavar="T", help="τ (default: 0.1)")
    parser.add_argument(
        "--features", nargs="+", choices=("random", "collapsed"), metavar="FEATURES", help="random, collapsed"
    )
    everyone = list(dict.fromkeys(name for op in forms.EAGER for name in peers.names(op)))
    parser.add_argument(
        "--vs", nargs="*", choices=everyone, metavar="PEER",
        help=f"of {', '.join(everyone)} (default: what a case calls for; none: the cheapest eager form alone)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=non_negative, metavar="S", help="of rounds a case but of op step (default: 5, quick: 1)"
    )
    parser.add_argument("--threads", type=at_least(1), metavar="T", help="of the CPU (default: torch's choice)")
    add_output(parser)


def chosen(args: argparse.Namespace, device: str) -> list[Entry]:
    """The cases that the arguments ask for. Raises: UsageError where there are none or a case cannot be."""
    described = (args.shape, args.dtype, args.labels, args.temperature, args.features)
    if any(described):
        own = "--quick" if args.quick else "--op step" if "step" in (args.op or ()) else ""
        if own:
            cases = "--shape, --dtype, --labels, --temperature, --features"
            raise UsageError(f"{own} has its own cases: leave out {cases}")
        entries = []
        for op in args.op or forms.EAGER:
            values = (args.shape or [SHAPES.get(op, SHAPE)], args.dtype or ["float32"], args.labels or ["uniform"],
                      args.temperature or [forms.TAU], args.features or ["random"])  # fmt: skip
            entries += [Entry(Case(op, *shape, *rest)) for shape, *rest in itertools.product(*values)]
    else:
        entries = quick() if args.quick else standard_gpu() if device == "cuda" else standard_cpu()
        if missing := sorted(set(args.op or ()) - {entry.case.op for entry in entries}):
            raise UsageError(f"--quick has no case of {', '.join(missing)}: leave out --quick")
        entries = [entry for entry in entries if args.op is None or entry.case.op in args.op]
    for entry in entries:
        forms.check(entry.case)
    known = {name for entry in entries for name in peers.fitting(entry.case)}
    if unknown := sorted(set(args.vs or ()) - known):
        raise UsageError(
            f"--vs must be of {', '.join(sorted(known)) or 'nothing'} for these cases, got {', '.join(unknown)}"
        )
    return entries if args.vs is None else [Entry(entry.case, tuple(args.vs)) for entry in entries]


def run(args: argparse.Namespace) -> int:
    device = this_device()
    entries = chosen(args, device)
    if args.threads:
        torch.set_num_threads(args.threads)
    where = environment(device)
    start = time.perf_counter()
    folder = args.output or new_folder(where["device"])
    csv = writable(folder / "matrix.csv")
    print("# " + ", ".join(f"{name} {value}" for name, value in where.items() if value), flush=True)
    a_case = args.seconds if args.seconds is not None else 1.0 if args.quick else 5.0
    limit = QUICK_SECONDS if args.quick else None
    outcome = measure_all(entries, csv, device, a_case, limit)
    (folder / "matrix.md").write_text(f"{markdown(outcome.rows)}\n\n{headlines(outcome.rows)}\n")
    print(f"\n{headlines(outcome.rows)}\n")
    for path in [csv, folder / "matrix.md", *plot.draw_beside(csv)]:
        print(path)
    print(f"{len(outcome.rows)} rows in {time.perf_counter() - start:.0f} s")
    for bad in outcome.wrong:
        print(f"bench: {bad.form} of {_short(bad.case)} is {bad.status}: {bad.reason}", file=sys.stderr)
    return int(bool(outcome.wrong))
