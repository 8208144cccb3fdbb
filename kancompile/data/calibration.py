"""Calibration data: batches that can be read as often as a pass needs, whatever form they came in."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kancompile.data.entries import ONE, not_one
from kancompile.data.model_inputs import ModelInputs
from kancompile.data.reading import Arrays, Reader, in_words, one_or_all
from kancompile.data.sample_arrays import (
    check_finite,
    check_labels,
    check_samples,
    note_constants,
    note_raw_pixels,
    to_array,
    to_float32,
    to_integers,
    to_label_type,
)
from kancompile.data.tables import from_table
from kancompile.data.tensor_names import check_input_names
from kancompile.errors import KanCompileError, naming_file
from kancompile.ir import NamedTensors, Values

DEFAULT_BATCH_SIZE = 256
DEFAULT_MAX_SAMPLES = 4096
DEFAULT_MAX_BYTES = 1 << 30
LEAST_TO_SPLIT = 16


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Samples of a model's inputs, immutable and re-iterable.

    Iterating yields fresh tensors ``[b, *input_shape]``, or several by name, the last ones possibly smaller: a model that writes
    to its input cannot spoil them.

    Attributes:
        inputs: read-only array ``[n, *input_shape]``, float32 unless the model reads integers; several by name.
        targets: read-only array ``[n, ...]`` of labels, or ``None``.
        batch_size: samples in one batch.
        remarks: how they were read, where a reader of the report should know, such as converted types.
        name: what the data are called there.
        is_sampled: whether no data are behind them: they were drawn from what the model says of its inputs.
    """

    inputs: Any
    targets: NDArray[Any] | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    remarks: tuple[str, ...] = ()
    name: str = "calibration"
    is_sampled: bool = False

    def __repr__(self) -> str:
        return f"Calibration of {len(self)} samples: {in_words(self.arrays, self.targets)}"

    @property
    def arrays(self) -> Arrays:
        """The arrays by name, an only one under ``""``."""
        return dict(self.inputs) if isinstance(self.inputs, Mapping) else {ONE: self.inputs}

    def __len__(self) -> int:
        """Count the samples (not the batches)."""
        return len(next(iter(self.arrays.values())))

    def __iter__(self) -> Iterator[Values]:
        """Yield batches."""
        for start in range(0, len(self), self.batch_size):
            yield self._tensors(slice(start, start + self.batch_size))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample; of several inputs all their values in a row, which is a measure of size."""
        arrays = self.arrays
        if ONE in arrays:
            return tuple(arrays[ONE].shape[1:])
        return (sum(int(np.prod(array.shape[1:])) for array in arrays.values()),)

    @property
    def samples(self) -> Any:
        """All samples as one fresh tensor ``[n, *input_shape]``, or several by name."""
        return self._tensors(slice(None))

    def first(self, count: int) -> Any:
        """The first samples alone, as :attr:`samples` gives all."""
        return self._tensors(slice(count))

    @property
    def labels(self) -> Tensor | None:
        """Labels as one fresh tensor ``[n, ...]``, or ``None``."""
        return None if self.targets is None else torch.from_numpy(self.targets.copy())

    @functools.cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the report should know: the remarks, and what stands out in these very samples."""
        found = []
        for name, array in self.arrays.items():
            if array.dtype == np.float32:
                what = f"{self.name} {name!r}" if name else self.name
                found += [*note_constants(array, what), *note_raw_pixels(array, what)]
        return tuple(dict.fromkeys([*self.remarks, *found]))

    def batches(self) -> Iterator[tuple[Values, Tensor | None]]:
        """Yield batches with their labels."""
        labels = self.labels
        for index, batch in enumerate(self):
            start = index * self.batch_size
            yield batch, None if labels is None else labels[start : start + len(batch)]

    def subset(self, n: int, generator: torch.Generator) -> Calibration:
        """Draw ``n`` samples without replacement, kept in their order; all where there are no more than ``n``."""
        if n >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=generator)[:n].sort().values.numpy()
        return self._take(chosen)

    def split(self, held_out: int, generator: torch.Generator) -> tuple[Calibration, Calibration]:
        """Divide into the samples to calibrate with and the ``held_out`` ones to judge the result with, drawn at random.

        Both sides keep at least two samples where there are four or more.
        """
        n = min(max(held_out, 2), len(self) - 2)
        order = torch.randperm(len(self), generator=generator)
        return self._take(order[n:].sort().values.numpy()), self._take(order[:n].sort().values.numpy())

    def as_floats(self, names: Sequence[str]) -> Calibration:
        """Convert inputs of integers to float32, with a remark.

        Raises:
            KanCompileError: a number that float32 cannot hold.
        """
        remarks, arrays = list(self.remarks), self.arrays
        for name in names:
            arrays[name] = _locked(to_float32(arrays[name], _called(self.name, name), remarks))
        return replace(self, inputs=one_or_all(arrays), remarks=tuple(remarks))

    def like(self, other: Calibration) -> Calibration:
        """Give these samples with the types and the order that others have, which a model was tried with.

        Raises:
            KanCompileError: they have other names.
        """
        if set(self.arrays) != set(other.arrays):
            if ONE in other.arrays:
                raise not_one(list(self.arrays), "x", self.name)
            raise KanCompileError(
                f"{self.name}: found arrays {list(self.arrays)!r}, expected {list(other.arrays)!r} as the calibration data have"
            )
        real = [name for name, array in other.arrays.items() if array.dtype.kind == "f"]
        typed = self.as_floats([n for n, array in self.arrays.items() if n in real and array.dtype.kind in "ib"])
        return typed.in_order(list(other.arrays))

    def in_order(self, names: Sequence[str]) -> Calibration:
        """Give the inputs in the order of names, those of a model."""
        arrays = self.arrays
        if list(arrays) == list(names) or set(arrays) != set(names):
            return self
        return replace(self, inputs=one_or_all({name: arrays[name] for name in names}))

    def sha256(self) -> str:
        """Hash the samples, for a manifest; the same values give the same hash on every machine."""
        digest = hashlib.sha256()
        for name, array in self.arrays.items():
            digest.update(f"{name}{array.shape!r}".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    def _tensors(self, rows: slice) -> Values:
        tensors = {name: torch.from_numpy(array[rows].copy()) for name, array in self.arrays.items()}
        return tensors[ONE] if ONE in tensors else NamedTensors(tensors)

    def _take(self, rows: NDArray[np.int64]) -> Calibration:
        targets = None if self.targets is None else _locked(self.targets[rows])
        arrays = {name: _locked(array[rows]) for name, array in self.arrays.items()}
        return replace(self, inputs=one_or_all(arrays), targets=targets)


def load_calibration(
    source: Any,
    input_shape: Sequence[int] | None = None,
    *,
    labels: Any = None,
    key: str | None = None,
    label_key: str = "y",
    max_samples: int = DEFAULT_MAX_SAMPLES,
    max_bytes: int = DEFAULT_MAX_BYTES,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int = 0,
    name: str = "calibration",
    model: ModelInputs | None = None,
    keep_integers: bool = False,
) -> Calibration:
    """Read calibration data from anything that holds or yields samples, and check it.

    Arrays and files with more than ``max_samples`` are thinned by a seeded random choice (files are often sorted by
    class); from an iterable the first ``max_samples`` are kept and the rest is never read, so memory stays bounded.

    Floats become float32. Integers and booleans do too, with a note, unless they are to be kept. uint8 is refused: such data
    nearly always is raw images, and a table calibrated on 0 ... 255 for a model trained on 0 ... 1 would be useless without
    a word.

    Args:
        source: array or tensor ``[n, *input_shape]``; pair ``(samples, labels)`` of those; path of an ``.npz`` (arrays
            ``x`` and, optionally, ``y``), ``.npy``, ``.csv`` or ``.tsv`` file; a data frame, or one with a column of labels;
            a ``torch.utils.data.Dataset``; :class:`Calibration`; or any iterable of batches: tensors, arrays, ``(batch, labels)``
            pairs, mappings with ``key`` and ``label_key``. For a model of several inputs: mapping, ``.npz`` or batches that hold
            an array for every input by its name, or tuples in the order of the model's forward, labels last.
        input_shape: the model's only input without the batch; ``None`` takes what the data has.
        labels: labels ``[n, ...]``, for sources that carry none.
        key: array in an ``.npz`` file or a mapping that holds the samples of an only input; ``x`` if ``None``, or the only array.
        label_key: the same for labels.
        max_samples: how many samples to keep at most.
        max_bytes: how many bytes of samples to keep at most.
        batch_size: samples in one batch of the result.
        seed: of the random choice.
        name: what errors call the data.
        model: names of the model's inputs; ``None`` for one input of any name.
        keep_integers: whether integers and booleans stay what they are, until a model says what it reads.

    Raises:
        KanCompileError: unreadable file, wrong type, shape or feature count, fewer than two samples, NaN or infinity, or names
            that are not those of the model's inputs.
    """
    if batch_size < 1 or max_samples < 2:
        raise KanCompileError(
            f"{name}: found batch_size {batch_size!r} and max_samples {max_samples!r}, "
            "expected at least 1 and at least 2"
        )
    source = from_table(source, name, seed)
    remarks = list(source.remarks) if isinstance(source, Calibration) else []
    shape = None if input_shape is None else tuple(int(size) for size in input_shape)
    reader = Reader(name, model, key, label_key)
    whole = _held(source, reader, labels is None)
    found, found_labels = (
        whole if whole is not None else _collect(reader, source, shape, max_samples, max_bytes, remarks)
    )
    if reader.unread:
        remarks.append(f"{name}: {', '.join(map(repr, reader.unread))} not read, the model's forward has no such input")
    if labels is not None:
        found_labels = to_array(labels, f"{name} labels")
    with naming_file(source):
        _check(found, shape, name)
    count = len(next(iter(found.values())))
    if found_labels is not None:
        with naming_file(source):
            check_labels(found_labels, count, name)
    # thin before anything is converted: a memory-mapped file may be larger than memory
    limit = min(max_samples, max(2, max_bytes // max(1, sum(4 * array[0].size for array in found.values()))))
    rows = np.arange(count)
    if count > limit:
        remarks.append(f"{name}: {limit} of {count} samples used, chosen with seed {seed}")
        rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].sort().values.numpy()
        found = {key: array[rows] for key, array in found.items()}
        found_labels = None if found_labels is None else found_labels[rows]
    with naming_file(source):
        inputs = {
            key: _locked(_converted(array, _called(name, key), remarks, rows, keep_integers))
            for key, array in found.items()
        }
    targets = None if found_labels is None else _locked(to_label_type(found_labels))
    is_sampled = isinstance(source, Calibration) and source.is_sampled
    return Calibration(one_or_all(inputs), targets, batch_size, tuple(remarks), name, is_sampled)


def stream_batches(
    source: Any,
    input_shape: Sequence[int] | None = None,
    *,
    labels: Any = None,
    key: str | None = None,
    label_key: str = "y",
    batch_size: int = DEFAULT_BATCH_SIZE,
    name: str = "data",
    model: ModelInputs | None = None,
    keep_integers: bool = False,
) -> Iterator[tuple[Values, Tensor | None]]:
    """Yield checked batches and their labels once, holding one batch in memory: for test data of any size.

    Args:
        source: as for :func:`load_calibration`.
        input_shape: the model's only input without the batch; ``None`` takes what the data has.
        labels: labels ``[n, ...]``, for arrays and files that carry none.
        key: array in an ``.npz`` file or a mapping that holds the samples of an only input.
        label_key: the same for labels.
        batch_size: samples in a batch, for sources that are not batches already.
        name: what errors call the data.
        model, keep_integers: as for :func:`load_calibration`.

    Raises:
        KanCompileError: as :func:`load_calibration`, when the batch in question is reached.
    """
    shape = None if input_shape is None else tuple(int(size) for size in input_shape)
    source = from_table(source, name)
    reader = Reader(name, model, key, label_key)

    def converted(arrays: Arrays, targets: NDArray[Any] | None, start: int) -> tuple[Values, Tensor | None]:
        tensors = {
            key: torch.from_numpy(
                _converted(array, _called(name, key), [], np.arange(start, start + len(array)), keep_integers)
            )
            for key, array in arrays.items()
        }
        values = tensors[ONE] if ONE in tensors else NamedTensors(tensors)
        return values, None if targets is None else torch.from_numpy(to_label_type(targets))

    whole = _held(source, reader, labels is None)
    if whole is not None:
        inputs, targets = whole
        targets = targets if labels is None else to_array(labels, f"{name} labels")
        with naming_file(source):
            _check(inputs, shape, name, least=1)
            count = len(next(iter(inputs.values())))
            if targets is not None:
                check_labels(targets, count, name)
            for start in range(0, count, batch_size):
                rows = slice(start, start + batch_size)
                part = {key: array[rows] for key, array in inputs.items()}
                yield converted(part, None if targets is None else targets[rows], start)
        return
    if labels is not None:
        raise KanCompileError(f"{name}: found labels beside an iterable of batches, expected pairs (batch, labels)")
    start = 0
    for number, (batch, batch_labels) in enumerate(reader.batches(source)):
        _check(batch, shape, f"{name} batch {number}", least=0)
        count = len(next(iter(batch.values())))
        if batch_labels is not None:
            check_labels(batch_labels, count, f"{name} batch {number}")
        if count:
            yield converted(batch, batch_labels, start)
        start += count
    if start == 0:
        raise KanCompileError(f"{name}: found no samples, expected at least 1; was the iterator used before?")


def _held(source: Any, reader: Reader, is_unlabelled: bool) -> tuple[Arrays, NDArray[Any] | None] | None:
    """Read a source that holds all samples at once; ``None`` where it yields batches."""
    if isinstance(source, Calibration):
        return source.arrays, source.targets
    return reader.whole(source, is_unlabelled)


def _collect(
    reader: Reader,
    source: Any,
    shape: tuple[int, ...] | None,
    max_samples: int,
    max_bytes: int,
    notes: list[str],
) -> tuple[Arrays, NDArray[Any] | None]:
    """Materialise batches until the limits are met; nothing beyond is read."""
    name = reader.name
    kept: list[Arrays] = []
    kept_labels: list[NDArray[Any]] = []
    count = 0
    for number, (batch, batch_labels) in enumerate(reader.batches(source)):
        where = f"{name} batch {number}"
        expected = {key: array.shape[1:] for key, array in kept[0].items()} if kept else {}
        if kept and list(batch) != list(kept[0]):
            raise KanCompileError(f"{where}: found {list(batch)!r}, expected {list(kept[0])!r} as in the first batch")
        for key, array in batch.items():
            check_samples(array, expected.get(key, shape if key == ONE else None), _called(where, key), 0, key != ONE)
        size = len(next(iter(batch.values())))
        row = sum(array[:1].nbytes for array in batch.values())
        room = min(max_samples, max(2, max_bytes // max(1, row))) - count if size else 0
        # a loader may hand out the same buffer again and again, so its batches are copied
        kept.append({key: array[:room].copy() for key, array in batch.items()})
        if batch_labels is not None:
            if len(batch_labels) != size:
                raise KanCompileError(f"{where}: found {len(batch_labels)} labels for {size} samples")
            kept_labels.append(batch_labels[:room].copy())
        count += min(room, size)
        if size and room <= size:
            notes.append(f"{name}: reading stopped after the first {count} samples")
            break
    if not kept:
        raise KanCompileError(f"{name}: found no batches, expected at least 2 samples; was the iterator used before?")
    if kept_labels and len(kept_labels) != len(kept):
        raise KanCompileError(
            f"{name}: found labels in {len(kept_labels)} of {len(kept)} batches, expected all or none"
        )
    arrays = {key: np.concatenate([part[key] for part in kept]) for key in kept[0]}
    return arrays, np.concatenate(kept_labels) if kept_labels else None


def _check(arrays: Arrays, shape: tuple[int, ...] | None, name: str, least: int = 2) -> None:
    check_input_names(arrays, name)
    for key, array in arrays.items():
        check_samples(array, shape if key == ONE else None, _called(name, key), least, key != ONE)


def _converted(
    array: NDArray[Any], name: str, remarks: list[str], rows: NDArray[np.int64], keep_integers: bool
) -> NDArray[Any]:
    if keep_integers and array.dtype.kind in "iub":
        return to_integers(array)
    found = to_float32(array, name, remarks)
    check_finite(found, rows, name)
    return found


def _called(name: str, key: str) -> str:
    return f"{name} {key!r}" if key else name


def _locked(array: NDArray[Any]) -> NDArray[Any]:
    """Forbid writing to an array that nobody else holds."""
    array.setflags(write=False)
    return array
