"""What a case is run with: eager forms, ours, and every peer that computes the same number. A peer that cannot run here
is there with its reason.

No peer is needed and none is imported before it is built. A peer fits a case only where its definition and ours are
equal; its error in the row shows that they are.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import forms
from bench.record import Case

Form = Callable[..., Tensor]
OURS = "ours"


@dataclass(frozen=True)
class Absent:
    """A form that cannot run here, and why."""

    reason: str


@dataclass(frozen=True)
class Peer:
    """Somebody else's form: the cases on which it computes the same number, what it needs, and how to get it."""

    fits: Callable[[Case], bool]
    build: Callable[[Case], Form]
    missing: Callable[[], str] = str  # what to do about its absence, nothing when it is there
    needs_gpu: bool = False


def _package(module: str, name: str) -> Callable[[], str]:
    return lambda: "" if importlib.util.find_spec(module) else f"pip install {name}"


def _units(z: Tensor, w: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What a linear layer with cross-entropy takes to be NormFace."""
    return F.normalize(z, dim=1) / temperature, F.normalize(w, dim=1)


def _compiled(case: Case) -> Form:
    torch._dynamo.reset()  # or earlier cases count towards the limit of recompilations
    eager = forms.EAGER[case.op][forms.yardstick(case.op)]
    return torch.compile(partial(eager, temperature=case.temperature), dynamic=False)


def _compiler() -> str:
    there = torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")
    return "" if there else "needs a C++ compiler"


def _metric_learning(case: Case) -> Form:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=case.temperature)


def _lightly(case: Case) -> Form:
    from lightly.loss import ntx_ent_loss

    loss = ntx_ent_loss.NTXentLoss(temperature=case.temperature)
    return lambda z, y: loss(*z.chunk(2))


def _cut_cross_entropy(case: Case, **options) -> Form:
    from cut_cross_entropy import linear_cross_entropy

    return lambda z, w, y: linear_cross_entropy(*_units(z, w, case.temperature), y, **options)


def _liger(case: Case) -> Form:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda z, w, y: liger_fused_linear_cross_entropy(*_units(z, w, case.temperature), y)


def _torch_linear(case: Case) -> Form:
    return lambda z, w, y: F.linear_cross_entropy(*_units(z, w, case.temperature), y)


def _inf_cl(case: Case) -> Form:
    from inf_cl import cal_flash_loss  # cal_inf_loss of one process

    head = min(case.d, 256)
    return lambda z, w, y: cal_flash_loss(*_units(z, w, case.temperature), head_dim=head).mean()


def _memeff(case: Case) -> Form:
    from memeff import MemoryEfficientQwen3Loss

    # Its row softmax without masked negatives (margin) and with the gradient's own scale (stable).
    loss = MemoryEfficientQwen3Loss(temperature=case.temperature, margin=2.0, stable=False)
    return lambda z, w, y: loss(z, w)


def _square(case: Case) -> bool:
    return case.op == "normface" and case.labels == "instances"


def _is_normface(case: Case) -> bool:
    return case.op == "normface"


PEERS = {
    "compiled": Peer(lambda case: case.op in forms.EAGER, _compiled, _compiler),
    "pytorch-metric-learning": Peer(
        lambda case: case.op == "supcon" and case.labels != "single",  # a batch of one class is zero there
        _metric_learning,
        _package("pytorch_metric_learning", "pytorch-metric-learning"),
    ),
    "lightly": Peer(
        lambda case: case.op == "supcon" and case.labels == "instances", _lightly, _package("lightly", "lightly")
    ),
    "cut-cross-entropy": Peer(
        _is_normface, _cut_cross_entropy, _package("cut_cross_entropy", "cut-cross-entropy"), needs_gpu=True
    ),
    "cut-cross-entropy exact": Peer(
        _is_normface,
        partial(_cut_cross_entropy, filter_eps=None),
        _package("cut_cross_entropy", "cut-cross-entropy"),
        needs_gpu=True,
    ),
    "liger": Peer(_is_normface, _liger, _package("liger_kernel", "liger-kernel"), needs_gpu=True),
    "linear_cross_entropy": Peer(
        _is_normface,
        _torch_linear,
        lambda: "" if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none, 2.13 has",
    ),
    "inf-cl": Peer(
        lambda case: _square(case) and (case.d in (16, 32, 64, 128) or case.d % 256 == 0),
        _inf_cl,
        _package("inf_cl", "inf-cl"),
        needs_gpu=True,
    ),
    "memeff": Peer(_square, _memeff, _package("memeff", "memeff"), needs_gpu=True),
}


def names(op: str) -> list[str]:
    """Of all forms that `--vs` can ask for."""
    return [*forms.EAGER.get(op, ()), *PEERS]


def fitting(case: Case) -> list[str]:
    """Of the forms that compute a case's number, whether they can run here or not."""
    return [*forms.EAGER.get(case.op, ()), *(name for name, peer in PEERS.items() if peer.fits(case))]


def candidates(case: Case, device: str, vs: Iterable[str] | None = None) -> dict[str, Form | Absent]:
    """The forms of a case by name: the yardstick, what `vs` names of eager forms and peers (None: all), ours.

    In that order, so that the first eager form of a loss comes first.
    """
    chosen = set(names(case.op) if vs is None else vs) | {forms.yardstick(case.op)}
    eager = forms.EAGER[case.op].items()
    found: dict[str, Form | Absent] = {
        name: partial(form, temperature=case.temperature) for name, form in eager if name in chosen
    }
    found |= {name: _obtain(peer, case, device) for name, peer in PEERS.items() if name in chosen and peer.fits(case)}
    return found | {OURS: forms.ours(case.op, temperature=case.temperature)}


def _obtain(peer: Peer, case: Case, device: str) -> Form | Absent:
    if reason := peer.missing():
        return Absent(reason)
    if peer.needs_gpu and device != "cuda":
        return Absent("needs a GPU")
    try:
        return peer.build(case)
    except Exception as error:  # whatever a peer's import says is the row's reason
        return Absent(f"{type(error).__name__}: {error}".splitlines()[0])
