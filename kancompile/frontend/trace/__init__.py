"""From PyTorch to core ATen operators: tracing, decompositions, and the user's lines."""

from kancompile.frontend.trace.examples import Examples
from kancompile.frontend.trace.export import Dynamic, export, interface_of, returned_nodes
from kancompile.frontend.trace.held_state import held_state
from kancompile.frontend.trace.open_sizes import open_sizes
from kancompile.frontend.trace.source_lines import node_source

__all__ = [
    "Dynamic",
    "Examples",
    "export",
    "held_state",
    "interface_of",
    "node_source",
    "open_sizes",
    "returned_nodes",
]
