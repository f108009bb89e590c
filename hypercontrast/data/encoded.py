"""Pictures as they are stored, and how one of them becomes pixels: decoded within bounds, cut and scaled by Pillow."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from hypercontrast.config import UsageError

VALIDATION_NAMES = ("val", "valid", "validation", "test")
LARGEST_PICTURE = 1 << 26  # pixels; a few kilobytes can claim to hold far more
LARGEST_ASPECT = 64  # of length to width, or a line of pixels, scaled until it is as wide as the others, would do so
SAMPLED = 100  # pictures that are looked at before the others are read
TILE_SIDES = 322, 323  # TIFF's tags
# No others: Pillow hands EPS, for one, to another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Encoded(Protocol):
    """Pictures that are decoded one at a time, when they are needed."""

    def __len__(self) -> int: ...

    def name(self, n: int) -> str:
        """Where picture n comes from."""

    def opened(self, n: int) -> Any:
        """Picture n as a Pillow image, its pixels not decoded yet. Raises UsageError as `opened` does."""


class Labelled(NamedTuple):
    pictures: Encoded
    labels: Tensor  # [N] int64


class Splits(NamedTuple):
    """A data set as it is stored."""

    train: Labelled
    validation: Labelled
    class_names: tuple[str, ...]


Reader = Callable[[], Splits]


def need(module: str, extra: str, what: str) -> None:
    """Raise UsageError if `module`, which `what` takes, cannot be imported."""
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{what} needs {module}: pip install 'hypercontrast[{extra}]'")


class Files:
    """A file for every picture. A million paths are kept as one array, which worker processes share."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, n: int) -> str:
        return os.fsdecode(self._paths[n])

    def opened(self, n: int) -> Any:
        return opened(Path(self.name(n)), self.name(n))


class Arrays:
    """Pictures [N, H, W, C] uint8 that are no longer encoded."""

    def __init__(self, pixels: np.ndarray, name: str) -> None:
        self._pixels, self._name = pixels, name

    def __len__(self) -> int:
        return len(self._pixels)

    def name(self, n: int) -> str:
        return f"{self._name}, picture {n}"

    def opened(self, n: int) -> Any:
        from PIL import Image

        return Image.fromarray(self._pixels[n])


def opened(source: Path | bytes, name: str) -> Any:
    """A Pillow image, its pixels not decoded yet; `name` stands for it in errors.

    Raises UsageError for what is no picture, would unpack beyond reason, or has more than 8 bits a channel.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Path) and os.path.exists(source) and not os.path.isfile(source):
        raise UsageError(f"{name} must be a regular file")  # opening a pipe would wait for its other end
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except UnidentifiedImageError:
        raise UsageError(f"{name} must be a picture, in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
    except (Image.DecompressionBombError, *UNREADABLE) as error:
        raise UsageError(f"{name} must be an intact picture: {error}") from None
    for size in (picture.size, _tile(picture)):
        if math.prod(size) > LARGEST_PICTURE:
            raise UsageError(f"{name} must have at most {LARGEST_PICTURE} pixels, got {size}")
    if max(picture.size) > LARGEST_ASPECT * min(picture.size):
        raise UsageError(f"{name} must be at most {LARGEST_ASPECT} times as long as wide, got {picture.size}")
    if picture.mode[0] in "IF":  # which Pillow would convert by cutting off all above 255
        raise UsageError(f"{name} must have 8 bits a channel, got mode {picture.mode}")
    return picture


def _tile(picture: Any) -> tuple[int, int]:
    """Width and height of what a TIFF is decoded in: a tile may be larger than the picture, and is decoded whole."""
    sides = [picture.tag_v2.get(tag) for tag in TILE_SIDES] if picture.format == "TIFF" else []
    width, height = sides if sides and all(isinstance(side, int) for side in sides) else (0, 0)
    return width, height


# What Pillow raises for damaged files, whichever of its decoders meets them.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, struct.error, zlib.error)


def decoded(pictures: Encoded, n: int, mode: str) -> Any:
    """Picture n in Pillow's mode "L" or "RGB". Raises UsageError if that cannot be had."""
    with pictures.opened(n) as picture:
        try:
            return picture.convert(mode)
        except UNREADABLE as error:  # a truncated file fails only here
            raise UsageError(f"{pictures.name(n)} must be an intact picture: {error}") from None


def first_form(pictures: Encoded) -> tuple[int, str]:
    """Shorter side of the first picture that can be opened, and the mode: "L", or "RGB" if some of SAMPLED pictures,
    evenly spaced, have colours. For there are grey ones in most sets.
    """
    count = min(len(pictures), SAMPLED)
    sides, modes = [], set()
    for n in range(count):
        try:
            with pictures.opened(n * len(pictures) // count) as picture:
                sides.append(min(picture.size))
                modes.add(picture.mode)
        except UsageError as error:
            damage = error
    if not sides:
        raise damage
    return sides[0], "L" if modes <= {"1", "L"} else "RGB"


def square(picture: Any, side: int, scaled: int) -> Any:
    """The picture with its shorter side scaled to `scaled` and the middle of it cut out, `side` pixels wide and high.

    As torchvision's Resize and CenterCrop have it.
    """
    shorter = min(picture.size)
    if shorter != scaled:
        from PIL import Image

        size = [int(scaled * length / shorter) for length in picture.size]
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((length - side) / 2) for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def resized_box(picture: Any, box: Sequence[int], side: int) -> Any:
    """The picture's box (top, left, height, width) scaled to `side`, as torchvision's resized_crop has it."""
    from PIL import Image

    top, left, height, width = box
    return picture.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BILINEAR)
