"""Weights that give the float outputs on the features that a layer really gets, found before they are rounded.

Below the first layer, features ``q`` come from a program whose earlier layers are rounded, and in every layer they are codes of
tables. What a layer is to give all the same are the outputs ``y`` of the float program. With ``r = y - V q - b`` what is
missing, ``H = Cov(q)`` and ``lambda`` 1 % of the mean diagonal of ``H``,

    V* = V + alpha Cov(r, q) (H + lambda I)^-1,       b* = b + E[r] - (V* - V) E[q].

As ``y = V phi + b`` with the float features ``phi``, ``Cov(r, q)`` is ``V (G - H)`` with ``G = Cov(phi, q)``: Li et al., *GPTAQ*
(2025), and Zhang et al., *Qronos* (2026). No float features are needed here, so that tables of other functions than those of the
float program (mixed, reduced, joint ones) are made up for alike.

Some samples fit ``V*``, others choose ``alpha`` from :data:`LADDER`, and others again say what that wins. ``alpha = 0`` leaves
weights and bias as they are.

Shapes: ``n`` rows, ``c`` columns, ``n_out`` outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kancompile.passes.rounding_methods.problem import FeatureSource, column_moments, live_columns, second_moments
from kancompile.processes import sum_over_chunks

LADDER = (0.25, 0.5, 0.75, 1.0)
"""Shares of the full change that are tried, beside none at all."""
FOLDS = 5
"""Equal parts of the samples: three fit, one chooses, one reports."""
_DAMPING = 0.01
_CLEARLY = 2.0
"""Standard errors by which a share has to be better than none."""
_CHUNK = 1024


@dataclass(frozen=True)
class DriftRows:
    """What a layer, or one channel group of a convolution, reads, and what its outputs lack.

    Attributes:
        features: codes ``[n, c]`` of any type.
        missing: float32 ``[n, n_out]``: ``r``, float outputs less those of the layer's float weights on ``features``.
        sample: int64 ``[n]``: which sample a row belongs to.
    """

    features: Tensor
    missing: Tensor
    sample: Tensor

    def where(self, chosen: Tensor) -> DriftRows:
        """Pick rows by a mask ``[n]``."""
        return DriftRows(self.features[chosen], self.missing[chosen], self.sample[chosen])


@dataclass(frozen=True)
class Change:
    """What weights and bias gain: ``y* = (V + weight) q + b + bias``.

    Attributes:
        weight: float32 ``[n_out, c]``, 0 in columns that do not vary.
        mean: float32 ``[c]``, ``E[q]``.
        gap: float32 ``[n_out]``, ``E[r]``.
    """

    weight: Tensor
    mean: Tensor
    gap: Tensor

    @property
    def bias(self) -> Tensor:
        """What the bias gains, float32 ``[n_out]``."""
        return (self.gap.double() - self.weight.double() @ self.mean.double()).float()

    def times(self, share: float) -> Change:
        """Change the weights less, and still take out the mean."""
        return Change(self.weight * share, self.mean, self.gap)

    def moves(self, features: Tensor) -> Tensor:
        """By how much outputs move beside their mean, ``[n, n_out]``."""
        return torch.cat([(part.float() - self.mean) @ self.weight.T for part in features.split(_CHUNK)])


def full_change(rows: DriftRows, layer: str, damping: float = _DAMPING) -> Change:
    """Solve for ``alpha = 1``; with fewer rows than columns as ``R^T (Q Q^T + n lambda I)^-1 Q``, which is the same matrix."""
    source, n = FeatureSource.from_tensor(rows.features, _CHUNK), len(rows.features)
    gap = rows.missing.double().mean(0)
    missing = rows.missing - gap.float()
    change = torch.zeros(missing.shape[1], source.c)
    if n <= source.c:
        mean, variance = column_moments(source, layer)
        live = live_columns(variance)
    else:
        moments = second_moments(source, layer)
        mean, variance, live = moments.mean, moments.variance, moments.live
    centered = (part[:, live].float() - mean[live].float() for part in source)
    ridge = damping * n * float(variance[live].sum()) / max(1, len(live))
    if len(live) and n <= source.c:
        values = torch.cat(list(centered))
        gram = (values @ values.T).double()
        gram.diagonal().add_(ridge)
        change[:, live] = torch.cholesky_solve(missing.double(), torch.linalg.cholesky(gram)).float().T @ values
    elif len(live):
        hessian = moments.covariance.double() * n
        hessian.diagonal().add_(ridge)
        chunks = zip(centered, missing.split(_CHUNK), strict=True)
        (products,) = sum_over_chunks(chunks, lambda chunk: (chunk[0].T @ chunk[1],))
        change[:, live] = torch.cholesky_solve(products, torch.linalg.cholesky(hessian)).float().T
    return Change(change, mean.float(), gap.float())


@dataclass(frozen=True)
class MadeUp:
    """What makes up for drift.

    Attributes:
        alpha: share of the full change, 0 where none is clearly better on the samples that choose.
        changes: one for each channel group; none where ``alpha`` is 0.
        before, after: mean squared errors of the outputs on the samples that report, weights not yet rounded.
    """

    alpha: float
    changes: tuple[Change, ...]
    before: float
    after: float


def make_up(groups: Sequence[DriftRows], fold_of_sample: Tensor, layer: str) -> MadeUp | None:
    """Choose how much of the drift of a layer its weights are to make up for.

    Args:
        groups: rows of every channel group, of the same samples.
        fold_of_sample: int64: samples of folds 0 to 2 fit, of 3 choose, of 4 report.
        layer: for errors.

    Returns:
        what the weights gain; ``None`` where there are too few samples to say.
    """

    def of(*folds: int) -> list[DriftRows]:
        return [rows.where(torch.isin(fold_of_sample[rows.sample], torch.tensor(folds))) for rows in groups]

    choosing, reporting = of(3), of(4)
    if min(len(rows[0].sample.unique()) for rows in (choosing, reporting)) < 2:
        return None
    alpha = _best_share([full_change(rows, layer) for rows in of(0, 1, 2)], choosing)
    before = float(_errors(reporting).mean())
    if alpha == 0:
        return MadeUp(0.0, (), before, before)
    changes = [full_change(rows, layer).times(alpha) for rows in of(0, 1, 2, 3)]
    return MadeUp(alpha, tuple(changes), before, float(_errors(reporting, changes).mean()))


def _best_share(changes: Sequence[Change], choosing: Sequence[DriftRows]) -> float:
    without = _errors(choosing)
    best, least = 0.0, math.inf
    for share in LADDER:
        won = without - _errors(choosing, [change.times(share) for change in changes])
        clear = float(won.mean()) > _CLEARLY * float(won.std()) / math.sqrt(len(won))
        if clear and -float(won.mean()) < least:
            best, least = share, -float(won.mean())
    return best


def _errors(groups: Sequence[DriftRows], changes: Sequence[Change] | None = None) -> Tensor:
    """Measure the squared error of the outputs of every sample, mean over its rows and all outputs, float64 ``[samples]``."""
    total = torch.zeros(len(groups[0].sample), dtype=torch.float64)
    for number, rows in enumerate(groups):
        left = rows.missing
        if changes is not None:
            left = left - changes[number].gap - changes[number].moves(rows.features)
        total += left.double().square().sum(1)
    which = groups[0].sample.unique(return_inverse=True)[1]
    count = torch.bincount(which)
    sums = torch.zeros(len(count), dtype=torch.float64).index_add_(0, which, total)
    return sums / count / sum(rows.missing.shape[1] for rows in groups)
