"""Make up for what rounding before a layer did to it, by the weights that give the float program's outputs on its features.

    y = V q + b     ->     y = V* q + b*          (see ``rounding_methods.drift``)

Rows are those that the weights will be rounded on: the same samples, and of a convolution the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import Contraction, Layer, Program, Values
from kancompile.passes.round_weights.rows import CHUNK, Pixels, drawn_pixels
from kancompile.passes.rounding_methods import FOLDS, DriftRows, FeatureSource, MadeUp, RoundingProblem, make_up
from kancompile.processes import dealt

_LEAST_ROWS, _ROWS_FOR_A_COLUMN, _MANY_COLUMNS = 8192, 6, 8192
_CHUNK_BYTES, _KEPT_BYTES = 1 << 28, 1 << 29


@dataclass(frozen=True)
class Rows:
    """Which rows of a layer are used, sample by sample, and what the float program gives there.

    Attributes:
        drawn: bool, which of the rows that the layer is rounded on: ``[samples, rows]`` of a linear layer, else ``[pixels]``.
        sample: int64 ``[n]``.
        outputs: float32 ``[n, n_out]``.
    """

    drawn: Tensor
    sample: Tensor
    outputs: Tensor


class FloatOutputs:
    """The outputs of the float program, which the layers of the rounded one are to give.

    The float program is evaluated once for as many of the layers to come as half a gigabyte holds outputs of.
    """

    def __init__(
        self, exact: Program, tabulated: Program, layers: Mapping[Layer, torch.Generator], x: Values, seed: int
    ) -> None:
        """Take what is asked for later.

        Args:
            exact: in float; its layers have the names that they have in the rounded one.
            tabulated: the program before rounding.
            layers: that are to make up for drift, in the order in which they are rounded, each with a generator equal to the
                one that draws the pixels of its problems.
            x: calibration inputs ``[n, *input_shape]``.
            seed: of the folds, and of the rows that are picked where there are more than needed.
        """
        self.exact, self.tabulated, self.x, self.seed = exact, tabulated, x, seed
        self.waiting = dict(layers)
        self.kept: dict[str, Rows] = {}

    def make_up(
        self, contraction: Contraction, layer: Layer, problems: Sequence[RoundingProblem]
    ) -> tuple[Contraction, str]:
        """Change the weights of a layer, and say in a line of the report by how much.

        Args:
            contraction: of the layer, in float, on table codes.
            layer: the layer.
            problems: its rounding problems, with earlier layers rounded: one, or one for each channel group.
        """
        if layer.name not in self.kept:
            self._collect()
        given, groups, bias = self.kept.pop(layer.name), len(problems), contraction.bias
        features = [_picked(problem.features, layer, given.drawn) for problem in problems]
        parts = zip(
            features, given.outputs.chunk(groups, 1), contraction.flat_weight(), bias.chunk(groups), strict=True
        )
        rows = [
            DriftRows(codes, exact - some - _times(codes, weight), given.sample) for codes, exact, weight, some in parts
        ]
        folds = torch.randperm(len(self.x), generator=self._generator()) % FOLDS
        found = make_up(rows, folds, layer.name)
        if found is None or not found.changes:
            return contraction, _note(layer, found)
        change = torch.stack([change.weight for change in found.changes]).reshape(contraction.weight.shape)
        bias = bias + torch.cat([change.bias for change in found.changes])
        return contraction.with_weight(contraction.weight + change, bias), _note(layer, found)

    def _collect(self) -> None:
        """Evaluate the float program for the next layers."""
        pixels: dict[Layer, Pixels] = {}
        drawn: dict[Layer, Tensor] = {}
        total = 0
        while self.waiting and total < _KEPT_BYTES:
            layer = next(iter(self.waiting))
            generator, contraction = self.waiting.pop(layer), self.tabulated.contraction(layer)
            found = drawn_pixels(self.tabulated, layer, self.x, generator)
            if found is None:
                among = torch.empty(len(self.x), len(contraction.by_output(self._trace(self.x[:1], [layer])[layer])))
            else:
                pixels[layer], among = found, torch.empty(len(found.image))
            share = _most_rows(contraction.products) / among.numel()
            drawn[layer] = among.uniform_(generator=self._generator()) < share
            total += 4 * int(drawn[layer].sum()) * contraction.n_out
        size = self._chunk()

        def outputs(start: int) -> tuple[Tensor, ...]:
            stop, found = min(start + size, len(self.x)), []
            traced = self._trace(self.x[start:stop], list(drawn))
            for layer, mask in drawn.items():
                y = traced[layer]
                if layer in pixels:
                    image, position = pixels[layer].image[mask], pixels[layer].position[mask]
                    here = (image >= start * layer.uses) & (image < stop * layer.uses)
                    local = image[here] % layer.uses * (stop - start) + image[here] // layer.uses - start
                    found.append(y.flatten(2)[local, :, position[here]])
                else:
                    rows = _by_sample(self.tabulated.contraction(layer).by_output(y), layer, stop - start)
                    found.append(rows[mask[start:stop]])
            return tuple(found)

        parts = zip(*dealt(range(0, len(self.x), size), outputs), strict=True)
        for (layer, mask), rows in zip(drawn.items(), parts, strict=True):
            sample = pixels[layer].image[mask] // layer.uses if layer in pixels else mask.nonzero()[:, 0]
            self.kept[layer.name] = Rows(mask, sample, torch.cat(rows))

    def _chunk(self) -> int:
        """Samples whose float features of the largest layer take a quarter of a gigabyte."""
        layers = self.exact.layers()
        sizes = [
            4 * layer.uses * sum(math.prod(one.in_shape) * one.k for one in self.exact.expansions(layer))
            for layer in layers
        ]
        return max(1, min(CHUNK, _CHUNK_BYTES // max(sizes)))

    def _trace(self, x: Values, layers: Sequence[Layer]) -> dict[Layer, Tensor]:
        traced = self.exact.trace(x, [layer.contraction for layer in layers])
        return {layer: traced[layer.contraction][1] for layer in layers}

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _by_sample(rows: Tensor, layer: Layer, samples: int) -> Tensor:
    """Bring rows, those of one use behind those of another, into the order of samples: ``[samples, rows, *]``."""
    return rows.reshape(layer.uses, samples, -1, rows.shape[1]).movedim(0, 1).flatten(1, 2)


def _picked(source: FeatureSource, layer: Layer, drawn: Tensor) -> Tensor:
    """Pick rows ``[n, c]`` of a layer's features; those of pixels are in the order of samples already."""
    found, start = [], 0
    for chunk in source:
        if drawn.ndim == 1:
            found.append(chunk[drawn[start : start + len(chunk)]])
            start += len(chunk)
        else:
            samples = len(chunk) // drawn.shape[1]
            found.append(_by_sample(chunk, layer, samples)[drawn[start : start + samples]])
            start += samples
    return torch.cat(found)


def _most_rows(columns: int) -> int:
    """Rows that are used at most; with many columns a system of as many equations as rows is solved."""
    return _LEAST_ROWS if columns > _MANY_COLUMNS else max(2 * _LEAST_ROWS, _ROWS_FOR_A_COLUMN * columns)


def _times(features: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([part.float() @ weight.T for part in features.split(CHUNK)])


def _note(layer: Layer, found: MadeUp | None) -> str:
    who = f"layer {layer.name!r}: weights"
    if found is None:
        return f"{who} not adjusted to the errors of earlier layers (drift): too few calibration samples to fit and to judge"
    if not found.changes:
        return f"{who} not adjusted to the errors of earlier layers (drift): not clearly better on held-out samples"
    return (
        f"{who} adjusted to the errors of earlier layers (drift, alpha {found.alpha:g}): mean squared output error before "
        f"rounding {found.before:.4g} -> {found.after:.4g} on held-out samples"
    )
