"""Parts of generated networks for tokens, sequences and images, and the networks themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.fuzzing.networks.parts import Spec, built, need, normal, part

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def powers(x: Tensor) -> list[Tensor]:
    """Powers of a squashed input."""
    u = torch.tanh(x)
    return [u, u * u, u * u * u]


CHANNELS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "powers": powers,
    "gauss": lambda x: [torch.exp(-((x - c) ** 2)) for c in (-1.0, 0.0, 1.0)],
    "constant": lambda x: [torch.ones_like(x), torch.tanh(x), 2 * torch.tanh(x) ** 2 - 1],
    "silu": lambda x: [functional.silu(x)],
    "hats": lambda x: [torch.relu(1 - (x - c).abs()) for c in (-1.0, -0.5, 0.0, 0.5, 1.0)],
    "none": lambda x: [x],
}


@part("conv")
class Conv(nn.Module):
    """A convolution of functions of its channels; of the channels themselves with ``none``."""

    def __init__(
        self, shape: tuple[int, ...], generator: torch.Generator, _: list[Spec], n_out: int, basis: str, kernel: int = 3,
        stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1, by_feature: bool = False, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        dims, n_in = len(shape) - 1, shape[0]
        need(dims in CONVOLUTIONS and n_in % groups == 0 and n_out % groups == 0)
        self.basis, self.by_feature, self.convolution = CHANNELS[basis], by_feature or groups > 1, CONVOLUTIONS[dims]
        self.moves = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        columns = n_in * len(self.basis(torch.zeros(1))) // groups
        self.weight = nn.Parameter(
            normal(generator, n_out, columns, *[kernel] * dims) / (columns * kernel**dims) ** 0.5
        )
        self.bias = nn.Parameter(normal(generator, n_out)) if bias else None
        seen = dilation * (kernel - 1) + 1
        need(all(size + 2 * padding >= seen for size in shape[1:]))
        self.shape = (n_out, *((size + 2 * padding - seen) // stride + 1 for size in shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        values = self.basis(x)
        channels = torch.stack(values, dim=2).flatten(1, 2) if self.by_feature else torch.cat(values, dim=1)
        return self.convolution(channels, self.weight, self.bias, **self.moves)


@part("zoo conv")
class ZooConv(nn.Module):
    """A convolution of the examples."""

    def __init__(
        self, shape: tuple[int, ...], generator: torch.Generator, _: list[Spec], family: str, n_out: int, padding: int
    ) -> None:
        super().__init__()
        need(len(shape) == 3 and min(shape[1:]) + 2 * padding >= 3)
        from examples.zoo import kagn_conv, spline_conv

        layer = kagn_conv.KAGNConv2d if family == "kagn" else spline_conv.SplineConv2d
        self.layer = layer(shape[0], n_out, 3, generator, padding=padding)
        self.shape = (n_out, *(size + 2 * padding - 2 for size in shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@part("pool")
class Pool(nn.Module):
    """Pooling over windows or over everything."""

    def __init__(self, shape: tuple[int, ...], _: torch.Generator, __: list[Spec], how: str) -> None:
        super().__init__()
        dims = len(shape) - 1
        need(dims in (1, 2, 3) and min(shape[1:]) >= 2)
        kind = {
            "max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
            "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        }
        self.pool = kind[how][dims - 1](2) if how in kind else None
        self.shape = (shape[0], *(size // 2 for size in shape[1:])) if self.pool is not None else (shape[0],)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if self.pool is None else self.pool(x)


@part("last")
class ChannelsLast(nn.Module):
    """A part that reads and writes channels last, on all pixels alike."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator, inside: list[Spec]) -> None:
        super().__init__()
        need(len(shape) > 1 and len(inside) == 1)
        self.part = built(inside[0], (shape[0],), generator)
        need(len(self.part.shape) == 1)
        self.shape = (self.part.shape[0], *shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        moved = x.movedim(1, -1)
        y = self.part(moved.reshape(-1, moved.shape[-1]))
        return y.reshape(*moved.shape[:-1], y.shape[-1]).movedim(-1, 1)


@part("reshape")
class Reshape(nn.Module):
    """The same values in another shape: flat, as tokens, as an image, with two dimensions exchanged."""

    def __init__(self, shape: tuple[int, ...], _: torch.Generator, __: list[Spec], how: str) -> None:
        super().__init__()
        self.how, count = how, torch.Size(shape).numel()
        if how == "flat":
            self.shape: tuple[int, ...] = (count,)
        elif how == "transpose":
            need(len(shape) > 1)
            self.shape = (*shape[:-2], shape[-1], shape[-2])
        else:
            leading = {"tokens": (2,), "line": (1,), "image": (1, 2), "volume": (1, 2, 2)}[how]
            need(len(shape) == 1 and count % torch.Size(leading).numel() == 0)
            self.shape = (*leading, count // torch.Size(leading).numel())

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2) if self.how == "transpose" else x.reshape(len(x), *self.shape)


@part("tokens")
class OverTokens(nn.Module):
    """What mixes or takes together tokens: means, the first, positions, attention, a sum so far, a loop over time."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator, inside: list[Spec], how: str) -> None:
        super().__init__()
        need(len(shape) == 2)
        self.how, (self.count, n) = how, shape
        self.shape = (n,) if how in ("mean", "max", "first", "last", "loop") else shape
        self.constant = nn.Parameter(normal(generator, *shape) if how == "positions" else normal(generator, 1, n))
        if how == "class":
            self.shape = (self.count + 1, n)
        self.parts = nn.ModuleList()
        if how == "loop":
            need(len(inside) == 1)
            self.parts.append(built(inside[0], (2 * n,), generator))
            need(self.parts[0].shape == (n,))
        if how == "attention":
            self.qkv = nn.ParameterList(normal(generator, n, n) / n**0.5 for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        if how == "loop":
            state = torch.zeros_like(x[:, 0])
            for time in range(self.count):
                state = torch.tanh(self.parts[0](torch.cat([x[:, time], state], dim=1)))
            return state
        if how == "attention":
            query, key, value = (x @ weight for weight in self.qkv)
            return torch.softmax(query @ key.transpose(1, 2) / 2, dim=-1) @ value
        if how == "class":
            return torch.cat([self.constant.expand(len(x), 1, -1), x], dim=1)
        if how == "positions":
            return x + self.constant
        if how == "cumulative":
            return x.cumsum(1)
        if how == "max":
            return x.amax(1)
        return x.mean(1) if how == "mean" else x[:, 0] if how == "first" else x[:, -1]


class Network(nn.Module):
    """A trunk behind one input, and one or two heads.

    Args:
        spec: ``trunk`` and ``heads``, parts; ``shape`` of ``x``; ``second``: none, another float input or integer ids.
        seed: of all parameters.
    """

    def __init__(self, spec: dict, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.second, shape = spec["second"], tuple(spec["shape"])
        if self.second is not None:
            need(len(shape) == 1)
            self.side = nn.Parameter(normal(generator, 7 if self.second == "ids" else spec["second_size"], shape[0]))
        self.trunk = built(spec["trunk"], shape, generator)
        self.heads = nn.ModuleList(built(one, self.trunk.shape, generator) for one in spec["heads"])
        self.names = spec["names"]
        self.eval()

    def outputs(self, x: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        y = self.trunk(x)
        found = tuple(head(y) for head in self.heads) or (y,)
        if len(found) == 1:
            return found[0]
        return dict(zip("ab", found, strict=True)) if self.names else found

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        return self.outputs(x)


class NetworkOfTwo(Network):
    """The same behind two inputs."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:  # type: ignore[override]
        beside = self.side[t].mean(1) if self.second == "ids" else torch.tanh(t @ self.side)
        return self.outputs(x + beside)


def network(spec: dict, seed: int) -> Network:
    """Build what was drawn."""
    return Network(spec, seed) if spec["second"] is None else NetworkOfTwo(spec, seed)
