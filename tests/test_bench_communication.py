"""What a loss sends: computed equals measured over real ranks, and the model of many GPUs keeps its own rules."""

import argparse
import csv
import math
import re

import pytest
import torch
import torch.distributed as dist
from cases import quick

from bench import communication
from bench.communication import WAYS, Case, Measured, Recorder, draw, measure, model
from bench.network import Collective

GLOO_HEADER = 512  # bytes, more than Gloo adds to a message


def messages(one, ranks):
    """Of Gloo, which does a reduce-scatter as an all-reduce."""
    return (1 if one.kind == "all-gather" else 2) * (ranks - 1)


@pytest.mark.parametrize("way", quick(WAYS, ("nonl", "supcon")))
def test_computed_bytes_are_those_that_ranks_send(way):
    case = Case(ranks=2, rows=130, classes=900, width=36)
    row = measure(way, case)
    assert row.payload == row.payload_computed > 0
    collectives = WAYS[way][0](case)
    assert row.collectives == len(collectives)
    assert row.loss_ms > 0
    if row.socket_bytes is not None:  # Linux: what the sockets say, headers and all
        least = sum((2 if one.kind == "reduce-scatter" else 1) * one.sent(2) for one in collectives)
        assert least <= row.socket_bytes <= least + GLOO_HEADER * sum(messages(one, 2) for one in collectives)


def test_prototype_losses_send_the_same_whatever_the_batch():
    def sent(rows, width, ranks):
        return [one.payload for one in WAYS["nonl"][0](Case(ranks, rows, 1000, width))]

    assert sent(1, 4, 2) == sent(4096, 2048, 1024)
    assert sum(sent(1, 4, 2)) == 512 + (4 + 8) * 1000 + 8


def test_the_ring_sends_the_least_there_is():
    # Every rank has to hear all other parts; a sum has to leave a rank once and come back.
    assert Collective("all-gather", 10).sent(4) == 30
    assert Collective("reduce-scatter", 40).sent(4) == 30
    assert Collective("all-reduce", 40).sent(4) == 60


def test_modelled_times_grow_with_gpus_and_bytes():
    for kind in ("all-reduce", "all-gather", "reduce-scatter"):
        assert Collective(kind, 1000).microseconds(1) == 0
        by_gpus = [Collective(kind, 1000).microseconds(n) for n in communication.GPUS]
        by_bytes = [Collective(kind, 10**n).microseconds(64) for n in range(3, 9)]
        assert by_gpus == sorted(by_gpus)
        assert by_bytes == sorted(by_bytes)
    # A gigabyte inside a node is bound by NVLink alone: 2·7/8 of it at 450 GB/s.
    assert Collective("all-reduce", 10**9).microseconds(8) == pytest.approx(1e6 * 1.75 / 450, rel=0.02)
    # Between nodes each sends by eight adapters: 400 GB/s; a small sum takes the tree, whose steps grow as log2.
    assert Collective("all-gather", 10**8).microseconds(64) == pytest.approx(1e6 * 6.3 / 400, rel=0.02)
    small = [Collective("all-reduce", 8).microseconds(n) for n in (64, 128, 256)]
    assert small[1] - small[0] == pytest.approx(small[2] - small[1]) == pytest.approx(10, rel=0.01)


def test_the_model_has_every_way_at_every_size(tmp_path):
    rows = model()
    assert {row.way for row in rows} == set(WAYS)
    assert {row.gpus for row in rows if row.way == "nonl"} == set(communication.GPUS)
    assert all(row.sent_mb == row.microseconds == 0 for row in rows if row.gpus == 1)
    assert all(math.isfinite(row.microseconds) and row.logits > 0 for row in rows)
    pytest.importorskip("matplotlib")
    draw(rows, tmp_path / "model.png")
    assert (tmp_path / "model.png").stat().st_size > 10_000


def test_an_unknown_collective_is_an_error(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with Recorder() as recorder:
            dist.all_reduce(torch.ones(3))
        assert recorder.found == [Collective("all-reduce", 12)]
        with pytest.raises(NotImplementedError, match="got broadcast_"), Recorder():
            dist.broadcast(torch.ones(3), src=0)
    finally:
        dist.destroy_process_group()


def command(*arguments):
    parser = argparse.ArgumentParser()
    communication.add_arguments(parser)
    return communication.run(parser.parse_args(arguments))


def test_the_command_measures_and_models(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(communication, "MEASURED", {"nonl": [(8, 5, 4)]})
    assert command("--ranks", "2", "--output", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\| nonl \| 2 \| 8 \| 5 \| 4 \| 3 \| 580 \| 580 \|", shown)
    assert {path.name for path in tmp_path.iterdir()} == {"measured.csv", "model.csv", "communication.png"}
    with (tmp_path / "measured.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["payload"] == row["payload_computed"] == "580"


def test_what_was_measured_is_there_when_the_next_fails(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = iter([Measured("nonl", 2, 8, 5, 4, "float32", 3, 96, 96, ring_bytes=88, socket_bytes=None, loss_ms=1.0)])
    monkeypatch.setattr(communication, "measure", lambda way, case: next(rows))
    with pytest.raises(StopIteration):
        command("--ranks", "2", "--output", str(tmp_path))
    with (tmp_path / "measured.csv").open() as file:
        assert [row["payload"] for row in csv.DictReader(file)] == ["96"]


def test_a_mismatch_fails_the_command(monkeypatch, capsys):
    row = Measured(
        "nonl", 2, 8, 5, 4, "float32", 3, payload=96, payload_computed=88, ring_bytes=88, socket_bytes=None, loss_ms=1.0
    )
    monkeypatch.setattr(communication, "measure", lambda way, case: row)
    assert command("--ranks", "2") == 1
    assert "must be equal" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", ["1", "two", "2.5"])
def test_bad_ranks_are_one_line(ranks, capsys):
    with pytest.raises(SystemExit) as stop:
        command("--ranks", ranks)
    assert stop.value.code == 2
    assert f"must be a whole number of at least 2, got {ranks}" in capsys.readouterr().err
