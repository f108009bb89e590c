"""Checkpoints that survive a kill at any moment, and notice damage.

A run folder holds `checkpoints/epoch-NNNN/`, saved after so many epochs, and `checkpoints/epoch-NNNN-step-NNNNNN/`,
saved so many steps later, inside the next epoch. Each has
- `checkpoint.safetensors`: the weights, and whatever else is a named tensor;
- `state.pt`: the training state, readable with `torch.load(weights_only=True)`;
- `SHA256SUMS`: their checksums, in the format of `sha256sum`.

The folder is written under another name, forced to disk, and renamed: it appears complete or not at all, and a disk
that is full leaves the older ones as they were. The newest few are kept, so there is a good one to fall back on if the
newest is damaged later, and so is the best.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS, STATE, SUMS = "checkpoint.safetensors", "state.pt", "SHA256SUMS"
FOLDER = re.compile(r"epoch-(\d+)(?:-step-(\d+))?")


class CheckpointError(RuntimeError):
    """No checkpoint of a run can be used, or something of a run cannot be written; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """epoch: how many are finished. step: how many steps of the next one are done."""

    epoch: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    step: int = 0


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, *, kept: int = 2, best: int = 0) -> Path:
    """Write a checkpoint and drop outdated ones. Returns its folder.

    Left are the newest `kept` after whole epochs, that after epoch `best`, and the newest `kept` inside an epoch if
    they are newer than all of these. Those of a later place go: whoever saves here resumed past them. Raises
    CheckpointError if it cannot be written; the others are then as they were.
    """
    from safetensors.torch import save

    buffer = io.BytesIO()
    torch.save(checkpoint.state, buffer)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    files = {WEIGHTS: save(tensors), STATE: buffer.getvalue()}
    files[SUMS] = _sums(files).encode()

    root = run_dir / "checkpoints"
    inside = f"-step-{checkpoint.step:06d}" if checkpoint.step else ""
    final = root / f"epoch-{checkpoint.epoch:04d}{inside}"
    unfinished = root / f".unfinished-{os.getpid()}"
    with _writing(final):
        _remove_leftovers(root)
        try:
            unfinished.mkdir(parents=True)
            for name, content in files.items():
                _write_synced(unfinished / name, content)
            _sync_folder(unfinished)
            if final.exists():  # a damaged one that an older one was resumed from
                shutil.rmtree(final)
            os.rename(unfinished, final)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)  # to give back what room there was
            raise
        _sync_folder(root)
        for outdated in _outdated(_folders(run_dir), final, kept, best):
            shutil.rmtree(outdated)
    return final


def load_checkpoint(run_dir: Path, *, whole_epochs: bool = False) -> Checkpoint | None:
    """The newest intact checkpoint of a run, on the CPU; None if the run has not saved one yet.

    whole_epochs: leave out those inside an epoch, which are for resuming alone: their class means are older than their
    weights. A damaged one is passed over with a warning. Raises CheckpointError if there are some but none is intact.
    """
    folders = [folder for folder in _folders(run_dir) if not (whole_epochs and _place(folder)[1])]
    for folder in folders:
        try:
            return _read(folder)
        except CheckpointError as damage:
            warnings.warn(f"{damage}; trying the checkpoint before it", RuntimeWarning, stacklevel=2)
    if folders:
        raise CheckpointError(f"{run_dir} must hold an intact checkpoint, got {len(folders)} damaged")
    return None


def last_good(run_dir: Path) -> str:
    """For a message: where the newest intact checkpoint of a run is."""
    for folder in _folders(run_dir):
        try:
            _read(folder)
        except CheckpointError:
            continue
        return f"the last good checkpoint is {folder}"
    return "no checkpoint has been saved yet"


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file by `content`: readers and a crash see the old one or the new one, never a part.

    Raises CheckpointError if it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")  # what a crash leaves of it, the next attempt replaces
    with _writing(path):
        try:
            _write_synced(unfinished, content)
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None


def _read(folder: Path) -> Checkpoint:
    from safetensors.torch import load

    try:  # What is checked is what is parsed: the bytes are read once.
        files = {name: (folder / name).read_bytes() for name in (WEIGHTS, STATE)}
        sums = (folder / SUMS).read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} is incomplete: {error.strerror}") from None
    if sums != _sums(files).encode():
        raise CheckpointError(f"checkpoint {folder} is damaged: its files do not match {SUMS}")
    try:
        state = torch.load(io.BytesIO(files[STATE]), map_location="cpu", weights_only=True)
        tensors = load(files[WEIGHTS])
    except Exception as error:  # written so, by something else: bytes like that fail anywhere in the two readers
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"checkpoint {folder} cannot be read: {reason or type(error).__name__}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {folder} must hold a dict as its state, got {type(state).__name__}")
    epoch, step = _place(folder)
    return Checkpoint(epoch, tensors, state, step)


def _sums(files: dict[str, bytes]) -> str:
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())


def _folders(run_dir: Path) -> list[Path]:
    """Finished checkpoints, newest first. Raises CheckpointError if they cannot be seen."""
    root = run_dir / "checkpoints"
    try:
        found = [folder for folder in root.iterdir() if FOLDER.fullmatch(folder.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read: {error.strerror}") from None
    return sorted(found, key=_place, reverse=True)


def _place(folder: Path) -> tuple[int, int]:
    """Epoch and step, as of `Checkpoint`."""
    epoch, step = FOLDER.fullmatch(folder.name).groups("0")  # type: ignore[union-attr]
    return int(epoch), int(step)


def _outdated(folders: list[Path], saved: Path, kept: int, best: int) -> list[Path]:
    """As of `save_checkpoint`; folders: newest first."""
    # A later one could not be read when this run resumed: counted as the newest, it would push out the good one.
    past = [folder for folder in folders if _place(folder) <= _place(saved)]
    whole = [folder for folder in past if _place(folder)[1] == 0]
    inside = [folder for folder in past if not whole or _place(folder) > _place(whole[0])]
    wanted = {*whole[:kept], *inside[:kept], *(folder for folder in whole if _place(folder)[0] == best)}
    return [folder for folder in folders if folder not in wanted]


def _remove_leftovers(root: Path) -> None:
    for leftover in root.glob(".unfinished-*"):
        shutil.rmtree(leftover)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
