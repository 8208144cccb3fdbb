"""Bound what an archive unpacks to by what its directory says, before anything is unpacked.

Deflate packs a thousand bytes of zeros into one, and entries of a directory may share their bytes: a file of megabytes can
unpack to more than memory holds. Archives of ``torch.save`` and ``numpy.savez`` store their parts as they are.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from kancompile.errors import KanCompileError

_USUAL = 8
"""How many times its size an archive of real data may unpack to."""


def check_unpacked(path: Path, who: str, most: int, is_read: Callable[[str], bool] = lambda name: True) -> None:
    """Refuse a zip archive that unpacks to too much; other files, and what an archive stores as it is, pass.

    Args:
        path: the file.
        who: what errors call it.
        most: bytes that may be unpacked, or eight times the size of the file where that is more.
        is_read: which entries are read at all.

    Raises:
        KanCompileError: it unpacks to more.
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist() if is_read(entry.filename))
    packed = path.stat().st_size
    if unpacked > max(_USUAL * packed, most):
        raise KanCompileError(
            f"{who}: found {packed:,} bytes that unpack to {unpacked:,}, expected at most {max(_USUAL * packed, most):,}; "
            "where you trust the file, save it again without compression"
        )
