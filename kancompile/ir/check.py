"""The law of programs: what every pass must leave intact."""

from __future__ import annotations

import torch
from torch import fx

from kancompile.errors import KanCompileError
from kancompile.ir.contraction import AnyContraction
from kancompile.ir.expansion import AnyExpansion
from kancompile.ir.index import REAL, HandOver
from kancompile.ir.program import Program
from kancompile.ir.wiring import readers_behind, source_in_front


def check(program: Program) -> None:
    """Verify the invariants that every pass must leave intact.

    Contractions read expansions alone, every use of a layer calls the same modules, and what a contraction hands over is
    what every reader takes it for, also behind operators that only move or select values.

    Raises:
        KanCompileError: a KAN module reads something else than its kind allows, or sizes do not agree.
    """
    program.graph_module.graph.lint()
    _check_uses(program)
    for layer in program.layers():
        for target in layer.expansions:
            if not isinstance(program.module(target), AnyExpansion):
                raise KanCompileError(
                    f"layer {layer.name!r}: contraction reads {target!r} of type "
                    f"{type(program.module(target)).__name__}, expected an expansion"
                )
            program.node(target, AnyExpansion).verify(layer.name)
        program.contraction(layer).verify(program.expansions(layer))
    for node, contraction in program.nodes(AnyContraction):
        for reader in readers_behind(node):
            _check_reader(program, contraction.layer, contraction.hands_over, reader)
    for node, expansion in program.nodes(AnyExpansion):
        source = source_in_front(node)
        produced = program.module(str(source.target)) if source.op == "call_module" else None
        if not isinstance(produced, AnyContraction) and not expansion.accepts(REAL):
            raise KanCompileError(
                f"{node.target!r}: found {expansion.text()} behind {source.name!r}, which yields real values; expected an "
                "expansion that reads those"
            )


def _check_uses(program: Program) -> None:
    """Verify that a layer is the same modules wherever it is used."""
    modules: dict[str, list[str]] = {}
    for node, contraction in program.nodes(AnyContraction):
        called = [str(part.target) for part in (node, *node.all_input_nodes)]
        if modules.setdefault(contraction.layer, called) != called:
            raise KanCompileError(
                f"layer {contraction.layer!r}: found a use of {called!r} in {node.name!r}, expected "
                f"{modules[contraction.layer]!r} in every use"
            )


def _check_reader(program: Program, layer: str, handed: HandOver, reader: fx.Node) -> None:
    """Verify that one reader takes the outputs of a layer for what they are."""
    module = program.module(str(reader.target)) if reader.op == "call_module" else None
    if isinstance(module, AnyExpansion):
        if not module.accepts(handed):
            raise KanCompileError(
                f"layer {layer!r}: found {handed} handed over to {reader.target!r}, {module.text()}; expected both ends of "
                "one form and, where rows are meant, of one index"
            )
        return
    if handed.kind == "real":
        return
    index = handed.index
    is_dequantizing = reader.target is torch.ops.kancompile.dequantize_index.default
    if is_dequantizing and index is not None and tuple(reader.args[1:]) == (index.scale, index.zero_point):
        return
    raise KanCompileError(
        f"layer {layer!r}: found {handed} handed over to {reader.name!r}, which is no table; expected real values"
    )
