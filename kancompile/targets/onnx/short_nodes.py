"""Write nodes of files of short metadata in the forms that take the fewest bytes.

    Reshape(x [b, n, k], [-1, n k])     ->      Flatten(x)
    Reshape(x [b, n], [-1, n, 1])       ->      Unsqueeze(x, [-1])
    Concat(..., axis = -1)              ->      Concat(..., axis = rank - 1)
    Gemm(x, W, zeros)                   ->      Gemm(x, W)

Sizes are a constant of 25 to 33 bytes for each layer, negative attributes take ten bytes. What is computed stays the same.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from kancompile.targets.onnx.folded_nodes import FoldedNodes
from kancompile.targets.onnx.needless_reshapes import reshaped_to


def shorten_nodes(graph: ir.Graph) -> None:
    """Rewrite a graph in place; constants that nobody reads any more go later."""
    for node in list(graph):
        wanted = reshaped_to(node)
        if wanted is not None:
            _shorten_reshape(graph, node, wanted)
        elif node.op_type == "Concat":
            axis, shape = node.attributes["axis"].as_int(), node.outputs[0].shape
            if axis < 0 and shape is not None:
                node.attributes["axis"] = ir.AttrInt64("axis", axis + len(shape))
        elif node.op_type == "Gemm" and len(node.inputs) == 3 and node.inputs[2] is not None:
            bias = ir.convenience.get_const_tensor(node.inputs[2])
            if bias is not None and not bias.numpy().any():
                node.replace_input_with(2, None)
                node.resize_inputs(2)


def _shorten_reshape(graph: ir.Graph, node: ir.Node, wanted: list[int]) -> None:
    source = node.inputs[0]
    shape = None if source is None else source.shape
    sizes = [] if shape is None else [size for size in shape[1:] if isinstance(size, int)]
    if shape is None or len(sizes) < len(shape) - 1 or wanted[0] not in (0, -1):
        return
    if len(wanted) == 2 and len(shape) > 2 and math.prod(sizes) == wanted[1]:
        node.op_type = "Flatten"
        node.attributes.clear()
        node.replace_input_with(1, None)
        node.resize_inputs(1)
    elif len(shape) > 1 and wanted[1:] == [*sizes, 1]:
        node.op_type = "Unsqueeze"
        node.attributes.clear()
        node.replace_input_with(1, FoldedNodes(graph, "shape").stored("last", np.array([-1], np.int64)))
