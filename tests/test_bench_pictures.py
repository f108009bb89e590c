"""Pictures of the bench's rows, the roofline's arithmetic, and the profile of a case."""

import argparse
import json
import math
import os
import sys
from dataclasses import replace

import pytest
import torch

from bench import plot, profile, record, roofline
from bench.__main__ import main
from bench.record import Case, Row
from bench.roofline import Rates, Work
from hypercontrast import compiled

ENVIRONMENT = {"device": "A machine", "threads": 2, "torch": "2.11", "commit": "abc", "date": "2026-01-02"}


def row(form: str, n: int, ms: float | None = None, op: str = "ntce", **more) -> Row:
    band = {"fwd_bwd_p20": 0.9 * ms, "fwd_bwd_p80": 1.2 * ms, "scratch_mib": n / 64} if ms else {}
    return Row(op, form, n, 10, 16, more.pop("dtype", "float32"), fwd_bwd_ms=ms, **band, **more, **ENVIRONMENT)


SIZES = (256, 512, 1024)
GROWTH = [
    *(row("ours", n, n / 256) for n in SIZES),
    *(row("eager M x M", n, n**2 / 256**2, fwd_bwd_ratio=1.01 * n / 256) for n in SIZES[:2]),
    row("eager M x M", 1024, status="out of memory"),
]


def point(op: str, passes: str, **more) -> record.Point:
    sizes = {"n": 4096, "k": 1000, "d": 512, "dtype": "float32", "method": "kept", "rounds": 5}
    rates = {"square_tflops": 0.3, "products_tflops": 0.25, "copy_gbs": 20.0, "exp_gexps": 9.0}
    floors = {"matmul_ms": 40.0, "bytes_ms": 3.0, "exp_ms": 1.0, "limit": "matmul", "share": 0.8}
    times = {"time_ms": 50.0, "p20_ms": 49.0, "p80_ms": 52.0, "error": 1e-7, "tangential_error": 1e-7, "wrong": ""}
    work = {"flop": 1.2e10, "bytes": 6e7, "exps": 4e6}
    return record.Point(op, passes, **(sizes | rates | floors | times | work | more), **ENVIRONMENT)


POINTS = [point(op, passes) for op in ("nonl", "supcon") for passes in roofline.PASSES]


def write(path, rows):
    writer = record.Writer(path, type(rows[0]))
    for item in rows:
        writer.add(item)
    return path


