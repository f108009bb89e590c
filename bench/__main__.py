"""The bench's commands: `python -m bench SUBCOMMAND ...`; none is the matrix, so `python -m bench --quick` is one too.

A command is a module with `add_arguments(parser)` and `run(args)`, which returns the exit code. It is imported when it
is asked for. Programs of their own beside them: `python -m bench.gpu_check`, `bench.study`, `bench.independent`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from hypercontrast.config import UsageError
from hypercontrast.progress import Parser, fail

SUBCOMMANDS = {
    "matrix": "time, memory and error of every form of a loss, as a table, a CSV file and pictures (the default)",
    "diff": "two CSV files: what became slower or less exact",
    "plot": "pictures of CSV files",
    "roofline": "share of a matmul and a copy of the same run",
    "profile": "one case, kernel by kernel",
    "step": "where the time of a training step goes",
    "communication": "bytes and time of a step over many GPUs",
    "tune": "configurations of the kernels",
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    named = bool(given) and given[0] in SUBCOMMANDS
    name = given.pop(0) if named else "matrix"
    if given and not given[0].startswith("-") and not named:
        return fail(2, f"the command must be one of {', '.join(SUBCOMMANDS)}, got {given[0]}")
    module = importlib.import_module(f"bench.{name}")
    parser = Parser(
        prog=f"python -m bench {name}", description=module.__doc__, epilog=None if named else overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args(given))
    except UsageError as error:
        return fail(2, str(error))


def overview() -> str:
    width = max(map(len, SUBCOMMANDS))
    return "\n".join(["commands:", *(f"  {name:{width}}  {what}" for name, what in SUBCOMMANDS.items())])


if __name__ == "__main__":
    sys.exit(main())
