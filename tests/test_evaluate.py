"""Fixed prototypes and probes on frozen runs: what they compute, the table, mistakes."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import hypercontrast.evaluate
from hypercontrast import ClassMeans, neural_collapse
from hypercontrast.checkpoint import load_checkpoint
from hypercontrast.config import Config, UsageError, configure, read_config
from hypercontrast.data import Batch, Draws, derived_seed, epoch_batches
from hypercontrast.evaluate import (
    NC_COLUMNS,
    Options,
    _make,
    _probe_settings,
    averaged_means,
    class_means,
    evaluate,
    main,
    table,
)
from hypercontrast.launch import Ranks
from hypercontrast.models import LinearHead
from hypercontrast.probes import CosineProbe, ProbeSettings, fit_probe, train_probe
from hypercontrast.progress import Progress
from hypercontrast.train import train
from hypercontrast.workspace import Embedded, Workspace, network_tensors

for extra in ("mlxtend", "safetensors", "yaml"):
    pytest.importorskip(extra)

ONE_RANK = {"cpu_ranks": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of SCL and one of cross-entropy, on a few digits."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    options = {"epochs": 2, "limit": 200, "batch_size": 50, "lr": 0.1, "quiet": True, **ONE_RANK}
    return {loss: train(configure(loss=loss, run_dir=str(root / loss), **options)) for loss in ("scl", "ce")}


def by_method(record):
    return {result["method"]: result for result in record["results"]}


class Kept(Workspace):
    """A workspace whose training pictures have been through the network already."""

    def __init__(self, features, labels, ranks=None):
        self.ranks = ranks or Ranks(0, 1, torch.device("cpu"))
        self.features, self.labels = features, labels

    @property
    def dataset(self):
        return self

    @property
    def train(self):
        return self

    def __len__(self):
        return len(self.labels)

    def embedded(self, images):
        for features, labels in zip(self.features.split(64), self.labels.split(64), strict=True):
            yield Embedded(features, features, labels)


def test_everything_is_measured_and_written(runs, capsys):
    folder = runs["scl"]
    assert main([str(folder), "--cached", "--cpu-ranks", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((folder / "evaluation.json").read_text())
    assert lines == table(record).splitlines()
    assert [re.split(r"  +", line)[0] for line in lines] == [
        "method",
        "fixed prototypes",
        "linear probe",
        "normalised probe",
    ]
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[-7:] == ["intra", "inter", "W", "erank", "weight", "instance", "MIR", "HDR"][-7:]
    assert record["epoch"] == 2
    results = by_method(record)
    assert [(r["features"], r["dim"]) for r in results.values()] == [
        ("head", 128),
        ("backbone", 128),
        ("backbone", 128),
    ]
    for result in results.values():
        assert 0 <= result["accuracy"] <= 1
        assert result["seconds"] > 0
        assert set(NC_COLUMNS) <= result["nc"].keys() == result["nc_compat"].keys()
        # They differ in the entropies alone.
        assert result["nc"]["hdr"] != result["nc_compat"]["hdr"]
        assert result["nc"]["nc1"] == result["nc_compat"]["nc1"]
    assert results["linear-probe"]["share_of_linear_probe"] == 1
    assert results["linear-probe"]["accuracy"] > 0.5


def test_fixed_prototypes_are_those_of_the_last_epoch(runs):
    """Of SCL they are in the checkpoint: same prototypes, accuracy and metrics."""
    for loss, folder in runs.items():
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        (result,) = evaluate(Options(str(folder), methods=("prototypes",), **ONE_RANK))["results"]
        assert result["accuracy"] == pytest.approx(last["prototype_accuracy"])
        assert result["nc"]["inter_erank"] == pytest.approx(last["inter_erank"])
        assert result["nc"]["weight_alignment"] < 1e-9
        assert result["share_of_linear_probe"] is None
        if loss == "scl":
            assert result["nc"]["instance_alignment"] == pytest.approx(last["instance_alignment"])


def test_the_trained_head_is_the_runs_own(runs, capsys):
    last = json.loads((runs["ce"] / "metrics.jsonl").read_text().splitlines()[-1])
    (result,) = evaluate(Options(str(runs["ce"]), methods=("head",), **ONE_RANK))["results"]
    assert result["accuracy"] == pytest.approx(last["accuracy"])
    for key in NC_COLUMNS:
        assert result["nc"][key] == pytest.approx(last[key], rel=1e-6, abs=1e-9)
    methods = evaluate(Options(str(runs["ce"]), cached=True, **ONE_RANK))["results"]
    assert [r["method"] for r in methods] == ["head", "prototypes", "linear-probe", "normalized-probe"]
    assert main([str(runs["scl"]), "--head"]) == 2
    assert "head needs a run that trained one, got loss scl" in capsys.readouterr().err


def test_averaged_prototypes_follow_the_public_code(runs):
    """One batch of everything: their average is that batch's means, of augmented pictures."""
    config = dataclasses.replace(read_config(runs["ce"] / "config.yaml"), batch_size=10_000)
    workspace = Workspace(config, Ranks(0, 1, torch.device("cpu")))
    workspace.network.load_state_dict(network_tensors(load_checkpoint(runs["ce"]).tensors))
    averaged, means = averaged_means(workspace, config), class_means(workspace)
    torch.testing.assert_close(averaged.norm(dim=1), torch.ones(10))
    cosines = (averaged * means).sum(1)
    assert (cosines < 1 - 1e-6).all()  # augmentation moves them,
    assert (cosines > 0.9).all()  # but not far
    # Many batches: the last ones count most, so that it is not their plain mean.
    several = averaged_means(workspace, dataclasses.replace(config, batch_size=50))
    assert not torch.allclose(several, averaged, atol=1e-4)
    record = evaluate(Options(str(runs["ce"]), methods=("averaged-prototypes",), nc=False, **ONE_RANK))
    assert record["results"][0]["accuracy"] > 0.25
    # Every rank has the first one's, even where there are fewer batches than ranks.
    for batch_size in (50, 150):
        config = dataclasses.replace(config, batch_size=batch_size)
        of_ranks = []
        for rank in range(2):
            workspace.ranks = Ranks(rank, 2, torch.device("cpu"))
            of_ranks.append(averaged_means(workspace, config))
        assert of_ranks[0].equal(of_ranks[1])
        torch.testing.assert_close(of_ranks[0].norm(dim=1), torch.ones(10))