def parsed(module, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(list(map(str, words)))


@pytest.fixture(scope="module")
def pixels():
    image = pytest.importorskip("matplotlib.image")
    return lambda path: (image.imread(path)[..., :3] * 255).round().astype(int)


@pytest.mark.parametrize("items", [GROWTH, POINTS])
def test_a_picture_of_several_files_names_what_each_was_measured_with(items, tmp_path):
    pytest.importorskip("matplotlib")
    later = [replace(item, n=2 * item.n, commit="def", date="2026-02-03") for item in items]
    files = [write(tmp_path / name, of) for name, of in (("before.csv", items), ("after.csv", later))]
    for figure in plot.figures_of(*plot.read(files)).values():
        assert "A machine, 2 threads · float32 · torch 2.11 · commit abc, def · 2026-01-02, 2026-02-03" in {
            text.get_text() for text in figure.texts
        }


def test_pictures_of_both_kinds_of_file(tmp_path, pixels):
    # Long names and titles, and a panel beside another, find their room too.
    variant = {"features": "collapsed", "labels": "instances", "k": 100_000}
    others = [replace(row(form, 65_536, 3e4), **variant) for form in ("pytorch-metric-learning", "ours")]
    files = [write(tmp_path / "matrix.csv", [*GROWTH, *others]), write(tmp_path / "roofline.csv", POINTS)]
    paths = plot.draw(files, tmp_path / "out")
    assert [path.name for path in paths] == ["time-float32.png", "memory-float32.png", "roofline-float32.png"]
    ours = [int(plot.OUR_COLOUR[i : i + 2], 16) for i in (1, 3, 5)]
    for path in paths:
        found = pixels(path)
        assert min(found.shape[:2]) > 400
        assert ((found == ours).all(axis=-1)).sum() > 100  # NONL's colour on the roofline
        assert (found[:5] == 255).all()  # nothing runs over the edges
        assert (found[:, -5:] == 255).all()


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_growth(pixels):
    (axes,) = plot.figures_of(GROWTH, [])["time-float32"].axes
    lines = lines_of(axes)
    assert legend_of(axes) == ["eager M x M  2×", "ours", "as F1 = 2NKD"]  # 2× at 512, the last N of both
    assert list(lines["ours"].get_xydata()[:, 1]) == [1, 2, 4]
    assert list(lines["eager M x M  2×"].get_xdata()) == [256, 512]  # what ran out of memory is no point of the line
    guide = lines["as F1 = 2NKD"].get_xydata()
    assert guide[-1, 1] == 4  # through the largest case of ours
    assert guide[-1, 1] / guide[0, 1] == pytest.approx(4)  # 2NKD: as N
    bands = [band.get_paths()[0].get_extents() for band in axes.collections]
    assert [(band.ymin, band.ymax) for band in bands] == [pytest.approx((0.9, 4.8)), pytest.approx((0.9, 4.8))]
    assert axes.get_title(loc="left") == "NTCE   K = 10  D = 16"
    assert axes.get_ylabel() == "ms"


def test_a_wide_band_is_whole(pixels):
    """That of a noisy machine, whose ends lie far from the medians."""
    rows = [replace(row("ours", n, 2.0), fwd_bwd_p20=0.5, fwd_bwd_p80=40.0) for n in SIZES]
    (axes,) = plot.figures_of(rows, [])["time-float32"].axes
    low, high = axes.get_ylim()
    assert low < 0.5 < 40 < high


@pytest.mark.parametrize("quantity", ["time", "memory"])
def test_out_of_memory_is_a_cross_above_all_values(pixels, quantity):
    (axes,) = plot.figures_of(GROWTH, [])[f"{quantity}-float32"].axes
    ((n, height),) = [line.get_xydata()[0] for line in axes.get_lines() if line.get_marker() == "x"]
    assert n == 1024
    assert height > 1  # of the height of the axes: no value is there
    assert "eager M x M" in legend_of(axes)[0]
    assert "out of memory" in [text.get_text() for text in axes.texts]


def test_a_panel_that_ran_out_of_memory_leaves_the_others(pixels):
    large = [row(form, 1024 * n, status="out of memory", op="nonl") for form in ("ours", "eager M x M") for n in SIZES]
    first, crosses = plot.figures_of([*GROWTH, *large], [])["time-float32"].axes
    assert list(lines_of(first)["ours"].get_xydata()[:, 1]) == [1, 2, 4]
    assert [line.get_xdata()[0] for line in crosses.get_lines() if line.get_marker() == "x"] == [1024 * 256] * 2


def test_pairs_grow_as_the_square(pixels):
    (axes,) = plot.figures_of([row("ours", n, n**2 / 1e4, op="supcon") for n in SIZES], [])["time-float32"].axes
    guide = lines_of(axes)["as F1 = 2N²D"].get_ydata()
    assert guide[-1] / guide[0] == pytest.approx(16)


def test_one_size_is_bars(pixels):
    rows = [
        row("eager", 256, 3.0, fwd_bwd_ratio=1.94),
        row("ours", 256, 1.5),
        row("dense", 256, status="out of memory"),
    ]
    (axes,) = plot.figures_of(rows, [])["time-float32"].axes
    assert [bar.get_width() for bar in axes.patches] == [1.5, 3.0]  # ours first
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "eager", "dense"]
    assert [text.get_text() for text in axes.texts] == ["1.5 ms", "3 ms  1.9×", "out of memory"]
    assert axes.get_xlim()[0] == 0  # bars compare by their lengths
    assert axes.get_xlim()[1] > 3.6  # and the band has its room


