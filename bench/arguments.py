"""What the commands' arguments have in common. What is refused is one line."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

from bench.record import ROOT
from hypercontrast.config import UsageError


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
        return int(text)

    return number


def non_negative(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return found


def add_output(parser: argparse.ArgumentParser) -> None:
    """--output of a command that asks `new_folder` where it is not given."""
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: a new one, runs/bench/DATE-DEVICE or DATE-DEVICE-2 ..."
    )


def new_folder(name: str, under: str = "runs/bench") -> Path:
    """DATE-NAME there; where earlier runs of the day have it, DATE-NAME-2, -3 ..., so that none loses its record."""
    first = f"{time.strftime('%Y-%m-%d')}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}"
    names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    return next(folder for folder in map((ROOT / under).joinpath, names) if not folder.exists())


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
