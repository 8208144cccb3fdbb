"""Say how much of the output's error each layer, and each branch, brings: lower it alone and measure the output.

One layer is computed as the file computes it and everything else in float::

    e_l = f(x with layer l lowered) - f(x)

A branch alone adds its own error to the float layer. The mean of that error over samples is taken out first, for every
output, because the bias of the lowered layer is corrected for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kancompile.ir import Program, Values
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
        by layer.
    """
    x = x[: samples_that_fit(program, x)]
    replay = FloatReplay(program, x)
    return {pair.name: _contribution(replay, pair) for pair in track(pairs, "measuring layers alone")}


def _contribution(replay: FloatReplay, pair: LayerPair) -> LayerContribution:
    with torch.no_grad():
        alone = _measured(replay, pair, lambda read: (pair.output(pair.features(read)), None))
        branches = {}
        if pair.branches_match and len(pair.branch_names) > 1:
            for branch in pair.branch_names:
                branches[branch] = _measured(replay, pair, partial(_with_branch, pair, branch))
    return LayerContribution(alone, branches)


def _with_branch(pair: LayerPair, branch: str, read: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Give the output of the float layer with one branch as it was lowered, and what that branch alone gives."""
    float_features = pair.float_features(read)
    exact: Tensor = pair.float_contraction(*float_features)
    part = pair.float_part(float_features, branch).reshape(exact.shape)
    error = _without_mean(pair.part(pair.features(read), branch).reshape(exact.shape).double() - part, pair)
    return (exact + error).float(), _without_mean(part.double(), pair)


def _without_mean(value: Tensor, pair: LayerPair) -> Tensor:
    """Take the mean of every output out: over samples, and over pixels or tokens."""
    return pair.float_contraction.without_mean(value)


def _measured(
    replay: FloatReplay, pair: LayerPair, compute: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor | None]]
) -> Contribution:
    """Measure a layer computed otherwise: ``compute`` gives its output in one use, and the signal where that is another."""
    at_layer, at_output, power = ErrorMeasure(), ErrorMeasure(), 0.0

    def in_use(read: Mapping[str, Tensor]) -> Tensor:
        nonlocal power
        value, signal = compute(read)
        at_layer.add(pair.float_contraction(*pair.float_features(read)), value, pair.name)
        power += 0.0 if signal is None else float(signal.square().sum())
        return value

    at_output.add(replay.output, replay.with_layer(pair, in_use), "model output")
    changed = None if at_output.agreement is None else at_output.samples - at_output.agreeing
    return Contribution(at_output.sqnr_db, at_output.noise, decibel(power or at_layer.signal, at_layer.noise), changed)
