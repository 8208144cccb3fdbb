"""Layers whose weights make up for what comes before them, in whole programs."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from kancompile.ir import Contraction, Program, check, convolution_columns
from kancompile.passes.round_weights import RoundWeights
from kancompile.passes.round_weights.drift import FloatOutputs
from kancompile.passes.round_weights.options import RoundingOptions
from kancompile.passes.round_weights.rows import layer_problems
from kancompile.passes.rounding_methods import METHODS, Gptq
from kancompile.passes.rounding_methods.brecq import Brecq
from kancompile.passes.tabulate_expansions import TabulateExpansions
from kancompile.passes.tabulate_expansions.options import TableOptions
from tests.convolution_programs import float_convolutions, square
from tests.passes.test_lowering_passes import signal_to_noise
from tests.programs import calibration_inputs, float_program


def tabulated(program: Program, x: Tensor) -> Program:
    return TabulateExpansions(lambda name: TableOptions())(program, x)


def coarse(program: Program, layer: int) -> Program:
    """Give a layer weights that are far from its own."""
    target = program.layers()[layer].contraction
    contraction = program.node(target, Contraction)
    step = contraction.weight.std()
    return program.replace_modules({target: contraction.with_weight((contraction.weight / step).round() * step)})


def least_squares(features: Tensor, missing: Tensor, damping: float = 0.01) -> np.ndarray:
    """Solve ``|R - Q W|^2 + n lambda |W|^2`` about the means for weights ``[n_out, c]``."""
    q, r = features.double().numpy(), missing.double().numpy()
    variance = q.var(0)
    strength = damping * variance[variance > 0].mean() * len(q)
    stacked = np.concatenate([q - q.mean(0), np.sqrt(strength) * np.eye(q.shape[1])])
    targets = np.concatenate([r - r.mean(0), np.zeros((q.shape[1], r.shape[1]))])
    solved: np.ndarray = np.linalg.lstsq(stacked, targets, rcond=None)[0].T
    return solved


def called_again(program: Program) -> Program:
    """Use the last layer twice, the second time on what the first gives."""
    graph = fx.Graph()
    end = graph.graph_copy(program.graph_module.graph, {})
    layer = program.layers()[-1]
    nodes = tuple(graph.call_module(name, (end,)) for name in layer.expansions)
    graph.output(graph.call_module(layer.contraction, nodes))
    return program.with_graph(graph, program.graph_module)


PROGRAMS = {
    "linear": lambda: float_program((6, 8, 5)),
    "convolution": lambda: float_convolutions(
        (3, 6, 6), [square(6, 3, padding=1), square(4, 3, stride=2, padding=1, groups=2)]
    ),
    "linear, used twice": lambda: called_again(float_program((6, 5, 5))),
    "convolution, used twice": lambda: called_again(
        float_convolutions((3, 6, 6), [square(4, 3, padding=1), square(4, 3, padding=1, groups=2)])
    ),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_weights_are_the_least_squares_ones_times_alpha(kind: str) -> None:
    program = PROGRAMS[kind]()
    x = calibration_inputs(program, 200)
    tables = coarse(tabulated(program, x), 0)
    layer = tables.layers()[1]
    contraction = tables.node(layer.contraction, Contraction)
    options = RoundingOptions(Gptq(), "gptq", 2)
    problems = layer_problems(tables, layer, x, options, torch.Generator().manual_seed(0))
    floats = FloatOutputs(program, tables, {layer: torch.Generator().manual_seed(0)}, x, 7)
    changed, note = floats.make_up(contraction, layer, problems)
    alpha = float(re.search(r"alpha ([\d.]+)\)", note)[1])  # type: ignore[index]
    assert alpha > 0.2

    fitting = (torch.randperm(len(x), generator=torch.Generator().manual_seed(7)) % 5 < 4).repeat(layer.uses)
    codes = [feature[1][fitting] for feature in tables.trace(x, layer.expansions).values()]
    exact = program.trace(x, [layer.contraction])[layer.contraction][1][fitting]
    if contraction.geometry is None:
        parts, outputs = [codes[0].flatten(1)], [exact]
    else:
        images = convolution_columns(codes, 2).movedim(-1, 1).float() - contraction.zero_point
        unfolded = (
            nn.functional.unfold(images, 3, padding=1, stride=contraction.geometry.stride).movedim(1, 2).flatten(0, 1)
        )
        parts, outputs = list(unfolded.chunk(2, 1)), list(exact.movedim(1, -1).reshape(-1, 4).chunk(2, 1))
    given = zip(changed.flat_weight(), contraction.flat_weight(), parts, outputs, strict=True)
    for (found, weight, part, exactly), found_bias, bias in zip(
        given, changed.bias.chunk(len(parts)), contraction.bias.chunk(len(parts)), strict=True
    ):
        missing = exactly - (part.float() @ weight.T + bias)
        expected = alpha * least_squares(part, missing)
        np.testing.assert_allclose((found - weight).numpy(), expected, rtol=2e-2, atol=2e-3 * np.abs(expected).max())
        left = exactly - (part.float() @ found.T + found_bias)
        assert left.mean(0).abs().max() < 1e-3 * missing.std()


@pytest.mark.parametrize("method", ["uniform", "gptq", "awq+gptq", "brecq"])
def test_deep_networks_of_few_bits_gain(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "brecq", Brecq(iterations=50))
    program = float_convolutions((3, 8, 8), [square(6, 3, padding=1), square(6, 3, padding=1), square(4, 3)])
    x, fresh = calibration_inputs(program, 200), calibration_inputs(program, 50, seed=5)
    tables = tabulated(program, x)
    found = []
    for makes_up in (False, True):
        options = RoundingOptions(METHODS[method], method, 2, makes_up=makes_up)
        rounded = RoundWeights(lambda name: options)(tables, x, program)  # noqa: B023 (called at once)
        check(rounded)
        found.append(signal_to_noise(program(fresh), rounded(fresh)))
    assert found[1] > found[0], found
