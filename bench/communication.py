"""What the ranks tell each other for a loss's sake, a step: computed, measured over Gloo, modelled for many GPUs.

    python -m bench communication [--ranks 2 4] [--output FOLDER]

Ways to a loss over the global batch
    nonl      `hc.nonl_loss`, and ntce alike: the counts of the classes and one sum a class, whatever the batch
    supcon    `hc.supcon_loss`: features and labels, then four numbers a row for the backward
    buffer    the same with a `NegativeBuffer`, whose one collective carries features, labels and row counts
    gather    what others do: features gathered with a gradient, so that the backward sums the gradients of all rows
              over the ranks; where the loss is then computed for everything, on every rank, logits grow with W²

Bytes are counted three times, forward and backward of one step
    computed  from the shapes, by each way's own list of collectives below
    measured  what real ranks hand to torch.distributed: every collective passes torch's dispatcher, in Python, in C++
              and in the backward, and is counted there; one of an unknown kind is an error
    sockets   what those ranks' TCP sockets say they sent (Linux). To compare with the ring's bytes: Gloo adds a header
              to a message, and does a reduce-scatter as an all-reduce, which sends twice the bytes

A mismatch of computed and measured ends the command with 1. Times over Gloo are of the whole loss, forward and
backward, on this machine's cores, which the ranks share: they tell that it works, not how fast a GPU is. The model of 8
to 1024 GPUs is bench/network.py's. Needs matplotlib for the picture, which is drawn with --output alone.

Shapes: W ranks, n rows and N = W·n, K classes, D dimensions.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import socket
import stat
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hypercontrast as hc
from bench import record
from bench.arguments import at_least, writable
from bench.network import Collective
from hypercontrast._agreement import HEADER
from hypercontrast.buffer import ALIGNMENT, TAIL
from hypercontrast.config import UsageError
from hypercontrast.distributed import leave_group

TEMPERATURE = 0.1
ROUNDS = 5
TIMEOUT = 300.0  # seconds in which all ranks of a case must have finished
INT32, INT64 = 4, 8


@dataclass(frozen=True)
class Case:
    ranks: int
    rows: int
    classes: int
    width: int
    dtype: torch.dtype = torch.float32
    gpu: bool = False  # Triton and NCCL, else blockwise and Gloo

    @property
    def statistic(self) -> int:
        """Bytes of a sum or a log-sum-exp: float32 from Triton, float64 from the blockwise backend."""
        return 4 if self.gpu else 8


# The ways: their collectives in the order of a step, computed, and the loss that makes them


AGREEMENT = Collective("all-gather", HEADER)  # the ranks compare their calls before data moves


def nonl_collectives(case: Case) -> list[Collective]:
    k = case.classes
    return [
        AGREEMENT,
        Collective("all-reduce", k * INT32),  # samples of each class
        Collective("all-reduce", (k + 1) * case.statistic),  # Σ exp(s_cj), and Σ_j s_j for the loss's value
    ]


def supcon_collectives(case: Case) -> list[Collective]:
    n = case.rows
    return [
        AGREEMENT,
        Collective("all-gather", INT64),  # how many rows each rank has
        Collective("all-gather", n * case.width * case.dtype.itemsize),
        Collective("all-gather", n * INT64),
        *_supcon_tail(case),
    ]


def buffer_collectives(case: Case) -> list[Collective]:
    features = -(-case.width * case.dtype.itemsize // ALIGNMENT) * ALIGNMENT
    packed = Collective("all-gather", case.rows * (features + TAIL))
    # The loss compares its call, and over Gloo so does the buffer; over NCCL its rows carry their headers.
    return [AGREEMENT] * (1 if case.gpu else 2) + [packed, *_supcon_tail(case)]


def _supcon_tail(case: Case) -> list[Collective]:
    return [
        Collective("all-reduce", 2 * case.statistic),  # the loss's value and how many anchors it averages
        AGREEMENT,
        Collective("all-gather", case.rows * 4 * case.statistic),  # log-sum-exps, positives, upstream gradients
    ]


def gather_collectives(case: Case) -> list[Collective]:
    row = case.width * case.dtype.itemsize
    return [
        Collective("all-gather", case.rows * row),
        Collective("all-gather", case.rows * INT64),
        Collective("reduce-scatter", case.ranks * case.rows * row),
    ]


class _Gather(torch.autograd.Function):
    """All ranks' rows, of equal number: the backward sums every rank's gradient of this rank's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        mine = grad.new_empty(len(grad) // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, grad.contiguous())
        return mine


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of features, prototypes, labels


