"""Count the layers of a file by what they are: KAN layers and ordinary ones, each once, and the uses of either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kancompile.ir import ORDINARY


def count_layers(uses: Mapping[str, int], kinds: Mapping[str, str]) -> str:
    """Say how many layers of each kind there are, such as ``2 KAN layers in 6 uses and 1 ordinary layer``.

    Args:
        uses: of all layers, by name.
        kinds: what a layer is other than a KAN layer, as ``Program.kinds`` has it.
    """
    ordinary = [count for name, count in uses.items() if kinds.get(name) == ORDINARY]
    kans = [count for name, count in uses.items() if kinds.get(name) != ORDINARY]
    parts = [("KAN", kans), ("ordinary", ordinary)] if ordinary else [("KAN", kans)]
    return " and ".join(
        f"{len(counts)} {what} layer{'s' if len(counts) != 1 else ''}"
        + (f" in {sum(counts)} uses" if sum(counts) > len(counts) else "")
        for what, counts in parts
    )


def float_text(part: Mapping[str, Any]) -> str:
    """Say what stayed in float: how much of the time it takes by an estimate, why, and where it stands."""
    share = f", about {100 * part['share']:.2g} % of the time by an estimate" if "share" in part else ""
    place = f" ({part['source']})" if part.get("source") else ""
    return f"{part['count']} x {part['operator']} in float{share}: {part['reason']}{place}"


def role_of(name: str, kinds: Mapping[str, str], uses: int = 1) -> str:
    """Say what a layer is: ``KAN layer`` or ``ordinary layer``, and in how many uses."""
    return f"{kinds.get(name, 'KAN')} layer" + (f", used {uses} times" if uses > 1 else "")
