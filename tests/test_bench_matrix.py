"""The bench measures what it says: schema, rounds, errors and verdicts, peers, memory, cases, comparison of files."""

import dataclasses
import math
import os
import signal
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import arguments, diff, forms, matrix, peers, roofline, step, verdict
from bench import measure as measuring
from bench.__main__ import main
from bench.measure import in_fresh_process, interleaved, measure, peak_of_step
from bench.peers import OURS, Absent, Peer
from bench.record import ROOT, Case, Row, Writer, read

SMALL = ["--shape", "32", "8", "16", "--seconds", "0"]
# Logits of 1 TiB, more than any machine's memory; once per class they are small.
TOO_LARGE = Case("ntce", 1 << 19, 4, 2)


def rows_of(case, candidates, **options):
    return {row.form: row for row in measure(case, candidates, "cpu", 0, **{"memory": False, **options})}


# The file


def test_rows_survive_the_file(tmp_path):
    full = Row("ntce", OURS, 8, 4, 2, "float32", fwd_ms=1.5, launches=3, repeats=True, reason="one, two\nthree")
    rows = [full, dataclasses.replace(full, form="other", repeats=False, fwd_ms=None, launches=None, status="absent")]
    writer = Writer(tmp_path / "new" / "matrix.csv")
    for row in rows:
        writer.add(row)
    assert read(writer.path) == rows
    assert rows[0].case == Case("ntce", 8, 4, 2)


def test_a_record_made_before_a_column_was_added(tmp_path):
    (tmp_path / "old.csv").write_text("op,form,n,k,d,dtype,fwd_ms\nntce,ours,8,4,2,float32,1.5\n")
    assert read(tmp_path / "old.csv") == [Row("ntce", OURS, 8, 4, 2, "float32", fwd_ms=1.5)]
    for columns in ("op,form,n,k,d", "op,form,n,k,d,dtype,speed", "form,op,n,k,d,dtype"):
        (tmp_path / "other.csv").write_text(f"{columns}\n")
        with pytest.raises(ValueError, match="must have the columns of a Row"):
            read(tmp_path / "other.csv")


@pytest.mark.parametrize(
    "line",
    [
        "ntce,ours,8,4,2,float32",
        "ntce,ours,8,4,2,float32,fast",
        "ntce,ours,8,4,2,float32,1.5,more",
        "ntce,ours,8,,2,float32,1.5",
    ],
)
@pytest.mark.parametrize("command", ["diff", "plot"])
def test_a_file_that_is_cut_off_or_bent_is_one_line(line, command, tmp_path, capsys):
    path = tmp_path / "bent.csv"
    path.write_text(f"op,form,n,k,d,dtype,fwd_ms\nntce,other,8,4,2,float32,1.5\n{line}\n")
    assert main([command, *[str(path)] * (1 + (command == "diff"))]) == 2
    assert capsys.readouterr().err == f"error: {path} must have a Row a line, got another in line 3\n"


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*/matrix.csv")), ids=lambda p: p.parent.name)
def test_the_records_that_are_kept_can_be_read(path):
    assert {row.status for row in read(path)} >= {"ok"}


# Rounds


def test_forms_run_in_turn():
    ran = []
    runs = {name: partial(ran.append, name) for name in "abc"}
    times = interleaved(runs, 0, lambda run: run() or float(len(ran)), least=4)
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab" + "abc"  # a warm-up and four rounds
    assert times["b"] == [5, 7, 12, 14]


def test_rounds_go_on_for_the_time_asked():
    def clock(run):
        run()
        return 1.0

    assert len(interleaved({"a": lambda: torch.ones(1)}, 0.05, clock)["a"]) > 100


class FakeGPU:
    """What a clock asks of a device, in order; its events are a millisecond apart."""

    def __init__(self) -> None:
        self.asked = []

    def Event(self, enable_timing):
        said = self.asked.append
        return types.SimpleNamespace(
            record=lambda: said("event"), synchronize=lambda: said("wait"), elapsed_time=lambda end: 1.0
        )

    def synchronize(self):
        self.asked.append("synchronize")

    def _sleep(self, cycles):
        self.asked.append(cycles)


@pytest.mark.parametrize(("seconds", "wait_ms"), [(0.002, 4.0), (0.05, measuring.LONGEST_WAIT_MS)])
def test_a_device_waits_until_its_host_has_issued_the_run(seconds, wait_ms, monkeypatch):
    gpu = FakeGPU()
    monkeypatch.setattr(torch, "cuda", gpu)
    clock = measuring._DeviceClock("cpu")
    clock.cache = types.SimpleNamespace(zero_=lambda: gpu.asked.append("empty"))

    def run():
        gpu.asked.append("run")
        time.sleep(seconds)

    assert clock(run) == 1.0
    cycles = gpu.asked[2 * measuring.HOST_REPEATS]
    assert gpu.asked == ["synchronize", "run"] * measuring.HOST_REPEATS + [
        cycles,
        "empty",
        "event",
        "run",
        "event",
        "wait",
    ]
    assert wait_ms <= cycles / measuring.CYCLES_A_MS <= min(3 * wait_ms, measuring.LONGEST_WAIT_MS)
    assert clock.host_ms(run) >= 1e3 * seconds
    assert clock(run) == 1.0
    assert gpu.asked[2 * measuring.HOST_REPEATS + 6] == cycles  # measured once


# Errors


def test_tangential_part():
    g = verdict.tangential(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [5.0, 5.0]]))
    assert torch.equal(g, torch.tensor([[0.0, 4.0], [0.0, 0.0]]))


