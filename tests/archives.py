"""Archives whose directory says something else than their content."""

from __future__ import annotations

import zipfile
from pathlib import Path


def declare(path: Path, name: str, size: int) -> None:
    """Write into the directory of a zip archive that an entry unpacks to so many bytes."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.getinfo(name).file_size = size
        archive.writestr("written", b"")  # the directory is written anew where something is added
