"""What a program leaves in float, why, and about how much of the time it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kancompile.compiler.time_estimate import estimate_times
from kancompile.frontend import node_source
from kancompile.ir import RECURRENCES, Program, Values
from kancompile.recipe import LookUpCosts

_REASONS = {
    "native_layer_norm": "a normalization has no integer kernel in ONNX Runtime",
    "native_group_norm": "a normalization has no integer kernel in ONNX Runtime",
    "_native_batch_norm_legit": "a normalization has no integer kernel in ONNX Runtime",
    "_native_batch_norm_legit_no_training": "a normalization has no integer kernel in ONNX Runtime",
    "_softmax": "softmax keeps its precision in float",
    "bmm": "both factors depend on the data",
    "mm": "both factors depend on the data, or they are no float32 matrices",
    "addmm": "both factors depend on the data, or they are no float32 matrices",
    "convolution": "transposed, or its kernel depends on the data",
    "mean": "no integer kernel in ONNX Runtime for means over any dimensions",
    "sum": "no integer kernel in ONNX Runtime",
    **dict.fromkeys(
        RECURRENCES, "a recurrent layer, in float: ONNX Runtime's 8-bit form rounds states by ranges of the moment"
    ),
    "embedding": "rows of a table, picked by integers: nothing is computed",
    "avg_pool2d": "an average of real values; an integer kernel where a quantizer stands directly behind",
}


_ELEMENTWISE = "elementwise between layers, of values that others read too or that end the network"


_OTHER = "not part of a layer: stays as PyTorch computes it"


_FREE = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "clone", "alias", "unsqueeze", "squeeze"),
        *("slice", "select", "split", "split_with_sizes", "cat", "stack", "expand", "unbind", "flatten"),
        *("sym_size", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "constant_pad_nd"),
    )
)


def left_in_float(program: Program, x: Values, costs: LookUpCosts) -> list[dict[str, Any]]:
    """Say which operators of a program are neither integer modules nor mere moves of values, and why.

    Args:
        program: lowered or not.
        x: a few samples, on which sizes are seen.
        costs: of integer layers, by the recipe's profile.

    Returns:
        ``node``, ``operator``, ``reason``, ``count`` of nodes of that operator, the ``source`` line of the first one, and the
        estimated ``share`` of the time of a sample that all of them take; the largest share first.
    """
    times = estimate_times(program, x, costs)
    nodes: dict[str, list[fx.Node]] = {}
    targets: dict[str, torch._ops.OpOverload] = {}
    for node in program.graph_module.graph.nodes:
        if node not in times or not isinstance(node.target, torch._ops.OpOverload):
            continue
        operator = str(node.target.overloadpacket.__name__)
        if operator not in _FREE:
            nodes.setdefault(operator, []).append(node)
            targets[operator] = node.target
    found = []
    for operator, own in nodes.items():
        pointwise = torch.Tag.pointwise in targets[operator].tags
        found.append(
            {
                "node": own[0].name,
                "operator": operator,
                "count": str(len(own)),
                "reason": _REASONS.get(operator, _ELEMENTWISE if pointwise else _OTHER),
                "source": node_source(own[0]).rpartition("/")[2],
                "share": round(sum(times[node] for node in own) / sum(times.values()), 3),
            }
        )
    return sorted(found, key=lambda entry: -float(entry["share"]))
