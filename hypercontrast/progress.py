"""What a person sees of a command: flags, mistakes, a progress bar on a terminal and plain lines elsewhere, commands to
copy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from hypercontrast.config import UsageError
from hypercontrast.output import Terminal, on_terminal, say, warn


def python() -> str:
    """What to type for the Python that runs now: plain `python` only where that is the one."""
    if shutil.which("python") == sys.executable:
        return "python"
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else relative


def command(name: str) -> str:
    """What to type for a command of ours, in the way that the one running now was typed."""
    program = Path(sys.argv[0]).name
    if program == "hypercontrast":
        return f"hypercontrast {name}"
    return f"{python()} -m hypercontrast{' ' if program == '__main__.py' else '.'}{name}"


def fail(code: int, message: str) -> int:
    """Say in one line on stderr why a command failed; returns its exit code."""
    warn(f"error: {' '.join(message.split())}")
    return code


class Parser(argparse.ArgumentParser):
    """Mistakes as one line, as in training."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Flags may also stand among several words, as in `table all --markdown runs/*`."""
        return self.parse_intermixed_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        say(self.format_help().rstrip())

    def add_output_flags(self) -> None:
        self.add_argument("--quiet", action="store_true", help="print the result alone")
        self.add_argument("--json", action="store_true", help="print the result alone, as JSON")

    def parse_with_output(self, argv: Sequence[str] | None) -> tuple[dict[str, Any], bool]:
        """The arguments by name, `quiet` among them, and whether the result is wanted as JSON, which is quiet too."""
        args = vars(self.parse_args(argv))
        as_json = args.pop("json")
        args["quiet"] |= as_json
        return args, as_json


def to_json(result: Any) -> str:
    return json.dumps(result, indent=1)


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Rows of cells as lines, in columns of one width; those in `right`, counted from 0, stand to the right."""
    *widths, last = (max(map(len, column)) for column in zip(*rows, strict=True))
    widths.append(last if len(widths) in right else 0)  # nothing follows it
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


class Progress:
    """Lines such as those of epochs; on a terminal (with rich installed) a bar of what is under way below them."""

    def __init__(self, epochs: int = 0, steps: int = 0, *, silent: bool = False) -> None:
        self.epochs, self.steps, self.silent = epochs, steps, silent
        self._bar = None if silent or not on_terminal() else _rich_bar()

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=self.steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def start_epoch(self, epoch: int, done: int = 0) -> None:
        self.start(f"epoch {epoch}/{self.epochs}", done)

    def start(self, title: str, done: int = 0) -> None:
        """Begin another `steps` steps under this title, with `done` of them behind."""
        if self._bar:
            self._bar.reset(self._task, description=title, total=self.steps, completed=done)

    def begin(self, title: str) -> None:
        """Begin work of unknown length under this title."""
        if self._bar:
            self._bar.reset(self._task, description=title, total=None)

    def step(self) -> None:
        if self._bar:
            self._bar.advance(self._task)

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        self.say(epoch_line(record, self.epochs))

    def say(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, highlight=False, markup=False)
        elif not self.silent:
            say(line)


@contextmanager
def working(title: str, *, silent: bool) -> Iterator[None]:
    """A bar on a terminal for work of unknown length, such as reading a data set."""
    with Progress(silent=silent) as progress:
        progress.begin(title)
        yield


def epoch_line(record: Mapping[str, Any], epochs: int) -> str:
    """Loss and, where the epoch was measured, accuracy of head and class means and the distance to the simplex ETF,
    within 80 columns.
    """
    width = len(str(epochs))
    measured = ""
    if "accuracy" in record:
        measured = (
            f"  acc {record['accuracy']:5.1%}  proto acc {record['prototype_accuracy']:5.1%}"
            f"  to ETF {record['distance_etf']:.3f}"
        )
    loss, seconds = f"loss {record['loss']:7.4f}", f"{record['seconds']:5.1f} s"
    return f"epoch {record['epoch']:{width}d}/{epochs}  {loss}{measured}  {seconds}"


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=Terminal()),  # type: ignore[arg-type]
        transient=True,
    )
