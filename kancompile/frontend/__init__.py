"""From PyTorch to a program: trace, data-flow analysis, canonical form. The only code that sees raw ATen."""

from kancompile.frontend.capture import capture
from kancompile.frontend.trace import export, node_source

__all__ = [
    "capture",
    "export",
    "node_source",
]
