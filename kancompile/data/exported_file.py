"""Load a ``.pt2`` file of ``torch.export``, if the caller says that its origin is trusted.

``torch.export.load`` unpickles parts of its archive, evaluates shape expressions with sympy and compiles names of the graph as
Python source. No check of the archive closes all of these doors, so that a file is either trusted or not opened at all.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from kancompile.errors import KanCompileError, reason


def opened(model: Any, trust: bool = False) -> Any:
    """Load a model that is given by the path of a ``.pt2`` file; any other is returned as it is.

    Raises:
        KanCompileError: see :func:`load_exported`.
    """
    return load_exported(Path(model), trust) if isinstance(model, str | os.PathLike) else model


def load_exported(path: Path, trust: bool = False) -> ExportedProgram:
    """Load an exported program; loading can run any code that the file holds.

    Args:
        path: a file of ``torch.export.save``.
        trust: whether the caller vouches for the file; without it nothing is read.

    Raises:
        KanCompileError: the file is not trusted, cannot be read, or is no archive of this version of PyTorch.
    """
    where = f"model {str(path)!r}"
    if not path.is_file():
        raise KanCompileError(f"{where}: cannot be read (no such file); give the path of a file of torch.export.save")
    if not trust:
        raise KanCompileError(
            f"{where}: found a .pt2 file, whose loading can run any code that it holds, so that it is opened only where its "
            "origin is trusted: give --trust-model (in Python trust=True) for a file of your own, or name the factory of the "
            "model and its checkpoint, which are read without running code from the file"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KanCompileError(f"{where}: cannot be read ({error.strerror})") from error
    try:
        return torch.export.load(io.BytesIO(content))
    except Exception as error:  # whatever foreign data breaks inside the loader is the data's fault
        raise KanCompileError(
            f"{where}: cannot be loaded ({reason(error)}); write it with torch.export.save of this version of PyTorch"
        ) from error
