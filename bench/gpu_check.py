"""Everything that needs a GPU, in one command that fits ten minutes: `make gpu-check`.

correctness   120 s  the tests of kernels and losses with their quick fuzz: every loss against float64 at float32,
                     bfloat16 and float16, odd shapes, near collapse, no host sync, CUDA graphs, a hundred steps
extension      80 s  the negative buffer's extension is built and tested: its kernel, streams, NCCL, ranks that share a
                     GPU
indices        30 s  an input past 2^31 elements, against float64
matrix        120 s  the standard cases of `python -m bench` with all peers there are, what matters most first; what
                     would begin late is named and left out
determinism    40 s  1,000 repeats of forward and backward of every loss, on each way through the kernels: the same bits
training       80 s  seconds per epoch of the CIFAR-10 recipes, compiled and not, with no step that waits for the device
sanitizer     100 s  compute-sanitizer's memcheck, racecheck and initcheck over every kernel, without the caching
                     allocator

Each stage is a process of its own, ended after its seconds: it then counts as not passed, with what it has told until
then. --stages runs some alone. Their output goes to bench/results/DATE-DEVICE/, a line as it comes to the terminal; the
exit code is 0 when all that ran passed. Needs torch, triton, pytest and the checkout alone; with pytest-xdist the tests
run side by side, pictures need matplotlib. Without a GPU, --rehearse walks the same stages on the CPU at small sizes,
in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hypercontrast as hc
from bench import forms, matrix
from bench.matrix import Entry
from bench.measure import captured
from bench.peers import OURS
from bench.record import Case
from hypercontrast import reference

ROOT = Path(__file__).parents[1]
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
MATRIX_SECONDS = 100
REPEATS = 1000
COMPILERS = 6
# What a rehearsal measures in the place of the standard cases.
SMALL = [
    *(Entry(Case(op, 64, 20, 48)) for op in forms.PROTOTYPE_LOSSES),
    Entry(Case("supcon", 64, 5, 24)),
    Entry(Case("ntce", 40, 130, 24, features="collapsed"), ()),
    Entry(Case("buffer", 16, 64, 24)),
]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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


def run_tests(tests: Sequence[str], selection: Sequence[str], log: Path) -> int:
    command = [sys.executable, "-m", "pytest", *tests, *selection, "-q", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and torch.cuda.is_available():
        workers = max(2, min(12, (os.cpu_count() or 2) - 2))
        command += ["-n", str(workers), "--maxschedchunk", "1"]  # one by one: what compiles most comes first
    return run([*command, "-p", "bench.failures"], log, shown=("FAILURE ", "E  "))


# The stages. True: passed. None: cannot be done here


def correctness(folder: Path, rehearse: bool) -> bool:
    """Tests marked slow take many minutes: `pytest -m slow` with these files has them."""
    selection = ["-k", "test_triton and repeats"] if rehearse else ["-k", ON_THE_GPU]
    return run_tests(TESTS, ["-m", "not slow", *selection], folder / "correctness.log") == 0


def extension(folder: Path, rehearse: bool) -> bool:
    """Build the negative buffer's extension, then its tests: kernel, streams, collectives, its Python twin."""
    log = folder / "extension.log"
    built = run([sys.executable, "setup.py", "build_ext", "--inplace"], log) == 0
    print("    built" if built else "    not built", flush=True)
    selection = ["-k", "ring or normal"] if rehearse else ["-m", ""]
    return run_tests(("tests/test_buffer.py", "tests/test_gather.py"), selection, log) == 0 and built


