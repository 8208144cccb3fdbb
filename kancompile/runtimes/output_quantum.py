"""Read the value of one unit of the last layer's integer sum from a compiled file."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from kancompile.errors import foreign
from kancompile.runtimes.session import ModelFile, name_of, read_model

_PASSED = ("Reshape", "Sum", "Identity", "Flatten", "Squeeze")


def output_quantum(model: ModelFile) -> NDArray[np.float32] | None:
    """Return the scale of the layer that the output comes from, in a shape that broadcasts against it.

    Args:
        model: path or bytes of an ONNX file, which a session has loaded.

    Returns:
        one value, or one for each output, along the last dimension; ``None`` where the output is no layer's.
    """
    with foreign(name_of(model), "give an .onnx file that kancompile wrote"):
        graph = onnx.load_model_from_string(read_model(model)).graph
        producers = {name: node for node in graph.node for name in node.output}
        constants = {tensor.name: tensor for tensor in graph.initializer}
        constants |= {
            node.output[0]: attribute.t
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        node = producers.get(graph.output[0].name)
        while node is not None and node.op_type in _PASSED:
            node = producers.get(node.input[0])
        if node is not None and node.op_type in ("Gemm", "MatMul"):
            node = producers.get(node.input[1])
        if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in constants:
            return None
        return np.atleast_1d(numpy_helper.to_array(constants[node.input[1]]).astype(np.float32))
