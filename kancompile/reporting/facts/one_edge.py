"""The curves of one edge of a compiled model, without the rest of a report."""

from __future__ import annotations

from kancompile.compiler import CompiledModel
from kancompile.reporting.facts.edges import Edge, draw_edges, important_edges, parse_edge
from kancompile.reporting.facts.observation import observe
from kancompile.validation import LayerPair


def edge_of(compiled: CompiledModel, edge: str | None = None) -> Edge:
    """Evaluate one edge function in float and as compiled, over the calibration inputs.

    Args:
        compiled: the model.
        edge: ``LAYER:OUTPUT,INPUT``, a layer named or numbered from 0; ``None`` for the one of the first layer that varies most.

    Raises:
        KanCompileError: no such edge.
    """
    captured = compiled.captured
    pairs = [LayerPair(captured, compiled.program, number) for number in range(len(captured.layers()))]
    seen = observe(captured, pairs, compiled.calibration.samples, compiled.manifest["seed"])
    name = important_edges(pairs[0], seen, 1)[0] if edge is None else parse_edge(edge, pairs)
    pair = next(pair for pair in pairs if pair.name == name.layer)
    return draw_edges(pair, [name], seen)[0]
