"""The tuner: occupancy by hand, candidates that could fit, evidence without a GPU, and the timed path in the interpreter."""

import argparse
import csv
import math

import pytest
import torch

pytest.importorskip("triton")

from bench import candidates, tune
from bench.__main__ import main
from bench.candidates import KERNELS, Cell, cells
from bench.occupancy import MULTIPROCESSORS
from hypercontrast.kernels import _launch
from hypercontrast.kernels._launch import ARCHITECTURES, Config

HALF = torch.zeros(8, 16, dtype=torch.float16)
WIDTH_16 = Cell("lse_bwd", 90, "float16", 16)


def run(*arguments):
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return tune.run(parser.parse_args(list(map(str, arguments))))


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("architecture", "asked", "programs"),
    [
        # Registers: 168 a thread are 5,376 a warp; a partition of 16,384 holds 3 such warps, the multiprocessor 12.
        (90, {"warps": 8, "registers": 168, "shared": 0}, 1),
        (90, {"warps": 4, "registers": 168, "shared": 0}, 3),
        # 128 a thread are 4,096 a warp, 16 warps; one register more is rounded up to 136, and 12 warps.
        (90, {"warps": 8, "registers": 128, "shared": 0}, 2),
        (90, {"warps": 8, "registers": 129, "shared": 0}, 1),
        (90, {"warps": 8, "registers": 255, "shared": 0}, 1),
        (90, {"warps": 16, "registers": 255, "shared": 0}, 0),
        # Shared memory: 228 KiB hold two of 113 KiB with the system's KiB each, but not two of 113 KiB and a byte.
        (90, {"warps": 4, "registers": 32, "shared": 113 * 1024}, 2),
        (90, {"warps": 4, "registers": 32, "shared": 113 * 1024 + 1}, 1),
        (90, {"warps": 4, "registers": 32, "shared": 227 * 1024}, 1),
        (90, {"warps": 4, "registers": 32, "shared": 227 * 1024 + 1}, 0),
        (80, {"warps": 4, "registers": 32, "shared": 81 * 1024}, 2),
        (80, {"warps": 4, "registers": 32, "shared": 163 * 1024 + 1}, 0),
        # Warps and programs: 64 and 32 at most.
        (90, {"warps": 4, "registers": 32, "shared": 0}, 16),
        (90, {"warps": 1, "registers": 16, "shared": 0}, 32),
        # Tensor memory: 512 columns.
        (100, {"warps": 4, "registers": 32, "shared": 0, "tensor_columns": 256}, 2),
    ],
)
def test_occupancy_by_hand(architecture, asked, programs):
    assert MULTIPROCESSORS[architecture].resident(**asked) == programs


def test_candidates_could_fit():
    for dtype in candidates.DTYPES:
        for architecture in ARCHITECTURES:
            for cell in cells(dtype=dtype, architecture=architecture):
                found = cell.candidates()
                assert len(found) == len(set(found)) > 5
                assert cell.pinned() is None or found[0] == cell.pinned()
                for config in found[1:]:
                    assert cell.kernel != "pair_triangle" or config.block_r % config.block_c == 0
                    assert not cell.narrow or config.block_d == cell.bucket
    # 128 rows and two buffers of 128 columns, 256 wide, are 192 KiB in half types: too many for Ampere.
    large = Config(128, 128, 256, 8, 3)
    assert large in Cell("lse_fwd", 90, "bfloat16", 256).candidates()
    assert large not in Cell("lse_fwd", 80, "bfloat16", 256).candidates()


def test_every_pinned_configuration_has_a_cell():
    of_cells = {
        (cell.table, a, cell.key)
        for d in candidates.DTYPES
        for a in ARCHITECTURES
        for cell in cells(dtype=d, architecture=a)
    }
    # Those of pair_fixed.py were chosen by times of whole passes, see the GPU record: the tuner does not know them yet.
    names = [
        name
        for name in vars(_launch)
        if name.endswith(("NARROW", "WIDE", "CROWDED")) and name[0] != "_" and "FIXED" not in name
    ]
    assert len(names) == 16
    assert of_cells >= {(name, a, key) for name in names for a in ARCHITECTURES for key in getattr(_launch, name)[a]}


