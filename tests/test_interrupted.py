"""Runs that are killed, stopped or out of room: nothing is lost, and they end as if nothing had happened."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from pictures import make_folder
from runs import as_from_a_prompt, assert_same_run, records

from hypercontrast.checkpoint import load_checkpoint
from hypercontrast.config import UsageError
from hypercontrast.lock import locked

for extra in ("PIL", "safetensors", "tyro", "yaml"):
    pytest.importorskip(extra)

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LIMIT = 120  # seconds that no process here may take
UNFINISHED = "checkpoints/.unfinished-*"
STEPS = 10  # an epoch


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """80 to train on, in batches of 8."""
    return make_folder(tmp_path_factory.mktemp("pictures"), sizes=((16, 16),), counts=(("train", 40), ("val", 8)))


def command(pictures, folder, epochs, *flags):
    flags = [*flags, "--epochs", str(epochs), "--run-dir", str(folder), "--resume", "auto"]
    flags += [] if "--cpu-ranks" in flags else ["--cpu-ranks", "1"]
    return [
        sys.executable, "-m", "hypercontrast.train", "--dataset", f"folder:{pictures}", "--batch-size", "8", "--loss", "scl",
        "--lr", "0.05", "--queue", "16", *flags,
    ]  # fmt: skip


def finish(command):
    subprocess.run(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT, check=True, timeout=LIMIT)


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoints/epoch-*"))


def saved(folder):
    """Epoch and step of the newest checkpoint by its name."""
    return max(((int(n[6:10]), int(n[16:] or 0)) for n in names(folder)), default=(0, 0))


def wait_until(happened, process):
    deadline = time.monotonic() + LIMIT
    while process.poll() is None and not happened() and time.monotonic() < deadline:
        time.sleep(0.002)


def stamp(path):
    return path.stat().st_mtime_ns if path.exists() else 0


class Kills:
    """Runs killed at random moments after they have started or gone on, resumed and killed again."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.count = self.inside_saves = self.inside_epochs = self.lost = 0

    def until_finished(self, command, folder, most):
        """Go on with a run until it is finished, killing it at most so many times; it is killed up to a second late.

        One that has its results is let end: killed there, it would count as finished and lack its report.
        """
        results = folder / "embeddings.safetensors"
        while not results.exists():
            before = stamp(folder / "metrics.jsonl")
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT, start_new_session=True)
            wait_until(lambda before=before: stamp(folder / "metrics.jsonl") != before, process)
            if self.count < most:
                time.sleep(self.draw.random())
            if self.count < most and not results.exists():
                promised = saved(folder)
                os.killpg(process.pid, signal.SIGKILL)
                if process.wait(LIMIT) == -signal.SIGKILL:
                    self._look(folder, promised)
            else:
                assert process.wait(LIMIT) == 0

    def _look(self, folder, promised):
        self.count += 1
        self.inside_saves += any(folder.glob(UNFINISHED))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = load_checkpoint(folder)
        place = (found.epoch, found.step) if found else (0, 0)
        self.inside_epochs += place[1] > 0
        self.lost += place < promised


def left(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def kill_whole_runs(tmp_path, pictures, figure, kills, epochs):
    reference = tmp_path / "reference"
    finish(command(pictures, reference, epochs, "--checkpoint-every", "1"))
    killed, runs = Kills(seed=0), 0
    while killed.count < kills:
        runs += 1
        folder = tmp_path / f"run-{runs}"
        killed.until_finished(command(pictures, folder, epochs, "--checkpoint-every", "1"), folder, kills)
        assert_same_run(folder, reference)
        assert left(folder) == left(reference)
    assert killed.lost == 0
    assert killed.inside_epochs > 0
    figure(
        "R9",
        f"{killed.count} kills of whole runs ({killed.inside_saves} inside a save), {killed.lost} checkpoints lost;"
        f" {runs} of {runs} runs end bitwise as one that was not killed, in weights, optimiser, queue and metrics.jsonl",
    )


@pytest.mark.slow  # in quick: two ranks killed inside an epoch
def test_a_run_killed_again_and_again_ends_as_if_never(tmp_path, pictures, figure):
    kill_whole_runs(tmp_path, pictures, figure, kills=2, epochs=5)


@pytest.mark.slow
def test_runs_killed_two_hundred_times_end_as_if_never(tmp_path, pictures, figure):
    kill_whole_runs(tmp_path, pictures, figure, kills=200, epochs=40)


# Stopped inside an epoch


def stop_when(happened, command, number):
    """Run until then, send the signal to the process group or to the process; returns exit code and what it said."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True,
        preexec_fn=as_from_a_prompt,
    )  # fmt: skip
    wait_until(happened, process)
    (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
    _, said = process.communicate(timeout=LIMIT)
    return process.returncode, said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_inside_the_epoch_and_says_how_to_go_on(tmp_path, pictures, number, code):
    folder = tmp_path / "run"
    long = command(pictures, folder, 1000)
    stopped = stop_when(lambda: saved(folder) >= (1, 0), long, number)
    found = load_checkpoint(folder)
    assert (found.epoch, found.step) == saved(folder)
    assert 0 < found.step <= STEPS
    assert stopped[0] == code
    last = rf"the last good checkpoint is {folder}/checkpoints/epoch-{found.epoch:04d}-step-{found.step:06d}"
    resume = rf"\S*python\S* -m hypercontrast\.train --resume {folder}"
    assert re.fullmatch(rf"error: interrupted; {last}; to continue: {resume}\n", stopped[1])
    assert len(records(folder)) == found.epoch
    assert not list(folder.glob(UNFINISHED))


def test_a_signal_before_anything_is_saved_says_so(tmp_path, pictures):
    folder = tmp_path / "run"
    process = subprocess.Popen(command(pictures, folder, 9), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    mapped = f"/proc/{process.pid}/maps"
    wait_until(lambda: "PIL/_imaging" in Path(mapped).read_text(), process)  # past its imports, at the pictures
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=LIMIT)
    assert (process.returncode, said.count("\n")) == (143, 1)
    assert said.startswith("error: interrupted")


def test_two_ranks_killed_inside_an_epoch_end_as_if_never(tmp_path, pictures, figure):
    """Among what must come back: every rank's queue, and batch norm's statistics."""
    flags = ("--cpu-ranks", "2", "--checkpoint-every", "3")
    reference, folder = tmp_path / "reference", tmp_path / "run"
    finish(command(pictures, reference, 1, *flags))
    stop_when(lambda: saved(folder)[1] > 0, command(pictures, folder, 1, *flags), signal.SIGKILL)
    place = saved(folder)
    assert place[1] in (3, 6, 9)
    finish(command(pictures, folder, 1, *flags))
    assert_same_run(folder, reference)
    figure("R10", f"2 Gloo ranks killed at epoch {place[0] + 1}, step {place[1]}: the resumed run is bitwise the same")


# No room, no right to write


def in_a_namespace(script, *arguments):
    """Run a shell script with file systems of its own; skips where the system allows none."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-euc", f"mount -t tmpfs none /mnt || exit 77\n{script}", "sh", *map(str, arguments)],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=LIMIT,
    )  # fmt: skip
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"needs mounts of its own: {done.stderr.strip()}")
    return done


