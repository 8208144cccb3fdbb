"""Small convolutional programs built by hand, so that passes and targets are tested without a frontend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from kancompile.ir import (
    Branch,
    Contraction,
    Expansion,
    Geometry,
    HandOver,
    IndexQuantizer,
    IntegerContraction,
    Program,
    TableExpansion,
)
from tests.saturation import code_limit


@dataclass(frozen=True)
class Convolution:
    """One layer: channels, kernel and geometry; ``features`` gives the functions of each expansion."""

    n_out: int
    kernel: tuple[int, ...] = (3, 3)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    features: tuple[int, ...] = (3,)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation, self.groups)


def square(n_out: int, side: int, stride: int = 1, padding: int = 0, dilation: int = 1, **rest: object) -> Convolution:
    """Give a two-dimensional layer."""
    return Convolution(n_out, (side,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2, **rest)  # type: ignore[arg-type]


def integer_convolutions(
    input_shape: Sequence[int],
    layers: Sequence[Convolution],
    levels: int = 256,
    tables: int = 1,
    weight_bits: int = 8,
    zero_point: int = 0,
    fused: bool = True,
    seed: int = 0,
) -> Program:
    """Chain layers of random tables and weights; ``fused`` hands row numbers on, the last layer always real values."""
    generator = torch.Generator().manual_seed(seed)
    root: dict[str, nn.Module] = {}
    graph = fx.Graph()
    value = graph.placeholder("x")
    index = IndexQuantizer(4.0 / (levels - 1), levels // 2, levels)
    channels, spatial = input_shape[0], tuple(input_shape[1:])
    for number, layer in enumerate(layers):
        nodes = []
        for which, k in enumerate(layer.features):
            name = f"layer{number}_expand{which}"
            root[name] = TableExpansion(
                (*spatial, channels),
                index,
                torch.randint(0, 256, (tables * levels, k), dtype=torch.uint8, generator=generator),
                None if tables == 1 else (torch.arange(channels, dtype=torch.int32) % tables) * levels,
                torch.full((tables, k), 1 / 255),
                torch.full((tables, k), -zero_point / 255),
                (k,),
                ("basis",),
                "index" if fused and number > 0 else "real",
                channels_first=True,
            )
            nodes.append(graph.call_module(name, (value,)))
        limit = code_limit(weight_bits)
        columns = channels // layer.groups * sum(layer.features)
        shape = (layer.n_out, columns, *layer.kernel)
        spatial = layer.geometry.out_size(spatial, layer.kernel)
        last = number + 1 == len(layers)
        fan_in = columns * math.prod(layer.kernel)
        root[f"layer{number}_convolve"] = IntegerContraction(
            f"layers.{number}",
            torch.randint(-limit + (weight_bits == 8), limit, shape, dtype=torch.int8, generator=generator),
            torch.randint(-2000, 2000, (layer.n_out,), dtype=torch.int32, generator=generator),
            (torch.rand(1, layer.n_out, generator=generator) + 0.5) * 2.0 / (255 * limit * fan_in**0.5),
            (layer.n_out, *spatial),
            layer.geometry,
            zero_point,
            weight_bits,
            hands_over=HandOver(
                "rows" if fused and not last else "real", index if not last else IndexQuantizer(0.03, 120, 256)
            ),
        )
        value = graph.call_module(f"layer{number}_convolve", tuple(nodes))
        channels = layer.n_out
    graph.output(value)
    return Program(fx.GraphModule(root, graph), tuple(input_shape))


class Polynomials(nn.Module):
    """``silu(tanh(x)^d)`` for d = 0 ... degree, concatenated along the channels, degree-major; the first is constant."""

    def __init__(self, degree: int, gain: torch.Tensor | None) -> None:
        super().__init__()
        self.degree = degree
        self.register_buffer("gain", gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bounded = torch.tanh(x if self.gain is None else x * self.gain)
        return nn.functional.silu(torch.cat([bounded**degree for degree in range(self.degree + 1)], dim=1))


def polynomial_branch(shape: Sequence[int], degree: int, gain: torch.Tensor | None) -> Branch:
    """Wrap polynomials of an anchor ``(c, *spatial)``; positions are channels last, functions innermost."""
    flat = torch.arange((degree + 1) * math.prod(shape)).reshape(degree + 1, *shape)
    return Branch("polynomials", fx.symbolic_trace(Polynomials(degree, gain)), flat.movedim(1, -1).movedim(0, -1))


def base_branch(shape: Sequence[int]) -> Branch:
    """Wrap the SiLU of an anchor ``(c, *spatial)``."""
    positions = torch.arange(math.prod(shape)).reshape(*shape).movedim(0, -1)[..., None]
    return Branch("base", fx.symbolic_trace(nn.SiLU()), positions)


def float_convolutions(
    input_shape: Sequence[int],
    layers: Sequence[Convolution],
    degree: int = 2,
    split: bool = False,
    same_functions: bool = True,
    seed: int = 0,
) -> Program:
    """Chain layers of polynomials beside a SiLU; ``split`` makes them two expansions of one convolution.

    Without ``same_functions`` every channel has its own slope in front of the polynomials, as a folded batch norm gives.
    """
    generator = torch.Generator().manual_seed(seed)
    root: dict[str, nn.Module] = {}
    graph = fx.Graph()
    value = graph.placeholder("x")
    shape = tuple(input_shape)
    for number, layer in enumerate(layers):
        gain = None
        if not same_functions:
            gain = (torch.rand(shape[0], generator=generator) + 0.5).reshape(-1, *[1] * (len(shape) - 1))
        branches = [polynomial_branch(shape, degree, gain), base_branch(shape)]
        parts = [[branch] for branch in branches] if split else [branches]
        nodes = []
        for which, part in enumerate(parts):
            root[f"layer{number}_expand{which}"] = Expansion(shape, part, channels_first=True)
            nodes.append(graph.call_module(f"layer{number}_expand{which}", (value,)))
        columns = shape[0] // layer.groups * (degree + 2)
        weight = torch.randn(layer.n_out, columns, *layer.kernel, generator=generator)
        shape = (layer.n_out, *layer.geometry.out_size(shape[1:], layer.kernel))
        root[f"layer{number}_convolve"] = Contraction(
            f"layers.{number}",
            weight / (columns * math.prod(layer.kernel)) ** 0.5,
            torch.randn(layer.n_out, generator=generator) / 10,
            shape,
            layer.geometry,
        )
        value = graph.call_module(f"layer{number}_convolve", tuple(nodes))
    graph.output(value)
    return Program(fx.GraphModule(root, graph), tuple(input_shape))
