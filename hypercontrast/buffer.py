"""The negative buffer: all ranks' features and a ring of past ones in preallocated memory, one collective a step.

Memory: W·batch + queue rows. A row is D elements of the buffer's dtype, padded to 16 bytes, then 16 bytes of int64: its
label and a header. So one collective carries features, labels and headers, and every row begins on 16 bytes. (Gloo,
whose host waits and which aborts where sizes differ, has a small one before it.)

    rows 0 ..           rank 0's samples, then absent rows
         batch ..       rank 1's ...
         W·batch ..     the queue, a ring

A header holds the number of the rank's call, a signature of the buffer and whether the rank had an error, so ranks that
disagree notice it in what they receive.

Shapes: W ranks, D dimensions, n samples of this rank, M rows.
"""

from __future__ import annotations

import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hypercontrast import _checks, _extension
from hypercontrast._agreement import HeaderWatch, agree, carriers, connected
from hypercontrast.distributed import ABSENT, GroupLike, resolve_group, world_size
from hypercontrast.reference import row_lengths

ALIGNMENT = 16  # bytes, of a row and of its tail
TAIL = 16  # bytes: label and header
ERROR = 1  # in a header: the call's number above bit 32, the signature above bit 1, this flag


class Gathered(NamedTuple):
    """All ranks' rows, views of the buffer's memory: valid until the next gather, constants for autograd.

    features: [W·batch, D], zero where absent. labels: [W·batch] int64, `NegativeBuffer.ABSENT` where absent.
    offset: where this rank's rows begin.
    """

    features: Tensor
    labels: Tensor
    offset: int


@dataclass(frozen=True, eq=False)
class Gathering:
    """A gather under way, from `NegativeBuffer.gather_async`."""

    buffer: NegativeBuffer
    header: int
    samples: tuple[Tensor, Tensor]  # held until waited for: only then may the caller's stream reuse their memory
    work: dist.Work | None

    def wait(self) -> Gathered:
        """The result, once; on a GPU the current stream waits for it, not the host.

        Raises RuntimeError when it was waited for already, LostRankError when another rank ended or does not answer.
        """
        return self.buffer._finish(self)


