"""Ranks over Gloo for tests: processes that meet at a file, give up on each other soon and never outlive their test.

A rank calls `function(rank, world, *arguments)`. Its result comes back pickled, its stderr in a file.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A fork of a process that has imported torch and nothing else starts in milliseconds, and without our threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "hypercontrast"])


class Ranks:
    """Started ranks, killed at the end of the `with`."""

    def __init__(self, function, world: int, folder: Path, *arguments, timeout: float) -> None:
        self.folder, self.world = Path(folder), world
        common = (function, world, self.folder, timeout, arguments)
        self.processes = [_CONTEXT.Process(target=_rank_main, args=(rank, *common)) for rank in range(world)]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def join(self, limit: float, ranks: list[int] | None = None) -> bool:
        """Wait for some ranks, or for all; False if one is still running after `limit` seconds."""
        deadline = time.monotonic() + limit
        waited = [self.processes[rank] for rank in (range(self.world) if ranks is None else ranks)]
        for process in waited:
            process.join(max(deadline - time.monotonic(), 0))
        return all(process.exitcode is not None for process in waited)

    def said(self, rank: int) -> str:
        """What the rank wrote on stderr."""
        return _stderr(self.folder, rank).read_text(errors="replace")

    def result(self, rank: int) -> Any:
        return pickle.loads(_result(self.folder, rank).read_bytes())


def spawn(function, world: int, folder: Path, *arguments, timeout: float = 60, limit: float = 120) -> list[Any]:
    """Every rank's result. Fails with what they said if one fails, or hangs for `limit` seconds."""
    with Ranks(function, world, folder, *arguments, timeout=timeout) as ranks:
        ended = ranks.join(limit)
        codes = [process.exitcode for process in ranks.processes]
        said = "\n".join(f"rank {rank}: {ranks.said(rank)}" for rank, code in enumerate(codes) if code)
        assert ended, f"the ranks hang, exit codes {codes}\n{said}"
        assert codes == [0] * world, f"exit codes {codes}\n{said}"
        return [ranks.result(rank) for rank in range(world)]


def _stderr(folder: Path, rank: int) -> Path:
    return folder / f"stderr{rank}"


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result{rank}"


def _rank_main(rank: int, function, world: int, folder: Path, timeout: float, arguments: tuple) -> None:
    # Gloo gives the reason of an abort on file descriptor 2 and nowhere else.
    os.dup2(os.open(_stderr(folder, rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), sys.stderr.fileno())
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", None, timedelta(seconds=timeout), world, rank, store)
    _result(folder, rank).write_bytes(pickle.dumps(function(rank, world, *arguments)))
    dist.barrier()  # a rank that leaves while another is still in a collective can abort it
    dist.destroy_process_group()
    time.sleep(0.02)  # Gloo's threads let go of the last tensors: see hypercontrast.distributed.leave_group
