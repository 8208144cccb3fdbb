"""Capture a trained network as a program: find its KAN layers, bring them into canonical form, confirm by evaluation."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from kancompile.errors.exceptions import KanCompileError
from kancompile.frontend.batch_dependence import refuse_batch_dependence, run
from kancompile.frontend.batch_layout import NotLowerableError
from kancompile.frontend.canonical import CanonicalLayer, can_be_per_token, canonicalize, layer_name, shipped_bytes
from kancompile.frontend.convolution_layer import canonicalize_convolution
from kancompile.frontend.convolution_map import is_over_positions
from kancompile.frontend.export import example_rows, export
from kancompile.frontend.flow import Flow, analyse
from kancompile.frontend.patch_layer import canonicalize_patches, find_patches
from kancompile.frontend.probing import TOLERANCE, confirm
from kancompile.frontend.regions import Region, find_regions
from kancompile.frontend.rewrite import rewrite
from kancompile.frontend.source_lines import node_source
from kancompile.ir.check import check
from kancompile.ir.program import Program, Unrecognized

_MOST_REPORTED = 12


def capture(
    model: nn.Module | ExportedProgram | str | os.PathLike[str], example: Tensor | Sequence[int], *, trust: bool = False
) -> Program:
    """Capture a network.

    Args:
        model: trained module (its training flags are restored), exported program, or path of a ``.pt2`` file.
        example: an input ``[b, *input_shape]`` (float32), or ``input_shape`` without the batch.
        trust: whether a ``.pt2`` file may be opened: loading one can run any code that it holds.

    Returns:
        the float program: expansions and contractions for every KAN layer, ATen for the rest.

    Raises:
        KanCompileError: the network cannot be traced, its samples depend on each other, or it has no KAN layer.
    """
    exported = export(model, example, trust)
    rows = example_rows(example)
    flow = analyse(exported, rows)
    _refuse_non_finite_output(flow)
    refuse_batch_dependence(flow)
    layers: list[CanonicalLayer] = []
    unrecognized = [_unrecognized(node, reason) for node, reason in flow.barriers.items()]
    names: set[str] = set()
    regions = find_regions(flow)
    unrecognized += [_unrecognized(node, reason) for node, reason in regions.joins.items()]
    for candidates in regions.layers:
        name = _unique(layer_name(flow, candidates[0]), len(layers), names)
        try:
            layers.append(_best_layer(flow, candidates, name))
        except NotLowerableError as refusal:
            unrecognized.append(_unrecognized(candidates[0].target, str(refusal)))
        else:
            names.add(name)
    order = {node.name: place for place, node in enumerate(flow.graph.nodes)}
    unrecognized.sort(key=lambda entry: order[entry.node])
    if not layers:
        raise KanCompileError(_nothing_found(unrecognized))
    program = Program(rewrite(flow, layers), tuple(rows.shape[1:]), tuple(unrecognized))
    check(program)
    _confirm_program(flow, program)
    return program


def _best_layer(flow: Flow, candidates: Sequence[Region], name: str) -> CanonicalLayer:
    """Canonicalise every candidate and take the smallest; the refusal of the first one counts if there is none."""
    layers: list[CanonicalLayer] = []
    refusals: list[NotLowerableError] = []
    for region in candidates:
        try:
            layers.append(_canonical_layer(flow, region, name))
        except NotLowerableError as refusal:
            refusals.append(refusal)
    if not layers:
        raise refusals[0]
    return min(layers, key=shipped_bytes)


def _canonical_layer(flow: Flow, region: Region, name: str) -> CanonicalLayer:
    """Canonicalise token by token where that holds, else with every element as an input of its own."""
    if any(is_over_positions(flow, node) for node in region.affine):
        layer = canonicalize_convolution(flow, region, name)
        confirm(flow, layer)
        return layer
    refusal: NotLowerableError | None = None
    try:
        patches = find_patches(flow, region)
        if patches is not None:
            layer = canonicalize_patches(flow, region, name, patches)
            confirm(flow, layer)
            return layer
    except NotLowerableError as error:
        refusal = error  # a dense matrix may hold it, if the image is small
    if can_be_per_token(flow, region):
        try:
            layer = canonicalize(flow, region, name, per_token=True)
            confirm(flow, layer)
            return layer
        except NotLowerableError:
            pass  # the dimensions in front are no tokens; the form below says what is wrong if anything is
    try:
        layer = canonicalize(flow, region, name, per_token=False)
        confirm(flow, layer)
    except NotLowerableError as error:
        raise refusal or error from error
    return layer


def _unique(name: str, number: int, taken: set[str]) -> str:
    name = name or f"layer{number}"
    candidate, copy = name, 1
    while candidate in taken:
        candidate, copy = f"{name}_{copy}", copy + 1
    return candidate


def _unrecognized(node: fx.Node, reason: str) -> Unrecognized:
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):  # one of several results
        node = node.args[0]
    return Unrecognized(node.name, str(node.target), reason, node_source(node))


def _nothing_found(unrecognized: Sequence[Unrecognized]) -> str:
    looked_at = [
        f"{entry.node} ({entry.operator}{', ' + entry.source if entry.source else ''}): {entry.reason}"
        for entry in unrecognized
    ]
    if len(looked_at) > _MOST_REPORTED:
        looked_at[_MOST_REPORTED:] = [f"and {len(looked_at) - _MOST_REPORTED} more"]
    return (
        f"model: found no KAN layer, looked at {'; '.join(looked_at) or 'a network without contraction'}; expected "
        "functions of single features followed by a linear map"
    )


def _refuse_non_finite_output(flow: Flow) -> None:
    output = flow.values[flow.output]
    if not bool(torch.isfinite(output).all()):
        culprit = next(
            (
                node
                for node, value in flow.values.items()
                if isinstance(value, Tensor) and node in flow.tracks and not bool(torch.isfinite(value).all())
            ),
            flow.output,
        )
        raise KanCompileError(
            f"model: {node_source(culprit) or culprit.name}: found NaN or infinite outputs on the example input, first in "
            f"{culprit.name!r} ({culprit.target}); expected finite ones; pass an example input from the data, or repair "
            "the checkpoint"
        )


def _confirm_program(flow: Flow, program: Program) -> None:
    """Compare the finished program with the exported graph at several batch sizes."""
    generator = torch.Generator().manual_seed(3)
    for size in (2, 7):
        rows = torch.randn(size, *program.input_shape, generator=generator)
        rows[0] = flow.values[flow.input][0]
        expected, found = run(flow, rows)[flow.output], program(rows)
        scale = float(expected[torch.isfinite(expected)].abs().max().clamp(min=1e-6))
        if found.shape != expected.shape or not torch.allclose(
            found, expected, rtol=0, atol=100 * TOLERANCE * scale, equal_nan=True
        ):
            raise KanCompileError(
                f"model: found outputs of the captured program that differ from the model at batch {size}, expected "
                "equal ones although every layer was confirmed; please report this with the model"
            )