class NegativeBuffer:
    """All ranks' unit features and a ring of past ones, in memory allocated once.

    `gather` brings every rank's samples together by one collective, `push` keeps them, or given ones, for later steps,
    and `queued` is what was kept. A loss takes the buffer as `queue=`: it reads, the caller pushes::

        buffer = hc.NegativeBuffer(dim=128, batch=256, queue=8192)
        loss = hc.supcon_loss(features, labels, queue=buffer)
        loss.backward()
        buffer.push(features, labels)  # over a group rather push(): all ranks' samples, which the loss has gathered

    Args:
        dim: D.
        batch: the most samples a rank gathers at once.
        queue: how many rows are kept from past steps.
        dtype: of the rows: float32, bfloat16, float16 or float64. Samples of any of these are normalised in float32
            (float64 for float64) and rounded once.
        device: of the memory and of all samples; by default torch's default device.
        group: the ranks to gather from; "auto" is the default group when there is one, None this rank alone. NCCL
            carries GPU rows, Gloo CPU rows; where Gloo is to carry a GPU's, they go through host memory and the host
            waits.
        normalize: store z/|z|, zero for |z| <= 1e-12; else z as it is.

    The ranks of a group make their buffers, and call each, in the same order. When they differ in an argument, one of
    them has bad samples or is at another call of a buffer of this size, every rank gets a ValueError, at once off-GPU.
    On a GPU no call makes the host wait: values (finite features, labels) are not read there, and another rank's
    error is raised by a later call.

    Raises:
        ValueError, TypeError: naming argument, rule and value; on every rank, before data moves, where ranks differ.
        LostRankError: if another rank ended or does not answer.
    """

    ABSENT: ClassVar[int] = ABSENT
    _next_serial: ClassVar[int] = 0  # tells buffers of the same arguments apart

    def __init__(
        self,
        dim: int,
        batch: int,
        queue: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        group: GroupLike = "auto",
        normalize: bool = True,
    ) -> None:
        device = torch.get_default_device() if device is None else device
        self.group = resolve_group(group)
        backends = carriers(self.group)
        error = _argument_error(dim, batch, queue, dtype, normalize, device, backends)
        self._signature = 0
        if self.group is not None:
            kind = None if error else torch.device(device).type
            arguments = dict(dim=dim, batch=batch, queue=queue, dtype=dtype, normalize=normalize, device=kind)
            self._signature = _agree(arguments, error, self.group)
        elif error is not None:
            raise error
        self.dim, self.batch, self.queue, self.dtype, self.normalize = dim, batch, queue, dtype, normalize

        rank = 0 if self.group is None else dist.get_rank(self.group)
        everyone = world_size(self.group) * batch
        rows = _Rows.allocate(everyone + queue, dim, dtype, device)
        self.device = rows.bytes.device
        self._gathered, self._ring = rows.part(0, everyone), rows.part(everyone, everyone + queue)
        self._offset = rank * batch
        self._mine = self._gathered.part(self._offset, self._offset + batch)
        # Gloo's host waits anyway, so its ranks compare calls before rows move; those of NCCL, by the rows' headers.
        self._by_gloo = backends.get(self.device.type) == "gloo"
        # Gloo's support of GPU memory is partial, so what it sends is a copy on the host.
        through_host = self._by_gloo and self.device.type == "cuda"
        self._wire = _Rows.allocate(everyone, dim, dtype, "cpu", pinned=True) if through_host else self._gathered
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._watch = HeaderWatch()
        self._operators: Any = _extension.load() or _Twin
        self._calls = self._cursor = 0
        self._pending: Gathering | None = None

    def __reduce__(self) -> Any:
        raise TypeError(
            "NegativeBuffer must not be copied or pickled, for it belongs to its process and group:"
            " keep its state_dict(), and hold it outside of what is copied"
        )

    def gather(self, features: Tensor, labels: Tensor) -> Gathered:
        """All ranks' samples, from each rank's own: features [n <= batch, D] raw, labels [n] int64.

        n may differ between ranks and be zero. Raises ValueError or TypeError for bad samples, here or on any rank.

        Returns (features, labels, offset), views of the buffer's memory that the next gather writes over, without a
        gradient: features [W·batch, D], zero where absent; labels [W·batch], `ABSENT` there; where this rank's begin.
        """
        return self.gather_async(features, labels).wait()

    @torch.no_grad()
    def gather_async(self, features: Tensor, labels: Tensor) -> Gathering:
        """Start a gather, on a GPU on a stream of its own; `wait()` on the result ends it. One at a time."""
        self._watch.check_arrived()
        error = self._idle_error("gather") or self._sample_error(features, labels, limit=self.batch)
        if error is not None and self.group is None:
            raise error
        if self.group is not None and self._by_gloo:
            agree(lambda: self._described(error), self.group, None)
        if error is not None:
            # The others are waiting: take part with nothing but the bad news.
            features, labels = self._gathered.features[:0], self._gathered.tails[:0, 0]
        self._calls += 1
        header = (self._calls % 2**31) << 32 | self._signature << 1
        with self._side_stream():
            work = self._start(features, labels, header | (ERROR if error else 0))
        self._pending = Gathering(self, header, (features, labels), work)
        if error is not None:
            self._complete()
            raise error
        return self._pending

    @torch.no_grad()
    def push(self, features: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Keep samples in the queue in place of its oldest: those of the last gather, or given ones of this rank alone.

        Of a gather the queue keeps whole slots, absent rows included, so that no rank's count needs to be known. Given
        samples are features [m, D] raw and labels [m] int64, any number of them. The newest `queue` rows stay.
        """
        if (busy := self._idle_error("push")) is not None:
            raise busy
        normalize = self.normalize
        if features is None and labels is None:
            if self._calls == 0:
                raise RuntimeError("push without samples needs a gather before it")
            features, labels, normalize = self._gathered.features, self._gathered.tails[:, 0], False
        elif (error := self._sample_error(features, labels, limit=None)) is not None:
            raise error
        if self.queue:
            self._cursor = self._operators.push(
                self._ring.features, self._ring.tails, self._cursor, features, labels, 0, normalize
            )

    def queued(self) -> tuple[Tensor, Tensor]:
        """Features [queue, D] and labels [queue] of past samples, ABSENT where there is none yet, in no useful order.

        Views of the buffer's memory: valid until the next push.
        """
        return self._ring.features, self._ring.tails[:, 0]

    def state_dict(self) -> dict[str, Any]:
        """The queue, as this rank holds it: a copy."""
        features, labels = self.queued()
        return {"features": features.clone(), "labels": labels.clone(), "cursor": self._cursor}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a queue back, whole or not at all. Raises ValueError for a state of another size or dtype or with parts
        missing, and for features that are not finite where they are on the CPU; TypeError for what is no state.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict, got {type(state).__name__}")
        if set(state) != {"features", "labels", "cursor"}:
            raise ValueError(
                f"state must hold features, labels and cursor, got {', '.join(map(str, state)) or 'nothing'}"
            )
        cursor, queued = state["cursor"], dict(zip(("features", "labels"), self.queued(), strict=True))
        _checks.check_integer("state's cursor", cursor)
        if not 0 <= cursor < max(self.queue, 1):
            raise ValueError(f"state's cursor must lie in [0, {self.queue}), got {cursor}")
        for name, own in queued.items():
            kept = state[name]
            if not isinstance(kept, Tensor):
                raise TypeError(f"state's {name} must be a tensor, got {type(kept).__name__}")
            if kept.shape != own.shape or kept.dtype != own.dtype:
                raise ValueError(
                    f"state must hold {name} {list(own.shape)} of {own.dtype}, got {list(kept.shape)} of {kept.dtype}"
                )
        features = state["features"]
        if features.device.type == "cpu":
            _checks.check_finite_norms("state's features", _checks.norms(features))
        for name, own in queued.items():
            own.copy_(state[name])
        self._cursor = cursor

    def _start(self, features: Tensor, labels: Tensor, header: int) -> dist.Work | None:
        """Pack into this rank's slot and start the collective. Returns what the host has to wait for, if anything."""
        mine = self._mine
        packing = (mine.features, mine.tails, features, labels, header, self.normalize)
        if self.group is None:
            self._operators.pack(*packing)
            return None
        if self._wire is not self._gathered:
            self._operators.pack(*packing)
            sent = self._wire.bytes[self._offset :][: self.batch].copy_(mine.bytes)  # waits for the GPU
            return dist.all_gather_into_tensor(self._wire.bytes, sent, group=self.group, async_op=True)
        work = self._operators.gather(self._gathered.bytes, mine.bytes, *packing, self.group)
        if self._side is None:
            return work
        work.wait()  # the side stream does, not the host
        expected = header & ~ERROR
        self._watch.send(self._headers(), lambda headers: _check_headers(headers.tolist(), expected))
        return None

    def _finish(self, gathering: Gathering) -> Gathered:
        if gathering is not self._pending:
            raise RuntimeError("a gather can be waited for once")
        self._complete()
        self._watch.check_arrived()
        return Gathered(self._gathered.features, self._gathered.tails[:, 0], self._offset)

    def _complete(self) -> None:
        """Let the pending gather's rows arrive, as the current stream sees it."""
        gathering, self._pending = self._pending, None
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
        if gathering is not None and gathering.work is not None:
            with connected():
                gathering.work.wait()
        if self._wire is not self._gathered:
            self._gathered.bytes.copy_(self._wire.bytes, non_blocking=True)

    def _headers(self) -> Tensor:
        """[W]: of each slot's first row."""
        return self._wire.tails[:: self.batch, 1]

    def _described(self, error: Exception | None) -> str:
        if error is not None:
            raise error
        return f"gather, call {self._calls + 1} of NegativeBuffer {self._signature} [{self.batch}, {self.dim}]"

    def _side_stream(self) -> AbstractContextManager:
        """The buffer's own stream, behind everything that the caller's has been given so far."""
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._side)

    def _idle_error(self, call: str) -> Exception | None:
        if self._pending is None:
            return None
        return RuntimeError(f"{call} must come after wait() of the gather under way")

    def _sample_error(self, features: Any, labels: Any, limit: int | None) -> Exception | None:
        """What is wrong with samples to be stored. Values are read off-GPU only."""
        try:
            _checks.check_matrix("features", features, "[n, D]")
            if features.shape[1] != self.dim:
                raise ValueError(f"features must have the buffer's dimension {self.dim}, got {list(features.shape)}")
            if features.device != self.device:
                raise ValueError(f"features must be on the buffer's device {self.device}, got {features.device}")
            if limit is not None and len(features) > limit:
                raise ValueError(f"features must have at most batch = {limit} rows, got {len(features)}")
            _checks.check_labels(labels, len(features), features.device)
            if self.device.type == "cpu":
                stored = features if self.normalize else features.to(self.dtype)  # which may overflow
                _checks.check_finite_norms("features", _checks.norms(stored))
                absent = (labels == ABSENT).nonzero()
                if len(absent):
                    raise ValueError(f"labels must not be NegativeBuffer.ABSENT, got it in row {int(absent[0])}")
        except Exception as error:  # to be raised once the other ranks know
            return error
        return None


