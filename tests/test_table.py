"""The paper's tables beside run folders made by hand: numbers, states, stand-ins, and figure 2."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
import torch

from hypercontrast import NeuralCollapse
from hypercontrast.config import UsageError, read_recipe, recipe_names, to_yaml
from hypercontrast.paper import TABLES, TEMPERATURES
from hypercontrast.results import read_groups, share_to_collapse
from hypercontrast.runs import LOSS_TITLES
from hypercontrast.table import lines, main, render

yaml = pytest.importorskip("yaml")
for extra in ("pyarrow", "PIL"):
    pytest.importorskip(extra)

COLLAPSED = {"intra_erank": 4.0, "inter_erank": 9.0, "weight_erank": 9.0, "weight_alignment": 0.11}
COLLAPSED |= {"instance_alignment": 0.16, "mir": 0.95, "hdr": 0.05}


@pytest.fixture
def root(tmp_path):
    """A data root where cifar10 and cifar100 can be located."""
    for name in ("cifar10", "cifar100"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / "data" / name / f"{split}.parquet").touch()
    return str(tmp_path / "data")


def make_run(folder, recipe, *, accuracy=0.9, until=None, classes=10, metrics=(), files=(), **changes):
    """A run folder of a recipe with `changes`; of its epochs every fifth, and the last, is measured."""
    config = dataclasses.replace(read_recipe(recipe), run_dir=str(folder), **changes)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    rows = []
    for epoch in range(1, (config.epochs if until is None else until) + 1):
        measured = epoch % 5 == 0 or epoch == config.epochs
        found = {"accuracy": accuracy, "prototype_accuracy": accuracy, "classes_seen": classes, **dict(metrics)}
        rows.append({"epoch": epoch, "loss": 1.0, "lr": 0.1, "seconds": 1.0} | (found if measured else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in dict(files).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def line_of(table, method, data, paths, root, column=""):
    (found,) = [x for x in lines(TABLES[table], read_groups(paths), root)[0] if x.labels == (method, data, column)]
    return found


def stand_ins(table, paths, root):
    return lines(TABLES[table], read_groups(paths), root)[1]


# The published numbers.


def test_every_number_is_there():
    sizes = {name: len(table.cells) for name, table in TABLES.items()}
    assert sizes == {
        "1": 5 * 4, "2": 3 * 4, "3": (6 * 7 + 4) * 2, "4": 5 * 8, "5": 5, "6": 5 * 6, "7": 3 * 5, "8": 0,
        "9": 6, "10": 6, "11": 4 * 3, "12": 0, "13": 4 * 2, "14": 0,
    }  # fmt: skip
    assert list(TABLES) == [str(number) for number in range(1, 15)]
    for table in TABLES.values():
        labels = Counter((cell.method, cell.dataset, cell.column) for cell in table.cells)
        assert not labels or max(labels.values()) == 1


def test_cells_and_recipes_agree():
    for name, table in TABLES.items():
        for cell in table.cells:
            for recipe in cell.recipes:
                assert recipe in recipe_names()
                config = read_recipe(recipe)
                assert config.dataset == cell.dataset
                assert cell.method.startswith(LOSS_TITLES[config.loss])
                assert config.imbalance == (float(cell.column) if name == "6" else 1.0)
                assert name != "11" or config.batch_size == int(cell.column)
                if name in ("9", "10"):
                    assert config.batch_size == 512
                    assert config.temperature == cell.value
                assert config.limit == 0


def test_tables_agree_with_each_other():
    """Table 1 is the best of table 11, and table 13 up to the other seeds."""
    first = {(cell.method, cell.dataset): cell for cell in TABLES["1"].cells}
    best: dict[str, float] = {}
    for cell in TABLES["11"].cells:
        best[cell.method] = max(best.get(cell.method, 0), cell.value)
    assert best == {method: first[method, "imagenet1k"].value for method in best}
    batches = {(cell.method, cell.value, cell.recipes) for cell in TABLES["11"].cells}
    for method in best:
        for recipe in first[method, "imagenet1k"].recipes:
            assert (method, best[method], (recipe,)) in batches
    for cell in TABLES["13"].cells:
        assert first[cell.method, cell.dataset].std == cell.std
        assert abs(first[cell.method, cell.dataset].value - cell.value) < 2 * cell.std


# States.


def test_reproduced_within_the_published_spread(tmp_path, root):
    run = make_run(tmp_path / "a", "cifar10-nonl", accuracy=0.946)
    line = line_of("1", "NONL", "CIFAR-10", [run], root)
    assert (line.paper, line.ours, line.difference, line.state) == ("94.9", "94.60, n = 1", "−0.30", "reproduced")
    shutil.rmtree(run)
    run = make_run(tmp_path / "a", "cifar10-nonl", accuracy=0.9459)
    line = line_of("1", "NONL", "CIFAR-10", [run], root)
    assert (line.state, line.note) == ("differs", "0.31 off, at most 0.30 expected")


def test_mean_and_sample_deviation_over_seeds(tmp_path, root):
    """95.2, 95.5, 95.8: mean 95.5, deviation .3, hence up to 2·sqrt(.15² + .3²) = .67 from the paper's 94.9."""
    runs = [
        make_run(tmp_path / str(n), "cifar10-nonl", accuracy=accuracy, seed=n, workers=n, evaluate_every=n + 1)
        for n, accuracy in enumerate((0.952, 0.955, 0.958))
    ]
    line = line_of("1", "NONL", "CIFAR-10", runs, root)
    assert (line.ours, line.difference, line.state) == ("95.50 ± 0.30, n = 3", "+0.60", "reproduced")
    assert line_of("1", "NONL", "CIFAR-10", runs[:1], root).state == "reproduced"
    other = make_run(tmp_path / "far", "cifar10-nonl", accuracy=0.97, seed=9)
    assert line_of("1", "NONL", "CIFAR-10", [other], root).state == "differs"


