"""Checkpoints that survive a kill at any moment, and notice damage.

A run folder holds `checkpoints/epoch-NNNN/` with
- `checkpoint.safetensors`: the weights, and whatever else is a named tensor;
- `state.pt`: the training state, readable with `torch.load(weights_only=True)`;
- `SHA256SUMS`: their checksums, in the format of `sha256sum`.

The folder is written under another name, forced to disk, and renamed: it appears complete or not at all. The one before
it is kept, so there is a good one to fall back on if the newest is damaged later.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS, STATE, SUMS = "checkpoint.safetensors", "state.pt", "SHA256SUMS"
KEPT = 2


class CheckpointError(RuntimeError):
    """No checkpoint of a run can be used; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    epoch: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and drop the ones before its predecessor. Returns its folder."""
    from safetensors.torch import save

    buffer = io.BytesIO()
    torch.save(checkpoint.state, buffer)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    files = {WEIGHTS: save(tensors), STATE: buffer.getvalue()}
    files[SUMS] = _sums(files).encode()

    root = run_dir / "checkpoints"
    final = root / f"epoch-{checkpoint.epoch:04d}"
    _remove_leftovers(root)
    unfinished = root / f".unfinished-{os.getpid()}"
    unfinished.mkdir(parents=True)
    for name, content in files.items():
        _write_synced(unfinished / name, content)
    _sync_folder(unfinished)
    if final.exists():  # a damaged one that an older one was resumed from
        shutil.rmtree(final)
    os.rename(unfinished, final)
    _sync_folder(root)
    for outdated in _folders(run_dir)[KEPT:]:
        shutil.rmtree(outdated)
    return final


def load_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest intact checkpoint of a run, on the CPU; None if the run has not saved one yet.

    A damaged one is passed over with a warning. Raises CheckpointError if there are checkpoints but none is intact.
    """
    folders = _folders(run_dir)
    for folder in folders:
        try:
            return _read(folder)
        except CheckpointError as damage:
            warnings.warn(f"{damage}; trying the checkpoint before it", RuntimeWarning, stacklevel=2)
    if folders:
        raise CheckpointError(f"{run_dir} must hold an intact checkpoint, got {len(folders)} damaged")
    return None


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file by `content`: readers and a crash see the old one or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    _write_synced(unfinished, content)
    os.replace(unfinished, path)
    _sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path) -> Checkpoint:
    from safetensors import SafetensorError
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
    except (pickle.UnpicklingError, SafetensorError, RuntimeError) as error:  # written so, by something else
        raise CheckpointError(f"checkpoint {folder} cannot be read: {str(error).splitlines()[0]}") from None
    return Checkpoint(int(folder.name.removeprefix("epoch-")), tensors, state)


def _sums(files: dict[str, bytes]) -> str:
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())


def _folders(run_dir: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    found = [f for f in run_dir.glob("checkpoints/epoch-*") if f.name.removeprefix("epoch-").isdigit()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("epoch-")), reverse=True)


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
