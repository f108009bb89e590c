"""docs/migration.md: every row compares as it says, loss and gradients in float64, and every block runs.

Packages that are installed are compared themselves; others are stated here anew, by their formulas.
"""

import copy
import importlib.util
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hypercontrast as hc

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
SECTIONS = dict(section.split("\n", 1) for section in PAGE.split("\n## ")[1:])
PACKAGES = {"pytorch-metric-learning": "pytorch_metric_learning", "lightly": "lightly"}
N, B, D, K = 24, 9, 7, 5
RULES = ("equal gradient", "equal value", "equal", "different")


def rows():
    """(section, their call, our call, rule) of every row that holds two calls."""
    cells = [
        (s, *map(str.strip, line.split("|")[1:4]))
        for s, t in SECTIONS.items()
        for line in t.splitlines()
        if line[:3] == "| `"
    ]
    calls = [
        (s, theirs, ours, note)
        for s, theirs, ours, note in cells
        if all(re.fullmatch("`[^`]+`", cell) for cell in (theirs, ours))
    ]
    return [(s, a.strip("`"), b.strip("`"), next(r for r in RULES if note.startswith(r))) for s, a, b, note in calls]


def need(section):
    if section in PACKAGES:
        pytest.importorskip(PACKAGES[section])


def leaf(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


# What is not installed, by its formula


def positive_shares(features, positive):
    """log softmax over all others [M, M], and which of them are positives, of unit features at temperature 0.1."""
    own = torch.eye(len(features), dtype=torch.bool)
    logits = (features @ features.T / 0.1).masked_fill(own, -torch.inf)
    return logits.log_softmax(1).masked_fill(own, 0), positive & ~own


class PublishedSupCon:
    """Khosla et al. 2020, eq. 2, of unit features [B, V, D], times temperature over base_temperature."""

    def __init__(self, temperature, base_temperature=0.07, contrast_mode="all"):
        assert temperature == 0.1
        self.factor, self.mode = temperature / base_temperature, contrast_mode

    def __call__(self, features, labels=None, mask=None):
        samples, views = features.shape[:2]
        if mask is None:
            ids = torch.arange(samples) if labels is None else labels
            mask = ids[:, None] == ids
        log_p, positive = positive_shares(torch.cat(list(features.unbind(1))), mask.bool().repeat(views, views))
        losses = -(log_p * positive).sum(1) / positive.sum(1)
        return self.factor * (losses if self.mode == "all" else losses[:samples]).mean()


def solo_simclr(z, indexes):
    """-mean log (sum of the positives' shares): the mean over positives is a sum, inside the log."""
    log_p, positive = positive_shares(F.normalize(z, dim=1), indexes[:, None] == indexes)
    return -(log_p.exp() * positive).sum(1).log().mean()


class ClipLoss:
    """Cross-entropy of the pairs' similarities by rows and by columns, averaged."""

    def __call__(self, images, texts, scale):
        logits, pair = scale * images @ texts.T, torch.arange(len(images))
        return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


def names(section):
    """What the rows speak of, and the leaves among it that take a gradient."""
    z, w, v, refs = leaf(N, D, seed=1), leaf(K, D, seed=2), leaf(B, 2, D, seed=3), leaf(N, D, seed=4)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    y, v_y = torch.arange(N).roll(3) % K, torch.arange(B) % 3
    known = {
        "hc": hc,
        "math": math,
        "torch": torch,
        "F": F,
        "K": K,
        "D": D,
        "z": z,
        "w": w,
        "v": v,
        "refs": refs,
        "scale": scale,
        "y": y,
    }
    known |= {"v_y": v_y, "ref_y": torch.arange(N) % 4, "z0": v[:, 0], "z1": v[:, 1], "ids": torch.arange(B)}
    known |= {"mask": v_y[:, None] == v_y, "past": leaf(10, D, seed=5).detach(), "past_y": torch.arange(10) % K}
    if section.startswith("F."):
        known["y"] = y.masked_fill(torch.arange(N) % 5 == 0, -100)
        known["ignored"] = torch.full_like(y, -100)
        known["weight"] = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
        known["logits"] = F.normalize(z) @ F.normalize(w).T / 0.1
    elif section == "pytorch-metric-learning":
        known |= pml_names(w)
        known["memory"](known["past"], known["past_y"])
    elif section == "lightly":
        from lightly.loss import DCLLoss, NTXentLoss

        known |= {"NTXentLoss": NTXentLoss, "DCLLoss": DCLLoss}
    known |= {"simclr_loss_func": solo_simclr, "ClipLoss": ClipLoss}
    if section == "The published SupCon code":
        known["SupConLoss"] = PublishedSupCon
    return known, (z, w, v, refs, scale)


def pml_names(w):
    from pytorch_metric_learning import losses, reducers

    def with_prototypes(name, parameter, value):
        def make(*sizes, **options):
            loss = getattr(losses, name)(*sizes, **options)
            delattr(loss, parameter)  # its own, for ours to take the gradient
            setattr(loss, parameter, value)
            return loss

        return make

    known = {name: getattr(losses, name) for name in ("SupConLoss", "NTXentLoss", "SelfSupervisedLoss")}
    known["MeanReducer"] = reducers.MeanReducer
    known["memory"] = losses.CrossBatchMemory(losses.SupConLoss(), D, memory_size=100)
    known["NormalizedSoftmaxLoss"] = with_prototypes("NormalizedSoftmaxLoss", "W", w.T)
    for name, parameter, value in [
        ("ProxyNCALoss", "proxies", w),
        ("ProxyAnchorLoss", "proxies", w),
        ("CosFaceLoss", "W", w.T),
        ("ArcFaceLoss", "W", w.T),
    ]:
        known[name] = with_prototypes(name, parameter, value)
    return known


def differs(a, b):
    """Relative to b, and at least to 1e-3: a loss or gradient of nothing is no measure."""
    return ((a - b).norm() / b.norm().clamp(min=1e-3)).item()


def gradient(loss, leaves):
    """Of a loss of any shape, by upstream gradients that are not all the same."""
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    grads = torch.autograd.grad(loss, leaves, upstream, allow_unused=True, retain_graph=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for g, x in zip(grads, leaves, strict=True)])


