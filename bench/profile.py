"""One case, kernel by kernel: `python -m bench profile OP`.

With a GPU and Nsight Compute (ncu) on the path: a child process warms up and runs one pass under it, and what limits
each kernel (share of peak, memory traffic, occupancy, registers and shared memory) is in profile.txt, the whole report
in profile.ncu-rep for its viewer. Else, and where ncu may not read the counters: torch.profiler over a few passes, its
table by self time in profile.txt and the last pass's course in trace.json, for chrome://tracing or Perfetto. Self time
is a kernel's own on a GPU, and on a CPU an operator's without those it calls.

--kernel takes the kernels or operators whose name has a match; --passes backward leaves the forward out.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.autograd import DeviceType

from bench import forms, record
from bench.arguments import add_output, new_folder, writable
from bench.measure import Run
from bench.record import ROOT, Case
from bench.roofline import add_case_arguments, case_of
from hypercontrast.config import UsageError

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
WARM_UP, REPEATS = 3, 5
MOST_ROWS = 20


def passes_of(case: Case, passes: str, device: str) -> Run:
    """One pass of ours: `forward`, without a graph, as the matrix times it; `backward`, of a forward that has already
    run; or `both`.
    """
    leaves, y = forms.of_case(case, device)
    ours = forms.ours(case.op, temperature=case.temperature)
    if passes == "forward":
        return torch.no_grad()(lambda: ours(*leaves, y))
    if passes == "both":
        return lambda: forms.step(ours, leaves, y)
    loss = ours(*leaves, y)
    return lambda: torch.autograd.grad(loss, leaves, retain_graph=True)


def run_once(run: Run) -> None:
    """What ncu watches: one pass after those that compile and fill caches."""
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def ncu_command(case: Case, passes: str, kernel: str | None, report: Path) -> list[str]:
    child = [sys.executable, "-m", "bench", "profile", case.op, "--once", "--passes", passes, "--dtype", case.dtype]
    child += ["--shape", *map(str, (case.n, case.k, case.d))]
    sections = [argument for section in SECTIONS for argument in ("--section", section)]
    selection = ["--kernel-name", f"regex:{kernel}"] if kernel else []
    # Names of kernels as their source has them; only what runs between the profiler's start and stop.
    options = ["--kernel-name-base", "function", "--profile-from-start", "off", "--force-overwrite"]
    return ["ncu", *options, *sections, *selection, "--export", str(report), *child]


def counters(case: Case, passes: str, kernel: str | None, folder: Path) -> str:
    """The report's page of details, from ncu; RuntimeError with its reason where it has none."""
    report = folder / "profile.ncu-rep"
    report.unlink(missing_ok=True)
    taken = subprocess.run(
        ncu_command(case, passes, kernel, report), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if taken.returncode or not report.exists():
        lines = (taken.stdout + taken.stderr).strip().splitlines() or [f"exit code {taken.returncode}"]
        # ncu's own complaints begin so; without one its last line says most, as when no kernel matched.
        raise RuntimeError(next((line for line in lines if line.startswith("==ERROR==")), lines[-1]))
    page = ["ncu", "--import", str(report), "--page", "details"]
    return subprocess.run(page, capture_output=True, text=True, check=True).stdout


def traced(run: Run, kernel: str | None, device: str, trace: Path) -> str:
    """A table of self times from torch.profiler; the course of a last pass goes to `trace`."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    for _ in range(WARM_UP):
        run()
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        for _ in range(REPEATS):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds, acc_events=True) as last:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    last.export_chrome_trace(str(trace))
    # An operator's device time is that of its kernels, which are there themselves.
    wanted, column = (
        (DeviceType.CUDA, "self_device_time_total") if device == "cuda" else (DeviceType.CPU, "self_cpu_time_total")
    )
    events = [event for event in profile.key_averages() if event.device_type == wanted and getattr(event, column) > 0]
    return table(
        [(event.key, event.count / REPEATS, getattr(event, column) / 1e3 / REPEATS) for event in events], kernel
    )


def table(rows: list[tuple[str, float, float]], kernel: str | None) -> str:
    """Of (name, calls a pass, self ms a pass): the longest first, with their shares of all, matching or not.

    Raises: UsageError when no name matches.
    """
    total = sum(ms for *_, ms in rows)
    rows = sorted(rows, key=lambda row: -row[2])
    chosen = [row for row in rows if kernel is None or re.search(kernel, row[0])][:MOST_ROWS]
    if not chosen:
        longest = ", ".join(name for name, *_ in rows[:MOST_ROWS])
        raise UsageError(f"--kernel must match a name, got {kernel}; the longest are {longest}")
    lines = [f"| of {total:.3g} ms a pass | calls | self ms | share |", "|---|---|---|---|"]
    lines += [f"| {name} | {calls:g} | {ms:.3g} | {ms / total:.1%} |" for name, calls, ms in chosen]
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=list(forms.EAGER), metavar="OP", help=", ".join(forms.EAGER))
    add_case_arguments(parser)
    parser.add_argument("--passes", choices=("forward", "backward", "both"), default="both")
    parser.add_argument("--kernel", type=pattern, metavar="REGEX", help="of those whose name it matches (default: all)")
    add_output(parser)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # the child that ncu watches


def pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text}: {error}") from None
    return text


def run(args: argparse.Namespace) -> int:
    device = record.this_device()
    case = case_of(args, args.op, device)
    if args.once:
        run_once(passes_of(case, args.passes, device))
        return 0
    folder = (args.output or new_folder(record.environment(device)["device"])).resolve()
    writable(folder / "profile.txt")
    summary = None
    if device == "cuda" and shutil.which("ncu"):
        try:
            summary, whole = counters(case, args.passes, args.kernel, folder), folder / "profile.ncu-rep"
        except RuntimeError as error:
            print(f"bench: ncu: {error}; torch.profiler instead", file=sys.stderr)
    if summary is None:
        whole = folder / "trace.json"
        summary = traced(passes_of(case, args.passes, device), args.kernel, device, whole)
    where = " ".join(f"{name} {value}" for name, value in record.environment(device).items() if value)
    title = f"{case.op} {case.n} x {case.k} x {case.d} {case.dtype}, {args.passes}; {where}"
    (folder / "profile.txt").write_text(f"{title}\n\n{summary}")
    print(title, summary, folder / "profile.txt", whole, sep="\n")
    return 0
