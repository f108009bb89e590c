"""The negative buffer's gather and push against what training code writes: `measure` gives a row a form.

Forms are ours (the C++ extension), its Python twin, and eager code: normalise, all_gather features and labels, then cat
the queue, or as MoCo's code does write them into it as a ring, the yardstick. Over several ranks each is a process of
its own over Gloo, all take the same rounds, and rank 0 is timed. An error is that of the directions, gathered and once
the queue has gone round of those that it holds, infinite where one is not what was pushed; there is no gradient.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

import hypercontrast as hc
from bench import forms, verdict
from bench.measure import MIB, Fields, Run, add_times, clock, interleaved, row
from bench.peers import OURS
from bench.record import Case, Row
from hypercontrast import _extension
from hypercontrast.buffer import _Twin
from hypercontrast.distributed import leave_group

CAT, RING, TWIN = "eager all_gather, cat", "eager all_gather, ring", "python twin"
EAGER = (CAT, RING)
ROUNDS = 50


def operators(form: str) -> Any:
    """The buffer's operators of a form of ours: its twin's, or the extension's where it is built."""
    return _Twin if form == TWIN else _extension.load()


class _Cat:
    def __init__(self, queue: int, d: int, dtype: torch.dtype, device: str) -> None:
        self.queue = torch.zeros(queue, d, dtype=dtype, device=device)
        self.labels = torch.full((queue,), hc.NegativeBuffer.ABSENT, device=device)

    def gather(self, z: Tensor, y: Tensor) -> Tensor:
        self.gathered = _everyone(F.normalize(z, dim=1)), _everyone(y)
        return self.gathered[0]

    def push(self) -> None:
        features, labels = self.gathered
        self.queue = torch.cat([features, self.queue])[: len(self.queue)]
        self.labels = torch.cat([labels, self.labels])[: len(self.labels)]

    def queued(self) -> tuple[Tensor, Tensor]:
        return self.queue, self.labels


class _Ring(_Cat):
    begin = 0

    def push(self) -> None:
        features, labels = (x[-len(self.queue) :] for x in self.gathered)
        first = min(len(features), len(self.queue) - self.begin)  # what does not fit at the end goes to the start
        rest = len(features) - first
        for queue, rows in ((self.queue, features), (self.labels, labels)):
            queue[self.begin : self.begin + first] = rows[:first]
            if rest:
                queue[:rest] = rows[first:]
        self.begin = (self.begin + len(features)) % len(self.queue)


def _everyone(x: Tensor) -> Tensor:
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class Ours:
    def __init__(self, case: Case, device: str, operators: Any) -> None:
        self.buffer = hc.NegativeBuffer(case.d, case.n, case.k, dtype=forms.DTYPES[case.dtype], device=device)
        self.buffer._operators = operators

    def gather(self, z: Tensor, y: Tensor) -> Tensor:
        return self.buffer.gather(z, y).features

    def push(self) -> None:
        self.buffer.push()

    def queued(self) -> tuple[Tensor, Tensor]:
        return self.buffer.queued()


def step(exchange: _Cat | Ours, z: Tensor, y: Tensor) -> None:
    exchange.gather(z, y)
    exchange.push()


def measure(case: Case, device: str, seconds: float) -> list[Row]:
    """A row for each form. On a GPU for one rank."""
    if case.ranks == 1:
        found = _fields(case, device, seconds)
    elif device == "cuda":
        found = {OURS: {"status": "absent", "reason": "ranks are measured over Gloo, on a CPU"}}
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (case, folder, max(1, torch.get_num_threads() // case.ranks)), nprocs=case.ranks)
            found = torch.load(Path(folder) / "found", weights_only=True)
    return [row(case, name, device, fields) for name, fields in found.items()]


def _rank(rank: int, case: Case, folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    store = dist.FileStore(f"{folder}/store", case.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks)
    found = _fields(case, "cpu", 0)
    dist.barrier()
    if rank == 0:
        torch.save(found, Path(folder) / "found")
    leave_group()


def _samples(case: Case, rank: int, device: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(rank)
    z = torch.randn(case.n, case.d, generator=g, device=device).to(forms.DTYPES[case.dtype])
    return z, torch.randint(0, 100, (case.n,), generator=g, device=device)


def _rank_here() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _directions(case: Case, seeds: Iterable[int], device: str) -> Tensor:
    """In float64, of the samples of these seeds, one after another."""
    z = torch.cat([_samples(case, seed, device)[0] for seed in seeds]).double()
    return z / z.norm(dim=1, keepdim=True)


def _queue_error(exchange: _Cat | Ours, case: Case, device: str) -> float:
    """Of the whole batches that the queue holds once more were pushed than fit; their labels tell the samples apart."""
    everyone = case.n * case.ranks
    fit = case.k // everyone
    for turn in range(fit + 2):
        seed = turn * case.ranks + _rank_here()
        step(exchange, _samples(case, seed, device)[0], seed * case.n + torch.arange(case.n, device=device))
    features, labels = exchange.queued()
    labels, order = labels.sort()
    newest = slice(len(labels) - fit * everyone, None)
    want = torch.arange(2 * everyone, (fit + 2) * everyone, device=device)
    if not torch.equal(labels[newest], want):
        return math.inf
    seeds = range(2 * case.ranks, (fit + 2) * case.ranks)
    return verdict.deviation([features[order[newest]]], [_directions(case, seeds, device)]) if fit else 0.0


def _fields(case: Case, device: str, seconds: float) -> dict[str, Fields]:
    """Of each form, as this rank measures it."""
    empty = case.k, case.d, forms.DTYPES[case.dtype], device
    exchanges: dict[str, _Cat | Ours] = {CAT: _Cat(*empty), RING: _Ring(*empty)}
    found: dict[str, Fields] = {name: {} for name in (*EAGER, TWIN, OURS)}
    for name in (TWIN, OURS):
        if operators(name) is None:
            found[name] |= {"status": "absent", "reason": "python setup.py build_ext --inplace"}
        else:
            exchanges[name] = Ours(case, device, operators(name))

    z, y = _samples(case, _rank_here(), device)
    want = _directions(case, range(case.ranks), device)
    runs: dict[tuple[str, str], Run] = {}
    for name, exchange in exchanges.items():
        first, again = (exchange.gather(z, y).clone() for _ in range(2))  # the next gather writes where this one is
        found[name] |= {
            "error": max(verdict.deviation([first], [want]), _queue_error(exchange, case, device)),
            "repeats": torch.equal(first, again),
            "outputs_mib": again.numel() * again.itemsize / MIB,
        }
        runs |= {(name, "fwd_bwd"): partial(step, exchange, z, y), (name, "fwd"): partial(exchange.gather, z, y)}
    bound = max(2 * min(found[name]["error"] for name in EAGER), torch.finfo(forms.DTYPES[case.dtype]).eps)
    for name in exchanges.keys() - set(EAGER):
        if not found[name]["error"] <= bound:
            found[name] |= {"status": "wrong", "reason": f"error {found[name]['error']:.1e} is past {bound:.1e}"}
    add_times(found, interleaved(runs, seconds, clock(device), least=ROUNDS))
    return found
