"""One case, every form of it, measured alike on a CPU and a GPU: `measure` gives a row a form.

time      All forms run in one process on the same inputs, in turn (A B C B C A ...), so that ratios within a round
          hold on a noisy machine; a row has the median, 20th and 80th percentile. On a CPU by the clock; on a GPU
          by events, the device's own time: it waits first, so that the host has issued the whole step by the time
          it begins, and then empties its L2 cache. What only the host takes is no part of it, but of `host_ms`.
host      On a GPU the milliseconds until a step's last launch is issued, by the clock: where they are more than the
          device's, eager training waits for Python, not for the kernels. A form that waits for the device counts that.
memory    On a CPU the kernel's high-water mark of a fresh process (Linux), whose address space ends where free
          memory does: what does not fit is out of memory, and not timed. On a GPU the allocator's peak.
error     Against float64 at the size of `verdict.reduced`, on the same rounded inputs, with the memory budget
          reduced alike, so that exponentials are kept or recomputed as they are at full size.
verdict   The eager forms set the bound (`verdict.judge`); any other is wrong past it. At full size, which float64
          cannot do, its first step is compared with the yardstick's, where that fits (`verdict.differs`).
graph     CUDA graphs of forward and backward, and of the forward alone without gradients, where a step takes less
          than GRAPH_MS: only there do they matter.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hypercontrast as hc
from bench import forms, peers, verdict
from bench.peers import OURS, Absent, Form
from bench.record import Case, Row, environment

LEAST_ROUNDS = 3
GRAPH_MS = 10.0
HOST_REPEATS = 5
LONGEST_WAIT_MS = 20.0
CYCLES_A_MS = 2_000_000  # of the fastest GPU clocks; a slower one waits longer, which is as good
MIB = 2**20
SPARE = 0.9  # of the free memory may be asked for
PRODUCTS = ("products", "")  # the run that is no form's

Run = Callable[[], Any]
Fields = dict[str, Any]


def measure(
    case: Case, candidates: Mapping[str, Form | Absent], device: str, seconds: float, memory: bool = True
) -> list[Row]:
    """A row for each candidate, in their order, after rounds of at least `seconds`.

    `memory=False` leaves out a CPU's fresh processes, which would not see a form that is not one of `peers.candidates`.
    """
    # Set by either of torch's two switches, of which the older raises when it is read after the newer was set.
    allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    try:
        work = _Forms(candidates)
        judged = _judge(case, work, device)
        if device == "cpu" and memory and sys.platform == "linux":
            work.each(lambda name, form: in_fresh_process(peak_of_step, case, name))
        leaves, y = forms.of_case(case, device)
        runs: dict[tuple[str, str], Run] = {}
        timer = clock(device)
        beside = partial(_beside, case, leaves, y, judged, [])
        work.each(lambda name, form: _prepare(name, form, leaves, y, runs, timer, beside))
        if work.alive:
            times = interleaved({PRODUCTS: forms.products(case.op, leaves, y), **runs}, seconds, timer)
            add_times(work.fields, times)
            _add_rates(2e-9 * case.n * len(forms.columns(case.op, leaves, y)) * case.d, work.fields, times)
        return [row(case, name, device, fields) for name, fields in work.fields.items()]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32


def row(case: Case, form: str, device: str, fields: Fields) -> Row:
    """Numbers to four digits: more would be noise."""
    short = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in fields.items()}
    return Row(form=form, **case._asdict(), **short, **environment(device))


class _Forms:
    """The forms of a case: what is known of each, and which are still running."""

    def __init__(self, candidates: Mapping[str, Form | Absent]) -> None:
        self.fields: dict[str, Fields] = {name: {} for name in candidates}
        self.alive: dict[str, Form] = {}
        for name, form in candidates.items():
            if isinstance(form, Absent):
                self.fields[name] |= {"status": "absent", "reason": form.reason}
            else:
                self.alive[name] = form

    def each(self, work: Callable[[str, Form], Fields]) -> None:
        """Let every form that runs add its fields; one that raises stops there, with the reason."""
        for name, form in list(self.alive.items()):
            try:
                self.fields[name] |= work(name, form)
            except Exception as error:  # a peer may raise anything, and the other forms go on
                self.fields[name] |= {"status": status_of(error), "reason": reason_of(error)}
                del self.alive[name]
            if name not in self.alive and torch.cuda.is_available():
                torch.cuda.empty_cache()  # here, as the error held on to what its frames held


def status_of(error: Exception) -> str:
    """CPU allocators have no exception of their own."""
    full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
    return "out of memory" if full else "failed"


def reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# Errors


def _judge(case: Case, work: _Forms, device: str) -> dict[str, verdict.Judged]:
    """Errors of every form, and which are wrong."""
    steps: dict[str, list[Tensor]] = {}

    def one(name: str, form: Form) -> Fields:
        steps[name] = forms.step(form, leaves, y)
        return {}

    with reduced_inputs(case, device) as (small, leaves, y):
        work.each(one)
    judged = verdict.judge(small, leaves, y, steps)
    for name, found in judged.items():
        work.fields[name] |= {"error": found.error, "tangential_error": found.tangential_error}
        if found.reason:
            work.fields[name] |= {"status": "wrong", "reason": found.reason}
    return judged


@contextmanager
def reduced_inputs(case: Case, device: str) -> Iterator[tuple[Case, tuple[Tensor, ...], Tensor]]:
    """The case of `verdict.reduced` and its inputs, while the memory budget is as much smaller as the logits are."""
    small, budget = verdict.reduced(case), hc.memory_budget()
    hc.set_memory_budget(budget * verdict.logits(small) // verdict.logits(case))
    try:
        yield small, *forms.of_case(small, device)
    finally:
        hc.set_memory_budget(budget)


def _beside(
    case: Case, leaves: Sequence[Tensor], y: Tensor, judged: Mapping[str, verdict.Judged], yardstick: list[Tensor],
    name: str, first: Sequence[Tensor],
) -> Fields:  # fmt: skip
    """Whether a form is wrong: at the reduced size, or else at full size, beside the `yardstick`'s first step, which
    stays there for the others. Eager forms come before all others, so those are never compared.
    """
    reason = judged[name].reason
    if name == forms.yardstick(case.op):
        yardstick += first
    elif yardstick and not reason:
        reason = verdict.differs(case, leaves, y, judged[name].apart, first, yardstick)
    return {"status": "wrong", "reason": reason} if reason else {}


# Time


def interleaved(
    runs: Mapping[Any, Run], seconds: float, clock: Callable[[Run], float], least: int = LEAST_ROUNDS
) -> dict[Any, list[float]]:
    """Milliseconds of each run, round by round: A B C B C A C A B, for `seconds` and a `least` number of rounds.

    None always comes after the same other, whose caches and clocks it would have. All ranks have the same order.
    """
    found: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    turn, end, rounds = list(runs), time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < end:
        for name in turn:
            found[name].append(clock(runs[name]))
        turn = turn[1:] + turn[:1]
        rounds += 1
    return found


def clock(device: str) -> Callable[[Run], float]:
    return _DeviceClock() if device == "cuda" else _wall_clock


def _wall_clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class _DeviceClock:
    """Milliseconds of the device alone, whose host issues the run during a wait twice as long as that takes it."""

    def __init__(self, device: str = "cuda") -> None:
        self.cache = torch.empty(256 * MIB, dtype=torch.int8, device=device)  # several times any L2
        self._host_ms: dict[Run, float] = {}

    def __call__(self, run: Run) -> float:
        wait = min(2 * self.host_ms(run), LONGEST_WAIT_MS)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(wait * CYCLES_A_MS))
        self.cache.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def host_ms(self, run: Run) -> float:
        """Median milliseconds of issuing a run to an idle device, measured where a run is first met."""
        if run not in self._host_ms:
            self._host_ms[run] = statistics.median(_issued(run) for _ in range(HOST_REPEATS))
        return self._host_ms[run]


def _issued(run: Run) -> float:
    torch.cuda.synchronize()
    return _wall_clock(run)


def _prepare(
    name: str, form: Form, leaves: Sequence[Tensor], y: Tensor, runs: dict, timer: Callable[[Run], float],
    beside: Callable[[str, Sequence[Tensor]], Fields],
) -> Fields:  # fmt: skip
    """What needs no rounds of a form at full size; what does goes to `runs`."""
    run, forward = partial(forms.step, form, leaves, y), partial(_forward, form, leaves, y)
    first = run()  # compiles, tunes, fills caches
    again = run()
    fields: Fields = {
        "repeats": all(torch.equal(bits(a), bits(b)) for a, b in zip(first, again, strict=True)),
        "outputs_mib": sum(x.numel() * x.itemsize for x in first) / MIB,
    }
    wrong = beside(name, first)
    del first, again
    mine: dict[tuple[str, str], Run] = {(name, "fwd_bwd"): run, (name, "fwd"): forward}
    if isinstance(timer, _DeviceClock):
        fields |= _scratch(run, fields["outputs_mib"]) | _launches(form, leaves, y) | {"host_ms": timer.host_ms(run)}
        if timer(run) < GRAPH_MS:
            try:
                mine |= {(name, "graph"): captured(run), (name, "graph_fwd"): captured(forward)}
            except Exception as error:  # a form that waits for the device cannot be captured: that is a finding
                fields["reason"] = f"not captured: {reason_of(error)}"
    runs |= mine
    return fields | wrong


def bits(x: Tensor) -> Tensor:
    """The bytes of x: what compares equal where a NaN is a NaN both times."""
    return x.reshape(-1).view(torch.uint8)


@torch.no_grad()
def _forward(form: Form, leaves: Sequence[Tensor], y: Tensor) -> Tensor:
    return form(*leaves, y)


def add_times(fields: dict[str, Fields], times: dict[tuple[str, str], list[float]]) -> None:
    """Median and percentiles of each form, and the ratio of its times to ours, unless ours is wrong."""
    right = "status" not in fields.get(OURS, {})
    for (name, what), found in times.items():
        if what.startswith("graph"):
            fields[name][f"{what}_ms"] = statistics.median(found)
        elif what:
            low, *_, high = statistics.quantiles(found, n=5, method="inclusive")
            median = statistics.median(found)
            fields[name] |= {f"{what}_ms": median, f"{what}_p20": low, f"{what}_p80": high, "rounds": len(found)}
            if right and (OURS, what) in times:
                fields[name][f"{what}_ratio"] = ratio(found, times[OURS, what])


def _add_rates(gflop: float, fields: dict[str, Fields], times: dict[tuple[str, str], list[float]]) -> None:
    """Of a forward that takes `gflop`."""
    for name, what in times:
        mine = fields.get(name, {})
        if what == "fwd":
            mine["tflops_fwd"] = gflop / mine["fwd_ms"]
        elif what == "fwd_bwd":
            mine["tflops"] = 3 * gflop / mine["fwd_bwd_ms"]
            mine["matmul_share"] = ratio(times[PRODUCTS], times[name, what])


def ratio(those: Sequence[float], these: Sequence[float]) -> float:
    """Median over the rounds of those times over these."""
    return statistics.median(a / b for a, b in zip(those, these, strict=True))


# On a GPU


def _scratch(run: Run, outputs_mib: float) -> Fields:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return {"scratch_mib": (torch.cuda.max_memory_allocated() - before) / MIB - outputs_mib}


def _launches(form: Form, leaves: Sequence[Tensor], y: Tensor) -> Fields:
    """Kernels, copies and fills of a forward and of a backward, without the one that fills in a gradient of one."""
    one = torch.ones((), device="cuda")
    with _watched() as forward:
        loss = form(*leaves, y)
    with _watched() as backward:
        torch.autograd.grad(loss, leaves, one.to(loss.dtype))
    return {"launches": _on_device(forward), "launches_bwd": _on_device(backward)}


def _watched() -> torch.profiler.profile:
    torch.cuda.synchronize()
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def _on_device(profile: torch.profiler.profile) -> int:
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def captured(run: Run) -> Run:
    """`run` as a CUDA graph, to be replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up outside the caller's stream, as capturing wants it
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# On a CPU: a process of its own


