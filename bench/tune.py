"""Offline tuning: looks for better configurations of the kernels than those pinned in kernels/_launch.py.

Every cell of its tables (kernel, architecture, dtype, width) has candidates, see bench/candidates.py. Each is compiled
and ranked by evidence alone: registers, spills, shared memory, programs and warps a multiprocessor holds, FLOP for a
byte loaded. With a GPU, those that could be pinned are then checked against float64 and timed in turn with what is
pinned, on the shapes of the speed targets, in the pass (forward or backward) that the kernel is part of. And the
crossover is measured: narrow against wide kernels of half types, by width.

Cells come in order of importance, and each result is in tune.csv as soon as it is there, so a run may be stopped at any
time; runs with the same --output add to it. Nothing is pinned by itself: paste pins.txt into _launch.py and let
tests/test_aot.py compile it with all flags. Evidence ranks and does not predict: only times pin.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hypercontrast as hc
from bench import forms, verdict
from bench.arguments import at_least, new_folder, non_negative, writable
from bench.candidates import DTYPES, KERNELS, Cell, Evidence, cells, examine
from bench.measure import clock, interleaved, ratio, reason_of
from bench.record import append, environment
from hypercontrast.config import UsageError
from hypercontrast.kernels import _launch
from hypercontrast.kernels._launch import Config

CROSSOVER = "crossover"
KEEPING = "lse_fwd_tile"  # exponentials, which no other pass does here
KEPT_BYTES = 2**30
CROSSOVER_KERNELS = ("lse_fwd", "lse_bwd", "pair_triangle", "pair_bwd")
CROSSOVER_WIDTHS = (64, 96, 128, 192, 256)
SECONDS_A_CANDIDATE = 0.2
NOISE = 1.02  # a pin is worth changing past this speed-up

Run = Callable[[], Any]
Shape = tuple[int, int, int]  # samples, classes, width


@dataclass(frozen=True)
class Trial:
    """A candidate for a cell, what is known of it, and its times on one shape."""

    cell: Cell
    config: Config
    evidence: Evidence
    n: int | None = None
    k: int | None = None
    d: int | None = None
    ms: float | None = None
    today_ms: float | None = None  # of the pass as pinned (where nothing is: wide), in the same rounds
    speedup: float | None = None  # median over the rounds of their ratio
    error: float | None = None  # of loss and gradients against float64
    today_error: float | None = None

    @property
    def pinned(self) -> bool:
        return self.config == self.cell.pinned()

    def faulty(self, reason: str) -> Trial:
        return replace(self, evidence=replace(self.evidence, fault=reason))

    def line(self) -> dict[str, Any]:
        measured = {field.name: getattr(self, field.name) for field in fields(self)[3:]}
        return {
            **asdict(self.cell),
            **asdict(self.config),
            "pinned": self.pinned,
            **asdict(self.evidence),
            **{name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in measured.items()},
        }


class Table:
    """A CSV file that has every line as soon as it is known, after those of earlier runs."""

    def __init__(self, path: Path, device: str) -> None:
        where = {} if device == "cuda" else {"device": "rehearsal" if device else "none", "threads": None}
        self.path, self.environment = path, environment(device) | where

    def add(self, line: dict[str, Any]) -> None:
        append(self.path, line | self.environment)


# Evidence


def examined(cell: Cell, configs: Sequence[Config], pool: Executor, end: float) -> list[Trial]:
    """Those that were compiled by `end`, the best first. What spills is tried once more with all registers."""
    found, waiting = [], {pool.submit(examine, cell, config): config for config in configs}
    while waiting and (left := end - time.perf_counter()) > 0:
        done, _ = wait(waiting, left, FIRST_COMPLETED)
        for future in done:
            config, evidence = waiting.pop(future), future.result()
            found.append(Trial(cell, config, evidence))
            unlimited = replace(config, max_registers=255)
            if evidence.fault == "spills" and unlimited not in (config, *configs):
                waiting[pool.submit(examine, cell, unlimited)] = unlimited
    for future in waiting:
        future.cancel()
    return sorted(found, key=lambda trial: trial.evidence.rank)


def _without_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


# Times


def loss_of(cell: Cell) -> tuple[str, dict[str, Any]]:
    """The loss whose pass runs the cell's kernel: column sums crowd a tile, and so do log-sum-exps of positives."""
    if cell.kernel == KEEPING:
        return "nonl", {"anchor": "both" if cell.crowded else "prototype"}
    if cell.kernel.startswith("lse"):
        return ("normface" if cell.crowded else "nonl"), {}
    return "supcon", {"variant": "in" if cell.crowded or cell.kernel == "pair_fwd" else "out"}


