"""Target ``qnn``: the ONNX file in the form that the HTP of Qualcomm processors runs without leaving it.

It is the file of ``ort-cpu`` with what ONNX Runtime's QNN execution provider asks for::

    every operator between DequantizeLinear and QuantizeLinear, looking up, reshaping and transposing too
    uint8 activations, from the row numbers of the input to the output
    a fixed batch of one, int8 weights that no constant node has to widen

So tables have at most 256 rows, and the output is quantized (pass ``quantize-outputs``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
import torch
from torch import nn

from kancompile.errors import KanCompileError
from kancompile.ir import HandOver, IndexQuantizer, IntegerContraction, Program, TableExpansion
from kancompile.targets.contract import Target
from kancompile.targets.onnx import build_model, checked_bytes

_WRAPPED = ("Gather", "Reshape", "Transpose", "Concat")
_ROWS = 256
_Encoding = Sequence[ir.Value | None]  # scale and zero point


def emit(program: Program, metadata: Mapping[str, str], storage: str = "smallest", batch: int | None = None) -> bytes:
    """Write a program as a serialized ONNX model for batches of one sample."""
    _check(program)
    model = build_model(_pad_tables(program), metadata, "fastest", plain=True)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([1, *value.shape[1:]])
    _wrap(model.graph)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return checked_bytes(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def _check(program: Program) -> None:
    layers = program.layers()
    contractions = {layer.name: program.contraction(layer) for layer in layers}
    for name, contraction in contractions.items():
        if not isinstance(contraction, IntegerContraction):
            raise KanCompileError(
                f"layer {name!r}: target 'qnn' has integer layers only, found {type(contraction).__name__}; use a "
                'recipe with precision = "int8" and lowering = "table"'
            )
    for layer in layers:
        for table in program.tables(layer).values():
            if not table.index.is_8_bit:
                raise KanCompileError(
                    f"layer {layer.name!r}: found a table of {table.index.levels} rows, expected at most 256 for target "
                    "'qnn', whose row numbers have 8 bits; use levels = 256 for this layer"
                )
    for name, contraction in contractions.items():
        if contraction.output is None:
            shared = next((layer for layer in layers if layer.uses > 1), None)
            if shared is not None:
                raise KanCompileError(
                    f"layer {name!r}: hands over real values, expected 8 bits for target 'qnn'; layer {shared.name!r} is used "
                    f"{shared.uses} times, with one table for all of them: make a copy of its module for every use, or use "
                    "target ort-cpu"
                )
            raise KanCompileError(
                f"layer {name!r}: hands over real values, expected 8 bits for target 'qnn'; compile for this target "
                'alone, with one scale for each output (granularity = "channel") and levels = 256'
            )
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function" and node.target is not torch.ops.kancompile.dequantize_index.default:
            raise KanCompileError(
                f"target 'qnn': operator {node.target!s} ({node.name}) outside the KAN layers has no 8-bit form; compile "
                "the part without it, or use target ort-cpu"
            )


def _pad_tables(program: Program) -> Program:
    """Give every table 256 rows, so that QuantizeLinear saturates where the table ends and no Clip is needed."""
    modules: dict[str, nn.Module] = {}
    for layer in program.layers():
        contraction = program.contraction(layer)
        for target, table in program.tables(layer).items():
            if table.index.levels < _ROWS:
                modules[target] = _with_all_rows(table)
        handed = contraction.hands_over
        if handed.index is not None and handed.index.levels < _ROWS:
            wide = IndexQuantizer(handed.index.scale, handed.index.zero_point, _ROWS)
            modules[layer.contraction] = contraction.replace(hands_over=HandOver(handed.kind, wide))
    return program.replace_modules(modules) if modules else program


def _with_all_rows(table: TableExpansion) -> TableExpansion:
    levels = table.index.levels
    parts = table.table.reshape(table.n_tables, levels, table.k)
    last = parts[:, -1:].expand(-1, _ROWS - levels, -1)
    rows = torch.cat([parts, last], dim=1).reshape(-1, table.k)
    first_row = None if table.first_row is None else table.first_row // levels * _ROWS
    index = IndexQuantizer(table.index.scale, table.index.zero_point, _ROWS)
    return table.replace(index=index, table=rows, first_row=first_row)


def _wrap(graph: ir.Graph) -> None:
    """Put operators that move uint8 codes between DequantizeLinear and QuantizeLinear, in place.

    Both have the scale and zero point that the codes have where they come from or, for a table, where they are read: QNN
    gives a tensor one encoding, and would read codes wrongly that change theirs on the way.
    """
    encodings: dict[ir.Value | None, _Encoding] = {}
    for node in list(graph):
        moved, sources = node.outputs[0], node.inputs if node.op_type == "Concat" else node.inputs[:1]
        if node.op_type == "QuantizeLinear":
            encodings[moved] = node.inputs[1:3]
        if node.op_type not in _WRAPPED:
            continue
        source = sources[0]
        assert source is not None
        is_table = node.op_type == "Gather" and source.is_initializer() and source.dtype == ir.DataType.UINT8
        encoding = _encoding_behind(moved) if is_table else encodings.get(source)
        if encoding is None:
            continue
        name, nodes = moved.name, ir.tape.Tape()
        for place, codes in enumerate(sources):
            real = f"{name}.real{place}"
            inputs, output = [codes, *encoding], ir.val(real)
            node.replace_input_with(place, nodes.op("DequantizeLinear", inputs, name=f"{real}/DQ", output=output))
        graph.insert_before(node, nodes.nodes)
        quantized = ir.val(name)
        moved.replace_all_uses_with(quantized, replace_graph_outputs=True)
        moved.name = f"{name}.real"
        inputs = [moved, *encoding]
        graph.insert_after(node, ir.node("QuantizeLinear", inputs, name=f"{name}/Q", outputs=[quantized]))
        encodings[quantized] = encoding


def _encoding_behind(value: ir.Value) -> _Encoding | None:
    """Find scale and zero point with which codes are dequantized, behind operators that only move them."""
    for node in value.consumers():
        if node.op_type == "DequantizeLinear":
            return node.inputs[1:3]
        found = _encoding_behind(node.outputs[0]) if node.op_type in _WRAPPED else None
        if found is not None:
            return found
    return None


TARGET = Target(
    "qnn",
    ".onnx",
    (2, 3, 4, 5, 6, 7, 8),
    emit,
    quantized_outputs=True,
    recurrent_layers=False,
    precisions=("int8",),
    most_levels=256,
)