@pytest.mark.parametrize(("section", "theirs", "ours", "rule"), rows())
def test_row(section, theirs, ours, rule):
    need(section)
    known, leaves = names(section)
    want, got = eval(theirs, known), eval(ours, known)
    value, slope = differs(got, want), differs(gradient(got, leaves), gradient(want, leaves))
    if rule == "different":
        assert not value < 0.01  # NaN is
        return
    assert gradient(want, leaves).norm() > 0.01
    assert (value <= 1e-12) == (rule != "equal gradient"), value
    assert (slope <= 1e-12) == (rule != "equal value"), slope


def test_rows_cover_the_page():
    """A row that is not two calls says that there is nothing to compare, or is checked by a test of its own."""
    compared = {theirs for _, theirs, _, _ in rows()}
    other = [line for line in PAGE.splitlines() if line[:3] == "| `" and line.split("`")[1] not in compared]
    assert len(compared) >= 25
    for line in other:
        assert "not here" in line or "not needed" in line or "gather" in line, line


def test_ours_is_larger_than_solo_learns_by_the_mean_log_of_positives():
    known, _ = names("solo-learn")
    (theirs, ours), *_ = [(a, b) for s, a, b, rule in rows() if s == "solo-learn" and rule == "equal gradient"]
    y = known["v_y"].repeat(2)
    positives = (y[:, None] == y).sum(1) - 1
    assert differs(eval(ours, known) - eval(theirs, known), positives.double().log().mean()) < 1e-12


