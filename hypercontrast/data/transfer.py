"""The eight data sets of linear transfer, read as their authors publish them; nothing is downloaded.

Training sets are those that linear evaluations take (Kornblith et al. 2019): with the validation set where there is
one, the first split of DTD, `trainval` of the Pets and of VOC2007.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypercontrast.config import UsageError
from hypercontrast.data.dataset import Pictures, limited_order
from hypercontrast.data.encoded import Files, Labelled, Splits, need
from hypercontrast.data.facts import TRANSFER_FACTS, missing
from hypercontrast.data.sources import find_cifar
from hypercontrast.data.streamed import Streamed


@dataclass(frozen=True)
class TransferSet:
    """A training and a test set, to be passed over once, so decoded batch by batch (see `Streamed`).

    targets: where a picture shows several objects (VOC2007), for each of the two sets [N, K] float32: 1 for a class
    that is there, 0 for one that is not, NaN for one of which there are only objects marked as difficult, which does
    not count. The labels are 0 then.
    """

    train: Pictures
    test: Pictures
    class_names: tuple[str, ...]
    targets: tuple[Tensor, Tensor] | None = None


def locate(name: str, root: str | Path = "data") -> Callable[..., TransferSet]:
    """Check that the data set is there, without reading it, and return what reads it: `load(limit, size=224,
    channels=3, workers=8)`. Raises UsageError, as that does.

    limit: take at most this many training and this many test pictures, evenly from every class; 0 for all.
    size: pixels a side, to which pictures are scaled up or down, and cut, as `Streamed` says.
    channels: 3, or 1 for grey.
    workers: processes that decode, or 0.
    """
    if name not in TRANSFER_FACTS:
        raise UsageError(f"datasets must be of {', '.join(TRANSFER_FACTS)}, got {name!r}")
    read = _found(name, Path(root))
    if read is None:
        raise missing(name, TRANSFER_FACTS[name], Path(root))
    return partial(_load, name, read)


class _Read(NamedTuple):
    splits: Splits
    targets: tuple[Tensor, Tensor] | None = None


def _found(name: str, root: Path) -> Callable[[], _Read] | None:
    if name.startswith("cifar"):
        cifar = find_cifar(TRANSFER_FACTS[name].classes, root)
        return cifar and (lambda: _Read(cifar()))
    source = _SOURCES[name]
    for folder in source.folders:
        if all((root / folder / part).exists() for part in source.parts):
            need("PIL", "train", f"data set {name}")
            if any(part.endswith(".mat") for part in source.parts):
                need("scipy", "transfer", f"data set {name}")
            return partial(source.read, root / folder)
    return None


def _load(
    name: str, read: Callable[[], _Read], limit: int, size: int = 224, channels: int = 3, workers: int = 8
) -> TransferSet:
    try:
        (train, test, class_names), targets = read()
        _check_labels(train.labels, test.labels, len(class_names))
    except UsageError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"the lists of {name} must be as published: {' '.join(repr(error).split())}") from error
    mode = {1: "L", 3: "RGB"}[channels]
    rows = [limited_order(part.labels, limit) for part in (train, test)]
    sets = [
        Streamed(part.pictures, own, part.labels[own], size, mode, workers)
        for part, own in zip((train, test), rows, strict=True)
    ]
    chosen = targets and (targets[0][rows[0]], targets[1][rows[1]])
    return TransferSet(sets[0], sets[1], class_names, chosen)


def _check_labels(train: Tensor, test: Tensor, num_classes: int) -> None:
    for split, labels in (("training", train), ("test", test)):
        if len(labels) == 0:
            raise ValueError(f"no {split} pictures")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"{split} labels {labels.min()} to {labels.max()} of {num_classes} classes")


def _read_food101(folder: Path) -> _Read:
    names = tuple(_lines(folder / "meta" / "classes.txt"))

    def part(split: str) -> Labelled:
        pictures = [f"{picture}.jpg" for picture in _lines(folder / "meta" / f"{split}.txt")]
        return _in_class_folders(folder / "images", pictures, names)

    return _Read(Splits(part("train"), part("test"), names))


def _read_cars(folder: Path) -> _Read:
    def part(annotations: Path, pictures: Path) -> Labelled:
        rows = _matlab(annotations)["annotations"]
        return _labelled(
            [_inside(pictures, str(row["fname"])) for row in rows], [int(row["class"]) - 1 for row in rows]
        )

    names = tuple(map(str, _matlab(folder / "devkit" / "cars_meta.mat")["class_names"]))
    train = part(folder / "devkit" / "cars_train_annos.mat", folder / "cars_train")
    return _Read(Splits(train, part(folder / "cars_test_annos_withlabels.mat", folder / "cars_test"), names))


def _read_dtd(folder: Path) -> _Read:
    train, validation, test = (_lines(folder / "labels" / f"{split}1.txt") for split in ("train", "val", "test"))
    names = tuple(sorted({picture.partition("/")[0] for picture in train}))
    training, testing = (_in_class_folders(folder / "images", part, names) for part in (train + validation, test))
    return _Read(Splits(training, testing, names))


def _read_pets(folder: Path) -> _Read:
    names: dict[int, str] = {}

    def part(split: str) -> Labelled:
        rows = [line.split() for line in _lines(folder / "annotations" / f"{split}.txt")]  # BREED_NUMBER CLASS ...
        names.update((int(row[1]) - 1, row[0].rpartition("_")[0]) for row in rows)
        pictures = [_inside(folder / "images", f"{row[0]}.jpg") for row in rows]
        return _labelled(pictures, [int(row[1]) - 1 for row in rows])

    train, test = part("trainval"), part("test")
    return _Read(Splits(train, test, tuple(names[label] for label in sorted(names))))


def _read_flowers(folder: Path) -> _Read:
    labels, numbers = _matlab(folder / "imagelabels.mat")["labels"], _matlab(folder / "setid.mat")

    def part(*splits: str) -> Labelled:
        chosen = [int(number) for split in splits for number in numbers[split]]  # from 1, as the labels
        return _labelled(
            [folder / "jpg" / f"image_{number:05d}.jpg" for number in chosen],
            [int(labels[number - 1]) - 1 for number in chosen],
        )

    # A class is one that some picture shows: a single label of 2^40 must not make as many.
    names = tuple(str(label + 1) for label in range(min(int(max(labels)), len(labels))))
    return _Read(Splits(part("trnid", "valid"), part("tstid"), names))


def _read_voc2007(folder: Path) -> _Read:
    lists = folder / "ImageSets" / "Main"
    names = tuple(sorted(path.name.removesuffix("_trainval.txt") for path in lists.glob("*_trainval.txt")))

    def part(split: str) -> tuple[Labelled, Tensor]:
        numbers = _lines(lists / f"{split}.txt")
        # A line of a class's list is a picture's number and 1, -1, or 0 for difficult objects only.
        signs = [dict(line.split() for line in _lines(lists / f"{name}_{split}.txt")) for name in names]
        values = {"1": 1.0, "-1": 0.0, "0": torch.nan}
        targets = torch.tensor([[values[sign[number]] for sign in signs] for number in numbers])
        pictures = [_inside(folder / "JPEGImages", f"{number}.jpg") for number in numbers]
        return _labelled(pictures, [0] * len(numbers)), targets

    (train, train_targets), (test, test_targets) = part("trainval"), part("test")
    return _Read(Splits(train, test, names), (train_targets, test_targets))


def _inside(folder: Path, name: str) -> Path:
    """A file that a list names. Raises ValueError for a name that leads out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name} leads out of {folder}")
    return folder / name


