"""Say how much of the output's error each layer, and each branch, brings: lower it alone and measure the output.

One layer is computed as the file computes it and everything else in float::

    e_l = f(x with layer l lowered) - f(x)

A branch alone adds its own error to the float layer. The mean of that error over samples is taken out first, for every
output, because the bias of the lowered layer is corrected for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kancompile.ir import CONTRACTIONS, Program
from kancompile.progress import track
from kancompile.validation import ErrorMeasure, LayerPair, decibel

_ELEMENTS = 1 << 23
_FEW, _MANY = 8, 256


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


class FloatReplay:
    """A float program evaluated once, with every value kept, so that what follows one layer can be run again.

    Attributes:
        values: what every node yields, by its name; what only an evaluated contraction reads is dropped.
        output: of the program.
    """

    def __init__(self, program: Program, x: Tensor) -> None:
        self.program = program
        self._interpreter = _Keeping(program)
        with torch.no_grad():
            self.output: Tensor = self._interpreter.run(x)
        self.values = {node.name: value for node, value in self._interpreter.env.items() if isinstance(value, Tensor)}
        self._nodes = {node.name: node for node in program.graph_module.graph.nodes}
        self._x = x

    def contraction_of(self, target: str) -> str:
        """Return the name of the node that calls a module."""
        return next(
            str(name) for name, node in self._nodes.items() if node.op == "call_module" and node.target == target
        )

    def with_value(self, name: str, value: Tensor) -> Tensor:
        """Return the program's output with the value of one node exchanged."""
        changed = self._nodes[name]
        behind = {changed}
        for node in self.program.graph_module.graph.nodes:
            if any(source in behind for source in node.all_input_nodes):
                behind.add(node)
        known = {node: kept for node, kept in self._interpreter.env.items() if node not in behind}
        interpreter = fx.Interpreter(self.program.graph_module)
        interpreter.extra_traceback = False
        with torch.no_grad():
            output: Tensor = interpreter.run(self._x, initial_env=known | {changed: value})
        return output


class _Keeping(fx.Interpreter):
    """Keep all values but those that nothing reads any more; in a KAN those of expansions are the large ones."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module" and isinstance(self.module.get_submodule(str(n.target)), CONTRACTIONS):  # type: ignore[operator]
            for source in n.all_input_nodes:
                if all(user in self.env or user is n for user in source.users):
                    self.env[source] = None
        return result


def measure_contributions(program: Program, pairs: Sequence[LayerPair], x: Tensor) -> dict[str, LayerContribution]:
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


def samples_that_fit(program: Program, x: Tensor) -> int:
    """Return how many samples can be kept at every node, and expanded by the widest layer."""
    replay = FloatReplay(program, x[:2])
    kept = sum(value.numel() for value in replay.values.values())
    widest = max((_expanded(program, layer.expansions) for layer in program.layers()), default=0)
    return max(_FEW, min(_MANY, len(x), _ELEMENTS // max(1, kept // 2 + widest)))


def _expanded(program: Program, targets: Sequence[str]) -> int:
    modules = [program.module(target) for target in targets]
    return sum(torch.Size(module.in_shape).numel() * int(module.k) for module in modules)  # type: ignore[arg-type, misc]


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
    nodes = {str(node.target): node for node in replay.program.graph_module.graph.nodes if node.op == "call_module"}
    return [
        replay.program.module(target)(replay.values[nodes[target].all_input_nodes[0].name])
        for target in pair.float_layer.expansions
    ]


def _without_mean(value: Tensor, pair: LayerPair) -> Tensor:
    """Take the mean of every output out: over samples, and over pixels or tokens."""
    contraction = pair.float_contraction
    n_out = contraction.n_out
    if hasattr(contraction, "geometry"):
        return value - value.mean([0, *range(2, value.ndim)], keepdim=True)
    flat = value.reshape(-1, n_out)
    return (flat - flat.mean(0)).reshape(value.shape)


def _measured(replay: FloatReplay, node: str, value: Tensor, signal: Tensor | None = None) -> Contribution:
    exact = replay.values[node]
    output = replay.with_value(node, value)
    at_layer, at_output = ErrorMeasure(), ErrorMeasure()
    at_layer.add(exact, value, node)
    at_output.add(replay.output, output, "model output")
    changed = None if at_output.agreement is None else at_output.samples - at_output.agreeing
    power = at_layer.signal if signal is None else float(signal.square().sum())
    return Contribution(at_output.sqnr_db, at_output.noise, decibel(power, at_layer.noise), changed)
