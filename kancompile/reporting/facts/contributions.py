"""Say how much of the output's error each layer, and each branch, brings: lower it alone and measure the output.

One layer is computed as the file computes it and everything else in float::

    e_l = f(x with layer l lowered) - f(x)

A branch alone adds its own error to the float layer. The mean of that error over samples is taken out first, for every
output, because the bias of the lowered layer is corrected for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import Program, Values, node_of
from kancompile.progress import track
from kancompile.validation import ErrorMeasure, FloatReplay, LayerPair, decibel, samples_that_fit


@dataclass(frozen=True)
class Contribution:
    """What a layer or a branch lowered alone does.

    Attributes:
        sqnr_db: signal-to-noise ratio of the model's output.
        noise: power of the output's error, summed over samples and outputs.
        layer_sqnr_db: ratio at the layer's own output, with float inputs.
        argmax_changed: samples whose largest output moves; ``None`` where outputs are no class scores.
    """

    sqnr_db: float
    noise: float
    layer_sqnr_db: float
    argmax_changed: int | None


@dataclass(frozen=True)
class LayerContribution:
    """A layer alone and its branches alone; ``branches`` is empty where a pass mixed them."""

    layer: Contribution
    branches: Mapping[str, Contribution]


def measure_contributions(program: Program, pairs: Sequence[LayerPair], x: Values) -> dict[str, LayerContribution]:
    """Measure every layer, and every branch of layers with several, alone.

    Args:
        program: the captured float program.
        pairs: its layers beside the lowered ones.
        x: inputs ``[n, *input_shape]``; as many as fit bounded memory are used.

    Returns:
        by layer; layers whose inputs cannot be found in the float program are left out.
    """
    x = x[: samples_that_fit(program, x)]
    replay = FloatReplay(program, x)
    found = {}
    for pair in track(pairs, "measuring layers alone"):
        if all(anchor in replay.values for anchor in pair.anchors.values()):
            found[pair.name] = _contribution(replay, pair)
    return found


def _contribution(replay: FloatReplay, pair: LayerPair) -> LayerContribution:
    node = replay.contraction_of(pair.float_layer.contraction)
    exact = replay.values[node]
    with torch.no_grad():
        features = pair.features(replay.values)
        alone = _measured(replay, node, pair.output(features).reshape(exact.shape))
        branches = {}
        if pair.branches_match and len(pair.branch_names) > 1:
            float_features = _float_features(replay, pair)
            for branch in pair.branch_names:
                part = pair.float_part(float_features, branch).reshape(exact.shape)
                error = pair.part(features, branch).reshape(exact.shape).double() - part
                error = _without_mean(error, pair)
                branches[branch] = _measured(replay, node, (exact + error).float(), _without_mean(part.double(), pair))
    return LayerContribution(alone, branches)


def _float_features(replay: FloatReplay, pair: LayerPair) -> list[Tensor]:
    return [
        replay.program.module(target)(replay.values[node_of(replay.program, target).all_input_nodes[0].name])
        for target in pair.float_layer.expansions
    ]


def _without_mean(value: Tensor, pair: LayerPair) -> Tensor:
    """Take the mean of every output out: over samples, and over pixels or tokens."""
    return pair.float_contraction.without_mean(value)


def _measured(replay: FloatReplay, node: str, value: Tensor, signal: Tensor | None = None) -> Contribution:
    exact = replay.values[node]
    output = replay.with_value(node, value)
    at_layer, at_output = ErrorMeasure(), ErrorMeasure()
    at_layer.add(exact, value, node)
    at_output.add(replay.output, output, "model output")
    changed = None if at_output.agreement is None else at_output.samples - at_output.agreeing
    power = at_layer.signal if signal is None else float(signal.square().sum())
    return Contribution(at_output.sqnr_db, at_output.noise, decibel(power, at_layer.noise), changed)
