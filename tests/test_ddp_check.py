"""check_ddp's verdicts: on our losses, on the mistakes people make, and on pytorch-metric-learning's wrapper."""

import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import hypercontrast as hc
from hypercontrast import ddp_check
from hypercontrast.ddp_check import _compare, _Problem, _Round, check_ddp
from hypercontrast.distributed import gather_with_grad

D, K = 8, 4
TIMEOUT = 180  # the machine may be busy


def supcon(anchors, labels, columns, column_labels, first=0):
    """SupCon of anchors that are rows `first`, `first` + 1, ... of the columns."""
    logits = F.normalize(anchors, dim=1) @ F.normalize(columns, dim=1).T / 0.1
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[range(len(anchors)), range(first, first + len(anchors))] = True
    positive = (labels[:, None] == column_labels) & ~own
    log_p = logits - logits.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def constant_rows(x):
    """What a plain all_gather gives, and where this rank's rows are in it."""
    counts = gather_with_grad(torch.tensor([len(x)])).tolist()
    return gather_with_grad(x.detach()), sum(counts[: dist.get_rank()])


def local_supcon(features, labels):
    return supcon(features, labels, features, labels)


def gathered_with_gradient(features, labels):
    return local_supcon(gather_with_grad(features), gather_with_grad(labels))


def own_anchors_against_constants(features, labels):
    if not dist.is_initialized():
        return local_supcon(features, labels)
    columns, first = constant_rows(features)
    return supcon(features, labels, columns, gather_with_grad(labels), first)


def all_anchors_own_rows_put_back(features, labels):
    if not dist.is_initialized():
        return local_supcon(features, labels)
    columns, first = constant_rows(features)
    columns = torch.cat([columns[:first], features, columns[first + len(features) :]])
    return local_supcon(columns, gather_with_grad(labels))


def summed_over_ranks(features, labels):
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return ranks * gathered_with_gradient(features, labels)


def only_on_equal_batches(features, labels):
    if dist.is_initialized() and len(labels) != 8:
        raise ValueError(f"8 samples wanted, got {len(labels)}")
    return gathered_with_gradient(features, labels)


def raises_on_rank_1(features, labels):
    if dist.is_initialized() and dist.get_rank() == 1:
        raise ValueError("no such thing on this rank")
    return gathered_with_gradient(features, labels)


def dies_on_rank_1(features, labels):
    if dist.is_initialized() and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return gathered_with_gradient(features, labels)


def leaves_on_rank_1(features, labels):
    if dist.is_initialized() and dist.get_rank() == 1:
        sys.exit(0)
    return gathered_with_gradient(features, labels)


def hangs_on_rank_1(features, labels):
    if dist.is_initialized() and dist.get_rank() == 1:
        time.sleep(1000)
    return gathered_with_gradient(features, labels)


def not_a_scalar(features, labels):
    return features


def in_float32(features, labels):
    return hc.ntce_loss(features.float(), torch.eye(K, D), labels)  # sums in another order over ranks


class OurLosses(nn.Module):
    """The sum of all our losses: exact if and only if all are, for errors do not cancel."""

    def __init__(self):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(K, D, generator=torch.Generator().manual_seed(5)))
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, features, labels):
        losses = [loss(features, self.prototypes, labels) for loss in (hc.ntce_loss, hc.nonl_loss, hc.normface_loss)]
        losses.append(hc.nonl_loss(features, self.prototypes, labels, anchor="both", temperature=self.temperature))
        for variant in ("out", "in"):
            losses.append(hc.supcon_loss(features, labels, variant=variant, temperature=self.temperature))
        return sum(losses)


class LinearCrossEntropy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(D, K)

    def forward(self, features, labels):
        return F.cross_entropy(self.head(features), labels)


