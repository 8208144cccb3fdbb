"""KANs that compute only the basis functions that live where an input lies, and near-KANs whose index mixes inputs.

The forms are those seen in public code, the code is the tests' own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.frontend.capturing import draw

CUBIC = torch.tensor([[1.0, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]]) / 6
"""Powers of the place in its interval to the four cubic B-splines that live there."""


class LocalBasis(nn.Module):
    """A grid on ``[-2, 2]`` and the weights ``[n_in, functions, n_out]`` of its basis functions."""

    def __init__(self, functions: int, intervals: int, n_in: int = 4, n_out: int = 3) -> None:
        super().__init__()
        self.n_in, self.n_out, self.functions, self.intervals = n_in, n_out, functions, intervals
        self.weight = nn.Parameter(draw(n_in, functions, n_out, seed=31))

    def place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the interval of each input, int64, and where in it the input lies; outside the outer ones go on."""
        place = (x + 2) * (self.intervals / 4)
        interval = place.floor().long().clamp(0, self.intervals - 1)
        return interval, place - interval

    def cubic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Number the four cubic B-splines that live at each input and give their values, both ``[b, n_in, 4]``."""
        interval, u = self.place(x.clamp(-2, 2))
        powers = torch.stack([torch.ones_like(u), u, u * u, u * u * u], dim=-1)
        return interval.unsqueeze(-1) + torch.arange(4), powers @ CUBIC


class GatheredLine(LocalBasis):
    """Linear interpolation between two values of each edge, by ``torch.gather`` along the knots."""

    def __init__(self) -> None:
        super().__init__(functions=9, intervals=8)

    def forward(self, x: Tensor) -> Tensor:
        left, share = self.place(x)
        table = self.weight.unsqueeze(0).expand(x.shape[0], -1, -1, -1)
        rows = left[:, :, None, None].expand(-1, -1, 1, self.n_out)
        low, high = table.gather(2, rows), table.gather(2, rows + 1)
        return torch.lerp(low, high, share[:, :, None, None]).sum((1, 2))


class GatheredCubic(LocalBasis):
    """Four cubic B-splines and the weights gathered for them, contracted by one einsum over inputs and functions."""

    def __init__(self, contraction: str = "bik,biko->bo") -> None:
        super().__init__(functions=11, intervals=8)
        self.contraction = contraction

    def forward(self, x: Tensor) -> Tensor:
        number, basis = self.cubic(x)
        weight = self.weight[torch.arange(self.n_in)[:, None], number]
        first = self.contraction.partition(",")[0]
        return torch.einsum(self.contraction, torch.einsum(f"bik->{first}", basis), weight)


class SlicedWeights(LocalBasis):
    """Weights ``[n_out, n_in * functions]`` taken as columns, by an index of the second dimension only."""

    def __init__(self) -> None:
        super().__init__(functions=11, intervals=8)

    def forward(self, x: Tensor) -> Tensor:
        number, basis = self.cubic(x)
        column = number + self.functions * torch.arange(self.n_in)[:, None]
        weight = self.weight.permute(2, 0, 1).flatten(1)[:, column]  # [o, b, n_in, 4]
        return (weight * basis).sum((2, 3)).t()


class TakenRows(LocalBasis):
    """Rows taken by ``index_select`` with the indices of the whole batch in one dimension."""

    def __init__(self) -> None:
        super().__init__(functions=11, intervals=8)

    def forward(self, x: Tensor) -> Tensor:
        number, basis = self.cubic(x)
        row = number + self.functions * torch.arange(self.n_in)[:, None]
        weight = self.weight.flatten(0, 1).index_select(0, row.flatten()).view(*row.shape, self.n_out)
        return (weight * basis.unsqueeze(-1)).sum((1, 2))


class UnevenKnots(LocalBasis):
    """Linear interpolation on knots of each input's own, found by ``searchsorted``; constant outside."""

    def __init__(self) -> None:
        super().__init__(functions=7, intervals=6)
        self.register_buffer("knots", torch.sort(2 * draw(4, 7, seed=32)).values)

    def forward(self, x: Tensor) -> Tensor:
        right = torch.searchsorted(self.knots, x.t().contiguous()).clamp(1, 6)  # [n_in, b]
        low, high = self.knots.gather(1, right - 1), self.knots.gather(1, right)
        share = ((x.t() - low) / (high - low)).clamp(0, 1).unsqueeze(-1)
        feature = torch.arange(self.n_in)[:, None]
        return (self.weight[feature, right - 1] * (1 - share) + self.weight[feature, right] * share).sum(0)


class OneHotBucket(LocalBasis):
    """Piecewise constant: the one-hot vector of each input's bucket times weights."""

    def __init__(self) -> None:
        super().__init__(functions=6, intervals=6)
        self.register_buffer("edges", torch.tensor([-1.5, -0.75, 0.0, 0.5, 1.25]))

    def forward(self, x: Tensor) -> Tensor:
        bucket = functional.one_hot(torch.bucketize(x, self.edges), self.functions)
        return torch.einsum("bik,iko->bo", bucket.float(), self.weight)


