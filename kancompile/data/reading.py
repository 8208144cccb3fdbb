"""Read what holds or yields samples as arrays by name: files, arrays, tuples, mappings, frames and loaders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kancompile.data.entries import ONE, Entries, choose_entries, flattened, hint_of_several, parts_of_tuple
from kancompile.data.model_inputs import ModelInputs
from kancompile.data.sample_arrays import read_arrays, to_array
from kancompile.data.tables import TABLES, read_table
from kancompile.errors import KanCompileError
from kancompile.ir import NamedTensors

Arrays = dict[str, NDArray[Any]]
Read = tuple[Arrays, NDArray[Any] | None]
"""Inputs by name, an only one under ``""``, and labels."""


@dataclass(frozen=True)
class Reader:
    """How samples are read.

    Attributes:
        name: what errors call the data.
        model: what the model takes, ``None`` where it is not known: then one input.
        key: array of a mapping or an ``.npz`` that holds the samples of an only input.
        label_key: the same of labels.
        unread: names of entries that no input of the model has, as they are met.
    """

    name: str
    model: ModelInputs | None = None
    key: str | None = None
    label_key: str = "y"
    unread: dict[str, None] = field(default_factory=dict)

    def whole(self, source: Any, is_unlabelled: bool) -> Read | None:
        """Read a source that holds all samples at once; ``None`` where it yields them batch by batch."""
        name = self.name
        if isinstance(source, str | os.PathLike) and Path(source).suffix in TABLES:
            return {ONE: read_table(Path(source), name=name)}, None
        if isinstance(source, str | os.PathLike):
            return read_arrays(Path(source), self._choose, name)
        if isinstance(source, np.ndarray | Tensor):
            return {ONE: to_array(source, name)}, None
        if isinstance(source, NamedTensors):
            return _arrays(source.tensors, name), None
        if isinstance(source, Mapping):
            return self.parts(source, name)
        if not isinstance(source, tuple):
            return None
        several, labels = parts_of_tuple(source, self.model, name)
        if several is not None:
            return _arrays(several, name), None if labels is None else to_array(labels, f"{name} labels")
        if not all(isinstance(part, np.ndarray | Tensor) for part in source):
            return None
        if len(source) > 2 and hint_of_several(self.model):
            raise KanCompileError(
                f"{name}: found a tuple of {len(source)} arrays, expected samples, (samples, labels) or a list of batches"
                f"{hint_of_several(self.model)}"
            )
        if len(source) != 2:
            return None
        inputs, targets = to_array(source[0], name), to_array(source[1], f"{name} labels")
        if is_unlabelled and inputs.ndim > 1 and inputs.shape == targets.shape:
            raise KanCompileError(
                f"{name}: found a tuple of two arrays of the same shape {inputs.shape!r}, which may be two batches or "
                "samples with labels; pass a list of batches, or labels by name, {'x': ..., 'y': ...}"
                f"{hint_of_several(self.model)}"
            )
        return {ONE: inputs}, targets

    def batches(self, source: Any) -> Iterator[Read]:
        """Read a source that yields batches, one after the other."""
        for number, item in enumerate(self._items(source)):
            yield self.parts(item, f"{self.name} batch {number}")

    def parts(self, item: Any, name: str) -> Read:
        """Take one batch apart."""
        if isinstance(item, Mapping):
            flat = dict(flattened(item))
            chosen = self._choose(list(flat), name)
            labels = None if chosen.labels is None else to_array(flat[chosen.labels], f"{name} labels")
            return _arrays({n: flat[entry] for n, entry in chosen.inputs.items()}, name), labels
        if isinstance(item, tuple | list):
            several, labels = parts_of_tuple(item, self.model, name)
            if several is not None:
                return _arrays(several, name), None if labels is None else to_array(labels, f"{name} labels")
        if isinstance(item, tuple | list) and item and isinstance(item[0], np.ndarray | Tensor):
            if len(item) > 2:
                raise KanCompileError(
                    f"{name}: found {len(item)} parts, expected samples or (samples, labels); yield only those"
                    + hint_of_several(self.model)
                )
            return {ONE: to_array(item[0], name)}, to_array(item[1], f"{name} labels") if len(item) == 2 else None
        if isinstance(item, np.ndarray | Tensor):
            return {ONE: to_array(item, name)}, None
        raise KanCompileError(
            f"{name}: found {type(item).__name__}, expected a tensor or an array [b, *input_shape], or a pair with labels"
        )

    def _choose(self, keys: Sequence[str], name: str) -> Entries:
        chosen = choose_entries(keys, self.model, self.key, self.label_key, name)
        self.unread.update(dict.fromkeys(chosen.unread))
        return chosen

    def _items(self, source: Any) -> Iterator[Any]:
        if isinstance(source, Iterable) or hasattr(source, "__getitem__"):
            items: Iterator[Any] = iter(source)
            return items
        raise KanCompileError(
            f"{self.name}: found {type(source).__name__}, expected an array, a tensor, a path or an iterable of batches"
        )


def _arrays(parts: Mapping[str, Any], name: str) -> Arrays:
    found = {n: to_array(value, f"{name} {n!r}" if n else name) for n, value in parts.items()}
    sizes = {n: f"{len(array)} rows" if array.ndim else "a single number" for n, array in found.items()}
    if len(set(sizes.values())) > 1:
        raise KanCompileError(
            f"{name}: found {', '.join(f'{size} of {n!r}' for n, size in sizes.items())}, expected the same number of every "
            "input; give one row of each for every sample"
        )
    return found


def in_words(arrays: Arrays, targets: NDArray[Any] | None) -> str:
    """Say types and shapes of samples and labels in a line."""
    shapes = ", ".join(f"{name or 'input'} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
    return f"{shapes}, {'no labels' if targets is None else f'labels {targets.dtype} {list(targets.shape)}'}"


def one_or_all(arrays: Arrays) -> Any:
    """Return an only array itself, several by name."""
    return arrays.get(ONE, arrays)
