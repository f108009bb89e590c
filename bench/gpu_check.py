"""Everything that needs a GPU, in one command that fits ten minutes: `make gpu-check`.

1. correctness   tests/test_triton*.py with their long fuzz: every loss against float64 at float32, bfloat16 and
                 float16, odd shapes, near collapse, bitwise repeats, no host sync
2. extension     the negative buffer's extension is built and tested: its kernel, streams, NCCL, ranks that share a GPU
3. large index   an input past 2^31 elements, against float64
4. matrix        forward and forward + backward against eager and torch.compile, with errors and peak memory
5. training      seconds per epoch of the CIFAR-10 recipes, compiled and not, with no step that waits for the device
6. sanitizer     compute-sanitizer's memcheck, racecheck and initcheck over every kernel, without the caching allocator

Each stage's output goes to bench/results/DATE-DEVICE/ and its verdict to the terminal; the exit code is 0 when all that
ran passed. Needs torch, triton, pytest and the checkout alone. Without a GPU, --rehearse walks the same stages on the
CPU at small sizes, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import hypercontrast as hc
from bench import forms
from hypercontrast import reference

ROOT = Path(__file__).parents[1]
TAU = forms.TAU
TESTS = ("tests/test_triton.py", "tests/test_triton_supcon.py")
# (M, K, D): large batch of wide features, large batch of narrow ones, many classes, small.
SHAPES = [(4096, 1000, 2048), (65536, 1000, 128), (32768, 100_000, 512), (256, 1000, 2048)]
SMALL_SHAPES = [(64, 20, 48), (40, 130, 24)]
# (A, K, D) of samples against each other.
PAIRS = [(8192, 100, 128), (65536, 1000, 128), (262144, 1000, 128)]
SMALL_PAIRS = [(64, 5, 24)]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )


def correctness(folder: Path, rehearse: bool) -> bool:
    selection = ["-m", "not slow", "-k", "fuzz or repeats"] if rehearse else ["-m", ""]
    run = python("-m", "pytest", *TESTS, "-q", "-p", "no:cacheprovider", *selection)
    (folder / "correctness.log").write_text(run.stdout + run.stderr)
    print("   ", run.stdout.strip().splitlines()[-1])
    return run.returncode == 0


def extension(folder: Path, rehearse: bool) -> bool:
    """Build the negative buffer's extension, then its tests: kernel, streams, collectives, its Python twin."""
    build = python("setup.py", "build_ext", "--inplace")
    selection = ["-k", "ring or normal"] if rehearse else ["-m", ""]
    run = python(
        "-m", "pytest", "tests/test_buffer.py", "tests/test_gather.py", "-q", "-p", "no:cacheprovider", *selection
    )
    (folder / "extension.log").write_text(build.stdout + build.stderr + run.stdout + run.stderr)
    print("   ", "built;" if build.returncode == 0 else "not built;", run.stdout.strip().splitlines()[-1])
    return build.returncode == 0 and run.returncode == 0


def sanitizer(folder: Path, rehearse: bool) -> bool | None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if rehearse or not Path(tool).exists():
        return None
    good = True
    for check in ("memcheck", "racecheck", "initcheck"):
        command = [tool, f"--tool={check}", "--error-exitcode=9", sys.executable, "-m", "bench.gpu_check", "--once"]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
        (folder / f"{check}.log").write_text(run.stdout + run.stderr)
        print(f"    {check}: {'clean' if run.returncode == 0 else 'see ' + check + '.log'}")
        good &= run.returncode == 0
    return good


def every_kernel_once() -> None:
    """What the sanitizer watches: narrow and wide, every rule, ignored labels, odd sizes."""
    for d, dtype, name in itertools.product((40, 300), (torch.float32, torch.bfloat16), forms.EAGER):
        leaves, y = forms.inputs(name, 150, 33, d, device=device(), dtype=dtype)
        if name in forms.PROTOTYPE_LOSSES:
            y[::7] = -100
        forms.step(forms.ours(name, "triton"), leaves, y)


def large_index(folder: Path, rehearse: bool) -> bool:
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