@pytest.mark.parametrize(
    ("batch_size", "world", "taken"),
    [
        (50, 1, [(0, 50), (50, 50), (100, 50), (150, 50)]),
        (50, 2, [(0, 50), (100, 50)]),
        (150, 1, [(0, 150)]),
        (150, 2, [(0, 150)]),
        (10_000, 2, [(0, 200)]),
    ],
)
def test_averaged_prototypes_are_of_the_full_batches_of_the_first_rank(runs, monkeypatch, batch_size, world, taken):
    """The ranks take batches in turn; what is left at the end fills no batch."""
    config = dataclasses.replace(read_config(runs["ce"] / "config.yaml"), batch_size=batch_size)
    workspace, seen = Workspace(config, Ranks(0, 1, torch.device("cpu"))), []
    views = type(workspace.dataset.train).views

    def seeing(pictures, shares, augment, seeds):
        seen.extend((int(share.places[0]), len(share.places)) for share in shares)
        return views(pictures, shares, augment, seeds)

    monkeypatch.setattr(type(workspace.dataset.train), "views", seeing)
    for rank in range(world):
        seen.clear()
        workspace.ranks = Ranks(rank, world, torch.device("cpu"))
        averaged_means(workspace, config)
        assert seen == taken


def test_probes_see_the_backbone_and_prototypes_the_head(runs):
    config = read_config(runs["scl"] / "config.yaml")
    workspace = Workspace(config, Ranks(0, 1, torch.device("cpu")))
    workspace.network.load_state_dict(network_tensors(load_checkpoint(runs["scl"]).tensors))
    pixels, labels = workspace.dataset.train.pixels, workspace.dataset.train.labels
    with torch.no_grad():
        images = workspace.normalized(pixels)
        backbone = workspace.network.eval().backbone(images)
        head = workspace.network.head.projection(backbone)
    batches = list(workspace.embedded(workspace.dataset.train))
    torch.testing.assert_close(torch.cat([b.backbone for b in batches]), backbone)
    torch.testing.assert_close(torch.cat([b.head for b in batches]), head)
    means = ClassMeans(10, 128)
    means.update(head, labels)
    record = evaluate(Options(str(runs["scl"]), methods=("prototypes", "normalized-probe"), cached=True, **ONE_RANK))
    results = by_method(record)
    expected = neural_collapse(head, labels, means.prototypes())
    assert results["prototypes"]["nc"]["nc1"] == pytest.approx(expected["nc1"], rel=1e-4)
    expected = neural_collapse(backbone, labels)
    assert results["normalized-probe"]["nc"]["nc1"] == pytest.approx(expected["nc1"], rel=1e-4)


