"""Everything that needs a GPU, in one command that fits ten minutes: `make gpu-check`.

correctness   120 s  the tests of kernels and losses with their quick fuzz: every loss against float64 at float32,
                     bfloat16 and float16, odd shapes, near collapse, no host sync, CUDA graphs, a hundred steps
extension      65 s  the negative buffer's extension is built and tested: its kernel, streams, NCCL, ranks that share a
                     GPU
indices        50 s  loss and gradients of inputs, one or both, and of exponentials kept, past 2^31 elements, against
                     float64
matrix        105 s  the standard cases of `python -m bench` with all peers there are, what matters most first; what
                     would begin late is named and left out
determinism    50 s  1,000 repeats of forward and backward of every loss, on each way through the kernels: the same bits
driver         40 s  a run of nonl and one of scl on pictures of noise, with what follows an epoch (metrics, checkpoint,
                     report), and their evaluation; left out without PyYAML, torchvision and safetensors
training       80 s  seconds per epoch of the CIFAR-10 recipes, compiled and not, no step of which waits for the device;
                     left out without PyYAML and torchvision
sanitizer      90 s  compute-sanitizer's memcheck, racecheck and initcheck over every kernel, without the caching
                     allocator; left out where it is not installed

Each stage is a process of its own, ended after its seconds: it then counts as not passed, with what it has told until
then. --stages runs some alone. The exit code is 0 when all that ran passed. A new bench/results/DATE-DEVICE/ has, as
they come: environment.txt, verdicts.txt, STAGE.txt with what a stage says to the terminal, the logs and tables of some.

Needs torch, triton, pytest and the checkout alone; pytest-xdist shares the tests out better, pictures need matplotlib.
Without a GPU, --rehearse walks the same stages on the CPU at small sizes, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hypercontrast as hc
from bench import forms, matrix, plot, record
from bench.arguments import new_folder, writable
from bench.matrix import Entry
from bench.measure import bits, captured
from bench.peers import OURS
from bench.record import ROOT, Case, this_device
from hypercontrast import reference
from hypercontrast.config import UsageError, configure
from hypercontrast.progress import fail

TAU = forms.TAU
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "triton", "triton_supcon", "launches", "kernels", "pair_kernels", "kept", "ops", "training_equivalence"
    )
)  # fmt: skip
# What these tests do on a CPU in any case, or find in the interpreter as well, needs no GPU.
ON_THE_GPU = (
    "not gradcheck and not ahead_of_time and (not test_ops or triton or compiled_whole)"
    " and (not test_training or triton)"
)
MATRIX_SECONDS = 90
REPEATS = 1000
TOLD = ("FAILURE ", "E  ")
NO_TESTS = 5  # pytest's exit status
WORKERS = max(2, min(12, (os.cpu_count() or 2) - 2))
# Loss, classes and width. Features of as many samples pass 2^31 elements in narrow and in wide kernels, where the
# classes are more than the width the exponentials that a forward keeps do.
INDEXED = (("ntce", 64, 128), ("ntce", 64, 4096), ("ntce", 4096, 512), ("supcon", 64, 128), ("supcon", 64, 4096))
# A row of zeros, or of another's values, puts a block off by 1.1e-2 or more; rounding to bfloat16 by some 5e-3, eight
# times what float16 has in the interpreter.
INDEXED_BLOCK, INDEXED_ERROR = 8192, 1e-2
BEYOND = 1000  # rows past 2^31
# Loss, samples, classes and width where rows are copies: both sides of a product pass 2^31 elements, in wide kernels,
# which takes 1e15 FLOP (in narrow ones it would take 1e17), and the classes alone in narrow kernels.
BOTH, MANY = 2**31 // 32768 + BEYOND, 2**31 // 128 + BEYOND
COPIED = (
    ("normface", BOTH, BOTH, 32768),
    ("supcon", BOTH, BOTH, 32768),
    ("normface", 2 * BEYOND, MANY, 128),
)
# How many vectors the samples but the last, and the classes that have none, are copies of: primes, so that rows some
# power of two apart are of different ones.
COPIES_OF, ABSENT_COPIES_OF = 61, 59
# At once: the first of `COPIED` takes 25 GiB, a third of it the classes' gradient in float32, each of the others 9.
INDEXED_AT_ONCE = 4
# What a rehearsal measures in the place of the standard cases.
SMALL = [
    *(Entry(Case(op, 64, 20, 48)) for op in forms.PROTOTYPE_LOSSES),
    Entry(Case("supcon", 64, 5, 24)),
    Entry(Case("ntce", 40, 130, 24, features="collapsed"), ()),
    Entry(Case("buffer", 16, 64, 24)),
]


# A process of its own, whose lines go to a log as they come


def run(command: Sequence[str], log: Path, shown: tuple[str, ...] = ()) -> int:
    """Its exit status; of its lines, those that begin as `shown` and the last are printed as well."""
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last = ""
    with log.open("a") as file:
        for line in process.stdout:  # type: ignore[union-attr]
            file.write(line)
            file.flush()
            last = line.strip() or last
            if line.startswith(shown):
                print(f"    {line.rstrip()}", flush=True)
    status = process.wait()
    print(f"    {last}", flush=True)
    return status


def run_tests(tests: Sequence[str], selection: Sequence[str], log: Path) -> bool:
    """Whether they pass. Side by side on a GPU, where most of their time is compiling."""
    command = [sys.executable, "-m", "pytest", *tests, *selection, "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "bench.failures"]
    if not torch.cuda.is_available():
        return run(command, log, TOLD) == 0
    if importlib.util.find_spec("xdist"):  # one by one: what compiles most comes first
        return run([*command, "-n", str(WORKERS), "--maxschedchunk", "1"], log, TOLD) == 0
    print(f"    without pytest-xdist: {WORKERS} processes, the tests dealt out beforehand", flush=True)

    def share(part: int) -> int:
        mine = ["-p", "bench.shares", "--share", f"{part}/{WORKERS}"]
        return run([*command, *mine], log.with_stem(f"{log.stem}-{part}"), TOLD)

    with ThreadPoolExecutor(WORKERS) as pool:
        found = set(pool.map(share, range(WORKERS)))
    return 0 in found and found <= {0, NO_TESTS}


# Calls of a stage in processes side by side


def side_by_side(name: str, rehearse: bool, parts: int = WORKERS) -> bool:
    """Whether all that `CALLS` has of a stage passes, every process calling its part of it once.

    What takes the time is compiling, a second or two of one core for each kernel that Triton's cache does not have.
    """
    commands = [[*once(name, part, parts), *["--rehearse"] * rehearse] for part in range(parts)]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    return not any([process.wait() for process in processes])


def once(name: str, part: int, parts: int) -> list[str]:
    return [sys.executable, "-m", "bench.gpu_check", "--once", name, str(part), str(parts)]


# The stages. True: passed. A text: why it cannot be done here


def correctness(folder: Path, rehearse: bool) -> bool:
    """Tests marked slow take many minutes: `pytest -m slow` with these files has them."""
    selection = ["-k", "test_triton and repeats"] if rehearse else ["-k", ON_THE_GPU]
    return run_tests(TESTS, ["-m", "not slow", *selection], folder / "correctness.log")


def extension(folder: Path, rehearse: bool) -> bool:
    """Build the negative buffer's extension, then its tests: kernel, streams, collectives, its Python twin."""
    log = folder / "extension.log"
    built = run([sys.executable, "setup.py", "build_ext", "--inplace"], log) == 0
    print("    built" if built else "    not built", flush=True)
    selection = ["-k", "ring or normal"] if rehearse else ["-m", ""]
    return run_tests(("tests/test_buffer.py", "tests/test_gather.py"), selection, log) and built


