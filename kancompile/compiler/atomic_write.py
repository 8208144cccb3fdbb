"""Write files that belong together so that nobody ever meets half of one, or one beside those of another run.

Contents go to temporary files in the destination's folder, reach the disk, and only then take their final names. No system
call gives several names at once, so they are given in an order:

* The first file exists: the others are set aside, the new first file replaces the old one, the others get their names.
* It does not: the others get their names, then the first file.

So a run that is killed in between leaves a file without its companions, which every reader notices, and not beside those of an
earlier run, which none would. What it left is settled by the next run in the folder (``unfinished_writes``).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kancompile.compiler.folder_lock import locked
from kancompile.compiler.unfinished_writes import PREFIX, PROBE_SUFFIX, Part, new_run, settle_left_overs
from kancompile.errors import KanCompileError, reason, shown


def check_destinations(paths: Iterable[Path], force: bool = False) -> None:
    """Refuse, before any work starts, destinations that could not be written at its end; settle what dead runs left there.

    A missing folder is fine where it could be created; it is not created here.

    Args:
        paths: files to be written.
        force: whether existing files may be replaced.

    Raises:
        KanCompileError: a destination exists (without ``force``), be it as a link to nothing, is a folder, or lies in a folder
            that cannot be created or written.
    """
    paths = list(paths)
    for path in paths:
        _check_name(path)
    for folder in {_folder(path) for path in paths}:
        with (
            contextlib.suppress(KanCompileError),
            locked(folder, wait=0) as is_held,
        ):  # a run that lives settles its own
            settle_left_overs(folder, is_held)
    for path in paths:
        if path.is_dir():
            raise KanCompileError(f"output {str(path)!r}: found a folder, expected a file name; give another output")
        if os.path.lexists(path) and not (path.is_symlink() or path.is_file()):
            raise KanCompileError(
                f"output {str(path)!r}: found a device, pipe or socket, expected a file name; give another output"
            )
        if os.path.lexists(path) and not force:
            raise KanCompileError(
                f"output {str(path)!r}: {'link' if path.is_symlink() else 'file'} exists, expected a new name; pass force=True "
                "(--force) to replace it"
            )
        existing = path.absolute().parent
        while not existing.exists():
            if existing.is_symlink():
                raise KanCompileError(
                    f"output {str(path)!r}: {str(existing)!r} is a link to nothing, expected a folder; give another output"
                )
            existing = existing.parent
        if not existing.is_dir():
            raise KanCompileError(
                f"output {str(path)!r}: {str(existing)!r} is a file, expected a folder; give another output"
            )
        _probe(existing, path)


def _check_name(path: Path) -> None:
    """Refuse what no file can be called, be it by its temporary name alone, which is longer."""
    try:
        for name in (path, *Part(path, new_run(), is_first=True).names):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                os.lstat(name)
        _folder(path)
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a null byte, a loop of links
        raise KanCompileError(
            f"output {shown(str(path))}: no file can be written under this name ({reason(error)}); give a shorter or another one"
        ) from error


def _folder(path: Path) -> Path:
    return path.absolute().parent.resolve()  # which two names of one folder share


def _probe(folder: Path, path: Path) -> None:
    # os.access answers yes for root and for read-only mounts that it does not know: creating a file is the only proof
    try:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=PREFIX, suffix=PROBE_SUFFIX)
    except OSError as error:
        raise KanCompileError(
            f"output {str(path)!r}: cannot write in {str(folder)!r} ({error.strerror}); "
            "give a folder that you may write to"
        ) from error
    os.close(descriptor)
    with contextlib.suppress(OSError):  # what stays is removed by the next run
        os.unlink(name)


def write_atomically(contents: Mapping[Path, bytes | memoryview], force: bool = False) -> None:
    """Write all files or none, each complete under its name or absent.

    Files of one folder belong together; the first of them is the one that the others are about. Once it has its name the others
    follow even through Ctrl-C. Of two runs without ``force`` one is refused, whenever they come.

    Args:
        contents: bytes of each destination; missing folders are created.
        force: whether existing files may be replaced.

    Raises:
        KanCompileError: as :func:`check_destinations`, or the disk refuses.
    """
    check_destinations(contents, force)
    folders = sorted({_folder(path) for path in contents})
    try:
        with contextlib.ExitStack() as stack:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                settle_left_overs(folder, stack.enter_context(locked(folder)))
            check_destinations(contents, force)  # again, now that nobody else writes
            _write(
                [_Set({p: data for p, data in contents.items() if _folder(p) == folder}, force) for folder in folders]
            )
    except FileExistsError as error:
        raise KanCompileError(
            f"output {str(error.filename2 or error.filename)!r}: another program has just written it; give another output"
        ) from error
    except OSError as error:
        where = error.filename or next(iter(contents))
        raise KanCompileError(
            f"output {str(where)!r}: cannot be written ({error.strerror}); free space or give another folder"
        ) from error


def _write(sets: Sequence[_Set]) -> None:
    try:
        for one in sets:
            one.stage()
        interrupt = _in_spite_of_interrupts(_Set.name, sets)
    except BaseException:
        _in_spite_of_interrupts(_Set.take_back, sets)
        raise
    _in_spite_of_interrupts(_Set.clear, sets)
    if interrupt is not None:
        raise interrupt


def _in_spite_of_interrupts(step: Callable[[_Set], None], sets: Sequence[_Set]) -> KeyboardInterrupt | None:
    """Take a step, which does nothing where it is done, with every set, from the start whenever Ctrl-C interrupts."""
    interrupt = None
    while True:
        try:
            for one in sets:
                step(one)
            return interrupt
        except KeyboardInterrupt as error:
            interrupt = error


class _Set:
    """Files of one folder on their way."""

    def __init__(self, contents: Mapping[Path, bytes | memoryview], force: bool) -> None:
        run = new_run()
        self.contents, self.force = contents, force
        self.parts = [Part(path, run, is_first=number == 0) for number, path in enumerate(contents)]
        self.staged: list[Part] = []
        self.existing = {path for path in contents if os.path.lexists(path)}
        self.replaces = force and self.parts[0].path in self.existing

    def stage(self) -> None:
        """Write all contents to the disk, under temporary names; the first one first, which is how dead runs are understood."""
        for part in self.parts:
            with part.new.open("xb") as file:
                file.write(self.contents[part.path])
                file.flush()
                os.fsync(file.fileno())
            self.staged.append(part)

    def name(self) -> None:
        """Give all names."""
        first, *others = self.parts
        if self.replaces:
            if os.path.lexists(first.new):
                for part in others:
                    part.set_aside()
                first.keep_old()
                os.replace(first.new, first.path)
            for part in others:
                part.place()
        else:
            for part in others:
                if self.force:
                    part.set_aside()
                part.place()
            first.place()

    def take_back(self) -> None:
        """Restore what was there before, as far as the disk lets."""
        for part in self.staged:
            with contextlib.suppress(OSError):
                if part.is_placed or not os.path.lexists(part.new):
                    if os.path.lexists(part.old):
                        os.replace(part.old, part.path)
                    elif part.path not in self.existing:
                        part.path.unlink(missing_ok=True)
                part.restore()
        self.clear()

    def clear(self) -> None:
        """Remove temporary files; the first one last, which says that the set is not complete."""
        for part in reversed(self.parts):
            with contextlib.suppress(OSError):
                part.clear()
