"""Node data for Model Explorer: every node of an ONNX file in the color of its layer's error.

The format is that of ``model_explorer.node_data_builder.GraphNodeData``: ``results`` by the name of an output tensor of the node,
and a gradient from the least value to the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

from kancompile.errors import foreign

_WORST, _BEST = "#d55e00", "#ffffff"


def node_data(report: Mapping[str, Any], model: bytes) -> dict[str, Any]:
    """Give the SQNR in dB of the layer that a node belongs to, the least one in red.

    Args:
        report: of the file.
        model: an ONNX file whose nodes are called as kancompile names them: by their layers.

    Raises:
        KanCompileError: the file is no ONNX model.
    """
    known = {layer["name"]: layer["sqnr_db"] for layer in report["layers"] if isinstance(layer["sqnr_db"], int | float)}
    longest_first = sorted(known, key=len, reverse=True)  # "layers.10" is not "layers.1"
    results: dict[str, Any] = {}
    with foreign("report: the file", "give a complete .onnx file"):
        graph = onnx.load_model_from_string(model).graph
    for node in graph.node:
        name = next((name for name in longest_first if node.name.startswith((f"{name}/", f"{name}."))), None)
        if name is not None:
            results |= {output: {"value": round(known[name], 2)} for output in node.output if output}
    return {"results": results, "gradient": [{"stop": 0, "bgColor": _WORST}, {"stop": 1, "bgColor": _BEST}]}
