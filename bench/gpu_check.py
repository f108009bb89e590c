"""Everything that needs a GPU, in one command that fits ten minutes: `make gpu-check`.

1. correctness   150 s  tests/test_triton*.py with their long fuzz: every loss against float64 at float32, bfloat16 and
                        float16, odd shapes, near collapse, bitwise repeats, no host sync
2. extension     80 s   the negative buffer's extension is built and tested: its kernel, streams, NCCL, ranks that share
                        a GPU
3. index range   10 s   an input past 2^31 elements, against float64
4. matrix        180 s  the standard cases of `python -m bench` with all peers there are; what would begin later is
                        named and left out
5. determinism   0 s    every row of ours in the matrix had the same bits twice
6. training      80 s   seconds per epoch of the CIFAR-10 recipes, compiled and not, with no step that waits for the
                        device
7. sanitizer     100 s  compute-sanitizer's memcheck, racecheck and initcheck over every kernel, without the caching
                        allocator

The seconds are budgets, enforced where there is something to leave out: in the matrix. Each stage's output goes to
bench/results/DATE-DEVICE/ and its verdict to the terminal; the exit code is 0 when all that ran passed. Needs torch,
triton, pytest and the checkout alone; pictures need matplotlib. Without a GPU, --rehearse walks the same stages on the
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
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

import hypercontrast as hc
from bench import forms, matrix
from bench.matrix import Entry
from bench.peers import OURS
from bench.record import Case, read
from hypercontrast import reference

ROOT = Path(__file__).parents[1]
TAU = forms.TAU
TESTS = ("tests/test_triton.py", "tests/test_triton_supcon.py")
MATRIX_SECONDS = 180
# What a rehearsal measures in the place of the standard cases.
SMALL = [
    *(Entry(Case(op, 64, 20, 48)) for op in forms.PROTOTYPE_LOSSES),
    Entry(Case("supcon", 64, 5, 24)),
    Entry(Case("ntce", 40, 130, 24, features="collapsed"), ()),
    Entry(Case("buffer", 16, 64, 24)),
]


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
    return not outcome.wrong


def determinism(folder: Path, rehearse: bool) -> bool:
    rows = [row for row in read(folder / "matrix.csv") if row.form == OURS and row.repeats is not None]
    print(f"    {sum(row.repeats for row in rows)} of {len(rows)} cases had the same bits twice")
    return bool(rows) and all(row.repeats for row in rows)


def training(folder: Path, rehearse: bool) -> bool:
    """The driver's epochs; a step that waits for the device raises."""
    # PyYAML and torchvision are the driver's, and part of the usual GPU image.
    if missing := [name for name in ("yaml", "torchvision") if importlib.util.find_spec(name) is None]:
        print(f"    needs {' and '.join(missing)}")
        return False
    from bench.epoch import measure

    pictures, options = (64, {"batch_size": 32, "width": 8}) if rehearse else (50_000, {})
    rows = []
    for loss, mode in [("nonl", "off")] if rehearse else [("nonl", "off"), ("nonl", "on"), ("scl", "on")]:
        rows.append(measure(loss, pictures, 2, compile=mode, **options))
        print("    " + "  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    with (folder / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return True


STAGES = {
    "correctness": correctness,
    "extension": extension,
    "index range": index_range,
    "matrix": measured,
    "determinism": determinism,
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
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # it computes with NumPy, which warns of infinities
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
