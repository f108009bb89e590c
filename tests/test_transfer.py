"""Linear transfer: the solver, the metrics, a frozen run on other pictures, mistakes."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hypercontrast import data
from hypercontrast.checkpoint import load_checkpoint, save_checkpoint
from hypercontrast.config import UsageError, configure, read_config
from hypercontrast.data import Images
from hypercontrast.frozen import restored_network
from hypercontrast.launch import Ranks
from hypercontrast.models import LinearHead, Network
from hypercontrast.probes import fit_features
from hypercontrast.train import train
from hypercontrast.transfer import (
    METRICS,
    STRENGTHS,
    Options,
    accuracy,
    accuracy_per_class,
    average_precision,
    chosen_strength,
    evaluated,
    held_out,
    main,
    mean_average_precision,
    transfer,
)
from hypercontrast.workspace import Workspace, network_tensors

for extra in ("mlxtend", "safetensors", "yaml"):
    pytest.importorskip(extra)

ALONE = Ranks(0, 1, torch.device("cpu"))


# The solver


def fitted(features, targets, num_classes, ridge):
    probe = LinearHead(features.shape[1], num_classes)
    fit_features(probe, features, targets, ALONE, ridge=ridge)
    return probe


@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-4])
def test_multinomial_regression_is_scikit_learns(ridge):
    linear_model = pytest.importorskip("sklearn.linear_model")
    labels = torch.arange(150) % 4
    features = torch.randn(150, 6) + 0.7 * F.one_hot(labels, 6)
    probe = fitted(features, labels, 4, ridge)
    theirs = linear_model.LogisticRegression(C=1 / (ridge * 150), tol=1e-8, max_iter=10_000)
    theirs.fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(
        probe(features).softmax(1).detach().numpy(), theirs.predict_proba(features.numpy()), atol=1e-3
    )


def test_one_against_the_rest_is_scikit_learns_without_what_is_ignored():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features = torch.randn(200, 5)
    targets = (features[:, :3] + torch.randn(200, 3) > 0.5).float()
    targets[::7, 1] = torch.nan
    probe = fitted(features, targets, 3, 1e-2)
    for k in range(3):
        known = ~targets[:, k].isnan()
        theirs = linear_model.LogisticRegression(C=1 / (1e-2 * 200), tol=1e-8, max_iter=10_000)
        theirs.fit(features[known].numpy(), targets[known, k].numpy())
        np.testing.assert_allclose(
            probe(features)[:, k].sigmoid().detach().numpy(), theirs.predict_proba(features.numpy())[:, 1], atol=1e-3
        )


def test_the_strength_that_does_best_on_the_held_out_part_is_chosen():
    """Of noisy features; the probe that comes with it is the optimum for the rest, though it started warm."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    labels = torch.arange(300) % 3
    features = torch.randn(300, 40) + F.one_hot(labels, 40)
    scores = []

    def score(logits, wanted):
        assert wanted.equal(labels[held_out(labels)])
        scores.append(accuracy(logits, wanted))
        return scores[-1]

    l2, probe = chosen_strength(features, labels, 3, score)
    assert l2 == STRENGTHS[scores.index(max(scores))]
    assert min(scores) < max(scores)
    rest = ~held_out(labels)
    theirs = linear_model.LogisticRegression(C=1 / (l2 * int(rest.sum())), tol=1e-8, max_iter=10_000)
    theirs.fit(features[rest].numpy(), labels[rest].numpy())
    np.testing.assert_allclose(
        probe(features).softmax(1).detach().numpy(), theirs.predict_proba(features.numpy()), atol=1e-3
    )
    # Where all do equally well, the strongest.
    assert chosen_strength(features + 30 * F.one_hot(labels, 40), labels, 3, accuracy)[0] == STRENGTHS[0]


def test_the_strengths_are_half_powers_of_ten_from_the_strongest_on():
    grid = [10, 3.1623, 1, 0.31623, 0.1, 0.031623, 1e-2, 3.1623e-3, 1e-3, 3.1623e-4, 1e-4, 3.1623e-5, 1e-5, 3.1623e-6]
    assert list(STRENGTHS) == pytest.approx([*grid, 1e-6], rel=1e-4)


