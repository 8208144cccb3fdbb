"""Count the layers of a file by what they are: KAN layers, ordinary ones, and further uses of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kancompile.ir import ORDINARY


def count_layers(names: Sequence[str], kinds: Mapping[str, str]) -> str:
    """Say how many layers of each kind there are, such as ``2 KAN layers in 6 uses and 1 ordinary layer``.

    Args:
        names: of all layers.
        kinds: what a layer is other than a KAN layer of its own, as ``Program.kinds`` has it.
    """
    ordinary = [name for name in names if kinds.get(name) == ORDINARY]
    further = [name for name in names if name in kinds and kinds[name] != ORDINARY]
    steps = [name for name in further if kinds.get(used_again(kinds[name])) == ORDINARY]
    parts = [("KAN", len(names) - len(ordinary) - len(further), len(further) - len(steps))]
    parts += [("ordinary", len(ordinary), len(steps))] if ordinary else []
    return " and ".join(
        f"{count} {what} layer{'s' if count != 1 else ''}" + (f" in {count + more} uses" if more else "")
        for what, count, more in parts
    )


def float_text(part: Mapping[str, Any]) -> str:
    """Say what stayed in float: how much of the time it takes by an estimate, why, and where it stands."""
    share = f", about {100 * part['share']:.2g} % of the time by an estimate" if "share" in part else ""
    place = f" ({part['source']})" if part.get("source") else ""
    return f"{part['count']} x {part['operator']} in float{share}: {part['reason']}{place}"


def used_again(kind: str) -> str:
    """Give the name of the layer that a kind says another use of."""
    return kind.removeprefix("use of ")


def role_of(name: str, kinds: Mapping[str, str]) -> str:
    """Say what a layer is: ``KAN layer``, ``ordinary layer``, or ``use of`` another one."""
    kind = kinds.get(name, "KAN")
    return kind if kind.startswith("use of ") else f"{kind} layer"
