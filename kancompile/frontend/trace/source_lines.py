"""Where a graph node or an exception comes from in the user's own code, as ``file.py:line``."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterable

import torch
from torch import fx

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def node_source(node: fx.Node) -> str:
    """Give the innermost user line that created the node; where only PyTorch's own code did, the module it stands for.

    A module of PyTorch in an ``nn.Sequential`` is called from no line of the user's, but its name says where it is. Empty
    where the trace kept neither.
    """
    return _innermost(_FRAME.findall(node.meta.get("stack_trace") or "")) or _module(node)


def _module(node: fx.Node) -> str:
    """Name the innermost module that a node belongs to, such as ``module 'head.2' (Softmax)``."""
    for path, kind in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        name = str(path).removeprefix("L['self']").lstrip(".")
        if name:
            kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
            return f"module {name!r} ({kind.rpartition('.')[2]})"
    return ""


def error_source(error: BaseException) -> str:
    """Give the innermost user line of a failed trace, from its traceback or from the frames its text quotes."""
    frames = [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(error.__traceback__)]
    return _innermost(_FRAME.findall(str(error))) or _innermost(frames)


def _innermost(frames: Iterable[tuple[str, str]]) -> str:
    found = ""
    for path, line in frames:
        if not path.startswith((_TORCH, _PACKAGE, "<")):
            found = f"{os.path.basename(path)}:{line}"
    return found
