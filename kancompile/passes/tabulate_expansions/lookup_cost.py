"""Measure what looking functions up, instead of computing them, costs at the output of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.ir import (
    Contraction,
    Expansion,
    IndexQuantizer,
    PatchSampler,
    flat_weight,
    look_up,
    split_groups,
)
from kancompile.passes.recently_used import RecentlyUsed
from kancompile.passes.tabulate_expansions.choose_index import (
    MeasuresLookup,
    row_inputs,
    row_inputs_of_groups,
    row_numbers,
)
from kancompile.passes.tabulate_expansions.round_together import Patches, code_hessian
from kancompile.passes.tabulate_expansions.values import PRIOR, rounding_error

_MEASURED_ELEMENTS = 1 << 20
_MEASURED_ROWS = (256, 4096)
_LINEAR_ELEMENTS = 1 << 24
_KEPT_HESSIANS = 2  # up to 33 MB each


class LookupCost(MeasuresLookup):
    """Measure what looking basis values up, instead of computing them, costs at a layer's output.

    An output is a product of weights and of what it sees: one row for each sample and place, or for a sample of the output
    pixels of a convolution (``kancompile.ir.geometry``). Shapes: ``r`` rows, ``t`` taps.

    Attributes:
        x: calibration inputs ``[n, ...]``, as the expansion reads them.
        group: number of the table of every input, int64 ``[n_in]``; all 0 where they share one.
        exact: basis values that the outputs see, ``[r, t, n_in, k]``; 0 outside an image.
    """

    def __init__(
        self, expansion: Expansion, contraction: Contraction, weight: Tensor, x: Tensor, group: Tensor
    ) -> None:
        """Take ``weight``, this expansion's columns of the contraction, ``[n_out, n_in / groups * k, *kernel]``."""
        super().__init__(x)
        self.expansion, self.group, self.groups = expansion, group, contraction.groups
        self.weights = flat_weight(weight, self.groups)
        self.seen, self.inside = rows_seen(expansion, contraction, expansion.inputs_last(x))
        points = self.seen.flatten(0, 1)
        self.exact = expansion.evaluate_inputs(points).reshape(*self.seen.shape, -1)
        if contraction.pads:
            self.exact = self.exact * self.inside
        self.pads = contraction.pads
        self._hessians: RecentlyUsed[tuple[IndexQuantizer, tuple[int, ...]], Tensor] = RecentlyUsed(_KEPT_HESSIANS)

    def _measure(self, index: IndexQuantizer) -> float:
        rows = row_numbers(index, self.seen)
        if not bool(self.group.any()):
            looked_up = look_up(self.expansion.sample_shared(row_inputs(index, self.x)), rows)
        else:
            points = row_inputs_of_groups(index, self.expansion.inputs_last(self.x), self.group, PRIOR)
            table = self.expansion.evaluate_inputs(points[self.group].T)  # [levels, n_in, k]
            looked_up = table[rows, torch.arange(table.shape[1])]
        error = looked_up - self.exact
        errors = self._columns(error * self.inside if self.pads else error)
        products = [error @ weight.T for error, weight in zip(errors, self.weights, strict=True)]
        return float(torch.cat(products, dim=1).double().square().mean())

    def rounding_error(self, bits: int, largest_code: int = 255) -> float:
        """Estimate what table codes and ``bits``-bit weights cost (see ``values.rounding_error``)."""
        pairs = list(zip(self._columns(self.exact), self.weights, strict=True))
        return sum(rounding_error(columns, weight, bits, largest_code) for columns, weight in pairs) / self.groups

    def variance(self) -> Tensor:
        """Measure the variance of the functions of every input over what the outputs see, ``[n_in, k]``."""
        return self.exact.flatten(0, 1).var(0, correction=0)

    def code_hessian(self, index: IndexQuantizer, functions: Tensor) -> Tensor:
        """Measure how errors of table values add up at the output (see ``round_together.code_hessian``)."""
        patches = Patches(self.seen, self.inside.squeeze(-1), tuple(self.weights), self.expansion.k)
        key = index, tuple(functions.tolist())
        return self._hessians.get(key, lambda: code_hessian(patches, index, functions))

    def _columns(self, values: Tensor) -> list[Tensor]:
        return split_groups(values.flatten(2), self.groups)


def rows_seen(expansion: Expansion, contraction: Contraction, x: Tensor) -> tuple[Tensor, Tensor]:
    """Collect the inputs that outputs see, ``[r, t, n_in]``, and whether they lie inside an image, bool ``[r, t, 1, 1]``.

    Args:
        expansion: what reads the inputs.
        contraction: of the layer.
        x: the inputs, ``[n, *, n_in]``.
    """
    if contraction.geometry is None:
        seen = x.reshape(-1, 1, expansion.n_in)
        most = max(_MEASURED_ROWS[1], _LINEAR_ELEMENTS // (expansion.n_in * expansion.k))
        if len(seen) > most:
            seen = seen[torch.linspace(0, len(seen) - 1, most).long()]
        return seen, torch.ones(len(seen), 1, 1, 1, dtype=torch.bool)
    sampler = PatchSampler(contraction.geometry, contraction.kernel, tuple(x.shape[1:-1]))
    elements = sampler.taps * expansion.n_in * expansion.k
    rows = min(max(_MEASURED_ELEMENTS // elements, _MEASURED_ROWS[0]), _MEASURED_ROWS[1])
    image, position = sampler.draw(len(x), rows, torch.Generator().manual_seed(0))
    inside = torch.ones(*x.shape[:-1], 1, dtype=torch.bool)
    return sampler.take(x, image, position, 0.0), sampler.take(inside, image, position, 0)[..., None]