def test_wrong_results_are_named_and_not_drawn(pixels):
    wrong = row("fast", 256, 0.001, status="wrong", reason="error 1e-1 is past 1e-6")
    absent = row("lightly", 256, status="absent", reason="pip install lightly")
    figure = plot.figures_of([*GROWTH, wrong, absent], [])["time-float32"]
    assert "fast" not in lines_of(figure.axes[0])
    words = [text.get_text() for text in figure.texts]
    assert "fast: wrong (error 1e-1 is past 1e-6) at ntce 256 × 10 × 16" in words
    assert "lightly: absent (pip install lightly)" in words
    assert plot.figures_of([wrong, absent], []) == {}


def test_what_differs_from_most_has_its_own_panel(pixels):
    cold = [replace(x, temperature=0.01, labels="longtail") for x in GROWTH]
    half = [replace(x, dtype="bfloat16") for x in GROWTH]
    figures = plot.figures_of([*GROWTH, *cold, *half], [])
    assert figures.keys() == {f"{what}-{dtype}" for what in ("time", "memory") for dtype in ("float32", "bfloat16")}
    titles = [axes.get_title(loc="left") for axes in figures["time-float32"].axes]
    assert titles == ["NTCE   K = 10  D = 16", "NTCE   K = 10  D = 16, longtail, τ = 0.01"]
    others = [replace(x, device="Another (TM) machine") for x in GROWTH]
    names = plot.figures_of([*GROWTH, *others], [])
    assert {"time-A_machine_2_threads-float32", "time-Another_TM_machine_2_threads-float32"} <= names.keys()


def test_nothing_kept_is_drawn_at_zero(pixels):
    rows = [replace(row("ours", n, 1.0), scratch_mib=0.0) for n in SIZES]
    (axes,) = plot.figures_of(rows, [])["memory-float32"].axes
    assert axes.get_ylim()[0] == 0
    assert list(lines_of(axes)["ours"].get_ydata()) == [0, 0, 0]


def test_later_files_count(tmp_path):
    files = [write(tmp_path / f"{i}.csv", [row("ours", 256, ms)]) for i, ms in enumerate((1.0, 2.0))]
    (kept,), _ = plot.read(files)
    assert kept.fwd_bwd_ms == 2.0


