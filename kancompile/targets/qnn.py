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
import torch
from onnx import helper
from torch import nn

from kancompile.errors import KanCompileError
from kancompile.ir import HandOver, IndexQuantizer, IntegerContraction, Program, TableExpansion
from kancompile.targets.contract import Target
from kancompile.targets.onnx import emit as emit_onnx

_WRAPPED = ("Gather", "Reshape", "Transpose", "Concat")
_ROWS = 256
_BATCH = 1


def emit(program: Program, metadata: Mapping[str, str], storage: str = "smallest") -> bytes:
    """Write a program as a serialized ONNX model for batches of one sample.

    Args:
        program: an integer program whose tables have at most 256 rows and whose outputs are quantized.
        metadata: key-value pairs for the model's ``metadata_props``.
        storage: not used; weights of all widths are int8.

    Raises:
        KanCompileError: a layer or an operator has no 8-bit form; the recipe that works is named.
    """
    _check(program)
    model = onnx.load_from_string(emit_onnx(_pad_tables(program), metadata, "fastest", plain=True))
    _fix_batch(model)
    _wrap(model)
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


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


def _fix_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        first.Clear()
        first.dim_value = _BATCH


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


def _wrap(model: onnx.ModelProto) -> None:
    """Put operators that move uint8 codes between DequantizeLinear and QuantizeLinear, in place.

    Both have the scale and zero point that the codes have where they come from or, for a table, where they are read: QNN
    gives a tensor one encoding, and would read codes wrongly that change theirs on the way.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for source in node.input:
            readers.setdefault(source, []).append(node)
    tables = {value.name for value in model.graph.initializer if value.data_type == onnx.TensorProto.UINT8}
    encodings: dict[str, Sequence[str]] = {}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            encodings[node.output[0]] = list(node.input[1:3])
        sources = list(node.input if node.op_type == "Concat" else node.input[:1])
        moved = node.output[0]
        if node.op_type == "Gather" and sources[0] in tables:
            encoding: Sequence[str] | None = _encoding_behind(moved, readers)
        else:
            encoding = encodings.get(sources[0]) if sources else None
        if node.op_type not in _WRAPPED or encoding is None:
            nodes.append(node)
            continue
        encodings[moved] = encoding
        for place, source in enumerate(sources):
            real = f"{moved}.real{place}"
            nodes.append(helper.make_node("DequantizeLinear", [source, *encoding], [real], f"{real}/DQ"))
            node.input[place] = real
        node.output[0] = f"{moved}.real"
        nodes.append(node)
        nodes.append(helper.make_node("QuantizeLinear", [node.output[0], *encoding], [moved], f"{moved}/Q"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _encoding_behind(name: str, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> Sequence[str] | None:
    """Find scale and zero point with which codes are dequantized, behind operators that only move them."""
    for node in readers.get(name, ()):
        if node.op_type == "DequantizeLinear":
            return list(node.input[1:3])
        if node.op_type in _WRAPPED:
            found = _encoding_behind(node.output[0], readers)
            if found is not None:
                return found
    return None


TARGET = Target("qnn", ".onnx", (2, 3, 4, 5, 6, 7, 8), emit, quantized_outputs=True)