def judged(monkeypatch, got, want=(1.0, (0.0, 4.0)), dtype="float32", eager=None):
    """Of a loss of one sample and its gradient, when those of float64 are `want`."""
    z, y = torch.tensor([[2.0, 0.0]]), torch.zeros(1, dtype=torch.int64)
    tensors = {key: [torch.tensor(x), torch.tensor([g])] for key, (x, g) in {"got": got, "want": want}.items()}
    steps = {OURS: tensors["got"]}
    if eager is not None:
        steps["eager N x N"] = [torch.tensor(eager[0]), torch.tensor([eager[1]])]
    monkeypatch.setattr(forms, "truth", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(forms, "step", lambda *_: tensors["want"])
        return verdict.judge(Case("supcon", 1, 1, 2, dtype, temperature=1.0), [z], y, steps)[OURS]


def test_what_lies_along_a_vector_is_no_tangential_error(monkeypatch):
    assert judged(monkeypatch, (1.0, (1.0, 4.0)))[:2] == (0.25, 0.0)
    assert judged(monkeypatch, (1.0, (0.0, 5.0)))[:2] == (0.25, 0.25)
    assert judged(monkeypatch, (2.0, (0.0, 5.0)))[:2] == (1.0, 0.25)
    assert judged(monkeypatch, (0.0, (0.0, 0.0)), (0.0, (0.0, 0.0)))[:2] == (0.0, 0.0)
    assert judged(monkeypatch, (0.0, (0.0, 1e-9)), (0.0, (0.0, 0.0)))[:2] == (math.inf, math.inf)
    assert math.isnan(judged(monkeypatch, (1.0, (math.nan, 4.0))).error)


def test_the_limit_is_twice_the_eager_forms_error(monkeypatch):
    eager = (1.1, (0.0, 4.5))
    assert not judged(monkeypatch, (1.19, (0.0, 4.9)), eager=eager).reason
    assert judged(monkeypatch, (1.3, (0.0, 4.9)), eager=eager).reason.startswith(
        "loss is off by 3.0e-01 of 1.0e+00, 2.0"
    )
    assert judged(monkeypatch, (1.0, (0.0, 5.1)), eager=eager).reason.startswith("gradient 0 is off")
    assert judged(monkeypatch, (math.nan, (0.0, 4.0)), eager=eager).reason.startswith("loss is off by nan")
    nothing = (math.nan, (math.nan, 4.0))
    assert judged(monkeypatch, (1.01, (0.0, 4.0)), eager=nothing).reason  # which allows nothing


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 5e-7), ("tf32", 2**-10), ("bfloat16", 2**-8)])
def test_rounding_is_allowed(monkeypatch, dtype, rounding):
    assert not judged(monkeypatch, (1.0, (0.0, 4 * (1 + rounding))), dtype=dtype).reason
    assert judged(monkeypatch, (1.0, (0.0, 4 * (1 + 10 * rounding))), dtype=dtype).reason


@pytest.mark.parametrize("op", forms.EAGER)
def test_a_gradient_ten_times_less_exact_is_wrong(op):
    case = Case(op, 96, 7, 16)
    leaves, y = forms.of_case(case, "cpu")
    loss, *gradients = forms.step(forms.ours(op), leaves, y)
    steps = {OURS: [loss, *gradients], "less exact": [loss, *(g * (1 + 8e-6) for g in gradients)]}
    judged = verdict.judge(case, leaves, y, steps)
    assert judged[OURS].error < 8e-6 / 10
    assert not judged[OURS].reason
    assert judged["less exact"].reason.startswith("gradient 0 is off")


def row_off(gradients, i, by):
    """The gradients, with the last row of one too long."""
    wrong = [g.clone() for g in gradients]
    wrong[i][-1] *= 1 + by
    return wrong


@pytest.mark.parametrize(("dtype", "by"), [("float32", 3e-5), ("tf32", 0.03), ("bfloat16", 0.2), ("float16", 0.03)])
@pytest.mark.parametrize("op", forms.EAGER)
def test_one_wrong_row_among_many_is_told(op, dtype, by):
    """Of which the whole gradient does not tell: it is judged first, and would be named."""
    case = Case(op, 1024, 200, 16, dtype)
    leaves, y = forms.of_case(case, "cpu")
    loss, *gradients = forms.step(forms.ours(op), leaves, y)
    eager = forms.EAGER[op][forms.yardstick(op)]
    steps = {forms.yardstick(op): forms.step(eager, leaves, y), OURS: [loss, *gradients]}
    steps["a row"] = [loss, *row_off(gradients, 0, by)]
    steps["not a number"] = [loss, *row_off(gradients, 0, math.nan)]
    judged = verdict.judge(case, leaves, y, steps)
    assert not judged[OURS].reason
    assert judged["a row"].reason.startswith("row 1023 of gradient 0 is off by ")
    assert judged["not a number"].reason.startswith("gradient 0 is off by nan")


def test_one_wrong_row_of_the_tangential_part_is_told():
    """Hidden in its gradient by a larger part along its vector, as rounding leaves it."""
    case = Case("ntce", 1024, 200, 16)
    leaves, y = forms.of_case(case, "cpu")
    loss, *gradients = forms.step(forms.ours("ntce"), leaves, y)
    along, rounding = leaves[0].detach() / leaves[0].norm(dim=1, keepdim=True).detach(), 1.0
    eager = [loss, gradients[0] + rounding * along * gradients[0].norm(dim=1, keepdim=True), gradients[1]]
    steps = {"eager K x M": eager, "a row": [loss, *row_off(gradients, 0, 0.5)]}
    steps |= {OURS: [loss, *row_off(gradients, 0, 1e-6)]}
    judged = verdict.judge(case, leaves, y, steps)
    assert judged["a row"].reason.startswith("tangential gradient 0")
    assert not judged[OURS].reason


