"""ONNX files: the exporter's translations of our operators, and how lookups and weights are laid out."""

from kancompile.targets.onnx.export import build_model, checked_bytes, emit
from kancompile.targets.onnx.naming import PAIR_INDEX

__all__ = [
    "PAIR_INDEX",
    "build_model",
    "checked_bytes",
    "emit",
]
