"""The headline CPU ratios a second time, by a script that shares nothing with the rest of the bench.

    python -m bench.independent

Its own eager forms, its own inputs, PyTorch's own timer (`torch.utils.benchmark`), forward and backward through
`.backward()` as a training loop calls it, and every form in turn in rounds. Prints, for each loss, median milliseconds,
the ratio to ours, the time of its products alone by torch.mm over its own, and the largest error of loss and gradients
against float64. The exit code is 1 where that of ours is past what rounding a logit to float32 explains.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from torch.utils.benchmark import Timer

import hypercontrast as hc

ROUNDS, SECONDS = 5, 1.0
STEP = "z.grad = w.grad = None; f(z, w, y).backward()"
M, K, D = 4096, 1000, 512
A, WIDTH, CLASSES = 8192, 128, 100
TAU = 0.1
BOUND = 2**-23 * (1 + 1 / TAU)


def cosines(a, b):
    a = a / a.norm(dim=-1, keepdim=True)
    b = b / b.norm(dim=-1, keepdim=True)
    return a @ b.mT / TAU


def ntce_all_samples(z, w, y):
    s = cosines(w[y], z)
    return torch.nn.functional.cross_entropy(s, torch.arange(len(y)))


def ntce_once_a_class(z, w, y):
    s = cosines(w, z)
    return (torch.logsumexp(s, 1)[y] - s.T.gather(1, y[:, None])[:, 0]).mean()


def nonl(z, w, y):
    s = cosines(w, z)
    negatives = torch.nn.functional.one_hot(y, len(w)).T == 0
    return (torch.logsumexp(torch.where(negatives, s, -torch.inf), 1)[y] - s.T.gather(1, y[:, None])[:, 0]).mean()


def normface(z, w, y):
    return torch.nn.functional.cross_entropy(cosines(z, w), y)


def supcon(z, _, y):
    s = cosines(z, z)
    itself = torch.eye(len(y), dtype=torch.bool)
    log_p = s - torch.logsumexp(s.masked_fill(itself, -torch.inf), 1, keepdim=True)
    positive = (y[:, None] == y) & ~itself
    return -(torch.where(positive, log_p, 0).sum(1) / positive.sum(1)).mean()


CASES = {
    "ntce": (hc.ntce_loss, [ntce_all_samples, ntce_once_a_class]),
    "nonl": (hc.nonl_loss, [nonl]),
    "normface": (hc.normface_loss, [normface]),
    "supcon": (lambda z, w, y, **options: hc.supcon_loss(z, y, **options), [supcon]),
}


def inputs(name):
    torch.manual_seed(7)
    n, k, d = (A, CLASSES, WIDTH) if name == "supcon" else (M, K, D)
    return torch.randn(n, d, requires_grad=True), torch.randn(k, d, requires_grad=True), torch.randint(k, (n,))


def outputs(form, z, w, y):
    z, w = z.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    loss = form(z, w, y)
    loss.backward()
    return [loss.detach(), z.grad] if w.grad is None else [loss.detach(), z.grad, w.grad]


def max_error(found, truth):
    return torch.stack([(x - t).norm() / t.norm() for x, t in zip(found, truth, strict=True)]).max().item()


def products(name, z, w):
    """3·2MKD, or for pairs against themselves 4·A²D."""
    other = z if name == "supcon" else w
    s = torch.empty(len(z), len(other))

    def run():
        torch.mm(z, other.T, out=s)
        s @ other
        if name != "supcon":
            s.T @ z

    return run


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    wrong = False
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {hc.__file__}")
    for name, (ours, peers) in CASES.items():
        z, w, y = inputs(name)
        forms = {"ours": lambda *x, f=ours: f(*x, temperature=TAU)} | {form.__name__: form for form in peers}
        timers = {
            form: Timer(STEP, globals={"f": f, "z": z, "w": w, "y": y}, num_threads=torch.get_num_threads())
            for form, f in forms.items()
        }
        timers["products"] = Timer(
            "f()", globals={"f": products(name, z.detach(), w.detach())}, num_threads=torch.get_num_threads()
        )
        times = {form: [] for form in timers}
        for _ in range(ROUNDS):
            for form, timer in timers.items():
                times[form].append(1e3 * timer.blocked_autorange(min_run_time=SECONDS).median)
        truth = outputs(peers[-1], z.double(), w.double(), y)
        for form, f in forms.items():
            ratio = statistics.median(t / u for t, u in zip(times[form], times["ours"], strict=True))
            share = statistics.median(p / t for p, t in zip(times["products"], times[form], strict=True))
            error = max_error(outputs(f, z, w, y), truth)
            wrong |= form == "ours" and not error <= BOUND  # so that NaN is wrong too
            print(
                f"{name:9s} {form:18s} {statistics.median(times[form]):8.1f} ms  {ratio:5.2f} x ours  "
                f"{share:4.0%} of torch.mm's speed  error {error:.1e}",
                flush=True,
            )
    if wrong:
        print(f"error: an error of ours is past {BOUND:.1e}", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
