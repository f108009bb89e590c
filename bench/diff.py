"""Two CSV files of the matrix, case by case: ratio of times, errors side by side; exit 1 where the second is worse.

Slower is a step (or forward) whose median grew past the tolerance and whose 20th percentile is above the old 80th: a
ratio whose ranges overlap is marked ~ and proves nothing. Less exact is an error that grew past the tolerance and by
more than a rounding of float32. A form that ran and does so no more is worse too, and so is a case that ran and is
not in the second file: a run that was cut off has proved nothing of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.arguments import non_negative
from bench.record import Row, read
from hypercontrast.config import UsageError

ROUNDING = 2**-23


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="A.csv")
    parser.add_argument("after", type=Path, metavar="B.csv")
    parser.add_argument(
        "--tolerance", type=non_negative, default=0.1, help="how much worse is still the same (default: 0.1)"
    )


def pairs(before: Sequence[Row], after: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Rows of the same case and form, in the second file's order."""
    old = {(row.case, row.form): row for row in before}
    return ((old[row.case, row.form], row) for row in after if (row.case, row.form) in old)


def overlap(a: Row, b: Row, what: str) -> bool:
    """Whether the ranges from the 20th to the 80th percentile have a time in common."""
    (a_low, a_high), (b_low, b_high) = ((getattr(x, f"{what}_p20"), getattr(x, f"{what}_p80")) for x in (a, b))
    known = None not in (a_low, a_high, b_low, b_high)
    return known and a_low <= b_high and b_low <= a_high


def worse(a: Row, b: Row, tolerance: float) -> list[str]:
    """What is worse of b than of a."""
    found = []
    if a.status == "ok" and b.status != "ok":
        found.append(f"is {b.status}" + (f" ({b.reason})" if b.reason else ""))
    for what in ("fwd", "fwd_bwd"):
        old, new = getattr(a, f"{what}_ms"), getattr(b, f"{what}_ms")
        if old and new and new > old * (1 + tolerance) and not overlap(a, b, what):
            found.append(f"{what} is {new / old:.2f}x as slow")
    for what in ("error", "tangential_error"):
        old, new = getattr(a, what), getattr(b, what)
        if old is not None and new is not None and not new <= old * (1 + tolerance) + ROUNDING:
            found.append(f"{what} grew from {old:.1e} to {new:.1e}")
    return found


def table(matched: Sequence[tuple[Row, Row]]) -> str:
    lines = ["| op | form | case | fwd B/A | fwd+bwd B/A | error A, B | tangential A, B |", "|" + "---|" * 7]
    for a, b in matched:
        times = [_ratio(a, b, what) for what in ("fwd", "fwd_bwd")]
        errors = [f"{_number(getattr(a, what))}, {_number(getattr(b, what))}" for what in ("error", "tangential_error")]
        case = " ".join(map(str, a.case[1:]))
        lines.append("| " + " | ".join([a.op, a.form, case, *times, *errors]) + " |")
    return "\n".join(lines)


def _ratio(a: Row, b: Row, what: str) -> str:
    old, new = getattr(a, f"{what}_ms"), getattr(b, f"{what}_ms")
    if not old or not new:
        return f"{a.status} / {b.status}"
    return f"{'~' if overlap(a, b, what) else ''}{new / old:.2f}"


def _number(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def run(args: argparse.Namespace) -> int:
    before, after = read(args.before), read(args.after)
    matched = list(pairs(before, after))
    if not matched:
        raise UsageError(f"{args.before} and {args.after} must have a case and form in common, got none")
    for name in ("device", "threads", "torch"):
        values = [", ".join(sorted({str(getattr(row, name)) for row in rows})) for rows in (before, after)]
        if values[0] != values[1]:
            print(f"{name} differs: {values[0]} / {values[1]}")
    print(table(matched))
    print(
        f"{len(matched)} rows in both; {len(before) - len(matched)} in A alone, {len(after) - len(matched)} in B alone"
    )
    findings = [(b, found) for a, b in matched if (found := worse(a, b, args.tolerance))]
    for row, found in findings:
        print(f"worse: {row.op} {row.form} {' '.join(map(str, row.case[1:]))}: {'; '.join(found)}")
    there = {row.case for row in after}
    missing = dict.fromkeys(row.case for row in before if row.status == "ok" and row.case not in there)
    for case in missing:
        print(f"worse: {' '.join(map(str, case))}: is not in {args.after}")
    return int(bool(findings or missing))