@pytest.mark.parametrize("features", ["random", "collapsed"])
@pytest.mark.parametrize("op", forms.EAGER)
def test_eager_forms_are_the_specification(op, features):
    """Or the bound they set would mean nothing."""
    case = Case(op, 96, 7, 16, features=features, temperature=0.2)
    leaves, y = forms.of_case(case, "cpu")
    steps = {name: forms.step(partial(form, temperature=0.2), leaves, y) for name, form in forms.EAGER[op].items()}
    for found in verdict.judge(case, leaves, y, steps).values():
        assert found.error < (1e-4 if features == "collapsed" else 1e-5)


@pytest.mark.parametrize("op", ["ntce", "nonl"])
def test_classes_that_are_not_there_cost_nothing(op):
    """Neither in the yardstick nor in what is counted as work: 300 classes, of which 24 samples have fewer."""
    case, kept = Case(op, 24, 300, 16), []
    leaves, y = forms.of_case(case, "cpu")
    eager = forms.EAGER[op][forms.yardstick(op)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        step = forms.step(eager, leaves, y)
    assert (24, 24) in kept
    assert (300, 24) not in kept
    assert verdict.judge(case, leaves, y, {"eager K x M": step})["eager K x M"].error < 1e-6
    work, row = 6 * 24 * len(y.unique()) * 16, rows_of(case, peers.candidates(case, "cpu", []))[OURS]
    assert row.tflops == pytest.approx(1e-9 * work / row.fwd_bwd_ms, rel=1e-3)
    with FlopCounterMode(display=False) as counter:
        forms.products(op, leaves, y)()
    assert counter.get_total_flops() == work


@pytest.mark.parametrize("op", forms.EAGER)
def test_products_are_of_the_dtype_that_ours_takes(op, monkeypatch):
    """On a CPU float32 whatever the inputs have: products of half types by torch take other times there."""
    leaves, y = forms.of_case(Case(op, 64, 8, 16, "float16"), "cpu")
    dtypes = set()
    monkeypatch.setattr(forms, "product_", lambda *tensors, **_: dtypes.update(x.dtype for x in tensors[:3]))
    forms.products(op, leaves, y)()
    assert dtypes == {torch.float32}


def test_lean_pairs_in_float64():
    """With anchors that have no positives, which count for nothing."""
    z = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.arange(40) % 23
    want = forms.step(forms.truth("supcon", 0.3), [z], y)
    for form in forms.EAGER["supcon"].values():  # which reduce in float32
        assert verdict.deviation(forms.step(partial(form, temperature=0.3), [z], y), want) < 5e-7


def test_lean_pairs_make_one_matrix():
    """Of N x N, and its gradient: the published form keeps several."""

    def kept(form):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            form(*forms.inputs("supcon", 64, 4, 8)[0], forms.inputs("supcon", 64, 4, 8)[1])
        return sizes.count(64**2)

    assert kept(forms.supcon_lean) == 1 < kept(forms.supcon_published)


@pytest.mark.parametrize("tau", [0.1, 0.01])
@pytest.mark.parametrize("labels", ["single", "longtail"])
@pytest.mark.parametrize("op", forms.EAGER)
def test_rounding_near_collapse_is_no_mistake(op, labels, tau):
    """Where the true gradient is smaller than what rounding leaves of it, or nothing."""
    case = Case(op, 512, 20, 64, labels=labels, temperature=tau, features="collapsed")
    assert rows_of(case, peers.candidates(case, "cpu", []))[OURS].status == "ok"


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 1, 1), (3, 40, 2), (5, 9, 1)])
@pytest.mark.parametrize("op", forms.PROTOTYPE_LOSSES)
def test_a_row_whose_terms_cancel_is_no_mistake(op, shape):
    """As of a class without samples: in one dimension nothing of its gradient is left but rounding."""
    case = Case(op, *shape)
    assert rows_of(case, peers.candidates(case, "cpu", []))[OURS].status == "ok"


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (Case("ntce", 4096, 1000, 512), (4096, 1000)),
        (Case("ntce", 65536, 1000, 128), (4096, 1000)),
        (Case("normface", 32768, 100_000, 512), (1024, 100_000)),
        (Case("supcon", 65536, 1000, 128), (2048, 31)),  # an anchor keeps its 64 positives
        (Case("supcon", 65536, 32768, 128, labels="instances"), (2048, 1024)),
        (Case("normface", 16384, 16384, 64, labels="instances"), (1024, 1024)),
        (Case("supcon", 65536, 5, 128), (2048, 2)),  # samples of other classes stay
        (Case("supcon", 50, 1, 64), (50, 1)),  # unless there were none
    ],
)
def test_errors_are_measured_at_a_size_that_float64_can_do(case, size):
    small = verdict.reduced(case)
    assert (small.n, small.k) == size
    assert small._replace(n=case.n, k=case.k) == case


