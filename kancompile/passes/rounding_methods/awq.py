"""Choose how much of its code range every table column uses, so that one weight scale fits all columns better.

Lin et al., *AWQ* (2023), section 3.2, search a scale for every input channel, ``s = magnitude^ratio``, multiply the weights
by it and divide the activations. A KAN folds that into its tables for nothing, but a uint8 table column that is always
stretched to 0 ... 255 undoes it. So the scale is defined as what it does to codes:

    column c uses the fraction s_c of its range, q'_c = round(s_c q_c);   its weights become V_c / s_c.

Weights of columns with a small ``s`` grow, and the step between their levels shrinks to ``scale * s_c`` in old units. What
it costs is the table: rounding to a step of ``1 / s_c`` codes adds the variance ``(1 / s_c^2 - 1) / 12`` to the column,
and with it ``V_hat_c^2`` times that to the output. Both belong to the error that is minimised.

Two families of candidates, 20 ratios each: AWQ's, by the spread of the features (``s ~ spread^-ratio``), and by the size of the
weights (``s ~ size^ratio``, ratio 1 makes all columns equally large), which AWQ does not need because channels of a linear
layer are alike, while a SiLU column and a spline column of one KAN input differ by a factor of 40. Where few columns
of a table are shared by all inputs, each is then varied by itself.

The error of a candidate is that of GPTQ (of nearest rounding, where that is the inner method) on the rescaled layer.
Rescaling turns ``H = R R^T`` into ``(s R) (s R)^T``, so all candidates share one factorization, and together they are one
wider rounding problem with steps ``scale * s_c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kancompile.errors import KanCompileError
from kancompile.passes.rounding_methods.gptq import Gptq, ordered_hessian, round_columns
from kancompile.passes.rounding_methods.polish import quadratic_error
from kancompile.passes.rounding_methods.problem import Method, Rounded, RoundingProblem, on_fine_table, rescaled
from kancompile.passes.rounding_methods.quantizers import code_range, quantize, search_scale
from kancompile.passes.rounding_methods.uniform import Uniform

_STACKED_ELEMENTS = 1 << 23
_VARIED_TIES = 32


@dataclass(frozen=True)
class Awq:
    """Search column scales, then round the rescaled layer by another method (whose scale search is AWQ's clip search).

    Attributes:
        inner: the method that rounds.
        ratios: number of exponents tried in each family.
        smallest: least fraction of its code range that a column keeps.
        rounds: passes over single table columns after the families; 0 leaves them out.
        damping, device: as in :class:`~kancompile.passes.rounding_methods.gptq.Gptq`.
    """

    inner: Method = field(default_factory=Gptq)
    ratios: int = 20
    smallest: float = 1 / 64
    rounds: int = 1
    damping: float = 0.01
    device: str = "cpu"

    @property
    def compensates(self) -> bool:
        """Whether the method that rounds the scaled weights does."""
        return self.inner.compensates

    @property
    def quick_columns(self) -> float:
        """Fewer than the method that rounds, since its search takes many products."""
        return min(2048, self.inner.quick_columns)

    def __call__(self, problem: RoundingProblem, generator: torch.Generator) -> Rounded:
        """Round ``problem.weight``; the result says which ``column_scale`` the table must take on."""
        column_scale = search_column_scales(problem, self)
        if bool((column_scale == 1).all()):
            rounded = self.inner(problem, generator)
            note = "table columns keep their full code range, no column scale was better"
            return replace(rounded, notes=(*rounded.notes, note))
        coarse = rescaled(problem, column_scale)
        rounded = self.inner(coarse, generator)
        note = (
            f"table columns use {float(column_scale.min()):.3g} to {float(column_scale.max()):.3g} of their code range"
        )
        return on_fine_table(problem, coarse, replace(rounded, notes=(*rounded.notes, note)), column_scale)


def search_column_scales(problem: RoundingProblem, options: Awq | None = None) -> Tensor:
    """Find the fraction of its code range that every table column should use.

    Args:
        problem: the layer; columns with equal ``tied_columns`` get equal scales.
        options: number of candidates and bounds.

    Returns:
        float32 ``[c]`` in ]0, 1], all ones where nothing was better.

    Raises:
        KanCompileError: the problem does not say which columns may be rescaled.
    """
    if problem.tied_columns is None:
        raise KanCompileError(
            f"layer {problem.layer!r}: method 'awq' rescales table columns, but the tables of this layer are final; "
            "say which columns are tied, or choose method 'gptq'"
        )
    options = options or Awq()
    if not float(problem.column_moments[1].max()):
        return torch.ones(problem.c)
    search = _Search(problem, options)
    ties, n_ties = search.ties, search.n_ties
    ones = torch.ones(n_ties)
    exponents = torch.arange(1, options.ratios + 1) / options.ratios
    families = [search.spread[None] ** -exponents[:, None], search.size[None] ** exponents[:, None]]
    candidates = torch.cat([ones[None], *families])
    best, least = search.best(candidates)
    if n_ties <= _VARIED_TIES:
        for _ in range(options.rounds):
            for tie in range(n_ties):
                varied = best.repeat(4, 1)
                varied[:, tie] *= torch.tensor([0.5, 0.71, 1.41, 2.0])
                found, loss = search.best(varied)
                if loss < least:
                    best, least = found, loss
    return best[ties]


class _Search:
    """The layer in the order of GPTQ, ready to rate column scales (one for each tie)."""

    def __init__(self, problem: RoundingProblem, options: Awq) -> None:
        self.problem, self.options = problem, options
        moments = problem.second_moments(options.device)
        assert problem.tied_columns is not None
        _, self.ties = torch.unique(problem.tied_columns, return_inverse=True)
        self.n_ties = int(self.ties.max()) + 1
        self.hessian, self.columns = ordered_hessian(problem, moments, options.damping, True, options.device)
        self.variance = moments.variance.float() + self.hessian.damping
        live_ties = self.ties[moments.live]
        self.spread = self._magnitude(moments.variance[moments.live], live_ties)
        self.size = self._magnitude(problem.weight[:, moments.live].double().square().mean(0), live_ties)

    def _magnitude(self, squares: Tensor, ties: Tensor) -> Tensor:
        """Return the root mean square of each tie relative to their median; 1 for ties without a live column."""
        total = torch.zeros(self.n_ties, dtype=torch.float64).index_add_(0, ties, squares)
        count = torch.zeros(self.n_ties, dtype=torch.float64).index_add_(0, ties, torch.ones_like(squares))
        magnitude = (total / count.clamp(min=1)).sqrt()
        known = magnitude[magnitude > 0]
        if not len(known):
            return torch.ones(self.n_ties)
        return torch.where(magnitude > 0, magnitude / known.median(), 1.0).float()

    def best(self, candidates: Tensor) -> tuple[Tensor, float]:
        """Return the best of some scales ``[candidates, ties]``, brought into range, and its error."""
        candidates = candidates / candidates.amax(1, keepdim=True)
        candidates = candidates.clamp(min=self.options.smallest)
        at_once = max(1, _STACKED_ELEMENTS // (self.problem.n_out * len(self.columns)))
        errors = torch.cat([self._errors(part) for part in torch.split(candidates, at_once)])
        winner = int(errors.argmin())
        return candidates[winner], float(errors[winner])

    def _errors(self, candidates: Sequence[Tensor] | Tensor) -> Tensor:
        problem, device = self.problem, self.options.device
        low, high = code_range(problem.bits)
        group = problem.group_of_column[self.columns]
        steps = []
        for candidate in candidates:
            s = candidate[self.ties]
            scale = search_scale(
                problem.weight / s, problem.bits, problem.group_sizes, "hessian", self.variance * s.square()
            )
            steps.append(scale[group] * s[self.columns, None])
        step = torch.cat(steps, dim=1).to(device)
        weight = problem.weight[:, self.columns].T.contiguous().to(device).repeat(1, len(steps))
        if isinstance(self.options.inner, Uniform):
            rounded = quantize(weight, step, low, high) * step
        else:
            rounded = round_columns(weight, self.hessian.packed, step, low, high) * step
        loss = quadratic_error(self.hessian, weight - rounded).view(len(steps), -1).sum(1)
        coarse = torch.stack([(1 / s[self.ties[self.columns]].square() - 1) / 12 for s in candidates]).to(device)
        table = torch.einsum("mko,km->k", rounded.view(len(self.columns), len(steps), -1).square(), coarse)
        return (loss + table.double()).cpu()
