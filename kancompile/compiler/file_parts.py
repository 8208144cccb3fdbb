"""Say where the bytes of an ONNX file go."""

from __future__ import annotations

import onnx

_CODES = ("UINT8", "INT8", "INT4", "INT2")
_LARGE = 64
"""Bytes from which on a constant is a table or a matrix of weights, not a scale or a shape."""


def file_parts(content: bytes) -> dict[str, int]:
    """Divide the bytes of an ONNX file among tables and weights, other constants, nodes, metadata, and what is left."""
    model = onnx.load_model_from_string(content)
    sizes = [(one, one.ByteSize()) for one in model.graph.initializer]
    large = sum(
        size for one, size in sizes if onnx.TensorProto.DataType.Name(one.data_type) in _CODES and size > _LARGE
    )
    parts = {
        "tables and weights": large,
        "scales, biases and other constants": sum(size for _, size in sizes) - large,
        f"{len(model.graph.node)} nodes": sum(node.ByteSize() for node in model.graph.node),
        "metadata": sum(entry.ByteSize() for entry in model.metadata_props),
    }
    return parts | {"inputs, outputs and frame": len(content) - sum(parts.values())}


def why_larger(content: bytes, float_bytes: int, optimized: bool) -> str:
    """Say why a file is larger than the float parameters that it was made from.

    Args:
        content: of the file.
        float_bytes: of the parameters.
        optimized: whether it was made as small as it gets already.
    """
    parts = ", ".join(f"{size:,} of {name}" for name, size in file_parts(content).items())
    way_out = "" if optimized else '; optimize = "size" takes as few rows and bits as goal_sqnr allows'
    return f"size: the file takes {len(content):,} bytes ({parts}), the float parameters {float_bytes:,}{way_out}"