@pytest.mark.parametrize("judge", ["matrix", "roofline"])
def test_errors_are_measured_with_a_budget_as_much_smaller(judge, monkeypatch):
    """Or exponentials would be kept that are recomputed at full size."""
    case, budget, seen = Case("ntce", 8192, 2000, 4), measuring.hc.memory_budget(), []
    right = forms.ours("ntce")

    def ours(*inputs):
        seen.append((len(inputs[0]), measuring.hc.memory_budget()))
        return right(*inputs)

    if judge == "roofline":
        roofline._judged(case, ours, "cpu")
    else:
        rows_of(case, {OURS: ours})
    small = verdict.reduced(case).n
    assert seen[0] == (small, budget * small // case.n)
    assert measuring.hc.memory_budget() == budget


def radial(z, w, y, temperature=0.1):
    """The right value, and gradients with a part along their vectors."""
    loss = forms.ntce_eager(z, w, y, temperature)
    length = z.norm(dim=1).sum()
    return loss + length - length.detach()


WRONG = {
    "value": lambda z, w, y, temperature=0.1: forms.ntce_eager(z, w, y, temperature) + 0.01,
    "temperature": lambda z, w, y, temperature=0.1: forms.ntce_eager(z, w, y, 1.01 * temperature),
    "gradient along its vector": radial,
    "not a number": lambda z, w, y, temperature=0.1: forms.ntce_eager(z, w, y, temperature) * math.nan,
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_form_is_told(mistake):
    case = Case("ntce", 64, 8, 16)
    rows = rows_of(case, {"eager K x M": forms.ntce_eager, OURS: WRONG[mistake]})
    assert rows["eager K x M"].status == "ok"
    assert rows[OURS].status == "wrong"
    assert "is off by" in rows[OURS].reason
    assert rows[OURS].fwd_bwd_ms > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", forms.EAGER)
def test_a_form_that_is_wrong_at_full_size_alone_is_told(op, dtype, monkeypatch):
    monkeypatch.setattr(verdict, "ERROR_SAMPLES", (64, 64))
    monkeypatch.setattr(verdict, "ERROR_LOGITS", 64**2)
    case, right = Case(op, 512, 40, 16, dtype), forms.ours(op)

    def late(*inputs):
        return right(*inputs) * (1.5 if len(inputs[0]) > 64 else 1)

    eager = peers.candidates(case, "cpu", [])
    rows = rows_of(case, {**eager, OURS: late, "right": right})
    assert {name: row.status for name, row in rows.items()} == {forms.yardstick(op): "ok", OURS: "wrong", "right": "ok"}
    assert rows[OURS].reason.startswith(f"at full size, beside {forms.yardstick(op)}, loss is off by")
    assert rows[OURS].error == rows["right"].error  # which is of few samples
    assert rows_of(case, {OURS: late})[OURS].status == "ok"  # with nothing to compare it with


@pytest.mark.parametrize(
    ("rows", "judged", "n", "dtype", "off", "told"),
    [
        (64, 64, 512, "float32", 1e-3, "gradient 0"),
        (64, 64, 512, "bfloat16", 1.0, "gradient 0"),
        (1, 256, 4096, "float32", 3e-4, "row 4095 of gradient 0"),
        (1, 256, 4096, "bfloat16", 1.0, "row 4095 of gradient 0"),
    ],
)
def test_what_is_wrong_of_a_gradient_at_full_size_alone_is_told(rows, judged, n, dtype, off, told, monkeypatch):
    monkeypatch.setattr(verdict, "ERROR_SAMPLES", (judged, judged))
    case, right = Case("ntce", n, 40, 16, dtype), forms.ours("ntce")

    def late(z, w, y):
        """The right value; of more samples than are judged the gradient of the last rows is too long by a share."""
        if len(z) > judged:
            z = torch.cat([z[:-rows], z[-rows:] + off * (z[-rows:] - z[-rows:].detach())])
        return right(z, w, y)

    found = rows_of(case, {**peers.candidates(case, "cpu", []), OURS: late, "right": right})
    assert found["right"].status == "ok"
    assert found[OURS].status == "wrong"
    assert found[OURS].reason.startswith(f"at full size, beside eager K x M, {told} is off by")


def test_a_wrong_form_fails_the_run(monkeypatch, tmp_path, capsys):
    arguments = ["matrix", "--op", "ntce", *SMALL, "--vs", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert [row.status for row in read(tmp_path / "matrix.csv")] == ["ok", "ok"]
    monkeypatch.setattr(forms, "ours", lambda op, temperature: WRONG["temperature"])
    assert main(arguments) == 1
    assert [row.status for row in read(tmp_path / "matrix.csv")] == ["ok", "wrong"]
    assert "bench: ours of ntce 32 x 8 x 16 is wrong: " in capsys.readouterr().err


def test_a_case_that_fails_leaves_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(verdict, "judge", lambda case, *_: 1 / (case.n - 32))
    entries = [matrix.Entry(Case(op, 32, 8, 16), ()) for op in ("buffer", "ntce")]
    outcome = matrix.measure_all(entries, tmp_path / "matrix.csv", "cpu", 0)
    assert {row.op for row in outcome.rows} == {"buffer", "ntce"}
    assert [(row.status, row.reason) for row in outcome.wrong] == [("failed", "ZeroDivisionError: division by zero")]


def test_why_a_form_is_wrong_is_told_where_it_has_no_graph_either(monkeypatch):
    """As cut-cross-entropy on a GPU: it waits for the device, so that it cannot be captured."""

    class Clock(measuring._DeviceClock):
        def __init__(self):
            pass

        def __call__(self, run):
            return measuring._wall_clock(run)

        def host_ms(self, run):
            return 1.0

    def captured(run):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(measuring, "clock", lambda device: Clock())
    monkeypatch.setattr(measuring, "_scratch", lambda *_: {})
    monkeypatch.setattr(measuring, "_launches", lambda *_: {})
    monkeypatch.setattr(measuring, "captured", captured)
    rows = rows_of(Case("ntce", 64, 8, 16), {"eager K x M": forms.ntce_eager, "peer": WRONG["temperature"]})
    assert rows["eager K x M"].status == "ok"
    assert rows["eager K x M"].reason == "not captured: RuntimeError: operation not permitted"
    assert rows["peer"].status == "wrong"
    assert "is off by" in rows["peer"].reason


# What a row holds


def test_a_row_is_whole():
    case = Case("nonl", 64, 8, 16, features="collapsed")
    row = rows_of(case, peers.candidates(case, "cpu", []), memory=True)[OURS]
    assert row.case == case
    assert row.status == "ok"
    assert row.repeats is True
    assert row.rounds == 3
    assert row.fwd_p20 <= row.fwd_ms <= row.fwd_p80
    assert row.fwd_bwd_p20 <= row.fwd_bwd_ms <= row.fwd_bwd_p80
    assert row.tflops == pytest.approx(6e-9 * 64 * 8 * 16 / row.fwd_bwd_ms, rel=1e-3)
    assert row.outputs_mib == pytest.approx((1 + (64 + 8) * 16) * 4 / 2**20, rel=1e-3)
    assert 0 <= row.scratch_mib < 16
    assert 0 < row.tangential_error < 1e-4
    assert row.threads == torch.get_num_threads()
    assert row.torch == torch.__version__
    assert row.fwd_ratio == row.fwd_bwd_ratio == 1
    assert row.matmul_share > 0
    assert {row.host_ms, row.graph_ms, row.graph_fwd_ms, row.launches} == {None}  # a GPU's


def test_a_form_that_gives_nan_twice_repeats():
    rows = rows_of(Case("ntce", 8, 4, 2), {"nan": lambda *inputs: math.nan * forms.ntce_eager(*inputs)})
    assert rows["nan"].repeats is True


def test_tf32_set_by_the_newer_switch():
    """After which torch's older one cannot be read."""
    matmul = torch.backends.cuda.matmul
    case = Case("nonl", 8, 4, 4)
    try:
        for precision, tf32 in (("tf32", True), ("ieee", False)):
            matmul.fp32_precision = precision
            assert rows_of(case, peers.candidates(case, "cpu", []))[OURS].status == "ok"
            assert (matmul.fp32_precision == "tf32") is tf32
    finally:
        matmul.allow_tf32 = False  # the older one can be read again


def test_a_ratio_is_the_median_over_the_rounds():
    """Not the ratio of the medians, 2 here: rounds are what noise leaves comparable."""
    fields = {"eager": {}, OURS: {}}
    times = {("eager", "fwd"): [4.0, 4.0, 9.0], (OURS, "fwd"): [1.0, 2.0, 3.0], ("eager", "fwd_bwd"): [1.0, 1.0, 1.0]}
    measuring.add_times(fields, times)
    assert fields["eager"]["fwd_ratio"] == 3
    assert fields[OURS]["fwd_ratio"] == 1
    assert "fwd_bwd_ratio" not in fields["eager"]  # there is none of ours
    fields[OURS]["status"] = "wrong"
    measuring.add_times(wrong := {"eager": {}, OURS: fields[OURS]}, times)
    assert "fwd_ratio" not in wrong["eager"]


def test_a_case_that_returns_for_a_peer_compares_within_the_return(monkeypatch, tmp_path):
    """Where the machine is twice as slow the second time."""
    case = Case("ntce", 8, 4, 2)
    visits = [
        [timed("eager K x M", 20.0, fwd_bwd_ratio=2.0), timed(OURS, 10.0, fwd_bwd_ratio=1.0)],
        [timed("compiled", 30.0, fwd_bwd_ratio=1.5), timed(OURS, 20.0, fwd_bwd_ratio=1.0)],
    ]
    monkeypatch.setattr(matrix, "measure", lambda *_: visits.pop(0))
    entries = [matrix.Entry(case, ()), matrix.Entry(case, ("compiled",))]
    outcome = matrix.measure_all(entries, tmp_path / "matrix.csv", "cpu", 0)
    assert [row.form for row in outcome.rows] == ["eager K x M", OURS, "compiled"]
    said = matrix.headlines(outcome.rows)
    assert "| eager K x M | 2.00x |" in said
    assert "| compiled | 1.50x |" in said


def test_the_speed_of_a_wrong_result_is_told_as_such():
    rows = [timed("peer", 5.0, fwd_bwd_ratio=0.5, status="wrong"), timed(fwd_bwd_ratio=1.0)]
    assert "| peer (wrong) | 0.50x |" in matrix.headlines(rows)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_buffer_is_measured(ranks):
    from bench import buffer

    rows = buffer.measure(Case("buffer", 8, 32, 12, ranks=ranks), "cpu", 0)
    assert [row.form for row in rows] == [buffer.CAT, buffer.RING, buffer.TWIN, OURS]
    for row in rows:
        assert row.status == ("ok" if buffer.operators(row.form) or row.form in buffer.EAGER else "absent")
        assert row.status != "ok" or (row.error < 1e-6 and row.fwd_ms > 0 and row.rounds >= buffer.ROUNDS)


@pytest.mark.parametrize("shape", [(8, 32, 4), (8, 35, 4), (8, 5, 4)])
def test_a_queue_that_does_not_hold_what_was_pushed_is_wrong(shape, monkeypatch):
    """The ring goes round at any place; a push that forgets is told, unless the queue holds no whole batch."""
    from bench import buffer

    case, push = Case("buffer", *shape), buffer.Ours.push
    forgets = iter([True, *[False] * 10_000])
    monkeypatch.setattr(buffer.Ours, "push", lambda self: None if next(forgets) else push(self))
    rows = {row.form: row for row in buffer.measure(case, "cpu", 0)}
    assert rows[buffer.CAT].error == rows[buffer.RING].error < 1e-6
    assert rows[buffer.TWIN].status == "ok"  # forgot the oldest alone
    monkeypatch.setattr(buffer.Ours, "push", lambda self: None)
    rows = {row.form: row for row in buffer.measure(case, "cpu", 0)}
    assert rows[buffer.TWIN].status == ("ok" if shape[1] < shape[0] else "wrong")


def test_the_training_step_has_rows_of_its_own(monkeypatch, tmp_path):
    entries = [matrix.Entry(matrix.STEP)]
    found = [
        timed(op="step", form=form, error=None, fwd_bwd_ratio=times) for form, times in (("eager", 1.5), (OURS, 1.0))
    ]
    monkeypatch.setattr(step, "missing", str)
    monkeypatch.setattr(step, "rows", lambda device, quick: iter(found))
    outcome = matrix.measure_all(entries, tmp_path / "matrix.csv", "cpu", 0)
    assert read(tmp_path / "matrix.csv") == outcome.rows == found
    assert "| eager | 1.50x |  |  |" in matrix.headlines(outcome.rows)
    monkeypatch.setattr(step, "rows", lambda device, quick: 1 / 0)
    outcome = matrix.measure_all(entries, tmp_path / "matrix.csv", "cpu", 0)
    assert [row.status for row in outcome.wrong] == ["failed"]


@pytest.mark.parametrize(("module", "reason"), [("yaml", "needs PyYAML"), ("torchvision", "needs torchvision")])
def test_without_the_recipes_needs_the_training_step_is_absent(module, reason, monkeypatch, tmp_path):
    for other in ("yaml", "torchvision"):
        monkeypatch.setitem(sys.modules, other, None if other == module else step)  # anything that has a spec
    outcome = matrix.measure_all([matrix.Entry(matrix.STEP)], tmp_path / "matrix.csv", "cpu", 0)
    assert [(row.status, row.reason) for row in outcome.rows] == [("absent", reason)]
    assert not outcome.wrong


# Labels


@pytest.mark.parametrize("kind", forms.LABELS)
@pytest.mark.parametrize("op", ["ntce", "supcon"])
def test_labels(op, kind):
    k, views = 200, 2 if op == "supcon" else 1
    (_, *_), y = forms.inputs(op, views * k, k, 4, labels=kind)
    counts = torch.bincount(y, minlength=k)
    assert len(y) == views * k
    expected = {"single": counts[0] == len(y), "instances": (counts == views).all()}
    assert expected.get(kind, counts.max() < len(y) / 4)
    if kind == "longtail":
        assert counts[:50].sum() > 5 * counts[-50:].sum()


def test_collapsed_features_are_at_their_prototypes():
    (z, w), y = forms.of_case(Case("ntce", 64, 8, 16, features="collapsed"), "cpu")
    assert torch.cosine_similarity(z, w[y]).min() > 0.999


# Peers


def peer(build, **options):
    return Peer(lambda case: case.op == "normface", build, **options)


def test_an_absent_peer_says_why(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {
        "not installed": peer(None, missing=peers._package("no_such_module", "no-such-package")),
        "for a GPU": peer(None, needs_gpu=True),
        "broken": peer(lambda case: 1 / 0),
        "for another loss": Peer(lambda case: case.op == "supcon", None),
    })  # fmt: skip
    case = Case("normface", 32, 8, 16)
    rows = rows_of(case, peers.candidates(case, "cpu"))
    reasons = {name: row.reason for name, row in rows.items() if row.status == "absent"}
    assert reasons == {
        "not installed": "pip install no-such-package",
        "for a GPU": "needs a GPU",
        "broken": "ZeroDivisionError: division by zero",
    }
    assert rows[OURS].status == "ok"
    assert rows["for a GPU"].fwd_bwd_ms is None
    assert "for another loss" not in rows


def test_a_peer_that_fails_or_differs_is_a_finding(monkeypatch, tmp_path):
    def raises(z, w, y):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(peers, "PEERS", {
        "fails": peer(lambda case: raises),
        "differs": peer(lambda case: lambda z, w, y: 2 * forms.normface_eager(z, w, y)),
    })  # fmt: skip
    outcome = matrix.measure_all(
        [matrix.Entry(Case("normface", 32, 8, 16))], tmp_path / "matrix.csv", "cpu", 0, memory=False
    )
    statuses = {row.form: row.status for row in outcome.rows}
    assert statuses == {"eager K x M": "ok", "fails": "failed", "differs": "wrong", OURS: "ok"}
    assert next(row for row in outcome.rows if row.form == "fails").reason == "RuntimeError: no kernel"
    assert not outcome.wrong


@pytest.mark.parametrize("name", ["pytorch-metric-learning", "lightly"])
def test_installed_peers_compute_our_number(name):
    case = Case("supcon", 32, 16, 8, labels="instances")
    form = peers.candidates(case, "cpu", [name])[name]
    if isinstance(form, Absent):
        pytest.skip(form.reason)
    leaves, y = forms.of_case(case, "cpu")
    assert verdict.judge(case, leaves, y, {name: forms.step(form, leaves, y)})[name].error < 1e-6


# Memory


def test_out_of_memory_is_a_result():
    rows = rows_of(TOO_LARGE, peers.candidates(TOO_LARGE, "cpu", ["eager M x M"]), memory=True)
    assert rows["eager M x M"].status == "out of memory"
    assert "GiB that are free" in rows["eager M x M"].reason
    assert rows["eager M x M"].fwd_bwd_ms is None
    assert rows["eager M x M"].error < 1e-4  # the smaller case of errors fits
    assert rows[OURS].status == "ok"
    assert rows["eager K x M"].fwd_bwd_ratio > 0
    assert rows["eager M x M"].fwd_bwd_ratio is None


def end_of_process(number, *case):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGKILL, MemoryError), (signal.SIGSEGV, RuntimeError)])
def test_a_killed_process_is_out_of_memory_and_a_crash_is_not(number, kind):
    with pytest.raises(kind, match=f"ended with code -{number.value}"):
        in_fresh_process(end_of_process, number)