def test_a_fifth_of_every_class_is_held_out():
    """And of all classes where a sample can be of several, whatever the order of the samples."""
    labels = torch.cat([torch.zeros(50), torch.ones(10), torch.full((5,), 2)]).long()[torch.randperm(65)]
    held = held_out(labels)
    assert torch.bincount(labels[held]).tolist() == [10, 2, 1]
    assert held_out(labels).equal(held)
    periodic = F.one_hot(torch.arange(500) % 5).float()
    held = held_out(periodic)
    assert held.sum() == 100
    assert periodic[held].sum(0).min() > 8
    with pytest.raises(UsageError, match="the training set must hold two pictures at least, got 1"):
        chosen_strength(torch.randn(1, 3), torch.zeros(1, dtype=torch.int64), 2, accuracy)


# Metrics


def test_average_precision_is_scikit_learns_ties_included():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for levels in (2, 5, 10**6):
        for n in (1, 7, 200):
            scores, positives = rng.integers(levels, size=n).astype(np.float32), rng.random(n) < 0.3
            positives[0] = True
            ours = average_precision(torch.from_numpy(scores), torch.from_numpy(positives))
            assert ours == pytest.approx(metrics.average_precision_score(positives, scores), abs=1e-12)
    with pytest.warns(UserWarning, match="No positive class"):
        theirs = metrics.average_precision_score(np.zeros(4), np.arange(4))
    assert average_precision(torch.arange(4.0), torch.zeros(4, dtype=torch.bool)) == theirs == 0


def test_mean_average_precision_leaves_out_what_is_unknown():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, targets = torch.randn(40, 3), (torch.rand(40, 3) < 0.4).float()
    targets[:, 1] = 0  # a class without positives
    targets[:9, 2] = torch.nan
    expected = [
        metrics.average_precision_score(targets[:, 0], logits[:, 0]),
        metrics.average_precision_score(targets[9:, 2], logits[9:, 2]),
    ]
    assert mean_average_precision(logits, targets) == pytest.approx(np.mean(expected))
    with pytest.raises(UsageError, match="targets must hold a positive of one class at least, got none of 3"):
        mean_average_precision(logits, torch.zeros(40, 3))


def test_accuracies():
    logits = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 0]), 4).float()
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    assert accuracy(logits, labels) == pytest.approx(4 / 6)
    assert accuracy_per_class(logits, labels) == pytest.approx((3 / 4 + 1 / 2) / 2)  # of the classes there are


# A run on other pictures


class HalfDamaged(Images):
    """Of its pictures every second one cannot be decoded: it is left out of its batch."""

    def plain(self, batches):
        return super().plain(indices[indices % 2 == 0] for indices in batches)


@dataclass(frozen=True)
class FakeSet:
    train: Images
    test: Images
    class_names: tuple[str, ...] = ("left", "middle", "right")
    targets: tuple[torch.Tensor, torch.Tensor] | None = None


def stripes(n):
    """Grey pictures with a bright stripe, in one of three directions, on noise."""
    labels = torch.arange(n) % 3
    pixels = torch.randint(120, (n, 1, 28, 28), dtype=torch.uint8)
    pixels[labels == 0, :, :, 12:16] = 250
    pixels[labels == 1, :, 12:16] = 250
    pixels[labels == 2] = pixels[labels == 2].masked_fill(torch.eye(28, dtype=torch.bool), 250)
    return Images(pixels, labels)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a few digits."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "nonl"
    return train(configure(run_dir=str(folder), epochs=1, limit=200, batch_size=50, quiet=True, cpu_ranks=1))


@pytest.fixture
def there(monkeypatch):
    """Only cifar10 (so called) and voc2007 are there."""
    torch.manual_seed(5)
    pictures = FakeSet(stripes(90), stripes(60))
    targets = tuple(F.one_hot(part.labels, 3).float() for part in (pictures.train, pictures.test))
    targets[0][:4] = torch.nan
    sets = {"cifar10": pictures, "voc2007": replace(pictures, targets=targets)}
    calls = []

    def locate(name, root):
        if name not in sets:
            raise UsageError(f"data_root must hold {name}: expected {root}/{name}/")
        return lambda limit, **shape: calls.append((name, limit, shape)) or sets[name]

    monkeypatch.setattr("hypercontrast.transfer.locate", locate)
    return calls


