"""Pictures too many to live on the device: they stay encoded, and worker processes decode them batch by batch.

Shapes: n pictures of a batch, m of a chunk, V views, C channels, S pixels a side.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hypercontrast.config import UsageError
from hypercontrast.data.augment import Augmentation, random_boxes
from hypercontrast.data.dataset import SMALL_PICTURE, Batch
from hypercontrast.data.draws import Draws
from hypercontrast.data.encoded import Encoded, decoded, resized_box, square
from hypercontrast.data.sampler import Share

# Pictures that a worker decodes at a time: few, so that all workers help with the first batch of a pass.
CHUNK = 32
TOLERATED = 0.01  # share of a set that may be damaged


def check_damage(damaged: Sequence[str], pictures: int) -> None:
    """Raise UsageError if these are too many of so many pictures."""
    if len(damaged) > TOLERATED * pictures:
        raise UsageError(
            f"at most {TOLERATED:.0%} of the pictures may be damaged, got {len(damaged)} of {pictures}:"
            f" {', '.join(damaged[:3])}"
        )


class _Request(NamedTuple):
    """A chunk to decode: a view for every seed, or without seeds the pictures as they are."""

    rows: list[int]
    places: list[int]
    seeds: Sequence[int]


class _Cut(NamedTuple):
    """A chunk decoded."""

    pixels: Tensor  # [V, m, C, S, S] uint8
    kept: list[int]  # which of the request's pictures they are
    damaged: list[str]  # what the others are called


@dataclass(frozen=True)
class _Cutter:
    """What a worker does: requests in, pixels out."""

    pictures: Encoded
    side: int
    mode: str

    def __getitem__(self, request: _Request) -> _Cut:
        pictures: list[Any] = []
        kept: list[int] = []
        damaged: list[str] = []
        for n, row in enumerate(request.rows):
            try:
                pictures.append(decoded(self.pictures, row, self.mode))
                kept.append(n)
            except UsageError:
                damaged.append(self.pictures.name(row))
        if request.seeds:
            places = torch.tensor([request.places[n] for n in kept], dtype=torch.int64)
            views = [self._view(pictures, places, seed) for seed in request.seeds]
        else:
            views = [[square(picture, self.side, self._scaled) for picture in pictures]]
        pixels = np.empty((len(views), len(kept), self.side, self.side, len(self.mode)), np.uint8)
        for view, cuts in zip(pixels, views, strict=True):
            for out, cut in zip(view, cuts, strict=True):
                out[:] = np.asarray(cut).reshape(out.shape)
        return _Cut(torch.from_numpy(pixels).permute(0, 1, 4, 2, 3), kept, damaged)

    def _view(self, pictures: Sequence[Any], places: Tensor, seed: int) -> list[Any]:
        """A random box of every picture, scaled to one size."""
        sizes = [picture.size for picture in pictures]
        boxes: dict[int, list[int]] = {}
        for width, height in set(sizes):  # most pictures are of a few sizes, and drawing takes a while each time
            alike = [n for n, size in enumerate(sizes) if size == (width, height)]
            drawn = random_boxes(Draws(seed, places[alike]), (height, width)).int().tolist()
            boxes.update(zip(alike, drawn, strict=True))
        return [resized_box(picture, boxes[n], self.side) for n, picture in enumerate(pictures)]

    @property
    def _scaled(self) -> int:
        return self.side * 256 // 224 if self.side > SMALL_PICTURE else self.side


@dataclass(frozen=True, eq=False)
class Streamed:
    """`Pictures` that are decoded when they are needed, by `workers` processes, or by none in this one.

    A picture as it is: its shorter side scaled to 256/224 of `side`, or to `side` up to 64 pixels, and the middle
    `side` pixels cut out. A view: a random box of the whole picture scaled to `side`, then what else the augmentation
    does on the device. All scaling is bilinear with antialiasing, and rounded to whole numbers. Batches do not depend
    on the number of workers.

    Raises UsageError while batches are made if more than 1 % of the set is damaged, or if a worker dies.
    """

    pictures: Encoded
    rows: Tensor  # [N] int64 on the CPU, places in `pictures`
    labels: Tensor  # [N]
    side: int
    mode: str  # "L" or "RGB"
    workers: int
    _damaged: dict[str, None] = field(default_factory=dict, init=False)  # keys in the order they were met

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.mode), self.side, self.side

    @property
    def damaged(self) -> tuple[str, ...]:
        return tuple(self._damaged)

    def select(self, index: Tensor) -> Streamed:
        return replace(self, rows=self.rows[index.cpu()], labels=self.labels[index])

    def to(self, device: torch.device) -> Streamed:
        return replace(self, labels=self.labels.to(device))

    def plain(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        wanted = list(batches)
        for indices, (pixels, kept) in zip(wanted, self._cuts(wanted, wanted, ()), strict=True):
            yield Batch(pixels[0], self.labels[indices[kept]], indices[kept])

    def views(self, shares: Iterable[Share], augment: Augmentation, seeds: Sequence[int]) -> Iterator[Batch]:
        if augment.crop != "resized":
            raise ValueError(f"augment must cut resized crops of pictures that stream, got {augment.crop!r}")
        shares = list(shares)
        wanted, places = [share.indices for share in shares], [share.places for share in shares]
        for indices, place, (pixels, kept) in zip(wanted, places, self._cuts(wanted, places, seeds), strict=True):
            views = []
            for seed, view in zip(seeds, pixels, strict=True):
                draws = Draws(seed, place[kept])
                random_boxes(draws, self.shape[1:])  # the workers took these numbers; the next ones are for the rest
                views.append(augment.finished(view.float(), draws))
            yield Batch(torch.cat(views), self.labels[indices[kept]], indices[kept])

    def _cuts(
        self, wanted: Sequence[Tensor], places: Sequence[Tensor], seeds: Sequence[int]
    ) -> Iterator[tuple[Tensor, slice | Tensor]]:
        """Of each batch of indices: pixels [V, n, C, S, S] on the device, and which of its pictures they are."""
        device = self.labels.device
        # All at once: the workers ask for what comes next while the device is busy, and should not wait for it.
        requests = [
            [
                _Request(rows.tolist(), place.tolist(), tuple(seeds))
                for rows, place in zip(self.rows[indices.cpu()].split(CHUNK), at.cpu().split(CHUNK), strict=True)
            ]
            for indices, at in zip(wanted, places, strict=True)
        ]
        chunks = self._chunks([request for batch in requests for request in batch])
        for batch in requests:
            parts = list(islice(chunks, len(batch)))
            pixels = torch.cat([part.pixels.to(device, non_blocking=True) for part in parts], dim=1)
            kept: slice | Tensor = slice(None)
            if any(part.damaged for part in parts):
                self._note(name for part in parts for name in part.damaged)
                places_kept = [n * CHUNK + place for n, part in enumerate(parts) for place in part.kept]
                kept = torch.tensor(places_kept, dtype=torch.int64, device=device)
            yield pixels, kept

    def _chunks(self, requests: list[_Request]) -> Iterator[_Cut]:
        loader: DataLoader[_Cut] = DataLoader(
            _Cutter(self.pictures, self.side, self.mode),  # type: ignore[arg-type]
            sampler=requests,
            batch_size=None,
            num_workers=self.workers,
            # Forked workers share the encoded pictures with this process; others would be sent a copy each.
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
            pin_memory=self.labels.is_cuda,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        try:
            with _signal_kept():
                chunks = iter(loader)
            yield from chunks
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UsageError(f"a process that decodes pictures died, try fewer --workers: {error}") from None

    def _note(self, names: Iterable[str]) -> None:
        self._damaged.update(dict.fromkeys(names))
        check_damage(self.damaged, len(self))


@contextmanager
def _signal_kept() -> Iterator[None]:
    """A loader's own handler raises for a dead worker wherever the main thread is; without, asking for a batch does."""
    changeable = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if changeable else None
    yield
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
