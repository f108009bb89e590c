"""Standard output, as commands write to it."""

from __future__ import annotations

import os
import sys


def say(text: object) -> None:
    """Print at once; where nobody reads any more, as after `| head -1`, nothing is written from then on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # also for what is buffered, which the end of the process would write
        os.close(nowhere)
