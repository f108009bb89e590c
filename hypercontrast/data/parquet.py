"""Parquet in the layout of Hugging Face: pictures as encoded bytes beside an integer label.

Splits up to `IN_MEMORY_BYTES` stay encoded in memory. Parquet is read a group of rows at a time, which makes a single
picture expensive, so larger ones are unpacked once to an Arrow file beside them, such as train.arrow: all ranks and
their workers map it into memory. It is written anew when the Parquet files change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hypercontrast.config import UsageError
from hypercontrast.data.encoded import VALIDATION_NAMES, Labelled, Reader, Splits, need, opened
from hypercontrast.output import warn

IN_MEMORY_BYTES = 2 << 30  # of a split's files
PICTURE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
BATCH_ROWS = 1024
# Pictures are compressed already, so a split unpacks to little more than its files; small ones may to IN_MEMORY_BYTES.
LARGEST_EXPANSION = 4


class Cells:
    """A picture in every cell of an Arrow column; `rows` are their rows in `files`, counted through."""

    def __init__(self, column: Any, rows: np.ndarray, files: Sequence[Path], starts: np.ndarray) -> None:
        self._column, self._rows, self._files, self._starts = column, rows, files, starts

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, n: int) -> str:
        file = int(np.searchsorted(self._starts, self._rows[n], side="right")) - 1
        return f"{self._files[file]}, row {self._rows[n] - self._starts[file]}"

    def opened(self, n: int) -> Any:
        return opened(self._column[n].as_py(), self.name(n))


def find_parquet(folder: Path, class_names: Sequence[str] = (), chosen: Sequence[str] = ()) -> Reader | None:
    """What reads FOLDER/train{,-*}.parquet and FOLDER/{val,test}{,-*}.parquet, or the same in FOLDER/data.

    None where they are not there.

    class_names: of the labels 0, 1, ... in the files; by default as their metadata says, else the numbers.
    chosen: names of the classes to take, in the order of their new labels; by default all.
    """
    for place in (folder, folder / "data"):
        train = _files(place, "train")
        validation = next(filter(None, (_files(place, name) for name in VALIDATION_NAMES)), None)
        if train and validation:
            need("pyarrow", "train", "a Parquet data set")
            need("PIL", "train", "a Parquet data set")
            return partial(_read, train, validation, tuple(class_names), tuple(chosen))
    return None


def _files(folder: Path, split: str) -> list[Path]:
    return sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")])


def _read(train: list[Path], validation: list[Path], names: tuple[str, ...], chosen: tuple[str, ...]) -> Splits:
    splits = _Split(train), _Split(validation)
    largest = max(int(split.labels.max()) for split in splits)
    # Without names a class is one that some picture shows: a single label of 2^40 must not make as many classes.
    names = names or splits[0].class_names() or tuple(map(str, range(min(largest + 1, len(splits[0].labels)))))
    if largest >= len(names):
        raise UsageError(f"labels of {train[0].parent} must lie in [0, {len(names)}), got {largest}")
    classes = [names.index(name) for name in chosen] if chosen else list(range(len(names)))
    return Splits(splits[0].read(classes), splits[1].read(classes), chosen or names)


class _Split:
    """The files of a split: their labels, checked, and their pictures when asked for."""

    def __init__(self, files: list[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files = files
        with _reading(files[0]):
            counts = [pq.read_metadata(file).num_rows for file in files]
            schema = pq.read_schema(files[0])
            self.picture = _column(schema.names, files[0], PICTURE_COLUMNS)
            self.label = _column(schema.names, files[0], LABEL_COLUMNS)
            kind = schema.field(self.picture).type
            bytes_of = {f.name: f.type for f in kind}.get("bytes", pa.null()) if pa.types.is_struct(kind) else kind
        self.starts = np.cumsum([0, *counts[:-1]])
        self.metadata = schema.metadata or {}
        if not pa.types.is_binary(bytes_of):
            raise UsageError(f"{files[0]} must hold encoded pictures in column {self.picture}, got {kind}")
        with _reading(files[0]):
            labels = pq.read_table(files, columns=[self.label])[self.label]
        if len(labels) == 0 or not pa.types.is_integer(labels.type):
            raise UsageError(f"{files[0]} must hold integers in column {self.label}, got {labels.type}")
        if labels.null_count:  # as all rows of a file without the column count
            file = files[int(np.searchsorted(self.starts, labels.is_null().index(True).as_py(), side="right")) - 1]
            raise UsageError(f"{file} must hold a label in every row of column {self.label}")
        self.labels = labels.to_numpy().astype(np.int64)
        if self.labels.min() < 0:
            raise UsageError(f"labels of {files[0]} must be at least 0, got {self.labels.min()}")

    def class_names(self) -> tuple[str, ...]:
        """As the metadata has them; none if it does not say."""
        found: Any
        try:
            found = json.loads(self.metadata.get(b"huggingface", b"{}"))
        except (ValueError, RecursionError):
            raise UsageError(f"{self.files[0]} must hold JSON as its huggingface metadata") from None
        for key in ("info", "features", self.label, "names"):
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None and not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
            raise UsageError(f"{self.files[0]} must name the classes in a list of strings, got {str(found)[:80]}")
        return tuple(found or ())

    def read(self, classes: list[int]) -> Labelled:
        """The pictures with these labels, which become 0, 1, ... in this order."""
        import pyarrow as pa

        new = np.full(max(*classes, self.labels.max()) + 1, -1)
        new[classes] = np.arange(len(classes))
        chosen = new[self.labels] >= 0
        rows = chosen.nonzero()[0]
        if sum(file.stat().st_size for file in self.files) > IN_MEMORY_BYTES:
            column = self._unpacked(chosen)
        else:
            with _reading(self.files[0]):
                column = pa.chunked_array(list(self._pictures(chosen)), pa.binary())
        if column.null_count:
            raise UsageError(f"{self.files[0]} must hold a picture in every row of column {self.picture}")
        return Labelled(Cells(column, rows, self.files, self.starts), torch.from_numpy(new[self.labels[rows]]))

    def _pictures(self, chosen: np.ndarray) -> Iterator[Any]:
        """The encoded pictures of the chosen rows, a few at a time. Raises UsageError for a decompression bomb."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        most = max(IN_MEMORY_BYTES, LARGEST_EXPANSION * sum(file.stat().st_size for file in self.files))
        row = unpacked = 0
        for file in self.files:
            with _reading(file):
                parquet = pq.ParquetFile(file)
                _check_pages(file, parquet.metadata, most)
                for batch in parquet.iter_batches(BATCH_ROWS, columns=[self.picture]):
                    cells = batch.column(_column(batch.schema.names, file, (self.picture,)))
                    if pa.types.is_struct(cells.type):
                        cells = pc.struct_field(cells, "bytes")
                    unpacked += cells.nbytes
                    if unpacked > most:
                        raise UsageError(f"{file} must unpack to at most {most} bytes of pictures")
                    yield cells.filter(pa.array(chosen[row : row + len(cells)]))
                    row += len(cells)

    def _unpacked(self, chosen: np.ndarray) -> Any:
        """The chosen pictures from the Arrow file beside the Parquet files, written first where it is not there yet."""
        split = self.files[0].stem.partition("-")[0]
        target = self.files[0].parent / f"{split}{'' if chosen.all() else f'-{chosen.sum()}'}.arrow"
        stats = [file.stat() for file in self.files]
        stamps = [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in zip(self.files, stats, strict=True)]
        origin = hashlib.sha256(repr((stamps, self.picture)).encode() + chosen.tobytes()).hexdigest()
        column = _mapped(target, origin)
        if column is not None:
            return column
        gib = sum(stat.st_size for stat in stats) * chosen.mean() / 2**30
        try:
            with _locked(target.with_suffix(".lock")):
                column = _mapped(target, origin)  # another rank may have been first
                if column is None:
                    warn(f"unpacking {gib:.1f} GiB of Parquet, once, to {target}")
                    _write(target, self._pictures(chosen), origin)
                    column = _mapped(target, origin)
        except OSError as error:
            raise UsageError(
                f"{target.parent} must have room for {gib:.1f} GiB of unpacked pictures: {error}"
            ) from None
        return column