@pytest.mark.slow
def test_a_probe_trained_on_new_views_learns_as_well(runs):
    options = {"methods": ("linear-probe", "normalized-probe"), "nc": False, **ONE_RANK}
    record = evaluate(Options(str(runs["ce"]), epochs=15, **options))
    assert record["probe"] == {
        "epochs": 15, "lr": pytest.approx(5 * 50 / 512), "batch_size": 50, "seed": 42, "milestones": (0.6, 0.75, 0.9),
    }  # fmt: skip
    assert all(result["accuracy"] > 0.25 for result in record["results"])
    assert all("nc" not in result for result in record["results"])
    again = evaluate(Options(str(runs["ce"]), epochs=15, **options))
    assert [r["accuracy"] for r in again["results"]] == [r["accuracy"] for r in record["results"]]
    assert evaluate(Options(str(runs["ce"]), **options))["probe"]["epochs"] == 20


class OneOfTwo(Ranks):
    """Rank 1 of 2, whose sums are its own part."""

    def sum(self, x):
        return x


class Viewed(Kept):
    """A workspace whose pictures are features, another view of them for every seed. The network is noise in training,
    and the identity in evaluation.
    """

    augmentation = "crop_flip"

    def __init__(self, features, labels, ranks=None):
        super().__init__(features, labels, ranks)
        self.network = torch.nn.Dropout(0.5)

    @property
    def num_classes(self):
        return int(self.labels.max()) + 1

    def views(self, shares, augment, seeds):
        for share in shares:
            noise = Draws(seeds[0], share.places).uniform(self.features.shape[1])
            yield Batch(self.features[share.indices] + noise, self.labels[share.indices], share.indices)

    def normalized(self, pixels):
        return pixels

    def embed(self, images, labels):
        return Embedded(self.network(images), images, labels)


def silent(settings):
    return Progress(settings.epochs, 4, silent=True)