def test_a_crash_of_ours_fails_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "peak_of_step", partial(end_of_process, signal.SIGSEGV))
    outcome = matrix.measure_all([matrix.Entry(Case("ntce", 32, 8, 16), ())], tmp_path / "matrix.csv", "cpu", 0)
    assert [row.reason for row in outcome.wrong] == ["RuntimeError: its process ended with code -11"]


def test_other_errors_come_out_of_the_process():
    with pytest.raises(RuntimeError, match="KeyError"):
        in_fresh_process(peak_of_step, Case("ntce", 8, 4, 2), "no such form")


# Cases


def test_quick_has_the_headlines():
    entries = {entry.case: entry.vs for entry in matrix.quick()}
    assert len(entries) == len(matrix.quick())
    assert entries[Case("ntce", 4096, 1000, 512)] == (*matrix.PUBLISHED, "compiled")  # and K x M, which is always there
    for op in ("nonl", "normface"):
        assert Case(op, 4096, 1000, 512) in entries
    assert Case("supcon", 8192, 100, 128) in entries
    assert entries[Case("supcon", 4096, 100, 128)] == matrix.PUBLISHED
    sizes = [case.n for case in entries if case[:1] + case[2:4] == ("ntce", 1000, 128) and case.features == "random"]
    assert sizes == [256, 1024, 4096, 16384, 65536]
    assert {case.op for case in entries if case.features == "collapsed"} == set(forms.EAGER)
    kept = [4 * case.n * case.k <= 64 * 2**20 for case in entries if case.op == "ntce"]
    assert {True, False} == set(kept)