def assert_exact(verdict):
    assert verdict.kind == "exact"
    assert verdict
    assert verdict.relative_error <= 1e-12
    assert verdict.loss_agrees
    assert verdict.note == ""


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_our_losses_are_exact(world):
    verdict = check_ddp(OurLosses(), world, timeout=TIMEOUT)
    assert_exact(verdict)
    assert len(verdict.losses) == world
    assert str(verdict).startswith(f"exact: DDP on {world} ranks gives the gradient of the whole batch")


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gather_with_grad_makes_a_loss_exact(world):
    assert_exact(check_ddp(gathered_with_gradient, world, timeout=TIMEOUT))


def test_plain_all_gather_is_wrong():
    verdict = check_ddp(own_anchors_against_constants, timeout=TIMEOUT)
    assert verdict.kind == "wrong"
    assert not verdict
    assert verdict.relative_error > 0.1
    assert verdict.cosine < 0.99
    assert verdict.note == ""  # on equal batches too
    assert "wrong: not the direction" in str(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_own_rows_put_back_and_all_anchors_is_short_by_the_number_of_ranks(world):
    verdict = check_ddp(all_anchors_own_rows_put_back, world, timeout=TIMEOUT)
    assert verdict.kind == "scaled"
    assert not verdict
    assert verdict.scale == pytest.approx(1 / world, rel=1e-12)
    assert verdict.loss_agrees  # the printed loss does not give it away
    assert f"{1 / world:.6g} times the gradient" in str(verdict)


@pytest.mark.slow
def test_local_average_is_exact_on_equal_batches_only():
    verdict = check_ddp(LinearCrossEntropy(), timeout=TIMEOUT)
    assert verdict.kind == "wrong"
    assert not verdict.loss_agrees
    assert verdict.note == "on equal batches it is exact"


@pytest.mark.slow
def test_local_supcon_is_wrong():
    verdict = check_ddp(local_supcon, timeout=TIMEOUT)
    assert verdict.kind == "wrong"
    assert verdict.relative_error > 0.1
    assert not verdict.loss_agrees
    assert verdict.note == ""


@pytest.mark.slow
def test_a_sum_where_ddp_expects_an_average():
    verdict = check_ddp(summed_over_ranks, timeout=TIMEOUT)
    assert verdict.kind == "scaled"
    assert verdict.scale == pytest.approx(2, rel=1e-12)
    assert not verdict.loss_agrees


@pytest.mark.slow
def test_float32_rounding_is_not_an_error():
    verdict = check_ddp(in_float32, timeout=TIMEOUT)
    assert verdict.kind == "exact"
    assert verdict.relative_error > 1e-12


@pytest.mark.slow
def test_failing_on_unequal_batches_alone():
    verdict = check_ddp(only_on_equal_batches, timeout=TIMEOUT)
    assert verdict.kind == "exact"
    assert re.search(
        r"; on unequal batches it fails: rank [01]: ValueError: 8 samples wanted, got (6|10)$", str(verdict)
    )


@pytest.mark.parametrize(
    ("gradient", "kind", "scale"),
    [
        ([3.0, 4.0], "exact", 1),
        ([3.0, 4.0 + 1e-7], "exact", 1),  # float32's rounding
        ([3.0003, 4.0004], "scaled", 1.0001),
        ([6.0, 8.0], "scaled", 2),
        ([-3.0, -4.0], "wrong", -1),
        ([3.0, 4.1], "wrong", 1.016),
        ([0.0, 0.0], "wrong", 0),
        ([math.nan, 4.0], "wrong", math.nan),
    ],
)
def test_kinds(gradient, kind, scale):
    verdict = _compare(_Round(1.0, [3.0, 4.0]), [_Round(1.0, gradient), _Round(1.0, gradient)])
    assert verdict.kind == kind
    assert verdict.scale == pytest.approx(scale, rel=1e-6, nan_ok=True)
    assert str(verdict).startswith(kind)


def test_every_rank_must_say_the_loss_of_the_whole_batch():
    for losses, agrees in (((1.0, 1.0), True), ((1.0, 1.1), False), ((1.1, 1.0), False)):
        verdict = _compare(_Round(1.0, [3.0]), [_Round(loss, [3.0]) for loss in losses])
        assert verdict.loss_agrees == agrees
        assert verdict


GOOD, LONG, BAD = [3.0, 4.0], [6.0, 8.0], [4.0, 3.0]


@pytest.mark.parametrize(
    ("equal", "unequal", "kind", "note"),
    [
        (GOOD, GOOD, "exact", ""),
        (GOOD, BAD, "wrong", "on equal batches it is exact"),
        (LONG, BAD, "wrong", "on equal batches it is scaled"),
        (BAD, LONG, "wrong", "on unequal batches it is scaled"),
        (LONG, GOOD, "scaled", "on unequal batches it is exact"),
        (BAD, BAD, "wrong", ""),
        (LONG, None, "scaled", "on unequal batches it fails: rank 1: ValueError: no"),
    ],
)
def test_the_verdict_is_that_of_the_worse_round(equal, unequal, kind, note, monkeypatch):
    def run(problem):
        of_a_rank = [_Round(1.0, gradient) for gradient in (equal, unequal) if gradient]
        return [[_Round(1.0, GOOD)] * 2, of_a_rank, of_a_rank], "" if unequal else "rank 1: ValueError: no"

    monkeypatch.setattr(ddp_check, "_run", run)
    verdict = check_ddp(local_supcon)
    assert (verdict.kind, verdict.note) == (kind, note)


def test_rounds_are_of_equal_and_of_unequal_parts_with_other_classes():
    problem = _Problem(b"", 3, D, K, 1.0)
    equal, unequal = problem.batch_sizes()
    assert len(set(equal)) == 1
    assert len(set(unequal)) == 3
    for sizes in (equal, unequal):
        features, labels = problem.batch(sizes)
        assert (features.shape, features.dtype) == ((sum(sizes), D), torch.float64)
        assert features.equal(problem.batch(sizes)[0])
        assert labels[::2].equal(labels[1::2])
        assert [part[0].item() for part in labels.split(sizes)] == [0, 1, 2]
        assert labels.unique().tolist() == [0, 1, 2, 3]


class Drawing(nn.Module):
    """Draws as many numbers as it has samples, and counts its calls."""

    calls = 0

    def forward(self, features, labels):
        self.calls += 1
        return self.calls * (features.square().sum() + 0 * torch.rand(len(labels)).sum())


def test_every_round_starts_afresh(monkeypatch, tmp_path):
    """With the same layer, whatever the round before has drawn, and with a loss that was not called yet."""
    reports = []
    problem = _Problem(pickle.dumps(Drawing()), 2, D, K, 1.0)
    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)
    ddp_check._rank_main(types.SimpleNamespace(send=reports.append), 0, 1, "", str(tmp_path / "stderr"), problem)
    assert reports == [ddp_check._round(Drawing(), *problem.batch(sizes)) for sizes in problem.batch_sizes()]


