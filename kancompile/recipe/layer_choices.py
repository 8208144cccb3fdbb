"""What a recipe holds for each layer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from kancompile.errors import KanCompileError, shown
from kancompile.recipe.keys import checked_value, declared

PRECISIONS = ("int8", "int16", "float")
WEIGHT_ONLY = "weight-only"
"""Precision of layers that compute in float on weights of 8 bits."""
METHODS = ("uniform", "gptq", "awq", "awq+gptq", "adaround", "awq+adaround", "brecq", "hawq-v2")
RANGES = ("minmax", "percentile", "mse")
GRANULARITIES = ("channel", "branch", "group")
LOWERINGS = ("table", "keep")
LOOKUPS = ("auto", "each", "joint")
DRIFTS = ("auto", "off", "on")
TERNARY = "ternary"
"""Width of weights of three values."""
_SHARED_ERROR, _JOINT_ERROR = 2e-4, 1.2e-3


@dataclass(frozen=True)
class LayerRecipe:
    """What may differ from layer to layer.

    Raises:
        KanCompileError: an unknown key, or a value that has the wrong type or lies outside its range.
    """

    method: str = declared(
        "auto",
        "how weights are rounded, auto: uniform with 8 bits, awq+gptq with fewer; hawq-v2: auto, with weight_bits allocated "
        "to layers on average",
        choices=("auto", *METHODS),
    )
    weight_bits: int | str = declared(
        8,
        "bits of a stored weight; ternary: three values for each output, five to a byte",
        kind=int,
        low=2,
        high=8,
        names=(TERNARY,),
    )
    levels: int | None = declared(
        None, "rows of a table, unset: chosen by measured error", kind=int, low=4, high=65536, optional=True
    )
    table_bits: int = declared(
        8,
        "bits of a table's entries, which are a layer's activations; below 8 each input is looked up by itself",
        kind=int,
        low=2,
        high=8,
        late=True,
    )
    range: str = declared("mse", "how the input range of a table is chosen", choices=RANGES)
    percentile: float = declared(
        99.99, "share of inputs inside the range, for range = percentile", low=50.0, high=100.0
    )
    granularity: str = declared(
        "channel",
        "which weights share a scale; groups cost no time with 2 and 3 bits, a product each with more",
        choices=GRANULARITIES,
    )
    group_size: int | None = declared(
        None, "inputs that share a scale, for granularity = group", kind=int, low=1, high=1 << 20, optional=True
    )
    column_scaling: float | None = declared(
        None,
        "exponent of the column maximum that moves from table to weights, unset: chosen by measured error",
        low=0.0,
        high=1.0,
        optional=True,
    )
    function_error: float | None = declared(
        None,
        "share of a layer's output variance that looking up fewer functions may cost, unset: 2e-4 for convolutions, 1.2e-3 "
        "where inputs are looked up jointly; 0: keep all functions",
        low=0.0,
        high=1e-2,
        optional=True,
    )
    lookup: str = declared(
        "auto",
        "whether each input is looked up by itself, or joint: few functions of inputs that share an index; auto: the "
        "faster, and each where bits are allocated",
        choices=LOOKUPS,
    )
    drift: str = declared(
        "auto",
        "whether weights make up for the tables and rounded layers before them, auto: with fewer than 8 bits",
        choices=DRIFTS,
        late=True,
    )
    precision: str = declared(
        "int8",
        "integer kernels, 16-bit tables and weights in float arithmetic, an exact float lowering, or, for the smallest file of a "
        "tiny layer, float arithmetic on weights of 8 bits",
        choices=(*PRECISIONS, WEIGHT_ONLY),
    )
    lowering: str = declared("table", "whether a layer becomes an integer table or is kept in float", choices=LOWERINGS)

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Refuse unknown keys as files do, by their nearest name."""
        check_keys(given, cls, "recipe")
        return super().__new__(cls)

    @property
    def is_ternary(self) -> bool:
        """Whether weights have three values."""
        return self.weight_bits == TERNARY

    @property
    def bits(self) -> int:
        """Bits that hold a weight's code: those asked for, two for three values."""
        return self.weight_bits if isinstance(self.weight_bits, int) else 2

    @property
    def arithmetic(self) -> str:
        """In which form the layer computes: its precision, or ``"keep"`` as PyTorch computes it."""
        return "keep" if self.lowering == "keep" else self.precision

    @property
    def shared_error(self) -> float:
        """Share of a convolution's output variance that may be lost where all channels share fewer functions."""
        return _SHARED_ERROR if self.function_error is None else self.function_error

    @property
    def joint_error(self) -> float:
        """Share of a layer's output variance that may be lost where inputs are looked up in pairs; 0: they are not."""
        if (
            self.lookup == "each"
            or self.granularity != "channel"
            or self.table_bits < 8
            or (self.levels is not None and self.lookup == "auto")
        ):
            return 0.0
        return _JOINT_ERROR if self.function_error is None else self.function_error

    @property
    def wider(self) -> tuple[str, ...]:
        """Precisions above that of the layer, the next one first; none for a layer that is kept in float."""
        if self.lowering != "table":
            return ()
        return PRECISIONS[1 if self.precision == WEIGHT_ONLY else PRECISIONS.index(self.precision) + 1 :]

    @property
    def rounding_method(self) -> str:
        """Name of the method that rounds, with ``"auto"`` and ``"hawq-v2"`` (which says how bits are chosen) resolved."""
        if self.method not in ("auto", "hawq-v2"):
            return self.method
        return "uniform" if self.weight_bits == 8 else "awq+gptq"

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.metadata:
                checked = checked_value(option.name, getattr(self, option.name), option.metadata)
                object.__setattr__(self, option.name, checked)
        if (self.granularity == "group") != (self.group_size is not None):
            raise KanCompileError(
                f"recipe: found granularity {self.granularity!r} with group_size {self.group_size!r}, expected "
                "granularity 'group' and a group_size together, or neither"
            )
        if self.is_ternary and self.method in ("brecq", "hawq-v2"):
            why = "allocates whole bits" if self.method == "hawq-v2" else "learns roundings between two of four codes"
            raise KanCompileError(
                f"recipe: found weight_bits 'ternary' with method {self.method!r}, which {why}; expected 'auto', 'uniform', "
                "'gptq', 'adaround' or one of these behind 'awq+', or weight_bits = 2"
            )
        if self.lookup == "joint" and self.function_error == 0:
            raise KanCompileError(
                "recipe: found lookup 'joint' with function_error 0, expected more than 0, since functions are joined where some "
                "of the output's variance may be lost; leave function_error out, or set lookup = 'each'"
            )
        if self.lookup == "joint" and self.table_bits < 8:
            raise KanCompileError(
                f"recipe: found lookup 'joint' with table_bits {self.table_bits}, expected 8, since sums of two entries fill 8 "
                "bits; leave table_bits out, or set lookup = 'each'"
            )
        if self.lookup == "joint" and self.granularity != "channel":
            raise KanCompileError(
                f"recipe: found lookup 'joint' with granularity {self.granularity!r}, expected granularity 'channel': joint "
                "functions belong to no branch and no group of inputs"
            )


def check_keys(given: Mapping[str, Any], kind: type[LayerRecipe], where: str) -> None:
    """Refuse a key that a recipe, or the overrides of a layer, cannot have; the nearest valid one is named."""
    valid = [option.name for option in fields(kind)]
    for key in given:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, 1)
            only_global = any(key in {option.name for option in fields(whole)} for whole in kind.__subclasses__())
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {valid!r}"
            raise KanCompileError(
                f"{where}: unknown key {shown(key)}; "
                + ("it holds for the whole model, so set it outside layers" if only_global else hint)
            )