def test_features_are_those_the_run_was_trained_on(run):
    """On the run's own pictures: the backbone's output in evaluation mode, before neck and projection."""
    config = read_config(run / "config.yaml")
    workspace = Workspace(config, ALONE)
    workspace.network.load_state_dict(network_tensors(load_checkpoint(run).tensors))
    expected = torch.cat([batch.backbone for batch in workspace.embedded(workspace.dataset.validation)])
    frozen = restored_network(str(run), ALONE.device)
    assert (frozen.epoch, frozen.image_size) == (1, 28)
    pixels = data.load("mnist5k", limit=200).validation.pixels
    torch.testing.assert_close(frozen.features(pixels), expected)


def test_the_scale_of_the_features_does_not_matter(run):
    frozen = restored_network(str(run), ALONE.device)
    pictures = FakeSet(stripes(90), stripes(60))
    usual = evaluated("cifar10", pictures, frozen)

    def with_backbone(backbone):
        return replace(frozen, network=Network(backbone, frozen.network.head))

    class Louder(torch.nn.Module):
        def forward(self, images):
            return 1e4 * frozen.network.backbone(images) + 3

    assert evaluated("cifar10", pictures, with_backbone(Louder())) == pytest.approx(usual, abs=0.02)

    class Deaf(torch.nn.Module):
        def forward(self, images):
            return torch.ones(len(images), 4)

    assert evaluated("cifar10", pictures, with_backbone(Deaf()))["value"] == pytest.approx(1 / 3)


def test_the_value_is_that_of_a_probe_of_all_training_pictures(run, monkeypatch):
    fits = []

    def fit(probe, features, *arguments, ridge):
        fits.append((len(features), ridge))
        if len(features) == 90:  # centred, and of one scale
            torch.testing.assert_close(features.mean(0), torch.zeros(features.shape[1]), rtol=0, atol=1e-5)
            assert features.square().mean() == pytest.approx(1, rel=1e-4)
        fit_features(probe, features, *arguments, ridge=ridge)

    monkeypatch.setattr("hypercontrast.transfer.fit_features", fit)
    result = evaluated("cifar10", FakeSet(stripes(90), stripes(60)), restored_network(str(run), ALONE.device))
    assert fits == [*((72, strength) for strength in STRENGTHS), (90, result["l2"])]


def test_a_test_picture_is_judged_by_itself(run):
    """Centred as the training set is, not by the others of its set: here all of one class."""
    frozen, pictures = restored_network(str(run), ALONE.device), stripes(60)
    for label in range(3):
        alone = pictures.select((pictures.labels == label).nonzero()[:, 0])
        assert evaluated("cifar10", FakeSet(stripes(90), alone), frozen)["value"] > 0.8


def test_damaged_pictures_are_left_out_with_their_targets(run):
    """Were targets and features out of step, the value would be that of chance."""
    frozen = restored_network(str(run), ALONE.device)
    training, test = stripes(90), stripes(60)
    damaged = FakeSet(HalfDamaged(training.pixels, training.labels), HalfDamaged(test.pixels, test.labels))
    result = evaluated("cifar10", damaged, frozen)
    assert (result["train"], result["test"], result["damaged"]) == (45, 30, 75)
    assert result["value"] > 0.8


