"""Time, memory and error of the prototype losses on this machine's CPU: `python -m bench`.

Every form of a loss runs in one process, in turn (A B C A B C ...), on the same inputs, so that the ratios hold on a
noisy machine; every row carries its error against float64, and a row whose error is out of bounds fails the run. Peak
memory is read from the kernel in a process of its own.

Columns
    median_ms        median time of forward + backward
    speedup          median over the rounds of (the eager form's time / this form's time) in the same round
    matmul_share     time of the three products 3·2MKD alone, in the same round, over this form's time
    error            largest relative error (Frobenius) of loss and both gradients against float64
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
import torch.nn.functional as F

import hypercontrast as hc
from hypercontrast import reference

TAU = 0.1
ERROR_BOUND = 1e-4  # float32 at τ = .1; a form past it is wrong, however fast


def _units(z, w):
    return F.normalize(z, dim=1), F.normalize(w, dim=1)


def ntce_pairwise(z, w, y):
    """NTCE as an M x M matrix: the prototype of each sample against all samples."""
    u, w = _units(z, w)
    s = w[y] @ u.T / TAU
    return (s.logsumexp(1) - s.diagonal()).mean()


def ntce_eager(z, w, y):
    """NTCE with each class's row computed once."""
    u, w = _units(z, w)
    s = w @ u.T / TAU
    return (s.logsumexp(1)[y] - s[y, torch.arange(len(y))]).mean()


def nonl_eager(z, w, y):
    u, w = _units(z, w)
    s = w @ u.T / TAU
    own = y[None, :] == torch.arange(len(w))[:, None]
    return (s.masked_fill(own, -torch.inf).logsumexp(1)[y] - s[y, torch.arange(len(y))]).mean()


def normface_eager(z, w, y):
    u, w = _units(z, w)
    return F.cross_entropy(u @ w.T / TAU, y)


def ours(name: str) -> Callable:
    return lambda z, w, y: getattr(hc, f"{name}_loss")(z, w, y, temperature=TAU, backend="blockwise")


FORMS: dict[str, dict[str, Callable]] = {
    "ntce": {"eager M x M": ntce_pairwise, "eager K x M": ntce_eager, "blockwise": ours("ntce")},
    "nonl": {"eager K x M": nonl_eager, "blockwise": ours("nonl")},
    "normface": {"eager K x M": normface_eager, "blockwise": ours("normface")},
}


def make_inputs(m: int, k: int, d: int, spread: float | None = None):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, k, (m,), generator=g)
    w = torch.randn(k, d, generator=g)
    z = torch.randn(m, d, generator=g) if spread is None else w[y] + spread * torch.randn(m, d, generator=g)
    return z.requires_grad_(), w.requires_grad_(), y


def step(form: Callable, z, w, y):
    loss = form(z, w, y)
    return loss.detach(), *torch.autograd.grad(loss, (z, w))


def relative_error(got, want) -> float:
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def errors(name: str, forms: dict[str, Callable], m: int, k: int, d: int) -> dict[str, list[float]]:
    """[random, near collapse] error of each form."""
    found: dict[str, list[float]] = {form: [] for form in forms}
    for spread in (None, 1e-2):
        z, w, y = make_inputs(m, k, d, spread)
        wide = z.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        exact = getattr(reference, f"{name}_loss")
        want = step(lambda a, b, c, exact=exact: exact(a, b, c, temperature=TAU), *wide, y)
        for form, fn in forms.items():
            found[form].append(relative_error(step(fn, z, w, y), want))
    return found


def times(forms: dict[str, Callable], m: int, k: int, d: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each form and of the bare products, round by round."""
    z, w, y = make_inputs(m, k, d)
    g = torch.randn(m, k)
    out_mk, out_kd, out_md = torch.empty(m, k), torch.empty(k, d), torch.empty(m, d)
    zd, wd = z.detach(), w.detach()

    def products():
        torch.mm(zd, wd.T, out=out_mk)
        torch.mm(g, wd, out=out_md)
        torch.mm(g.T, zd, out=out_kd)

    runs: dict[str, Callable] = {"products": products}
    runs |= {form: (lambda fn=fn: step(fn, z, w, y)) for form, fn in forms.items()}
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


def peak_mib(name: str, form: str, m: int, k: int, d: int) -> float:
    """Peak resident memory of one forward and backward beyond what was there before, in a fresh process."""
    code = f"import bench.__main__ as b; print(b.measure_peak({name!r}, {form!r}, {m}, {k}, {d}))"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def measure_peak(name: str, form: str, m: int, k: int, d: int) -> float:
    """Linux only: the kernel's high-water mark, reset after a small warm-up."""
    step(FORMS[name][form], *make_inputs(8, 4, d))
    inputs = make_inputs(m, k, d)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = _status_kib("VmRSS")
    step(FORMS[name][form], *inputs)
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(4096, 1000, 512), metavar=("M", "K", "D"))
    parser.add_argument("--seconds", type=float, default=15, help="time spent on each loss")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    m, k, d = args.shape
    print(
        f"# {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"M={m} K={k} D={d} τ={TAU}, float32, forward + backward; gradients take {(m + k) * d * 4 / 2**20:.0f} MiB"
    )
    print("| loss | form | median_ms | speedup | matmul_share | error | error_collapse | peak_mib |")
    print("|---|---|---|---|---|---|---|---|")
    failed = False
    for name, forms in FORMS.items():
        found, wrong = times(forms, m, k, d, args.seconds), errors(name, forms, m, k, d)
        base = found[next(iter(forms))]
        for form in forms:
            ratio = statistics.median(a / b for a, b in zip(base, found[form], strict=True))
            share = statistics.median(a / b for a, b in zip(found["products"], found[form], strict=True))
            print(
                f"| {name} | {form} | {statistics.median(found[form]):.1f} | {ratio:.2f} | {share:.0%} "
                f"| {wrong[form][0]:.1e} | {wrong[form][1]:.1e} | {peak_mib(name, form, m, k, d):.0f} |",
                flush=True,
            )
            failed |= form == "blockwise" and not max(wrong[form]) <= ERROR_BOUND
        if "eager K x M" in forms and len(forms) == 3:
            ratios = [a / b for a, b in zip(found["eager K x M"], found["blockwise"], strict=True)]
            print(f"  {name}: blockwise is {statistics.median(ratios):.2f}x the K x M eager form")
    if failed:
        print(f"An error is above {ERROR_BOUND}: these times count for nothing.", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
