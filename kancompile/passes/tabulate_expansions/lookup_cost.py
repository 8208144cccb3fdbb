"""Measure what looking functions up, instead of computing them, costs at the output of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kancompile.ir import Contraction, Expansion, IndexQuantizer, PatchSampler, flat_weight, look_up, split_groups
from kancompile.passes.recently_used import RecentlyUsed
from kancompile.passes.tabulate_expansions.choose_index import MeasuresLookup, row_inputs, row_numbers
from kancompile.passes.tabulate_expansions.round_together import Patches, code_hessian
from kancompile.passes.tabulate_expansions.values import rounding_error

_MEASURED_ELEMENTS = 1 << 20


_MEASURED_ROWS = (256, 4096)


_KEPT_HESSIANS = 2  # up to 33 MB each


class ConvLookupCost(MeasuresLookup):
    """Measure what looking basis values up, instead of computing them, costs at the output of a convolution.

    The counterpart of :class:`LookupCost`, at a sample of output pixels.

    Attributes:
        x: calibration inputs ``[n, n_in, *spatial]``.
        group: number of the table of every input, int64 ``[n_in]``; all 0 where they share one.
        exact: basis values that the sampled output pixels see, ``[r, t, n_in, k]``; 0 outside the image.
    """

    def __init__(
        self, expansion: Expansion, contraction: Contraction, weight: Tensor, x: Tensor, group: Tensor
    ) -> None:
        super().__init__(x)
        self.expansion, self.group = expansion, group
        assert contraction.geometry is not None
        self.groups = contraction.groups
        self.weights = flat_weight(weight, self.groups)
        sampler = PatchSampler(contraction.geometry, contraction.kernel, expansion.in_shape[:-1])
        elements = sampler.taps * expansion.n_in * expansion.k
        rows = min(max(_MEASURED_ELEMENTS // elements, _MEASURED_ROWS[0]), _MEASURED_ROWS[1])
        image, position = sampler.draw(len(x), rows, torch.Generator().manual_seed(0))
        inside = torch.ones(len(x), *expansion.in_shape[:-1], 1, dtype=torch.bool)
        self.inside = sampler.take(inside, image, position, 0)[..., None]
        self.seen = sampler.take(x.movedim(1, -1), image, position, 0.0)
        self.exact = self._evaluate(self.seen) * self.inside
        self._hessians: RecentlyUsed[tuple[IndexQuantizer, tuple[int, ...]], Tensor] = RecentlyUsed(_KEPT_HESSIANS)

    def _measure(self, index: IndexQuantizer) -> float:
        rows = row_numbers(index, self.seen)
        if not bool(self.group.any()):
            looked_up = look_up(self.expansion.sample_shared(row_inputs(index, self.x)), rows)
        else:
            points = torch.stack(
                [row_inputs(index, self.x[:, self.group == number]) for number in range(int(self.group.max()) + 1)]
            )
            table = self.expansion.evaluate_inputs(points[self.group].T)  # [levels, n_in, k]
            looked_up = table[rows, torch.arange(table.shape[1])]
        errors = self._columns((looked_up - self.exact) * self.inside)
        products = [error @ weight.T for error, weight in zip(errors, self.weights, strict=True)]
        return float(torch.cat(products, dim=1).double().square().mean())

    def rounding_error(self, bits: int) -> float:
        """Estimate what 8-bit table codes and ``bits``-bit weights cost (see ``values.rounding_error``)."""
        pairs = list(zip(self._columns(self.exact), self.weights, strict=True))
        return sum(rounding_error(columns, weight, bits) for columns, weight in pairs) / self.groups

    def code_hessian(self, index: IndexQuantizer, functions: Tensor) -> Tensor:
        """Measure how errors of table values add up at the output (see ``round_together.code_hessian``)."""
        patches = Patches(self.seen, self.inside.squeeze(-1), tuple(self.weights), self.expansion.k)
        key = index, tuple(functions.tolist())
        return self._hessians.get(key, lambda: code_hessian(patches, index, functions))

    def _columns(self, values: Tensor) -> list[Tensor]:
        return split_groups(values.flatten(2), self.groups)

    def _evaluate(self, seen: Tensor) -> Tensor:
        """Evaluate the functions of ``[r, t, n_in]`` inputs, dealt out over the pixels of as few images as will do."""
        points = seen.flatten(0, 1)
        return self.expansion.evaluate_inputs(points).reshape(*seen.shape, -1)


class LookupCost(MeasuresLookup):
    """Measure what looking basis values up, instead of computing them, costs at a layer's output.

    Attributes:
        expansion: the float expansion.
        x: calibration inputs ``[n, *in_shape]``.
        weight: this expansion's columns of the contraction, ``[n_out, n_in * k]``.
        shared: whether all inputs have the same functions.
    """

    def __init__(self, expansion: Expansion, x: Tensor, weight: Tensor, shared: bool) -> None:
        super().__init__(x)
        self.expansion, self.weight, self.shared = expansion, weight, shared
        with torch.no_grad():
            self.exact = expansion(x.reshape(-1, *expansion.anchor_shape))

    def _measure(self, index: IndexQuantizer) -> float:
        rows = row_numbers(index, self.x)
        points = row_inputs(index, self.x) if self.shared else index.rows()
        if self.shared:
            looked_up = look_up(self.expansion.sample_shared(points), rows)
        else:
            table = self.expansion.sample(points).flatten(1, -2)  # [levels, inputs, k]
            looked_up = table[rows.flatten(1), torch.arange(table.shape[1])].reshape(self.exact.shape)
        error = (looked_up - self.exact).flatten(-2) @ self.weight.T
        return float(error.double().square().mean())
