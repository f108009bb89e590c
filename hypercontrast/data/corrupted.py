"""Corrupted pictures to test a network on: ImageNet-C as published, or a validation set corrupted the same way.

The 15 corruptions, at severities of 1 to 5 each, are those of Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261).

A source gives the pictures of a corruption and severity in batches, made ahead by its `pool`, which whoever uses the
source closes. Nothing is kept between calls.

Shapes: n pictures of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hypercontrast.config import UsageError
from hypercontrast.data.dataset import Pictures, limited_order
from hypercontrast.data.encoded import UNREADABLE, need, opened
from hypercontrast.data.sampler import derived_seed

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
BATCH = 64  # pictures that one thread or process makes at a time


class Batch(NamedTuple):
    """Pictures uint8 [n, C, H, W] and labels int64 [n]; `damaged` names files that belong here and cannot be read."""

    pixels: np.ndarray
    labels: np.ndarray
    damaged: tuple[str, ...] = ()


class Source(Protocol):
    """Where corrupted pictures come from; `pictures` is how many each corruption and severity has."""

    pool: Executor
    pictures: int

    def batches(self, corruption: str, severity: int) -> Iterator[Batch]: ...


def uncorrupted(images: Pictures, chosen: Tensor) -> Iterator[tuple[Batch, np.ndarray]]:
    """The chosen pictures as they are, with their indices."""
    for pixels, labels, indices in images.plain(chosen.to(images.labels.device).split(BATCH)):
        yield Batch(pixels.cpu().numpy(), labels.cpu().numpy()), indices.cpu().numpy()


# ImageNet-C as published: JPEG files of 224 x 224 pixels.


class ImageNetC:
    """ImageNet-C of the classes that a run tells apart, from ROOT/imagenet-c/CORRUPTION/SEVERITY/nXXXXXXXX/*.JPEG.

    A category may stand above the corruption (noise/gaussian_noise), as where each archive has a folder of its own.
    Pictures are cut to their middle 224 x 224 pixels, never resized: the published protocol.

    Args:
        class_names: the run's, WordNet ids in the order of its labels.
        limit: take at most this many pictures of each corruption and severity, evenly from every class; 0 for all.

    Raises UsageError, here and while reading, if the classes are others or files are missing. A picture that is there
    but damaged is left out of its batch and named in it.
    """

    SIDE = 224

    def __init__(
        self,
        root: Path,
        class_names: Sequence[str],
        corruptions: Sequence[str],
        severities: Sequence[int],
        *,
        limit: int,
        workers: int,
    ) -> None:
        need("PIL", "train", "source imagenet-c")
        if strangers := [name for name in class_names if not (name[:1] == "n" and name[1:].isdigit())]:
            raise UsageError(f"source imagenet-c needs a run whose classes are WordNet ids, got {strangers[0]!r}")
        self.class_names, self.limit, self.workers = class_names, limit, workers
        self.folders = {(c, s): _cell(root / "imagenet-c", c, s) for c in corruptions for s in severities}
        self.pictures = len(self._files(corruptions[0], severities[0])[0])
        self.pool: Executor = ThreadPoolExecutor(workers)  # Pillow decodes without the interpreter lock

    def batches(self, corruption: str, severity: int) -> Iterator[Batch]:
        files, labels = self._files(corruption, severity)
        if len(files) != self.pictures:  # an archive that was not unpacked to its end
            folder = self.folders[corruption, severity]
            raise UsageError(f"{folder} must hold {self.pictures} pictures like the others, got {len(files)}")
        starts = range(0, len(files), BATCH)
        return _ahead(self.pool, self.workers, _read, ((files[i : i + BATCH], labels[i : i + BATCH]) for i in starts))

    def _files(self, corruption: str, severity: int) -> tuple[list[Path], np.ndarray]:
        folder = self.folders[corruption, severity]
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            found = sorted((folder / name).glob("*.JPEG"))
            if not found:
                raise UsageError(f"{folder} must hold pictures of every class of the run, got none in {name}")
            files += found
            labels += [label] * len(found)
        chosen = limited_order(torch.tensor(labels), self.limit).numpy()
        return [files[i] for i in chosen], np.array(labels)[chosen]


def _cell(root: Path, corruption: str, severity: int) -> Path:
    for folder in (root / corruption, *sorted(root.glob(f"*/{corruption}"))):
        if (folder / str(severity)).is_dir():
            return folder / str(severity)
    raise UsageError(
        f"data_root must hold ImageNet-C: expected {root}/{corruption}/{severity}/nXXXXXXXX/*.JPEG"
        " (https://zenodo.org/records/2235448), or fewer --corruptions"
    )


