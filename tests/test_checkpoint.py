"""Checkpoints: nothing is lost in a crash, damage is noticed, nothing is executed."""

import dataclasses
import errno
import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress

import pytest
import torch

from hypercontrast import checkpoint
from hypercontrast.checkpoint import Checkpoint, CheckpointError, last_good, load_checkpoint, save_checkpoint

pytest.importorskip("safetensors")


def made(epoch):
    """A checkpoint whose every value tells the epoch, so that a mixture of two would show."""
    tensors = {"weight": torch.full((40, 5), float(epoch)), "steps": torch.tensor(epoch)}
    state = {
        "optimizer": {"momentum": torch.full((40, 5), float(epoch))},
        "history": [{"epoch": e} for e in range(epoch)],
    }
    return Checkpoint(epoch, tensors, state)


def assert_intact(found):
    expected = made(found.epoch)
    assert all(found.tensors[name].equal(tensor) for name, tensor in expected.tensors.items())
    assert found.state["history"] == expected.state["history"]
    assert found.state["optimizer"]["momentum"].equal(expected.state["optimizer"]["momentum"])


def test_round_trip_keeps_two(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for epoch in (1, 2, 3, 10):
        folder = save_checkpoint(tmp_path, made(epoch))
        assert load_checkpoint(tmp_path).epoch == epoch
        assert_intact(load_checkpoint(tmp_path))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch-0003", "epoch-0010"]
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_channels_last_and_aliased_tensors_are_saved(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path, Checkpoint(1, {"weight": weight}, {}))
    assert load_checkpoint(tmp_path).tensors["weight"].equal(weight)


class Crash(BaseException):
    pass


def crash_points(monkeypatch, crash_at, failure=Crash):
    """Make the crash_at-th change to the disk fail half-way; returns how many were made."""
    made_changes = [0]

    def counted(change, halfway=None):
        def changed(*args, **kwargs):
            made_changes[0] += 1
            if made_changes[0] == crash_at:
                if halfway:
                    halfway(*args)
                raise failure
            return change(*args, **kwargs)

        return changed

    def half_written(path, content):
        path.write_bytes(content[: len(content) // 2])

    def half_removed(folder):
        next(iter(folder.iterdir())).unlink()

    monkeypatch.setattr(checkpoint, "_write_synced", counted(checkpoint._write_synced, half_written))
    monkeypatch.setattr(checkpoint, "_sync_folder", counted(checkpoint._sync_folder))
    monkeypatch.setattr(checkpoint.os, "rename", counted(os.rename))
    monkeypatch.setattr(checkpoint.os, "replace", counted(os.replace))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", counted(checkpoint.shutil.rmtree, half_removed))
    return made_changes


def test_a_crash_at_any_step_of_a_save_loses_nothing(tmp_path):
    crash_at, outcomes = 0, set()
    while True:
        crash_at += 1
        run = tmp_path / str(crash_at)
        for epoch in (1, 2):
            save_checkpoint(run, made(epoch))
        with pytest.MonkeyPatch.context() as patch:
            changes = crash_points(patch, crash_at)
            try:
                save_checkpoint(run, made(3))
            except Crash:
                pass
            else:
                break
        assert changes[0] == crash_at
        found = load_checkpoint(run)  # a warning would be an error: nothing half-made may be visible
        assert_intact(found)
        outcomes.add(found.epoch)
        save_checkpoint(run, made(3))
        assert_intact(load_checkpoint(run))
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["epoch-0002", "epoch-0003"]
    assert crash_at == 8  # 3 files, their folder, the rename, its folder, the removal, and the save that went through
    assert outcomes == {2, 3}


def test_a_disk_that_is_full_at_any_step_of_a_save_is_an_error_that_loses_nothing(tmp_path):
    """Every way of writing fails in turn, half-way; what a failed save leaves, and no more, is what was there before."""
    full_at = 0
    while True:
        full_at += 1
        run = tmp_path / str(full_at)
        for epoch in (1, 2):
            save_checkpoint(run, made(epoch))
        with pytest.MonkeyPatch.context() as patch:
            changes = crash_points(patch, full_at, OSError(errno.ENOSPC, "No space left on device"))
            with suppress(CheckpointError):
                save_checkpoint(run, made(3))
        if changes[0] < full_at:
            break
        names = {path.name for path in (run / "checkpoints").iterdir()}
        if full_at <= 5:  # before the rename is done
            assert names == {"epoch-0001", "epoch-0002"}
        assert_intact(load_checkpoint(run))
        assert last_good(run) == f"the last good checkpoint is {max((run / 'checkpoints').iterdir())}"
        save_checkpoint(run, made(3))
        assert load_checkpoint(run).epoch == 3
    assert full_at == 8


@pytest.mark.skipif(sys.platform != "linux", reason="finds out in /proc what was forced to disk")
def test_a_save_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Each file whole, and the folder that lists them; then the name. Otherwise a power cut could leave a checkpoint
    under its final name with nothing in it.
    """
    done = []

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append((os.path.basename(path), os.path.isdir(path) or os.path.getsize(path)))

    def renaming(rename):
        return lambda old, new: (done.append("renamed"), rename(old, new))

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming(getattr(os, name)))
    folder = save_checkpoint(tmp_path, made(1))
    sizes = [(name, (folder / name).stat().st_size) for name in ("checkpoint.safetensors", "state.pt", "SHA256SUMS")]
    assert done == [*sizes, (f".unfinished-{os.getpid()}", True), "renamed", ("checkpoints", True)]
    done.clear()
    checkpoint.write_atomic(tmp_path / "config.yaml", b"new")
    assert done == [(".config.yaml.unfinished", 3), "renamed", (tmp_path.name, True)]


def test_folders_with_other_names_are_no_checkpoints(tmp_path):
    save_checkpoint(tmp_path, made(1))
    for name in ("epoch-0002-backup", "old-epoch-0002", "epoch-0002-step-"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert load_checkpoint(tmp_path).epoch == 1
    save_checkpoint(tmp_path, made(2), kept=1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "epoch-0002", "epoch-0002-backup", "old-epoch-0002", "epoch-0002-step-",
    }  # fmt: skip


def test_the_best_and_the_newest_few_are_kept(tmp_path):
    def save(epoch, step=0, kept=2, best=0):
        save_checkpoint(tmp_path, dataclasses.replace(made(epoch), step=step), kept=kept, best=best)
        return sorted(path.name.removeprefix("epoch-") for path in (tmp_path / "checkpoints").iterdir())

    assert save(1) == ["0001"]
    assert save(1, 50, best=1) == ["0001", "0001-step-000050"]
    assert save(1, 100, best=1) == ["0001", "0001-step-000050", "0001-step-000100"]
    assert save(1, 150, best=1) == ["0001", "0001-step-000100", "0001-step-000150"]
    assert (load_checkpoint(tmp_path).epoch, load_checkpoint(tmp_path).step) == (1, 150)
    assert load_checkpoint(tmp_path, whole_epochs=True).step == 0
    assert save(2, best=1) == ["0001", "0002"]
    assert save(3, best=1) == ["0001", "0002", "0003"]
    assert save(4, best=1) == ["0001", "0003", "0004"]
    assert save(5, best=4) == ["0004", "0005"]
    assert save(6, kept=1, best=4) == ["0004", "0006"]
    assert load_checkpoint(tmp_path).epoch == 6


def test_an_atomic_file_is_old_or_new(tmp_path):
    path = tmp_path / "config.yaml"
    for crash_at in range(1, 4):
        path.write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            crash_points(patch, crash_at)
            with pytest.raises(Crash):
                checkpoint.write_atomic(path, b"new and longer")
        assert path.read_bytes() == (b"old" if crash_at < 3 else b"new and longer")
    checkpoint.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def flipped(draw, content):
    damaged = bytearray(content)
    damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def truncated(draw, content):
    return content[: draw.randrange(len(content))]


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path, figure):
    save_checkpoint(tmp_path, made(1))
    folder = save_checkpoint(tmp_path, made(2))
    draw = random.Random(0)
    noticed = {"flipped": 0, "truncated": 0}
    for name in ("checkpoint.safetensors", "state.pt", "SHA256SUMS"):
        content = (folder / name).read_bytes()
        for damage in [flipped, truncated] * 100:
            (folder / name).write_bytes(damage(draw, content))
            with pytest.warns(RuntimeWarning, match="epoch-0002 is damaged"):
                found = load_checkpoint(tmp_path)
            assert found.epoch == 1
            assert_intact(found)
            noticed[damage.__name__] += 1
        (folder / name).write_bytes(content)
        assert load_checkpoint(tmp_path).epoch == 2
    figure(
        "R11",
        f"{noticed['flipped']} flipped bits and {noticed['truncated']} truncations of checkpoints noticed on load, of 300 each",
    )


def test_truncated_or_missing_files_are_noticed(tmp_path):
    save_checkpoint(tmp_path, made(1))
    folder = save_checkpoint(tmp_path, made(2))
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert load_checkpoint(tmp_path).epoch == 1
    (folder / "state.pt").unlink()
    with pytest.warns(RuntimeWarning, match="incomplete"):
        assert load_checkpoint(tmp_path).epoch == 1
    assert last_good(tmp_path) == f"the last good checkpoint is {tmp_path}/checkpoints/epoch-0001"
    for path in (tmp_path / "checkpoints" / "epoch-0001").iterdir():
        path.write_bytes(b"")
    assert last_good(tmp_path) == "no checkpoint has been saved yet"
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(CheckpointError, match="must hold an intact checkpoint, got 2 damaged"),
    ):
        load_checkpoint(tmp_path)


def test_a_damaged_checkpoint_can_be_written_again(tmp_path):
    save_checkpoint(tmp_path, made(1))
    (save_checkpoint(tmp_path, made(2)) / "state.pt").write_bytes(b"")
    save_checkpoint(tmp_path, made(2))
    assert_intact(load_checkpoint(tmp_path))
    assert load_checkpoint(tmp_path).epoch == 2


@pytest.mark.parametrize("step", [0, 10])
def test_what_is_saved_after_damaged_ones_stays_and_they_go(tmp_path, step):
    """Saved short of them, after an epoch or inside one: they neither count as the newest nor come back."""
    for epoch in (1, 2, 3, 4):
        save_checkpoint(tmp_path, made(epoch), best=1)
    for epoch in (3, 4):
        (tmp_path / "checkpoints" / f"epoch-{epoch:04d}" / "state.pt").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert load_checkpoint(tmp_path).epoch == 1
    epoch = 1 if step else 2
    saved = save_checkpoint(tmp_path, dataclasses.replace(made(epoch), step=step), best=1)
    assert {path.name for path in saved.parent.iterdir()} == {"epoch-0001", saved.name}
    found = load_checkpoint(tmp_path)
    assert (found.epoch, found.step) == (epoch, step)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    folder = save_checkpoint(tmp_path, made(1))
    (folder / "state.pt").write_bytes(pickle.dumps(Payload(tmp_path / "executed"), protocol=2))
    sums = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("checkpoint.safetensors", "state.pt")
    ]
    (folder / "SHA256SUMS").write_text("".join(sums))
    with pytest.warns(RuntimeWarning, match="cannot be read"), pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from hypercontrast.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
run = Path(sys.argv[1])
last = load_checkpoint(run)
epoch = last.epoch if last else 0
while True:
    epoch += 1
    tensors = {"weight": torch.full((40, 5), float(epoch)), "steps": torch.tensor(epoch)}
    state = {"optimizer": {"momentum": torch.full((40, 5), float(epoch))}, "history": [{"epoch": e} for e in range(epoch)]}
    save_checkpoint(run, Checkpoint(epoch, tensors, state))
    print(epoch, flush=True)
"""


def kill_while_saving(run, kills):
    draw = random.Random(1)
    last = 0
    for _ in range(kills):
        writer = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(run)], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        writer.stdout.readline()
        time.sleep(draw.random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        saved = [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = load_checkpoint(run)
        assert_intact(found)
        assert found.epoch >= max([last, *saved])
        last = found.epoch


def test_killed_while_saving(tmp_path):
    kill_while_saving(tmp_path, 3)


@pytest.mark.slow
def test_killed_two_hundred_times_while_saving(tmp_path):
    kill_while_saving(tmp_path, 200)
