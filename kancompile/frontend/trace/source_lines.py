"""Where a graph node comes from in the user's own code, as ``file.py:line``."""

from __future__ import annotations

from torch import fx

from kancompile.errors import FRAME, innermost_line


def node_source(node: fx.Node) -> str:
    """Give the innermost user line that created the node; where only PyTorch's own code did, the module it stands for.

    A module of PyTorch in an ``nn.Sequential`` is called from no line of the user's, but its name says where it is. Empty
    where the trace kept neither.
    """
    return innermost_line(FRAME.findall(node.meta.get("stack_trace") or "")) or _module(node)


def _module(node: fx.Node) -> str:
    """Name the innermost module that a node belongs to, such as ``module 'head.2' (Softmax)``."""
    for path, kind in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        name = str(path).removeprefix("L['self']").lstrip(".")
        if name:
            kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
            return f"module {name!r} ({kind.rpartition('.')[2]})"
    return ""
