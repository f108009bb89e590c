"""Cross-entropy against NONL on 5,000 real digits, watched while they train, and a page of pictures at the end.

    python -m hypercontrast.demo [--output DIR] [--epochs N] [--limit N] [--quiet]

Two runs of the mnist5k recipes on the CPU or one GPU, about a minute on two CPU cores. Nothing is downloaded.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from hypercontrast.checkpoint import CheckpointError
from hypercontrast.config import UsageError, configure
from hypercontrast.lock import locked
from hypercontrast.output import Terminal, on_terminal, say
from hypercontrast.progress import Parser, command, fail
from hypercontrast.report import outcome, write_report
from hypercontrast.runs import LOSS_TITLES, load_runs
from hypercontrast.train import TrainingError, train

LOSSES = ("ce", "nonl")
COLUMNS = ("run", "epoch", "loss", "accuracy", "prototype accuracy", "distance to ETF", "to frame")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for a mistake in the call, 1 for a failure, 130 if interrupted."""
    try:
        args = parser().parse_args(argv)
        report = run(Path(args.output), args.epochs, args.limit, quiet=args.quiet)
    except (UsageError, ImportError, OSError) as error:
        return fail(2, str(error))
    except (TrainingError, CheckpointError) as error:
        return fail(1, str(error))
    except KeyboardInterrupt:
        return fail(130, f"interrupted; start again with: {command('demo')}")
    if args.quiet:
        say(report)
    else:
        say(f"\nReport with pictures: {report}")
        say(f"Next, your own run:   {command('train')} --loss nonl --dataset mnist5k --neck linear")
    return 0


def run(output: Path, epochs: int, limit: int, *, quiet: bool = False) -> Path:
    """Train both losses into `output`, showing every epoch, and write output/report.html; returns its path."""
    folders = [output / loss for loss in LOSSES]
    configs = [
        configure(loss=loss, dataset="mnist5k", epochs=epochs, limit=limit, run_dir=str(folder), quiet=True)
        for loss, folder in zip(LOSSES, folders, strict=True)
    ]
    # Only ever delete what is a run, and all of them or none: another demo may be training one.
    runs = [folder for folder in folders if all((folder / n).is_file() for n in ("config.yaml", "metrics.jsonl"))]
    with ExitStack() as held:
        for folder in runs:
            held.enter_context(locked(folder))
        for folder in runs:
            shutil.rmtree(folder)
    if quiet:
        for config in configs:
            train(config)
        return write_report(folders, output / "report.html")
    say("Training with cross-entropy (CE), then with NONL, on real handwritten digits (mnist5k).\n")
    with _table() as table:
        for config in configs:
            title = LOSS_TITLES[config.loss]
            table.training(title)

            def show(record: dict[str, Any], title: str = title) -> None:
                table.add(_row(title, record, epochs))

            train(config, on_epoch=show)
    say("\n" + textwrap.fill(outcome(load_runs(folders)), 96))
    return write_report(folders, output / "report.html")


def parser() -> Parser:
    parser = Parser(prog=command("demo"), description="Cross-entropy against NONL on 5,000 real digits.")
    parser.add_argument("--output", default="runs/demo", help="folder to write; earlier demo runs in it are replaced")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--limit", type=int, default=0, help="use at most this many pictures; 0 for all")
    parser.add_argument("--quiet", action="store_true", help="print the report's path alone")
    return parser


def _row(title: str, record: Mapping[str, Any], epochs: int) -> tuple[str, ...]:
    return (
        title,
        f"{record['epoch']}/{epochs}",
        f"{record['loss']:.4f}",
        f"{record['accuracy']:.1%}",
        f"{record['prototype_accuracy']:.1%}",
        f"{record['distance_etf']:.3f}",
        f"{record['distance_frame']:.3f}",
    )


class _PlainTable:
    """Aligned lines as they come, for files and pipes."""

    def __enter__(self) -> _PlainTable:
        self.add(COLUMNS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def training(self, title: str) -> None:
        pass

    def add(self, row: Sequence[str]) -> None:
        cells = [f"{cell:>{max(len(column), 7)}}" for cell, column in zip(row[1:], COLUMNS[1:], strict=True)]
        say("  ".join([f"{row[0]:<4}", *cells]))


class _LiveTable:
    """The same on a terminal, as one table that grows in place."""

    def __init__(self) -> None:
        from rich import box
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table

        self._rich = Table(box=box.SIMPLE_HEAD)
        for index, column in enumerate(COLUMNS):
            self._rich.add_column(column, justify="right" if index else "left")
        console = Console(file=Terminal())  # type: ignore[arg-type]
        self._live = Live(self._rich, console=console, refresh_per_second=4)

    def __enter__(self) -> _LiveTable:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.caption = None
        self._live.stop()

    def training(self, title: str) -> None:
        self._rich.caption = f"training {title} …"
        if self._rich.row_count:
            self._rich.add_section()

    def add(self, row: Sequence[str]) -> None:
        self._rich.add_row(*row)


def _table() -> _PlainTable | _LiveTable:
    if on_terminal():
        try:
            return _LiveTable()
        except ImportError:
            pass  # without rich the plain lines say the same
    return _PlainTable()


if __name__ == "__main__":
    sys.exit(main())