def shapes(cell: Cell, rehearse: bool) -> list[Shape]:
    pairs, width = cell.kernel.startswith("pair"), cell.bucket
    if rehearse:
        return [(70, 20, width if cell.narrow else 300)]
    if cell.narrow:
        return [(65536, 1000, width), (8192, 100, width)] if pairs else [(65536, 1000, width)]
    if cell.bucket == "small":
        return [(512, 10, 512)] if pairs else [(256, 1000, 2048)]
    return [(8192, 100, 512)] if pairs else [(32768, 100_000, 512), (4096, 1000, 2048)]


def _keeping(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss with exponentials kept, whatever its size."""

    def kept(*arguments: Tensor) -> Tensor:
        hc.set_memory_budget(KEPT_BYTES)
        try:
            with mock.patch.multiple(_launch, KEEP_WIDTH=1, KEEP_FLOP=0):
                return loss(*arguments)
        finally:
            hc.set_memory_budget(0)

    return kept


class Pass:
    """The pass that runs a cell's kernel, to be timed and checked with one configuration or another."""

    def __init__(self, cell: Cell, device: str) -> None:
        self.cell, self.device = cell, device
        self.name, self.options = loss_of(cell)

    def loss(self, backend: str) -> Callable[..., Tensor]:
        loss = partial(getattr(hc, f"{self.name}_loss"), temperature=forms.TAU, backend=backend, **self.options)
        return _keeping(loss) if self.cell.kernel == KEEPING else loss

    def inputs(self, shape: Shape) -> tuple[tuple[Tensor, ...], Tensor]:
        return forms.inputs(self.name, *shape, device=self.device, dtype=DTYPES[self.cell.dtype])

    def run(self, shape: Shape) -> Run:
        leaves, y = self.inputs(shape)
        loss = self.loss("triton")
        if self.cell.backward:
            return partial(torch.autograd.grad, loss(*leaves, y), leaves, retain_graph=True)
        forward = partial(loss, *leaves, y)
        return forward if self.cell.kernel == KEEPING else torch.no_grad()(forward)  # kept for a backward alone

    def errors(self) -> Callable[[Config | None], float]:
        """Largest error of loss and gradients against float64, by configuration, on odd sizes."""
        width = self.cell.bucket - 8 if self.cell.narrow else 300
        leaves, y = self.inputs((333, 77, width) if self.device == "cuda" else (70, 20, width))
        want = forms.step(self.loss("reference"), [x.detach().double().requires_grad_() for x in leaves], y)

        def error(config: Config | None) -> float:
            return verdict.deviation(
                self.with_config(config, partial(forms.step, self.loss("triton"), leaves, y))(), want
            )

        return error

    def with_config(self, config: Config | None, run: Run) -> Run:
        def replaced() -> Any:
            with self.cell.replaced(config):
                return run()

        return replaced


def timed(trials: Sequence[Trial], device: str, table: Table, rehearse: bool, end: float) -> list[Trial]:
    """Trials of one cell with errors and times, the fastest first; those that `end` came before as they were."""
    cell = trials[0].cell
    work = Pass(cell, device)
    runs = {shape: work.run(shape) for shape in shapes(cell, rehearse)}
    errors = work.errors()
    today_error = errors(cell.pinned())
    bound = 2 * today_error + torch.finfo(DTYPES[cell.dtype]).eps
    found = []
    for trial in trials:
        mine = [trial]
        if not trial.evidence.fault and time.perf_counter() < end:
            try:
                error = errors(trial.config)
                mine = [replace(trial, error=error, today_error=today_error)]
                if error <= bound:
                    mine = [_timed(mine[0], work, shape, run, rehearse) for shape, run in runs.items()]
                else:  # NaN as well
                    mine = [mine[0].faulty(f"wrong: its error is past {bound:.1e}")]
            except Exception as error:  # whatever a launch raises: the next candidate may do
                mine = [trial.faulty(f"failed: {reason_of(error)}")]
                if device == "cuda":
                    torch.cuda.synchronize()  # raises where the device is lost, and that ends the run
        for line in mine:
            table.add(line.line())
        found += mine
    return sorted(found, key=lambda trial: -(trial.speedup or 0))


def _timed(trial: Trial, work: Pass, shape: Shape, run: Run, rehearse: bool) -> Trial:
    runs = {"today": run, "candidate": work.with_config(trial.config, run)}
    times = interleaved(runs, 0 if rehearse else SECONDS_A_CANDIDATE, clock(work.device))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return replace(
        trial,
        **dict(zip("nkd", shape, strict=True)),
        ms=medians["candidate"],
        today_ms=medians["today"],
        speedup=ratio(times["today"], times["candidate"]),
    )


def best(trials: Iterable[Trial]) -> tuple[Config, float] | None:
    """The configuration of a cell with the highest speed-up (geometric mean over the shapes), and that."""
    speedups: dict[Config, list[float]] = {}
    for trial in trials:
        if trial.speedup is not None and not trial.evidence.fault:
            speedups.setdefault(trial.config, []).append(trial.speedup)
    means = {config: statistics.geometric_mean(found) for config, found in speedups.items()}
    return max(means.items(), key=lambda item: item[1], default=None)


def crossover(
    dtype: str, architecture: int, device: str, pool: Executor, table: Table, rehearse: bool, end: float
) -> None:
    """Narrow against wide, by pass and width. Where no narrow one is pinned, the best by evidence stands in."""
    print("\n## Narrow against wide\n\n| kernel | d | narrow ms | wide ms | wide/narrow | narrow configuration |")
    print("|---|---|---|---|---|---|")
    for d in CROSSOVER_WIDTHS[-2:] if rehearse else CROSSOVER_WIDTHS:
        for kernel in CROSSOVER_KERNELS:
            cell = Cell(kernel, architecture, dtype, _launch.padded_width(d))
            config = cell.pinned()
            if config is None:
                trials = examined(cell, cell.candidates()[: 3 if rehearse else None], pool, end)
                config = next((trial.config for trial in trials if not trial.evidence.fault), None)
            if config is None or time.perf_counter() > end:
                continue
            work = Pass(cell, device)
            n, k, _ = shapes(cell, rehearse)[0]
            run = work.run((n, k, d))
            runs = {"narrow": work.with_config(config, run), "wide": work.with_config(None, run)}
            times = interleaved(runs, 0 if rehearse else SECONDS_A_CANDIDATE, clock(device))
            narrow, wide = (statistics.median(times[name]) for name in ("narrow", "wide"))
            over = ratio(times["wide"], times["narrow"])
            line = {"kernel": kernel, "dtype": dtype, "n": n, "k": k, "d": d, **asdict(config)}
            table.add({**line, "narrow_ms": narrow, "wide_ms": wide, "wide_over_narrow": over})
            print(f"| {kernel} | {d} | {narrow:.4g} | {wide:.4g} | {over:.2f} | {code(config)} |", flush=True)


# What is shown


def code(config: Config) -> str:
    """As it stands in _launch.py."""
    numbers = [str(x) for x in (config.block_r, config.block_c, config.block_d, config.num_warps, config.num_stages)]
    limit = [f"max_registers={config.max_registers}"] if config.max_registers else []
    return f"Config({', '.join(numbers + limit)})"


def title(cell: Cell) -> str:
    return f"{cell.kernel}: {cell.table}[{cell.architecture}][{cell.key}], {cell.dtype}"


def markdown(trials: Sequence[Trial]) -> str:
    """The first five, and what is pinned."""
    lines = [
        "| configuration | registers | spills | shared KiB | programs | warps | wgmma | FLOP/byte | score | ms "
        "| x today | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for trial in [trial for place, trial in enumerate(trials) if place < 5 or trial.pinned]:
        e = trial.evidence
        shared = None if e.shared is None else f"{e.shared / 1024:.0f}"
        speedup = None if trial.speedup is None else f"{trial.speedup:.2f}"
        note = ", ".join(filter(None, ("pinned" * trial.pinned, e.fault)))
        values = (
            code(trial.config), e.registers, e.spills, shared, e.programs, e.warps, e.wgmma,
            e.flop_per_byte, e.score, trial.ms, speedup, note,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(_shown, values))} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def pin(cell: Cell, trials: Sequence[Trial]) -> str:
    """The line of _launch.py that the times ask for, or none where what is pinned is as good."""
    found = best(trials)
    if found is None or found[0] == cell.pinned() or found[1] < NOISE:
        return ""
    config, speedup = found
    return f"{cell.table}[{cell.architecture}]:\n    {cell.key}: {code(config)},  # {speedup:.2f} times as fast\n"


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", nargs="+", choices=[*KERNELS, CROSSOVER], default=[*KERNELS, CROSSOVER])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument(
        "--width", nargs="+", type=at_least(1), default=[], help="cells that these widths meet (default: all)"
    )
    parser.add_argument(
        "--arch",
        type=int,
        choices=_launch.ARCHITECTURES,
        help="what to compile for (default: the GPU's, without one 90)",
    )
    parser.add_argument("--compile-only", action="store_true", help="evidence alone, even with a GPU")
    parser.add_argument("--rehearse", action="store_true", help="times on the CPU: tiny float16 shapes, few candidates")
    parser.add_argument("--seconds", type=non_negative, default=600, help="when to stop (default: 600)")
    parser.add_argument("--output", type=Path, help="folder to add to (default: a new one, bench/results/DATE-tune)")