def test_default_spread_where_none_is_published(tmp_path, root):
    for accuracy, state in ((0.549, "reproduced"), (0.5489, "differs")):  # 55.5 ± 2·0.3
        run = make_run(tmp_path / state, "cifar100lt-0.1-ce", accuracy=accuracy)
        assert line_of("6", "CE", "CIFAR-100", [run], root, "0.1").state == state


def test_other_settings_never_reproduce(tmp_path, root):
    run = make_run(tmp_path / "a", "cifar10-nonl", accuracy=0.949, epochs=15, width=16, neck="linear")
    line = line_of("1", "NONL", "CIFAR-10", [run], root)
    assert (line.difference, line.state) == ("+0.00", "differs")
    assert line.note == "15 of 1000 epochs, width 16, neck linear"


def test_running_says_the_epoch(tmp_path, root):
    run = make_run(tmp_path / "a", "cifar10-nonl", until=7)
    line = line_of("1", "NONL", "CIFAR-10", [run], root)
    assert (line.ours, line.state, line.note) == ("–", "running", "epoch 7 of 1000")
    (run / "metrics.jsonl").unlink()
    assert line_of("1", "NONL", "CIFAR-10", [run], root).note == "epoch 0 of 1000"


def test_one_seed_running_beside_a_finished_one(tmp_path, root):
    runs = [
        make_run(tmp_path / "a", "cifar10-nonl", accuracy=0.949),
        make_run(tmp_path / "b", "cifar10-nonl", until=3, seed=7),
    ]
    line = line_of("1", "NONL", "CIFAR-10", runs, root)
    assert (line.ours, line.state, line.note) == ("94.90, n = 1", "reproduced", "others running, epoch 3 of 1000")


def test_a_seed_counts_once(tmp_path, root):
    """Its newest finished run, in whatever order they are named; the others are named below the tables."""
    runs = {}
    for age, (name, options) in enumerate({"under way": {"until": 3}, "newer": {}, "older": {}}.items()):
        run = make_run(tmp_path / name, "cifar10-nonl", accuracy=0.94 + 0.01 * (name == "newer"), **options)
        os.utime(run / "metrics.jsonl", (1000 - age, 1000 - age))
        runs[name] = run
    other = make_run(tmp_path / "other", "cifar10-nonl", accuracy=0.95, seed=1)
    for order in (["older", "newer", "under way"], ["under way", "newer", "older"]):
        groups = read_groups([other, *(runs[name] for name in order)])
        line = line_of("1", "NONL", "CIFAR-10", [run.path for g in groups for run in (*g.runs, *g.repeats)], root)
        assert line.ours == "95.00 ± 0.00, n = 2"
        others = ", ".join(str(runs[name]) for name in order if name != "newer")
        text = " ".join(render(["1"], groups, root).split())
        assert f"Not counted, for another run has the same seed: {others}." in text


