"""Standard output and error, as commands write to them. What nobody can read ends no work."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


def say(text: object) -> None:
    """Print at once; once nobody reads any more, or a disk is full, nothing is written from then on.

    Letters that the output's encoding lacks become question marks.
    """
    failure = _write(_spelt(f"{text}\n", sys.stdout), sys.stdout)
    if failure is not None and not isinstance(failure, BrokenPipeError):  # by which `| head -1` says that it has enough
        warn(f"standard output ends here: {failure.strerror}")


def warn(text: object) -> None:
    """The same on standard error, which spells any letter by itself."""
    _write(f"{text}\n", sys.stderr)


class Terminal:
    """Standard output as rich takes it, written to as by `say`: it may be closed while its bars are drawn."""

    def __init__(self) -> None:
        self.stream = sys.stdout

    def write(self, text: str) -> None:
        _write(_spelt(text, self.stream), self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def on_terminal() -> bool:
    """Whether standard output is one; it is None where whoever started the process closed it."""
    return sys.stdout is not None and sys.stdout.isatty()


def encoding(stream: TextIO | None) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def _spelt(text: str, stream: TextIO | None) -> str:
    return text.encode(encoding(stream), "replace").decode(encoding(stream))


def _write(text: str, stream: TextIO | None) -> OSError | None:
    """What the system has against it, once: from then on the stream leads nowhere."""
    if stream is None:
        return None
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # also for what is buffered, which the end of the process would write
        os.close(nowhere)
        return error
    return None
