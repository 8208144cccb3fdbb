"""Let all channels between two convolutions use the whole range of their 8-bit row numbers.

    y_c = conv(..)_c;  phi(y_c)      ->      u_c = conv(..)_c / s_c;  phi(s_c * u_c)

An integer convolution hands over 8 bits with one step for all channels, so the channel of the widest range takes most rows and
the others few. A positive factor for each channel costs nothing in the convolution, whose weights have a scale for each channel
anyway; in the expansion behind it is absorbed by the tables. Factors are powers of the square root of 2, so that a handful of
different tables does for all channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from kancompile.convolutions import ConvContraction
from kancompile.modules import Branch, Expansion
from kancompile.passes.trace_readers import is_max_pooling, node_of, single_table_behind
from kancompile.program import Program

_STEPS = 6
"""Factors 1, 2^-1/2, ... 2^-(steps - 1)/2: a range narrower than a sixth does not need more rows than that gives it."""
_SAMPLES = 64
_INSIDE = 0.9999
_VALUES = 1 << 16


@dataclass(frozen=True)
class EqualizeChannels:
    """Equalise the outputs of every float convolution that one expansion alone reads; the second run changes nothing."""

    name = "equalize-channels"

    def __call__(self, program: Program, x: Tensor) -> Program:
        """Return the program with equalised channels, equal to the given one up to rounding.

        Args:
            program: a captured program.
            x: calibration inputs ``[n, *input_shape]``.
        """
        readers = {}
        for layer in program.layers():
            reader = _reader(program, layer.contraction)
            if reader is not None:
                readers[layer.contraction] = reader
        if not readers:
            return program
        traced = program.trace(x[:: max(1, len(x) // _SAMPLES)][:_SAMPLES], readers)
        modules: dict[str, nn.Module] = {}
        notes = []
        for target, reader in readers.items():
            factor = channel_factors(traced[target][1])
            if bool((factor == 1).all()):
                continue
            contraction, expansion = program.module(target), program.module(reader)
            assert isinstance(contraction, ConvContraction)
            assert isinstance(expansion, Expansion)
            modules[target] = _divided(contraction, factor)
            # an expansion stands in front of one convolution and behind another: it may have been exchanged already
            modules[reader] = _multiplied(expansion, factor)
            sizes, counts = factor.unique(return_counts=True)
            classes = ", ".join(f"{n} x {size:.3g}" for size, n in zip(sizes.tolist(), counts.tolist(), strict=True))
            notes.append(f"layer {contraction.layer!r}: channels equalised ({classes})")
        return program.replace_modules(modules, notes) if modules else program


def channel_factors(y: Tensor) -> Tensor:
    """Choose the factor of every channel of ``y`` ``[n, c, *spatial]``: its range beside the widest, rounded up, ``[c]``."""
    flat = y.transpose(0, 1).flatten(1)
    flat = flat[:, :: max(1, flat.shape[1] // _VALUES)]
    cut = int((1 - _INSIDE) * flat.shape[1])
    values = flat.sort(dim=1).values
    low, high = values[:, cut].clamp(max=0), values[:, -1 - cut].clamp(min=0)
    # row 0 to the last have to hold the lowest and the highest of all channels
    share = torch.maximum(low / low.min().clamp(max=-1e-30), high / high.max().clamp(min=1e-30))
    steps = torch.floor(-2 * torch.log2(share.clamp(min=1e-6)) + 1e-4).clamp(0, _STEPS - 1)
    return torch.pow(2.0, -steps.double() / 2).float()


def _reader(program: Program, target: str) -> str | None:
    """Name the expansion that alone reads a convolution, directly or pooled."""
    if not isinstance(program.module(target), ConvContraction):
        return None
    reader = single_table_behind(program, target)
    expansion = program.module(reader) if reader is not None else None
    if reader is None or not isinstance(expansion, Expansion) or not expansion.channels_first:
        return None
    if expansion.is_identity:  # it needs no table as it is
        return None
    source = node_of(program, reader).all_input_nodes[0]
    while source.op == "call_function" and is_max_pooling(source):
        source = source.all_input_nodes[0]
    return reader if source.op == "call_module" and source.target == target else None


def _divided(contraction: ConvContraction, factor: Tensor) -> ConvContraction:
    return ConvContraction(
        contraction.layer,
        contraction.weight / factor.reshape(-1, *[1] * (contraction.weight.dim() - 1)),
        contraction.bias / factor,
        contraction.geometry,
        contraction.out_shape,
        contraction.zero_point,
        contraction.output,
    )


def _multiplied(expansion: Expansion, factor: Tensor) -> Expansion:
    gain = factor.reshape(-1, *[1] * (len(expansion.anchor_shape) - 1))
    branches = [_with_gain(branch, gain) for branch in expansion.branches]  # type: ignore[arg-type]
    return Expansion(expansion.anchor_shape, branches, expansion.channels_first)


def _with_gain(branch: Branch, gain: Tensor) -> Branch:
    graph = fx.Graph()
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("x"), graph.get_attr("gain")))
    root: dict[str, Tensor | nn.Module] = {"gain": gain}
    if branch.region is not None:
        root["region"] = branch.region
        scaled = graph.call_module("region", (scaled,))
    graph.output(scaled)
    return Branch(branch.name, fx.GraphModule(root, graph), branch.position)