def test_a_run_without_a_place_is_named(tmp_path, root):
    digits = make_run(tmp_path / "digits", "cifar10-nonl", accuracy=0.9, classes=7, dataset="folder:seven")
    groups = read_groups([digits, make_run(tmp_path / "a", "cifar10-nonl", accuracy=0.949)])
    assert f"No place in this table: {digits}." in " ".join(render(["1"], groups, root).split())
    assert f"No place in these tables: {digits}." in " ".join(render(["1", "6"], groups, root).split())
    assert "No place" not in render(["1"], groups[1:], root)


def test_five_seeds_for_table_13(tmp_path, root):
    runs = [make_run(tmp_path / str(seed), "cifar10-nonl", accuracy=0.948, seed=seed) for seed in range(5)]
    line = line_of("13", "NONL", "CIFAR-10", runs, root)
    assert (line.paper, line.ours, line.state) == ("94.84 ± 0.15", "94.80 ± 0.00, n = 5", "reproduced")
    line = line_of("13", "NONL", "CIFAR-10", runs[:2], root)
    assert (line.state, line.note) == ("differs", "2 of 5 seeds")


def test_the_closest_runs_are_shown_and_the_others_named(tmp_path, root):
    follows = make_run(tmp_path / "follows", "cifar10-nonl", accuracy=0.949)
    signed = make_run(tmp_path / "signed", "cifar10-nonl-signed", accuracy=0.999)
    own, _, passed_over = lines(TABLES["1"], read_groups([signed, follows]), root)
    assert [line.ours for line in own if line.state == "reproduced"] == ["94.90, n = 1"]
    assert passed_over == [signed]
    assert f"more closely: {signed}" in " ".join(render(["1"], read_groups([signed, follows]), root).split())


def test_batch_sizes_are_columns_of_their_own(tmp_path):
    run = make_run(tmp_path / "a", "imagenet1k-nonl-4096", accuracy=0.763, classes=1000)
    states = {
        line.labels[2]: line.state
        for line in lines(TABLES["11"], read_groups([run]), "none")[0]
        if "NONL" in line.labels
    }
    assert states == {"2048": "needs data imagenet1k", "4096": "reproduced", "8192": "needs data imagenet1k"}
    # Table 1 has the best of them, which on ImageNet-1K is that of 8192.
    line = line_of("1", "NONL", "ImageNet-1K", [run], "none")
    assert (line.state, line.note) == ("differs", "batch size 4096")


# Never a silent blank.


@pytest.mark.parametrize("name", TABLES)
def test_without_runs_every_line_says_what_to_do(name, root):
    for line in lines(TABLES[name], [], root)[0]:
        assert float(line.paper.partition(" ")[0]) >= 0
        if line.labels[1].startswith("CIFAR"):
            assert line.state == "not run"
            assert re.match(rf"python -m hypercontrast\.train --recipe \S+ --data-root {root}\b", line.note)
        else:
            assert line.state in ("needs data imagenet1k", "needs data imagenet100")
            assert line.note


@pytest.mark.parametrize("name", ["8", "12", "14"])
def test_tables_that_are_not_on_hand_say_so(name):
    assert f"The values of table {name} are not on hand" in render([name], [])


def test_needs_data_names_what_is_expected(tmp_path):
    line = line_of("1", "CE", "CIFAR-10", [], str(tmp_path))
    assert line.state == "needs data cifar10"
    assert f"{tmp_path / 'cifar10'}/{{train,test}}{{,-*}}.parquet" in line.note


def test_finished_run_that_was_not_evaluated(tmp_path, root):
    run = make_run(tmp_path / "scl", "cifar10-scl", data_root=root)
    line = line_of("2", "SCL, linear probe", "CIFAR-10", [run], "elsewhere")
    assert (line.state, line.note) == ("not run", f"python -m hypercontrast.evaluate {run}")
    moved = make_run(tmp_path / "moved", "cifar10-scl", data_root=str(tmp_path / "gone"))
    assert line_of("2", "SCL, linear probe", "CIFAR-10", [moved], root).state == "needs data cifar10"


