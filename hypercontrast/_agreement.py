"""Ranks agree on a call before its data moves, and a rank that is lost ends the call with one sentence.

A backend does neither. Gloo aborts the process where sizes differ, takes bfloat16 for float16 without a word, and tells
of a lost rank in the words of its sockets; NCCL waits.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HEADER = 512  # bytes that say what call a rank makes; longer words are cut
REFUSED = "!"  # begins the words of a rank that cannot make its call
WAITED_FOR = 256  # words on a GPU, each kept there

_sent: dict[tuple[str, str], Tensor] = {}  # headers on a GPU, by group and words
_calls = 0


class LostRankError(RuntimeError):
    """Another rank ended, or does not answer. One sentence: this rank, what failed, at which call or step."""


@contextmanager
def connected(where: str = "") -> Iterator[None]:
    """Turn what a backend says of a lost rank into a LostRankError; `where` is put before it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRankError):
            said = str(error)
        elif _is_of_backend(error):
            said = _sentence(str(error))
        else:
            raise
        raise LostRankError(f"{where}: {said}" if where else said) from None


def _is_of_backend(error: RuntimeError) -> bool:
    words = str(error)
    return isinstance(error, dist.DistError) or "gloo/" in words or "Application timeout" in words


def _sentence(words: str) -> str:
    waited = re.search(r"(\d+) ?ms|Timeout\(ms\)=(\d+)", words)
    if waited or "timeout" in words.lower():
        what = "had no answer from another rank" + (f" for {int(waited[1] or waited[2]) / 1000:g} s" if waited else "")
    else:
        what = "lost the connection to another rank"
    who = f"rank {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "this rank"
    return f"{who} {what}" + (f" at its call {_calls} to hypercontrast" if _calls else "")


def agree(describe: Callable[[], str], group: dist.ProcessGroup, like: Any) -> None:
    """Let every rank check its own call and compare the calls of all: one small collective of fixed size.

    A rank that `describe` raises on raises just that, the others a ValueError that quotes it; where the words differ,
    every rank raises ValueError. No rank is then ahead of another, so the next call finds them in step.

    The collective runs where `like` lives. On a GPU the host waits for it only where the words are new to this rank,
    and no longer once it has met many (a temperature on a schedule has new ones every step); else another rank's error
    is raised by a later call.
    """
    if torch.compiler.is_compiling():  # strings are no part of a graph: compiled calls are not compared
        return
    world = len(ranks_of(group))
    global _calls
    _calls += 1
    error: Exception | None = None
    try:
        words = describe()
    except Exception as refusal:  # whatever it is, the other ranks wait to hear of it
        words, error = f"{REFUSED}{type(refusal).__name__}: {refusal}", refusal
    device = _carried(like, group)
    known = _sent.get((group.group_name, words))
    mine = _on(device, _encoded(words)) if known is None else known
    told = mine.new_empty(world * HEADER)
    with connected():
        dist.all_gather_into_tensor(told, mine, group=group)
    if error is not None:
        raise error
    told = told.view(-1, HEADER)
    if device.type == "cpu":
        _compare(told)
    elif known is None and len(_sent) < WAITED_FOR and not torch.cuda.is_current_stream_capturing():
        _sent[group.group_name, words] = mine
        _compare(told.cpu())
    else:
        _watch.check_arrived()
        _watch.send(told, _compare)


def _carried(like: Any, group: dist.ProcessGroup) -> torch.device:
    """The device of `like` where NCCL carries it, else the CPU: Gloo's support of GPU memory is partial."""
    backends = carriers(group)
    if isinstance(like, Tensor) and like.device.type in backends:
        device = like.device
    else:  # a rank with bad input takes part all the same
        device = torch.device("cpu" if "cpu" in backends else "cuda")
    return torch.device("cpu") if backends.get(device.type) == "gloo" else device


def ranks_of(group: dist.ProcessGroup | None) -> list[int]:
    """The global ranks of a group. Raises ValueError for one that is no more."""
    try:
        return dist.get_process_group_ranks(group)
    except KeyError:
        raise ValueError("group must exist, got one that destroy_process_group has ended") from None


def carriers(group: dist.ProcessGroup | None) -> dict[str, str]:
    """Which backend carries which type of device: {"cpu": "gloo", "cuda": "nccl"}. Raises ValueError as `ranks_of`."""
    if group is None:
        return {}
    ranks_of(group)
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


def _on(device: torch.device, header: Tensor) -> Tensor:
    return header if device.type == "cpu" else header.pin_memory().to(device, non_blocking=True)


def _encoded(words: str) -> Tensor:
    return torch.frombuffer(bytearray(words.encode()[:HEADER].ljust(HEADER, b"\0")), dtype=torch.uint8)


def _compare(told: Tensor) -> None:
    """Raise ValueError for the first rank that refused, else for the first that differs from rank 0.

    Ranks that all refuse do not come here: each has raised its own error.
    """
    if torch.equal(told, told[:1].expand_as(told)):
        return
    words = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in told]
    for rank, said in enumerate(words):
        if said.startswith(REFUSED):
            raise ValueError(f"rank {rank} could not take part: {said.removeprefix(REFUSED)}")
    rank = next(rank for rank, said in enumerate(words) if said != words[0])
    raise ValueError(f"every rank must make the same call, got {words[0]} on rank 0 and {words[rank]} on rank {rank}")


class HeaderWatch:
    """Checks headers on a GPU without a host sync: they are read once they have arrived, at a later call."""

    def __init__(self) -> None:
        self._arriving: deque[tuple[torch.cuda.Event, Tensor, Callable[[Tensor], None]]] = deque()

    def send(self, headers: Tensor, check: Callable[[Tensor], None]) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        copy = torch.empty(headers.shape, dtype=headers.dtype, pin_memory=True).copy_(headers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(headers.device))  # which need not be that of the current device
        self._arriving.append((arrived, copy, check))

    def check_arrived(self) -> None:
        while self._arriving and not torch.cuda.is_current_stream_capturing() and self._arriving[0][0].query():
            _, headers, check = self._arriving.popleft()
            check(headers)


_watch = HeaderWatch()
