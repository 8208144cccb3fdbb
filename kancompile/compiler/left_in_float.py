"""What a program leaves in float, and why."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kancompile.ir import Program

_REASONS = {
    "native_layer_norm": "a normalisation has no integer kernel in ONNX Runtime",
    "native_group_norm": "a normalisation has no integer kernel in ONNX Runtime",
    "_native_batch_norm_legit": "a normalisation has no integer kernel in ONNX Runtime",
    "_native_batch_norm_legit_no_training": "a normalisation has no integer kernel in ONNX Runtime",
    "_softmax": "softmax keeps its precision in float",
    "bmm": "both factors depend on the data",
    "mm": "both factors depend on the data, or they are no float32 matrices",
    "addmm": "both factors depend on the data, or they are no float32 matrices",
    "convolution": "transposed, or its kernel depends on the data",
    "mean": "no integer kernel in ONNX Runtime for means over any dimensions",
    "sum": "no integer kernel in ONNX Runtime",
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


def left_in_float(program: Program) -> Iterator[dict[str, str]]:
    """Say which operators of a program are neither integer modules nor mere moves of values, and why.

    Yields:
        ``node``, ``operator``, ``reason`` and ``count`` of nodes of that operator, in order of the first.
    """
    first: dict[str, str] = {}
    targets: dict[str, torch._ops.OpOverload] = {}
    counts: dict[str, int] = {}
    for node in program.graph_module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        operator = str(node.target.overloadpacket.__name__)
        if operator in _FREE:
            continue
        first.setdefault(operator, node.name)
        targets[operator] = node.target
        counts[operator] = counts.get(operator, 0) + 1
    for operator, node_name in first.items():
        pointwise = torch.Tag.pointwise in targets[operator].tags
        reason = _REASONS.get(operator, _ELEMENTWISE if pointwise else _OTHER)
        yield {"node": node_name, "operator": operator, "count": str(counts[operator]), "reason": reason}
