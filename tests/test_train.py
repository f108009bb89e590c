"""The training driver: settings, errors, runs, resuming, ranks."""

import builtins
import copy
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import get_type_hints

import pytest
import ranks
import torch
from runs import CLOCK, assert_same_run, records, timeless

from hypercontrast import NegativeBuffer, data, ntce_loss
from hypercontrast.checkpoint import load_checkpoint
from hypercontrast.config import Config, UsageError, configure, parse, read_config, read_recipe, to_yaml
from hypercontrast.evaluate import Options, evaluate
from hypercontrast.launch import RankError, Ranks, fail_for
from hypercontrast.losses import CELoss
from hypercontrast.metrics import DESCRIPTIONS
from hypercontrast.objective import Objective, inverse_weights
from hypercontrast.plan import _activation_bytes, _duration, _seconds_per_picture
from hypercontrast.runs import load_runs
from hypercontrast.step import Step
from hypercontrast.train import (
    LossRecord,
    NotFinite,
    TrainingError,
    _interrupted,
    learning_rate,
    main,
    plan,
    prepare,
    train,
)
from hypercontrast.workspace import build_network

for extra in ("mlxtend", "safetensors", "tyro", "yaml"):
    pytest.importorskip(extra)

SHARED = Path(__file__).parents[2] / "shared" / "data"
ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = {"limit": 200, "batch_size": 50, "cpu_ranks": 1}
SMALL_FLAGS = ["--limit", "200", "--batch-size", "50", "--cpu-ranks", "1"]


