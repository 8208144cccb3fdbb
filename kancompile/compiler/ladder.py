"""The ways to lower a layer more exactly, in the order in which they are tried: what costs nothing at run time first.

free        another rounding method, range or scaling of table columns: equal bytes, equal time
rows        finer tables: bytes of tables
functions   all functions instead of mixtures of them: columns, so bytes and time
precision   16 bits, then float, instead of integer kernels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kancompile.ir import JointTable, Program
from kancompile.recipe import LayerRecipe

FREE, ROWS, FUNCTIONS, PRECISION = "free", "rows", "functions", "precision"
_MOST_LEVELS = 1 << 14
_MOST_TABLE_BYTES = 1 << 20
_STEPS = (4, 16)
_MORE_FUNCTIONS = 4
_FEW_COLUMNS, _MOST_COLUMNS = 2048, 8192


@dataclass(frozen=True)
class Rung:
    """One way to lower a layer more exactly.

    Attributes:
        kind: :data:`FREE`, :data:`ROWS`, :data:`FUNCTIONS` or :data:`PRECISION`.
        change: recipe keys of the layer and their values.
    """

    kind: str
    change: Mapping[str, Any]


def rungs(chosen: LayerRecipe, captured: Program, lowered: Program, name: str) -> list[Rung]:
    """List what can be tried for a layer, from its recipe now.

    Args:
        chosen: the layer's recipe.
        captured: the float program.
        lowered: the program that the recipe makes.
        name: of the layer.
    """
    found: list[Rung] = []
    if chosen.arithmetic == "int8":
        found += [Rung(FREE, {"method": method}) for method in _methods(chosen, captured, name)]
        found += [Rung(FREE, {"range": kind}) for kind in ("minmax", "percentile") if chosen.range != kind]
        if chosen.column_scaling is None:
            found += [Rung(FREE, {"column_scaling": exponent}) for exponent in (1.0, 0.5)]
        is_joint = any(isinstance(table, JointTable) for table in lowered.tables(lowered.layer(name)).values())
        if is_joint:
            found.append(Rung(FUNCTIONS, {"function_error": chosen.joint_error / _MORE_FUNCTIONS}))
            found.append(Rung(FUNCTIONS, {"lookup": "each"}))
        else:
            found += [Rung(ROWS, {"levels": levels}) for levels in _finer_levels(captured, lowered, name)]
        if chosen.shared_error > 0 and _is_convolution(captured, name):
            found.append(Rung(FUNCTIONS, {"function_error": 0.0}))
        found.append(Rung(PRECISION, {"precision": "int16"}))
    if chosen.arithmetic in ("int8", "int16"):
        found.append(Rung(PRECISION, {"precision": "float"}))
    return found


def _methods(chosen: LayerRecipe, captured: Program, name: str) -> list[str]:
    """Methods beside the one in use that take seconds; those that learn take minutes, so that only a user asks for them."""
    columns = captured.contraction(captured.layer(name)).products
    if chosen.granularity == "group" or (chosen.method == "auto" and chosen.weight_bits == 8):
        return []  # auto has tried them already where rounding matters
    quick = {"gptq": columns <= _MOST_COLUMNS, "awq+gptq": columns <= _FEW_COLUMNS}
    return [method for method, is_quick in quick.items() if is_quick and method != chosen.rounding_method]


def _is_convolution(captured: Program, name: str) -> bool:
    return captured.contraction(captured.layer(name)).geometry is not None


def _finer_levels(captured: Program, lowered: Program, name: str) -> list[int]:
    """Give numbers of rows to try, none where the tables cannot have more or are not what is measured."""
    if _is_convolution(captured, name):
        return []  # a table behind a convolution is read by its 8-bit output
    found = lowered.tables(lowered.layer(name)).values()
    if not found:
        return []
    now = max(table.index.levels for table in found)
    most = min(_MOST_LEVELS, _MOST_TABLE_BYTES // max(table.n_tables * table.k for table in found))
    return [levels for levels in dict.fromkeys(min(step * now, most) for step in _STEPS) if levels > now]