@pytest.mark.parametrize("ranks", [Ranks(0, 1, torch.device("cpu")), OneOfTwo(1, 2, torch.device("cpu"))])
def test_a_probe_is_trained_by_sgd_on_new_views_in_a_new_order_every_epoch(ranks):
    """Momentum 0.9, no weight decay, a fifth of the rate after every milestone; a rank adds its part of the mean."""
    settings = ProbeSettings(epochs=4, lr=0.5, batch_size=16, seed=3, milestones=(0.25, 0.6))
    workspace = Viewed(torch.randn(50, 6), torch.arange(50) % 3, ranks)
    probe = LinearHead(6, 3)
    expected = [x.detach().clone().requires_grad_() for x in probe.parameters()]
    names = [name for name, _ in probe.named_parameters()]
    momenta = [0.0] * len(expected)
    train_probe(probe, workspace, settings, silent(settings))
    for epoch, lr in enumerate((0.5, 0.1, 0.02, 0.02), start=1):
        place = {"rank": ranks.rank, "world": ranks.world}
        shares = list(epoch_batches(workspace.labels, 16, seed=derived_seed(3, "probe"), epoch=epoch, **place))
        batches = workspace.views(shares, None, [derived_seed(3, epoch, "probe")])
        for share, batch in zip(shares, batches, strict=True):
            logits = torch.func.functional_call(probe, dict(zip(names, expected, strict=True)), batch.pixels)
            loss = F.cross_entropy(logits, batch.labels, reduction="sum") / share.global_size
            for n, gradient in enumerate(torch.autograd.grad(loss, expected)):
                momenta[n] = 0.9 * momenta[n] + gradient
            with torch.no_grad():
                for x, momentum in zip(expected, momenta, strict=True):
                    x -= lr * momentum
    for got, want in zip(probe.parameters(), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("method", ["linear-probe", "normalized-probe"])
def test_a_probe_starts_from_the_runs_seed_whatever_was_made_before_it(method):
    """So all ranks start alike."""
    workspace, settings = Viewed(torch.randn(20, 6), torch.arange(20) % 3), ProbeSettings(0, 0.1, 16, 3)
    one, another = (_make(method, Config(seed=7), workspace, 6, settings, silent(settings)) for _ in range(2))
    assert one.prototypes.equal(another.prototypes)
    assert not one.prototypes.equal(_make(method, Config(), workspace, 6, settings, silent(settings)).prototypes)


@pytest.mark.parametrize(
    ("config", "options", "epochs", "lr", "milestones"),
    [
        ({"epochs": 8}, {}, 20, 128 * 5 / 512, (0.6, 0.75, 0.9)),
        ({"epochs": 60, "batch_size": 512}, {}, 60, 5, (0.6, 0.75, 0.9)),
        ({"epochs": 200}, {}, 100, 128 * 5 / 512, (0.6, 0.75, 0.9)),
        ({"epochs": 200, "dataset": "imagenet100"}, {}, 90, 2.0, (1 / 3, 2 / 3, 8 / 9)),
        ({"epochs": 8, "dataset": "imagenet1k"}, {}, 20, 0.8, (1 / 3, 2 / 3, 8 / 9)),
        ({"epochs": 200, "dataset": "imagenet1k"}, {"epochs": 7, "lr": 0.3}, 7, 0.3, (1 / 3, 2 / 3, 8 / 9)),
    ],
)
def test_probes_are_trained_as_the_paper_says_shorter_for_short_runs(config, options, epochs, lr, milestones):
    settings = _probe_settings(Options("run", **options), Config(**config))
    assert (settings.epochs, settings.lr) == (epochs, pytest.approx(lr))
    assert settings.milestones == pytest.approx(milestones)
    assert (settings.batch_size, settings.seed) == (config.get("batch_size", 128), 42)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_kept_features_solver_finds_the_minimum(kind):
    """Of overlapping classes: no gradient left. Of separable ones: the same from every start."""
    labels = torch.arange(200) % 3
    features = torch.randn(200, 5) + 0.5 * F.one_hot(labels, 5)

    def fitted(features):
        probe = LinearHead(5, 3) if kind == "linear" else CosineProbe(5, 3, temperature=0.5)
        fit_probe(probe, Kept(features, labels))
        return probe

    probe = fitted(features)
    gradients = torch.autograd.grad(F.cross_entropy(probe(features), labels), list(probe.parameters()))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-4
    apart = 0.1 * torch.randn(200, 5) + F.one_hot(labels, 5)
    probe = fitted(apart)
    if kind == "linear":  # its weights would grow for ever but for a ridge of 1e-5, which the gradient balances
        (pull,) = torch.autograd.grad(F.cross_entropy(probe(apart), labels), probe.prototypes)
        torch.testing.assert_close(-pull, 1e-5 * probe.prototypes, rtol=0.05, atol=2e-6)
    one, another = (each(apart).softmax(1) for each in (probe, fitted(apart)))
    assert one.argmax(1).equal(labels)
    torch.testing.assert_close(one, another, rtol=0, atol=1e-3)


def test_cosine_probe_takes_a_temperature():
    probe = CosineProbe(6, 4, temperature=0.2)
    x = torch.randn(7, 6)
    torch.testing.assert_close(probe(x), F.normalize(x) @ F.normalize(probe.prototypes).T / 0.2)


def test_two_ranks_agree_with_one(runs, capfd):
    folder = str(runs["scl"])
    flags = [folder, "--prototypes", "--linear-probe", "--cached", "--nc"]
    one = by_method(evaluate(Options(folder, methods=("prototypes", "linear-probe"), cached=True, **ONE_RANK)))
    assert main([*flags, "--cpu-ranks", "2"]) == 0
    assert capfd.readouterr().out.count("\n") == 3
    record = json.loads((runs["scl"] / "evaluation.json").read_text())
    assert record["ranks"] == 2
    assert main([folder, "--prototypes", "--cpu-ranks", "2"]) == 0
    assert capfd.readouterr().out.count("\n") == 2
    again = by_method(json.loads((runs["scl"] / "evaluation.json").read_text()))
    assert again["linear-probe"] == by_method(record)["linear-probe"]
    for method, result in by_method(record).items():
        assert result["accuracy"] == pytest.approx(one[method]["accuracy"], abs=0.006)
        assert result["nc"]["nc1"] == pytest.approx(one[method]["nc"]["nc1"], rel=1e-4)


def test_earlier_results_of_the_checkpoint_are_kept(runs, tmp_path, capsys):
    copied(runs["ce"], tmp_path)
    folder, file = str(tmp_path / "run"), tmp_path / "run" / "evaluation.json"

    def written(*methods, **options):
        evaluate(Options(folder, methods=methods, **({"nc": False} | ONE_RANK | options)))
        record = json.loads(file.read_text())
        return record, by_method(record)

    _, first = written("prototypes", "linear-probe", cached=True, nc=True)
    record, both = written("prototypes", "head")
    assert list(both) == ["head", "prototypes", "linear-probe"]
    assert record["probe"] == "L-BFGS on kept features"  # which the one that is kept was trained by
    assert both["linear-probe"] == first["linear-probe"]
    assert both["prototypes"]["nc"] == first["prototypes"]["nc"]
    for result in both.values():
        assert result["share_of_linear_probe"] == result["seconds"] / both["linear-probe"]["seconds"]
    record, probes = written("normalized-probe", epochs=1)
    assert list(probes) == ["head", "prototypes", "normalized-probe"]  # not a probe that was trained otherwise
    assert record["probe"]["epochs"] == 1
    assert {result["share_of_linear_probe"] for result in probes.values()} == {None}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "epoch-0002")
    record, alone = written("prototypes")
    assert record["epoch"] == 1
    assert list(alone) == ["prototypes"]
    assert "nc" not in alone["prototypes"]
    for results in ([{"method": "knn"}], [{"method": "linear-probe"}]):
        file.write_text(json.dumps(record | {"results": results}))
        assert main([folder, "--prototypes"]) == 2
        assert "evaluation.json must hold results of this command: delete it" in capsys.readouterr().err


