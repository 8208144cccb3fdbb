"""Data that the command line names: a file of arrays, a folder of images, or a loader in the user's code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kancompile.data.image_folder import ImageFolder
from kancompile.data.imported_objects import call_with, found_object, neighbours
from kancompile.data.tables import TABLES, read_table
from kancompile.errors import KanCompileError

FORMS = "an .npz, .npy, .csv or .tsv file, a folder of images with --transform, or PACKAGE.MODULE:LOADER"


def open_data(
    spec: str,
    transform: str | None = None,
    *,
    target_columns: Sequence[str | int] = (),
    name: str = "calibration",
    seed: int = 0,
) -> Any:
    """Return what :func:`kancompile.data.calibration.load_calibration` and ``stream_batches`` read.

    Args:
        spec: path of an ``.npz``, ``.npy``, ``.csv`` or ``.tsv`` file; folder of images; ``PACKAGE.MODULE:LOADER`` or
            ``path/to/file.py:LOADER``, a function without arguments or a finished object: an iterable of batches such as a
            ``DataLoader``, an array or tensor ``[n, ...]``, or a pair ``(samples, labels)``.
        transform: ``PACKAGE.MODULE:TRANSFORM`` for images; see :class:`kancompile.data.image_folder.ImageFolder`.
        target_columns: columns of a table that are labels, by name or number.
        name: what errors call the data.
        seed: of the order of images.

    Raises:
        KanCompileError: nothing of the kind there, or a transform that is missing or not wanted.
    """
    path = Path(spec)
    if path.is_dir():
        if transform is None:
            raise KanCompileError(
                f"{name} {spec!r}: found a folder and no --transform, expected the function that prepared the images of the "
                "training: --transform PACKAGE.MODULE:TRANSFORM, which gets a PIL image and returns an array or tensor"
            )
        return ImageFolder(path, _transform(transform), name, seed)
    if transform is not None:
        raise KanCompileError(
            f"--transform {transform!r}: {name} is {spec!r}, expected a folder of images; leave it out"
        )
    if target_columns and path.suffix not in TABLES:
        raise KanCompileError(
            f"--target-column {target_columns[0]!r}: {name} is {spec!r}, expected a .csv or .tsv file; leave it out"
        )
    if path.suffix in (".npz", ".npy", *TABLES):
        if not path.exists():
            raise KanCompileError(f"{name} {spec!r}: cannot be read, no such file here ({Path.cwd()}); give {FORMS}")
        return read_table(path, target_columns, name) if path.suffix in TABLES else spec
    if ":" in spec and not path.exists():
        return _loaded(spec, name)
    found = f"a file with suffix {path.suffix!r}" if path.exists() else "no such file or folder"
    raise KanCompileError(f"{name} {spec!r}: found {found}, expected {FORMS}")


def _transform(spec: str) -> Callable[[Any], Any]:
    with found_object(spec, "--transform", "TRANSFORM") as transform:
        if not callable(transform):
            raise KanCompileError(
                f"--transform {spec!r}: found {type(transform).__name__}, expected a function of a PIL image"
            )
        function: Callable[[Any], Any] = transform

    def prepare(image: Any) -> Any:
        with neighbours(spec):
            return function(image)

    return prepare


def _loaded(spec: str, name: str) -> Any:
    where = f"{name} {spec!r}"
    with found_object(spec, name, "LOADER", f"; or {FORMS.split(', or')[0]}") as found:
        # a class is callable, and so may be a finished loader
        if callable(found) and (isinstance(found, type) or not isinstance(found, Iterable)):
            found = call_with(found, {}, f"{where}: the loader", None)
    if isinstance(found, np.ndarray | Tensor | tuple | str | Path):
        return str(found) if isinstance(found, Path) else found
    if not isinstance(found, Iterable) and not hasattr(found, "__getitem__"):
        raise KanCompileError(
            f"{where}: found {type(found).__name__}, expected an iterable of batches such as a DataLoader, or an array"
        )
    return _Batches(found, spec, where)


class _Batches:
    """A user's iterable whose exceptions are told as such."""

    def __init__(self, batches: Iterable[Any], spec: str, where: str) -> None:
        self._batches, self._spec, self._where = batches, spec, where

    def __iter__(self) -> Iterator[Any]:
        batches: Iterator[Any] | None = None
        number = 0
        while True:
            try:
                with neighbours(self._spec):
                    batches = iter(self._batches) if batches is None else batches
                    batch = next(batches, None)
            except KanCompileError:
                raise
            except Exception as error:
                raise KanCompileError(
                    f"{self._where}: batch {number} raised {type(error).__name__}: {error}; mend the loader"
                ) from error
            if batch is None:
                return
            yield batch
            number += 1
