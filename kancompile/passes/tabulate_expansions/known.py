"""Keep what tabulating a program found out, for the next tabulation of the same program with other options.

Reports, the error gate and the diagnosis lower one program many times, mostly with other bits. What a quantizer costs does not
depend on them, nor does a layer on the options of another, but for the quantizer of a convolution in front, which only an integer
one has.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from kancompile.ir import IndexQuantizer
from kancompile.passes.tabulate_expansions.choose_index import MeasuresLookup

Cost = TypeVar("Cost", bound=MeasuresLookup)


@dataclass(frozen=True)
class MeasuredInputs(Generic[Cost]):
    """What an expansion reads.

    Attributes:
        first: the first input of each distinct set of functions (see ``ir.distinct_inputs``).
        group: number of the set of every input, int64 ``[n_in]``.
        cost: what measures a quantizer.
        steps: the quantizer whose rows are the constants of the functions, ``None`` where they have no steps.
    """

    first: list[int]
    group: Tensor
    cost: Cost
    steps: IndexQuantizer | None = None


@dataclass(frozen=True)
class KnownTables:
    """What is known of one program and its calibration inputs.

    Attributes:
        inputs: by name of the expansion.
        layers: finished modules and lines for the report, by layer, options and quantizers in front.
    """

    inputs: dict[str, MeasuredInputs[Any]] = field(default_factory=dict)
    layers: dict[Hashable, tuple[dict[str, nn.Module], list[str]]] = field(default_factory=dict)

    def inputs_of(self, expansion: str, measure: Callable[[], MeasuredInputs[Cost]]) -> MeasuredInputs[Cost]:
        """Return what is known of an expansion's inputs, measured now if need be."""
        if expansion not in self.inputs:
            self.inputs[expansion] = measure()
        return self.inputs[expansion]

    def layer(
        self, key: Hashable, tabulate: Callable[[], tuple[dict[str, nn.Module], list[str]]]
    ) -> tuple[dict[str, nn.Module], list[str]]:
        """Return the tables of a layer, built now if need be; the key names whatever they depend on."""
        if key not in self.layers:
            self.layers[key] = tabulate()
        return self.layers[key]
