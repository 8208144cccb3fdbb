"""Target ``ort-cpu``: a QDQ ONNX file for the CPU of stock ONNX Runtime (see ``kancompile.targets.onnx``)."""

from __future__ import annotations

from kancompile.targets.contract import Target
from kancompile.targets.onnx import emit

TARGET = Target(
    "ort-cpu",
    ".onnx",
    (2, 3, 4, 5, 6, 7, 8),
    emit,
    takes_batch=True,
    joint_tables=True,
    external_data=True,
    guards_nan=True,
)