class Parted(nn.Module):
    """Rank 1's samples leave one of its parameters unused."""

    def __init__(self):
        super().__init__()
        self.of_class = nn.ParameterList(torch.ones(D) for _ in range(2))

    def forward(self, features, labels):
        return sum((features[labels == c] @ self.of_class[c]).sum() for c in labels.unique().tolist())


def round_of_a_rank(rank, world):
    features, labels = torch.ones(4, D, dtype=torch.float64), torch.tensor([0, 1, 0, 0])
    mine = slice(0, 2) if rank == 0 else slice(2, 4)
    return ddp_check._round(Parted(), features[mine], labels[mine])


def test_a_parameter_may_be_unused_on_some_rank(tmp_path):
    whole = ddp_check._round(Parted(), torch.ones(4, D, dtype=torch.float64), torch.tensor([0, 1, 0, 0]))
    for mine in ranks.spawn(round_of_a_rank, 2, tmp_path):
        assert [2 * g for g in mine.gradient] == pytest.approx(whole.gradient)


def test_a_loss_without_gradient_has_no_verdict():
    with pytest.raises(ValueError, match="loss_fn must have a gradient, got zero everywhere on the whole batch"):
        _compare(_Round(1.0, [0.0, 0.0]), [_Round(1.0, [0.0, 0.0])] * 2)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"loss_fn must have a finite gradient, got one of length {bad}"):
            _compare(_Round(bad, [3.0, bad]), [_Round(bad, [3.0, bad])] * 2)


