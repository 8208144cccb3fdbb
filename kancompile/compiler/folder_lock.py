"""Keep two runs from writing into one folder at a time, by a lock that ends with the process, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kancompile.errors import KanCompileError

try:
    import fcntl
except ImportError:  # Windows has no locks of folders
    fcntl = None  # type: ignore[assignment]

WAIT_SECONDS = 60.0
_PAUSE_SECONDS = 0.02


@contextmanager
def locked(folder: Path, wait: float = WAIT_SECONDS) -> Iterator[bool]:
    """Hold the lock of a folder, without a file of its own.

    Args:
        folder: it exists.
        wait: seconds to wait for another run.

    Yields:
        whether the lock is held; ``False`` where the system or the file system has none.

    Raises:
        KanCompileError: another run holds it for longer.
    """
    descriptor = _opened(folder)
    try:
        yield descriptor is not None and _acquired(descriptor, folder, wait)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _opened(folder: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError:  # a folder may be writable and not readable
        return None


def _acquired(descriptor: int, folder: Path, wait: float) -> bool:
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                raise KanCompileError(
                    f"output {str(folder)!r}: another run is writing there; wait for it or give another folder"
                ) from None
            time.sleep(_PAUSE_SECONDS)
        except OSError:  # such as network file systems without locks
            return False
