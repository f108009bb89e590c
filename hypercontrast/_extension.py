"""Finds the compiled extension hypercontrast._C, where one was built; it is never built at import.

Without it the Python twins run: the same results, in more launches on a GPU and more passes over memory on a CPU.
HYPERCONTRAST_NO_EXT=1 asks for them.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from types import ModuleType

import torch

# Equal to kRevision of csrc/negative_buffer.h: an extension left over from an older build is not used.
REVISION = 8


@cache
def found() -> tuple[ModuleType | None, str]:
    """The extension, or None and why."""
    if os.environ.get("HYPERCONTRAST_NO_EXT") == "1":
        return None, ""
    try:
        module = importlib.import_module("hypercontrast._C")
    except ImportError as error:
        return None, str(error)
    built = getattr(module, "TORCH", "unknown"), getattr(module, "REVISION", "unknown")
    wanted = torch.__version__.split("+")[0], REVISION
    if built == wanted:
        return module, ""
    return None, (
        f"it was built for torch {built[0]}, revision {built[1]}, not for torch {wanted[0]}, revision {wanted[1]}"
    )


def quietly() -> ModuleType | None:
    """The extension, or None."""
    return found()[0]


@cache
def load() -> ModuleType | None:
    """The extension, or None and one warning that says why and how to build it (none where it was asked for)."""
    module, reason = found()
    if reason:
        warnings.warn(
            f"hypercontrast runs without its C++ extension ({reason}); the results are the same. To build it, run "
            "`python setup.py build_ext --inplace` in a checkout or `pip install --no-build-isolation -e .`; "
            "HYPERCONTRAST_NO_EXT=1 does without it quietly.",
            stacklevel=2,
        )
    return module
