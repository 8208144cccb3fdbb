"""Drop the two reshapes that are left in front of a convolution where nothing is looked up.

    Reshape(Unsqueeze(rows [b, *, n], -1), [-1, *, n])      ->      rows

A table yields ``[b, *, n, k]`` and a convolution reads columns ``[b, *, n k]``; row numbers that are passed on are both already.
"""

from __future__ import annotations

import onnx_ir as ir


def drop_needless_reshapes(graph: ir.Graph) -> None:
    """Rewrite a graph in place; the nodes that nobody reads any more go later."""
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[0] is None:
            continue
        before = node.inputs[0].producer()
        rows = before.inputs[0] if before is not None and before.op_type == "Unsqueeze" else None
        sizes = None if node.inputs[1] is None else ir.convenience.get_const_tensor(node.inputs[1])
        if rows is None or rows.shape is None or sizes is None or len(rows.shape) < 3:
            continue
        wanted = sizes.numpy().tolist()
        stays = len(wanted) == len(rows.shape) and all(
            size in (0, own) for size, own in zip(wanted[1:], rows.shape[1:], strict=True)
        )
        if stays:
            node.outputs[0].replace_all_uses_with(rows)
