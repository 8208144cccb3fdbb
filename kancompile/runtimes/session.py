"""Run ONNX files: as a user would, without kernel fusion, and in ONNX's own reference implementation."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import torch
from numpy.typing import NDArray
from torch import Tensor

from kancompile.data import shape_hint
from kancompile.errors import KanCompileError, first_line, foreign

ModelFile = str | os.PathLike[str] | bytes


def read_model(model: ModelFile) -> bytes:
    """Return the bytes of an ONNX file, given its path or those bytes.

    Raises:
        KanCompileError: the file cannot be read.
    """
    if isinstance(model, bytes):
        return model
    try:
        return Path(model).read_bytes()
    except OSError as error:
        raise KanCompileError(
            f"model {os.fspath(model)!r}: cannot be read ({error.strerror}); give an .onnx file"
        ) from error


def name_of(model: ModelFile) -> str:
    """Say in errors and tables which file is meant."""
    return "model" if isinstance(model, bytes) else f"model {os.fspath(model)!r}"


CALIBRATED_RANGE = "kancompile.calibrated_range"
"""Metadata of a file: JSON of the smallest and the largest input value that it was calibrated with."""


class RuntimeModel:
    """An ONNX file in a CPU session of ONNX Runtime, called with and returning tensors.

    Attributes:
        session: the session.
        input_name: name of its only input.
        input_shape: shape of one sample; -1 where the file leaves a dimension open.
        batch: the only batch size that the file takes, ``None`` for any.
    """

    def __init__(self, model: ModelFile, threads: int = 1, fused: bool = True) -> None:
        """Create the session.

        Args:
            model: path or bytes of the file.
            threads: threads inside an operator, 0 for one per core.
            fused: ``False`` keeps float arithmetic between DequantizeLinear and QuantizeLinear, as the file is written.

        Raises:
            KanCompileError: ONNX Runtime cannot load the file, or it has not one float32 input.
        """
        self.name = name_of(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # idle threads that spin would take the cores from whatever is measured beside it
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not fused:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        content = read_model(model)
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            inputs = self.session.get_inputs()
        except Exception as error:  # its exceptions share no base class
            raise KanCompileError(
                f"{self.name}: ONNX Runtime {onnxruntime.__version__} cannot load it ({first_line(error)}); "
                "give a complete ONNX file"
            ) from error
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            found = [f"{value.name}: {value.type}" for value in inputs]
            raise KanCompileError(f"{self.name}: found inputs {found!r}, expected one of type tensor(float)")
        self.input_name = inputs[0].name
        self.batch = inputs[0].shape[0] if inputs[0].shape and isinstance(inputs[0].shape[0], int) else None
        if self.batch == 0:
            raise KanCompileError(
                f"{self.name}: found a batch of 0 samples, expected at least 1; give a complete ONNX file"
            )
        self.input_shape = tuple(size if isinstance(size, int) else -1 for size in inputs[0].shape[1:])

    @property
    def calibrated_range(self) -> tuple[float, float] | None:
        """Smallest and largest input value of the calibration, ``None`` where the file does not say."""
        text = self.session.get_modelmeta().custom_metadata_map.get(CALIBRATED_RANGE)
        try:
            low, high = map(float, json.loads(text)) if text else (math.nan, math.nan)
        except (ValueError, TypeError):
            return None
        return (low, high) if low <= high else None

    def check_input(self, shape: tuple[int, ...], what: str) -> None:
        """Verify that samples of that shape fit.

        Raises:
            KanCompileError: they do not.
        """
        fits = len(shape) == len(self.input_shape) and all(
            expected in (-1, found) for found, expected in zip(shape, self.input_shape, strict=True)
        )
        if not fits:
            hint = shape_hint(shape, self.input_shape)
            raise KanCompileError(
                f"{what}: found samples of shape {shape!r}, expected {self.input_shape!r} as {self.name} reads them"
                + (f"; {hint}" if hint else "")
            )

    def run(self, x: NDArray[np.float32]) -> list[NDArray[Any]]:
        """Return all outputs for ``[b, *input_shape]``; a file of one batch size gets it piece by piece, the last filled up.

        Raises:
            KanCompileError: ONNX Runtime refuses.
        """
        if self.batch is None or len(x) == self.batch or not len(x):
            return self._run(x)
        filled = np.concatenate([x, np.repeat(x[-1:], -len(x) % self.batch, axis=0)])
        parts = [self._run(filled[start : start + self.batch]) for start in range(0, len(filled), self.batch)]
        return [np.concatenate(values)[: len(x)] for values in zip(*parts, strict=True)]

    def _run(self, x: NDArray[np.float32]) -> list[NDArray[Any]]:
        try:
            outputs: list[NDArray[Any]] = self.session.run(None, {self.input_name: x})
        except Exception as error:
            raise KanCompileError(
                f"{self.name}: ONNX Runtime failed on an input of shape {x.shape!r} ({first_line(error)})"
            ) from error
        strange = [type(value).__name__ for value in outputs if not _holds_numbers(value)]
        if strange:
            raise KanCompileError(f"{self.name}: found an output of {strange[0]}, expected tensors of numbers")
        return outputs

    def __call__(self, x: Tensor) -> Tensor:
        """Return the only output.

        Raises:
            KanCompileError: there are several, or ONNX Runtime refuses.
        """
        outputs = self.run(np.ascontiguousarray(x.detach().numpy(), dtype=np.float32))
        return torch.from_numpy(_single(outputs, self.name))


def run_unfused(model: ModelFile, x: Tensor) -> Tensor:
    """Run a file in ONNX Runtime without kernel fusion (``session.disable_quant_qdq``), as its graph is written."""
    return RuntimeModel(model, fused=False)(x)


def run_reference(model: ModelFile, x: Tensor) -> Tensor:
    """Run a file in the reference implementation of the ``onnx`` package, which shares no code with ONNX Runtime."""
    from onnx.reference import ReferenceEvaluator

    with foreign(name_of(model), "give a complete ONNX file"):
        evaluator = ReferenceEvaluator(onnx.load_model_from_string(read_model(model)))
        outputs: Any = evaluator.run(None, {evaluator.input_names[0]: x.detach().numpy()})
        return torch.from_numpy(np.asarray(_single(outputs, name_of(model))))


def _single(outputs: list[NDArray[Any]], name: str) -> NDArray[Any]:
    if len(outputs) != 1:
        raise KanCompileError(
            f"{name}: found {len(outputs)} outputs, expected one; wrap the model to return one tensor"
        )
    return outputs[0]


def _holds_numbers(output: Any) -> bool:
    """Whether an output of ONNX Runtime is an array of numbers; files may also return texts, lists and mappings."""
    return isinstance(output, np.ndarray) and output.dtype.kind in "fiub"