def test_seed_without_a_value_is_named(tmp_path, root):
    files = {"evaluation.json": evaluation({"method": "prototypes", "accuracy": 0.95})}
    runs = [make_run(tmp_path / "a", "cifar10-scl", files=files), make_run(tmp_path / "b", "cifar10-scl", seed=1)]
    line = line_of("2", "SCL, fixed prototypes", "CIFAR-10", runs, root)
    assert (line.ours, line.state, line.note) == ("95.00, n = 1", "reproduced", f"nothing yet from {runs[1]}")


def test_finished_run_without_its_metric(tmp_path, root):
    run = make_run(tmp_path / "a", "cifar100-nonl", metrics={"mir": 1.0})
    line = line_of("7", "NONL", "CIFAR-100", [run], root, "intra")
    assert (line.state, line.note) == ("not measured", f"{run / 'metrics.jsonl'} holds no intra_erank")


@pytest.fixture
def transfer_sets(monkeypatch):
    """A registry of transfer sets where only food101 lies in its root."""

    def locate(name, root):
        if name != "food101":
            raise UsageError(f"data_root must hold {name}")

    monkeypatch.setattr("hypercontrast.table.locate_transfer_set", locate)


def test_run_that_was_not_transferred(tmp_path, transfer_sets):
    run = make_run(tmp_path / "in1k", "imagenet1k-ce")
    root = str(tmp_path)
    line = line_of("4", "CE", "ImageNet-1K", [run], root, "Food-101")
    command = f"python -m hypercontrast.transfer {run} --datasets food101 --data-root {root}"
    assert (line.state, line.note) == ("not run", command)
    line = line_of("4", "CE", "ImageNet-1K", [run], root, "Cars")
    assert (line.state, line.note) == ("needs data cars", "data_root must hold cars")


def test_run_without_corruptions(tmp_path):
    run = make_run(tmp_path / "in1k", "imagenet1k-ce")
    assert line_of("5", "CE", "ImageNet-1K", [run], str(tmp_path)).state == "needs data imagenet-c"
    (tmp_path / "imagenet-c").mkdir()
    line = line_of("5", "CE", "ImageNet-1K", [run], str(tmp_path))
    assert (line.state, line.note) == (
        "not run",
        f"python -m hypercontrast.corruptions {run} --data-root {tmp_path}",
    )


# Values from their files.


PAPER_PROBE = {"epochs": 100, "lr": 5.0, "batch_size": 512, "seed": 42}


def evaluation(*results, epoch=1000, probe=PAPER_PROBE):
    return {"epoch": epoch, "device": "cpu", "ranks": 1, "probe": probe, "results": list(results)}


def test_probe_and_its_protocol(tmp_path, root):
    result = {"method": "linear-probe", "accuracy": 0.951}
    for name, content, state, note in (
        ("as", evaluation(result), "reproduced", ""),
        ("early", evaluation(result, epoch=500), "differs", "measured at epoch 500 of 1000"),
        ("cached", evaluation(result, probe="L-BFGS on kept features"), "differs", "probe by L-BFGS on kept features"),
        (
            "short",
            evaluation(result, probe=PAPER_PROBE | {"epochs": 20}),
            "differs",
            "probe of 20 epochs at lr 5.0, not 100 at 5.0",
        ),
    ):
        run = make_run(tmp_path / name, "cifar10-scl", files={"evaluation.json": content})
        line = line_of("2", "SCL, linear probe", "CIFAR-10", [run], root)
        assert (line.ours, line.state, line.note) == ("95.10, n = 1", state, note)