def test_results_of_a_call_at_the_same_time_are_kept(runs, tmp_path, monkeypatch):
    copied(runs["ce"], tmp_path)
    folder, file = str(tmp_path / "run"), tmp_path / "run" / "evaluation.json"
    (head,) = evaluate(Options(folder, methods=("head",), **ONE_RANK))["results"]
    written = file.read_text()
    file.unlink()

    def make_while_another_call_ends(*args):
        file.write_text(written)
        return make(*args)

    make = hypercontrast.evaluate._make
    monkeypatch.setattr(hypercontrast.evaluate, "_make", make_while_another_call_ends)
    evaluate(Options(folder, methods=("prototypes",), **ONE_RANK))
    assert by_method(json.loads(file.read_text()))["head"] == head
    assert len(json.loads(file.read_text())["results"]) == 2


def test_an_unfinished_run_is_evaluated_at_its_checkpoint(runs, tmp_path):
    shutil.copytree(runs["ce"], tmp_path / "run")
    (tmp_path / "run" / "embeddings.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "epoch-0002")
    assert evaluate(Options(str(tmp_path / "run"), methods=("prototypes",), **ONE_RANK))["epoch"] == 1


def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation.json"))


def damaged(folder, tmp_path):
    copied(folder, tmp_path)
    for path in (tmp_path / "run").glob("checkpoints/*/checkpoint.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


def of_another_network(folder, tmp_path):
    copied(folder, tmp_path)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("head: mlp", "head: linear"))


def without_checkpoint(folder, tmp_path):
    copied(folder, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints")


def of_other_data(folder, tmp_path):
    copied(folder, tmp_path)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("dataset: mnist5k", "dataset: cifar10"))


def empty(folder, tmp_path):
    (tmp_path / "run").mkdir()


@pytest.mark.filterwarnings("ignore:.*trying the checkpoint before it")
@pytest.mark.parametrize(
    ("prepare", "flags", "says"),
    [
        (empty, [], "RUN must be the folder of a run, with a config.yaml, got "),
        (without_checkpoint, [], "must hold a checkpoint of a whole epoch, got none"),
        (damaged, [], "must hold an intact checkpoint, got 2 damaged"),
        (of_another_network, [], "checkpoint must hold the network that config.yaml describes"),
        (of_other_data, ["--data-root", "/nowhere"], "data_root must hold cifar10: expected /nowhere/cifar10"),
        (empty, ["--linear"], "RUN must be"),
        (empty, ["--knn"], "unrecognized arguments: --knn"),
        (empty, ["--epochs", "-1"], "epochs must be at least 0 and finite, got -1"),
        (empty, ["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (empty, ["--lr", "nan"], "lr must be at least 0 and finite, got nan"),
        (empty, ["--cached", "--epochs", "5"], "epochs must be 0 with cached, whose solver has none, got 5"),
        (empty, ["--cached", "--lr", "0.5"], "lr must be 0 with cached, whose solver has none, got 0.5"),
        (without_checkpoint, ["--gpus", "99"], "gpus must be at most"),
        (without_checkpoint, ["--gpus", "1", "--cpu-ranks", "1"], "gpus must be 0 with cpu_ranks=1, got 1"),
    ],
)
def test_a_mistake_gives_one_line_and_code_2(runs, prepare, flags, says, tmp_path, capsys):
    prepare(runs["scl"], tmp_path)
    assert main([str(tmp_path / "run"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_a_folder_that_cannot_be_written_to_costs_no_probe(runs, monkeypatch, capsys):
    """As one on a read-only file system: it was found out once everything was measured, and nothing was printed."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("hypercontrast.evaluate.restored", lambda *_: pytest.fail("something was measured"))
    assert main([str(runs["ce"])]) == 2
    says = f"error: {runs['ce']}/evaluation.json cannot be written: no permission, or a read-only file system\n"
    assert capsys.readouterr().err == says


def test_a_probe_that_diverges_says_so(runs, capsys):
    assert main([str(runs["ce"]), "--linear-probe", "--lr", "1e38", "--cpu-ranks", "1"]) == 1
    err = capsys.readouterr().err
    assert "try a smaller --lr" in err
    assert err.count("\n") == 1


def test_a_run_must_be_named(capsys):
    assert main([]) == 2
    assert "RUN" in capsys.readouterr().err
    with pytest.raises(UsageError, match="RUN must be the folder of a run"):
        evaluate(Options("/nowhere"))


def test_importing_evaluate_needs_no_extra():
    blocked = ("tyro", "yaml", "rich", "torchvision", "safetensors", "pyarrow", "PIL", "mlxtend", "triton")
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport hypercontrast.evaluate"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_fixed_prototypes_keep_up_with_the_linear_probe(tmp_path):
    """SCL's recipe on the digits over three seeds: within half a point on average, at a small share of the time."""
    shortfall, shares = [], []
    for seed in range(3):
        folder = train(configure(loss="scl", seed=seed, quiet=True, run_dir=str(tmp_path / f"{seed}"), **ONE_RANK))
        methods = ("prototypes", "linear-probe")
        prototypes, probe = evaluate(Options(str(folder), methods=methods, nc=False, **ONE_RANK))["results"]
        shortfall.append(probe["accuracy"] - prototypes["accuracy"])
        shares.append(prototypes["share_of_linear_probe"])
    assert sum(shortfall) / 3 <= 0.005
    assert max(shares) < 0.25