def _nonl(case: Case) -> Loss:
    return lambda z, w, y: hc.nonl_loss(z, w, y, temperature=TEMPERATURE)


def _supcon(case: Case) -> Loss:
    return lambda z, w, y: hc.supcon_loss(z, y, temperature=TEMPERATURE)


def _buffer(case: Case) -> Loss:
    buffer = hc.NegativeBuffer(case.width, case.rows, dtype=case.dtype)
    return lambda z, w, y: hc.supcon_loss(z, y, temperature=TEMPERATURE, queue=buffer)


def _gather(case: Case) -> Loss:
    return lambda z, w, y: hc.supcon_loss(_Gather.apply(z), _Gather.apply(y), temperature=TEMPERATURE, group=None)


WAYS: dict[str, tuple[Callable[[Case], list[Collective]], Callable[[Case], Loss]]] = {
    "nonl": (nonl_collectives, _nonl),
    "supcon": (supcon_collectives, _supcon),
    "buffer": (buffer_collectives, _buffer),
    "gather": (gather_collectives, _gather),
}


# Measured over Gloo


class Recorder(TorchDispatchMode):
    """Every collective of this process, in Python, C++ or a backward: all of them pass the dispatcher."""

    KINDS = {  # noqa: RUF012
        "allreduce_": ("all-reduce", 0),
        "allgather_": ("all-gather", 1),
        "_allgather_base_": ("all-gather", 1),
        "_reduce_scatter_base_": ("reduce-scatter", 1),
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name not in self.KINDS:
                raise NotImplementedError(f"a collective must be one of {', '.join(self.KINDS)}, got {name}")
            kind, place = self.KINDS[name]
            tensors = [args[place]] if isinstance(args[place], Tensor) else args[place]
            self.found.append(Collective(kind, sum(x.nbytes for x in tensors)))
        return func(*args, **(kwargs or {}))


def sockets_sent() -> int | None:
    """Bytes that this process's TCP sockets have sent so far; None where the system does not tell."""
    if not hasattr(socket, "TCP_INFO") or not Path("/proc/self/fd").is_dir():
        return None
    place = 200  # of tcpi_bytes_sent in Linux's struct tcp_info, from 4.19 on
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # a socket of another kind, or the list's own descriptor, closed by now
            continue
        if len(info) < place + 8:
            return None
        total += struct.unpack_from("Q", info, place)[0]
    return total


@dataclass(frozen=True)
class Measured:
    """One way on one case: bytes a rank and step, and the loss's time."""

    way: str
    ranks: int
    rows: int
    classes: int
    width: int
    dtype: str
    collectives: int
    payload: int  # measured: bytes that a rank hands over
    payload_computed: int
    ring_bytes: int  # computed: what a rank then sends
    socket_bytes: int | None  # measured, mean of the ranks
    loss_ms: float  # forward and backward, median of the rounds

    @property
    def agrees(self) -> bool:
        return self.payload == self.payload_computed


def measure(way: str, case: Case) -> Measured:
    """Start the case's ranks on this machine and let them run the way. RuntimeError if they do not finish in time."""
    with tempfile.TemporaryDirectory(prefix="communication_") as folder:
        context = mp.start_processes(_rank, (way, case, folder), case.ranks, join=False, start_method="spawn")
        deadline = time.monotonic() + TIMEOUT
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{way} over {case.ranks} ranks must finish within {TIMEOUT:g} s, got none")
        finally:
            for process in context.processes:
                process.kill()
        reports = [json.loads(Path(folder, f"report-{rank}").read_text()) for rank in range(case.ranks)]
    kinds = [[(one["kind"], one["payload"]) for one in report["collectives"]] for report in reports]
    if kinds != [kinds[0]] * case.ranks:
        raise RuntimeError(f"{way} must make the same collectives on every rank, got {kinds}")
    sent = [report["sent"] for report in reports]
    computed = WAYS[way][0](case)
    return Measured(
        way, case.ranks, case.rows, case.classes, case.width, str(case.dtype).removeprefix("torch."), len(kinds[0]),
        payload=sum(payload for _, payload in kinds[0]),
        payload_computed=sum(one.payload for one in computed),
        ring_bytes=round(sum(one.sent(case.ranks) for one in computed)),
        socket_bytes=None if None in sent else round(statistics.mean(sent)),
        loss_ms=round(statistics.median(statistics.median(report["times"]) for report in reports), 2),
    )  # fmt: skip


def _rank(rank: int, way: str, case: Case, folder: str) -> None:
    """What a started process does."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), case.ranks)  # a TCP store would send too
    dist.init_process_group("gloo", None, timedelta(seconds=TIMEOUT), case.ranks, rank, store=store)
    try:
        loss = WAYS[way][1](case)
        g = torch.Generator().manual_seed(rank)
        z = torch.randn(case.rows, case.width, generator=g).to(case.dtype).requires_grad_()
        w = torch.randn(case.classes, case.width, generator=g).to(case.dtype).requires_grad_()
        y = torch.randint(case.classes, (case.rows,), generator=g)

        def step() -> float:
            started = time.perf_counter()
            loss(z, w, y).backward()
            return 1e3 * (time.perf_counter() - started)

        step()
        dist.barrier()
        before = _settled()
        with Recorder() as recorder:
            step()
        after = _settled()
        times = [step() for _ in range(ROUNDS)]
        report = {
            "collectives": [dataclasses.asdict(one) for one in recorder.found],
            "sent": None if before is None or after is None else after - before,
            "times": times,
        }
        Path(folder, f"report-{rank}").write_text(json.dumps(report))
        dist.barrier()
    finally:
        leave_group()


def _settled() -> int | None:
    """`sockets_sent` once it no longer grows."""
    last, now = -1, sockets_sent()
    while now is not None and now != last:
        time.sleep(0.1)
        last, now = now, sockets_sent()
    return now


# The model


@dataclass(frozen=True)
class Modelled:
    """One way on one number of GPUs, by bench/network.py: nothing of it is measured."""

    way: str
    gpus: int
    rows: int  # of a GPU; a picture has two where pairs are contrasted
    classes: int | None  # pairs know no classes
    width: int | None  # sums of classes have none
    collectives: int
    sent_mb: float  # 1e6 bytes that a GPU sends, a step
    microseconds: float
    logits: int  # that a GPU computes in a forward


GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHOWN_GPUS = (8, 64, 1024)
# Pictures a GPU and step as the paper's recipes have them: ImageNet-1K on 8 GPUs (and ImageNet-100 on 4) with 256 each,
# CIFAR on one with 512.
IMAGENET, CIFAR = 256, 512
CLASSES = ((CIFAR, 100), (IMAGENET, 1000), (IMAGENET, 100_000))
WIDTHS = ((CIFAR, 128), (IMAGENET, 128), (IMAGENET, 512), (IMAGENET, 2048))


def model() -> list[Modelled]:
    """Every way at every number of GPUs, features in bfloat16 as the driver has them there."""
    rows = []
    for gpus in GPUS:
        for batch, k in CLASSES:
            rows.append(_modelled("nonl", Case(gpus, batch, k, 512, torch.bfloat16, gpu=True)))
        for batch, d in WIDTHS:
            for way in ("supcon", "buffer", "gather"):
                rows.append(_modelled(way, Case(gpus, 2 * batch, 1000, d, torch.bfloat16, gpu=True)))
    return rows


def _modelled(way: str, case: Case) -> Modelled:
    all_rows = case.ranks * case.rows
    logits = {"nonl": case.classes * case.rows, "gather": all_rows**2}.get(way, case.rows * all_rows)
    collectives = WAYS[way][0](case)
    return Modelled(
        way, case.ranks, case.rows, case.classes if way == "nonl" else None, None if way == "nonl" else case.width,
        collectives=len(collectives),
        sent_mb=round(sum(one.sent(case.ranks) for one in collectives) / 1e6, 6),
        microseconds=round(sum(one.microseconds(case.ranks) for one in collectives), 1),
        logits=logits,
    )  # fmt: skip


# The command

# (n, K, D) measured: the ImageNet recipes' pictures a rank, two rows each for pairs.
MEASURED = {
    "nonl": [(256, 1000, 2048), (256, 100_000, 128)],
    "supcon": [(512, 1000, 128), (512, 1000, 2048)],
    "buffer": [(512, 1000, 128), (512, 1000, 2048)],
    "gather": [(512, 1000, 128), (512, 1000, 2048)],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=at_least(2), nargs="+", default=[2, 4], help="of this machine, to measure with")
    parser.add_argument("--output", type=Path, help="folder for measured.csv, model.csv and communication.png")


def run(args: argparse.Namespace) -> int:
    if args.output is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("--output needs matplotlib: pip install 'hypercontrast[bench]'")
        writer = record.Writer(writable(args.output / "measured.csv"), Measured)
    measured = []
    print(f"# Measured over Gloo, {record.cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print(_header(MEASURED_COLUMNS), flush=True)
    for ranks in args.ranks:
        for way, shapes in MEASURED.items():
            for shape in shapes:
                measured.append(measure(way, Case(ranks, *shape)))
                print(_line(measured[-1], MEASURED_COLUMNS), flush=True)
                if args.output is not None:
                    writer.add(measured[-1])
    modelled = model()
    print("\n# A model of H100 nodes, see bench/network.py: not measured\n")
    print(_header(MODEL_COLUMNS))
    for row in modelled:
        if row.gpus in SHOWN_GPUS:
            print(_line(row, MODEL_COLUMNS))
    if args.output is not None:
        writer = record.Writer(args.output / "model.csv", Modelled)
        for row in modelled:
            writer.add(row)
        draw(modelled, args.output / "communication.png")
    if wrong := [row for row in measured if not row.agrees]:
        print(f"computed and measured bytes must be equal, got {wrong[0]}", file=sys.stderr)
    return int(bool(wrong))


MEASURED_COLUMNS = {
    "way": "way", "ranks": "ranks", "rows": "n", "classes": "K", "width": "D", "collectives": "collectives",
    "payload_computed": "payload, computed", "payload": "measured", "ring_bytes": "sent, computed (ring)",
    "socket_bytes": "by sockets (Gloo)", "loss_ms": "loss ms",
}  # fmt: skip
MODEL_COLUMNS = {
    "way": "way", "gpus": "GPUs", "rows": "n", "classes": "K", "width": "D", "collectives": "collectives",
    "sent_mb": "MB sent", "microseconds": "µs", "logits": "logits",
}  # fmt: skip


def _header(columns: dict[str, str]) -> str:
    return f"| {' | '.join(columns.values())} |\n|{'---|' * len(columns)}"


def _line(row: Measured | Modelled, columns: Iterable[str]) -> str:
    return f"| {' | '.join(_cell(getattr(row, name)) for name in columns)} |"


def _cell(value: str | float | None) -> str:
    """Whole numbers in full, others to three digits and never with an exponent."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.6f}"


# Way and classes: label, colour, line.
LINES: dict[tuple[str, int | None], tuple[str, str, str]] = {
    ("gather", None): ("features gathered with gradient", "#b5482e", "-"),
    ("supcon", None): ("SupCon, ours", "#d9962b", "-"),
    ("buffer", None): ("SupCon, ours, with a NegativeBuffer", "#d9962b", "--"),
    ("nonl", 100_000): ("NTCE and NONL, ours, K = 100,000", "#2b6ca3", "--"),
    ("nonl", 1000): ("NTCE and NONL, ours, K = 1,000", "#2b6ca3", "-"),
}
RESNET50_GRADIENTS = Collective("all-reduce", 4 * 25_557_032)  # float32; DDP sends them whatever the loss


def draw(rows: Sequence[Modelled], path: Path) -> None:
    """Bytes and modelled time a step against GPUs, one column of panels a width of features."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    gpus = [n for n in GPUS if n > 1]
    widths = [d for batch, d in WIDTHS if batch == IMAGENET]
    figure, panels = pyplot.subplots(2, len(widths), figsize=(11, 6.6), sharex=True, sharey="row", layout="constrained")
    quantities = (("sent_mb", "MB that a GPU sends a step"), ("microseconds", "µs a step (model)"))
    for (quantity, title), row in zip(quantities, panels, strict=True):
        row[0].set_ylabel(title)
        for width, panel in zip(widths, row, strict=True):
            for (way, classes), (label, colour, line) in LINES.items():
                batch = IMAGENET if way == "nonl" else 2 * IMAGENET
                chosen = (way, batch, classes, None if way == "nonl" else width)
                values = [
                    getattr(r, quantity) for r in rows if (r.way, r.rows, r.classes, r.width) == chosen and r.gpus > 1
                ]
                panel.plot(gpus, values, line, color=colour, label=label, linewidth=1.8)
            ddp = [
                RESNET50_GRADIENTS.sent(n) / 1e6 if quantity == "sent_mb" else RESNET50_GRADIENTS.microseconds(n)
                for n in gpus
            ]
            panel.plot(gpus, ddp, ":", color="#808080", label="for scale: DDP's gradients of a ResNet-50")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks((2, *SHOWN_GPUS), ["2", *map(str, SHOWN_GPUS)])
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            panel.grid(which="major", color="#e4e4e4")
            panel.spines[["top", "right"]].set_visible(False)
    for width, top, bottom in zip(widths, *panels, strict=True):
        top.set_title(f"features of width {width:,}", fontsize=11)
        bottom.set_xlabel("GPUs")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"What a loss over the global batch has to send: {IMAGENET} pictures a GPU, two views each for pairs, bfloat16",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