class _Rows(NamedTuple):
    """Rows of memory in three views: bytes [M, pitch], features [M, D] and tails [M, 2] of label and header."""

    bytes: Tensor
    features: Tensor
    tails: Tensor

    def part(self, start: int, stop: int) -> _Rows:
        return _Rows(self.bytes[start:stop], self.features[start:stop], self.tails[start:stop])

    @classmethod
    def allocate(
        cls, num_rows: int, dim: int, dtype: torch.dtype, device: torch.device | str, *, pinned: bool = False
    ) -> _Rows:
        """Rows of zeros, all absent."""
        width = -(-dim * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        memory = torch.zeros(num_rows, width + TAIL, dtype=torch.uint8, device=device, pin_memory=pinned)
        rows = cls(memory, memory.view(dtype)[:, :dim], memory.view(torch.int64)[:, width // 8 :])
        rows.tails[:, 0] = ABSENT
        return rows


class _Twin:
    """csrc/negative_buffer.cpp in Python: the same operators in the same order, so bitwise equal on a CPU."""

    @staticmethod
    def pack(
        row_features: Tensor, row_tails: Tensor, features: Tensor, labels: Tensor, header: int, normalize: bool
    ) -> None:
        """Write samples [n, D] with labels [n] into the first n rows; the others become absent."""
        n, row_labels = len(features), row_tails[:, 0]
        if normalize:
            torch.div(features, row_lengths(features), out=row_features[:n])  # lengths, and so quotients, are float32
        else:
            row_features[:n].copy_(features)
        row_features[n:].zero_()
        row_labels[:n].copy_(labels)
        row_labels[n:].fill_(ABSENT)
        row_tails[:, 1].fill_(header)

    @staticmethod
    def gather(
        everyone: Tensor, mine: Tensor, row_features: Tensor, row_tails: Tensor, features: Tensor, labels: Tensor,
        header: int, normalize: bool, group: dist.ProcessGroup,
    ) -> dist.Work:  # fmt: skip
        """`pack` into this rank's rows, in bytes `mine`; start the collective that fills `everyone`, all the rows."""
        _Twin.pack(row_features, row_tails, features, labels, header, normalize)
        return dist.all_gather_into_tensor(everyone, mine, group=group, async_op=True)

    @staticmethod
    def push(
        ring_features: Tensor, ring_tails: Tensor, cursor: int, features: Tensor, labels: Tensor, header: int,
        normalize: bool,
    ) -> int:  # fmt: skip
        """`pack` the newest samples into a ring of rows, from `cursor` on, round its end. Returns the next cursor."""
        size = len(ring_features)
        kept = min(len(features), size)
        oldest, straight = len(features) - kept, min(kept, size - cursor)
        for row, sample, count in ((cursor, oldest, straight), (0, oldest + straight, kept - straight)):
            if not count:
                continue
            rows, samples = slice(row, row + count), slice(sample, sample + count)
            _Twin.pack(ring_features[rows], ring_tails[rows], features[samples], labels[samples], header, normalize)
        return (cursor + kept) % size


def _check_headers(headers: list[int], expected: int) -> None:
    """Raise ValueError for the first rank that had an error, else for the first that is at another call."""
    for rank, header in enumerate(headers):
        if header & ERROR:
            raise ValueError(f"rank {rank} could not gather: its own error says why")
    for rank, header in enumerate(headers):
        if header != expected:
            another = " of another buffer" if (header ^ expected) & 0xFFFFFFFF else ""
            raise ValueError(
                f"gather must be called in the same order on every rank: rank {rank} is at call {header >> 32}{another}"
                f", this rank at call {expected >> 32}"
            )


def _argument_error(
    dim: Any, batch: Any, queue: Any, dtype: Any, normalize: Any, device: Any, carriers: dict[str, str]
) -> Exception | None:
    try:
        for name, value, least in (("dim", dim, 1), ("batch", batch, 1), ("queue", queue, 0)):
            _checks.check_integer(name, value, least)
        if dtype not in _checks.FLOATS:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        _checks.check_flag("normalize", normalize)
    except (TypeError, ValueError) as error:  # to be raised once the other ranks know
        return error
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        return ValueError(f"device must be one that torch knows, got {device!r}")
    if carriers and kind not in carriers:
        return ValueError(f"device must be one that the group carries, {' or '.join(carriers)}, got {device}")
    return None


def _agree(arguments: dict[str, Any], error: Exception | None, group: dist.ProcessGroup) -> int:
    """Compare the arguments over the ranks, before any data moves. Returns the buffer's signature.

    A rank whose own are wrong takes part, so every rank raises: it the error, the others a ValueError that quotes it.
    """
    agree(lambda: "NegativeBuffer()", group, None)
    told: list[Any] = [None] * dist.get_world_size(group)
    mine = (NegativeBuffer._next_serial, error and str(error), None if error else arguments)
    with connected():
        dist.all_gather_object(told, mine, group=group)
    serial = max(serial for serial, *_ in told)
    NegativeBuffer._next_serial = serial + 1
    if error is not None:
        raise error
    for rank, (_, fault, _) in enumerate(told):
        if fault is not None:
            raise ValueError(f"rank {rank} could not make its NegativeBuffer: {fault}")
    for name, value in arguments.items():
        values = [of_rank[name] for *_, of_rank in told]
        if values != [value] * len(values):
            raise ValueError(f"{name} must be the same on every rank, got {', '.join(map(str, values))}")
    return zlib.crc32(repr((serial, arguments)).encode()) >> 1
