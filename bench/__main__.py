"""Time, memory and error of the losses on this machine's CPU: `python -m bench`.

Every form of a loss runs in one process, in turn (A B C A B C ...), on the same inputs, so that the ratios hold on a
noisy machine; every row carries its error against float64, and a row whose error is out of bounds fails the run. Peak
memory is read from the kernel in a process of its own.

Columns
    median_ms        median time of forward + backward
    speedup          median over the rounds of (the eager form's time / this form's time) in the same round
    matmul_share     time of the products alone that a step needs (3·2MKD, supcon 4·A²D), in the same round, over this
                     form's time
    error            largest relative error (Frobenius) of loss and gradients against float64
    error_collapse   the same near collapse (features within 1e-2 of their prototypes): what remains of the gradient
                     there is its tangential part
    peak_mib         peak resident memory beyond inputs, before the gradients' own MiB are taken off
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from bench import forms
from bench.forms import TAU

ERROR_BOUND = 1e-4  # float32 at τ = .1; a form past it is wrong, however fast
FORMS: dict[str, dict[str, Callable]] = {
    name: {**eager, "blockwise": forms.ours(name, "blockwise")} for name, eager in forms.EAGER.items()
}


def errors(name: str, shape: tuple[int, int, int]) -> dict[str, list[float]]:
    """[random, near collapse] error of each form."""
    found: dict[str, list[float]] = {form: [] for form in FORMS[name]}
    for spread in (None, 1e-2):
        leaves, y = forms.inputs(name, *shape, spread=spread)
        for form, fn in FORMS[name].items():
            found[form].append(forms.relative_error(name, fn, leaves, y))
    return found


def times(name: str, shape: tuple[int, int, int], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each form and of the bare products, round by round."""
    leaves, y = forms.inputs(name, *shape)
    runs: dict[str, Callable] = {"products": forms.products(name, leaves)}
    runs |= {form: (lambda fn=fn: forms.step(fn, leaves, y)) for form, fn in FORMS[name].items()}
    found: dict[str, list[float]] = {form: [] for form in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found["products"]) < 5:
        for form, run in runs.items():
            start = time.perf_counter()
            run()
            found[form].append(1e3 * (time.perf_counter() - start))
    return found


def peak_mib(name: str, form: str, shape: tuple[int, int, int]) -> float:
    """Peak resident memory of one forward and backward beyond what was there before, in a fresh process."""
    code = f"import bench.__main__ as b; print(b.measure_peak({name!r}, {form!r}, *{shape!r}))"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def measure_peak(name: str, form: str, m: int, k: int, d: int) -> float:
    """Linux only: the kernel's high-water mark, reset after a small warm-up."""
    forms.step(FORMS[name][form], *forms.inputs(name, 8, 4, d))
    leaves, y = forms.inputs(name, m, k, d)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = _status_kib("VmRSS")
    forms.step(FORMS[name][form], leaves, y)
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":"))


def report(name: str, shape: tuple[int, int, int], seconds: float) -> bool:
    """Print the loss's rows; whether our error is within bounds."""
    found, wrong = times(name, shape, seconds), errors(name, shape)
    first, *others = FORMS[name]
    for form in FORMS[name]:
        ratio = statistics.median(a / b for a, b in zip(found[first], found[form], strict=True))
        share = statistics.median(a / b for a, b in zip(found["products"], found[form], strict=True))
        print(
            f"| {name} | {form} | {statistics.median(found[form]):.1f} | {ratio:.2f} | {share:.0%} "
            f"| {wrong[form][0]:.1e} | {wrong[form][1]:.1e} | {peak_mib(name, form, shape):.0f} |",
            flush=True,
        )
    for form in others[:-1]:
        ratios = [a / b for a, b in zip(found[form], found["blockwise"], strict=True)]
        print(f"  {name}: blockwise is {statistics.median(ratios):.2f}x the {form} form")
    return max(wrong["blockwise"]) <= ERROR_BOUND


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(4096, 1000, 512), metavar=("M", "K", "D"))
    parser.add_argument(
        "--pairs", type=int, nargs=3, default=(8192, 100, 128), metavar=("A", "K", "D"), help="the shape of supcon"
    )
    parser.add_argument("--losses", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--seconds", type=float, default=15, help="time spent on each loss")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    (m, k, d), (a, classes, width) = args.shape, args.pairs
    print(
        f"# {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}; M={m} K={k} D={d}, "
        f"supcon A={a} K={classes} D={width}, τ={TAU}, float32, forward + backward; gradients take "
        f"{(m + k) * d * 4 / 2**20:.0f} MiB, supcon's {a * width * 4 / 2**20:.0f}"
    )
    print("| loss | form | median_ms | speedup | matmul_share | error | error_collapse | peak_mib |")
    print("|---|---|---|---|---|---|---|---|")
    good = [
        report(x, tuple(args.shape if x in forms.PROTOTYPE_LOSSES else args.pairs), args.seconds) for x in args.losses
    ]
    if not all(good):
        print(f"An error is above {ERROR_BOUND}: these times count for nothing.", file=sys.stderr)
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
