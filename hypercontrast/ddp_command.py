"""`hc.check_ddp` from the command line.

hypercontrast check-ddp MODULE:NAME [--world-size N] [--dim D] [--num-classes K] [--timeout S] [--quiet | --json]
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from inspect import signature

from torch import Tensor

from hypercontrast.config import UsageError
from hypercontrast.ddp_check import check_ddp
from hypercontrast.output import say
from hypercontrast.progress import Parser, command, fail, to_json, working


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if exact; 1 if not, or if the loss fails; 2 with one line on stderr for a mistake in the call; 130 if
    interrupted.
    """
    try:
        args, as_json = parser().parse_with_output(argv)
        loss, silent = _named(args.pop("loss")), args.pop("quiet")
        with working(f"starting {args['world_size']} ranks and one process alone", silent=silent):
            verdict = check_ddp(loss, **args)
    except (UsageError, ValueError, TypeError) as error:
        return fail(2, str(error))
    except RuntimeError as error:
        return fail(1, str(error))
    except KeyboardInterrupt:
        return fail(130, "interrupted; the ranks were ended")
    say(to_json(asdict(verdict)) if as_json else verdict)
    return 0 if verdict else 1


def parser() -> Parser:
    parser = Parser(
        prog=command("check-ddp"), description="Does a loss give the exact gradient of the global batch under DDP?"
    )
    parser.add_argument(
        "loss",
        metavar="MODULE:NAME",
        help="function, module or class without arguments, (features [n, D], labels [n]) -> scalar; MODULE as imported"
        " from here",
    )
    defaults = signature(check_ddp).parameters
    for name, kind in (("world_size", int), ("dim", int), ("num_classes", int), ("timeout", float)):
        default = defaults[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"by default {default:g}")
    parser.add_output_flags()
    return parser


def _named(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """What MODULE:NAME names; an instance where it names a class."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UsageError(f"loss must be MODULE:NAME, got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules of the folder that the command is called in, as with python -m
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise UsageError(f"loss must name something that can be imported, got {name!r}: {error}") from None
    return found() if isinstance(found, type) else found
