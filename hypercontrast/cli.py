"""The command `hypercontrast`: every command line of the package under one name.

    hypercontrast COMMAND [ARGUMENT ...]

Each is the `main` of a module, which is imported only when it is called: `hypercontrast train` is
`python -m hypercontrast.train`. They share their exit codes, see `EXIT_CODES`.
"""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Sequence

from hypercontrast import __version__
from hypercontrast.output import say
from hypercontrast.progress import aligned, fail

# name: (module, what it does)
COMMANDS = {
    "doctor": ("doctor", "check this installation, and say how to mend what is missing"),
    "demo": ("demo", "train cross-entropy and NONL on real digits, and compare them on a page"),
    "train": ("train", "train a classifier; writes a run folder"),
    "evaluate": ("evaluate", "fixed prototypes against trained probes, on a run"),
    "transfer": ("transfer", "linear evaluation of a run on other data sets"),
    "corruptions": ("corruptions", "errors of a run on corrupted pictures"),
    "table": ("table", "the paper's tables beside runs"),
    "report": ("report", "one page of a run, or comparing several"),
    "check-ddp": ("ddp_command", "is the gradient of a loss exact under DDP?"),
    "completion": ("completion", "the shell's completion of these words and their flags"),
}
EXIT_CODES = """\
0    done
1    the work failed: training diverged, a rank was lost, a part is missing, a gradient is not exact
2    a mistake in the call, or in a file or folder that it names; one line says which
130  stopped by Ctrl-C; one line says what was saved
143  stopped by SIGTERM; training saves before"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command that `argv`, by default that of the process, names."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        say(_help())
        return 0
    if name == "--version":
        say(f"hypercontrast {__version__}")
        return 0
    if name not in COMMANDS:
        return fail(2, f"command must be one of {', '.join(COMMANDS)}, got {name!r}")
    try:
        return importlib.import_module(f"hypercontrast.{COMMANDS[name][0]}").main(rest)
    except KeyboardInterrupt:  # while it was imported
        return fail(130, "interrupted before anything was done")


def _help() -> str:
    commands = aligned([(name, does) for name, (_, does) in COMMANDS.items()])
    return f"""\
usage: hypercontrast COMMAND [ARGUMENT ...]

{textwrap.indent(commands, "  ")}

hypercontrast COMMAND --help tells more; --version is the package's.

exit codes
{textwrap.indent(EXIT_CODES, "  ")}"""
