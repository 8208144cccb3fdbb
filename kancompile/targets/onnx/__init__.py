"""ONNX files: the exporter's translations of our operators, and how look-ups and weights are laid out."""

from kancompile.targets.onnx.export import PAIR_INDEX, emit, emit_batch

__all__ = [
    "PAIR_INDEX",
    "emit",
    "emit_batch",
]