def milliseconds(run: Callable, rounds: int) -> float:
    """Median by device events on a GPU, by the clock elsewhere."""
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def error(name: str, form: Callable, m: int, k: int, d: int, dtype: torch.dtype, spread: float | None) -> float:
    """Largest relative error of loss and gradients against float64, at a size that float64 can do."""
    leaves, y = forms.inputs(name, min(m, 2048), min(k, 2000), d, spread=spread, device=device(), dtype=dtype)
    return forms.relative_error(name, form, leaves, y)


def measured(name: str, fn: Callable, m: int, k: int, d: int, dtype: torch.dtype, rounds: int) -> dict:
    """Times, memory and errors of one form of a loss; running out of memory is a result."""
    leaves, y = forms.inputs(name, m, k, d, device=device(), dtype=dtype)
    row: dict = {}
    try:
        forms.step(fn, leaves, y)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            forms.step(fn, leaves, y)
            row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        with torch.no_grad():
            row["fwd_ms"] = round(milliseconds(lambda: fn(*leaves, y), rounds), 4)
        row["fwd_bwd_ms"] = round(milliseconds(lambda: forms.step(fn, leaves, y), rounds), 4)
        columns = k if name in forms.PROTOTYPE_LOSSES else m
        row["tflops"] = round(6 * m * columns * d / row["fwd_bwd_ms"] / 1e9, 1)
        row["error"] = error(name, fn, m, k, d, dtype, None)
        row["error_collapse"] = error(name, fn, m, k, d, dtype, 0.1)
    except torch.cuda.OutOfMemoryError:
        row["fwd_bwd_ms"] = "out of memory"
    return row


def forms_of(name: str, rehearse: bool) -> dict[str, Callable]:
    """The best eager form, that compiled, and ours."""
    eager = list(forms.EAGER[name].values())[-1]
    found = {"eager": eager, "ours": forms.ours(name, "triton")}
    if not rehearse:
        torch._dynamo.reset()
        found["compiled"] = torch.compile(eager)
    return found


def matrix(folder: Path, rehearse: bool) -> bool:
    dtype, rounds = (torch.float32, 2) if rehearse else (torch.bfloat16, 50)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    columns = [
        "loss", "form", "m", "k", "d", "dtype", "fwd_ms", "fwd_bwd_ms", "tflops", "peak_mib", "error", "error_collapse",
    ]  # fmt: skip
    cases = list(itertools.product(forms.PROTOTYPE_LOSSES, SMALL_SHAPES if rehearse else SHAPES))
    cases += [("supcon", shape) for shape in (SMALL_PAIRS if rehearse else PAIRS)]
    good = True
    with (folder / "matrix.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for name, (m, k, d) in cases:
            for form, fn in forms_of(name, rehearse).items():
                row = {"loss": name, "form": form, "m": m, "k": k, "d": d, "dtype": str(dtype)}
                row |= measured(name, fn, m, k, d, dtype, rounds)
                writer.writerow(row)
                print("    " + "  ".join(f"{c}={row[c]}" for c in columns if c in row), flush=True)
                if form == "ours":
                    good &= max(row.get("error", torch.inf), row.get("error_collapse", torch.inf)) < bound
    return good


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


STAGES = {
    "correctness": correctness,
    "extension": extension,
    "large index": large_index,
    "matrix": matrix,
    "training": training,
    "sanitizer": sanitizer,
}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--output", type=Path, help="folder of the results (default: bench/results/DATE-DEVICE)")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # what the sanitizer runs
    args = parser.parse_args()
    if args.once:
        every_kernel_once()
        return 0
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("gpu-check needs a GPU; --rehearse walks its stages on the CPU", file=sys.stderr)
        return 2
    machine = "rehearsal" if args.rehearse else torch.cuda.get_device_name().replace(" ", "-")
    folder = args.output or ROOT / "bench" / "results" / f"{time.strftime('%Y-%m-%d')}-{machine}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.txt").write_text(environment())
    print(environment(), end="")
    verdicts: dict[str, bool | None] = {}
    for name, stage in STAGES.items():
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        verdicts[name] = stage(folder, args.rehearse)
        verdict = {True: "passed", False: "FAILED", None: "not run: needs a GPU and compute-sanitizer"}[verdicts[name]]
        print(f"{name}: {verdict} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"results in {folder}")
    return 0 if all(verdict is not False for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