def _mapped(target: Path, origin: str) -> Any | None:
    """The column of an Arrow file, in memory only as far as it is used; None if it is not one of that origin."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(target)))
        if (reader.schema.metadata or {}).get(b"origin") != origin.encode():
            return None
        column = reader.read_all().column(0)
        column.validate(full=True)  # or the offsets of a damaged file would be followed out of the map
    except (pa.ArrowException, OSError):  # not there, cut off by a crash of the machine, or damaged
        return None
    return column


def _write(target: Path, columns: Iterator[Any], origin: str) -> None:
    import pyarrow as pa

    schema = pa.schema([("picture", pa.binary())], metadata={"origin": origin})
    part = target.with_suffix(".part")
    try:
        with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for column in columns:
                writer.write_batch(pa.record_batch([column], schema=schema))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that ask for this file; the system lets go of it if this one dies."""
    import fcntl

    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_pages(file: Path, metadata: Any, most: int) -> None:
    """What the file says that a group of its rows unpacks to is what reading it allocates: look before."""
    for n in range(metadata.num_row_groups):
        if (size := metadata.row_group(n).total_byte_size) > most:
            raise UsageError(f"{file} must unpack to at most {most} bytes of pictures, got {size} in rows group {n}")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column's name
        raise UsageError(f"{file} must be readable Parquet: {' '.join(str(error).split())}") from None


def _column(found: Sequence[str], file: Path, names: Sequence[str]) -> str:
    for name in names:
        if name in found:
            return name
    raise UsageError(f"{file} must have a column {' or '.join(names)}, got {', '.join(found) or 'none'}")
