"""Drop reshapes that change nothing.

    Reshape(x [b, n], [-1, n])                              ->      x
    Reshape(Unsqueeze(rows [b, *, n], -1), [-1, *, n])      ->      rows

A table yields ``[b, *, n, k]`` and a convolution reads columns ``[b, *, n k]``; row numbers that are passed on are both already.
"""

from __future__ import annotations

import onnx_ir as ir


def drop_needless_reshapes(graph: ir.Graph) -> None:
    """Rewrite a graph in place; the nodes that nobody reads any more go later."""
    for node in list(graph):
        wanted = reshaped_to(node)
        source = node.inputs[0] if wanted is not None else None
        if wanted is None or source is None:
            continue
        before = source.producer()
        squeezed = before.inputs[0] if before is not None and before.op_type == "Unsqueeze" else None
        if _is_of(source, wanted) and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(source)
        elif squeezed is not None and len(squeezed.shape or ()) >= 3 and _is_of(squeezed, wanted):
            node.outputs[0].replace_all_uses_with(squeezed)


def reshaped_to(node: ir.Node) -> list[int] | None:
    """Give the sizes of a Reshape; ``None`` for other nodes, and where a file does not say them."""
    if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    sizes = ir.convenience.get_const_tensor(node.inputs[1])
    return None if sizes is None else sizes.numpy().tolist()  # type: ignore[no-any-return]


def _is_of(value: ir.Value, wanted: list[int]) -> bool:
    """Whether a value has the wanted sizes behind its batch, which stays what it is."""
    if value.shape is None or len(value.shape) != len(wanted) or wanted[0] not in (0, -1):
        return False
    return all(size in (0, own) for size, own in zip(wanted[1:], value.shape[1:], strict=True))
