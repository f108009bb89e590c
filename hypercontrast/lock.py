"""One process at a time trains in a run's folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypercontrast.config import UsageError, access

try:
    import fcntl
except ImportError:  # not on this system: nothing is locked
    fcntl = None  # type: ignore[assignment]


_held: set[tuple[int, str]] = set()  # (process, folder): a fork has its parent's set, and none of its locks


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it as the process that trains there; a new one that stays empty goes again.

    The system lets go of it however the process ends. Raises UsageError if another process holds it, or this one
    already, or if it cannot be written to.
    """
    path, key = folder / ".lock", (os.getpid(), os.path.realpath(folder))
    if key in _held:  # the system would give it again, and take back both at the end of the second
        raise UsageError(f"{folder} is being trained by this process already")
    with access(folder, "written"):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        # Whatever else stands there under this name is neither followed nor emptied.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if not _take(descriptor):
            raise UsageError(f"{folder} is being trained by another process")
        _held.add(key)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                if made:
                    folder.rmdir()
    finally:
        os.close(descriptor)
        _held.discard(key)


def _take(descriptor: int) -> bool:
    """Take the lock, if it can be had; where there are no locks, that is as good."""
    if fcntl is None:
        return True
    try:
        # A lock of this process: one of the open file would live on in the processes that decode pictures for it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # others come from file systems without locks
    return os.fstat(descriptor).st_nlink > 0  # else its holder ended, and removed it, since it was opened
