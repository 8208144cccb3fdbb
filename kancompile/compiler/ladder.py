"""The ways to lower a layer more exactly, in one order: what costs nothing at run time first.

free        another rounding method, range or scaling of table columns: equal bytes, equal time
rows        finer tables, of more rows or bits: bytes of tables
functions   more functions, or all instead of mixtures of them: columns, so bytes and time
bits        more bits for each weight: bytes of weights
precision   16 bits, then float, instead of integer kernels

Whatever improves a recipe takes its candidates here, and leaves some out. The error gate changes neither bits, which a user or a
budget chose and which it only proposes, nor the method of a layer with groups, and does not go back to ``mse``, the default, from
a range that was chosen. A diagnosis, and so tuning, measures only what the anatomy of a layer can predict: neither column scales
nor percentiles, and float only where 16 bits did not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kancompile.ir import JointTable, Program
from kancompile.passes import quick_methods
from kancompile.recipe import RANGES, LayerRecipe

FREE, ROWS, FUNCTIONS, BITS, PRECISION = "free", "rows", "functions", "bits", "precision"
KIND_OF_KEY = {
    "method": FREE,
    "range": FREE,
    "percentile": FREE,
    "column_scaling": FREE,
    "levels": ROWS,
    "table_bits": ROWS,
    "function_error": FUNCTIONS,
    "lookup": FUNCTIONS,
    "weight_bits": BITS,
    "precision": PRECISION,
}
"""What changing a recipe key of a layer costs."""
_MOST_LEVELS = 1 << 14
_MOST_TABLE_BYTES = 1 << 20
_STEPS = (4, 16)
_MORE_FUNCTIONS = 4


@dataclass(frozen=True)
class Rung:
    """One way to lower a layer more exactly.

    Attributes:
        key: of the layer's recipe.
        value: that it gets.
    """

    key: str
    value: Any

    @property
    def kind(self) -> str:
        """What it costs, one of the values of :data:`KIND_OF_KEY`."""
        return KIND_OF_KEY[self.key]

    @property
    def change(self) -> Mapping[str, Any]:
        """The key and its value."""
        return {self.key: self.value}


def rungs(
    chosen: LayerRecipe, columns: int, rows: int, most_rows: int, is_convolution: bool, is_joint: bool = False
) -> list[Rung]:
    """List what can be tried for a layer, from its recipe now.

    Args:
        chosen: the layer's recipe.
        columns: weights of one output.
        rows: of the layer's finest table.
        most_rows: that a table of it may get.
        is_convolution: whether the layer is one.
        is_joint: whether it looks inputs up in pairs, whose rows are few, and whose functions are what counts.
    """
    found: list[Rung] = []
    if chosen.arithmetic == "int8":
        if not (chosen.method == "auto" and chosen.weight_bits == 8):  # which has tried them where rounding matters
            found += [Rung("method", name) for name in quick_methods(columns) if name != chosen.rounding_method]
        found += [Rung("range", kind) for kind in RANGES if kind != chosen.range]
        if chosen.column_scaling is None:
            found += [Rung("column_scaling", exponent) for exponent in (1.0, 0.5)]
        if is_joint:
            found += [Rung("function_error", chosen.joint_error / _MORE_FUNCTIONS), Rung("lookup", "each")]
        else:
            finer = dict.fromkeys(min(step * rows, most_rows) for step in _STEPS)
            found += [Rung("levels", levels) for levels in finer if levels > rows]
        if chosen.table_bits < 8:
            found.append(Rung("table_bits", 8))
        if chosen.shared_error > 0 and is_convolution:
            # a function more is mostly enough, and all of them take much longer
            found.append(
                Rung("function_error", 0.0 if chosen.function_error else chosen.shared_error / _MORE_FUNCTIONS)
            )
        more = chosen.bits if chosen.is_ternary else chosen.bits + 1
        found += [Rung("weight_bits", bits) for bits in range(more, 9)]
    return found + [Rung("precision", precision) for precision in chosen.wider]


def gate_rungs(chosen: LayerRecipe, captured: Program, lowered: Program, name: str) -> list[Rung]:
    """List what an error gate may try for a layer or, of bits, propose.

    Args:
        chosen: the layer's recipe.
        captured: the float program.
        lowered: the program that the recipe makes.
        name: of the layer.
    """
    contraction = captured.contraction(captured.layer(name))
    is_convolution = contraction.geometry is not None
    # a table behind a convolution is read by its 8-bit output
    tables = [] if is_convolution else list(lowered.tables(lowered.layer(name)).values())
    now = max((table.index.levels for table in tables), default=0)
    widest = max((table.n_tables * table.k for table in tables), default=1)
    is_joint = any(isinstance(table, JointTable) for table in tables)
    most = min(_MOST_LEVELS, _MOST_TABLE_BYTES // widest)
    return [
        rung
        for rung in rungs(chosen, contraction.products, now, most, is_convolution, is_joint)
        if not (rung.key == "method" and chosen.granularity == "group")
        and rung != Rung("range", "mse")
        and (rung.kind != BITS or rung.value == 8)
    ]


def chooses_rows(captured: Program, name: str) -> bool:
    """Whether the rows of a layer's tables are a choice: an ordinary layer has as many as codes, a convolution those it reads."""
    return captured.kinds.get(name) is None and captured.contraction(captured.layer(name)).geometry is None


def has_own_tables(lowered: Program, name: str) -> bool:
    """Whether inputs of a layer do not share their tables, so that every row more takes bytes for each of them."""
    return any(table.n_tables > 1 for table in lowered.tables(lowered.layer(name)).values())
