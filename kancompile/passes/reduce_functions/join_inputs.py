"""Look few functions of inputs that share an index up, where a layer needs far fewer than it has.

The functions of a trained layer depend on each other nearly: a layer of 784 inputs with nine functions each kept 35 dB with a
sixth of its 7,056 columns. ``words`` finds which functions of which pairs of inputs carry the output, ``fit`` gives them
weights, and ``look_up_time`` says whether a file is faster for it. Layers where it is not, or where as many functions would be
needed, stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from kancompile.ir import Contraction, Expansion, Layer, Program, Values, nodes_of, quantizer_in_front
from kancompile.passes.reduce_functions.join import Joined, JoinOptions, Stays, join_layer
from kancompile.passes.reduce_functions.look_up_time import BALANCE, MOST_COLUMNS, most_columns
from kancompile.passes.reduce_functions.words import PLANES
from kancompile.passes.tabulate_expansions import KnownTables
from kancompile.recipe import LookUpCosts

_UNFIT = "joint lookups take linear layers of functions that no other layer reads, so each input is looked up by itself"
_TOGETHER = {1: "single inputs", 2: "pairs of inputs"}


@dataclass(frozen=True)
class JoinInputs:
    """Look inputs of linear layers up jointly; layers that already are tables stay.

    Attributes:
        options: gives the options of a layer by its name, ``None`` to look each input up by itself.
        costs: of operators, by which the faster lookups are chosen.
        samples: calibration samples used to measure the error of indices.
        batch: sizes of a batch that the file is made for.
        known: what earlier calls with the same program and inputs found.
    """

    options: Callable[[str], JoinOptions | None]
    costs: LookUpCosts
    samples: int = 256
    batch: tuple[int, ...] = BALANCE
    known: KnownTables | None = None

    name = "join-inputs"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the program with joint tables, or the same one.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        asked = {
            layer: options
            for layer in program.layers()
            if program.is_float(layer) and (options := self.options(layer.name)) is not None
        }
        most = {
            layer: self._most_columns(program, layer, options)
            for layer, options in asked.items()
            if _is_fit(program, layer)
        }
        found = [layer for layer, columns in most.items() if columns > 0]
        unfit = [layer for layer, options in asked.items() if options.always and layer not in found]
        notes = [f"layer {layer.name!r}: {_UNFIT}" for layer in unfit]
        known = KnownTables() if self.known is None else self.known
        read = program.inputs(x, [target for layer in found for target in layer.expansions]) if found else {}
        modules: dict[str, nn.Module] = {}
        for layer in found:
            made, said = known.layer(
                (layer.name, asked[layer], most[layer]),
                lambda: self._joined(program, layer, read, asked[layer], most[layer]),  # noqa: B023 (called at once)
            )
            modules |= made
            notes += said
        notes = [note for note in notes if note not in program.notes]
        return program.replace_modules(modules, notes) if modules or notes else program

    def _most_columns(self, program: Program, layer: Layer, options: JoinOptions) -> int:
        sizes = [(expansion.n_in, expansion.k) for expansion in program.expansions(layer)]
        if options.always:
            return min(max(sum(n_in * k for n_in, k in sizes), PLANES), MOST_COLUMNS)
        return most_columns(sizes, program.contraction(layer).n_out, self.costs, self.batch)

    def _joined(
        self, program: Program, layer: Layer, read: Mapping[str, Tensor], options: JoinOptions, most: int
    ) -> tuple[dict[str, nn.Module], list[str]]:
        expansions = [program.node(target, Expansion) for target in layer.expansions]
        contraction = program.node(layer.contraction, Contraction)
        inputs = [read[target] for target in layer.expansions]
        try:
            joined = join_layer(expansions, contraction, inputs, self.samples, options, most)
        except Stays as reason:
            said = f"layer {layer.name!r}: {reason}, so each input is looked up by itself"
            return {}, [said] if options.always else []
        before = sum(expansion.n_in * expansion.k for expansion in expansions)
        if not options.always and not _is_smaller(joined, before * contraction.n_out):
            return {}, []
        found = " and ".join(
            f"{table.n_in} of {_TOGETHER[len(table.members)]} ({table.index.levels} rows for each input over "
            f"{table.index.low:.4g} ... {table.index.high:.4g})"
            for table in joined.tables
        )
        note = (
            f"layer {layer.name!r}: {before} functions replaced by {found}; squared error {joined.lost:.2g} of the output's "
            "variance on samples that did not fit them; lookup = 'each' keeps all functions"
        )
        tables = dict(zip(layer.expansions, joined.tables, strict=True))
        return {**tables, layer.contraction: joined.contraction}, [note]


def _is_fit(program: Program, layer: Layer) -> bool:
    """Whether a layer is linear, of expansions of its own that read vectors."""
    contraction = program.contraction(layer)
    return math.prod(contraction.out_shape) == contraction.n_out and all(
        len(expansion.in_shape) == 1
        and not expansion.yields_codes
        and not expansion.is_identity
        and all(len(node.users) == 1 for node in nodes_of(program, target))
        and quantizer_in_front(program, target) is None
        for target, expansion in zip(layer.expansions, program.expansions(layer), strict=True)
    )


def _is_smaller(joined: Joined, weights: int) -> bool:
    """Whether weights and tables take fewer bytes than that many weights alone, with 4 bits as well."""
    tables = sum(table.stored_bytes() for table in joined.tables)
    return joined.contraction.weight.numel() // 2 + tables < weights // 2