def sanitizer(folder: Path, rehearse: bool) -> bool | None:
    """All checks at once, after processes without them have compiled the kernels, each a part, into Triton's cache."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if rehearse or not Path(tool).exists():
        return None
    once = [sys.executable, "-m", "bench.gpu_check", "--once"]
    compiling = [subprocess.Popen([*once, str(part), str(COMPILERS)], cwd=ROOT) for part in range(COMPILERS)]
    if any([process.wait() for process in compiling]):
        print("    the kernels fail without a check")
        return False
    checks = {}
    for check in ("memcheck", "racecheck", "initcheck"):
        with (folder / f"{check}.log").open("w") as log:
            checks[check] = subprocess.Popen(
                [tool, f"--tool={check}", "--error-exitcode=9", *once, "0", "1"], cwd=ROOT, stdout=log,
                stderr=subprocess.STDOUT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )  # fmt: skip
    clean = {check: process.wait() == 0 for check, process in checks.items()}
    for check, is_clean in clean.items():
        print(f"    {check}: {'clean' if is_clean else f'see {check}.log'}")
    return all(clean.values())


def every_kernel() -> Iterator[Callable[[], Any]]:
    """Calls that launch every kernel between them, on odd sizes with ignored labels: what the sanitizer watches."""
    n, k = 150, 33
    nonl = partial(hc.nonl_loss, backend="triton")
    both = partial(nonl, anchor="both")
    for d, dtype in ((40, torch.float32), (40, torch.float16), (300, torch.bfloat16)):
        leaves, y = forms.inputs("nonl", n, k, d, device=device(), dtype=dtype)
        y[::7] = -100
        yield partial(forms.step, both, leaves, y)
        yield partial(forms.step, partial(hc.normface_loss, backend="triton"), leaves, y)
        samples, classes = forms.inputs("supcon", n, k, d, device=device(), dtype=dtype)
        yield partial(forms.step, partial(hc.supcon_loss, backend="triton"), samples, classes)
        yield partial(forms.step, partial(hc.supcon_loss, variant="in", backend="triton"), samples, classes)
        yield partial(forms.step, partial(hc.supcon_loss, temperature=0.01, backend="triton"), samples, classes)
    leaves, y = forms.inputs("nonl", n, k, 40, device=device())

    def terms(*inputs: Tensor) -> Tensor:
        """One a sample, which no kernel of the loss adds up, and class means."""
        means = hc.ClassMeans(k, 40).to(inputs[0].device)
        return both(*inputs, class_means=means, reduction="none").sum()

    yield partial(forms.step, terms, leaves, y)
    mask = torch.rand(n, n, device=device()) < 0.2
    yield partial(forms.step, lambda z, _: hc.supcon_loss(z, mask=mask, backend="triton"), leaves[:1], y)
    others, other_y = leaves[1], torch.arange(k, device=device())
    yield partial(
        forms.step,
        lambda z, w, y: hc.supcon_loss(z, y, ref_features=w, ref_labels=other_y, backend="triton"),
        (leaves[0], others), y,
    )  # fmt: skip
    # The smallest sizes of which a loss has parts to add up, a forward keeps exponentials, and skips absent classes.
    yield partial(forms.step, both, *forms.inputs("nonl", 5000, k, 40, device=device(), dtype=torch.float16))
    yield partial(forms.step, nonl, *forms.inputs("nonl", 4096, 1024, 1024, device=device(), dtype=torch.bfloat16))
    yield partial(forms.step, nonl, *forms.inputs("nonl", 300, 60_000, 256, device=device(), dtype=torch.bfloat16))


def index_range(folder: Path, rehearse: bool) -> bool:
    """Features past 2^31 elements; the row sums of a few classes in float64, a block of samples at a time."""
    n, d = (1 << 10, 64) if rehearse else ((1 << 31) // 4096 + 1000, 4096)
    dtype = torch.float32 if rehearse else torch.bfloat16
    g = torch.Generator(device()).manual_seed(0)
    z = torch.randn(n, d, generator=g, device=device(), dtype=dtype)
    w = torch.randn(64, d, generator=g, device=device(), dtype=dtype)
    y = torch.randint(0, 64, (n,), generator=g, device=device())
    loss = hc.ntce_loss(z, w, y, temperature=TAU, backend="triton").item()
    unit_w, sums, positives = reference.unit_rows(w.double()), 0.0, 0.0
    for part in torch.arange(n, device=device()).split(8192):
        s = unit_w @ reference.unit_rows(z[part].double()).T / TAU
        sums, positives = sums + s.exp().sum(1), positives + s.T.gather(1, y[part, None]).sum()
    counts = torch.bincount(y, minlength=64)
    want = (((counts * sums.log()).sum() - positives) / n).item()
    print(f"    {n} x {d} = {n * d / 2**31:.3f} x 2^31 elements: {loss:.6f}, in float64 {want:.6f}")
    return abs(loss - want) < 1e-3 * abs(want)


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
    for path in matrix.draw(csv_file):
        print("   ", path.name)
    return not outcome.wrong and all(row.repeats is not False for row in outcome.rows if row.form == OURS)


def determinism(folder: Path, rehearse: bool) -> bool:
    """Compared on the device, which is asked once a case: a wait between repeats would hide what depends on timing."""
    repeats = 3 if rehearse else REPEATS
    losses = {name: forms.ours(name, "triton") for name in forms.EAGER}
    losses |= {f"nonl-{anchor}": partial(losses["nonl"], anchor=anchor) for anchor in ("sample", "both")}
    # Narrow and wide; wide with the exponentials kept; float32, whose products are three.
    shapes = [((1000, 300, 128), "bfloat16"), ((1000, 300, 500), "float32"), ((4096, 1000, 1100), "bfloat16")]
    cases = [((40, 9, 24), "float16")] if rehearse else shapes
    equal = True
    for (shape, dtype), (name, loss) in itertools.product(cases, losses.items()):
        leaves, y = forms.inputs(name.split("-")[0], *shape, device=device(), dtype=forms.DTYPES[dtype])
        differing = different_repeats(partial(forms.step, loss, leaves, y), repeats)
        print(f"    {name} {' x '.join(map(str, shape))} {dtype}: {differing} of {repeats} repeats differ", flush=True)
        equal &= differing == 0
    return equal


def different_repeats(run: Callable[[], Sequence[Tensor]], repeats: int) -> int:
    """How many times the outputs had other bits than the first time."""
    first = [_bits(x).clone() for x in run()]
    again = replayed(run) if first[0].is_cuda else run
    differing = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(repeats):
        differing += torch.stack([(_bits(a) != b).any() for a, b in zip(again(), first, strict=True)]).any()
    return int(differing)


def replayed(run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """`run` as a CUDA graph: the host would take longer than the kernels whose order in time is to vary."""
    outputs: list[Sequence[Tensor]] = []
    replay = captured(lambda: outputs.append(run()))

    def again() -> Sequence[Tensor]:
        replay()
        return outputs[-1]

    return again


def _bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def training(folder: Path, rehearse: bool) -> bool:
    """The driver's steps; one that waits for the device raises."""
    # PyYAML and torchvision are the driver's, and part of the usual GPU image.
    if missing := [name for name in ("yaml", "torchvision") if importlib.util.find_spec(name) is None]:
        print(f"    needs {' and '.join(missing)}")
        return False
    from bench.step import measure

    pictures, steps, options = (64, 2, {"batch_size": 32, "width": 8}) if rehearse else (50_000, 200, {})
    rows = []
    for loss, mode in [("nonl", "off")] if rehearse else [("nonl", "off"), ("nonl", "on"), ("scl", "on")]:
        rows.append(measure(f"cifar10-{loss}", pictures, steps, compile=mode, **options).flat())
        print("    " + "  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    with (folder / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return True


class Stage(NamedTuple):
    work: Callable[[Path, bool], bool | None]
    seconds: float


STAGES = {
    "correctness": Stage(correctness, 120),
    "extension": Stage(extension, 80),
    "indices": Stage(index_range, 30),
    "matrix": Stage(measured, 120),
    "determinism": Stage(determinism, 40),
    "training": Stage(training, 80),
    "sanitizer": Stage(sanitizer, 100),
}
VERDICTS = {0: "passed", 1: "FAILED", 3: "not run: needs a GPU and compute-sanitizer"}


def verdict_of(name: str, folder: Path, rehearse: bool) -> str:
    """Of the stage in a process group of its own, so that none of its processes outlives its seconds."""
    command = [sys.executable, "-m", "bench.gpu_check", "--inside", name, "--output", str(folder)]
    limit = STAGES[name].seconds
    process = subprocess.Popen([*command, *["--rehearse"] * rehearse], cwd=ROOT, preexec_fn=os.setpgrp)
    try:
        return VERDICTS.get(process.wait(limit), f"FAILED: ended with {process.returncode}")
    except subprocess.TimeoutExpired:
        return f"FAILED: cut off after {limit:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def inside(name: str, folder: Path, rehearse: bool) -> int:
    """The stage itself; the exit status says how it went."""
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # it computes with NumPy, which warns of infinities
    return {True: 0, False: 1, None: 3}[STAGES[name].work(folder, rehearse)]


def environment() -> str:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "numpy")}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: a rehearsal in the interpreter"
    lines = {
        "device": machine,
        "python": sys.version.split()[0],
        **versions,
        "commit": commit.stdout.strip() or "unknown",
    }
    return "".join(f"{key}: {value}\n" for key, value in lines.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="NAME", help="default: all"
    )
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--output", type=Path, help="folder of the results (default: bench/results/DATE-DEVICE)")
    parser.add_argument("--inside", choices=STAGES, help=argparse.SUPPRESS)  # one stage, in this process
    parser.add_argument("--once", nargs=2, type=int, help=argparse.SUPPRESS)  # a part of what the sanitizer runs
    args = parser.parse_args(argv)
    if args.once:
        part, parts = args.once
        for call in itertools.islice(every_kernel(), part, None, parts):
            call()
        return 0
    if args.inside:
        return inside(args.inside, args.output, args.rehearse)
    if not args.rehearse and not torch.cuda.is_available():
        print("gpu-check needs a GPU; --rehearse walks its stages on the CPU", file=sys.stderr)
        return 2
    machine = "rehearsal" if args.rehearse else torch.cuda.get_device_name().replace(" ", "-")
    folder = (args.output or ROOT / "bench" / "results" / f"{time.strftime('%Y-%m-%d')}-{machine}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.txt").write_text(environment())
    print(environment(), end="")
    verdicts = {}
    for name in args.stages:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        verdicts[name] = verdict_of(name, folder, args.rehearse)
        print(f"{name}: {verdicts[name]} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"results in {folder}")
    return int(any(verdict.startswith("FAILED") for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