# pytorch-metric-learning 2.9.0 multiplies by the number of ranks, which makes its default mode exact: every rank
# computes the whole loss, with a gradient through its own rows. `efficient=True` keeps own anchors only.
@pytest.mark.slow
@pytest.mark.parametrize(("efficient", "kind"), [(False, "exact"), (True, "wrong")])
def test_pytorch_metric_learning(efficient, kind):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distributed = pytest.importorskip("pytorch_metric_learning.utils.distributed")
    verdict = check_ddp(distributed.DistributedLossWrapper(losses.SupConLoss(), efficient=efficient), timeout=TIMEOUT)
    assert verdict.kind == kind
    assert "on unequal batches it fails" in verdict.note  # it gathers without exchanging sizes
    if efficient:
        assert verdict.relative_error > 0.1
    else:
        assert verdict.relative_error <= 1e-12
        assert [loss / verdict.whole_loss for loss in verdict.losses] == pytest.approx([2, 2])


def test_a_rank_that_raises():
    with pytest.raises(RuntimeError, match=r"^loss_fn failed: rank 1: ValueError: no such thing on this rank$"):
        check_ddp(raises_on_rank_1, timeout=TIMEOUT)


@pytest.mark.slow
def test_a_rank_that_dies():
    with pytest.raises(RuntimeError, match=r"^loss_fn failed: rank 1: it was ended by SIGKILL"):
        check_ddp(dies_on_rank_1, timeout=TIMEOUT)


@pytest.mark.slow
def test_a_rank_that_leaves():
    with pytest.raises(RuntimeError, match=r"^loss_fn failed: rank 1: it ended with exit code 0$"):
        check_ddp(leaves_on_rank_1, timeout=TIMEOUT)


@pytest.mark.slow
def test_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import hypercontrast.ddp_check as d, test_ddp_check as t\nprint(d.check_ddp(t.local_supcon))\n")
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode != 0
    assert "a script must call check_ddp under `if __name__ == '__main__':`" in done.stderr


@pytest.mark.slow
def test_a_rank_that_hangs():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1: not finished in 20 s$"):
        check_ddp(hangs_on_rank_1, timeout=20)
    assert time.monotonic() - start < 25


@pytest.mark.slow
def test_a_loss_that_is_no_scalar():
    with pytest.raises(RuntimeError, match=r"TypeError: loss_fn must return a scalar .*, got \[\d+, 8\]"):
        check_ddp(not_a_scalar, timeout=TIMEOUT)


def test_bad_arguments():
    for arguments, error, message in (
        (("ntce",), TypeError, "loss_fn must be a function or a module, got str"),
        ((lambda z, y: z.sum(),), TypeError, "loss_fn must be picklable to reach the ranks"),
        ((local_supcon, 1), ValueError, "world_size must be at least 2, got 1"),
        ((local_supcon, 2.0), TypeError, "world_size must be an integer, got float"),
    ):
        with pytest.raises(error, match=message):
            check_ddp(*arguments)
    with pytest.raises(TypeError, match="timeout must be a number of seconds, got str"):
        check_ddp(local_supcon, timeout="60")
    for name, value, message in (
        ("dim", 0, "dim must be at least 1, got 0"),
        ("num_classes", 0, "num_classes must be at least 1, got 0"),
        ("timeout", 0, "timeout must be positive and finite, got 0"),
        ("timeout", 2147484, "timeout must be at most 2147483 seconds, got 2147484"),
    ):
        with pytest.raises(ValueError, match=message):
            check_ddp(local_supcon, **{name: value})
