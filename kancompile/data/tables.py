"""Samples in tables: files of comma-separated values, data frames, and data sets of single samples.

No package of data frames is imported: they are told by what they answer.
"""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from kancompile.errors import KanCompileError, read_text, reason, shown
from kancompile.progress import say

TABLES = (".csv", ".tsv")
"""Suffixes of files that are tables."""
_DELIMITERS = "\t;,"
_SHOWN, _MOST_BYTES, _BATCH = 6, 1 << 33, 256


def read_table(path: Path, targets: Sequence[str | int] = (), name: str = "calibration") -> Any:
    """Read a file of comma-separated values, with a header or without.

    Tabs, semicolons or commas divide, whichever the first line has. A first column without a name that counts the rows, as
    data frames write it, is left out.

    Args:
        path: the file.
        targets: columns that are labels, by name or number; all others are inputs.
        name: what errors call the data.

    Returns:
        float64 ``[n, inputs]``, or a pair of it and labels: ``[n]`` of one column or ``[n, targets]``, int64 where all are whole.

    Raises:
        KanCompileError: unreadable file, rows of different lengths, what is no number, a target that there is not.
    """
    where = f"{name} {str(path)!r}"
    lines = io.StringIO(
        read_text(path, where, "give a table of numbers", _MOST_BYTES).removeprefix("\ufeff"), newline=""
    )
    first = lines.readline()
    lines.seek(0)
    delimiter = next((mark for mark in _DELIMITERS if mark in first), ",")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    header: list[str] | None = None
    values, width = array("d"), 0
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not width:
                width = len(row)
                if not all(map(_is_number, row)):
                    header = [cell.strip() for cell in (row[0].lstrip("# "), *row[1:])]
                    continue
            if len(row) != width:
                raise KanCompileError(
                    f"{where}: found {len(row)} cells in line {reader.line_num}, expected {width} as in the first line; mend the "
                    "row, or write the file with csv.writer or DataFrame.to_csv(index=False), which quote what has to be"
                )
            try:
                values.extend(map(float, row))
            except ValueError:
                place = next(place for place, cell in enumerate(row) if not _is_number(cell))
                column = header[place] if header else place
                raise KanCompileError(_no_number(f"{where}: line {reader.line_num}", row[place], column)) from None
    except csv.Error as error:
        raise KanCompileError(
            f"{where}: cannot be read in line {reader.line_num} ({error}); give a table of numbers"
        ) from error
    if not values:
        raise KanCompileError(f"{where}: found no rows of numbers, expected at least 2")
    table = np.frombuffer(values, np.float64).reshape(-1, width)
    names = header or [str(place) for place in range(width)]
    chosen = [_column(target, names, header is not None, where) for target in targets]
    kept = [place for place in range(width) if place not in chosen]
    if header and not header[0] and 0 in kept and np.array_equal(table[:, 0], np.arange(len(table))):
        say(f"{where}: the first column, which has no name and counts the rows, is left out")
        kept.remove(0)
    if not kept:
        raise KanCompileError(f"{where}: found no column beside the target, expected inputs")
    if not chosen:
        say(
            f"{where}: all {len(kept)} columns are inputs; --target-column NAME names labels (in Python data.read_table)"
        )
        return np.ascontiguousarray(table[:, kept])
    return np.ascontiguousarray(table[:, kept]), _labels(table[:, chosen])


def from_table(source: Any, name: str, seed: int = 0) -> Any:
    """Turn data frames, alone or in pairs with labels, and data sets of single samples into arrays or batches.

    Args:
        source: anything; what is none of those is returned as it is.
        name: what errors call the data.
        seed: of the order in which samples of a data set are read.

    Raises:
        KanCompileError: columns of words, or samples that do not fit into a batch.
    """
    if isinstance(source, TensorDataset) and len(source.tensors) <= 2:
        return source.tensors if len(source.tensors) == 2 else source.tensors[0]
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        return _batches(source, name, seed)
    if isinstance(source, tuple) and len(source) == 2 and any(map(_is_framed, source)):
        return tuple(_array(part, f"{name}{place}") for part, place in zip(source, ("", " labels"), strict=True))
    return _array(source, name) if _is_framed(source) else source


def _batches(source: Dataset[Any], name: str, seed: int) -> Iterable[Any]:
    """Read a data set in an order of its own, since many are sorted by class."""
    kind = type(source).__name__
    try:
        yield from DataLoader(source, _BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    except Exception as error:  # user code may raise anything
        raise KanCompileError(
            f"{name}: found a {kind} that cannot be read in batches ({type(error).__name__}: {reason(error)}); pass "
            f"torch.utils.data.DataLoader(dataset, batch_size={_BATCH}) with what it needs"
        ) from error


def _is_framed(value: Any) -> bool:
    """Whether this is a frame or a column of pandas, polars or the like."""
    return hasattr(value, "to_numpy") and not isinstance(value, Tensor | np.ndarray)


def _array(value: Any, name: str) -> Any:
    """Give the numbers of a frame or a column; anything else as it is."""
    if not _is_framed(value):
        return value
    found = np.asarray(value.to_numpy())
    if found.dtype.kind in "fiub":
        return found
    columns = list(getattr(value, "columns", [getattr(value, "name", None)]))
    rows = found.reshape(len(found), -1).astype(object)
    numbers = np.empty(rows.shape, np.float64)
    for place in range(rows.shape[1]):
        for row, cell in enumerate(rows[:, place]):
            try:
                numbers[row, place] = float(cell)
            except (TypeError, ValueError):
                raise KanCompileError(_no_number(f"{name}: row {row}", cell, columns[place])) from None
    return numbers.reshape(found.shape)


def _labels(columns: NDArray[np.float64]) -> NDArray[Any]:
    """Give class numbers where all values are whole, else values; one column without a dimension of its own."""
    found = columns[:, 0] if columns.shape[1] == 1 else columns
    is_whole = bool((np.abs(found) < 1 << 31).all()) and np.array_equal(found, np.rint(found))
    return found.astype(np.int64) if is_whole else np.ascontiguousarray(found)


def _column(target: str | int, names: Sequence[str], has_header: bool, where: str) -> int:
    if isinstance(target, str) and has_header and target in names:
        if names.count(target) > 1:
            raise KanCompileError(
                f"{where}: found {names.count(target)} columns {target!r}, expected one; name it by number"
            )
        return names.index(target)
    try:
        place = int(target)
    except ValueError:
        place = len(names)
    if not -len(names) <= place < len(names):
        close = list(dict.fromkeys([*get_close_matches(str(target), names, _SHOWN), *names]))
        listed = ", ".join(close[:_SHOWN]) + (f" ... and {len(close) - _SHOWN} more" if len(close) > _SHOWN else "")
        what = f"one of {listed}" if has_header else f"a number of 0 ... {len(names) - 1}, as the file has no header"
        raise KanCompileError(f"{where}: found no column {target!r}, expected {what}; name it with --target-column")
    return place % len(names)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _no_number(where: str, cell: Any, column: Any) -> str:
    is_absent = cell is None or str(cell).strip() in ("", "<NA>", "NaT", "None")
    if is_absent:
        return f"{where}: found no value in column {column!r}, expected a number; drop or fill such rows as in training"
    hint = "leave the column out, or encode it as in training"
    if isinstance(cell, str) and _is_number(cell.replace(",", ".")):
        hint = "write a decimal point"
    return f"{where}: found {shown(cell)} in column {column!r}, expected a number; {hint}"
