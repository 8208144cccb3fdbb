"""Capture a trained network as a program: find its KAN layers, bring them into canonical form, confirm by evaluation."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from kancompile.data import float32_by_default, in_float32, in_order
from kancompile.errors import KanCompileError
from kancompile.frontend.confirmation import confirm_program
from kancompile.frontend.flow import Flow, analyse, refuse_batch_dependence
from kancompile.frontend.layers import find_layers, uses_of_layers
from kancompile.frontend.rewrite import rewrite
from kancompile.frontend.trace import Dynamic, Examples, export, interface_of, node_source
from kancompile.ir import NamedTensors, Program, Unrecognized, Values, check, operator_name, share_uses

_MOST_REPORTED = 12


@float32_by_default()
def capture(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    example: Values | Sequence[int],
    *,
    trust: bool = False,
    dynamic: Dynamic | None = None,
) -> Program:
    """Capture a network.

    Args:
        model: trained module (its training flags are restored), exported program, or path of a ``.pt2`` file.
        example: an input ``[b, *input_shape]`` (float32), several by name (:class:`~kancompile.ir.NamedTensors`), or
            ``input_shape`` without the batch. More rows are better: the network is tried with nothing else.
        trust: whether a ``.pt2`` file may be opened: loading one can run any code that it holds.
        dynamic: names of dynamic dimensions beside the batch, by input and number of the dimension.

    Returns:
        the float program: expansions and contractions for every KAN layer, called once for each use; ATen for the rest.

    Raises:
        KanCompileError: the network cannot be traced, its samples depend on each other, or it has no KAN layer.
    """
    model = in_float32(model, example)
    if isinstance(example, NamedTensors) and isinstance(model, nn.Module | ExportedProgram):
        example = in_order(model, example)
    exported = export(model, example, trust, dynamic)
    examples = Examples.of(example)
    rows = examples.first()
    interface = interface_of(exported, rows, dynamic)
    flow = analyse(exported, rows)
    _refuse_non_finite_output(flow)
    refuse_batch_dependence(flow, examples)
    found = find_layers(flow)
    layers = found.layers
    stays = [*flow.barriers.items(), *found.search.joins.items(), *found.refused]
    unrecognized = [_unrecognized(node, reason) for node, reason in stays]
    order = {node.name: place for place, node in enumerate(flow.graph.nodes)}
    unrecognized.sort(key=lambda entry: order[entry.node])
    if not layers:
        raise KanCompileError(_nothing_found(unrecognized))
    lines = {layer.contraction.layer: node_source(layer.region.target) for layer in layers}
    sources = {name: Path(source).name for name, source in lines.items() if source}
    module, targets = rewrite(flow, layers)
    program = Program(module, interface.inputs[0].shape, tuple(unrecognized), sources=sources)
    first = interface.inputs[0]
    if len(interface.inputs) > 1 or len(interface.outputs) > 1 or first.dtype != torch.float32 or first.dynamic:
        program = replace(program, declared=interface)
    program = share_uses(program, uses_of_layers(flow, layers))
    check(program)
    return confirm_program(flow, program, targets, examples)


def _unrecognized(node: fx.Node, reason: str) -> Unrecognized:
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):  # one of several results
        node = node.args[0]
    return Unrecognized(node.name, str(node.target), reason, node_source(node))


def _nothing_found(unrecognized: Sequence[Unrecognized]) -> str:
    looked_at = [
        f"{operator_name(entry.operator)}{f' ({entry.source})' if entry.source else ''}: {entry.reason}"
        for entry in unrecognized
    ]
    if len(looked_at) > _MOST_REPORTED:
        looked_at[_MOST_REPORTED:] = [f"and {len(looked_at) - _MOST_REPORTED} more"]
    return (
        f"model: found no KAN layer, looked at {'; '.join(looked_at) or 'a network without contraction'}; expected "
        "functions of single features followed by a linear map"
    )


def _refuse_non_finite_output(flow: Flow) -> None:
    for output in flow.outputs:
        if bool(torch.isfinite(flow.values[output]).all()):
            continue
        culprit = next(
            (
                node
                for node, value in flow.values.items()
                if isinstance(value, Tensor) and node in flow.tracks and not bool(torch.isfinite(value).all())
            ),
            output,
        )
        raise KanCompileError(
            f"model: {node_source(culprit) or culprit.name}: found NaN or infinite outputs on the example input, first in "
            f"{culprit.name!r} ({culprit.target}); expected finite ones; pass an example input from the data, or repair "
            "the checkpoint"
        )
