"""Pictures in folders, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from hypercontrast.config import UsageError
from hypercontrast.data.encoded import SUFFIXES, VALIDATION_NAMES, Files, Labelled, Reader, Splits, need


def find_folders(folder: Path, chosen: Sequence[str] = ()) -> Reader | None:
    """What reads FOLDER/train/CLASS/* and FOLDER/val/CLASS/*; None where they are not there.

    chosen: the classes to take, which must all be there; by default those of the training set, sorted, and then the
    validation set must have the same.
    """
    train = folder / "train"
    validation = next((folder / name for name in VALIDATION_NAMES if (folder / name).is_dir()), None)
    if not train.is_dir() or validation is None:
        return None
    need("PIL", "train", "a folder of pictures")
    classes = [{entry.name for entry in place.iterdir() if entry.is_dir()} for place in (train, validation)]
    if not chosen and not any(classes):
        return None
    for place, found in zip((train, validation), classes, strict=True):
        if missing := sorted(set(chosen) - found):
            raise UsageError(f"{place} must hold {len(chosen)} classes, missing {', '.join(missing[:3])}")
    if not chosen and classes[0] != classes[1]:
        differences = ((train, classes[0] - classes[1]), (validation, classes[1] - classes[0]))
        only = " and ".join(f"{', '.join(sorted(names))} in {place} only" for place, names in differences if names)
        raise UsageError(f"train and validation folders must hold the same classes, got {only}")
    return partial(_read, train, validation, tuple(chosen or sorted(classes[0])))


def _read(train: Path, validation: Path, names: tuple[str, ...]) -> Splits:
    return Splits(_pictures(train, names), _pictures(validation, names), names)


def _pictures(folder: Path, names: tuple[str, ...]) -> Labelled:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        # os.walk, for it asks the system nothing about single files: a million of them would take minutes.
        found = sorted(os.path.join(place, file) for place, _, inside in os.walk(folder / name) for file in inside)
        found = [file for file in found if os.path.splitext(file)[1].lower() in SUFFIXES]
        files += found
        labels += [label] * len(found)
    if not files:
        raise UsageError(f"{folder} must hold pictures, got none in {len(names)} folders")
    return Labelled(Files(files), torch.tensor(labels))
