"""Write files so that a reader, a full disk or Ctrl-C never meets half of one.

Contents go to temporary files in the destination's folder, reach the disk, and only then take their final names.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from kancompile.errors import KanCompileError


def check_destinations(paths: Iterable[Path], force: bool = False) -> None:
    """Refuse, before any work starts, destinations that could not be written at its end.

    A missing folder is fine where it could be created; it is not created here.

    Args:
        paths: files to be written.
        force: whether existing files may be replaced.

    Raises:
        KanCompileError: a destination exists (without ``force``), is a folder, or lies in a folder that cannot be
            created or written.
    """
    for path in paths:
        if path.is_dir():
            raise KanCompileError(f"output {str(path)!r}: found a folder, expected a file name; give another output")
        if path.exists() and not force:
            raise KanCompileError(
                f"output {str(path)!r}: file exists, expected a new name; pass force=True (--force) to replace it"
            )
        existing = path.absolute().parent
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise KanCompileError(
                f"output {str(path)!r}: {str(existing)!r} is a file, expected a folder; give another output"
            )
        _probe(existing, path)


def _probe(folder: Path, path: Path) -> None:
    # os.access answers yes for root and for read-only mounts that it does not know: creating a file is the only proof
    try:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".kancompile-")
    except OSError as error:
        raise KanCompileError(
            f"output {str(path)!r}: cannot write in {str(folder)!r} ({error.strerror}); "
            "give a folder that you may write to"
        ) from error
    os.close(descriptor)
    os.unlink(name)


def write_atomically(contents: Mapping[Path, bytes], force: bool = False) -> None:
    """Write all files or none, each complete under its name or absent.

    Once the first file has its name the others follow even through Ctrl-C, so that a pair always belongs together.

    Args:
        contents: bytes of each destination; missing folders are created.
        force: whether existing files may be replaced.

    Raises:
        KanCompileError: as :func:`check_destinations`, or the disk refuses.
    """
    check_destinations(contents, force)
    staged: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            staged[path] = _stage(path, data)
        _commit(staged)
    except OSError as error:
        where = error.filename or next(iter(contents))
        raise KanCompileError(
            f"output {str(where)!r}: cannot be written ({error.strerror}); free space or give another folder"
        ) from error
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _stage(path: Path, data: bytes) -> Path:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; the result should look like one that open() made
        os.chmod(name, 0o666 & ~_umask())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _commit(staged: dict[Path, Path]) -> None:
    new = [path for path in staged if not path.exists()]
    try:
        _rename(staged)
    except KeyboardInterrupt:
        _rename(staged)
        raise
    except OSError:
        for path in new:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def _rename(staged: dict[Path, Path]) -> None:
    for path, temporary in staged.items():
        if temporary.exists():
            os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
