"""Temporary files of writes: what they mean, and how those that a dead run left are settled.

The name of a temporary file says which run made it and for which file:

* ``.kancompile-RUN.first.NAME`` and ``.kancompile-RUN.new.NAME``: the new content of the first file and of the others,
* ``.kancompile-RUN.old.NAME``: what stood there before,
* ``.kancompile-RUN.probe``: nothing, to see whether files can be created.

A set is complete from the moment that its first file has its name: then no ``first`` is left, or it is the same file as the one
that bears the name. What is missing of a complete set gets its name; of any other set, everything is taken back. Nothing that
stands under a name is replaced in doing so.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

PREFIX = ".kancompile-"
PROBE_SUFFIX = ".probe"
_NAME = re.compile(
    re.escape(PREFIX) + r"(?P<run>[0-9a-z_]{8})\.(?:probe|(?P<kind>first|new|old)\.(?P<name>.+))", re.DOTALL
)
_DEAD_SECONDS = 86_400.0


def new_run() -> str:
    """Make up the name of a run."""
    return secrets.token_hex(4)


@dataclass(frozen=True)
class Part:
    """One file of a set, on its way to its name; every step can be repeated.

    Attributes:
        path: the name.
        run: the run.
        is_first: whether it is the one that the others are about.
    """

    path: Path
    run: str
    is_first: bool = False

    @property
    def new(self) -> Path:
        """Where the new content waits."""
        return self.path.with_name(f"{PREFIX}{self.run}.{'first' if self.is_first else 'new'}.{self.path.name}")

    @property
    def old(self) -> Path:
        """Where what stood under the name is kept."""
        return self.path.with_name(f"{PREFIX}{self.run}.old.{self.path.name}")

    @property
    def names(self) -> tuple[Path, Path]:
        """All temporary names."""
        return self.new, self.old

    @property
    def is_placed(self) -> bool:
        """Whether the name stands for the new content, which is linked to both."""
        return _are_same(self.new, self.path)

    def set_aside(self) -> None:
        """Free the name."""
        if os.path.lexists(self.path) and not self.is_placed and not os.path.lexists(self.old):
            os.rename(self.path, self.old)

    def keep_old(self) -> None:
        """Keep what stands under the name while it still does."""
        try:
            os.link(self.path, self.old, follow_symlinks=False)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            shutil.copy2(self.path, self.old, follow_symlinks=False)

    def place(self) -> None:
        """Give the new content its name.

        Raises:
            FileExistsError: something stands under it.
        """
        if self.is_placed or not os.path.lexists(self.new):
            return
        try:
            os.link(self.new, self.path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links; the lock keeps other runs from taking the name meanwhile
            if os.path.lexists(self.path):
                raise
            os.rename(self.new, self.path)

    def take_back(self) -> None:
        """Free the name of the new content, and give it back to the old."""
        if self.is_placed:
            self.path.unlink()
        self.restore()

    def restore(self) -> None:
        """Give the old content its name where nothing has it; its last copy is never removed."""
        if os.path.lexists(self.old) and not os.path.lexists(self.path):
            os.rename(self.old, self.path)

    def clear(self) -> None:
        """Remove the temporary files."""
        self.restore()
        self.old.unlink(missing_ok=True)
        self.new.unlink(missing_ok=True)


def settle_left_overs(folder: Path, is_locked: bool) -> None:
    """Complete or take back what dead runs left in a folder, and remove their temporary files.

    Args:
        folder: it may be absent.
        is_locked: whether its lock is held, so that no other run lives; else only what is a day old is taken for dead.
    """
    runs: dict[str, list[re.Match[str]]] = {}
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            found = _NAME.fullmatch(entry.name)
            if found is not None and (
                is_locked or entry.stat(follow_symlinks=False).st_mtime < time.time() - _DEAD_SECONDS
            ):
                runs.setdefault(found["run"], []).append(found)
    for run, files in runs.items():
        with contextlib.suppress(OSError):  # the next run tries again
            _settle(folder, run, files)


def _settle(folder: Path, run: str, files: list[re.Match[str]]) -> None:
    firsts = {found["name"] for found in files if found["kind"] == "first"}
    names = {found["name"] for found in files if found["name"] is not None}
    parts = [Part(folder / name, run, name in firsts) for name in sorted(names, key=lambda name: name in firsts)]
    is_complete = all(part.is_placed for part in parts if part.is_first)
    for part in parts:
        if not is_complete:
            part.take_back()
        elif not part.is_first and not os.path.lexists(part.path):
            part.place()
    for part in parts:
        part.clear()
    (folder / f"{PREFIX}{run}{PROBE_SUFFIX}").unlink(missing_ok=True)


def _are_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except OSError:
        return False
