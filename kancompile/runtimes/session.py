"""Run ONNX files: as a user would, without kernel fusion, and in ONNX's own reference implementation."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from numpy.typing import NDArray

from kancompile.data import shape_hint
from kancompile.errors import KanCompileError, first_line, foreign, parse_json, read_bytes
from kancompile.ir import (
    EXTERNAL_SUFFIX,
    MOST_FILE_BYTES,
    ModelWithExternalData,
    NamedTensors,
    Values,
    arrays_of,
    external_tensors,
)

ModelFile = str | os.PathLike[str] | bytes
Arrays = NDArray[Any] | Mapping[str, NDArray[Any]]
_TYPES: dict[str, type[Any]] = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def read_model(model: ModelFile) -> bytes:
    """Return the bytes of an ONNX file, given its path or those bytes; a second file of large tensors is mapped into memory.

    Raises:
        KanCompileError: the file cannot be read.
    """
    if isinstance(model, bytes):
        return model
    path = Path(model)
    content = read_bytes(path, name_of(model), "give an .onnx file", MOST_FILE_BYTES)
    beside = path.with_name(path.name + EXTERNAL_SUFFIX)
    if not beside.is_file() or not beside.stat().st_size or not _has_external_tensors(content):
        return content  # the second file may be what a larger model has left
    with foreign(f"file {str(beside)!r}", "give a folder that can be read"), beside.open("rb") as file:
        return ModelWithExternalData(content, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _has_external_tensors(content: bytes) -> bool:
    try:
        return bool(external_tensors(onnx.load_model_from_string(content)))
    except DecodeError:  # which whoever uses the content says better
        return False


def name_of(model: ModelFile) -> str:
    """Say in errors and tables which file is meant."""
    return "model" if isinstance(model, bytes) else f"model {os.fspath(model)!r}"


CALIBRATED_RANGE = "kancompile.calibrated_range"
"""Metadata of a file: JSON of the smallest and the largest input value that it was calibrated with, by name of several inputs."""


def open_session(content: bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Create a session on the CPU; what ONNX Runtime cannot load is tried once, and raised, not printed as well.

    Raises:
        Exception: it cannot be loaded; ONNX Runtime's own exceptions share no base class.
    """
    options.log_severity_level = 4
    if isinstance(content, ModelWithExternalData):
        tensors = dict(content.tensors())
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for tensor in tensors.values()]
        options.add_external_initializers(list(tensors), values)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)


class _Argument(NamedTuple):
    name: str
    type: str
    shape: list[int | str]