@pytest.mark.parametrize("name", ["BACKWARD_NARROW", "BACKWARD_WIDE", "PAIR_BACKWARD_NARROW", "PAIR_BACKWARD_WIDE"])
def test_crowded_tables_have_the_same_cells(name):
    """A launcher chooses between narrow and wide before it knows how crowded its tiles are."""
    for architecture in ARCHITECTURES:
        assert getattr(_launch, name)[architecture].keys() == getattr(_launch, f"{name}_CROWDED")[architecture].keys()
        assert _launch.BACKWARD_NARROW_BOTH[architecture].keys() == _launch.BACKWARD_NARROW[architecture].keys()


def test_cells_come_in_order_of_importance():
    found = cells(widths=[100, 700])
    assert {cell.bucket for cell in found} == {128, "large", "small"}
    assert [cell.kernel for cell in found[:2]] == list(KERNELS[:2])
    assert {cell.narrow for cell in cells(dtype="float32")} == {False}
    assert not cells(["lse_bwd_tile"], widths=[64])


def test_a_replaced_cell_is_what_launches_find():
    other = Config(64, 32, 16, 4, 2)
    for tables in ("BACKWARD_NARROW", "BACKWARD_NARROW_CROWDED", "BACKWARD_NARROW_BOTH"):
        with WIDTH_16.replaced(other):
            assert _launch.narrow_config(getattr(_launch, tables), HALF) == other
        assert _launch.narrow_config(getattr(_launch, tables), HALF) == WIDTH_16.pinned()
    with WIDTH_16.replaced(None):
        assert not _launch.is_narrow(_launch.BACKWARD_NARROW, HALF)
        assert _launch.is_narrow(_launch.FORWARD_NARROW, HALF)
    with Cell("lse_fwd", 90, "float16", "large").replaced(other):
        assert _launch.wide_config(_launch.FORWARD_WIDE, HALF, 8) == other
        assert _launch.wide_config(_launch.FORWARD_WIDE, HALF.float(), 8) != other


def test_evidence_without_a_gpu(tmp_path, monkeypatch, capsys):
    """A candidate that compiles, and one that does not: 48 is no power of two."""
    pinned, broken = Config(128, 64, 16, 8, 3), Config(128, 48, 16, 8, 3)
    monkeypatch.setattr(Cell, "candidates", lambda cell: [broken, pinned])
    assert run("--compile-only", "--kernel", "lse_fwd", "--width", 16, "--output", tmp_path) == 0
    good, bad = read(tmp_path / "tune.csv")
    assert (good["kernel"], good["architecture"], good["block_c"], good["pinned"]) == ("lse_fwd", "90", "64", "True")
    assert 16 < int(good["registers"]) <= 255
    assert int(good["wgmma"]) > 0
    assert good["spills"] == "0"
    assert good["fault"] == ""
    expected = MULTIPROCESSORS[90].resident(warps=8, registers=int(good["registers"]), shared=int(good["shared"]))
    assert (int(good["programs"]), int(good["warps"])) == (expected, 8 * expected)
    assert float(good["flop_per_byte"]) == 128  # 2·128·64·16 FLOP, 64·16 numbers of 2 bytes
    assert float(good["score"]) == 128 * min(8 * expected, 16) / 16
    assert good["ms"] == ""  # nothing was timed
    assert bad["fault"].startswith("does not compile")
    assert "nothing was timed" in capsys.readouterr().out


