"""Ranks: started here through torch's elastic launcher, or joined where one such as torchrun set the environment."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hypercontrast._agreement import LostRankError, connected
from hypercontrast.config import Config, UsageError
from hypercontrast.distributed import leave_group
from hypercontrast.output import warn
from hypercontrast.progress import fail

T = TypeVar("T")


class RankError(RuntimeError):
    """A rank failed. The message is its own, `kind` the name of its exception ("" if it was killed), `trace` where."""

    def __init__(self, message: str, kind: str = "", trace: str = "") -> None:
        super().__init__(message)
        self.kind, self.trace = kind, trace


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop: `code` is what a shell makes of it, 130 for SIGINT and 143 for SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """The handler that stops at once."""
    raise Interrupted(number)


@contextmanager
def stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler`, in the main thread and where they are not ignored, as under nohup.

    Not in one rank of several: Python would call the handler only once the collective that it waits in is over.
    """
    changeable = threading.current_thread() is threading.main_thread() and not is_rank()
    numbers = (signal.SIGINT, signal.SIGTERM) if changeable else ()
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def agree(self, decide: Callable[[], T]) -> T:
        """What `decide` returns on rank 0, on every rank; what it raises there is raised everywhere."""
        if self.world == 1:
            return decide()
        outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.rank == 0:
            try:
                outcome = [(decide(), None)]
            except Exception as failure:  # the other ranks must hear of it, whatever it is
                outcome = [(None, failure)]
        dist.broadcast_object_list(outcome, device=self.device)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def share_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers: batch-norm statistics are each rank's own while training."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def is_rank() -> bool:
    """Whether a launcher has made this process one rank of several, or the only one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def num_ranks(config: Config) -> int:
    """How many train together: as many as a launcher has started, else as many as are asked for."""
    return int(os.environ["WORLD_SIZE"]) if is_rank() else config.ranks


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def check_hardware(config: Config) -> None:
    """Raise UsageError if this machine cannot start the ranks asked for."""
    available = torch.cuda.device_count()
    if config.gpus > available:
        raise UsageError(f"gpus must be at most {available}, the GPUs of this machine, got {config.gpus}")
    if config.ranks > 1 and not dist.is_available():
        raise UsageError(f"a run of {config.ranks} ranks needs a torch built with distributed")


def device_of(config: Config) -> torch.device:
    if config.cpu_ranks or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """This process's place among the ranks; without a launcher, the only one. Raises LostRankError."""
    device = device_of(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not is_rank():
        yield Ranks(0, 1, device)
        return
    if device.type == "cpu":
        threads = torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(threads, 1))
    backend = "nccl" if device.type == "cuda" else "gloo"
    with connected():
        dist.init_process_group(backend, timeout=timedelta(seconds=config.rank_timeout))
    try:
        with connected():
            yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    except LostRankError:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(0.5)  # the launcher tells of the first end it sees, which ought to be the lost rank's
            # It ends the others by SIGTERM, which a stopped one would not hear: 30 s later it would be killed.
            os.killpg(0, signal.SIGCONT)
        raise
    finally:
        leave_group()


def start_ranks(count: int, run: Callable[[T], object], argument: T) -> None:
    """Call `run(argument)` in `count` new processes and wait.

    Raises RankError if one fails, Interrupted on a signal to stop; none is left running.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",  # which it passes on; the ranks' end for SIGINT is SIGTERM as well
    )
    # The launcher would log the failing rank's traceback line by line; RankError carries it.
    logging.disable(logging.ERROR)
    try:
        with stop_signals(interrupt), _sigint_held_back_in_children():
            elastic_launch(settings, _run_rank)(run, argument)
    except SignalException as stop:
        raise Interrupted(stop.sigval) from None
    except ChildFailedError as error:
        raise _rank_error(*error.get_first_failure()) from None
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _sigint_held_back_in_children() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal: one that is still importing would answer with a traceback.

    A process inherits what the thread that starts it blocks. This one hears SIGINT all the same, through a thread that
    does not block it.
    """
    resource_tracker.ensure_running()  # first, for it unblocks SIGINT once it has started
    over = threading.Event()
    listener = threading.Thread(target=over.wait, daemon=True)
    listener.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()
        listener.join()


def _run_rank(run: Callable[[T], object], argument: T) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # torch's launcher ends it quietly from here on
    run(argument)


def fail_for(error: RankError, codes: Mapping[str, int]) -> int:
    """As if the rank's error were this process's own: its exit code by kind, a traceback where it was not foreseen."""
    if error.trace and error.kind not in codes:
        warn(error.trace)
    return fail(codes.get(error.kind, 1), str(error))


def _rank_error(rank: int, failure: Any) -> RankError:
    """From elastic's record of a failure: a dict where Python raised, plain text where a signal ended the process."""
    if not isinstance(failure.message, dict):
        return RankError(f"rank {rank} failed: {failure.message}")
    kind, _, message = failure.message["message"].partition(": ")
    return RankError(f"rank {rank}: {message}", kind, failure.message["extraInfo"]["py_callstack"])
