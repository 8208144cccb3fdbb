"""What ONNX Runtime's own quantizers make of an exported float KAN."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

_BATCH = 50  # the calibrator keeps every intermediate tensor of a batch


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Hand out calibration samples batch by batch under the name of the model's input."""

    def __init__(self, samples: NDArray[np.float32], name: str) -> None:
        self.batches: Iterator[NDArray[np.float32]] = iter(np.split(samples, range(_BATCH, len(samples), _BATCH)))
        self.name = name

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next batch, ``None`` after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch}


def static_int8(float_file: bytes, samples: NDArray[np.float32], input_name: str) -> bytes:
    """Quantize statically after the recommended preparation: QDQ, U8 activations, S8 weights per channel, min-max."""

    def quantize(source: Path, result: Path) -> None:
        quantize_static(
            str(source),
            str(result),
            _Batches(samples, input_name),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
        )

    return _through_files(float_file, quantize)


def dynamic_int8(float_file: bytes) -> bytes:
    """Quantize weights to S8 per channel and activations at run time, after the same preparation."""

    def quantize(source: Path, result: Path) -> None:
        quantize_dynamic(str(source), str(result), per_channel=True, weight_type=QuantType.QInt8)

    return _through_files(float_file, quantize)


def _through_files(model: bytes, quantize: Callable[[Path, Path], None]) -> bytes:
    """Prepare a model (shape inference, optimisation) and quantize it; these tools work on files."""
    with tempfile.TemporaryDirectory() as name, _without_notes():
        folder = Path(name)
        (folder / "float.onnx").write_bytes(model)
        quant_pre_process(str(folder / "float.onnx"), str(folder / "prepared.onnx"))
        quantize(folder / "prepared.onnx", folder / "quantized.onnx")
        return (folder / "quantized.onnx").read_bytes()


@contextmanager
def _without_notes() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
