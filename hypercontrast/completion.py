"""The shell's completion of `hypercontrast`, its commands and their flags, by shtab.

eval "$(hypercontrast completion bash)"     in ~/.bashrc; with zsh in ~/.zshrc, after compinit
hypercontrast completion tcsh > FILE        once, and in ~/.tcshrc: source FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Literal, get_args, get_origin, get_type_hints

from hypercontrast.cli import COMMANDS
from hypercontrast.config import Config, UsageError, recipe_names
from hypercontrast.output import say
from hypercontrast.progress import Parser, command, fail

SHELLS = ("bash", "zsh", "tcsh")
FOLDERS = ("run", "runs", "reference", "run_dir", "data_root", "resume")  # arguments that name one


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for a mistake in the call."""
    try:
        shell = parser().parse_args(argv).shell
        say(script(shell))
    except UsageError as error:
        return fail(2, str(error))
    return 0


def parser() -> Parser:
    parser = Parser(
        prog=command("completion"),
        description="The shell's completion of hypercontrast, to evaluate in its start-up file.",
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def script(shell: str) -> str:
    """What the shell evaluates. Raises UsageError where shtab is not installed."""
    try:
        import shtab
    except ImportError:
        raise UsageError("completion needs shtab: pip install 'hypercontrast[train]'") from None
    tree = argparse.ArgumentParser("hypercontrast")
    tree.add_argument("--version", action="store_true")
    commands = tree.add_subparsers()
    for name, (module, does) in COMMANDS.items():
        if name == "train":
            _add_settings(commands.add_parser(name, help=does))
        else:
            its = importlib.import_module(f"hypercontrast.{module}").parser()
            commands.add_parser(name, help=does, parents=[its], add_help=False)
    for flags in commands.choices.values():
        for action in flags._actions:  # shtab reads this attribute
            if action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.dest == "output":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(tree, shell)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Flags as tyro makes them of the config's fields."""
    hints = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        flag, hint = f"--{field.name.replace('_', '-')}", hints[field.name]
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction)
        else:
            choices = get_args(hint) if get_origin(hint) is Literal else None
            names = ["auto", "none", *recipe_names()] if field.name == "recipe" else choices
            parser.add_argument(flag, choices=names)


if __name__ == "__main__":
    sys.exit(main())
