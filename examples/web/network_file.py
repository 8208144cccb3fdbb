"""Write the integers of a compiled network as JSON, from which a page draws edge functions.

For every layer: ``table`` uint8 ``[levels, k]``, ``weights`` int8 ``[n_in, k, n_out]`` (both base64), ``bias`` int32
``[n_out]``, ``unit`` float32 ``[n_out]`` (one integer step of each output), ``offset`` ``[k]`` (the real value of code 0, in
steps of the code), the index quantizer, and ``real_per_output``: what 1 in the layer's output is in real units.
"""

from __future__ import annotations

import base64
import itertools
from typing import Any

from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.ir import IntegerContraction, Program, TableExpansion


def describe_network(program: Program) -> list[dict[str, Any]]:
    """Describe a chain of fully connected layers, each with one shared table and one scale for each output.

    Raises:
        KanCompileError: the program is anything else.
    """
    pairs = [_pair(program, number) for number in range(len(program.layers()))]
    tables = [table for table, _ in pairs]
    described = []
    for (table, contraction), following in itertools.zip_longest(pairs, tables[1:]):
        output = contraction.output
        hands_over = output and {"scale": output.scale, "zero_point": output.zero_point, "levels": output.levels}
        described.append(
            {
                "name": contraction.layer,
                "reads": table.input,
                "n_in": table.n_in,
                "n_out": contraction.n_out,
                "k": table.k,
                "levels": table.index.levels,
                "scale": table.index.scale,
                "zero_point": table.index.zero_point,
                "table": _base64(table.table),
                "offset": (table.offset / table.scale)[0].tolist(),
                "weights": _base64(contraction.weights[0]),
                "bias": contraction.bias.tolist(),
                "unit": contraction.scales[0].tolist(),
                "hands_over": hands_over,
                "real_per_output": following.index.scale if following and following.input == "scaled" else 1.0,
            }
        )
    return described


def _pair(program: Program, number: int) -> tuple[TableExpansion, IntegerContraction]:
    layer = program.layers()[number]
    contraction = program.module(layer.contraction)
    tables = [program.module(target) for target in layer.expansions]
    if (
        not isinstance(contraction, IntegerContraction)
        or contraction.geometry is not None
        or len(contraction.group_sizes) != 1
        or len(tables) != 1
        or not isinstance(tables[0], TableExpansion)
        or tables[0].n_tables != 1
        or tables[0].input not in (("real",) if number == 0 else ("scaled", "index"))
    ):
        raise KanCompileError(
            f"layer {layer.name!r}: found {len(tables)} expansions into {type(contraction).__name__}, expected one shared "
            "table that reads the layer before directly, and one scale for each output; compile a chain of fully "
            "connected layers with granularity 'channel'"
        )
    return tables[0], contraction


def _base64(codes: Tensor) -> str:
    return base64.b64encode(codes.contiguous().numpy().tobytes()).decode()