@pytest.mark.parametrize("section", SECTIONS)
def test_blocks_run(section):
    need(section)
    for block in re.findall(r"```python\n(.*?)```", SECTIONS[section], flags=re.DOTALL):
        exec(block, {})


def test_packages_named_are_those_tested():
    """The versions on the page are of the packages that the rows were compared with."""
    from importlib.metadata import version

    for package in PACKAGES:
        if importlib.util.find_spec(PACKAGES[package]):
            assert f"{package} {'.'.join(version(package).split('.')[:2])}" in " ".join(PAGE.split())


class LightlyNTXent(nn.Module):
    def forward(self, features, labels):
        from lightly.loss import NTXentLoss

        return NTXentLoss(gather_distributed=torch.distributed.is_initialized())(*features.chunk(2, dim=1))


class OurNTXent(nn.Module):
    def forward(self, features, labels):
        return hc.supcon_loss(torch.stack(features.chunk(2, dim=1), 1), temperature=0.5)


@pytest.mark.slow
def test_lightly_over_ranks():
    """Right for equal batches there; for any, and with the global loss printed, here."""
    pytest.importorskip("lightly")
    theirs, ours = (hc.check_ddp(loss, timeout=180) for loss in (LightlyNTXent(), OurNTXent()))
    assert theirs
    assert not theirs.loss_agrees
    assert theirs.note.startswith("on unequal batches it fails")
    assert ours
    assert ours.loss_agrees
    assert not ours.note


# What users of modules do with them

MODULES = {
    "NormFaceLoss": lambda: hc.NormFaceLoss(weight=torch.ones(K), temperature=nn.Parameter(torch.tensor(0.1))),
    "NTCELoss": lambda: hc.NTCELoss(weight=torch.ones(K)),
    "NONLLoss": lambda: hc.NONLLoss(anchor="both"),
    "SupConLoss": lambda: hc.SupConLoss(queue=(torch.randn(6, D), torch.arange(6))),
    "PrototypeHead": lambda: hc.PrototypeHead(D, K, "bn"),
    "ClassMeans": lambda: hc.ClassMeans(K, D),
}


def outcome(module):
    z, w, y = leaf(N, D, seed=1).float(), leaf(K, D, seed=2).float(), torch.arange(N) % K
    if isinstance(module, hc.PrototypeHead):
        return module(z)
    if isinstance(module, hc.ClassMeans):
        module.update(z.detach(), y)
        return module.prototypes()
    return module(z, y) if isinstance(module, hc.SupConLoss) else module(z, w, y)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copied", "pickled"]
)
def test_modules_can_be_copied(name, copied):
    module = MODULES[name]()
    twin = copied(module)
    twin.load_state_dict(module.state_dict())
    assert repr(twin) == repr(module)
    assert torch.equal(outcome(twin), outcome(module))


def test_a_buffer_says_that_it_cannot_be_copied():
    holder = hc.SupConLoss(queue=hc.NegativeBuffer(D, N, queue=N))
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="NegativeBuffer must not be copied or pickled"):
            copied(holder)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.float])
def test_class_means_stay_in_float64(convert):
    """As a part of a model that is converted; nothing of the sums is lost."""
    means = hc.ClassMeans(K, D)
    outcome(means)
    before = means.sums.clone()
    convert(nn.ModuleDict({"network": nn.Linear(2, 2), "means": means}))
    assert torch.equal(means.sums, before)
    assert means.sums.dtype == torch.float64
    assert nn.ModuleList([means]).to("meta").to_empty(device="cpu")[0].sums.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_another_integer_type(dtype):
    """`F.cross_entropy` refuses most of them as well."""
    z, w, y = leaf(N, D, seed=1), leaf(K, D, seed=2), (torch.arange(N) % K).to(dtype)
    for loss in (lambda: hc.ntce_loss(z, w, y), lambda: hc.supcon_loss(z, y)):
        with pytest.raises(TypeError, match=rf"labels must be int64, got {dtype}: pass labels\.long\(\)"):
            loss()
