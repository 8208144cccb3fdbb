"""From PyTorch to a program: trace, data-flow analysis, canonical form. The only code that sees raw ATen."""

from kancompile.frontend.capture import capture
from kancompile.frontend.trace import Dynamic, export, node_source, open_sizes

__all__ = [
    "Dynamic",
    "capture",
    "export",
    "node_source",
    "open_sizes",
]