def _read(files: Sequence[Path], labels: np.ndarray) -> Batch:
    pictures, intact, damaged = [], [], []
    for n, file in enumerate(files):
        try:
            pictures.append(_centre(file, ImageNetC.SIDE))
            intact.append(n)
        except UNREADABLE:  # UsageError, of a picture that is too small or too large, among them
            damaged.append("/".join(file.parts[-4:]))
    pixels = np.array(pictures, dtype=np.uint8).reshape(-1, 3, ImageNetC.SIDE, ImageNetC.SIDE)
    return Batch(pixels, labels[intact], tuple(damaged))


def _centre(file: Path, side: int) -> np.ndarray:
    """The middle of a picture [3, side, side]. Raises ValueError if it is smaller."""
    picture = opened(file, str(file)).convert("RGB")
    if min(picture.size) < side:
        raise ValueError(f"{file} must have at least {side} x {side} pixels, got {picture.size}")
    left, top = ((length - side) // 2 for length in picture.size)
    return np.asarray(picture.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


# Pictures corrupted here, by the package that carries the functions which made ImageNet-C.

SEED = 0  # the benchmark's, not the run's: runs to be compared meet the same pictures
SMALLEST_SIDE = 32  # that the package takes
OWN_GENERATOR = ("impulse_noise", "glass_blur")  # that do not draw from numpy's global one, but take a seed


class Generated:
    """Pictures [N, C, H, W], C of 1 or 3, each corrupted by `corrupted`, in processes of their own.

    Args:
        limit: take at most this many, evenly from every class; 0 for all.

    Raises UsageError if imagecorruptions cannot be imported.
    """

    def __init__(self, images: Pictures, *, limit: int, workers: int) -> None:
        try:
            import imagecorruptions  # noqa: F401
        except ImportError as error:  # missing, or an OpenCV without the libraries of a screen
            raise UsageError(
                f"source generated needs imagecorruptions-imaug: pip install 'hypercontrast[robust]' ({error})"
            ) from None
        self.images, self.workers = images, workers
        self.chosen = limited_order(images.labels.cpu(), limit)
        self.pictures = len(self.chosen)
        # Not forked: a process with threads and a GPU must not be.
        self.pool: Executor = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_ignore_interrupts)

    def batches(self, corruption: str, severity: int) -> Iterator[Batch]:
        clean = uncorrupted(self.images, self.chosen)
        return _ahead(self.pool, self.workers, _corrupted_batch, ((*job, corruption, severity) for job in clean))


def _ignore_interrupts() -> None:
    """The parent hears Ctrl-C and ends its workers; their own tracebacks would say nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _corrupted_batch(batch: Batch, index: np.ndarray, corruption: str, severity: int) -> Batch:
    pairs = zip(batch.pixels, index.tolist(), strict=True)
    return batch._replace(pixels=np.stack([corrupted(picture, corruption, severity, i) for picture, i in pairs]))


def corrupted(picture: np.ndarray, corruption: str, severity: int, index: int) -> np.ndarray:
    """A picture uint8 [C, H, W] as `imagecorruptions.corrupt` makes it: a function of the arguments alone.

    A grey picture goes through as three equal channels and comes back as the green one: the largest part of luma, and
    noise in it keeps its strength, which a mean over channels would not. A side below 32 pixels, which the package
    refuses, is padded to 32 by its edge and cut back: no pixel is resampled.

    index: of the picture in its set; each has random numbers of its own.
    """
    from imagecorruptions import corrupt

    seed = derived_seed(SEED, corruption, severity, index) % 2**32
    channels, *sides = picture.shape
    before = [max(0, SMALLEST_SIDE - side) // 2 for side in sides]
    after = [max(0, SMALLEST_SIDE - side) - b for side, b in zip(sides, before, strict=True)]
    padded = np.pad(picture, [(0, 0), *zip(before, after, strict=True)], mode="edge")
    colour = np.broadcast_to(padded, (3, *padded.shape[1:])).transpose(1, 2, 0)
    options = {"seed": seed} if corruption in OWN_GENERATOR else {}
    with _numpy_seeded(seed):
        result = corrupt(np.ascontiguousarray(colour), severity=severity, corruption_name=corruption, **options)
    top, left = before
    cut = result[top : top + sides[0], left : left + sides[1]].transpose(2, 0, 1)
    return cut if channels == 3 else cut[1:2]


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """numpy's global generator, from which the package draws, seeded; and as it was before, afterwards."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _ahead(pool: Executor, workers: int, make: Callable[..., Batch], jobs: Iterable[tuple]) -> Iterator[Batch]:
    """What `make` returns for each job, in order; two jobs a worker wait at most, so that memory stays bounded."""
    waiting: deque[Future[Batch]] = deque()
    for job in jobs:
        waiting.append(pool.submit(make, *job))
        if len(waiting) > 2 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
