"""Calibration data: float32 batches that can be read as often as a pass needs, whatever form they came in."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kancompile.data.sample_arrays import (
    batch_parts,
    check_finite,
    check_labels,
    check_samples,
    read_arrays,
    to_array,
    to_float32,
    to_label_type,
)
from kancompile.data.tables import TABLES, from_table, read_table
from kancompile.errors import KanCompileError

DEFAULT_BATCH_SIZE = 256
DEFAULT_MAX_SAMPLES = 4096
DEFAULT_MAX_BYTES = 1 << 30
LEAST_TO_SPLIT = 16


@dataclass(frozen=True, eq=False)
class Calibration:
    """Samples of a model's input, immutable and re-iterable.

    Iterating yields fresh float32 tensors ``[b, *input_shape]``, the last one possibly smaller: a model that writes
    to its input cannot spoil them.

    Attributes:
        inputs: read-only float32 array ``[n, *input_shape]``.
        targets: read-only array ``[n, ...]`` of labels, or ``None``.
        batch_size: samples in one batch.
        remarks: how they were read, where a reader of the report should know, such as converted types.
        name: what the data are called there.
    """

    inputs: NDArray[np.float32]
    targets: NDArray[Any] | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    remarks: tuple[str, ...] = ()
    name: str = "calibration"

    def __len__(self) -> int:
        """Count the samples (not the batches)."""
        return int(self.inputs.shape[0])

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches ``[b, *input_shape]``."""
        for start in range(0, len(self), self.batch_size):
            yield torch.from_numpy(self.inputs[start : start + self.batch_size].copy())

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.inputs.shape[1:])

    @property
    def samples(self) -> Tensor:
        """All samples as one fresh tensor ``[n, *input_shape]``."""
        return torch.from_numpy(self.inputs.copy())

    @property
    def labels(self) -> Tensor | None:
        """Labels as one fresh tensor ``[n, ...]``, or ``None``."""
        return None if self.targets is None else torch.from_numpy(self.targets.copy())

    @functools.cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the report should know: the remarks, and what stands out in these very samples."""
        found = [*_note_constants(self.inputs, self.name), *_note_raw_pixels(self.inputs, self.name)]
        return tuple(dict.fromkeys([*self.remarks, *found]))

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
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

    def sha256(self) -> str:
        """Hash the samples, for a manifest; the same values give the same hash on every machine."""
        digest = hashlib.sha256(repr(self.inputs.shape).encode())
        digest.update(self.inputs.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def _take(self, rows: NDArray[np.int64]) -> Calibration:
        targets = None if self.targets is None else _locked(self.targets[rows])
        return replace(self, inputs=_locked(self.inputs[rows]), targets=targets)


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
) -> Calibration:
    """Read calibration data from anything that holds or yields samples, and check it.

    Arrays and files with more than ``max_samples`` are thinned by a seeded random choice (files are often sorted by
    class); from an iterable the first ``max_samples`` are kept and the rest is never read, so memory stays bounded.

    Floats become float32. Integers and booleans do too, with a note. uint8 is refused: such data nearly always is raw
    images, and a table calibrated on 0 ... 255 for a model trained on 0 ... 1 would be useless without a word.

    Args:
        source: array or tensor ``[n, *input_shape]``; pair ``(samples, labels)`` of those; path of an ``.npz`` (arrays
            ``x`` and, optionally, ``y``), ``.npy``, ``.csv`` or ``.tsv`` file; a data frame, or one with a column of labels;
            a ``torch.utils.data.Dataset``; :class:`Calibration`; or any iterable of batches: tensors,
            arrays, ``(batch, labels)`` pairs, mappings with ``key`` and ``label_key``.
        input_shape: the model's input without the batch; ``None`` takes what the data has.
        labels: labels ``[n, ...]``, for sources that carry none.
        key: array in an ``.npz`` file or a mapping that holds the samples; ``x`` if ``None``, or the only array.
        label_key: the same for labels.
        max_samples: how many samples to keep at most.
        max_bytes: how many bytes of samples to keep at most.
        batch_size: samples in one batch of the result.
        seed: of the random choice.
        name: what errors call the data.

    Raises:
        KanCompileError: unreadable file, wrong type, shape or feature count, fewer than two samples, NaN or infinity.
    """
    shape = None if input_shape is None else tuple(int(size) for size in input_shape)
    if batch_size < 1 or max_samples < 2:
        raise KanCompileError(
            f"{name}: found batch_size {batch_size!r} and max_samples {max_samples!r}, "
            "expected at least 1 and at least 2"
        )
    source = from_table(source, name, seed)
    remarks = list(source.remarks) if isinstance(source, Calibration) else []
    if isinstance(source, Calibration | str | os.PathLike | np.ndarray | Tensor) or _is_pair(source):
        found, found_labels = _whole(source, key, label_key, labels is None, name)
    else:
        batches = _iterated(source, name)
        found, found_labels = _collect(batches, shape, key, label_key, max_samples, max_bytes, name, remarks)
    if labels is not None:
        found_labels = to_array(labels, f"{name} labels")
    check_samples(found, shape, name)
    if found_labels is not None:
        check_labels(found_labels, len(found), name)
    # thin before anything is converted: a memory-mapped file may be larger than memory
    limit = min(max_samples, max(2, max_bytes // max(1, 4 * found[0].size)))
    rows = np.arange(len(found))
    if len(found) > limit:
        remarks.append(f"{name}: {limit} of {len(found)} samples used, chosen with seed {seed}")
        rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:limit].sort().values.numpy()
        found, found_labels = found[rows], None if found_labels is None else found_labels[rows]
    inputs = to_float32(found, name, remarks)
    check_finite(inputs, rows, name)
    targets = None if found_labels is None else _locked(to_label_type(found_labels))
    return Calibration(_locked(inputs), targets, batch_size, tuple(remarks), name)


def _whole(
    source: Any, key: str | None, label_key: str, is_unlabelled: bool, name: str
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read a source that holds all samples at once."""
    if isinstance(source, Calibration):
        return source.inputs, source.targets
    if isinstance(source, str | os.PathLike) and Path(source).suffix in TABLES:
        return read_table(Path(source), name=name), None
    if isinstance(source, str | os.PathLike):
        return read_arrays(Path(source), key, label_key, name)
    if isinstance(source, tuple):
        inputs, targets = to_array(source[0], name), to_array(source[1], f"{name} labels")
        if is_unlabelled and inputs.ndim > 1 and inputs.shape == targets.shape:
            raise KanCompileError(
                f"{name}: found a tuple of two arrays of the same shape {inputs.shape!r}, which may be two batches or "
                "samples with labels; pass a list of batches, or labels= by name"
            )
        return inputs, targets
    return to_array(source, name), None


