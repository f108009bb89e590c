"""Does a loss give the exact gradient of the global batch under DDP? Tried, not argued: ranks are started and compared.

The same small program runs twice on the same float64 batch: as one process with all of it, and as several ranks with a
part each, their gradients averaged by DistributedDataParallel. Parts hold different classes, so a loss that forgets
other ranks' samples shows; a second round has parts of unequal size, so one that averages the ranks' averages shows.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hypercontrast._checks import LONGEST_WAIT, check_integer, check_number
from hypercontrast.distributed import leave_group

__all__ = ["DDPVerdict", "check_ddp"]

_KINDS = ("exact", "scaled", "wrong")  # from good to bad
_ALIGNED = 1 - 1e-9  # a cosine above it is the right direction; a loss that computes in float32 still passes
_SCALE_TOLERANCE = 1e-5
_ROUNDS = 2  # equal batches, then unequal ones
_GRACE = 3.0  # seconds in which other ranks may still say what they saw of a failure


@dataclass(frozen=True)
class DDPVerdict:
    """How DDP's averaged gradient compares with that of one process which has the whole batch.

    True if exact, so `assert check_ddp(loss)` reads as it means; `print` it for the figures.

    Attributes:
        kind: "exact"; "scaled", right direction, wrong length; or "wrong", another direction.
        scale: component along the true gradient, in units of it: 1 when exact.
        cosine: of the angle with the true gradient.
        relative_error: norm of the difference over norm of the true gradient.
        losses: what each rank's loss says.
        whole_loss: what one process says.
        note: what the round that did not decide showed, if it differs.
    """

    kind: str
    scale: float
    cosine: float
    relative_error: float
    losses: tuple[float, ...]
    whole_loss: float
    note: str = ""

    def __bool__(self) -> bool:
        return self.kind == "exact"

    @property
    def loss_agrees(self) -> bool:
        """Whether every rank reports the loss of the whole batch."""
        return all(math.isclose(loss, self.whole_loss, rel_tol=1e-6, abs_tol=1e-9) for loss in self.losses)

    def __str__(self) -> str:
        meaning = {
            "exact": f"DDP on {len(self.losses)} ranks gives the gradient of the whole batch",
            "scaled": f"right direction, but {self.scale:.6g} times the gradient of the whole batch",
            "wrong": "not the direction of the whole batch's gradient",
        }[self.kind]
        if self.loss_agrees:
            value = f"the loss is {self.whole_loss:.6g} on every rank, as in one process"
        else:
            ranks = ", ".join(f"{loss:.6g}" for loss in self.losses)
            value = f"the loss is {ranks} on the ranks, {self.whole_loss:.6g} in one process"
        figures = f"relative error {self.relative_error:.2g}, cosine {self.cosine:.6f}"
        return "; ".join(filter(None, (f"{self.kind}: {meaning} ({figures})", value, self.note)))


@dataclass(frozen=True)
class _Problem:
    """What every process needs to know of the comparison."""

    payload: bytes  # the loss, pickled; every round takes a fresh copy
    world_size: int
    dim: int
    num_classes: int
    timeout: float

    def batch_sizes(self) -> tuple[list[int], list[int]]:
        """Samples on each rank: equal in the first round, unequal in the second. Even, for labels come in twos."""
        ranks = range(self.world_size)
        return [8 for _ in ranks], [6 + 4 * rank for rank in ranks]

    def batch(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """features [Σ sizes, dim] and labels of the whole batch; rank r's classes start at class r."""
        g = torch.Generator().manual_seed(0)
        # Short, so that a loss which does not normalise is not saturated; off-centre by rank, so that ranks differ.
        features = [torch.randn(n, self.dim, generator=g, dtype=torch.float64) + 0.5 * r for r, n in enumerate(sizes)]
        labels = [(torch.arange(n) // 2 + r) % self.num_classes for r, n in enumerate(sizes)]
        return torch.cat(features) / self.dim**0.5, torch.cat(labels)


@dataclass(frozen=True)
class _Round:
    loss: float
    gradient: list[float]


@dataclass(frozen=True)
class _Failure:
    when: float
    what: str


def check_ddp(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    world_size: int = 2,
    *,
    dim: int = 8,
    num_classes: int = 4,
    timeout: float = 60.0,
) -> DDPVerdict:
    """Tell whether `loss_fn`, any loss, gives the exact gradient of the global batch under DDP.

    Starts `world_size` ranks on this machine's CPU over Gloo, and one process alone. Compared are the gradients of a
    small linear layer below the loss and of the loss's own parameters, in float64, on batches of which each rank holds
    its own mix of classes: once equally many samples a rank, once not. The verdict is that of the worse round::

        class MyLoss(nn.Module):  # at the top level of a module
            def forward(self, features, labels): ...

        if __name__ == "__main__":  # in a script: the ranks import it too
            print(hc.check_ddp(MyLoss()))

    Args:
        loss_fn: function or module, (features [n, dim] float64, labels [n] int64 in [0, num_classes)) → scalar. Samples
            2i and 2i + 1 have the same label. It is pickled to reach the ranks; a module's parameters become float64.
            The process alone has no process group: what the loss gives there is the truth.
        world_size: number of ranks, at least 2.
        dim, num_classes: shape of the problem, for losses that hold prototypes.
        timeout: seconds in which all ranks must have finished, their start (a few seconds) included.

    Returns:
        `DDPVerdict` of kind "exact" (the only one that is true), "scaled" (right direction, off by the factor `scale`)
        or "wrong" (another direction). A loss that fails on unequal batches alone is judged on equal ones; `note` has
        the failure.

    Raises:
        TypeError, ValueError: on a bad argument, such as a loss that cannot be pickled.
        RuntimeError: if a rank raises, dies or does not finish in time; it names the rank and carries its message.
    """
    for name, value, least in (("world_size", world_size, 2), ("dim", dim, 1), ("num_classes", num_classes, 1)):
        check_integer(name, value, least)
    check_number("timeout", timeout, "a number of seconds")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be positive and finite, got {timeout}")
    if timeout > LONGEST_WAIT:
        raise ValueError(f"timeout must be at most {LONGEST_WAIT} seconds, got {timeout}")

    (alone, *ranks), failure = _run(_Problem(_pickled(loss_fn), world_size, dim, num_classes, timeout))
    verdicts = [_compare(whole, rounds) for whole, *rounds in zip(alone, *ranks, strict=False)]
    if not verdicts:
        raise RuntimeError(f"loss_fn failed: {failure}")
    if len(verdicts) < _ROUNDS:
        return replace(verdicts[0], note=f"on unequal batches it fails: {failure}")
    equal, unequal = verdicts
    if unequal.kind == equal.kind:
        return unequal
    if _KINDS.index(unequal.kind) > _KINDS.index(equal.kind):
        return replace(unequal, note=f"on equal batches it is {equal.kind}")
    return replace(equal, note=f"on unequal batches it is {unequal.kind}")


def _pickled(loss_fn: object) -> bytes:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function or a module, got {type(loss_fn).__name__}")
    try:
        return pickle.dumps(loss_fn)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"loss_fn must be picklable to reach the ranks (defined at the top level of a module, neither a lambda nor "
            f"a local function), got {loss_fn!r}: {error}"
        ) from None


def _compare(whole: _Round, rounds: Sequence[_Round]) -> DDPVerdict:
    want, got = (torch.tensor(r.gradient, dtype=torch.float64) for r in (whole, rounds[0]))
    length = want.norm().item()
    if length == 0:
        raise ValueError("loss_fn must have a gradient, got zero everywhere on the whole batch")
    if not math.isfinite(length):
        raise ValueError(f"loss_fn must have a finite gradient, got one of length {length} on the whole batch")
    scale = (got @ want).item() / length**2
    cosine = scale * length / got.norm().item() if got.any() else 0.0
    length_off = abs(scale - 1) > _SCALE_TOLERANCE
    kind = ("scaled" if length_off else "exact") if cosine > _ALIGNED else "wrong"  # NaN is wrong
    error = (got - want).norm().item() / length
    return DDPVerdict(kind, scale, cosine, error, tuple(r.loss for r in rounds), whole.loss)


def _run(problem: _Problem) -> tuple[list[list[_Round]], str]:
    """Each process's rounds, those of the one alone first, and what went wrong first ("" if nothing did)."""
    deadline = time.monotonic() + problem.timeout
    processes: list[_Process] = []
    with tempfile.TemporaryDirectory(prefix="check_ddp_") as folder:
        try:
            for rank, world in ((0, 1), *((rank, problem.world_size) for rank in range(problem.world_size))):
                processes.append(_Process(rank, world, folder, problem))
            unfinished = _listen(processes, deadline)
        finally:
            for process in processes:
                process.stop()
    failures = [(p.failure.when, f"{p.name}: {p.failure.what}") for p in processes if p.failure]
    if not failures and unfinished:
        failures = [(deadline, f"{', '.join(p.name for p in unfinished)}: not finished in {problem.timeout:g} s")]
    return [process.rounds for process in processes], min(failures)[1] if failures else ""


def _listen(processes: Sequence[_Process], deadline: float) -> list[_Process]:
    """Take reports until every process has ended or time is up; return those that have not ended."""
    running = list(processes)
    while running and (ready := connection.wait([p.pipe for p in running], max(0.0, deadline - time.monotonic()))):
        running = [p for p in running if p.pipe not in ready or p.listen()]
        if any(p.failure for p in processes):
            deadline = min(deadline, time.monotonic() + _GRACE)
    return running


class _Process:
    """A started process as its parent sees it, and what it has reported."""

    def __init__(self, rank: int, world: int, folder: str, problem: _Problem) -> None:
        self.name = f"rank {rank}" if world > 1 else "the process alone"
        self.rounds: list[_Round] = []
        self.failure: _Failure | None = None
        self._stderr = Path(folder, f"stderr-{world}-{rank}")
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe(duplex=False)
        store = str(Path(folder, f"store-{world}"))
        arguments = (theirs, rank, world, store, str(self._stderr), problem)
        self._process = context.Process(target=_rank_main, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # the pipe then ends with the process

    def listen(self) -> bool:
        """Take one report; False once there will be no more."""
        try:
            report = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(_GRACE)
            if len(self.rounds) < _ROUNDS and not self.failure:
                # What other ranks say of a death follows from it, even if they say it first.
                self.failure = _Failure(-math.inf, self._death(self._process.exitcode or 0))
            return False
        if isinstance(report, _Failure):
            self.failure = report
        else:
            self.rounds.append(report)
        return True

    def _death(self, code: int) -> str:
        if not self._stderr.exists():
            return (
                "it ended while starting, with the reason on standard error; a script must call check_ddp under "
                "`if __name__ == '__main__':`, for the ranks import the script"
            )
        how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
        said = self._stderr.read_text(errors="replace").split("\n")
        return ": ".join((how, *[line.strip() for line in said if line.strip()][-1:]))

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _rank_main(pipe: connection.Connection, rank: int, world: int, store: str, stderr: str, problem: _Problem) -> None:
    """What a started process does: report each round, or why there is none."""
    # Gloo gives the reason of an abort on standard error and nowhere else.
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
    torch.set_num_threads(1)
    if world > 1:
        timeout = timedelta(seconds=problem.timeout)
        dist.init_process_group("gloo", None, timeout, world, rank, store=dist.FileStore(store, world))
    try:
        for sizes in problem.batch_sizes():
            features, labels = problem.batch(sizes)
            if world > 1:
                features, labels = features.split(sizes)[rank], labels.split(sizes)[rank]
            pipe.send(_round(pickle.loads(problem.payload), features, labels))
    except Exception as error:  # the parent must hear of it, whatever it is
        pipe.send(_Failure(time.monotonic(), f"{type(error).__name__}: {error}"))
    finally:
        if world > 1:
            leave_group()


class _Step(nn.Module):
    """A layer below the loss: one module for DDP to wrap."""

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor], dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, dim)
        self.loss_fn = loss_fn

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss_fn(self.layer(x), labels)


def _round(loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor) -> _Round:
    torch.manual_seed(0)
    step: nn.Module = _Step(loss_fn, x.shape[1]).double()
    if dist.is_initialized():
        # A loss may leave a parameter of its own unused in some batch; DDP must then still average the others.
        step = DistributedDataParallel(step, find_unused_parameters=True)
    loss = step(x, labels)
    if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad):
        got = f"{list(loss.shape)}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(f"loss_fn must return a scalar that depends on features, got {got}")
    loss.backward()
    parameters = [p for p in step.parameters() if p.requires_grad]
    gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    return _Round(loss.item(), gradient.tolist())
