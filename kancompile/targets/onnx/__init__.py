"""ONNX files: the exporter's translations of our operators, and how look-ups and weights are laid out."""

from kancompile.targets.onnx.export import emit, emit_batch

__all__ = ["emit", "emit_batch"]
