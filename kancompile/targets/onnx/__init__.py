"""ONNX files: the exporter's translations of our operators, and how look-ups and weights are laid out."""

from kancompile.targets.onnx.export import emit, emit_batch
from kancompile.targets.onnx.naming import PAIR_INDEX

__all__ = [
    "PAIR_INDEX",
    "emit",
    "emit_batch",
]
