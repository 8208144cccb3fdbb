"""KANs and near-KANs written in unusual ways; their forms are those seen in public code, the code is the tests' own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.frontend.capturing import draw


class ReinterpretingReshape(nn.Module):
    """Products of two ReLU ramps, ``[b, n, k]`` reshaped (not transposed) to an image and contracted by a convolution."""

    def __init__(self, n_in: int = 4, n_out: int = 3, k: int = 5) -> None:
        super().__init__()
        centers = torch.linspace(-1, 1, k) + 0.05 * draw(n_in, k, seed=1)
        self.low, self.high = nn.Parameter(centers - 0.7), nn.Parameter(centers + 0.7)
        self.conv = nn.Conv2d(1, n_out, (k, n_in))
        self.k, self.n_in = k, n_in

    def forward(self, x: Tensor) -> Tensor:
        ramps = torch.relu(x.unsqueeze(2) - self.low) * torch.relu(self.high - x.unsqueeze(2))
        image = (ramps * ramps * 4).reshape((len(x), 1, self.k, self.n_in))
        return self.conv(image).reshape((len(x), -1))


class DegreeMajor(nn.Module):
    """Powers joined degree after degree: column ``k * n + i``."""

    def __init__(self, n_in: int = 4, n_out: int = 3, k: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in * k, n_out)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        u = torch.tanh(x)
        return self.linear(torch.cat([u ** (power + 1) for power in range(self.k)], dim=1))


class TransposedFeatures(nn.Module):
    """Features in front of the batch while the basis is evaluated."""

    def __init__(self, n_in: int = 4, n_out: int = 3, k: int = 4) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(-1, 1, k))
        self.weight = nn.Parameter(draw(n_in, k, n_out, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-((x.t().unsqueeze(-1) - self.centers) ** 2))  # [n, b, k]
        return torch.einsum("nbk,nko->bo", basis, self.weight)


class BasisFirst(nn.Module):
    """An einsum whose basis dimension comes first, over two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(draw(3, 4, 5, seed=3))
        self.second = nn.Parameter(draw(3, 5, 2, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.first, self.second):
            basis = torch.stack([torch.sin((k + 1) * x) for k in range(3)])  # [k, b, n]
            x = torch.einsum("kbn,kno->bo", basis, weight)
        return x


class FilledInPlace(nn.Module):
    """A recurrence that fills the basis in place and an output that is filled column by column."""

    def __init__(self, n_in: int = 4, n_out: int = 3, degree: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(n_out, n_in, degree, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        u = torch.tanh(x)
        n_out, _, degree = self.weight.shape
        basis = torch.ones(x.shape[0], x.shape[1], degree)
        basis[:, :, 1] = u
        for k in range(2, degree):
            basis[:, :, k] = 2 * u * basis[:, :, k - 1].clone() - basis[:, :, k - 2].clone()
        y = torch.zeros(x.shape[0], n_out)
        for o in range(n_out):
            y[:, o] = (basis * self.weight[o]).sum((1, 2))
        return y


class PerFeatureSnake(nn.Module):
    """``x + sin(a x)^2 / a`` with a frequency of its own for each input, then a linear layer."""

    def __init__(self, n_in: int = 4, n_out: int = 3) -> None:
        super().__init__()
        self.frequency = nn.Parameter(1 + 0.3 * draw(n_in, seed=6))
        self.linear = nn.Linear(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + torch.sin(self.frequency * x) ** 2 / self.frequency)


class SharedRational(nn.Module):
    """One learnable rational activation for all inputs."""

    def __init__(self, n_in: int = 4, n_out: int = 3) -> None:
        super().__init__()
        self.numerator = nn.Parameter(draw(4, seed=7))
        self.denominator = nn.Parameter(draw(2, seed=8))
        self.linear = nn.Linear(n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.numerator, self.denominator.abs()
        top = a[0] + x * (a[1] + x * (a[2] + x * a[3]))
        return self.linear(top / (1 + b[0] * x.abs() + b[1] * x * x))


class PerEdge(nn.Module):
    """A wavelet with scale and shift of its own on each edge: no common basis."""

    def __init__(self, n_in: int = 4, n_out: int = 3) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.2 * draw(n_out, n_in, seed=9))
        self.shift = nn.Parameter(0.3 * draw(n_out, n_in, seed=10))
        self.weight = nn.Parameter(draw(n_out, n_in, seed=11))
        self.norm = nn.BatchNorm1d(n_out)
        self.norm.running_mean = draw(n_out, seed=12)
        self.norm.running_var = draw(n_out, seed=13).square() + 0.5

    def forward(self, x: Tensor) -> Tensor:
        t = (x.unsqueeze(1) - self.shift) / self.scale
        wavelet = (t * t - 1) * torch.exp(-0.5 * t * t)
        return self.norm((self.weight * wavelet).sum(2))


class TableKAN(nn.Module):
    """Functions looked up in tables of values with linear interpolation."""

    def __init__(self, n_in: int = 4, n_out: int = 3, rows: int = 9) -> None:
        super().__init__()
        self.values = nn.Parameter(draw(n_in, rows, n_out, seed=14))
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        place = (x + 2) / 4 * (self.rows - 1)
        left = place.floor().clamp(0, self.rows - 2)
        share = (place - left).unsqueeze(-1)
        feature = torch.arange(x.shape[1])
        low = self.values[feature, left.long()]
        high = self.values[feature, left.long() + 1]
        return torch.lerp(low, high, share).sum(1)


class Residual(nn.Module):
    """Two KAN blocks with skip connections."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.first, self.second = DegreeMajor(n, n), DegreeMajor(n, n)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class ZeroBranch(nn.Module):
    """A spline-like branch, an identity branch with zero weights, and a function whose weights are zero."""

    def __init__(self, n_in: int = 4, n_out: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(n_out, n_in, 4, seed=15))
        self.register_buffer("mask", torch.tensor([1.0, 1.0, 0.0, 1.0]))
        self.register_buffer("symbolic", torch.zeros(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.stack([torch.sigmoid(x - k) for k in range(4)], dim=-1)
        edges = (basis.unsqueeze(1) * (self.weight * self.mask)).sum(-1) + x.unsqueeze(1) * self.symbolic
        return edges.sum(-1)


class RepeatedFunctions(nn.Module):
    """The same functions twice, in two branches."""

    def __init__(self, n_in: int = 4, n_out: int = 3) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2 * n_in, n_out), nn.Linear(2 * n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.stack([torch.sin(x), torch.cos(x)], dim=-1).flatten(1)
        again = torch.cat([torch.cos(x), torch.sin(x)], dim=-1)
        return self.one(once) + self.two(again)


class TwoInputsMultiplied(nn.Module):
    """A KAN layer whose outputs are multiplied in pairs, then another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = DegreeMajor(4, 4), DegreeMajor(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h[:, :2] * h[:, 2:])


class MinMaxOverBatch(nn.Module):
    """Scaling by the extremes of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = DegreeMajor(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.min(), x.max()
        return self.kan(2 * (x - low) / (high - low) - 1)


class CenteredOverBatch(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = DegreeMajor(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.kan(x - x.mean(0))


class BranchOnData(nn.Module):
    """A Python choice that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = DegreeMajor(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the error has to name
            x = -x
        return self.kan(x)


class Grouped(nn.Module):
    """Two halves of the features with a layer each, joined, and a layer on top."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.top = DegreeMajor(3, 2), DegreeMajor(3, 2), DegreeMajor(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.cat([self.left(x[:, :3]), self.right(x[:, 3:])], dim=1))


class GroupedRational(nn.Module):
    """A rational function for each group of channels, tokens first, then a linear layer."""

    def __init__(self, channels: int = 8, groups: int = 4, n_out: int = 3) -> None:
        super().__init__()
        self.numerator = nn.Parameter(draw(6, seed=21))
        self.denominator = nn.Parameter(draw(groups, 4, seed=22))
        self.linear = nn.Linear(channels, n_out)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        grouped = x.reshape(batch, tokens, len(self.denominator), -1)
        top = sum(self.numerator[power] * grouped**power for power in range(6))
        bottom = 1 + sum(self.denominator[:, p, None].abs() * grouped.abs() ** (p + 1) for p in range(4))
        return self.linear((top / bottom).reshape(batch, tokens, channels))


class TransformerBlock(nn.Module):
    """Class token, positions, attention, a KAN for every token with a skip connection, a KAN on the class token."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.token = nn.Parameter(draw(1, 1, width, seed=23))
        self.position = nn.Parameter(draw(1, 6, width, seed=24))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp, self.head = TokenKAN(width, width), DegreeMajor(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        query, key, value = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        x = x + torch.softmax(query @ key.transpose(1, 2) / 3, dim=-1) @ value
        x = x + self.mlp(self.norms[1](x))
        return self.head(x[:, 0])


class TokenKAN(nn.Module):
    """Sines of three frequencies, the last dimension contracted."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(n_out, n_in, 3, seed=25))

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.sin(x.unsqueeze(-1) * torch.tensor([1.0, 2.0, 3.0]))
        return torch.einsum("...ik,oik->...o", basis, self.weight)


class LocalSpline(nn.Module):
    """Finds the interval of each input, gathers the weights of three local functions and adds up edge by edge."""

    def __init__(self, n_in: int = 4, n_out: int = 3, knots: int = 6) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-2, 2, knots))
        self.weight = nn.Parameter(draw(knots + 2, n_in, n_out, seed=26))

    def forward(self, x: Tensor) -> Tensor:
        interval = torch.searchsorted(self.knots, x.clamp(-1.99, 1.99).contiguous()) - 1
        u = x - self.knots[interval]
        rows = interval.unsqueeze(-1) + torch.arange(3)
        weight = self.weight[rows, torch.arange(x.shape[1])[None, :, None]]  # [b, n, 3, o]
        basis = torch.stack([1 - u, u, u * u], dim=-1)
        return (weight * basis.unsqueeze(-1)).sum((1, 2))


class SoftmaxBasis(nn.Module):
    """Basis functions that compete: a softmax over the functions of one input."""

    def __init__(self, n_in: int = 4, n_out: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.stack([torch.sin(x), torch.cos(2 * x), x], dim=-1)
        return self.linear(torch.softmax(scores, dim=-1).flatten(1))


class BagOfRows(nn.Module):
    """Linear interpolation in one table of all inputs, written as a bag of two weighted rows for each input."""

    def __init__(self, n_in: int = 4, n_out: int = 3, rows: int = 6, ragged: bool = False) -> None:
        super().__init__()
        self.rows, self.ragged = rows, ragged
        self.table = nn.Parameter(draw(n_in * rows, n_out, seed=27))
        self.register_buffer("first", torch.arange(n_in) * rows)

    def forward(self, x: Tensor) -> Tensor:
        place = (x.clamp(-2, 2) + 2) / 4 * (self.rows - 1)
        left = place.floor().clamp(max=self.rows - 2)
        indices = torch.cat([left, left + 1], dim=1).long() + self.first.repeat(2)
        weights = torch.cat([1 - place + left, place - left], dim=1)
        if not self.ragged:
            return functional.embedding_bag(indices, self.table, mode="sum", per_sample_weights=weights)
        offsets = torch.arange(x.shape[0]) * indices.shape[1] - torch.arange(x.shape[0]).clamp(max=1)
        return functional.embedding_bag(
            indices.flatten(), self.table, offsets, mode="sum", per_sample_weights=weights.flatten()
        )