def _in_class_folders(folder: Path, pictures: Sequence[str], names: Sequence[str]) -> Labelled:
    """Pictures that a list calls CLASS/FILE."""
    labels = [names.index(picture.partition("/")[0]) for picture in pictures]
    return _labelled([_inside(folder, picture) for picture in pictures], labels)


def _labelled(paths: Sequence[Path], labels: Sequence[int]) -> Labelled:
    return Labelled(Files(paths), torch.tensor(labels, dtype=torch.int64))


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _matlab(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    return loadmat(path, squeeze_me=True)


@dataclass(frozen=True)
class _Source:
    """Where a set is looked for, what must be there, and what reads it."""

    folders: tuple[str, ...]
    parts: tuple[str, ...]
    read: Callable[[Path], _Read]


_SOURCES = {
    "food101": _Source(("food-101",), ("images", "meta/classes.txt", "meta/train.txt", "meta/test.txt"), _read_food101),
    "cars": _Source(
        ("stanford_cars",),
        (
            "cars_train", "cars_test", "cars_test_annos_withlabels.mat",
            "devkit/cars_meta.mat", "devkit/cars_train_annos.mat",
        ),
        _read_cars,
    ),
    # torchvision unpacks the archive, whose folder is dtd, into another one of that name.
    "dtd": _Source(
        ("dtd", "dtd/dtd"), ("images", "labels/train1.txt", "labels/val1.txt", "labels/test1.txt"), _read_dtd
    ),
    "pets": _Source(("oxford-iiit-pet",), ("images", "annotations/trainval.txt", "annotations/test.txt"), _read_pets),
    "flowers": _Source(("flowers-102",), ("jpg", "imagelabels.mat", "setid.mat"), _read_flowers),
    "voc2007": _Source(
        ("VOCdevkit/VOC2007",),
        (
            "JPEGImages", "ImageSets/Main/trainval.txt", "ImageSets/Main/test.txt",
            "ImageSets/Main/aeroplane_trainval.txt", "ImageSets/Main/aeroplane_test.txt",
        ),
        _read_voc2007,
    ),
}  # fmt: skip
