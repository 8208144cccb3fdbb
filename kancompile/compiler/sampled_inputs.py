"""Calibrate without data: inputs drawn where the functions of the first layer say that inputs lie.

Nagel et al., *Data-free quantization* (2019), and Cai et al., *ZeroQ* (2020), take the statistics of batch norms for what data
would say. A KAN says more: its first layer has a grid. The model was trained where the functions of an input sum to a constant,
as B-splines do inside their knots, or else where they change at all. Where a batch norm reads the inputs first, they have its
mean and variance.

Inputs of real data depend on each other, and nothing here says how. Half of the samples are drawn independently, the others have
a level of their own that all of their inputs lie around: sums of many inputs then spread as far as those of correlated data do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kancompile.data import Calibration, evaluating, load_calibration, model_inputs
from kancompile.errors import KanCompileError
from kancompile.frontend import capture
from kancompile.ir import Expansion, Program
from kancompile.recipe import Recipe
from kancompile.validation import read_from_input

SAMPLES = 1024
_TRIED = 16
_REACHES = (4.0, 64.0, 4096.0)  # of the largest input for which a grid is looked for
_POINTS = 1025
_UNITY, _INSIDE, _CHANGE = 1e-5, 0.2, 0.05
_LEAST_POINTS, _END = 8, 32
_AROUND_LEVEL = 0.15  # standard deviation of inputs about the level of their sample, in ranges
_OWN = 0.3  # share of the variance of normal inputs about it
_NO_DATA = "pass a few hundred samples of its inputs as calibration, which is more accurate in any case"


def sampled_inputs(model: Any, seed: int = 0) -> Calibration:
    """Draw inputs for a model of one input, a vector of features, from its own grid or its first batch norm.

    Args:
        model: ``nn.Module`` or ``ExportedProgram``.
        seed: of the draws.

    Returns:
        ``SAMPLES`` samples ``[n, n_in]``, whose remark says where they come from.

    Raises:
        KanCompileError: the model has several inputs, reads no vector, or says nothing about their range.
    """
    names = model_inputs(model)
    if names is None or len(names.required) != 1:
        found = "a model that does not say its inputs" if names is None else f"inputs {list(names.required)!r}"
        raise KanCompileError(
            f"calibration none: found {found}, expected one input whose grid can be sampled; {_NO_DATA}"
        )
    width = _exported_width(model) if isinstance(model, ExportedProgram) else _width(model)
    generator = torch.Generator().manual_seed(seed)
    tried = torch.rand(_TRIED, width, generator=generator) * 2 - 1
    norm = _first_norm(model, tried)
    if norm is not None:
        name, mean, deviation = norm
        x = mean + deviation * _normal(SAMPLES, width, generator)
        source = f"the mean and variance that batch norm {name!r} keeps"
    else:
        layer, low, high = _grid(model, tried)
        x = low + (high - low) * _shares(SAMPLES, width, generator)
        source = f"the grid {float(low.min()):.3g} ... {float(high.max()):.3g} of layer {layer!r}"
    remark = (
        f"no calibration data: {len(x):,} inputs sampled from {source}; real data may lie elsewhere, and depend on each other, "
        "so measure the file on some before it is used"
    )
    drawn = load_calibration(x.numpy().astype(np.float32))
    return Calibration(drawn.inputs, remarks=(remark,), is_sampled=True)


def for_sampled_inputs(recipe: Recipe) -> Recipe:
    """Leave out what only data can say: which few functions matter together, and which inputs are too rare for a range."""
    return replace(
        recipe,
        lookup="each" if recipe.lookup == "auto" else recipe.lookup,
        range="minmax" if recipe.range == "mse" else recipe.range,
    )


def _shares(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw where in their ranges inputs lie, ``[count, width]`` in [0, 1]: half independent, half about a common level."""
    independent = torch.rand(count // 2, width, generator=generator)
    level = torch.rand(count - count // 2, 1, generator=generator)
    about = level + _AROUND_LEVEL * torch.randn(len(level), width, generator=generator)
    inside = 1 - (1 - about.abs()).abs()  # mirrored at the ends, where clamped ones would pile up
    shares = torch.cat([independent, inside.clamp(0, 1)])
    return shares[torch.randperm(count, generator=generator)]


def _normal(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw standard normal inputs, ``[count, width]``: half independent, half about a common level."""
    independent = torch.randn(count, width, generator=generator)
    level = torch.randn(count // 2, 1, generator=generator)
    about = math.sqrt(1 - _OWN) * level + math.sqrt(_OWN) * independent[: len(level)]
    return torch.cat([about, independent[len(level) :]])[torch.randperm(count, generator=generator)]


def _exported_width(model: ExportedProgram) -> int:
    by_name = {node.name: node for node in model.graph.nodes if node.op == "placeholder"}
    (name,) = [name for name in model.graph_signature.user_inputs if isinstance(name, str)]
    shape = tuple(by_name[name].meta["val"].shape)
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise KanCompileError(
            f"calibration none: found an input of shape {shape!r}, expected vectors [n, features]; {_NO_DATA}"
        )
    return int(shape[1])


def _width(model: nn.Module) -> int:
    """Find the only number of features with which the model runs, among the sizes of its parameters and buffers."""
    sizes = dict.fromkeys(size for value in model.state_dict().values() for size in value.shape if size > 0)
    fitting: list[int] = []
    for size in sizes:
        try:
            with evaluating(model), torch.no_grad():
                found = model(torch.zeros(3, size))
        except Exception:
            continue
        if isinstance(found, Tensor) and found.dim() > 0 and len(found) == 3:
            fitting.append(size)
    fitting = [size for size in fitting if size > 1] or fitting  # a single feature may be broadcast to all
    if len(fitting) != 1:
        raise KanCompileError(
            f"calibration none: found {len(fitting) or 'no'} sizes [n, features] that the model takes"
            f"{f' ({fitting!r})' if fitting else ''}, expected one, which says how many features to sample; {_NO_DATA}"
        )
    return fitting[0]


def _first_norm(model: Any, x: Tensor) -> tuple[str, Tensor, Tensor] | None:
    """Find a batch norm that reads the model's input as it is: name, mean and standard deviation ``[n_in]``."""
    if not isinstance(model, nn.Module):
        return None
    found: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Any:
        def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            same = isinstance(inputs[0], Tensor) and inputs[0].shape == x.shape and torch.equal(inputs[0], x)
            mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if same and mean is not None and variance is not None:
                found.append((name, mean.detach().float(), variance.detach().float().sqrt()))

        return see

    norms = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.BatchNorm1d)]
    handles = [part.register_forward_pre_hook(hook(name)) for name, part in norms]
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _grid(model: Any, x: Tensor) -> tuple[str, Tensor, Tensor]:
    """Find the range of every input, ``[n_in]`` each, in the functions of the layer that reads them as they are."""
    program: Program = capture(model, x)
    for layer, expansion, _ in read_from_input(program, x):
        for reach in _REACHES:
            found = grid_of_inputs(expansion, reach)
            if found is not None:
                return layer, *found
    names = [layer.name for layer in program.layers()]
    raise KanCompileError(
        f"calibration none: found no layer among {names!r} that reads the inputs as they are and whose functions have a grid, "
        f"expected one whose functions are constant outside a range; {_NO_DATA}"
    )


def grid_of_inputs(expansion: Expansion, reach: float) -> tuple[Tensor, Tensor] | None:
    """Find where the functions of every input lie: inside their knots, or where they change at all.

    Args:
        expansion: the float expansion.
        reach: largest absolute input that is looked at.

    Returns:
        lowest and highest input, float32 ``[n_in]`` each; ``None`` where an input has no function that is constant outside a
        range.
    """
    end = math.asinh(4 * reach)
    points = torch.sinh(torch.linspace(-end, end, _POINTS, dtype=torch.float64))
    with torch.no_grad():
        values = torch.cat([expansion.sample_inputs(part) for part in points.split(64)]).double()  # [p, n_in, k]
    first = 0
    ranges: list[Tensor] = []  # [2, n_in], nan where a branch says nothing
    for branch in expansion.branches:
        k = int(branch.k)  # type: ignore[arg-type]
        ranges.append(torch.stack(list(_ranges(values[..., first : first + k], points)), dim=1))
        first += k
    every = torch.stack(ranges)
    low = every[:, 0].nan_to_num(torch.inf).amin(0)
    high = every[:, 1].nan_to_num(-torch.inf).amax(0)
    if not bool((low < high).all()):
        return None
    return low.float(), high.float()


def _ranges(values: Tensor, points: Tensor) -> Iterator[Tensor]:
    """Give the range of every input by the functions of one branch, float64 ``[2]``, for values ``[p, n_in, k]``."""
    for own in values.unbind(1):
        scale = own.abs().amax().clamp(min=1e-30)
        ends = own[:_END], own[-_END:]
        if any(float((end - end[:1]).abs().max()) > _CHANGE / 5 * scale for end in ends):
            yield points.new_full((2,), torch.nan)  # as a base activation, which goes on changing
            continue
        changes = ((own - own[0]).abs().amax(1) > _CHANGE * scale) & ((own - own[-1]).abs().amax(1) > _CHANGE * scale)
        total = own.sum(1)
        # functions that sum to one constant where each of them varies, and to another outside: inside the knots of B-splines
        inside = changes & ((total - total.amax()).abs() < _UNITY * total.abs().amax().clamp(min=1e-30))
        of = inside if int(inside.sum()) > max(_LEAST_POINTS, _INSIDE * int(changes.sum())) else changes
        at = of.nonzero().flatten()
        is_local = len(at) >= _LEAST_POINTS and int(at[0]) > 0 and int(at[-1]) < len(points) - 1
        # the next points outside, so that a range never ends before its knots
        yield points[at[[0, -1]] + torch.tensor([-1, 1])] if is_local else points.new_full((2,), torch.nan)