def three_and_two(_device):
    """A clock by which the first that it times takes 3 ms, and the second 2."""
    seen = []

    def clock(run):
        run()
        if run not in seen:
            seen.append(run)
        return 3.0 - seen.index(run)

    return clock


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on the CPU what a GPU does")
def test_the_timed_path_is_rehearsed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Cell, "candidates", lambda cell: [Config(128, 64, 16, 8, 3), Config(64, 32, 16, 4, 2)])
    monkeypatch.setattr(tune, "CROSSOVER_WIDTHS", (16,))
    monkeypatch.setattr(tune, "CROSSOVER_KERNELS", ("lse_bwd",))
    monkeypatch.setattr(tune, "clock", three_and_two)
    assert run("--rehearse", "--kernel", "lse_bwd", "crossover", "--width", 16, "--output", tmp_path) == 0
    lines = read(tmp_path / "tune.csv")
    assert len(lines) == 4  # two candidates of the usual cell, two of the crowded one
    for line in lines:
        assert line["fault"] == ""
        assert [float(line[name]) for name in ("today_ms", "ms", "speedup")] == [3.0, 2.0, 1.5]
        assert 0 < float(line["error"]) < 2e-3
        assert line["device"] == "rehearsal"
    (crossed,) = read(tmp_path / "crossover.csv")
    assert [float(crossed[name]) for name in ("narrow_ms", "wide_ms")] == [3.0, 2.0]
    assert float(crossed["wide_over_narrow"]) == pytest.approx(2 / 3)
    assert "| lse_bwd | 16 |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on the CPU what a GPU does")
@pytest.mark.parametrize(
    ("outcome", "fault"),
    [(math.nan, "wrong: its error is past"), (RuntimeError("no room"), "failed: RuntimeError: no room")],
)
def test_a_failing_candidate_is_a_row_with_its_reason(outcome, fault, tmp_path, monkeypatch):
    other = Config(64, 32, 16, 4, 2)

    def error(config):
        if config == other and isinstance(outcome, Exception):
            raise outcome
        return outcome if config == other else 1e-4

    monkeypatch.setattr(tune.Pass, "errors", lambda work: error)
    trials = [tune.Trial(WIDTH_16, config, candidates.Evidence()) for config in (WIDTH_16.pinned(), other)]
    found = tune.timed(trials, "cpu", tune.Table(tmp_path / "tune.csv", "cpu"), True, math.inf)
    assert found[0].speedup > 0
    assert found[1].speedup is None
    assert found[1].evidence.fault.startswith(fault)
    assert read(tmp_path / "tune.csv")[1]["fault"].startswith(fault)
    assert tune.best(found)[0] == WIDTH_16.pinned()


def test_only_a_faster_configuration_is_proposed():
    other = Config(64, 32, 16, 4, 2)
    pinned, faster = (
        tune.Trial(WIDTH_16, c, candidates.Evidence(), speedup=s) for c, s in ((WIDTH_16.pinned(), 1.0), (other, 1.25))
    )
    assert (
        tune.pin(WIDTH_16, [pinned, faster])
        == "BACKWARD_NARROW[90]:\n    16: Config(64, 32, 16, 4, 2),  # 1.25 times as fast\n"
    )
    noise = tune.Trial(WIDTH_16, other, candidates.Evidence(), speedup=1.01)
    assert tune.pin(WIDTH_16, [pinned, noise]) == ""
    # Over two shapes the geometric mean counts: 1.25 and 0.7 are a loss.
    slower = tune.Trial(WIDTH_16, other, candidates.Evidence(), speedup=0.7)
    assert tune.pin(WIDTH_16, [pinned, faster, slower]) == ""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rehearse", "--arch", 80], "--arch must be 90 to time on this device, got 80"),
        (["--compile-only", "--kernel", "lse_bwd", "--width", 1000], "no table has a cell for --kernel lse_bwd"),
        (["--compile-only", "--kernel", "crossover"], "no table has a cell for --kernel crossover"),  # it is timed
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on the CPU what a GPU does")
def test_bad_usage_is_one_line(arguments, reason, capsys):
    assert main(["tune", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {reason}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--seconds", "nan"], "must be a number of at least 0, got nan"),
        (["--width", "0"], "must be a whole number of at least 1, got 0"),
        (["--compile-only", "--output", __file__], "--output must be where files can be written: "),
    ],
)
def test_arguments_that_cannot_be_are_one_line(arguments, reason, capsys):
    assert main(["tune", *arguments]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_no_time_left_is_said(tmp_path, capsys):
    assert run("--compile-only", "--seconds", 0, "--output", tmp_path) == 0
    assert "out of time before lse_fwd: FORWARD_NARROW" in capsys.readouterr().out