class ScatteredBasis(LocalBasis):
    """Live values put into the row of all basis functions, by ``scatter``, ``scatter_add`` or a write in place."""

    def __init__(self, how: str = "scatter") -> None:
        super().__init__(functions=11, intervals=8)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        number, basis = self.cubic(x)
        row = basis.new_zeros(*x.shape, self.functions)
        if self.how == "index_put":
            sample, feature = torch.arange(x.shape[0])[:, None, None], torch.arange(self.n_in)[:, None]
            row = row.index_put((sample, feature, number), basis, accumulate=True)
        elif self.how == "one by one":
            sample, feature = torch.arange(x.shape[0])[:, None], torch.arange(self.n_in)
            for k in range(4):
                row[sample, feature, number[..., k]] = basis[..., k]
        elif self.how == "scatter_reduce":
            row = row.scatter_reduce(2, number, basis, "sum", include_self=False)
        else:
            row = getattr(row, self.how)(2, number, basis)
        return row.flatten(1) @ self.weight.flatten(0, 1)


class FlatIndexAdd(LocalBasis):
    """Live values added into one long vector of all basis functions of all inputs of the batch.

    Only the clamp of the interval says that an input reaches no functions of another one. With one interval too many the
    last one does, though no input of a small example lies in it.
    """

    def __init__(self, spare: int = 0) -> None:
        super().__init__(functions=11, intervals=8)
        self.spare = spare

    def forward(self, x: Tensor) -> Tensor:
        _, basis = self.cubic(x)
        interval = ((x + 2) * 2).floor().long().clamp(0, self.intervals - 1 + self.spare)
        first = torch.arange(x.shape[0] * self.n_in).view(-1, self.n_in) * self.functions
        places = (first + interval).unsqueeze(-1) + torch.arange(4)
        row = basis.new_zeros(x.shape[0] * self.n_in * self.functions + self.spare)
        row = row.index_add(0, places.flatten(), basis.flatten())
        return row[: x.shape[0] * self.n_in * self.functions].view(x.shape[0], -1) @ self.weight.flatten(0, 1)


class NearestCenters(LocalBasis):
    """Weights of the two nearest centers, by their distances, put into the row of all centers."""

    def __init__(self) -> None:
        super().__init__(functions=5, intervals=4)
        self.register_buffer("centers", torch.linspace(-2, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        distance, number = (x.unsqueeze(-1) - self.centers).abs().topk(2, largest=False)
        row = distance.new_zeros(*x.shape, self.functions).scatter(-1, number, 1 / (1 + distance**2))
        return row.flatten(1) @ self.weight.flatten(0, 1)


class MaskedEnds(LocalBasis):
    """Gathered values that a mask sets to a constant outside of the grid."""

    def __init__(self) -> None:
        super().__init__(functions=8, intervals=8)

    def forward(self, x: Tensor) -> Tensor:
        interval, u = self.place(x)
        value = self.weight[torch.arange(self.n_in), interval] * (1 - u).unsqueeze(-1)
        value[(x < -2) | (x > 2)] = 0.25
        return value.sum(1)


class IntervalOfTwo(LocalBasis):
    """The interval is the sum of those of two inputs, so that no function is one of a single input."""

    def __init__(self, gathered: bool = True) -> None:
        super().__init__(functions=11, intervals=8)
        self.gathered = gathered

    def forward(self, x: Tensor) -> Tensor:
        number, basis = self.cubic(x)
        number = (number + number.roll(1, 1)).clamp(max=self.functions - 1)
        if self.gathered:
            return (self.weight[torch.arange(self.n_in)[:, None], number] * basis.unsqueeze(-1)).sum((1, 2))
        row = basis.new_zeros(*x.shape, self.functions).scatter_add(2, number, basis)
        return row.flatten(1) @ self.weight.flatten(0, 1)


class ScatteredByAnother(LocalBasis):
    """Live values of one input put where another one points."""

    def __init__(self) -> None:
        super().__init__(functions=11, intervals=8)

    def forward(self, x: Tensor) -> Tensor:
        number, basis = self.cubic(x)
        row = basis.new_zeros(*x.shape, self.functions).scatter_add(2, number.roll(1, 1), basis)
        return row.flatten(1) @ self.weight.flatten(0, 1)


class PickedInput(LocalBasis):
    """Reads the second input unless the first one is large, which it never is on a small example."""

    def __init__(self) -> None:
        super().__init__(functions=3, intervals=2)

    def forward(self, x: Tensor) -> Tensor:
        which = (x[:, :1] > 100).long()
        return torch.sin(x[:, 1:].gather(1, which)) * self.weight[0, 0]


class UnclampedIndex(LocalBasis):
    """Linear interpolation between gathered values on ``[-8, 8]``; the model itself fails beyond."""

    def __init__(self) -> None:
        super().__init__(functions=9, intervals=8)

    def forward(self, x: Tensor) -> Tensor:
        place = (x + 8) / 2
        left = place.floor().long()
        feature = torch.arange(self.n_in)
        low, high = self.weight[feature, left], self.weight[feature, left + 1]
        return torch.lerp(low, high, (place - left).unsqueeze(-1)).sum(1)