def test_files_that_cannot_be_drawn(tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert main(["plot", str(other)]) == 2
    assert capsys.readouterr().err == f"error: {other} must have the columns of a Row, got ['a', 'b']\n"
    old = write(tmp_path / "old.csv", POINTS)
    old.write_text(old.read_text().replace("exp_gexps", "exps_a_second", 1))
    assert main(["plot", str(old)]) == 2
    assert f"{old} must have the columns of a Point, got [" in capsys.readouterr().err
    nothing = write(tmp_path / "nothing.csv", [row("ours", 256, status="absent")])
    assert main(["plot", str(nothing)]) == 2
    assert capsys.readouterr().err == f"error: FILE must hold measured rows, got none in {nothing}\n"
    assert main(["plot", str(tmp_path / "missing.csv")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(write(tmp_path / "rows.csv", GROWTH))]) == 2
    assert capsys.readouterr().err == "error: plot needs matplotlib: pip install 'hypercontrast[bench]'\n"


# Roofline


def test_least_work_of_prototype_losses():
    case = Case("nonl", 4096, 1000, 512, "bfloat16")
    inputs = 2 * (4096 + 900) * 512 + 8 * 4096  # bfloat16, the 900 classes that are there, labels
    once = roofline.methods(case, "forward", 900, on_gpu=True)["once"]
    assert once == Work(flop=2 * 4096 * 900 * 512, bytes=inputs, exps=4096 * 900)
    both = roofline.methods(case, "forward + backward", 900, on_gpu=True)
    moved = 2 * inputs + 2 * (4096 + 1000) * 512  # every prototype has a gradient
    assert both["kept"] == Work(3 * once.flop, moved + 2 * 2 * 4096 * 900, 4096 * 900)
    assert both["recomputed"] == Work(4 * once.flop, moved, 2 * 4096 * 900)
    on_cpu = roofline.methods(case, "forward + backward", 900, on_gpu=False)["kept"]
    assert on_cpu.bytes - moved == 2 * 4 * 4096 * 900  # in float32


def test_least_work_of_pairs():
    case = Case("supcon", 8192, 100, 128, "float32")
    pairs = 8192**2
    forward = roofline.methods(case, "forward", 100, on_gpu=True)["half"]
    assert forward == Work(pairs * 128, 8192 * 128 * 4 + 8 * 8192, pairs / 2)
    ((_, on_gpu),) = roofline.methods(case, "forward + backward", 100, on_gpu=True).items()
    ((_, on_cpu),) = roofline.methods(case, "forward + backward", 100, on_gpu=False).items()
    assert (on_gpu.flop, on_gpu.exps) == (5 * pairs * 128, 1.5 * pairs)
    assert (on_cpu.flop, on_cpu.exps) == (4 * pairs * 128, pairs)
    assert on_gpu.bytes == on_cpu.bytes == 3 * 8192 * 128 * 4 + 2 * 8 * 8192


@pytest.mark.parametrize(
    ("shape", "present", "forward_us", "method", "both_us"),
    [
        ((4096, 1000, 2048), 1000, 21, "kept", 64),
        ((65536, 1000, 128), 1000, 21, "recomputed", 85),  # writing 131 MB and reading them costs more than F1
        ((32768, 100_000, 512), 27_900, 1200, "kept", 3600),
    ],
)
def test_floors_of_the_targets(shape, present, forward_us, method, both_us):
    """At 790 TFLOP/s, 3 TB/s and 3.7e12 exponentials a second."""
    rates, case = Rates(790e12, 3e12, 3.7e12), Case("nonl", *shape, "bfloat16")
    for passes, name, limit in (("forward", "once", forward_us), ("forward + backward", method, both_us)):
        found, _, floors = roofline.least(roofline.methods(case, passes, present, on_gpu=True), rates)
        assert found == name
        assert 1e3 * max(floors.values()) == pytest.approx(limit, rel=0.03)


def test_floors():
    rates = Rates(matmul=2e9, copy=1e9, exp=1e6)
    assert rates.floors(Work(4e6, 3e6, 5e3)) == pytest.approx({"matmul": 2.0, "bytes": 3.0, "exp": 5.0})


@pytest.mark.parametrize("op", ["nonl", "supcon"])
def test_roofline_is_measured(tmp_path, op):
    case = Case(op, 96, 10, 16)
    points = roofline.measure(case, "cpu", seconds=0, square=64, copy_bytes=1 << 16)
    assert [p.passes for p in points] == list(roofline.PASSES)
    for p in points:
        assert p.rounds == roofline.ROUNDS
        assert p.share == pytest.approx(max(p.matmul_ms, p.bytes_ms, p.exp_ms) / p.time_ms)
        assert getattr(p, f"{p.limit}_ms") == max(p.matmul_ms, p.bytes_ms, p.exp_ms)
        fastest = max(p.square_tflops, p.products_tflops)
        assert p.matmul_ms == pytest.approx(p.flop / fastest / 1e9)
        assert p.p20_ms <= p.time_ms <= p.p80_ms
        assert not p.wrong
        assert 0 < p.error < 1e-5
    assert record.read(write(tmp_path / "roofline.csv", points), record.Point) == points


def test_roofline_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "SQUARE", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 1 << 16})
    words = ["--op", "ntce", "--shape", 64, 10, 16, "--seconds", 0, "--output", tmp_path]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    right = roofline.forms.ours("ntce")
    assert roofline.run(parsed(roofline, *words)) == 0
    printed = capsys.readouterr().out
    assert "| ntce | forward + backward | 64 | 10 | 16 |" in printed
    assert len(record.read(tmp_path / "roofline.csv", record.Point)) == 2
    # A wrong result counts for nothing, however close to the roof.
    monkeypatch.setattr(roofline.forms, "ours", lambda op, temperature: lambda *inputs: 2 * right(*inputs))
    assert roofline.run(parsed(roofline, *words)) == 1
    assert capsys.readouterr().err.startswith("bench: ntce is wrong: loss is off by ")