def sanitizer(folder: Path, rehearse: bool) -> bool | str:
    """All checks at once, after processes without them have compiled the kernels."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if rehearse or not Path(tool).exists():
        return "needs a GPU" if rehearse else "needs compute-sanitizer"
    if not side_by_side("sanitizer", rehearse):
        print("    the kernels fail without a check")
        return False
    checks = {}
    for check in ("memcheck", "racecheck", "initcheck"):
        with (folder / f"{check}.log").open("w") as log:
            checks[check] = subprocess.Popen(
                [tool, f"--tool={check}", "--error-exitcode=9", *once("sanitizer", 0, 1)], cwd=ROOT, stdout=log,
                stderr=subprocess.STDOUT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )  # fmt: skip
    clean = {check: process.wait() == 0 for check, process in checks.items()}
    for check, is_clean in clean.items():
        print(f"    {check}: {'clean' if is_clean else f'see {check}.log'}")
    return all(clean.values())


def watched() -> Iterable[Callable[[], Any]]:
    """`every_kernel` with the library's float32 products for those of half types: on Hopper racecheck reports hazards
    inside the latter, and initcheck that nobody wrote their results.
    """
    from hypercontrast.kernels import _epilogue, pair_backward, prototype_backward  # need Triton

    for module in (pair_backward, prototype_backward):
        module.mm_fp32 = lambda a, b, into=None: _epilogue.mm_fp32(a.float(), b.float(), into)
    return every_kernel()


def every_kernel() -> Iterator[Callable[[], Any]]:
    """Calls that launch every kernel between them, on odd sizes with ignored labels: what the sanitizer watches."""
    n, k = 150, 33
    nonl = partial(hc.nonl_loss, backend="triton")
    both = partial(nonl, anchor="both")
    for d, dtype in ((40, torch.float32), (40, torch.float16), (300, torch.bfloat16)):
        leaves, y = forms.inputs("nonl", n, k, d, device=this_device(), dtype=dtype)
        y[::7] = -100
        yield partial(forms.step, both, leaves, y)
        yield partial(forms.step, partial(hc.normface_loss, backend="triton"), leaves, y)
        samples, classes = forms.inputs("supcon", n, k, d, device=this_device(), dtype=dtype)
        yield partial(forms.step, partial(hc.supcon_loss, backend="triton"), samples, classes)
        yield partial(forms.step, partial(hc.supcon_loss, variant="in", backend="triton"), samples, classes)
        yield partial(forms.step, partial(hc.supcon_loss, temperature=0.01, backend="triton"), samples, classes)
    leaves, y = forms.inputs("nonl", n, k, 40, device=this_device())

    def terms(*inputs: Tensor) -> Tensor:
        """One a sample, which no kernel of the loss adds up, and class means."""
        means = hc.ClassMeans(k, 40).to(inputs[0].device)
        return both(*inputs, class_means=means, reduction="none").sum()

    yield partial(forms.step, terms, leaves, y)
    mask = torch.rand(n, n, device=this_device()) < 0.2
    yield partial(forms.step, lambda z, _: hc.supcon_loss(z, mask=mask, backend="triton"), leaves[:1], y)
    others, other_y = leaves[1], torch.arange(k, device=this_device())
    yield partial(
        forms.step,
        lambda z, w, y: hc.supcon_loss(z, y, ref_features=w, ref_labels=other_y, backend="triton"),
        (leaves[0], others), y,
    )  # fmt: skip
    # The smallest sizes of which a loss has parts to add up, a forward keeps exponentials, and skips absent classes.
    yield partial(forms.step, both, *forms.inputs("nonl", 5000, k, 40, device=this_device(), dtype=torch.float16))
    yield partial(forms.step, nonl, *forms.inputs("nonl", 4096, 1024, 1024, device=this_device(), dtype=torch.bfloat16))
    yield partial(forms.step, nonl, *forms.inputs("nonl", 300, 60_000, 256, device=this_device(), dtype=torch.bfloat16))


def index_range(folder: Path, rehearse: bool) -> bool:
    """As many at once as 60 GiB of the GPU's memory hold."""
    return side_by_side("indices", rehearse, INDEXED_AT_ONCE)