def test_what_is_there_is_evaluated_and_the_rest_is_named(run, there, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    assert main([str(tmp_path / "run"), "--data-root", "/sets", "--limit", "90", "--workers", "3"]) == 0
    shape = {"size": 28, "channels": 1, "workers": 3}
    assert there == [("cifar10", 90, shape), ("voc2007", 90, shape)]
    lines = capsys.readouterr().out.splitlines()
    missing = [name for name in METRICS if name not in ("cifar10", "voc2007")]
    assert lines[:6] == [f"{n} is missing: data_root must hold {n}: expected /sets/{n}/" for n in missing]
    assert lines[6].split() == ["data", "set", "metric", "value", "l2", "train", "test", "damaged"]
    assert [line.split()[:2] for line in lines[7:]] == [["cifar10", "top-1"], ["voc2007", "mAP"]]
    assert len({len(line) for line in lines[6:]}) == 1
    record = json.loads((tmp_path / "run" / "transfer.json").read_text())
    assert record["epoch"] == 1
    assert list(record["results"]) == ["cifar10", "voc2007"]
    for result in record["results"].values():
        assert list(result) == ["metric", "value", "l2", "train", "test", "damaged"]
        assert (result["train"], result["test"], result["damaged"]) == (90, 60, 0)
        assert 0.8 < result["value"] <= 1
        assert result["l2"] in STRENGTHS


def test_results_are_kept_while_the_epoch_is_the_same(run, there, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    first = transfer(Options(str(folder), datasets=("cifar10",)))
    both = transfer(Options(str(folder), datasets=("voc2007",)))
    assert both["results"].keys() == {"cifar10", "voc2007"}
    assert both["results"]["cifar10"] == first["results"]["cifar10"]
    assert json.loads((folder / "transfer.json").read_text()) == both
    (folder / "transfer.json").write_text(json.dumps({**both, "epoch": 7}))
    assert transfer(Options(str(folder), datasets=("cifar10",))) == first


def test_results_of_a_call_at_the_same_time_are_kept(run, there, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    first = transfer(Options(str(folder), datasets=("cifar10",)))
    written = (folder / "transfer.json").read_text()
    (folder / "transfer.json").unlink()

    def evaluated_while_another_call_ends(*args):
        (folder / "transfer.json").write_text(written)
        return evaluated(*args)

    monkeypatch.setattr("hypercontrast.transfer.evaluated", evaluated_while_another_call_ends)
    both = transfer(Options(str(folder), datasets=("voc2007",)))
    assert both["results"].keys() == {"cifar10", "voc2007"}
    assert both["results"]["cifar10"] == first["results"]["cifar10"]
    assert json.loads((folder / "transfer.json").read_text()) == both


def without_statistics(folder):
    saved = load_checkpoint(folder)
    tensors = {name: x for name, x in saved.tensors.items() if name not in ("mean", "std", "image_size")}
    save_checkpoint(folder, replace(saved, tensors=tensors))


def of_another_network(folder):
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("model: convnet", "model: resnet18"))


def without_checkpoint(folder):
    shutil.rmtree(folder / "checkpoints")


def without_config(folder):
    (folder / "config.yaml").unlink()


def with_other_results(folder):
    (folder / "transfer.json").write_text("{")


def with_a_part_of_the_results(folder):
    (folder / "transfer.json").write_text('{"epoch": 1, "results": {"pets": {"value": 0.5}}}')


def diverged(folder):
    saved = load_checkpoint(folder)
    tensors = {n: x.clone().fill_(torch.nan) if n == "backbone.0.0.weight" else x for n, x in saved.tensors.items()}
    save_checkpoint(folder, replace(saved, tensors=tensors))


@pytest.mark.parametrize(
    ("prepare", "flags", "code", "says"),
    [
        (without_config, [], 2, "RUN must be the folder of a run, with a config.yaml, got "),
        (without_checkpoint, [], 2, "must hold a checkpoint of a whole epoch, got none"),
        (
            without_statistics,
            [],
            2,
            "must hold mean, std and image_size of the pictures it was trained on, got no mean",
        ),
        (of_another_network, [], 2, "the checkpoint must hold the network that config.yaml describes"),
        (with_other_results, [], 2, "transfer.json must hold results of this command: delete it"),
        (with_a_part_of_the_results, [], 2, "transfer.json must hold results of this command: delete it"),
        (diverged, [], 1, "features of cifar10 must be finite, got some that are not: the run has diverged"),
        (None, ["--datasets", "cifar10", "cars"], 2, "data_root must hold cars: expected data/cars/"),
        (None, ["--datasets", "imagenet"], 2, "datasets must be among food101, cifar10, "),
        (None, ["--datasets"], 2, "argument --datasets: expected at least one argument"),
        (None, ["--limit", "-1"], 2, "limit must be at least 0, got -1"),
        (None, ["--workers", "-1"], 2, "workers must be at least 0, got -1"),
        (None, ["--knn"], 2, "unrecognized arguments: --knn"),
    ],
)
def test_a_mistake_gives_one_line(run, there, prepare, flags, code, says, tmp_path, capsys):
    if prepare is of_another_network:
        pytest.importorskip("torchvision")
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    if prepare:
        prepare(folder)
    assert main([str(folder), *flags]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


def test_nothing_is_there(run, monkeypatch, capsys):
    def locate(name, root):
        raise UsageError(f"data_root must hold {name}")

    monkeypatch.setattr("hypercontrast.transfer.locate", locate)
    assert main([str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "data_root must hold one of food101, cifar10, cifar100, cars, dtd, pets, flowers, voc2007, got none" in err


def test_importing_transfer_needs_no_extra():
    blocked = ("tyro", "yaml", "rich", "torchvision", "safetensors", "pyarrow", "PIL", "mlxtend", "triton", "timm")
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport hypercontrast.transfer"
    subprocess.run([sys.executable, "-c", code], check=True)
