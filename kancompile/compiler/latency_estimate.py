"""Estimate what one call of a file takes, in one thread, by the costs of the recipe's profile: no clock decides about a file.

A layer takes its nodes, a lookup for every input, a product for every weight and output, and a read of every weight once a call,
whatever the batch; a joint layer takes words and columns in place of lookups. How many bits a weight has does not count, since
ONNX Runtime unpacks all widths to 8 bits when it loads a file.
"""

from __future__ import annotations

import math

from torch import fx

from kancompile.compiler.time_estimate import estimate_times
from kancompile.ir import JointTable, Layer, Program, Values
from kancompile.passes import time_of_each, time_of_joint
from kancompile.recipe import LookUpCosts

_FUSED_ROWS = 256
_NODES_OF_MORE_ROWS = 2
"""A Cast and a Clip, which row numbers need that are no bytes."""


def layer_nanoseconds(program: Program, layer: Layer, costs: LookUpCosts, batch: int = 1) -> float:
    """Estimate what all uses of one integer layer take in a call.

    Args:
        program: lowered.
        layer: whose functions are tables.
        costs: of operators.
        batch: samples of the call.

    Returns:
        nanoseconds.
    """
    tables, contraction = program.tables(layer), program.contraction(layer)
    weights = contraction.n_out * contraction.products
    outputs = math.prod(contraction.out_shape) // max(1, contraction.n_out)
    total = weights * (costs.load + batch * outputs * costs.product)
    for expansion in program.expansions(layer):
        if isinstance(expansion, JointTable):
            read = expansion.members.unique().numel()
            total += time_of_joint([(read, 1)], expansion.n_in, 0, batch, costs)
        else:
            places = math.prod(expansion.in_shape) // max(1, expansion.n_in)
            total += time_of_each([(expansion.n_in, expansion.k)], 0, batch * places, costs)
    more = sum(table.index.levels > _FUSED_ROWS for table in tables.values())
    return layer.uses * (total + more * _NODES_OF_MORE_ROWS * costs.node)


def other_nanoseconds(program: Program, x: Values, costs: LookUpCosts, batch: int = 1) -> float:
    """Estimate what a call takes beside its layers: the call itself, and what stays as PyTorch computes it.

    Args:
        program: captured or lowered.
        x: a few samples that it takes.
        costs: of operators.
        batch: samples of the call.

    Returns:
        nanoseconds.
    """
    outside = {node: time for node, time in estimate_times(program, x, costs).items() if node.op != "call_module"}
    return costs.call + sum(_of_batch(node, time, batch, costs) for node, time in outside.items())


def _of_batch(node: fx.Node, time: float, batch: int, costs: LookUpCosts) -> float:
    """A node is called once, its elements are those of all samples."""
    elements = max(0.0, time - costs.node)
    return costs.node + batch * elements if time else 0.0
