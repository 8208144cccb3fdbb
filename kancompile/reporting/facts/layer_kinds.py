"""Count the layers of a file by what they are: KAN layers and ordinary ones, each once, and the uses of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kancompile.ir import ORDINARY, operator_name


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
    return f"{part['count']} x {operator_name(part['operator'])} in float{share}: {part['reason']}{place}"


def not_layers(
    unrecognized: Sequence[Mapping[str, Any]], in_float: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str, int]]:
    """Say what was looked at and is no KAN layer, leaving out what is said to stay in float.

    Returns:
        operator, source line, reason and how often, in order of evaluation.
    """
    said = {operator_name(part["operator"]) for part in in_float}
    counts: dict[tuple[str, str, str], int] = {}
    for part in unrecognized:
        name = operator_name(part["operator"])
        if name not in said:
            key = (name, str(part["source"] or ""), str(part["reason"]))
            counts[key] = counts.get(key, 0) + 1
    return [(*key, count) for key, count in counts.items()]


def role_of(name: str, kinds: Mapping[str, str], uses: int = 1) -> str:
    """Say what a layer is: ``KAN layer`` or ``ordinary layer``, and in how many uses."""
    return f"{kinds.get(name, 'KAN')} layer" + (f", used {uses} times" if uses > 1 else "")