def run(args: argparse.Namespace) -> int:
    end = time.perf_counter() + args.seconds
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    device = "cpu" if args.rehearse else "cuda" if torch.cuda.is_available() and not args.compile_only else ""
    own = _launch.architecture(torch.device(device or "cpu"))
    architecture, dtype = args.arch or own, "float16" if args.rehearse else args.dtype
    chosen = cells(args.kernel, dtype, args.width, architecture)
    if device and architecture != own:
        raise UsageError(f"--arch must be {own} to time on this device, got {architecture}; or add --compile-only")
    crosses = device and CROSSOVER in args.kernel and dtype != "float32"  # times, of kernels that float32 has not
    if not chosen and not crosses:
        raise UsageError(f"no table has a cell for --kernel {' '.join(args.kernel)}, {dtype}, --width {args.width}")
    folder = args.output or new_folder("tune", "bench/results")
    table, pins = Table(writable(folder / "tune.csv"), device), []
    budget = hc.memory_budget()
    hc.set_memory_budget(0)  # what is kept from the forward is no part of a kernel's time
    context = multiprocessing.get_context("spawn")  # a fork would inherit the interpreter, and CUDA
    try:
        with ProcessPoolExecutor(torch.get_num_threads(), context, _without_interpreter) as pool:
            for cell in chosen:
                trials = examined(cell, cell.candidates()[: 3 if args.rehearse else None], pool, end)
                if not trials:
                    print(f"out of time before {title(cell)}", flush=True)
                    break
                if device:
                    trials = timed(trials, device, table, args.rehearse, end)
                    pins.append(pin(cell, trials))
                    with (folder / "pins.txt").open("a") as file:
                        file.write(pins[-1])
                else:
                    for trial in trials:
                        table.add(trial.line())
                print(f"\n## {title(cell)}\n\n{markdown(trials)}", flush=True)
            if crosses:
                widths = Table(folder / "crossover.csv", device)
                crossover(dtype, architecture, device, pool, widths, args.rehearse, end)
    finally:
        hc.set_memory_budget(budget)
    print(f"\nresults in {folder}" + ("" if device else ": compiled and ranked, nothing was timed"))
    if any(pins):
        title_ = "A rehearsal, no advice" if args.rehearse else "To be pinned in hypercontrast/kernels/_launch.py"
        print(f"\n{title_}:\n" + "".join(pins))
    return 0