def small(folder, **options):
    return configure(**{"run_dir": str(folder), "epochs": 2, "quiet": True, **SMALL, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of three epochs."""
    torch.set_num_threads(1)
    return train(small(tmp_path_factory.mktemp("finished") / "run", epochs=3))


# Settings


def test_the_defaults_are_the_recipe_of_a_first_run():
    assert dataclasses.replace(read_recipe("mnist5k-nonl"), recipe="none") == Config()


def test_flags_beat_the_recipe_which_beats_the_defaults():
    config = parse(["--recipe", "cifar100-ntce", "--lr", "0.3", "--neck", "bn"])
    assert (config.loss, config.dataset, config.model) == ("ntce", "cifar100", "resnet18")
    assert (config.lr, config.temperature, config.neck) == (0.3, 0.2, "bn")
    assert config.weight_decay == Config().weight_decay
    assert parse(["--loss", "ce", "--dataset", "cifar10"]).recipe == "cifar10-ce"
    assert parse(["--dataset", "folder:somewhere"]).recipe == "none"
    for config in (
        parse(["--recipe", "cifar10-nonl", "--warmup-epochs", "20"]),  # more than the epochs of the defaults
        configure(recipe="cifar10-nonl", warmup_epochs=20),
    ):
        assert (config.warmup_epochs, config.epochs) == (20, 1000)
    with pytest.raises(UsageError, match="warmup_epochs must be between 0 and epochs, got 20"):
        parse(["--warmup-epochs", "20"])
    assert parse(["--recipe", "none", "--dataset", "cifar10"]).model == Config().model
    assert configure(loss="ce", dataset="cifar10") == parse(["--loss", "ce", "--dataset", "cifar10"])


@pytest.mark.parametrize("name", [name for name, hint in get_type_hints(Config).items() if hint is bool])
def test_every_switch_can_be_turned_both_ways(name, tmp_path):
    flag = name.replace("_", "-")
    (tmp_path / "config.yaml").write_text(to_yaml(read_recipe("imagenet100-ce")))  # whose sync_bn is on
    for start in (["--recipe", "imagenet100-ce"], ["--recipe", "mnist5k-ce"], ["--resume", str(tmp_path)]):
        assert getattr(parse([*start, f"--{flag}"]), name) is True
        assert getattr(parse([*start, f"--no-{flag}"]), name) is False


def test_config_survives_its_file(tmp_path):
    config = configure(loss="etf-dr", lr=0.25, dataset="folder:/a b/ü", weight_decay=0.0)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert read_config(tmp_path / "config.yaml") == config


def test_ranks_wait_no_longer_than_the_system_can_count():
    assert Config(rank_timeout=2147483).rank_timeout == 2147483
    with pytest.raises(UsageError, match="rank_timeout must be at most 2147483, got 2147484"):
        Config(rank_timeout=2147484)


def test_a_mistake_on_the_command_line_has_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hypercontrast.train", "--gpus", "99"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["tyro", "yaml"])
def test_a_missing_extra_says_what_to_install(missing, monkeypatch, capsys):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == missing:
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["--dry-run"]) == 2
    assert "pip install 'hypercontrast[train]'" in capsys.readouterr().err


def test_importing_the_driver_needs_no_extra():
    blocked = (
        "tyro",
        "yaml",
        "rich",
        "torchvision",
        "safetensors",
        "pyarrow",
        "PIL",
        "mlxtend",
        "matplotlib",
        "triton",
    )
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport hypercontrast.train"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_learning_rate_rises_and_falls():
    config = Config(epochs=10, warmup_epochs=2, lr=0.5)
    rates = [learning_rate(step, 5, config) for step in range(50)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(50, 5, config) == pytest.approx(5e-4)
    assert learning_rate(0, 5, Config(warmup_epochs=0, lr=0.5)) == 0.5


# Runs


def test_a_run_leaves_what_it_promises(finished):
    from safetensors import safe_open

    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints", "config.yaml", "embeddings.safetensors", "environment.json", "metrics.jsonl", "report.html",
    ]  # fmt: skip
    config = read_config(finished / "config.yaml")
    assert (config.loss, config.limit, config.resume, config.run_dir) == ("nonl", 200, "none", str(finished))

    lines = records(finished)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert {"loss", "accuracy", "prototype_accuracy", "lr", *CLOCK} <= line.keys()
        assert set(DESCRIPTIONS) <= line.keys()
        assert 0 <= line["accuracy"] <= 1
        assert (line["samples"], line["classes_seen"]) == (200, 10)
    assert lines[2]["loss"] < lines[0]["loss"]
    assert lines[2]["lr"] == pytest.approx(learning_rate(11, 4, config))

    with safe_open(finished / "embeddings.safetensors", "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == [str(digit) for digit in range(10)]
        features, labels, means, prototypes = map(file.get_tensor, ("features", "labels", "class_means", "prototypes"))
        pictures, sizes, decisions = map(file.get_tensor, ("pictures", "class_sizes", "decisions"))
    assert features.shape == (200, 128)
    assert labels.shape == (200,)
    assert means.shape == prototypes.shape == (10, 128)
    accuracy = ((features @ means.T).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(lines[2]["prototype_accuracy"])
    assert sizes.tolist() == [20] * 10
    (run,) = load_runs([finished])
    cosines = run.embeddings.centred_means_KD @ run.embeddings.centred_means_KD.T
    assert cosines[~torch.eye(10, dtype=bool)].std() == pytest.approx(lines[2]["nc2_angle_std"], abs=1e-5)
    assert decisions[0].bincount().tolist() == labels.bincount().tolist()
    assert (decisions[0] == decisions[1]).float().mean().item() == pytest.approx(lines[2]["accuracy"])
    assert pictures.shape == (200, 1, 28, 28)
    assert json.loads((finished / "environment.json").read_text())["torch"] == torch.__version__
    assert "NONL" in (finished / "report.html").read_text()


@pytest.mark.parametrize("loss", ["ce", "normface", "ntce", "etf-dr"])
def test_every_loss_trains(loss, tmp_path):
    seen = []
    folder = train(small(tmp_path / "run", loss=loss, neck="linear"), on_epoch=seen.append)
    assert seen == records(folder)
    assert seen[1]["loss"] < seen[0]["loss"]
    prototypes = load_checkpoint(folder).tensors["head.prototypes"]
    if loss == "etf-dr":
        cosines = prototypes @ prototypes.T
        torch.testing.assert_close(cosines, torch.eye(10) * 10 / 9 - 1 / 9)


@pytest.mark.parametrize(("head", "dim"), [("mlp", 128), ("linear", 128), ("none", 128)])
def test_scl_classifies_by_its_class_means(head, dim, tmp_path):
    folder = train(small(tmp_path / "run", loss="scl", head=head, lr=0.1, seed=1))
    lines = records(folder)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["accuracy"] == line["prototype_accuracy"] for line in lines)
    assert lines[-1]["weight_alignment"] < 1e-9
    tensors = load_checkpoint(folder).tensors
    assert tensors["head.prototypes"].equal(tensors["class_means"])
    assert tensors["head.prototypes"].shape == (10, dim)
    layers = {"mlp": 2, "linear": 1, "none": 0}[head]
    assert sum(name.startswith("head.") and name.endswith("weight") for name in tensors) == layers


def test_scl_sees_two_different_views_of_every_picture(tmp_path, monkeypatch):
    seen = []

    def spy(self, features, labels, share):
        seen.append((features.detach(), labels))
        return real(self, features, labels, share)

    real = Objective.__call__
    monkeypatch.setattr(Objective, "__call__", spy)
    train(small(tmp_path / "run", loss="scl", epochs=1))
    for features, labels in seen:
        assert features.shape == (100, 128)
        assert labels[:50].equal(labels[50:])
        # The 25 shifts of a digit are drawn anew, so few coincide.
        assert (features[:50] != features[50:]).any(1).float().mean() > 0.75


@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason=f"needs {SHARED / 'cifar10'}")
def test_scl_trains_on_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    dataset = f"parquet:{SHARED / 'cifar10'}"
    folder = train(small(tmp_path / "run", loss="scl", dataset=dataset, limit=60, batch_size=30, epochs=1))
    assert (records(folder)[0]["classes_seen"], records(folder)[0]["samples"]) == (10, 60)


# Options of the objective


@pytest.mark.parametrize(("rule", "first", "last"), [("cosine", 0.5, 0.1), ("learned", 0.5, 0.3)])
def test_temperature_follows_its_rule(rule, first, last, tmp_path):
    options = {"temperature_rule": rule, "temperature": first, "final_temperature": last, "loss": "nonl"}
    folder = train(small(tmp_path / "run", epochs=3, **options))
    temperatures = [line["temperature"] for line in records(folder)]
    assert all(first > a > b >= last - 1e-6 for a, b in itertools.pairwise(temperatures))
    if rule == "cosine":  # the last of twelve steps begins at 11/12 of the way
        assert temperatures[-1] == pytest.approx(last + (first - last) * (1 + math.cos(math.pi * 11 / 12)) / 2)
    else:
        assert load_checkpoint(folder).tensors["log_temperature"].exp().item() == pytest.approx(temperatures[-1])
    with pytest.raises(Interruption):
        train(small(tmp_path / "again", epochs=3, **options), on_epoch=interrupt_after(2))
    assert_same_run(train(small(tmp_path / "again", epochs=3, resume="auto", **options)), folder)


def test_a_learned_temperature_stays_in_its_range(tmp_path):
    """NONL has no minimum in it: at a high rate it falls to the least that is allowed, and no further."""
    options = {"temperature_rule": "learned", "final_temperature": 0.15, "lr": 0.5}
    folder = train(small(tmp_path / "run", epochs=4, limit=400, **options))
    assert records(folder)[-1]["temperature"] == pytest.approx(0.15)


def test_inverse_weights_weigh_classes_alike():
    counts = torch.tensor([8, 2, 0, 6])
    weights = inverse_weights(counts)
    torch.testing.assert_close(weights * counts, torch.tensor([16 / 3, 16 / 3, 0, 16 / 3]))
    labels = torch.arange(4).repeat_interleave(counts)
    logits = torch.randn(16, 4)
    by_class = torch.stack(
        [torch.nn.functional.cross_entropy(logits[labels == c], labels[labels == c]) for c in (0, 1, 3)]
    )
    torch.testing.assert_close(CELoss(weights)(logits, labels), by_class.mean())


@pytest.mark.parametrize(("loss", "options"), [("ce", {}), ("ntce", {}), ("nonl", {"anchor": "both"})])
def test_long_tails_weights_and_sampling(loss, options, tmp_path):
    common = {"loss": loss, "imbalance": 0.1, "batch_size": 40, **options}
    plain = train(small(tmp_path / "plain", **common))
    weighted = train(small(tmp_path / "weighted", class_weights="inverse", **common))
    balanced = train(small(tmp_path / "balanced", sampling="balanced", **common))
    samples = sum(data.long_tailed_counts(20, 10, 0.1, "exp"))
    lines = [records(folder)[-1] for folder in (plain, weighted, balanced)]
    assert [line["samples"] for line in lines] == [samples] * 3
    assert len({line["loss"] for line in lines}) == 3


def test_epochs_between_measurements_hold_losses_only(tmp_path):
    often = train(small(tmp_path / "often", epochs=5))
    seldom = train(small(tmp_path / "seldom", epochs=5, evaluate_every=2))
    lines = records(seldom)
    assert ["accuracy" in line for line in lines] == [False, True, False, True, True]
    assert all({"loss", "lr", "seconds", "samples_per_second"} <= line.keys() for line in lines)
    assert timeless(seldom)[-1] == timeless(often)[-1]
    # A checkpoint is as old as the last measurement.
    with pytest.raises(Interruption):
        train(small(tmp_path / "again", epochs=5, evaluate_every=2), on_epoch=interrupt_after(3))
    assert load_checkpoint(tmp_path / "again").epoch == 2
    assert_same_run(train(small(tmp_path / "again", epochs=5, evaluate_every=2, resume="auto")), seldom)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("options", [{"loss": "nonl", "accumulate": 2}, {"loss": "scl", "lr": 0.1}])
def test_compiled_training_takes_the_same_steps(options, tmp_path):
    """On the CPU; 83 pictures in batches of 42 and 41, so that two sizes are compiled."""
    options = {"epochs": 2, "limit": 83, "batch_size": 42, **options}
    eager = train(small(tmp_path / "eager", **options))
    compiled = train(small(tmp_path / "compiled", compile="on", **options))
    for line, expected in zip(records(compiled), records(eager), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert line["instance_alignment"] == pytest.approx(expected["instance_alignment"], rel=1e-2)


# A queue of past features, and batches in chunks


@pytest.mark.parametrize("loss", [pytest.param("ntce", marks=pytest.mark.slow), "nonl", "scl"])
def test_a_queue_adds_negatives_and_survives_a_restart(loss, tmp_path):
    options = {"loss": loss, "queue": 120, "accumulate": 2}
    whole = train(small(tmp_path / "whole", **options))
    with pytest.raises(Interruption):
        train(small(tmp_path / "run", **options), on_epoch=interrupt_after(1))
    (queue,) = load_checkpoint(tmp_path / "run").state["queues"]
    torch.testing.assert_close(queue["features"].norm(dim=1), torch.ones(120))
    assert_same_run(train(small(tmp_path / "run", resume="auto", **options)), whole)
    (queue,), (again,) = (load_checkpoint(tmp_path / name).state["queues"] for name in ("whole", "run"))
    assert queue["features"].equal(again["features"])
    # More columns in every log-sum-exp: the loss of the same run without them is smaller.
    without = train(small(tmp_path / "without", loss=loss, accumulate=2))
    assert records(without)[0]["loss"] < records(whole)[0]["loss"]


def without_batch_norm(name, channels, size, width):
    """A backbone for which a batch is nothing but its samples."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size * size, 16), torch.nn.ReLU()), 16


def train_simply(rank, world, port, config):
    """Without batch norm, which sees ranks and chunks; as one rank of several for world > 1."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypercontrast.workspace.build_model", without_batch_norm)
        train(config)


@pytest.mark.parametrize(("loss", "queue"), [pytest.param("ce", 0, marks=pytest.mark.slow), ("nonl", 40), ("scl", 80)])
def test_ranks_and_chunks_take_the_steps_of_one_batch(loss, queue, tmp_path):
    def config(name, **options):
        fixed = {"loss": loss, "queue": queue, "limit": 80, "batch_size": 40, "lr": 0.1}
        return small(tmp_path / name, **fixed, **options)

    train_simply(0, 1, "", config("one"))
    train_simply(0, 1, "", config("chunks", accumulate=4))
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    ranks = torch.multiprocessing.spawn(train_simply, (2, port, config("ranks", accumulate=2)), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    while not ranks.join(timeout=1):
        assert time.monotonic() < deadline, "the ranks hang"
    expected = load_checkpoint(tmp_path / "one").tensors
    for name in ("chunks", "ranks"):
        for key, tensor in load_checkpoint(tmp_path / name).tensors.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5, msg=f"{key} of {name}")
        for line, whole in zip(records(tmp_path / name), records(tmp_path / "one"), strict=True):
            assert line["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    # scl contrasts everyone's past features on every rank; of the prototype losses each rank adds up its own.
    queues = [kept["features"] for kept in load_checkpoint(tmp_path / "ranks").state["queues"]]
    assert [len(features) for features in queues] == {"ce": [], "nonl": [20, 20], "scl": [80, 80]}[loss]
    if loss == "scl":
        assert queues[0].equal(queues[1])


@pytest.mark.parametrize("model", ["resnet18"])
def test_a_resnet_trains_on_a_folder_of_pictures(model, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for split in ("train", "val"):
        for name, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(4):
                Image.new("RGB", (8, 8), tuple(c + n for c in colour)).save(tmp_path / split / name / f"{n}.png")
    folder = train(
        small(tmp_path / "run", dataset=f"folder:{tmp_path}", model=model, batch_size=4, epochs=1, warmup_epochs=0)
    )
    assert records(folder)[0]["classes_seen"] == 2


def test_a_folder_that_holds_a_run_is_not_overwritten(finished, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert main([*SMALL_FLAGS, "--run-dir", str(finished)]) == 2
    assert f"continue it with --resume {finished}, or name another" in capsys.readouterr().err
    assert main(["--resume", str(finished)]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_finished_run_without_its_report_says_what_writes_it(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "a run")
    (folder / "report.html").unlink()
    assert main(["--resume", str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {folder} holds a finished run; for its report: ")
    assert message.endswith(f"report '{folder}'\n")


@pytest.mark.parametrize("resume", ["none", "auto"])
@pytest.mark.parametrize("left", ["checkpoints", "evaluation.json"])
def test_nothing_that_another_run_left_becomes_part_of_a_run(left, resume, finished, tmp_path, capsys):
    """A run of another seed took the checkpoints for its own, and ended with their accuracy."""
    folder = tmp_path / "run"
    shutil.copytree(finished / "checkpoints", folder / "checkpoints")
    if left != "checkpoints":
        (folder / "checkpoints").rename(tmp_path / "elsewhere")
        (folder / left).touch()
    assert main([*SMALL_FLAGS, "--seed", "7", "--resume", resume, "--run-dir", str(folder)]) == 2
    says = f"error: run_dir must hold no {left} of a run without its config.yaml, got {folder}: name another\n"
    assert capsys.readouterr().err == says
    assert [path.name for path in folder.iterdir()] == [left]


def test_quiet_prints_the_final_line_only(tmp_path, capsys):
    flags = [*SMALL_FLAGS, "--epochs", "1", "--loss", "ce"]
    assert main([*flags, "--run-dir", str(tmp_path / "a"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith(f"{tmp_path / 'a'}: accuracy ")
    assert main([*flags, "--run-dir", str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/1  loss ")
    assert "proto acc" in lines[0]
    assert len(lines[0]) <= 80


def test_dry_run_says_much_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--cpu-ranks", "3", "--batch-size", "300", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "global batch   286, at most 96 a rank" in out
    assert "14 an epoch, 112 in 8 epochs" in out
    assert "about 257 samples of other classes" in out
    assert "MiB a rank" in out
    assert list(tmp_path.iterdir()) == []
    assert "9 prototypes of other classes" in plan(prepare(configure(loss="ce")))
    assert "fixed prototypes" in plan(prepare(configure(loss="etf-dr")))
    assert "negatives      9 prototypes of other classes" in plan(prepare(configure(anchor="sample")))
    assert "for every prototype, 9 prototypes of other classes" in plan(prepare(configure(anchor="both")))
    scl = plan(prepare(configure(loss="scl", batch_size=125, queue=1000)))
    assert "two views of each" in scl
    assert "about 1125 views of other classes for every view" in scl


def test_ranks_of_a_launcher_are_counted_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["--batch-size", "300", "--dry-run"]) == 0
    assert "global batch   286, at most 96 a rank" in capsys.readouterr().out
    for flags, rule in (
        (["--backend", "reference"], "backend 'reference' must run on one rank, got 3"),
        (["--batch-size", "5"], "batch_size must leave every one of 3 ranks two pictures"),
    ):
        assert main(flags) == 2
        assert rule in capsys.readouterr().err


class Clocked(torch.nn.Module):
    """Every pass takes a while, and every picture of it a little; the first pass takes long."""

    def __init__(self, a_pass, a_picture):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.a_pass, self.a_picture, self.passes, self.now = a_pass, a_picture, [], 0.0

    def forward(self, pictures):
        self.now += self.a_pass + self.a_picture * len(pictures) + 5 * (not self.passes)
        self.passes.append(len(pictures))
        return pictures * self.scale


@pytest.mark.parametrize(
    ("a_pass", "a_picture", "passes"),
    [(0.25, 1e-3, [2, 32]), (0.0, 4e-3, [2, 32, 64]), (0.0, 1e-6, [2, 32, 64, 128, 256, 512])],
)
def test_a_plan_times_batches_not_a_few_pictures(a_pass, a_picture, passes, monkeypatch):
    network = Clocked(a_pass, a_picture)
    monkeypatch.setattr("time.perf_counter", lambda: network.now)
    seconds = _seconds_per_picture(network, torch.zeros(2, 1, 1, 1), 32)
    assert network.passes == passes
    assert seconds == pytest.approx(a_pass / passes[-1] + a_picture)


def planned(**options):
    """The plan of a run on 100 pictures whose activations take 8 MiB each and whose pass takes 0.25 s."""
    shared = {"limit": 100, "batch_size": 50, "epochs": 4, "cpu_ranks": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypercontrast.plan._activation_bytes", lambda *_: 2**23)
        patch.setattr("hypercontrast.plan._seconds_per_picture", lambda *_: 0.25)
        return plan(configure(**(shared | options)))


@pytest.mark.parametrize(
    ("options", "pictures", "seconds"),
    [
        ({}, 50, "100"),
        ({"epochs": 1}, 50, "25"),
        ({"loss": "scl", "epochs": 1}, 100, "50"),
        ({"cpu_ranks": 2}, 25, "50"),
        ({"accumulate": 5, "epochs": 3}, 10, "100"),
        ({"accumulate": 2, "cpu_ranks": 2, "loss": "scl", "epochs": 3}, 25, "100"),
        ({"batch_size": 60}, 50, "100"),  # two equal batches
    ],
)
def test_a_plan_adds_up(options, pictures, seconds):
    """Memory: activations of a rank's chunk, all its views; beside them megabytes. Time: of a rank, all its views, and
    a third more where everything is encoded twice.
    """
    text = planned(**options)
    assert int(re.search(r"about (\d+) MiB", text)[1]) == pytest.approx(8 * pictures, abs=5)
    assert f"about {seconds} seconds if cpu" in text


def test_durations_are_in_a_unit_that_suits():
    assert [_duration(s) for s in (0.4, 119, 120, 7199, 7200, 71.9 * 3600, 72 * 3600)] == [
        "0 seconds", "119 seconds", "2 minutes", "120 minutes", "2 hours", "72 hours", "3 days",
    ]  # fmt: skip


def test_activations_are_what_all_layers_of_a_picture_give():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.ReLU()))
    assert _activation_bytes(network, torch.zeros(2, 3, 2, 2)) == 4 * (12 + 5 + 5)


@pytest.mark.parametrize(
    ("loss", "flags"),
    [
        *((loss, ["--lr", "1e30"]) for loss in ("ce", "nonl", "scl")),
        # Weights stay finite, but not the lengths of the prototypes, or of the features.
        ("nonl", ["--weight-decay", "1e30"]),
        ("nonl", ["--weight-decay", "1e25", "--warmup-epochs", "0", "--neck", "linear"]),
        ("scl", ["--weight-decay", "1e25", "--warmup-epochs", "0", "--head", "linear"]),
    ],
)
def test_a_loss_that_blows_up_stops_the_run(loss, flags, tmp_path, capsys):
    flags = ["--loss", loss, *SMALL_FLAGS, *flags, "--run-dir", str(tmp_path / "run")]
    assert main(flags) == 1
    err = capsys.readouterr().err
    assert "epoch 1, step " in err
    assert ("try a smaller --lr or a larger --temperature; " in err) == (loss != "ce")  # which has none
    assert err.count("\n") == 1
    assert load_checkpoint(tmp_path / "run") is None


@pytest.mark.parametrize("bad", ["loss", "gradient", "features"])
def test_nothing_is_updated_from_a_bad_step_on(bad):
    """Not by later steps either: on a GPU the host hears of it only then."""
    config = configure(cpu_ranks=1, loss="ce")
    network = build_network(config, 1, 28, 10)
    objective = Objective(network, config, ALONE, 20, torch.full((10,), 2))
    step = Step(objective, config, ALONE)
    images, labels = torch.randn(20, 1, 28, 28), torch.arange(20) % 10
    assert step(images, labels, 1.0, 0.1).isfinite()
    before = [
        x.clone() for x in (*network.parameters(), *(s["momentum_buffer"] for s in step.optimizer.state.values()))
    ]
    assert len(before) == 2 * len(list(network.parameters()))
    images[3] = torch.inf if bad == "features" else images[3]
    worse = {"loss": lambda loss: loss * torch.inf, "gradient": blown_up, "features": lambda loss: loss}[bad]
    forward = objective.loss.forward
    objective.loss.forward = lambda *inputs: worse(forward(*inputs))
    assert not step(images, labels, 1.0, 0.1).isfinite()
    objective.loss.forward = forward
    step(torch.randn(20, 1, 28, 28), labels, 1.0, 0.1)
    after = [*network.parameters(), *(s["momentum_buffer"] for s in step.optimizer.state.values())]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))


def test_a_step_is_sgd_at_the_rate_that_it_is_given():
    """With momentum 0.9, gradients of this step alone, and weight decay for all but the temperature."""
    config = configure(cpu_ranks=1, loss="ntce", temperature_rule="learned", weight_decay=0.1)
    torch.manual_seed(0)
    network = build_network(config, 1, 28, 10)
    twin = copy.deepcopy(network)
    step = Step(Objective(network, config, ALONE, 20, torch.full((10,), 2)), config, ALONE)
    expected = dict(twin.named_parameters())
    momenta = dict.fromkeys(expected, 0.0)
    for lr in (0.1, 0.03):
        images, labels = torch.randn(20, 1, 28, 28), torch.randint(0, 10, (20,))
        loss = ntce_loss(twin(images), twin.head.prototypes, labels, temperature=twin.log_temperature.exp())
        gradients = torch.autograd.grad(loss, list(expected.values()))
        assert step(images, labels, 1.0, lr) == pytest.approx(loss.item(), rel=1e-5)
        with torch.no_grad():
            for (name, x), gradient in zip(expected.items(), gradients, strict=True):
                decay = 0.0 if name == "log_temperature" else 0.1
                momenta[name] = 0.9 * momenta[name] + gradient + decay * x
                x -= lr * momenta[name]
        for name, x in network.named_parameters():
            torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_features_that_nobody_looks_at_fail_the_step_too(accumulate, monkeypatch):
    """As on a GPU, where the host would wait for them."""
    monkeypatch.setattr(Step, "_check", lambda *_: None)
    config = configure(cpu_ranks=1, loss="ce", accumulate=accumulate)
    network = build_network(config, 1, 28, 10)
    step = Step(Objective(network, config, ALONE, 20, torch.full((10,), 2)), config, ALONE)
    before = [x.clone() for x in network.parameters()]
    images = torch.randn(20, 1, 28, 28)
    images[3] = torch.inf
    assert not step(images, torch.arange(20) % 10, 1.0, 0.1).isfinite()
    assert all(x.equal(y) for x, y in zip(before, network.parameters(), strict=True))


class WithAnother:
    """A rank of two, to whose sums the other adds `theirs`."""

    world, theirs = 2, 0.0

    def sum(self, x):
        return x.add_(self.theirs)


@pytest.mark.parametrize(("loss", "bad"), [(3.0, False), (math.nan, False), (1.0, True)])
def test_a_step_hears_of_the_other_ranks(loss, bad):
    """It returns the mean of the ranks' losses, and changes nothing where another's loss or features are not finite."""
    config = configure(cpu_ranks=1, loss="ce")
    network = build_network(config, 1, 28, 10)
    objective = Objective(network, config, ALONE, 20, torch.full((10,), 2))
    step = Step(objective, config, ALONE)
    step.ranks = WithAnother()
    step.ranks.theirs = float(bad)  # first it is asked whether its features are bad
    own, before = [], [x.clone() for x in network.parameters()]

    def forward(*inputs):
        own.append(CELoss()(*inputs))
        step.ranks.theirs = loss
        return own[0]

    objective.loss.forward = forward
    seen = step(torch.randn(20, 1, 28, 28), torch.arange(20) % 10, 1.0, 0.1)
    unchanged = [x.equal(y) for x, y in zip(before, network.parameters(), strict=True)]
    if bad or math.isnan(loss):
        assert seen.isnan()
        assert all(unchanged)
    else:
        assert seen == pytest.approx((own[0].item() + loss) / 2)
        assert not any(unchanged)


def blown_up(loss):
    """The same value with a gradient that is not finite."""
    return loss + ((loss - loss.detach()).sqrt())


BAD_STEP = (
    r"training stopped before the update of epoch (\d), step (\d): loss and gradient must be finite, got \S+, try a"
    r" smaller --lr or a larger --temperature; (.*); the batch's samples are ([\d, ]+)"
)


def test_a_bad_batch_is_named_with_its_samples_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    real, calls = Objective.__call__, []

    def bad_in_the_seventh(self, *inputs):
        calls.append(1)
        return real(self, *inputs) * (torch.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(Objective, "__call__", bad_in_the_seventh)
    with pytest.raises(TrainingError) as error:
        train(small(folder, epochs=3))
    epoch, step, last, ids = re.fullmatch(BAD_STEP, str(error.value)).groups()
    assert (epoch, step) == ("2", "3")
    assert last == f"the last good checkpoint is {folder}/checkpoints/epoch-0001"
    batches = list(data.epoch_batches(data.load("mnist5k", limit=200).train.labels, 50, seed=42, epoch=2))
    assert list(map(int, ids.split(", "))) == batches[2].indices.tolist()
    monkeypatch.undo()
    train(small(folder, epochs=3, resume="auto"))
    assert len(records(folder)) == 3


def test_the_first_bad_loss_is_named():
    losses = LossRecord(7, torch.device("cpu"))
    losses._every = 5  # as on a GPU, where they are read now and then
    for step in range(4):
        losses.add(torch.tensor(torch.inf if step >= 2 else 1.0), 10)
    with pytest.raises(NotFinite, match="got inf at step 3"):
        losses.add(torch.tensor(1.0), 10)


def test_the_mean_loss_weighs_samples_alike():
    losses = LossRecord(2, torch.device("cpu"))
    losses.add(torch.tensor(1.0), 30)
    losses.add(torch.tensor(5.0), 10)
    assert losses.mean() == 2.0


def test_shares_make_the_average_over_ranks_the_average_over_samples():
    logits, labels = torch.randn(11, 4, requires_grad=True), torch.randint(4, (11,))
    (expected,) = torch.autograd.grad(CELoss()(logits, labels), logits)
    parts = torch.arange(11).tensor_split(3)
    total = sum(CELoss()(logits[part], labels[part]) * len(part) * 3 / 11 for part in parts) / 3
    (actual,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("loss", ["ce", "etf-dr", "nonl", "ntce", "normface", "scl"])
def test_a_share_weighs_the_losses_that_do_not_span_the_ranks(loss):
    config = configure(loss=loss, cpu_ranks=1)
    objective = Objective(build_network(config, 1, 28, 10), config, ALONE, 20, torch.full((10,), 2))
    features, labels = torch.randn(20, 128), torch.arange(20) % 10
    whole, half = (objective(features, labels, share).item() for share in (1.0, 0.5))
    assert half == pytest.approx(whole / 2 if loss in ("ce", "etf-dr") else whole)


def test_a_learned_temperature_is_put_back_into_its_range():
    config = configure(temperature_rule="learned", final_temperature=0.05, cpu_ranks=1)
    network = build_network(config, 1, 28, 10)
    objective = Objective(network, config, ALONE, 20, torch.full((10,), 2))
    for learned, kept in ((-9.0, 0.05), (-1.0, math.exp(-1)), (0.5, 1.0)):
        with torch.no_grad():
            network.log_temperature.fill_(learned)
        objective.remember()
        assert objective.temperature.item() == pytest.approx(kept)


def test_a_rank_goes_on_with_its_own_queue_unless_there_are_other_ranks():
    """Of the prototype losses each rank keeps its part, rounded up."""

    def made(rank, world):
        return Objective(network, config, Ranks(rank, world, torch.device("cpu")), 4, torch.full((10,), 2))

    config = configure(queue=5, cpu_ranks=2)
    network = build_network(config, 1, 28, 10)
    queues = []
    for rank in range(2):
        objective = made(rank, 2)
        objective.queue.push(torch.randn(2, 128), torch.tensor([rank, rank]))
        queues.append(objective.queue.state_dict())
    assert [len(queue["labels"]) for queue in queues] == [3, 3]
    for rank in range(2):
        objective = made(rank, 2)
        objective.load_state(queues)
        assert objective.queue.queued()[1].equal(queues[rank]["labels"])
    for world in (1, 3):
        objective = made(0, world)
        with pytest.warns(RuntimeWarning, match=f"starts empty: it was kept by 2 ranks, now there are {world}"):
            objective.load_state(queues)
        assert (objective.queue.queued()[1] == NegativeBuffer.ABSENT).all()


# Resuming


class Interruption(Exception):
    pass


def interrupt_after(epoch):
    def on_epoch(record):
        if record["epoch"] == epoch:
            raise Interruption

    return on_epoch


def test_a_resumed_run_ends_as_if_never_interrupted(finished, tmp_path):
    config = small(tmp_path / "run", epochs=3, resume="auto")
    for epoch in (1, 2):
        with pytest.raises(Interruption):
            train(config, on_epoch=interrupt_after(epoch))
        assert [record["epoch"] for record in records(tmp_path / "run")] == list(range(1, epoch + 1))
    assert_same_run(train(config), finished)


def test_an_interruption_inside_an_epoch_or_before_the_metrics_line_leaves_no_trace(finished, tmp_path):
    folder = tmp_path / "run"
    config = small(folder, epochs=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypercontrast.train._Run._write_history", interrupt_after_calls(2))
        with pytest.raises(Interruption):
            train(config)
    assert load_checkpoint(folder).epoch == 2
    assert len(records(folder)) == 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "los')  # a torn line
    steps = []

    def stop_in_epoch_3(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise Interruption
        return data.normalize(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypercontrast.data.normalize", stop_in_epoch_3)
        with pytest.raises(Interruption):
            train(dataclasses.replace(config, resume=str(folder)))
    assert_same_run(train(dataclasses.replace(config, resume=str(folder))), finished)


def test_an_interruption_at_any_step_of_an_epoch_leaves_no_trace(tmp_path, monkeypatch, figure):
    """With dropout, sampling with replacement, a learned temperature and a queue, and metrics in every other epoch."""
    from hypercontrast import workspace

    build = workspace.build_network

    def with_dropout(*arguments):
        network = build(*arguments)
        network.backbone = torch.nn.Sequential(network.backbone, torch.nn.Dropout(0.2))
        return network

    monkeypatch.setattr(workspace, "build_network", with_dropout)
    options = {
        "epochs": 3, "sampling": "balanced", "temperature_rule": "learned", "queue": 100, "evaluate_every": 2,
        "checkpoint_every": 1, "limit": 60, "batch_size": 15,
    }  # fmt: skip
    reference = train(small(tmp_path / "reference", **options))
    places = []
    from hypercontrast.train import _Run

    save = _Run._save_checkpoint

    def save_and_stop(self, step, unfinished):
        save(self, step, unfinished)
        places.append((len(self.history), step))
        raise Interruption

    for _ in range(11):  # 3 epochs of 4 steps, of which the first's last is not saved
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Run, "_save_checkpoint", save_and_stop)
            with pytest.raises(Interruption):
                train(small(tmp_path / "run", resume="auto", **options))
    assert places == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0)]
    folder = train(small(tmp_path / "run", resume="auto", **options))
    assert_same_run(folder, reference)
    inside = sum(step > 0 for _, step in places)
    figure(
        "R10",
        f"a run stopped {len(places)} times, {inside} of them inside an epoch, ends bitwise as one that was not: weights,"
        " optimiser, sampler, dropout, queue, temperature and metrics.jsonl",
    )


def interrupt_after_calls(number):
    from hypercontrast.train import _Run

    write, calls = _Run._write_history, []

    def write_history(self):
        if len(calls) == number:
            raise Interruption
        calls.append(1)
        write(self)

    return write_history


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path):
    folder = tmp_path / "run"
    config = small(folder, epochs=3, resume="auto")
    with pytest.raises(Interruption):
        train(config, on_epoch=interrupt_after(2))
    path = folder / "checkpoints" / "epoch-0002" / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="epoch-0002 is damaged"):
        train(config)
    assert_same_run(folder, finished)


def test_the_embeddings_are_written_if_only_they_are_missing(finished, tmp_path):
    folder = tmp_path / "run"
    config = small(folder, epochs=3, resume="auto")
    with pytest.raises(Interruption):
        train(config, on_epoch=interrupt_after(3))
    assert not (folder / "embeddings.safetensors").exists()
    train(config)
    assert_same_run(folder, finished)


def test_a_report_that_fails_costs_no_run(tmp_path, monkeypatch, capsys):
    def broken(run_dirs):
        raise ZeroDivisionError("no picture of this")

    monkeypatch.setattr("hypercontrast.train.write_report", broken)
    folder = train(small(tmp_path / "run", epochs=1))
    assert (folder / "embeddings.safetensors").exists()
    assert capsys.readouterr().err == f"{folder / 'report.html'} could not be written: no picture of this\n"


def test_resuming_another_run_is_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(Interruption):
        train(small(folder), on_epoch=interrupt_after(1))
    with pytest.raises(UsageError, match=r"lr must stay 0\.2 to resume the run in .*, got 0\.3"):
        train(small(folder, resume="auto", lr=0.3))
    with pytest.raises(UsageError, match="run_dir must be the folder to resume"):
        prepare(Config(resume=str(folder), run_dir=str(tmp_path / "other")))
    assert main(["--resume", "auto", "--run-dir", str(folder), "--recipe", "mnist5k-ce"]) == 2
    assert "recipe must stay mnist5k-nonl to resume the run in" in capsys.readouterr().err
    # The command line takes the run's own settings, so none have to be repeated.
    assert main(["--resume", str(folder), "--quiet"]) == 0
    assert [record["epoch"] for record in records(folder)] == [1, 2]


def test_runs_started_together_have_folders_of_their_own():
    first, second = (prepare(configure(seed=seed)).run_dir for seed in (0, 1))
    assert first != second
    assert first.startswith("runs/mnist5k-nonl-")


def test_a_folder_with_a_space_is_quoted_in_commands(tmp_path, capsys):
    folder = tmp_path / "a run"
    with pytest.raises(Interruption):
        train(small(folder), on_epoch=interrupt_after(1))
    assert main(["--run-dir", str(folder)]) == 2
    assert f"continue it with --resume '{folder}'" in capsys.readouterr().err
    assert _interrupted(str(folder)).endswith(f" --resume '{folder}'")


def wait_for_checkpoint(folder):
    deadline = time.monotonic() + 60
    while not list(folder.glob("checkpoints/epoch-*")) and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_process_resumes(finished, tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "hypercontrast.train", *SMALL_FLAGS, "--epochs", "3", "--run-dir", str(folder), "--resume", "auto",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    wait_for_checkpoint(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "embeddings.safetensors").exists()
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
    assert_same_run(folder, finished)


# Ranks


def share_everything(rank, world):
    of_all = Ranks(rank, world, torch.device("cpu"))
    assert of_all.sum(torch.tensor(rank + 1.0)) == 3
    assert of_all.gathered(f"rank {rank}") == ["rank 0", "rank 1"]
    assert of_all.agree(lambda: f"said by {rank}") == "said by 0"
    with pytest.raises(UsageError, match="decided by 0"):
        of_all.agree(partial(refuse, rank))
    norm = torch.nn.BatchNorm1d(3)
    norm(torch.full((2, 3), 1.0 + rank))
    of_all.share_buffers(norm)
    assert norm.running_mean.tolist() == pytest.approx([0.1] * 3)
    return norm.running_mean


def refuse(rank):
    raise UsageError(f"decided by {rank}")


def test_ranks_share_sums_decisions_values_and_buffers(tmp_path):
    ranks.spawn(share_everything, 2, tmp_path)


def test_the_error_of_a_rank_ends_the_command_as_its_own_would(capsys):
    """A traceback comes with what nobody foresaw; a rank that was killed has none."""
    codes = {"UsageError": 2}
    for kind, trace, code, says in (
        ("UsageError", "Traceback: ...", 2, ["error: rank 1: no"]),
        ("KeyError", "Traceback: ...", 1, ["Traceback: ...", "error: rank 1: no"]),
        ("", "", 1, ["error: rank 1: no"]),
    ):
        assert fail_for(RankError("rank 1: no", kind, trace), codes) == code
        assert capsys.readouterr().err.splitlines() == says


def test_two_ranks_train_together(tmp_path, capfd):
    flags = [
        "--limit",
        "201",
        "--batch-size",
        "50",
        "--cpu-ranks",
        "2",
        "--epochs",
        "2",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert main(flags) == 0
    lines = records(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["loss"] < lines[0]["loss"]
    assert all(line["samples"] == 201 for line in lines)
    out = capfd.readouterr().out.splitlines()
    assert [line[:9] for line in out[:2]] == ["epoch 1/2", "epoch 2/2"]
    assert out[2].startswith(str(tmp_path / "run"))
    assert len(out) == 3
    # Every rank had measured the network that was saved, batch-norm statistics included.
    options = Options(str(tmp_path / "run"), methods=("prototypes",), cpu_ranks=1, quiet=True)
    (result,) = evaluate(options)["results"]
    assert result["accuracy"] == lines[1]["prototype_accuracy"]
    assert result["nc"]["nc1"] == pytest.approx(lines[1]["nc1"], rel=1e-4)


def test_ranks_of_two_machines_train_together(tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    ranks = []
    for rank in range(2):  # as a launcher would start them, each in a folder of its own
        machine = tmp_path / str(rank)
        machine.mkdir()
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        command = [sys.executable, "-m", "hypercontrast.train", *SMALL_FLAGS, "--epochs", "1", "--run-dir", "run"]
        environment = {**os.environ, **place, "PYTHONPATH": str(Path(__file__).parents[1])}
        ranks.append(
            subprocess.Popen(
                command, cwd=machine, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "run: accuracy" in said[0][0]
    assert said[1] == ("", "")
    assert (tmp_path / "0" / "run" / "report.html").exists()
    assert list((tmp_path / "1").iterdir()) == []


def test_a_failing_rank_is_reported_in_one_line(tmp_path, capfd):
    flags = [
        "--limit",
        "200",
        "--batch-size",
        "50",
        "--cpu-ranks",
        "2",
        "--lr",
        "1e30",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert main(flags) == 1
    err = capfd.readouterr().err
    epoch, _, last, ids = re.fullmatch(rf"error: rank \d: {BAD_STEP}\n", err).groups()
    assert (epoch, last, len(ids.split(", "))) == ("1", "no checkpoint has been saved yet", 50)


def interrupted_line(folder):
    folder = re.escape(str(folder))
    command = rf"\S*python\S* -m hypercontrast\.train --resume {folder}"
    last = rf"the last good checkpoint is {folder}/checkpoints/epoch-[-\w]+"
    return rf"error: interrupted; {last}; to continue: {command}\n"


def test_interrupted_ranks_end_together(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "hypercontrast.train", "--limit", "200", "--cpu-ranks", "2", "--epochs", "500"]
    process = subprocess.Popen([*command, "--run-dir", str(folder)], stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(folder)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)  # returns once no rank holds stderr open any more
    assert process.returncode == 130
    assert re.fullmatch(interrupted_line(folder), err)


def test_a_run_of_several_ranks_takes_no_callback():
    with pytest.raises(UsageError, match="on_epoch must be None for a run that starts 2 ranks"):
        train(Config(cpu_ranks=2), on_epoch=print)


@pytest.mark.slow
def test_nonl_spreads_the_digits_at_most_half_as_unevenly_as_cross_entropy(tmp_path):
    """The recipes as a newcomer runs them, over three seeds."""
    spread = {loss: [] for loss in ("ce", "nonl")}
    for loss, values in spread.items():
        for seed in range(3):
            folder = train(
                configure(loss=loss, seed=seed, cpu_ranks=1, quiet=True, run_dir=str(tmp_path / f"{loss}{seed}"))
            )
            last = records(folder)[-1]
            assert last["accuracy"] > 0.94
            values.append(last["cos_std"])
    assert sum(spread["nonl"]) <= sum(spread["ce"]) / 2


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason=f"needs {SHARED / 'cifar10'}")
def test_a_small_resnet_trains_on_5000_cifar_pictures_within_minutes(tmp_path):
    """Through Parquet, interrupted and resumed; every number of every epoch is finite."""
    pytest.importorskip("torchvision")
    options = {
        "recipe": "cifar10-nonl", "dataset": f"parquet:{SHARED / 'cifar10'}", "width": 16, "limit": 5000, "epochs": 3,
        "batch_size": 128, "lr": 0.1, "evaluate_every": 1, "cpu_ranks": 1, "quiet": True,
        "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    started = time.perf_counter()
    with pytest.raises(Interruption):
        train(configure(**options), on_epoch=interrupt_after(2))
    folder = train(configure(resume="auto", **options))
    seconds = time.perf_counter() - started
    lines = records(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(set(DESCRIPTIONS) <= line.keys() for line in lines)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["accuracy"] > 0.15
    print(f"{seconds:.0f} s")
    assert seconds < 300