@pytest.mark.parametrize(
    ("classes", "title", "expected"),
    [
        (10, "CIFAR-10", {"weight": "0.1026", "instance": "0.1026", "MIR": "0.9516", "HDR": "0.0496", "inter": "9.00"}),
        (
            100,
            "CIFAR-100",
            {"weight": "0.0100", "instance": "0.0100", "MIR": "0.9972", "HDR": "0.3002", "inter": "99.00"},
        ),
    ],
)
def test_orthogonal_frame_gives_the_numbers_of_table_3(tmp_path, root, classes, title, expected):
    """Non-negative features at their best, an orthogonal frame, with prototypes at a simplex ETF."""
    metric = NeuralCollapse(classes, classes, compat=True)
    frame = torch.eye(classes)
    metric.update(frame.repeat(3, 1), torch.arange(classes).repeat(3))
    compat = metric.compute(frame - 1 / classes)
    run = make_run(
        tmp_path / "a",
        f"cifar{classes}-nonl",
        files={"evaluation.json": evaluation({"method": "head", "accuracy": 0.9, "nc": {}, "nc_compat": compat})},
    )
    shown = {column: line_of("3", "NONL", title, [run], root, column) for column in expected}
    assert {column: line.ours.partition(",")[0] for column, line in shown.items()} == expected
    paper = {"CIFAR-10": ("0.11", "0.95", "0.05", "9.0"), "CIFAR-100": ("0.01", "1.00", "0.30", "99.0")}[title]
    assert tuple(shown[column].paper for column in ("weight", "MIR", "HDR", "inter")) == paper
    assert all(shown[column].state == "reproduced" for column in ("weight", "MIR", "HDR", "inter"))
    text = " ".join(render(["3"], [], root).split())
    for column in ("weight", "MIR", "HDR"):
        assert expected[column] in text, "the note under the table states the closed form"


def test_table_3_takes_the_compat_numbers_of_the_right_classifier(tmp_path, root):
    files = {
        "evaluation.json": evaluation(
            {"method": "linear-probe", "nc": {"mir": 0.1}, "nc_compat": {"mir": 0.99}},
            {"method": "prototypes", "nc": {"mir": 0.1}, "nc_compat": {"mir": 0.88}},
        )
    }
    run = make_run(tmp_path / "a", "cifar100-scl", files=files)
    probe, fixed = (
        line_of("3", f"SCL, {x}", "CIFAR-100", [run], root, "MIR") for x in ("linear probe", "fixed prototypes")
    )
    assert (probe.paper, probe.ours, fixed.paper, fixed.ours) == ("0.95", "0.9900, n = 1", "0.87", "0.8800, n = 1")


def test_transfer_is_read(tmp_path, transfer_sets):
    results = {"food101": {"metric": "top-1", "value": 0.707, "l2": 1e-4, "train": 75750, "test": 25250}}
    results["voc2007"] = {"metric": "mAP", "value": 0.683, "l2": 1e-4, "train": 100, "test": 200}
    files = {"transfer.json": {"epoch": 500, "results": results}}
    run = make_run(tmp_path / "a", "imagenet1k-nonl-8192", files=files)
    line = line_of("4", "NONL", "ImageNet-1K", [run], "none", "Food-101")
    assert (line.paper, line.ours, line.state) == ("70.7", "70.70, n = 1", "reproduced")
    line = line_of("4", "NONL", "ImageNet-1K", [run], "none", "VOC07 mAP")
    assert (line.ours, line.state, line.note) == ("68.30, n = 1", "differs", "200 of 4,952 test pictures")


def corruptions(**changes):
    return {"epoch": 500, "source": "imagenet-c", "reference": "AlexNet", "clean_error": 0.24, "errors": {}, **changes}


def test_corruption_error_is_read(tmp_path):
    run = make_run(tmp_path / "a", "imagenet1k-ce", files={"corruptions.json": corruptions(mce=80.3)})
    line = line_of("5", "CE", "ImageNet-1K", [run], "none")
    assert (line.paper, line.ours, line.state) == ("80.1", "80.30, n = 1", "reproduced")
    made = corruptions(mce=80.3, source="generated", reference="runs/ce")
    (run / "corruptions.json").write_text(json.dumps(made))
    line = line_of("5", "CE", "ImageNet-1K", [run], "none")
    assert (line.state, line.note) == ("differs", "generated corruptions, relative to runs/ce")
    (run / "corruptions.json").write_text(json.dumps(corruptions(mce=None)))
    assert line_of("5", "CE", "ImageNet-1K", [run], "none").ours == "–"


