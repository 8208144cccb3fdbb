"""Shift inputs so that the jumps of their functions lie halfway between the rows of a table.

    f(x) = g(round((x + c) / s))      ->      f'(x + c),   f'(x) = g(round(x / s))

QuantizeLinear cannot shift its rows by a fraction of a step. Behind a linear map the shift is part of its bias, elsewhere an
addition.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from kancompile.ir import (
    Branch,
    Contraction,
    Expansion,
    Program,
    Values,
    contraction_in_front,
    nodes_of,
    single_table_behind,
)
from kancompile.passes.step_functions import find_steps, step_quantizer

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class CenterSteps:
    """Shift the inputs of step functions whose rows would not hold one constant each otherwise.

    Attributes:
        applies: whether the expansions of a layer become tables, by its name.
    """

    applies: Callable[[str], bool]

    name = "center-steps"

    def __call__(self, program: Program, x: Values) -> Program:
        """Return the program with shifted inputs, equal in value up to the rounding of one addition.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        layers = [layer for layer in program.layers() if program.is_float(layer) and self.applies(layer.name)]
        wanted = [target for layer in layers for target in layer.expansions]
        read = program.inputs(x, wanted) if wanted else {}
        for target in dict.fromkeys(wanted):
            expansion = program.node(target, Expansion)
            steps = next(find_steps(expansion, read[target]), None)
            if steps is None or steps.is_centered or step_quantizer(expansion, read[target]) is not None:
                continue
            shifted = _reading_shifted(expansion, -steps.off_center)
            if step_quantizer(shifted, read[target] - steps.off_center) is not None:
                program = _shift(program, target, shifted, -steps.off_center)
        return program


def _reading_shifted(expansion: Expansion, shift: float) -> Expansion:
    """Give the expansion that has the same values where its inputs are larger by ``shift``."""
    branches = []
    for branch in expansion.branches:
        region = copy.deepcopy(branch.region)
        assert isinstance(region, fx.GraphModule)
        graph = region.graph
        read = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(read):
            back = graph.call_function(_ATEN.sub.Tensor, (read, shift))
        read.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        region.recompile()
        branches.append(Branch(str(branch.name), region, branch.position))  # type: ignore[arg-type]
    return Expansion(expansion.anchor_shape, branches, expansion.channels_first)


def _shift(program: Program, target: str, shifted: Expansion, shift: float) -> Program:
    in_front = contraction_in_front(program, target)
    if in_front is not None and single_table_behind(program, in_front[0]) == target:
        name = in_front[0]
        contraction = program.node(name, Contraction)
        return program.replace_modules({target: shifted, name: contraction.replace(bias=contraction.bias + shift)})
    changed = program.replace_modules({target: shifted})
    graph = changed.graph_module.graph
    for use in nodes_of(changed, target):
        source = use.all_input_nodes[0]
        with graph.inserting_before(use):
            use.replace_input_with(source, graph.call_function(_ATEN.add.Tensor, (source, shift)))
    return changed.with_graph(graph, changed.graph_module)
