"""What a command measured of a run: a JSON file in the run's folder, to which its later calls add."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hypercontrast.checkpoint import write_atomic
from hypercontrast.config import UsageError, holds

T = TypeVar("T")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Raises CheckpointError if it cannot be written."""
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())


def check_writable(path: Path) -> None:
    """Raise UsageError where a record could not be written, before hours go into it."""
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: no permission, or a read-only file system")


def read_record(
    path: Path,
    parse: Callable[[Any], T],
    rule: str = "must hold results of this command: delete it, or move it away",
) -> T | None:
    """What `parse` makes of an earlier call's record; None if there is none.

    Raises UsageError by this rule for a file that is no JSON, or of which `parse` raises as Python does for what is not
    there or of another type, or a ValueError of its own.
    """
    if not holds(path.parent, path.name):
        return None
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UsageError(f"{path} {rule}") from None
