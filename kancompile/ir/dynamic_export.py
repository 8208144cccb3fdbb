"""``torch.export`` with dynamic dimensions whose ranges the model itself says, such as the length of its position embedding."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes

_FIXED = re.compile(r"= \d+$", re.MULTILINE)
"""A suggestion of one size, which is no range."""


def export_dynamic(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, strict: bool = False
) -> ExportedProgram:
    """Export; where a dimension only has a narrower range than any size, once more with that range.

    Models that halve an image need one that is large enough: sizes from 4, 8 ... and those of the example on are tried.

    Args:
        model, args, kwargs: the call.
        shapes: dynamic dimensions, in the structure of the arguments.
        strict: as of ``torch.export.export``.

    Raises:
        Exception: whatever the user's code or the tracer raises.
    """
    try:
        return _with_suggestions(model, args, kwargs, shapes, strict)
    except torch._dynamo.exc.UserError as error:
        if "Not all values" not in str(error) or _FIXED.search(str(error)):
            raise
        values = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        sizes = {size for value in values for size in value.shape[1:] if size > 2}
        for least in sorted({1 << power for power in range(2, max(sizes, default=1).bit_length())} | sizes):
            with contextlib.suppress(torch._dynamo.exc.UserError, ValueError):
                return _with_suggestions(model, args, kwargs, _at_least(shapes, least), strict)
        raise error from None


def _at_least(shapes: Any, least: int) -> Any:
    """Exchange dimensions beside the batch for such as have that size at least."""
    if isinstance(shapes, Mapping):
        return {
            key: torch.export.Dim(size.__name__, min=least)
            if isinstance(key, int) and key and _is_dim(size)
            else _at_least(size, least)
            for key, size in shapes.items()
        }
    return type(shapes)(_at_least(part, least) for part in shapes) if isinstance(shapes, tuple | list) else shapes


def _is_dim(size: Any) -> bool:
    return hasattr(size, "__name__")


def _with_suggestions(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, strict: bool
) -> ExportedProgram:
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
    except torch._dynamo.exc.UserError as error:
        before, found, fixes = str(error).partition("Suggested fixes:")
        if not found or _FIXED.search(fixes):
            raise
        text = before + found + fixes.split("\n\n")[0] + "\n"
        try:
            narrowed = refine_dynamic_shapes_from_suggested_fixes(text, shapes)
        except Exception:  # it reads text, and knows some forms only
            raise error from None
        return torch.export.export(model, args, kwargs, dynamic_shapes=narrowed, strict=strict)