class RuntimeModel:
    """An ONNX file in a CPU session of ONNX Runtime, called with and returning tensors.

    Attributes:
        session: the session.
        input_shapes: shape of one sample of every input, by name in the order of the file; -1 where a dimension is open.
        output_names: of the outputs, in order.
        batch: the only batch size that the file takes, ``None`` for any.
    """

    def __init__(self, model: ModelFile, threads: int = 1, fused: bool = True) -> None:
        """Create the session.

        Args:
            model: path or bytes of the file.
            threads: threads inside an operator, 0 for one per core.
            fused: ``False`` keeps float arithmetic between DequantizeLinear and QuantizeLinear, as the file is written.

        Raises:
            KanCompileError: ONNX Runtime cannot load the file, or an input is neither float32 nor int32, int64 or bool.
        """
        self.name = name_of(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # idle threads that spin would take the cores from whatever is measured beside it
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not fused:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        content = read_model(model)
        try:
            self.session = open_session(content, options)
            self._mapped = getattr(content, "external", None)  # the session reads it as long as it lives
            # names and sizes are texts of the file, which need not be UTF-8
            inputs = [_Argument(value.name, value.type, list(value.shape)) for value in self.session.get_inputs()]
            self.output_names = [value.name for value in self.session.get_outputs()]
            self._ranges = self.session.get_modelmeta().custom_metadata_map.get(CALIBRATED_RANGE)
        except Exception as error:  # its exceptions share no base class
            raise KanCompileError(
                f"{self.name}: ONNX Runtime {onnxruntime.__version__} cannot load it ({first_line(error)}); "
                "give a complete ONNX file"
            ) from error
        if not inputs or any(value.type not in _TYPES or not value.shape for value in inputs):
            found = [f"{value.name}: {value.type}" for value in inputs]
            raise KanCompileError(
                f"{self.name}: found inputs {found!r}, expected batches of {', '.join(_TYPES)}; give a file that kancompile wrote"
            )
        self._types = {value.name: _TYPES[value.type] for value in inputs}
        self.batch = inputs[0].shape[0] if isinstance(inputs[0].shape[0], int) else None
        if self.batch == 0:
            raise KanCompileError(
                f"{self.name}: found a batch of 0 samples, expected at least 1; give a complete ONNX file"
            )
        self.input_shapes = {
            value.name: tuple(size if isinstance(size, int) else -1 for size in value.shape[1:]) for value in inputs
        }

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample of the only input.

        Raises:
            KanCompileError: there are several.
        """
        if len(self.input_shapes) != 1:
            raise KanCompileError(
                f"{self.name}: found the inputs {list(self.input_shapes)!r}, expected one for this; use a file of one input"
            )
        return next(iter(self.input_shapes.values()))

    @property
    def calibrated_ranges(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of the calibration for every input of which the file says them."""
        found = {}
        try:
            ranges = parse_json(self._ranges) if self._ranges else {}
            named = ranges if isinstance(ranges, dict) else {next(iter(self.input_shapes)): ranges}
            for name, bounds in named.items():
                low, high = map(float, bounds)
                if low <= high and name in self.input_shapes:
                    found[name] = (low, high)
        except Exception:  # whatever stands there instead says no range
            return {}
        return found

    def check_input(self, found: Arrays, what: str) -> None:
        """Verify that a batch fits.

        Raises:
            KanCompileError: it does not.
        """
        for name, array in self._named(found, what).items():
            shape, wanted = tuple(array.shape[1:]), self.input_shapes[name]
            if len(shape) != len(wanted) or any(size not in (-1, own) for own, size in zip(shape, wanted, strict=True)):
                hint = shape_hint(shape, wanted)
                of_input = f" of {name!r}" if len(self.input_shapes) > 1 else ""
                raise KanCompileError(
                    f"{what}: found samples{of_input} of shape {shape!r}, expected {wanted!r} as {self.name} reads them"
                    + (f"; {hint}" if hint else "")
                )

    def zeros(self, rows: int = 2) -> Values:
        """Give a batch of zeros of the shapes and types that the file reads; open dimensions have size 2."""
        found = {
            name: torch.from_numpy(np.zeros((rows, *(2 if size < 0 else size for size in shape)), self._types[name]))
            for name, shape in self.input_shapes.items()
        }
        return NamedTensors(found) if len(found) > 1 else next(iter(found.values()))

    @property
    def reads_reals(self) -> bool:
        """Whether every input is of float32."""
        return all(kind is np.float32 for kind in self._types.values())

    def renamed(self, x: Arrays) -> Arrays:
        """Give inputs in their order the names that this file has: an exporter may name the parts of a dict otherwise."""
        return dict(zip(self.input_shapes, x.values(), strict=True)) if isinstance(x, Mapping) else x

    def as_read(self, x: Values, what: str) -> Values:
        """Give a batch with the types of this file's inputs, whole numbers where it reads integers.

        Raises:
            KanCompileError: it does not fit.
        """
        given = arrays_of(x)
        self.check_input(given, what)
        for name, array in (given if isinstance(given, dict) else {next(iter(self.input_shapes)): given}).items():
            if (
                array.dtype.kind == "f"
                and self._types[name] is not np.float32
                and not np.array_equal(array, np.rint(array))
            ):
                raise KanCompileError(
                    f"{what}: found fractions in {name!r}, expected whole numbers as {self.name} reads them; pass integers"
                )
        typed = {name: torch.from_numpy(array) for name, array in self._named(given, what).items()}
        return NamedTensors(typed) if isinstance(x, NamedTensors) else next(iter(typed.values()))

    def run(self, x: Arrays) -> list[NDArray[Any]]:
        """Return all outputs for ``[b, *input_shape]``; a file of one batch size gets it piece by piece, the last filled up.

        Args:
            x: of the only input, or of every one by name.

        Raises:
            KanCompileError: ONNX Runtime refuses, or the names are others.
        """
        named = self._named(x, "data")
        count = len(next(iter(named.values())))
        if self.batch is None or count == self.batch or not count:
            return self._run(named)
        filled = {n: np.concatenate([v, np.repeat(v[-1:], -count % self.batch, axis=0)]) for n, v in named.items()}
        starts = range(0, count + -count % self.batch, self.batch)
        parts = [self._run({n: v[start : start + self.batch] for n, v in filled.items()}) for start in starts]
        return [np.concatenate(values)[:count] for values in zip(*parts, strict=True)]

    def _named(self, x: Arrays, what: str) -> dict[str, NDArray[Any]]:
        names = list(self.input_shapes)
        found = dict(x) if isinstance(x, Mapping) else {names[0]: x}
        if set(found) != set(names):
            one = "" if len(names) > 1 else f"; name it with --{what}-key NAME, in Python key="
            raise KanCompileError(
                f"{what}: found the inputs {list(found) if isinstance(x, Mapping) else 'of one array'!r}, expected {names!r} as "
                f"{self.name} has them{one or '; pass arrays by those names'}"
            )
        return {
            name: found[name] if found[name].dtype == kind else found[name].astype(kind)
            for name, kind in self._types.items()
        }

    def _run(self, named: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            outputs: list[NDArray[Any]] = self.session.run(None, named)
        except Exception as error:
            shapes = [value.shape for value in named.values()]
            shown = f"an input of shape {shapes[0]!r}" if len(shapes) == 1 else f"inputs of shapes {shapes!r}"
            raise KanCompileError(f"{self.name}: ONNX Runtime failed on {shown} ({first_line(error)})") from error
        strange = [type(value).__name__ for value in outputs if not _holds_numbers(value)]
        if strange:
            raise KanCompileError(f"{self.name}: found an output of {strange[0]}, expected tensors of numbers")
        return outputs

    def __call__(self, x: Values) -> Values:
        """Return the only output, or several by name.

        Raises:
            KanCompileError: ONNX Runtime refuses.
        """
        return _values(self.run(arrays_of(x)), self.output_names)


def run_unfused(model: ModelFile, x: Values) -> Values:
    """Run a file in ONNX Runtime without kernel fusion (``session.disable_quant_qdq``), as its graph is written."""
    return RuntimeModel(model, fused=False)(x)


def run_reference(model: ModelFile, x: Values) -> Values:
    """Run a file in the reference implementation of the ``onnx`` package, which shares no code with ONNX Runtime."""
    from onnx.reference import ReferenceEvaluator

    with foreign(name_of(model), "give a complete ONNX file"):
        evaluator = ReferenceEvaluator(onnx.load_model_from_string(read_model(model)))
        found = arrays_of(x)
        named = found if isinstance(found, dict) else {evaluator.input_names[0]: found}
        outputs: Any = evaluator.run(None, named)
        return _values([np.asarray(output) for output in outputs], evaluator.output_names)


def _values(outputs: list[NDArray[Any]], names: Sequence[str]) -> Values:
    found = [torch.from_numpy(output) for output in outputs]
    return found[0] if len(found) == 1 else NamedTensors(dict(zip(names, found, strict=True)))


def _holds_numbers(output: Any) -> bool:
    """Whether an output of ONNX Runtime is an array of numbers; files may also return texts, lists and mappings."""
    return isinstance(output, np.ndarray) and output.dtype.kind in "fiub"