def in_fresh_process(work: Callable, *args: Any) -> Any:
    """work(*args) in a process that has done nothing before, with this one's threads and memory budget.

    It is forked from a server that has only imported torch. What it raises is raised here. If it is killed, as Linux
    does where memory ends, that is out of memory; any other death is a fault.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.measure"])
    here, there = context.Pipe(duplex=False)
    settings = (torch.get_num_threads(), hc.memory_budget())
    process = context.Process(target=_answer, args=(there, settings, work, args))
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        process.join()
        kind = MemoryError if process.exitcode == -signal.SIGKILL else RuntimeError
        raise kind(f"its process ended with code {process.exitcode}") from None
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _answer(there: Any, settings: tuple[int, int], work: Callable, args: tuple) -> None:
    threads, budget = settings
    torch.set_num_threads(threads)
    hc.set_memory_budget(budget)
    try:
        answer = work(*args)
    except MemoryError as error:
        answer = error
    except Exception as error:  # of whatever type: it may not survive the pipe
        answer = RuntimeError(reason_of(error))
    there.send(answer)


def peak_of_step(case: Case, name: str) -> Fields:
    """Peak resident memory of one step beyond its inputs, apart from loss and gradients. Linux, in a fresh process."""
    import resource

    form = peers.candidates(case, "cpu", [name])[name]
    leaves, y = forms.of_case(case, "cpu")
    free = _kib("/proc/meminfo", "MemAvailable")
    limit = int((_kib("/proc/self/status", "VmSize") + SPARE * free) * 1024)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        forms.step(form, leaves, y)  # what is allocated once, by libraries and compilers
    except Exception as error:
        if status_of(error) == "out of memory":
            raise MemoryError(f"needs more than the {free / MIB:.0f} GiB that are free") from None
        raise
    hc.set_memory_budget(hc.memory_budget())  # which gives back what a step leaves for the next
    ctypes.CDLL(None).malloc_trim(0)  # freed memory leaves the process, or it would be found again for nothing
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _kib("/proc/self/status", "VmRSS")
    outputs = forms.step(form, leaves, y)
    peak = (_kib("/proc/self/status", "VmHWM") - before) / 1024
    outputs_mib = sum(x.numel() * x.itemsize for x in outputs) / MIB
    return {"outputs_mib": outputs_mib, "scratch_mib": max(0.0, peak - outputs_mib)}


def _kib(file: str, field: str) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