def _iterated(source: Any, name: str) -> Iterator[Any]:
    if isinstance(source, Iterable) or hasattr(source, "__getitem__"):
        items: Iterator[Any] = iter(source)
        return items
    raise KanCompileError(
        f"{name}: found {type(source).__name__}, expected an array, a tensor, a path or an iterable of batches"
    )


def _is_pair(source: Any) -> bool:
    return (
        isinstance(source, tuple) and len(source) == 2 and all(isinstance(part, np.ndarray | Tensor) for part in source)
    )


def _collect(
    source: Any,
    shape: tuple[int, ...] | None,
    key: str | None,
    label_key: str,
    max_samples: int,
    max_bytes: int,
    name: str,
    notes: list[str],
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Materialise batches until the limits are met; nothing beyond is read."""
    kept: list[NDArray[Any]] = []
    kept_labels: list[NDArray[Any]] = []
    count = 0
    for number, item in enumerate(source):
        batch, batch_labels = batch_parts(item, key, label_key, f"{name} batch {number}")
        expected = shape if shape is not None else (kept[0].shape[1:] if kept else None)
        check_samples(batch, expected, f"{name} batch {number}", least=0)
        room = min(max_samples, max(2, max_bytes // max(1, batch[:1].nbytes))) - count if len(batch) else 0
        # a loader may hand out the same buffer again and again, so its batches are copied
        kept.append(batch[:room].copy())
        if batch_labels is not None:
            if len(batch_labels) != len(batch):
                raise KanCompileError(
                    f"{name} batch {number}: found {len(batch_labels)} labels for {len(batch)} samples"
                )
            kept_labels.append(batch_labels[:room].copy())
        count += len(kept[-1])
        if len(batch) and room <= len(batch):
            notes.append(f"{name}: reading stopped after the first {count} samples")
            break
    if not kept:
        raise KanCompileError(f"{name}: found no batches, expected at least 2 samples; was the iterator used before?")
    if kept_labels and len(kept_labels) != len(kept):
        raise KanCompileError(
            f"{name}: found labels in {len(kept_labels)} of {len(kept)} batches, expected all or none"
        )
    return np.concatenate(kept), np.concatenate(kept_labels) if kept_labels else None


def stream_batches(
    source: Any,
    input_shape: Sequence[int] | None = None,
    *,
    labels: Any = None,
    key: str | None = None,
    label_key: str = "y",
    batch_size: int = DEFAULT_BATCH_SIZE,
    name: str = "data",
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield checked float32 batches and their labels once, holding one batch in memory: for test data of any size.

    Args:
        source: as for :func:`load_calibration`.
        input_shape: the model's input without the batch; ``None`` takes what the data has.
        labels: labels ``[n, ...]``, for arrays and files that carry none.
        key: array in an ``.npz`` file or a mapping that holds the samples.
        label_key: the same for labels.
        batch_size: samples in a batch, for sources that are not batches already.
        name: what errors call the data.

    Raises:
        KanCompileError: as :func:`load_calibration`, when the batch in question is reached.
    """
    shape = None if input_shape is None else tuple(int(size) for size in input_shape)
    source = from_table(source, name)
    if isinstance(source, Calibration | str | os.PathLike | np.ndarray | Tensor) or _is_pair(source):
        inputs, targets = _whole(source, key, label_key, labels is None, name)
        targets = targets if labels is None else to_array(labels, f"{name} labels")
        check_samples(inputs, shape, name, least=1)
        if targets is not None:
            check_labels(targets, len(inputs), name)
        for start in range(0, len(inputs), batch_size):
            rows = slice(start, start + batch_size)
            yield _tensors(inputs[rows], None if targets is None else targets[rows], start, name)
        return
    if labels is not None:
        raise KanCompileError(f"{name}: found labels beside an iterable of batches, expected pairs (batch, labels)")
    start = 0
    for number, item in enumerate(_iterated(source, name)):
        batch, batch_labels = batch_parts(item, key, label_key, f"{name} batch {number}")
        check_samples(batch, shape, f"{name} batch {number}", least=0)
        if batch_labels is not None:
            check_labels(batch_labels, len(batch), f"{name} batch {number}")
        if len(batch):
            yield _tensors(batch, batch_labels, start, name)
        start += len(batch)
    if start == 0:
        raise KanCompileError(f"{name}: found no samples, expected at least 1; was the iterator used before?")


def _tensors(inputs: NDArray[Any], targets: NDArray[Any] | None, start: int, name: str) -> tuple[Tensor, Tensor | None]:
    converted = to_float32(inputs, name, [])
    check_finite(converted, np.arange(start, start + len(converted)), name)
    return torch.from_numpy(converted), None if targets is None else torch.from_numpy(to_label_type(targets))


def _note_constants(inputs: NDArray[np.float32], name: str) -> list[str]:
    flat = inputs.reshape(len(inputs), -1)
    constant = int((flat.min(0) == flat.max(0)).sum())
    return [f"{name}: {constant} of {flat.shape[1]} features are constant"] if constant else []


def _note_raw_pixels(inputs: NDArray[np.float32], name: str) -> list[str]:
    """Hint at whole numbers from 0 up to 255, the form of images before they are scaled."""
    low, high = float(inputs.min()), float(inputs.max())
    if low < 0 or not 128 <= high <= 255 or not np.array_equal(inputs, np.rint(inputs)):
        return []
    found = f"{name}: whole numbers {low:.0f} ... {high:.0f}, which look like raw pixels"
    return [f"{found}; where the model was trained on 0 ... 1, pass x / 255"]


def _locked(array: NDArray[Any]) -> NDArray[Any]:
    """Forbid writing to an array that nobody else holds."""
    array.setflags(write=False)
    return array
