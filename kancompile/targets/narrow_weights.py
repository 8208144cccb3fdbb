"""Store weight codes of 4 bits and less in int4 tensors that still compute as int8.

``int4 initializer -> Cast to int8 -> DequantizeLinear -> Gemm``: ONNX Runtime folds the Cast when it loads the file, so
the product is the same integer kernel at the same speed, while ``DequantizeLinear`` straight on int4 has no fused kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import onnx_ir as ir


def store_narrow_weights(model: ir.Model, bits_of: Mapping[str, int]) -> None:
    """Exchange int8 initializers for int4 ones, in place.

    Args:
        model: the model.
        bits_of: name of an initializer to the bits of its codes (4 or less; there is no 3-bit type).
    """
    for name in bits_of:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        codes = value.const_value.numpy()
        narrow = ir.Value(
            name=f"{name}.int4",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.INT4),
            const_value=ir.tensor(codes.astype(ml_dtypes.int4), dtype=ir.DataType.INT4, name=f"{name}.int4"),
        )
        consumers = [usage.node for usage in value.uses()]
        cast = ir.node("Cast", [narrow], {"to": int(ir.DataType.INT8)}, name=f"{name}/Cast")
        cast.outputs[0].name = f"{name}.int8"
        cast.outputs[0].shape = value.shape
        cast.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        model.graph.insert_before(consumers[0], cast)
        for usage in list(value.uses()):
            usage.node.replace_input_with(usage.idx, cast.outputs[0])
        del model.graph.initializers[name]
        model.graph.initializers[narrow.name] = narrow