def indexed(rehearse: bool) -> Iterator[Callable[[], bool]]:
    dtype = torch.float16 if rehearse else torch.bfloat16
    for op, k, d in INDEXED:
        n = 2**31 // max(k, d) + BEYOND
        yield partial(equals_float64, op, *((1000, min(k, 16), min(d, 264)) if rehearse else (n, k, d)), dtype)
    for op, n, k, d in COPIED:
        torch.cuda.empty_cache()  # of a call before
        yield partial(
            copies_equal_float64, op, *((150, 150 + 100 * (k > n), min(d, 264)) if rehearse else (n, k, d)), dtype
        )


def equals_float64(op: str, n: int, k: int, d: int, dtype: torch.dtype) -> bool:
    """Whether loss and gradients of n samples z and k anchors w are; in blocks of samples and anchor by anchor, since
    an index that wraps spoils few of them. The last samples are a class of their own, and alone at another's anchor:
    few of so many would not be missed in a sum over all, but in the gradient of their anchor, and in the log-sum-exp of
    the one where they lie.

    Both losses are Σ_c v_c (log Σ_j exp(s_cj) - mean of s_cj over class c). NTCE's anchors are the prototypes, v_c the
    classes' shares of the samples, where one class weighs nothing; SupCon's are one sample a class with n references,
    all v_c the same.
    """
    g = torch.Generator(this_device()).manual_seed(0)
    z, w = (torch.randn(rows, d, generator=g, device=this_device(), dtype=dtype) for rows in (n, k))
    y = torch.randint(1, k, (n,), generator=g, device=this_device())
    y[-max(1, min(BEYOND, n // 200)) :] = 0
    z += w.roll(1, 0)[y]  # at another class's anchor, so that no gradient is little more than noise
    counts = torch.bincount(y, minlength=k).double()
    if op == "ntce":
        weight = torch.ones(k, device=w.device)
        weight[1] = 0
        v, loss = weight * counts / weight[y].sum(), partial(forms.ours(op, "triton"), weight=weight)
    else:
        v, supcon = torch.full_like(counts, 1 / k), forms.ours(op, "triton")
        loss = lambda z, w, y: supcon(w, torch.arange(k, device=w.device), ref_features=z, ref_labels=y)  # noqa: E731
    hc.set_memory_budget(2 * k * (n + 64) if k > d else 0)
    value, grad_z, grad_w = forms.step(loss, (z.requires_grad_(), w.requires_grad_()), y)

    def logits(block: Tensor) -> Tensor:
        return reference.unit_rows(anchors) @ reference.unit_rows(block).T / TAU

    anchors = w.detach().double().requires_grad_()
    blocks = [x.detach().split(INDEXED_BLOCK) for x in (z, grad_z, y)]
    with torch.no_grad():
        sums = sum(logits(block.double()).exp().sum(1) for block in blocks[0])
    want, errors = (v * sums.log()).sum(), []
    for block, grad, own in zip(*blocks, strict=True):
        samples = block.double().requires_grad_()
        s = logits(samples)
        positives = ((v / counts)[own] * s.T.gather(1, own[:, None])[:, 0]).sum()
        (((v / sums) @ s.exp()).sum() - positives).backward()  # the gradient of v log Σ exp(s) is that of v/Σ exp(s)
        want -= positives.detach()
        errors.append(relative(grad, samples.grad))
    found = {
        "loss": relative(value, want),
        "samples": torch.stack(errors).max(),
        "anchors": relative(grad_w, anchors.grad, 1),
    }
    return within(f"{op} {n} x {k} x {d}, {n * max(k, d) / 2**31:.4f} x 2^31", found)


def copies_equal_float64(op: str, n: int, k: int, d: int, dtype: torch.dtype) -> bool:
    """The same of n samples of a class each, the last n of k (supcon: of n samples against themselves), row by row.

    Float64 cannot do n x k logits, but here the rows are copies of few vectors: it does one of each, with the number of
    its copies, and a copy's gradient is its share of the vector's. The last rows of either side are copies of one, the
    neighbour of another vector on the other side, whose log-sum-exp is mostly theirs.
    """
    g = torch.Generator(this_device()).manual_seed(0)
    last = max(1, min(BEYOND, n // 200))
    own = torch.arange(n, device=this_device()) % COPIES_OF
    own[-last:] = COPIES_OF
    w_kind = torch.cat([COPIES_OF + 1 + torch.arange(k - n, device=own.device) % ABSENT_COPIES_OF, own])
    z, w = (
        torch.randn(rows, d, generator=g, device=this_device(), dtype=dtype) / 16  # or float16's gradients would vanish
        for rows in (COPIES_OF + 1, int(w_kind.max()) + 1)
    )
    z += (z if op == "supcon" else w[: len(z)]).roll(1, 0)
    several_z, several_w = (torch.bincount(kind).double() for kind in (own, w_kind))
    y = own // 2 if op == "supcon" else torch.arange(k - n, k, device=own.device)
    kinds, vectors = ((own,), (z,)) if op == "supcon" else ((own, w_kind), (z, w))
    hc.set_memory_budget(0)
    leaves = [x[kind].requires_grad_() for x, kind in zip(vectors, kinds, strict=True)]
    value, *gradients = forms.step(forms.ours(op, "triton"), leaves, y)

    wide = [x.double().requires_grad_() for x in vectors]
    s = reference.unit_rows(wide[-1]) @ reference.unit_rows(wide[0]).T / TAU
    own_logits = s.diagonal()
    if op == "supcon":
        group = torch.arange(len(s), device=s.device) // 2
        same = (group[:, None] == group).double()
        lse = (s.exp() @ several_z - own_logits.exp()).log()
        positives = ((same * s) @ several_z - own_logits) / (same @ several_z - 1)
    else:
        lse, positives = (several_w @ s.exp()).log(), own_logits
    want = (lse - positives) @ several_z / n
    want.backward()
    found = {"loss": relative(value, want.detach())}
    for name, x, kind, grad in zip(("samples", "classes"), wide, kinds, gradients, strict=False):
        of_copy = x.grad / torch.bincount(kind).double()[:, None]
        blocks = zip(grad.split(2**25 // d), kind.split(2**25 // d), strict=True)
        found[name] = torch.stack([relative(block, of_copy[part], 1) for block, part in blocks]).max()
    return within(f"{op} {n} x {k} x {d} of copies, {max(n, k) * d / 2**31:.4f} x 2^31", found)


def relative(got: Tensor, want: Tensor, dim: int | None = None) -> Tensor:
    """The largest relative error; of what must be zero, zero or infinite."""
    distance, size = (x.norm(dim=dim) for x in (got.double() - want, want))
    return torch.where((distance == 0) & (size == 0), 0.0, distance / size).max()


def within(what: str, found: dict[str, Tensor]) -> bool:
    """Whether the loss and all gradients are, after telling how far off they are."""
    off = {name: x.item() for name, x in found.items()}
    print(f"    {what}: " + ", ".join(f"{name} off by {x:.1e}" for name, x in off.items()), flush=True)
    return off["loss"] < 1e-3 and all(x < INDEXED_ERROR for x in off.values())


def measured(folder: Path, rehearse: bool) -> bool:
    """The standard cases, a second of rounds each."""
    csv_file = folder / "matrix.csv"
    if rehearse:
        os.environ["HYPERCONTRAST_BACKEND"] = "triton"
        outcome = matrix.measure_all(SMALL, csv_file, "cpu", 0, memory=False)
        del os.environ["HYPERCONTRAST_BACKEND"]
    else:
        outcome = matrix.measure_all(matrix.standard_gpu(), csv_file, "cuda", 1.0, limit=MATRIX_SECONDS)
    print(matrix.headlines(outcome.rows))
    for path in plot.draw_beside(csv_file):
        print("   ", path.name)
    return not outcome.wrong and all(row.repeats is not False for row in outcome.rows if row.form == OURS)


def determinism(folder: Path, rehearse: bool) -> bool:
    """Compared on the device, which is asked once a case: a wait between repeats would hide what depends on timing."""
    if not side_by_side("determinism", rehearse):
        print("    the kernels fail")
        return False
    repeats = 3 if rehearse else REPEATS
    equal = True
    for name, step in repeated(rehearse):
        differing = different_repeats(step, repeats)
        print(f"    {name}: {differing} of {repeats} repeats differ", flush=True)
        equal &= differing == 0
    return equal


def repeated(rehearse: bool) -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    losses = {name: forms.ours(name, "triton") for name in forms.EAGER}
    losses |= {f"nonl-{anchor}": partial(losses["nonl"], anchor=anchor) for anchor in ("sample", "both")}
    # Narrow and wide; wide with the exponentials kept; float32, whose products are three.
    shapes = [((1000, 300, 128), "bfloat16"), ((1000, 300, 500), "float32"), ((4096, 1000, 1100), "bfloat16")]
    cases = [((40, 9, 24), "float16")] if rehearse else shapes
    for (shape, dtype), (name, loss) in itertools.product(cases, losses.items()):
        leaves, y = forms.inputs(name.split("-")[0], *shape, device=this_device(), dtype=forms.DTYPES[dtype])
        yield f"{name} {' x '.join(map(str, shape))} {dtype}", partial(forms.step, loss, leaves, y)


def different_repeats(run: Callable[[], Sequence[Tensor]], repeats: int) -> int:
    """How many times the outputs had other bits than the first time."""
    first = [bits(x).clone() for x in run()]
    again = replayed(run) if first[0].is_cuda else run
    differing = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(repeats):
        differing += torch.stack([(bits(a) != b).any() for a, b in zip(again(), first, strict=True)]).any()
    return int(differing)


def replayed(run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """`run` as a CUDA graph: the host would take longer than the kernels whose order in time is to vary."""
    outputs: list[Sequence[Tensor]] = []
    replay = captured(lambda: outputs.append(run()))

    def again() -> Sequence[Tensor]:
        replay()
        return outputs[-1]

    return again


def driver(folder: Path, rehearse: bool) -> bool | str:
    """Whole runs, though of a few steps: most of the driver comes after them."""
    from bench import step
    from hypercontrast.evaluate import Options, evaluate
    from hypercontrast.train import train

    if missing := step.missing("safetensors"):
        return missing
    passed = True
    with tempfile.TemporaryDirectory() as place:
        pictures_of_noise(Path(place, "pictures"))
        shared = {"dataset": f"folder:{place}/pictures", "model": "resnet18", "width": 8 if rehearse else 64}
        shared |= {"epochs": 1, "warmup_epochs": 0, "batch_size": 32, "compile": "off", "quiet": True}
        for loss, options in (("nonl", {"temperature_rule": "learned", "queue": 32}), ("scl", {})):
            run = train(configure(loss=loss, run_dir=f"{place}/{loss}", **shared, **options))
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            results = evaluate(Options(str(run), cached=True, quiet=True))["results"]
            numbers = [*lines[0].values(), *(result["accuracy"] for result in results)]
            passed &= all(map(math.isfinite, numbers)) and (run / "report.html").exists()
            told = ", ".join(f"{result['method']} {result['accuracy']:.0%}" for result in results)
            print(f"    {loss}: loss {lines[0]['loss']:.3f}, {lines[0]['seconds']:.1f} s; of noise: {told}", flush=True)
    return passed


def pictures_of_noise(root: Path) -> None:
    """Four classes of 40 pictures to train on and 10 to validate, [32, 32, 3]."""
    from PIL import Image

    g = torch.Generator().manual_seed(0)
    for split, pictures in (("train", 40), ("val", 10)):
        for label in range(4):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(pictures):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=g, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")


def training(folder: Path, rehearse: bool) -> bool | str:
    """The driver's steps; one that waits for the device raises."""
    from bench import step

    if missing := step.missing():
        return missing
    pictures, steps, options = (64, 2, {"batch_size": 32, "width": 8}) if rehearse else (50_000, 200, {})
    runs = [("nonl", "off")] if rehearse else [("nonl", "off"), ("nonl", "on"), ("scl", "on")]
    table = folder / "training.csv"
    table.unlink(missing_ok=True)
    for loss, mode in runs:
        row = step.measure(f"cifar10-{loss}", pictures, steps, compile=mode, **options).flat()
        print("    " + "  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        record.append(table, row)
    return True


class Stage(NamedTuple):
    work: Callable[[Path, bool], bool | str]
    seconds: float


STAGES = {
    "correctness": Stage(correctness, 120),
    "extension": Stage(extension, 65),
    "indices": Stage(index_range, 50),
    "matrix": Stage(measured, 105),
    "determinism": Stage(determinism, 50),
    "driver": Stage(driver, 40),
    "training": Stage(training, 80),
    "sanitizer": Stage(sanitizer, 90),
}
# What of a stage runs in processes side by side; False: failed.
CALLS: dict[str, Callable[[bool], Iterable[Callable[[], Any]]]] = {
    "indices": indexed,
    "determinism": lambda rehearse: (step for _, step in repeated(rehearse)),
    "sanitizer": lambda rehearse: watched(),
}
LEFT_OUT = "left out: "


def verdict_of(name: str, folder: Path, rehearse: bool) -> str:
    """Of the stage in a process group of its own, so that none of its processes outlives its seconds."""
    command = [sys.executable, "-m", "bench.gpu_check", "--inside", name, "--output", str(folder)]
    limit, said = STAGES[name].seconds, folder / f"{name}.txt"
    tee = subprocess.Popen(["tee", str(said)], stdin=subprocess.PIPE)
    process = subprocess.Popen(
        [*command, *["--rehearse"] * rehearse], cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=tee.stdin, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
    )  # fmt: skip
    try:
        status: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        tee.communicate()
    reasons = [line.strip() for line in said.read_text().splitlines() if line.strip().startswith(LEFT_OUT)]
    verdicts = {None: f"FAILED: cut off after {limit:g} s", 0: "passed", 1: "FAILED", 3: "".join(reasons)}
    return verdicts.get(status) or f"FAILED: ended with {status}"


def inside(name: str, folder: Path, rehearse: bool) -> int:
    """The stage itself; the exit status says how it went, the last line why it was left out."""
    passed = STAGES[name].work(folder, rehearse)
    if isinstance(passed, str):
        print(f"    {LEFT_OUT}{passed}")
        return 3
    return 0 if passed else 1


def environment() -> str:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "numpy")}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: a rehearsal in the interpreter"
    lines = {"device": machine, "python": sys.version.split()[0], **versions, "commit": record.commit()}
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="NAME", help="default: all"
    )
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--output", type=Path, help="default: a new folder, bench/results/DATE-DEVICE")
    parser.add_argument("--inside", choices=STAGES, help=argparse.SUPPRESS)  # one stage, in this process
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)  # a stage, and which of how many parts of its calls
    args = parser.parse_args(argv)
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # it computes with NumPy, which warns of infinities
    if args.once:
        name, part, parts = args.once
        calls = itertools.islice(CALLS[name](args.rehearse), int(part), None, int(parts))
        return int(any([call() is False for call in calls]))
    if args.inside:
        return inside(args.inside, args.output, args.rehearse)
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu-check needs a GPU; --rehearse walks its stages on the CPU", file=sys.stderr)
        return 2
    machine = "rehearsal" if args.rehearse else torch.cuda.get_device_name()
    folder = (args.output or new_folder(machine, "bench/results")).absolute()
    try:
        writable(folder / "environment.txt").write_text(environment())
    except UsageError as error:
        return fail(2, str(error))
    print(environment(), end="")
    failed = False
    for name in args.stages:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        verdict = verdict_of(name, folder, args.rehearse)
        failed |= verdict.startswith("FAILED")
        line = f"{name}: {verdict} ({time.perf_counter() - start:.0f} s)"
        print(line, flush=True)
        with (folder / "verdicts.txt").open("a") as file:  # with --output other stages may have run before
            file.write(f"{line}\n")
    print(f"results in {folder}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