def test_roofline_picture(pixels):
    figure = plot.figures_of([], POINTS)["roofline-float32"]
    left, right = figure.axes
    assert sorted(lines_of(left)) == ["nonl", "supcon"]
    marks = [line for line in left.get_lines() if line.get_label() in ("nonl", "supcon")]
    assert len(marks) == 4
    assert marks[0].get_xydata()[0] == pytest.approx([200, 0.24])  # 1.2e10 FLOP of 6e7 bytes in 50 ms
    assert [bar.get_width() for bar in right.patches] == pytest.approx(4 * [0.8, 0.06, 0.02])
    assert [text.get_text() for text in right.texts] == 4 * ["matmul 80%", "bytes", "exp"]


# Profile


@pytest.mark.parametrize("passes", ["forward", "backward", "both"])
def test_profile_of_a_case(tmp_path, capsys, monkeypatch, passes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["nonl", "--shape", 64, 10, 16, "--passes", passes, "--output", tmp_path]
    assert profile.run(parsed(profile, *words)) == 0
    text = (tmp_path / "profile.txt").read_text()
    assert text.startswith(f"nonl 64 x 10 x 16 float32, {passes};")
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    operator = "hypercontrast::prototype_loss" if compiled.is_built() else "hypercontrast::lse"
    assert (operator in names) == (passes != "backward")
    assert (f"{operator}_backward" in names) == (passes != "forward")
    assert profile.run(parsed(profile, *words, "--kernel", "::(mm|addmm_)$")) == 0
    rows = (tmp_path / "profile.txt").read_text().splitlines()[4:]
    assert rows
    assert all(line.startswith(("| aten::mm |", "| aten::addmm_ |")) for line in rows)
    capsys.readouterr()
    assert main(["profile", *map(str, words), "--kernel", "no such"]) == 2
    assert capsys.readouterr().err.startswith("error: --kernel must match a name, got no such; the longest are ")


def test_profile_table():
    text = profile.table([("a", 2, 1.0), ("b", 1, 3.0)], None)
    assert text.splitlines()[2:] == ["| b | 1 | 3 | 75.0% |", "| a | 2 | 1 | 25.0% |"]
    assert profile.table([("a", 2, 1.0), ("b", 1, 3.0)], "^a").splitlines()[2:] == ["| a | 2 | 1 | 25.0% |"]


NCU = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
--import) echo "the page of $2"; exit 0;;
esac
{verdict}
while [ "$1" != --export ]; do shift; done
echo report > "$2"
"""


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for ncu")
def test_counters_come_from_ncu(tmp_path, monkeypatch):
    """How ncu is called, and what becomes of its refusal; a script stands for it."""
    tool, log = tmp_path / "ncu", tmp_path / "log"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    case = Case("supcon", 64, 10, 16, "bfloat16")
    tool.write_text(NCU.format(log=log, verdict=""))
    tool.chmod(0o755)
    assert profile.counters(case, "backward", "pair_.*", tmp_path) == f"the page of {tmp_path / 'profile.ncu-rep'}\n"
    called = log.read_text().splitlines()[0]
    assert "--kernel-name regex:pair_.*" in called
    assert "--profile-from-start off" in called
    assert "-m bench profile supcon --once --passes backward --dtype bfloat16 --shape 64 10 16" in called
    tool.write_text(NCU.format(log=log, verdict="echo '==PROF== hello'; echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1"))
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        profile.counters(case, "both", None, tmp_path)
    tool.write_text(NCU.format(log=log, verdict="echo 'No kernels were profiled'; exit 0"))
    with pytest.raises(RuntimeError, match="No kernels were profiled"):
        profile.counters(case, "both", "nothing", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonl", "--kernel", "("], "must be a regular expression, got ("),
        (["nonl", "--shape", "0", "1", "1"], "must be a whole number of at least 1, got 0"),
        (["other"], "invalid choice: 'other'"),
    ],
)
def test_bad_usage(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        parsed(profile, *words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_default_shapes_suit_the_device():
    args = parsed(profile, "supcon")
    assert roofline.case_of(args, "supcon", "cpu") == Case("supcon", 8192, 100, 128, "float32")
    assert roofline.case_of(args, "nonl", "cuda") == Case("nonl", 65536, 1000, 128, "bfloat16")
    assert math.prod(roofline.case_of(parsed(profile, "nonl", "--shape", 2, 3, 5), "nonl", "cpu")[1:4]) == 30
