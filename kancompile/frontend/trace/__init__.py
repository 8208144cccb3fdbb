"""From PyTorch to core ATen operators: tracing, decompositions, and the user's lines."""

from kancompile.frontend.trace.export import example_rows, export
from kancompile.frontend.trace.source_lines import node_source

__all__ = [
    "example_rows",
    "export",
    "node_source",
]
