"""Bound the texts in a pickle before PyTorch's restricted reader sees them.

Where that reader refuses something, ``torch.load`` searches its message for names, which takes time for the square of their
length: minutes for a name of 100 kB. Nothing is unpickled here; opcodes are only listed.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickletools import genops
from typing import IO

_LONGEST = 2_000
_LEGACY_PICKLES = 5
"""What ``torch.save`` wrote before 1.6: a magic number, a version, sizes of types, the object, names of its storages."""


def check_names(path: Path) -> None:
    """Refuse a file of ``torch.save`` with a text of more than 2,000 characters in its pickle.

    Raises:
        Exception: there is one, or the file holds no pickle; call it where whatever is raised is taken for the file's fault.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                _check(file)
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as file:
                    _check(file)


def _check(pickled: IO[bytes]) -> None:
    for _, value, _ in genops(pickled):
        if isinstance(value, str | bytes | bytearray) and len(value) > _LONGEST:
            raise ValueError(f"a text of {len(value):,} characters in its pickle, expected at most {_LONGEST:,}")