FULL = """
report=$1; shift
mount -t tmpfs -o size=2400k none /mnt
"$@" 2>"$report/full" && exit 1 || echo $? >"$report/code"
find /mnt -type f >"$report/left"
mount -o remount,size=100m /mnt
"$@"
cp -r /mnt/run "$report/run"
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(tmp_path, pictures, figure):
    """On a file system with room for two checkpoints, but not for the third beside them."""
    reference = tmp_path / "reference"
    finish(command(pictures, reference, 4))
    done = in_a_namespace(FULL, tmp_path, *command(pictures, "/mnt/run", 4))
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "full").read_text()
    assert said.count("\n") == 1
    line = re.fullmatch(
        r"error: /mnt/run/checkpoints/epoch-(\d+) cannot be written: No space left on device;"
        r" the last good checkpoint is /mnt/run/checkpoints/epoch-(\d+)\n",
        said,
    )
    assert line, said
    assert int(line[2]) == int(line[1]) - 1
    assert (tmp_path / "code").read_text() == "1\n"
    assert "unfinished" not in (tmp_path / "left").read_text()
    assert_same_run(tmp_path / "run", reference)
    figure("R9", "disk full: one line, last good checkpoint intact, the run resumed with room ends bitwise the same")


READ_ONLY = """
report=$1; shift
mkdir /mnt/run
mount -o remount,ro /mnt
"$@" 2>"$report/said" && exit 1 || echo $? >"$report/code"
"""


def test_a_read_only_folder_is_one_line(tmp_path, pictures):
    done = in_a_namespace(READ_ONLY, tmp_path, *command(pictures, "/mnt/run", 1))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "said").read_text() == "error: /mnt/run cannot be written: Read-only file system\n"
    assert (tmp_path / "code").read_text() == "2\n"


def test_a_file_in_the_folders_place_is_one_line(tmp_path, pictures):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "run"
    done = subprocess.run(command(pictures, place, 1), capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (2, f"error: {place} cannot be written: Not a directory\n")


# Two at once


def in_a_fork(work):
    """The id of a process that does it, ending with 0, or with 1 where that is a UsageError."""
    process = os.fork()
    if process:
        return process
    try:
        work()
    except UsageError:
        os._exit(1)
    os._exit(0)


def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def hold(folder):
    with locked(folder):
        time.sleep(LIMIT)


def try_to_hold(folder):
    with locked(folder):
        pass


def test_one_process_at_a_time_trains_in_a_folder(tmp_path, pictures):
    folder = tmp_path / "run"
    with locked(folder):
        done = subprocess.run(command(pictures, folder, 1), capture_output=True, text=True, env=ENVIRONMENT)
        assert (done.returncode, done.stderr) == (2, f"error: {folder} is being trained by another process\n")
        assert ended(in_a_fork(lambda: try_to_hold(folder))) == 1
    assert not folder.exists()  # nothing was written there
    assert ended(in_a_fork(lambda: try_to_hold(folder))) == 0


def test_a_killed_process_holds_no_folder(tmp_path):
    holder = in_a_fork(lambda: hold(tmp_path))
    deadline = time.monotonic() + LIMIT
    while ended(in_a_fork(lambda: try_to_hold(tmp_path))) == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert ended(in_a_fork(lambda: try_to_hold(tmp_path))) == 0


def test_a_process_holds_a_folder_once(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for _ in range(2):
        with locked(tmp_path):
            for folder in (tmp_path, tmp_path / "link"):
                with (
                    pytest.raises(UsageError, match=f"{folder} is being trained by this process already"),
                    locked(folder),
                ):
                    pass
            assert ended(in_a_fork(lambda: try_to_hold(tmp_path))) == 1


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "notes").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "notes")
    with pytest.raises(UsageError, match=f"{tmp_path} cannot be written"), locked(tmp_path):
        pass
    assert (tmp_path / "notes").read_text() == "kept"


def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    with locked(tmp_path):
        assert ended(in_a_fork(lambda: try_to_hold(tmp_path))) == 0
