"""The report against run folders made by hand, and the demo on a few pictures."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hypercontrast import figures, report

safetensors_numpy = pytest.importorskip("safetensors.numpy")
yaml = pytest.importorskip("yaml")

VOID = {"meta", "path", "circle", "image"}


def make_run(folder, *, loss="nonl", cosine=0.0, classes=10, dim=16, epochs=3, class_names=None, **config):
    """A run folder whose class means meet at exactly `cosine`, with the metrics that follow from it."""
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
            "class_means": means,
            "prototypes": means,
        },
        folder / "embeddings.safetensors",
        metadata={"class_names": json.dumps(class_names)} if class_names else None,
    )
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


def test_page_of_two_runs(pair):
    path = report.write_report(pair)
    assert path == pair[0].parent / "report.html"
    text = path.read_text()
    page = Page(text)
    # Two matrices a run, a sphere a run, and a chart for each of the seven results that have a course.
    assert page.count("svg") == page.count("figure") == 2 * 3 + 7
    assert page.count("image") == 4
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
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", text)


def test_every_svg_has_a_name_and_ids_are_unique(pair):
    tags = Page(report.write_report(pair).read_text()).tags
    assert all(attributes.get("aria-label") for tag, attributes in tags if tag == "svg")
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["aria-labelledby"] for tag, attributes in tags if tag == "section"}
    assert labelled == set(ids)


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
    assert "0.750 for NTCE" in text
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
    assert verdict(runs[0], make_run(tmp_path / "e", cosine=0.4, dataset="cifar10")) == undecided


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
    assert list(rows) == [0, 18, 133, 122, 255, 176, 94, 22, 128, 0, 18, 133, 122, 0, 18, 133, 122, 255]


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
    assert "0.600 for r" in report.outcome([loaded])
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
        (lambda run: (run / "config.yaml").write_text("a: [\n"), "not valid YAML"),
        (lambda run: (run / "embeddings.safetensors").write_bytes(b"\1\2\3"), "damaged"),
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


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
@pytest.mark.parametrize(("scheme", "paper"), [(1, (253, 252, 250)), (0, (20, 23, 26))])
def test_renders_in_both_schemes(pair, tmp_path, scheme, paper):
    """The browser draws the page on the scheme's own paper, and the matrices in their colour."""
    image = pytest.importorskip("matplotlib.image")
    page, shot = report.write_report(pair), tmp_path / "shot.png"
    subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}", "--window-size=1200,2400", page.as_uri(),
        ],
        capture_output=True, timeout=90, check=True,
    )  # fmt: skip
    pixels = (image.imread(shot)[..., :3] * 255).round().astype(int)
    assert tuple(pixels[5, 5]) == paper
    teal = (np.abs(pixels - [18, 133, 122]).sum(axis=-1) <= 3).mean()
    assert teal > 0.01
    # Nothing reaches the edges: the page is not wider than its window.
    assert (pixels[:, -5:] == paper).all()


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
    assert page.count("image") == 4
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


def test_demo_mistake_is_one_line(tmp_path, capsys):
    demo = pytest.importorskip("hypercontrast.demo")
    assert demo.main(["--epochs", "0", "--output", str(tmp_path / "d")]) == 2
    assert capsys.readouterr().err == "error: epochs must be at least 1, got 0\n"
    assert not (tmp_path / "d").exists()
