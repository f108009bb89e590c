"""A step taken apart: nothing is left out, nothing counted twice, and the driver's step is what runs."""

import argparse
import csv
import time

import pytest
import torch

pytest.importorskip("yaml")
pytest.importorskip("torchvision")

from bench import step as bench_step
from bench.__main__ import main
from bench.step import PARTS, Timeline, Training, measure, rows
from hypercontrast.config import configure
from hypercontrast.launch import Ranks
from hypercontrast.objective import Objective
from hypercontrast.step import Step

CPU = Ranks(0, 1, torch.device("cpu"))
# Narrower ones crash the 1x1 convolutions with a stride of oneDNN, on one thread of some CPUs.
SMALL = {"batch_size": 16, "width": 8, "compile": "off"}


def test_a_timeline_says_what_ended_when():
    timeline = Timeline(CPU.device)
    timeline.mark("start")
    time.sleep(0.02)
    timeline.mark("slow")
    timeline.mark("quick")
    (slow, slow_ms), (quick, quick_ms) = timeline.milliseconds()
    assert (slow, quick) == ("slow", "quick")
    assert quick_ms < 20 <= slow_ms < 2000


@pytest.mark.parametrize(
    "recipe", ["cifar10-nonl", "cifar10-scl", "cifar10-ce", "cifar10-etf-dr", "cifar10-nonl-queue"]
)
def test_parts_fill_the_step(recipe):
    config = configure(recipe=recipe, **SMALL)
    training = Training(config, 48, CPU)
    training.whole(1)
    started = time.perf_counter()
    parts = training.parts(3)
    elapsed = 1e3 * (time.perf_counter() - started)
    assert tuple(parts) == PARTS
    assert all(ms > 0 for ms in parts.values())
    assert sum(parts.values()) == pytest.approx(elapsed, rel=0.05)


@pytest.mark.parametrize("slow", PARTS)
def test_time_is_counted_where_it_is_spent(slow, monkeypatch):
    """Every part in turn made slower by 250 ms a step, which stands out on a busy machine too."""

    def delayed(function):
        def run(*args, **options):
            time.sleep(0.25)
            return function(*args, **options)

        return run

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.25)
            return grad

    training = Training(configure(recipe="cifar10-nonl", **SMALL), 48, CPU)
    network, loss = training.objective.network, training.objective.loss
    if slow == "data":
        monkeypatch.setattr(bench_step, "normalize", delayed(bench_step.normalize))
    elif slow == "model forward":
        network.head.embed = delayed(network.head.embed)
    elif slow == "loss forward":
        loss.forward = delayed(loss.forward)
    elif slow == "loss backward":
        forward = loss.forward
        loss.forward = lambda features, *others: forward(Slow.apply(features), *others)
    elif slow == "model backward":
        backbone = network.backbone.forward
        network.backbone.forward = lambda images: Slow.apply(backbone(images))
    else:
        training.step.optimizer.zero_grad = delayed(training.step.optimizer.zero_grad)
    training.whole(1)
    parts = training.parts(3)
    assert parts[slow] >= 750
    assert max(parts, key=parts.get) == slow


def test_marks_leave_the_step_as_it_is():
    """The same weights after steps with marks and without, and after the driver's step alone."""
    config = configure(recipe="cifar10-nonl", **SMALL)
    marked, unmarked, plain = (Training(config, 48, CPU) for _ in range(3))
    marked.parts(3)
    unmarked.whole(3)
    torch.manual_seed(config.seed)
    network = bench_step.build_network(config, 3, 32, 10).to(memory_format=torch.channels_last)
    step = Step(Objective(network, config, CPU, 16, torch.full((10,), 5)), config, CPU)
    for images, labels in plain.epoch(0):
        step(images, labels, 1.0, config.peak_lr)
    for a, b, c in zip(
        network.parameters(),
        marked.objective.network.parameters(),
        unmarked.objective.network.parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("loss", ["nonl", "scl"])
def test_shares_add_up_to_the_whole_step(loss):
    shares = measure(f"cifar10-{loss}", 50, 4, **SMALL)
    assert sum(shares.parts.values()) + shares.communication + shares.rest == pytest.approx(shares.step_ms, abs=1e-3)
    assert shares.communication == 0  # there is nobody to speak with
    assert shares.n == (32 if loss == "scl" else 16)
    assert (shares.k, shares.d) == (10, 128 if loss == "scl" else 64)
    assert shares.steps == 4
    assert shares.pictures_per_s == pytest.approx(16e3 / shares.step_ms, rel=1e-3)
    assert shares.epoch_s == pytest.approx(3125 * shares.step_ms / 1e3, rel=1e-3)
    flat = shares.flat()
    assert sum(flat[name] for name in (*PARTS, "communication", "rest")) == pytest.approx(1, abs=1e-3)


def test_a_slow_machine_keeps_its_digits(monkeypatch):
    """29.96 pictures a second are not 30."""
    monkeypatch.setattr(Training, "whole", lambda self, steps, *, exchange=True: [534.0] * steps)
    shares = measure("cifar10-nonl", 50, 4, **SMALL)
    assert shares.pictures_per_s == 29.96
    assert shares.epoch_s == 1669


def test_rows_compare_our_loss_with_the_eager_one():
    found = list(rows("cpu", quick=True))
    assert [row.form for row in found] == ["eager", "ours"] * 2
    for eager, ours in zip(found[::2], found[1::2], strict=True):
        assert eager.case == ours.case
        assert (eager.op, eager.status, ours.fwd_bwd_ratio) == ("step", "ok", 1)
        assert 0 < ours.fwd_bwd_p20 <= ours.fwd_bwd_ms <= ours.fwd_bwd_p80
        assert 0.1 < eager.fwd_bwd_ratio < 10
    assert len({row.case for row in found}) == 2


def command(*arguments):
    parser = argparse.ArgumentParser()
    bench_step.add_arguments(parser)
    return bench_step.run(parser.parse_args(arguments))


def test_the_command_over_ranks(tmp_path, capfd):
    output = tmp_path / "shares.csv"
    assert command(
        "--losses", "nonl", "--pictures", "64", "--steps", "2", "--batch-size", "16", "--width", "8", "--cpu-ranks", "2",
        "--output", str(output),
    ) == 0  # fmt: skip
    shown = capfd.readouterr().out
    assert shown.count("| cifar10-nonl |") == 1
    with output.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["ranks"], row["n"]) == ("2", "8")
    assert float(row["communication"]) != 0
    assert sum(float(row[name]) for name in (*PARTS, "communication", "rest")) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "cifar11-nonl"], "recipe must be"),
        (["--recipe", "cifar10-nonl-accumulate"], "accumulate must be 1"),
        (["--losses", "nonl", "--gpus", "900"], "gpus must be at most"),
        (["--losses", "nonl", "--compile", "perhaps"], "compile must be one of auto, on, off"),
        (["--losses", "nonl", "--pictures", "3", "--batch-size", "1"], "batch_size must leave"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["step", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("steps", ["1", "many"])
def test_too_few_steps_are_refused(steps, capsys):
    with pytest.raises(SystemExit) as stop:
        command("--steps", steps)
    assert stop.value.code == 2
    assert f"must be a whole number of at least 2, got {steps}" in capsys.readouterr().err