def test_standard_cases_can_be_made():
    for entries in (matrix.quick(), matrix.standard_cpu(), matrix.standard_gpu()):
        for entry in entries:
            forms.check(entry.case)
            assert entry.vs is None or set(entry.vs) <= {name for op in forms.EAGER for name in peers.names(op)}
    shapes = {(case.n, case.k, case.d) for case in (entry.case for entry in matrix.standard_gpu()) if case.op == "nonl"}
    assert shapes >= {(4096, 1000, 2048), (65536, 1000, 128), (32768, 100_000, 512), (256, 1000, 2048)}
    assert {entry.case.n for entry in matrix.standard_gpu() if entry.case.op == "supcon"} >= {8192, 65536, 262144}


def test_quick_ends_in_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(matrix, "QUICK_SECONDS", -1)
    assert main(["--quick", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "not begun after -1 s: ntce 4096 x 1000 x 512 against" in said
    assert "0 rows in" in said


def test_cases_past_the_limit_are_named(tmp_path, capsys):
    entries = [matrix.Entry(Case("ntce", 32, 8, 16), ())]
    outcome = matrix.measure_all(entries, tmp_path / "matrix.csv", "cpu", 0, limit=-1)
    assert not outcome.rows
    assert outcome.skipped == entries
    assert "ntce 32 x 8 x 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--shape", "8", "4", "2"], "--quick has its own cases"),
        (["--quick", "--op", "step"], "--quick has no case of step: leave out --quick"),
        (["--quick", "--op", "ntce", "step"], "--quick has no case of step"),
        (["--threads", "-1"], "must be a whole number of at least 1, got -1"),
        (["--threads", "0"], "must be a whole number of at least 1, got 0"),
        (["--seconds", "-1"], "must be a number of at least 0, got -1"),
        (["--seconds", "nan"], "must be a number of at least 0, got nan"),
        (["roofline", "--seconds", "some"], "must be a number of at least 0, got some"),
        (["--op", "ntce", "--temperature", "inf"], "--temperature must be positive and finite, got inf"),
        (
            ["--op", "nonl", "--vs", "eager M x M"],
            "--vs must be of compiled, eager K x M for these cases, got eager M x M",
        ),
        (["--op", "supcon", "--shape", "8", "4", "2", "--vs", "lightly"], "for these cases, got lightly"),
        (["--op", "ntce", *SMALL, "--output", __file__], "--output must be where files can be written: "),
        (["roofline", "--output", __file__], "--output must be where files can be written: "),
        (["profile", "ntce", "--output", __file__], "--output must be where files can be written: "),
        (["communication", "--output", __file__], "--output must be where files can be written: "),
        (["step", "--losses", "nonl", "--output", str(ROOT)], "--output must be where files can be written: "),
        (["roofline", "--shape", "8", "9", "2"], "--shape needs K <= N for supcon, got 8 9"),
        (["profile", "supcon", "--shape", "8", "9", "2"], "--shape needs K <= N for supcon, got 8 9"),
        (["diff", "a.csv", "b.csv", "--tolerance", "nan"], "must be a number of at least 0, got nan"),
        (["diff", "a.csv", "b.csv", "--tolerance", "-1"], "must be a number of at least 0, got -1"),
        (["--op", "step", "--dtype", "float32"], "--op step has its own cases"),
        (["--op", "buffer", "--features", "collapsed"], "--op buffer has one kind of samples"),
        (["--op", "ntce", "buffer", "--temperature", "0.5"], "--op buffer has one kind of samples"),
        (["--shape", "8", "0", "2"], "--shape must be positive, got 8 0 2"),
        (["--op", "ntce", "--temperature", "-1"], "--temperature must be positive and finite, got -1.0"),
        (["--op", "supcon", "--labels", "instances", "--shape", "8", "8", "2"], "N = 2K"),
        (["--op", "supcon", "--shape", "8", "9", "2"], "K <= N for supcon, got 8 9"),
        (["unheard"], "must be one of matrix, diff"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", [["--op", "ntce", *SMALL, "--vs"], ["roofline", "--op", "ntce", *SMALL]])
def test_a_second_run_of_the_day_leaves_the_first_its_record(command, monkeypatch, tmp_path):
    monkeypatch.setattr(arguments, "ROOT", tmp_path)
    monkeypatch.setattr(roofline, "SQUARE", {"cpu": 32})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 4096})
    assert main(command) == 0
    runs = tmp_path / "runs" / "bench"
    (first,) = runs.iterdir()
    record = {path: path.read_bytes() for path in first.iterdir()}
    assert [main(command) for _ in range(2)] == [0, 0]
    assert sorted(path.name for path in runs.iterdir()) == [first.name, f"{first.name}-2", f"{first.name}-3"]
    assert {path: path.read_bytes() for path in first.iterdir()} == record