def test_long_tail_is_read_by_imbalance(tmp_path, root):
    runs = [
        make_run(tmp_path / imbalance, f"cifar10lt-{imbalance}-nonl", accuracy=accuracy)
        for imbalance, accuracy in (("0.1", 0.892), ("0.01", 0.763))
    ]
    assert [line_of("6", "NONL", "CIFAR-10", runs, root, x).ours for x in ("0.1", "0.02", "0.01")] == [
        "89.20, n = 1",
        "–",
        "76.30, n = 1",
    ]
    assert line_of("1", "NONL", "CIFAR-10", runs, root).state == "not run"


def test_best_temperature(tmp_path, root):
    """.1 has the best single run, .2 the best mean."""
    found = {0.1: (0.96, 0.92), 0.2: (0.95, 0.95), 0.3: (0.94, 0.94)}
    runs = [
        make_run(tmp_path / f"{tau}-{seed}", "cifar10-nonl", accuracy=accuracy, temperature=tau, seed=seed)
        for tau, accuracies in found.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    line = line_of("9", "NONL", "CIFAR-10", runs, root)
    assert (line.paper, line.ours, line.state, line.note) == ("0.20", "0.20", "differs", "3 of 11 temperatures")
    runs += [
        make_run(tmp_path / f"{tau}", "cifar10-nonl", accuracy=0.5, temperature=tau)
        for tau in TEMPERATURES
        if tau not in found
    ]
    assert line_of("9", "NONL", "CIFAR-10", runs, root).state == "reproduced"
    worse = make_run(tmp_path / "third", "cifar10-nonl", accuracy=0.99, temperature=0.3, seed=2)
    line = line_of("10", "NONL", "CIFAR-10", [*runs, worse], root)
    assert (line.ours, line.state, line.note) == ("0.30", "differs", "0.10 off, at most 0.00 expected")


def test_accuracy_that_is_not_finite_is_not_measured(tmp_path, root):
    run = make_run(tmp_path / "a", "cifar10-nonl", accuracy=math.nan)
    for table in ("1", "9"):
        line = line_of(table, "NONL", "CIFAR-10", [run], root)
        assert (line.ours, line.state) == ("–", "not measured")
        assert str(run / "metrics.jsonl") in line.note


@pytest.mark.parametrize("classes", [math.nan, math.inf])
def test_classes_that_are_not_finite_are_not_counted(classes, tmp_path, root):
    run = make_run(tmp_path / "digits", "mnist5k-nonl", classes=classes)
    assert stand_ins("1", [run], root) == []


# The course of neural collapse.


def test_share_to_collapse_of_a_step():
    """A step at epoch t: s_n = (1 − .9^(n−t))/(1 − .9^n), so n − t = ln .05/ln .9 = 28.4 epochs for 95 %."""
    for step, falling in ((100, 1), (400, -1)):
        points = [(epoch, falling * float(epoch > step)) for epoch in range(1, 1001)]
        assert share_to_collapse(points) == (step + math.ceil(math.log(0.05) / math.log(0.9))) / 1000


def test_share_to_collapse_follows_epochs_not_measurements():
    """Every seventh epoch measured, the step first at 106: after k more s = 1 − .9^(7(k+1)), so k + 1 = 28.4/7, up."""
    points = [(epoch, float(epoch > 100)) for epoch in [*range(1, 1000, 7), 1000]]
    more = math.ceil(math.log(0.05) / math.log(0.9) / 7) - 1
    assert share_to_collapse(points) == (106 + 7 * more) / 1000


def test_share_to_collapse_wants_it_to_stay():
    """Back to the start at epoch 900, up again at 910: the first arrival does not count."""
    points = [(epoch, float(epoch > 100 and not 900 <= epoch <= 910)) for epoch in range(1, 1001)]
    assert share_to_collapse(points) > 0.91


@pytest.mark.parametrize(("points", "share"), [([(4, 2.0)], 1.0), ([(1, 3.0), (2, 3.0)], 0.5)])
def test_share_to_collapse_without_a_way(points, share):
    assert share_to_collapse(points) == share


def test_table_7_is_read_from_the_epochs(tmp_path, root):
    """Values that never move are at 95 % from the first measured epoch, the fifth of a thousand."""
    run = make_run(tmp_path / "a", "cifar100-nonl", metrics=COLLAPSED)
    line = line_of("7", "NONL", "CIFAR-100", [run], root, "intra")
    assert (line.paper, line.ours, line.state) == ("14.6", "0.5, n = 1", "differs")


# Stand-ins.


def test_stand_ins_stand_apart_and_never_reproduce(tmp_path, root):
    digits = make_run(tmp_path / "digits", "mnist5k-nonl", accuracy=0.949)
    tin = make_run(tmp_path / "tin", "cifar100-nonl", accuracy=0.736, dataset="parquet:/data/tin100", classes=100)
    few = make_run(tmp_path / "few", "cifar10-nonl", accuracy=0.949, limit=5000, epochs=15, width=16)
    own, others, _ = lines(TABLES["1"], read_groups([digits, tin, few]), root)
    assert {line.state for line in own if line.labels[1].startswith("CIFAR")} == {"not run"}
    assert [(line.labels[1], line.paper, line.ours, line.state) for line in others] == [
        ("cifar10 for CIFAR-10", "94.9", "94.90, n = 1", "differs"),
        ("mnist5k for CIFAR-10", "94.9", "94.90, n = 1", "differs"),
        ("tin100 for CIFAR-100", "73.6", "73.60, n = 1", "differs"),
    ]
    notes = [line.note for line in others]
    assert notes[0] == "5,000 of 50,000 pictures, 15 of 1000 epochs, width 16"
    assert notes[1].startswith("mnist5k for cifar10, 8 of 1000 epochs, model convnet")
    assert notes[2] == "tin100 for cifar100"
    assert "Stand-ins" in render(["1"], read_groups([digits]), root)


def test_stand_ins_of_transfer_and_corruptions(tmp_path):
    files = {"corruptions.json": corruptions(epoch=8, mce=91.0, source="generated", reference="runs/ce")}
    run = make_run(tmp_path / "a", "mnist5k-nonl", files=files)
    (line,) = stand_ins("5", [run], "none")
    assert (line.labels, line.ours, line.state) == (("NONL", "mnist5k for ImageNet-1K", ""), "91.00, n = 1", "differs")
    assert "generated corruptions, relative to runs/ce" in line.note
    assert stand_ins("4", [run], "none") == []


def test_a_stand_in_that_runs_is_running(tmp_path, root):
    run = make_run(tmp_path / "a", "mnist5k-nonl", until=6)
    (line,) = stand_ins("1", [run], root)
    assert line.state == "running"
    assert line.note.startswith("epoch 6 of 8, mnist5k for cifar10")


# The command.


def test_command_line(tmp_path, root, capsys):
    run = make_run(tmp_path / "runs" / "a|b", "cifar10-nonl", accuracy=0.949)
    (tmp_path / "runs" / "report.html").touch()
    words = [run, tmp_path / "runs" / "report.html", "--data-root", root]
    assert main(["1", "13", *map(str, words)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"NONL +CIFAR-10 +94\.9 +94\.90, n = 1 +\+0\.00 +reproduced\n", text)
    assert "[1] not run: python -m hypercontrast.train --recipe cifar10-ce" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("[")) <= 100
    assert main(["all", *map(str, words), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert main(["all", "--markdown", *map(str, words)]) == 0
    assert capsys.readouterr().out == text
    assert text.count("## Table") == 13  # 9 and 10 are one
    assert "| NONL | CIFAR-10 | 94.9 | 94.90, n = 1 | +0.00 | reproduced |" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 10
    for rows in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, "as many cells in every row"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["15"], "table must be 1 to 14"),
        (["0"], "table must be 1 to 14"),
        (["runs"], "table must be 1 to 14"),
        (["1", "figure2"], "figure2 alone"),
        ([], "the following arguments are required"),
        (["1", "{tmp}/nothing"], "does not exist"),
        (["1", "{tmp}"], "with a config.yaml, got"),
        (["1", "{tmp}/damaged"], "must be readable YAML"),
        (["1", "{tmp}/lines"], "line 1 is not a JSON object"),
        (["2", "{tmp}/json"], "must be readable JSON"),
        (["2", "{tmp}/list"], "must hold a JSON object, got list"),
        (["2", "{tmp}/results"], "must hold a list of results"),
        (["figure2", "{tmp}/unmeasured"], "with a measured epoch"),
        (["figure2"], "with a measured epoch"),
        (["figure2", "{tmp}/unmeasured", "{tmp}/digits"], "on one data set, got cifar10, mnist5k"),
        (["figure2", "{tmp}/unmeasured", "{tmp}/warm"], "seed alone, got"),
        (["figure2", "{tmp}/digits", "--markdown"], "markdown must be left out with figure2, which is a picture"),
        (
            ["3", "{tmp}/digits", "--output", "{tmp}/3.md"],
            "output must be left out with tables, which are printed, got",
        ),
    ],
)
def test_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    for name, file, content in (
        ("damaged", "config.yaml", "a: ["),
        ("lines", "metrics.jsonl", "{}\n"),
        ("json", "evaluation.json", "{"),
        ("list", "transfer.json", "[1]"),
        ("results", "evaluation.json", '{"results": [1]}'),
        ("unmeasured", "transfer.json", "{}"),
    ):
        (make_run(tmp_path / name, "cifar10-nonl", until=1) / file).write_text(content)
    make_run(tmp_path / "digits", "mnist5k-nonl")
    make_run(tmp_path / "warm", "cifar10-nonl", temperature=0.9)
    assert main([word.format(tmp=tmp_path) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "hypercontrast.table", "12"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "not on hand" in done.stdout


# Figure 2.


def test_figure_2_has_a_curve_a_loss(tmp_path, capsys):
    for loss in ("ce", "nonl"):
        for seed, mir in enumerate((0.5, 0.7)):
            make_run(
                tmp_path / f"{loss}-{seed}", f"mnist5k-{loss}", seed=seed, metrics=COLLAPSED | {"mir": mir}, epochs=30
            )
    target = tmp_path / "out.svg"
    folders = [str(folder) for folder in sorted(tmp_path.iterdir())]
    assert main(["figure2", *folders, "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    svg = "{http://www.w3.org/2000/svg}"
    sheet = ET.parse(target).getroot()
    assert sheet.tag == f"{svg}svg"
    charts = sheet.findall(f".//{svg}svg")
    assert len(charts) == 8
    for chart in charts:
        curves = [path for path in chart.iter(f"{svg}path") if path.get("class") == "line"]
        assert len(curves) == 2
        assert [text.text for text in chart.iter(f"{svg}text") if "label" in text.get("class")] == ["CE", "NONL"]
        assert {path.get("d").count("L") for path in curves} == {5}  # six measured epochs
    style = sheet.find(f"{svg}style").text
    used = set(re.findall(r"var\((--[\w-]+)\)", style)) - {"--c"}
    assert used <= set(re.findall(r"(--[\w-]+):", style)), "every colour is defined in the file itself"


def test_figure_2_draws_means_over_common_epochs(tmp_path):
    from hypercontrast.table import _mean_course

    runs = [
        make_run(tmp_path / "a", "mnist5k-nonl", accuracy=0.5, epochs=20, seed=1),
        make_run(tmp_path / "b", "mnist5k-nonl", accuracy=0.7, epochs=20, seed=2, until=11),
    ]
    (group,) = read_groups(runs)
    assert _mean_course(group, "accuracy") == [(5, 0.6), (10, 0.6)]


STUDY = Path(__file__).parents[1] / "bench" / "results" / "2026-11-23-study"


@pytest.mark.parametrize(
    ("table", "part", "rows"),
    [("1", "mnist5k", 4), ("1", "cifar10", 4), ("2", "mnist5k", 2), ("3", "cifar10", 4 * 7), ("6", "longtail", 4)],
)
def test_the_committed_study_stands_beside_the_paper(table, part, rows, tmp_path, capsys):
    """As stand-ins of three seeds each, whose settings are told, and which are never called reproduced."""
    folders = [str(folder) for folder in sorted((STUDY / part).iterdir())]
    assert main([table, *folders, "--data-root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    # The study has no normalised probe; SCL's lines of table 3 are those of other classifiers.
    wanted = "SCL" if table == "2" else ("CE", "NormFace", "NTCE", "NONL")
    beside = [line for line in out.splitlines() if line.startswith(wanted) and " for CIFAR-10 " in line]
    beside = [line for line in beside if "normalised probe" not in line]
    assert len(beside) == rows
    assert all("n = 3" in line and "differs [" in line for line in beside)
    assert "of 1000 epochs" in out
