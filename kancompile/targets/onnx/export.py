"""Write a program as a QDQ ONNX file for the CPU of stock ONNX Runtime.

Opset 21 and IR 10 load in every ONNX Runtime from 1.20 on. The exporter of PyTorch translates what is not KAN, the
table in ``kancompile.targets.onnx.translation`` the custom operators; afterwards the graph is named, cleaned and annotated.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from kancompile.errors import KanCompileError, reason
from kancompile.ir import (
    MOST_FILE_BYTES,
    IntegerContraction,
    ModelWithExternalData,
    Program,
    SmoothCodes,
    TableExpansion,
    export_dynamic,
    smooth_codes,
)
from kancompile.targets.contract import METADATA, SHORT
from kancompile.targets.onnx.arrange_tables import arrange_tables
from kancompile.targets.onnx.column_tables import write_column_tables
from kancompile.targets.onnx.external_data import for_the_checker, is_too_large, move_out
from kancompile.targets.onnx.function_planes import deal_planes
from kancompile.targets.onnx.joint_tables import write_joint_tables
from kancompile.targets.onnx.naming import name_nodes, name_values, shorten_names
from kancompile.targets.onnx.narrow_tables import store_narrow_tables, table_bits
from kancompile.targets.onnx.narrow_weights import NarrowWeights, store_narrow_weights
from kancompile.targets.onnx.needless_reshapes import drop_needless_reshapes
from kancompile.targets.onnx.padded_tables import store_padded_tables
from kancompile.targets.onnx.pair_tables import build_pair_tables
from kancompile.targets.onnx.short_nodes import shorten_nodes
from kancompile.targets.onnx.translate_convolutions import CONVOLUTION_TRANSLATIONS
from kancompile.targets.onnx.translate_recurrence import RECURRENCE_TRANSLATIONS
from kancompile.targets.onnx.translation import TRANSLATIONS
from kancompile.targets.onnx.unsaid_defaults import leave_out_defaults, leave_out_types
from kancompile.targets.onnx.wide_codes import store_wide_codes

_SURE, _PART, _MOST_COMPARED = 2048, 300, 8
"""Bytes that the nodes which widen a layer's weights or a table never take, those that they take mostly, and how many that save
less are compared by whole files."""
OPSET = 21
IR_VERSION = 10
_TIDY = ir.passes.Sequential(passes.RemoveUnusedNodesPass(), passes.TopologicalSortPass())
"""Values that nobody reads any more go; nodes that were added at the end stand before what reads them."""


def emit(program: Program, metadata: Mapping[str, str], storage: str = "smallest", batch: int | None = None) -> bytes:
    """Write a program as a serialized ONNX model, and a second file for its large tensors where that takes more than 2 GB."""
    model = build_model(program, metadata, storage, batch)
    external = move_out(model) if is_too_large(model) else None
    content = checked_bytes(leave_out_types(ir.to_proto(model)))
    return content if external is None else ModelWithExternalData(content, external)


def build_model(
    program: Program,
    metadata: Mapping[str, str],
    storage: str,
    batch: int | None = None,
    pairs: bool = True,
    plain: bool = False,
) -> ir.Model:
    """Build the ONNX model of a program.

    Args:
        program, metadata, batch: as :class:`~kancompile.targets.contract.Emit` gets them.
        storage: ``"smallest"`` stores weights in as few bytes as their bits need, ``"native"`` in the narrowest ONNX type
            (opset 25 where that is int2), ``"fastest"`` to load keeps int8.
        pairs: whether large layers look up two inputs at a time.
        plain: whether every lookup is one Gather, not in the forms that are fastest on CPUs.

    Raises:
        KanCompileError: the exporter cannot translate an operator that stayed as PyTorch computes it, or the output of a
            convolution has no quantizer.
    """
    for _, contraction in program.nodes(IntegerContraction):
        contraction.verify_finished()
    graph_module = (program if plain else arrange_tables(program, pairs)).graph_module.eval()
    interface = program.interface
    example = program.arguments(program.zeros(batch or 2))
    called = [({} if batch is not None else {0: "batch"}) | dict(entry.dynamic) for entry in interface.inputs]
    made = {name: torch.export.Dim(name) for sizes in called for name in sizes.values()}
    shapes = tuple({dim: made[name] for dim, name in sizes.items()} for sizes in called)
    with quiet():
        try:
            exported = export_dynamic(graph_module, example, {}, shapes if made else None)
            onnx_program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=TRANSLATIONS | CONVOLUTION_TRANSLATIONS | RECURRENCE_TRANSLATIONS,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            said = str(error.__cause__ or error)
            custom = re.search(r"target=torch\.ops\.((?!(?:aten|prims|kancompile)\.)\w+\.\S+?)\]", said)
            if custom is not None:
                raise KanCompileError(
                    f"target 'ort-cpu': found the custom operator {custom[1]!r} outside the KAN layers, expected operators that "
                    "ONNX has; write it with ordinary operators, or pass torch.export's program after "
                    f"run_decompositions({{torch.ops.{custom[1]}: FORMULA}})"
                ) from error
            raise KanCompileError(
                f"target 'ort-cpu': an operator outside the KAN layers has no ONNX translation: "
                f"{reason(error.__cause__ or error)}; replace it in the model, or compile the part without it"
            ) from error
    assert onnx_program is not None
    model = onnx_program.model
    model.ir_version = IR_VERSION
    build_pair_tables(model.graph)
    deal_planes(model.graph)
    drop_needless_reshapes(model.graph)
    write_column_tables(model.graph)
    write_joint_tables(model.graph)
    if storage != "fastest":
        store_padded_tables(model.graph)
    _TIDY(model)
    narrow = {} if storage == "fastest" else _narrow(program)
    sure, doubtful = _narrow_ways(model, program, narrow) if storage == "smallest" else (narrow, [])
    if not doubtful or is_too_large(model):
        return _finished(model, program, metadata, storage, sure)
    return _smallest(lambda stored: _finished(model.clone(), program, metadata, storage, stored), sure, doubtful)


def _narrow_ways(
    model: ir.Model, program: Program, narrow: dict[str, NarrowWeights]
) -> tuple[dict[str, NarrowWeights], list[dict[str, NarrowWeights]]]:
    """Say which numbers are stored in few bits in any case, and which only where whole files are smaller by it.

    Returns:
        what saves more than the nodes of any layer or table can take, and groups that save less, the least first.
    """
    saved: dict[str, int] = {}
    of_layer: dict[str, dict[str, NarrowWeights]] = {}
    for name, one in narrow.items():
        value = model.graph.initializers.get(name)
        if value is not None and value.const_value is not None:
            layer = name.partition(".")[0]
            of_layer.setdefault(layer, {})[name] = one
            saved[layer] = saved.get(layer, 0) + value.const_value.size * (8 - one.bits) // 8
    for name, smooth in _smooth(model.graph, program):
        of_layer[name] = {name: NarrowWeights(smooth.bits, smooth=smooth)}
        saved[name] = smooth.differences.size + smooth.first.size - smooth.stored_bytes()
    sure: dict[str, NarrowWeights] = {}
    doubtful: list[tuple[int, dict[str, NarrowWeights]]] = []
    for layer, group in of_layer.items():
        if saved[layer] > _SURE or (saved[layer] > _PART and len(of_layer) > _MOST_COMPARED):
            sure |= group
        elif saved[layer] > 0:
            doubtful.append((saved[layer], group))
    least_first = sorted(doubtful, key=lambda entry: entry[0])
    return sure, [group for _, group in least_first][-_MOST_COMPARED:]


def _smallest(
    build: Callable[[dict[str, NarrowWeights]], ir.Model],
    sure: dict[str, NarrowWeights],
    doubtful: list[dict[str, NarrowWeights]],
) -> ir.Model:
    """Leave out, one after the other, what makes the file larger; without any of it is compared as well.

    Nodes that unpack bits are shared, so that what is worth it depends on what else is stored so.
    """

    def measured(stored: dict[str, NarrowWeights]) -> tuple[int, ir.Model]:
        built = build(stored)
        return len(ir.to_proto(built).SerializeToString()), built

    kept = sure | {name: one for group in doubtful for name, one in group.items()}
    best = measured(kept)
    for group in doubtful:
        without = {name: one for name, one in kept.items() if name not in group}
        found = measured(without)
        if found[0] <= best[0]:
            kept, best = without, found
    if kept.keys() - sure.keys():
        found = measured(sure)
        best = found if found[0] <= best[0] else best
    return best[1]


def _smooth(graph: ir.Graph, program: Program) -> Iterator[tuple[str, SmoothCodes]]:
    """Yield tables that are smaller as differences of their rows, by the names of their initializers."""
    for node, table in program.nodes(TableExpansion):
        for name in (f"{node.target}.table", f"{node.target}.table.rows"):
            value = graph.initializers.get(name)
            if table.bits < 8 or value is None or value.const_value is None or not value.uses():
                continue
            smooth = smooth_codes(value.const_value.numpy()) if len(value.const_value.shape) == 2 else None
            if smooth is not None:
                yield name, smooth


def _finished(
    model: ir.Model, program: Program, metadata: Mapping[str, str], storage: str, narrow: dict[str, NarrowWeights]
) -> ir.Model:
    """Store numbers in few bytes, and name what is there then; the model is changed."""
    named = name_nodes(model.graph, program)
    if metadata.get(METADATA) == SHORT:
        shorten_nodes(model.graph)
    if storage != "fastest":
        store_narrow_weights(model, narrow, native=storage == "native")
        store_wide_codes(model.graph, program)
        store_narrow_tables(model.graph, table_bits(program))
    _TIDY(model)
    leave_out_defaults(model)
    name_values(model, program, named)
    if metadata.get(METADATA) == SHORT:
        shorten_names(model.graph)
    model.producer_name = "kancompile"
    model.producer_version = metadata.get("kancompile.version", "")
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    return model


def checked_bytes(proto: onnx.ModelProto) -> bytes:
    """Serialize a model that ONNX's checker accepts.

    Raises:
        KanCompileError: one file does not hold it.
    """
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > MOST_FILE_BYTES:
        raise KanCompileError(
            f"target: found tensors of more than {MOST_FILE_BYTES:,} bytes, which one file does not hold; compile for "
            "'ort-cpu', whose large tensors stand in a second file"
        )
    onnx.checker.check_model(for_the_checker(proto), full_check=True)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _narrow(program: Program) -> dict[str, NarrowWeights]:
    """Map the names of weight initializers to what is stored in their place, where codes are narrower than 8 bits."""
    found: dict[str, NarrowWeights] = {}
    for node, contraction in program.nodes(IntegerContraction):
        if contraction.weight_bits < 8:
            for name in contraction.weight_names:
                found[f"{node.target}.{name}"] = NarrowWeights(
                    contraction.weight_bits, contraction.multiplier, contraction.packs_trits
                )
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and warnings away from the user's terminal; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