def test_a_disk_that_fills_up_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(matrix, "Writer", lambda path: Writer(Path("/dev/full")))
    assert main(["--op", "ntce", *SMALL, "--vs", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: /dev/full cannot be written: No space left on device\n"


# Comparison


def timed(form=OURS, fwd_bwd=10.0, error=1e-6, op="ntce", **other):
    times = {"fwd_bwd_ms": fwd_bwd, "fwd_bwd_p20": 0.95 * fwd_bwd, "fwd_bwd_p80": 1.05 * fwd_bwd}
    return Row(op, form, 8, 4, 2, "float32", error=error, tangential_error=error, **{**times, **other})


@pytest.mark.parametrize(
    ("after", "worse"),
    [
        (timed(), None),
        (timed(fwd_bwd=5.0), None),
        (timed(fwd_bwd=13.0), "fwd_bwd is 1.30x as slow"),
        (timed(fwd_bwd=10.9), None),
        (timed(fwd_bwd=13.0, fwd_bwd_p20=10.2), None),  # the ranges overlap
        (timed(error=1.1e-6), None),
        (timed(error=2e-6), "error grew from 1.0e-06 to 2.0e-06"),
        (timed(error=math.nan), "error grew"),
        (timed(status="wrong", reason="because"), "is wrong (because)"),
        (timed(status="out of memory", fwd_bwd_ms=None), "is out of memory"),
    ],
)
def test_diff(after, worse, tmp_path, capsys):
    for name, row in (("a", timed()), ("b", after)):
        writer = Writer(tmp_path / f"{name}.csv")
        writer.add(row)
        writer.add(timed(form=f"only {name}"))
    assert main(["diff", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == (1 if worse else 0)
    said = capsys.readouterr().out
    assert "1 rows in both; 1 in A alone, 1 in B alone" in said
    assert ("worse: " in said) == bool(worse)
    assert worse is None or worse in said


def test_diff_tells_a_case_that_is_missing(tmp_path, capsys):
    """As of a run that was cut off; not one that did not run before either, nor of new cases."""
    rows = [timed(), timed(form="other"), timed(op="nonl"), timed(op="supcon", status="absent")]
    for name, chosen in (("whole", rows), ("half", [*rows[:2], timed(op="normface")])):
        writer = Writer(tmp_path / f"{name}.csv")
        for row in chosen:
            writer.add(row)
    whole, half = str(tmp_path / "whole.csv"), str(tmp_path / "half.csv")
    assert main(["diff", whole, half]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("worse: ")]
    assert found == [f"worse: nonl 8 4 2 float32 uniform 0.1 random 1: is not in {half}"]


def test_diff_marks_what_proves_nothing():
    assert "~1.04" in diff.table([(timed(), timed(fwd_bwd=10.4))])
    assert "| 1.50 |" in diff.table([(timed(), timed(fwd_bwd=15.0))])


def test_diff_of_what_cannot_be_compared(tmp_path, capsys):
    for name, form in (("a", "x"), ("b", "y")):
        Writer(tmp_path / f"{name}.csv").add(timed(form=form))
    (tmp_path / "c.csv").write_text("loss,form\n")
    a, b, c = (str(tmp_path / f"{name}.csv") for name in "abc")
    assert main(["diff", a, b]) == 2
    assert main(["diff", a, c]) == 2
    assert main(["diff", a, str(tmp_path / "none.csv")]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
