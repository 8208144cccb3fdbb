"""``torch.export`` with dynamic dimensions whose ranges the model itself says, such as the length of its position embedding."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes


def export_dynamic(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, strict: bool = False
) -> ExportedProgram:
    """Export; where a dimension only has a narrower range than any size, once more with that range.

    Args:
        model, args, kwargs: the call.
        shapes: dynamic dimensions, in the structure of the arguments.
        strict: as of ``torch.export.export``.

    Raises:
        Exception: whatever the user's code or the tracer raises.
    """
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
    except torch._dynamo.exc.UserError as error:
        before, found, fixes = str(error).partition("Suggested fixes:")
        if not found or re.search(r"= \d+$", fixes, re.MULTILINE):  # one size is no range
            raise
        text = before + found + fixes.split("\n\n")[0] + "\n"
        try:
            narrowed = refine_dynamic_shapes_from_suggested_fixes(text, shapes)
        except Exception:  # it reads text, and knows some forms only
            raise error from None
        return torch.export.export(model, args, kwargs, dynamic_shapes=narrowed, strict=strict)
