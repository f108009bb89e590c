"""The commands' arguments: what is refused is one line."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from hypercontrast.config import UsageError


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def non_negative(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return found


def writable(file: Path) -> Path:
    """The file, whose folder is there from now on: a command that ends by writing it learns first if it cannot.

    Raises: UsageError.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise UsageError(f"--output must be where files can be written: {error}") from None
    return file
