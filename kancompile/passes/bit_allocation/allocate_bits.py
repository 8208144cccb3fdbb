"""Choose the bits of every layer under a size budget, from Hessian traces (HAWQ-V2).

Traces are those of the mean squared deviation of the network's outputs from its own float outputs. It needs no labels, it is
0 at the trained weights whatever the network was trained for, and its Hessian there is exactly the Gauss-Newton matrix,
which is positive semidefinite as the sensitivities assume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import Layer, Program, Values, joined
from kancompile.passes.bit_allocation.allocation import Allocation, Choice, allocate, pareto_front
from kancompile.passes.bit_allocation.hawq import Traces, hessian_traces, sensitivity
from kancompile.passes.one_thread import in_one_thread
from kancompile.passes.rounding_methods import round_to_nearest, search_scale

BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class LayerSensitivity:
    """What rounding one layer costs.

    Attributes:
        layer: its name.
        weights: number of weights.
        parts: names of its branches.
        by_bits: for each width, the expected rise of the loss by part, ``[parts]``.
    """

    layer: str
    weights: int
    parts: tuple[str, ...]
    by_bits: Mapping[int, Tensor]

    def choices(self, fixed_bytes: int = 0) -> list[Choice]:
        """List the widths as choices of an allocation."""
        return [
            Choice(bits, -(-self.weights * bits // 8) + fixed_bytes, float(cost.sum()))
            for bits, cost in self.by_bits.items()
        ]


@in_one_thread()
def measure_sensitivities(
    program: Program, x: Values, generator: torch.Generator, bits: Sequence[int] = BITS, samples: int = 256
) -> tuple[list[LayerSensitivity], Traces]:
    """Measure the sensitivity of every layer and branch of a captured program.

    Args:
        program: a captured program with float weights.
        x: calibration inputs ``[n, *input_shape]``.
        generator: draws the probes.
        bits: widths to judge.
        samples: calibration samples for the traces.
    """
    layers = [layer for layer in program.layers() if program.is_float(layer)]
    few = x[:: max(1, len(x) // samples)][:samples]
    with torch.no_grad():
        target = joined(program(few))
    power = target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    weights = [program.module(layer.contraction).get_buffer("weight") for layer in layers]
    shapes = [weight.shape for weight in weights]

    def loss(given: Sequence[Tensor]) -> Tensor:
        values = {
            f"{layer.contraction}.weight": weight.reshape(shape)
            for layer, weight, shape in zip(layers, given, shapes, strict=True)
        }
        y = joined(program.by_name(torch.func.functional_call(program.graph_module, values, program.arguments(few))))
        deviation: Tensor = (y - target).square().mean() / power
        return deviation

    parts = [part_of_column(program, layer) for layer in layers]
    flat = [weight.flatten(1) for weight in weights]
    traces = hessian_traces(loss, flat, [part for part, _ in parts], generator)
    found = []
    for layer, weight, (part, names), average in zip(layers, flat, parts, traces.average, strict=True):
        by_bits = {}
        for width in bits:
            scale = search_scale(weight, width, (weight.shape[1],), "mse", None)
            rounded = round_to_nearest(weight, scale, (weight.shape[1],), width).float() * scale.T
            by_bits[width] = sensitivity(average, weight, rounded, part)
        found.append(LayerSensitivity(layer.name, weight.numel(), names, by_bits))
    return found, traces


def part_of_column(program: Program, layer: Layer) -> tuple[Tensor, tuple[str, ...]]:
    """Number the branch of every column of a layer, int64 ``[c]``, and name the branches."""
    parts: list[Tensor] = []
    names: list[str] = []
    for target in layer.expansions:
        expansion = program.module(target)
        branches = list(getattr(expansion, "branches", ()))
        sizes = torch.tensor([branch.k for branch in branches] or [int(expansion.k)])  # type: ignore[arg-type]
        numbers = torch.repeat_interleave(torch.arange(len(sizes)), sizes) + len(names)
        parts.append(numbers.repeat(int(expansion.n_in)))  # type: ignore[arg-type]
        names += [branch.name for branch in branches] or [target]
    part = torch.cat(parts)
    weight = program.module(layer.contraction).get_buffer("weight")
    # a kernel of a convolution repeats the columns at every tap, and its groups have a part of them each
    taps = weight[0, 0].numel()
    return part[: weight.shape[1]].repeat_interleave(taps), tuple(names)


def allocate_bits(sensitivities: Sequence[LayerSensitivity], max_bytes: int) -> tuple[Allocation, list[Allocation]]:
    """Choose bits within a budget for the weights of all layers together, and list the Pareto front.

    Raises:
        KanCompileError: the budget is below the smallest reachable size, which the message says.
    """
    options = {layer.layer: layer.choices() for layer in sensitivities}
    return allocate(options, max_bytes), pareto_front(options)


def front_table(front: Sequence[Allocation], chosen: Allocation) -> list[str]:
    """Print a Pareto front, one line for each allocation, at most 20 of them around the chosen one."""
    position = next((i for i, entry in enumerate(front) if entry.bytes == chosen.bytes), 0)
    start = max(0, min(position - 10, len(front) - 20))
    lines = []
    for entry in front[start : start + 20]:
        bits = ", ".join(f"{layer} {choice.bits}" for layer, choice in entry.choices.items())
        mark = "  <- chosen" if entry.bytes == chosen.bytes else ""
        lines.append(f"{entry.bytes} weight bytes, sensitivity {entry.sensitivity:.3g}: {bits}{mark}")
    return lines
