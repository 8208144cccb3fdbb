"""Fit the weights of a convolution's fewer functions to its float output, at a sample of its output pixels.

What a pixel sees is a row of columns: functions of a channel at a tap, and where the convolution pads whether each tap lies
inside the image. Three images of four fit and the fourth judges (``fit`` says how): as they are, and with
values moved towards others, since calibration does not see everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.ir import Contraction, Expansion, PatchSampler, flat_weight, split_groups
from kancompile.passes.reduce_functions.fit import Fitted, LeastSquares
from kancompile.passes.reduce_functions.look_up_time import MOST_COLUMNS
from kancompile.passes.reduce_functions.mixtures import Functions

_ROWS, _ELEMENTS = 8192, 1 << 24
_JUDGES = 4  # one image in so many judges, and does not fit
_LEAST_IMAGES = 8  # with fewer, pixels of the same images judge


@dataclass(frozen=True)
class Windows:
    """What sampled output pixels of a convolution see: ``r`` rows, ``t`` taps.

    Attributes:
        values: of its functions, float32 ``[r, t, n_in, k]``, 0 outside an image.
        inside: whether a tap lies inside the image, bool ``[r, t, 1]``.
        output: float32 ``[r, n_out]``.
        judges: which rows judge, bool ``[r]``.
        parts: rows of every part of the samples.
        powers: variance of the output in every part, the mean over outputs.
    """

    values: Tensor
    inside: Tensor
    output: Tensor
    judges: Tensor
    parts: tuple[int, ...]
    powers: tuple[float, ...]

    @classmethod
    def of(cls, expansion: Expansion, contraction: Contraction, parts: Sequence[Tensor]) -> Windows:
        """Sample parts of the inputs, ``[n, n_in, *spatial]`` each."""
        assert contraction.geometry is not None
        sampler = PatchSampler(contraction.geometry, contraction.kernel, tuple(parts[0].shape[2:]))
        rows = max(1, min(_ROWS, _ELEMENTS // (sampler.taps * expansion.n_in * expansion.k)))
        image, position = sampler.draw(len(parts[0]), rows, torch.Generator().manual_seed(0))
        values, insides = [], []
        for x in map(expansion.inputs_last, parts):
            seen = sampler.take(x, image, position, 0.0)
            inside = sampler.take(torch.ones(*x.shape[:-1], 1, dtype=torch.bool), image, position, 0)
            phi = expansion.evaluate_inputs(seen.flatten(0, 1)).reshape(*seen.shape, -1)
            values.append(phi * inside[..., None])
            insides.append(inside)
        columns = split_groups(torch.cat(values).flatten(2), contraction.groups)
        products = [column @ weight.T for column, weight in zip(columns, contraction.flat_weight(), strict=True)]
        output = torch.cat(products, dim=1) + contraction.bias
        by = image if len(parts[0]) >= _LEAST_IMAGES else torch.arange(len(image))
        powers = tuple(float(part.double().var(0, correction=0).mean()) for part in output.split(len(image)))
        judges = (by % _JUDGES == 0).repeat(len(parts))
        return cls(torch.cat(values), torch.cat(insides), output, judges, (len(image),) * len(parts), powers)

    def fit(self, functions: Functions, contraction: Contraction) -> tuple[Contraction, float]:
        """Fit the weights of mixtures.

        Returns:
            the convolution, and the largest share of a part's variance that is lost on rows that did not fit it.
        """
        groups, rank = contraction.groups, functions.weight.shape[2]
        mixed = functions.region.of(self.values) * self.inside[..., None]
        columns = split_groups(mixed.flatten(2), groups)
        given = flat_weight(functions.weight.float(), groups)
        if contraction.pads:
            columns = [torch.cat([part, self.inside[..., 0].float()], dim=1) for part in columns]
            constants = flat_weight(functions.constant.sum(1).float(), groups)
            given = [torch.cat(pair, dim=1) for pair in zip(given, constants, strict=True)]
        fits = ~self.judges
        error, fitted = [], list[Fitted]()
        for part, weight, output in zip(columns, given, self.output.chunk(groups, dim=1), strict=True):
            error.append(_solved(part[fits], output[fits], weight)(part) - output)
            fitted.append(_solved(part, output, weight))
        squares = torch.cat(error, dim=1).double().square().mean(1)
        lost = [
            float(part[judges].mean()) / power
            for part, judges, power in zip(
                squares.split(self.parts), self.judges.split(self.parts), self.powers, strict=True
            )
        ]
        weight = torch.cat([one.weight for one in fitted])
        taps = self.inside.shape[1]
        of_functions = weight[:, : weight.shape[1] - taps * contraction.pads].reshape(len(weight), -1, rank, taps)
        if contraction.pads:
            # channels keep constants of their own, as those of others have small weights
            missing = weight[:, -taps:] - functions.constant.sum(1).float()
            constant = functions.constant.float() + missing[:, None] / functions.constant.shape[1]
            of_functions = torch.cat([of_functions, constant[:, :, None]], dim=2)
        shape = len(weight), -1, *contraction.kernel
        bias = torch.cat([one.bias for one in fitted])
        return contraction.with_weight(of_functions.flatten(1, 2).reshape(shape).contiguous(), bias), max(lost)


def _solved(columns: Tensor, output: Tensor, given: Tensor) -> Fitted:
    """Fit columns ``[r, c]``; too many of them keep the weights given, and the bias alone is fitted."""
    if given.shape[1] <= MOST_COLUMNS:
        return LeastSquares(columns, output, given).solve()
    return Fitted(given, output.double().mean(0).float() - given @ columns.double().mean(0).float())
