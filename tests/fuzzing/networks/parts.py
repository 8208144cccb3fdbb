"""Parts that generated networks are made of: layers on the last dimension, and how layers are wired.

A part is built from its name, the shape of its input without the batch, and what was drawn; ``shape`` is that of its output.
What does not fit raises :class:`Unfit`. A failure's script holds this file, so it needs PyTorch and the examples alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Spec = list[Any]
"""Name, what was drawn, and the parts inside: ``["kan", {"n_out": 3}, []]``."""


class Unfit(Exception):
    """A part and the shape of its input do not fit."""


PARTS: dict[str, Callable[..., nn.Module]] = {}


def part(name: str) -> Callable[[Any], Any]:
    """Register a part by its name."""

    def registered(made: Any) -> Any:
        PARTS[name] = made
        return made

    return registered


def need(fits: bool) -> None:
    """Refuse a shape."""
    if not fits:
        raise Unfit


def built(spec: Spec, shape: tuple[int, ...], generator: torch.Generator) -> nn.Module:
    """Build a part for a shape."""
    name, drawn, inside = spec
    made = PARTS[name](shape, generator, inside, **drawn)
    need(all(size > 0 for size in made.shape) and torch.Size(made.shape).numel() <= 600)
    return made


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw from a generator, never from the global state."""
    return torch.randn(*shape, generator=generator)


def splines(x: Tensor, c: Tensor, order: int) -> Tensor:
    """B-splines on knots that are the centers and more behind them."""
    k = c.shape[-1]
    knots = torch.cat([c, c[..., -1:] + torch.arange(1, order + 2) * 0.6], dim=-1)
    values = ((x >= knots[..., :-1]) & (x < knots[..., 1:])).to(x.dtype)
    for p in range(1, order + 1):
        left = (x - knots[..., : -p - 1]) / (knots[..., p:-1] - knots[..., : -p - 1])
        right = (knots[..., p + 1 :] - x) / (knots[..., p + 1 :] - knots[..., 1:-p])
        values = left * values[..., :-1] + right * values[..., 1:]
    return values[..., :k]


def chebyshev(x: Tensor, c: Tensor) -> Tensor:
    """Polynomials by recurrence, the constant one first."""
    u = torch.tanh(x[..., 0])
    values = [torch.ones_like(u), u]
    while len(values) < c.shape[-1]:
        values.append(2 * u * values[-1] - values[-2])
    return torch.stack(values[: c.shape[-1]], dim=-1) + 0 * c


BASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gauss": lambda x, c: torch.exp(-((x - c) ** 2)),
    "sine": lambda x, c: torch.sin(x * (1.3 + c)),
    "powers": lambda x, c: x ** torch.arange(c.shape[-1]) + 0 * c,
    "chebyshev": chebyshev,
    "hat": lambda x, c: torch.relu(1 - (x - c).abs()),
    "cells": lambda x, c: torch.where((x >= c) & (x < c + 0.7), (x - c) ** 2, torch.zeros_like(x)),
    "steps": lambda x, c: (x > c).to(x.dtype),
    "rational": lambda x, c: (x - c) / (1 + (x * c) ** 2),
    "wavelet": lambda x, c: ((x - c) ** 2 - 1) * torch.exp(-0.5 * (x - c) ** 2),
    "order1": lambda x, c: splines(x, c, 1),
    "order3": lambda x, c: splines(x, c, 3),
    "switch": lambda x, c: 1 - torch.tanh((x - c) * 0.7) ** 2,
    "root": lambda x, c: torch.sigmoid(x - c).sqrt() + (x - c).abs().log1p(),
}
CONTRACTIONS = ("einsum", "linear", "edges", "sum", "loop", "bmm")


@part("kan")
class Kan(nn.Module):
    """Functions of every input and one linear map, written in one of several ways."""

    def __init__(
        self, shape: tuple[int, ...], generator: torch.Generator, _: list[Spec], n_out: int, k: int, basis: str,
        contraction: str = "linear", base: bool = False, own: bool = False, gain: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        need(len(shape) in (1, 2))
        n = shape[-1]
        self.shape, self.basis, self.contraction = (*shape[:-1], n_out), BASES[basis], contraction
        centers = torch.linspace(-1.5, 1.0, k) + (0.05 * normal(generator, n, k) if own else 0)
        self.centers = nn.Parameter(centers.sort(-1).values)
        self.weight = nn.Parameter(gain * normal(generator, n, k, n_out) / (n * k) ** 0.5)
        self.base = nn.Parameter(normal(generator, n, n_out)) if base else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        basis = self.basis(flat.unsqueeze(-1), self.centers)
        y = self.contracted(basis)
        if self.base is not None:
            y = y + functional.silu(flat) @ self.base
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def contracted(self, basis: Tensor) -> Tensor:
        n, k, n_out = self.weight.shape
        if self.contraction == "einsum":
            return torch.einsum("bnk,nko->bo", basis, self.weight)
        if self.contraction == "edges":
            return torch.einsum("bnk,nko->bno", basis, self.weight).sum(1)
        if self.contraction == "sum":
            return (basis.unsqueeze(-1) * self.weight).sum((1, 2))
        if self.contraction == "bmm":
            return torch.bmm(basis.transpose(0, 1), self.weight).sum(0)
        if self.contraction == "loop":
            return sum((basis[:, i] @ self.weight[i] for i in range(n)), torch.zeros(1, n_out))
        return basis.reshape(-1, n * k) @ self.weight.reshape(n * k, n_out)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "efficient": ("efficient_kan", {"grid_size": 3}),
    "efficient order 1": ("efficient_kan", {"grid_size": 4, "spline_order": 1}),
    "fast": ("fast_kan", {"num_grids": 4}),
    "faster": ("faster_kan", {"num_grids": 4}),
    "bsrbf": ("bsrbf_kan", {"grid_size": 3}),
    "chebyshev": ("chebyshev_kan", {"degree": 3}),
    "chebyshev clamped": ("chebyshev_kan", {"degree": 3, "squash": "clamp"}),
    "gram": ("gram_kan", {}),
    "jacobi": ("polynomial_kan", {"kind": "jacobi"}),
    "legendre": ("polynomial_kan", {"kind": "legendre"}),
    "hermite": ("polynomial_kan", {"kind": "hermite", "degree": 3}),
    "laguerre": ("polynomial_kan", {"kind": "laguerre", "degree": 3}),
    "fourier": ("fourier_kan", {"grid_size": 3}),
    "sine": ("sine_kan", {"grid_size": 4}),
    "relu": ("relu_kan", {"g": 3, "k": 2}),
    "rational": ("rational_kan", {"groups": 1}),
    "mexican hat": ("wav_kan", {}),
    "morlet": ("wav_kan", {"wavelet_type": "morlet", "initial_scale": 4.0}),
    "dog": ("wav_kan", {"wavelet_type": "dog"}),
}


@part("zoo")
class Zoo(nn.Module):
    """A network of a family of the examples."""

    def __init__(
        self, shape: tuple[int, ...], generator: torch.Generator, _: list[Spec], family: str, widths: list[int]
    ) -> None:
        super().__init__()
        need(len(shape) in (1, 2))
        module, options = FAMILIES[family]
        seed = int(torch.randint(1000, (1,), generator=generator))
        self.net = importlib.import_module(f"examples.zoo.{module}").build([shape[-1], *widths], **options, seed=seed)
        self.shape = (*shape[:-1], widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])


@part("linear")
class Linear(nn.Module):
    """An ordinary layer."""

    def __init__(
        self, shape: tuple[int, ...], generator: torch.Generator, _: list[Spec], n_out: int, bias: bool = True
    ) -> None:
        super().__init__()
        need(len(shape) in (1, 2))
        self.shape = (*shape[:-1], n_out)
        self.weight = nn.Parameter(normal(generator, n_out, shape[-1]) / shape[-1] ** 0.5)
        self.bias = nn.Parameter(normal(generator, n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@part("norm")
class Norm(nn.Module):
    """A normalisation with statistics and factors that are not those of a new one."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator, _: list[Spec], kind: str) -> None:
        super().__init__()
        n = shape[-1] if kind in ("layer", "rms") else shape[0]
        need(n > 1 if kind in ("layer", "rms") else len(shape) in (1, 3, 4) or (len(shape) == 2 and kind == "batch"))
        batch = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
        self.shape, self.kind = shape, kind
        self.norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": batch}[kind](n)
        with torch.no_grad():
            self.norm.weight.copy_(1 + 0.2 * normal(generator, n))
            if kind == "batch":
                self.norm.running_mean.copy_(0.3 * normal(generator, n))
                self.norm.running_var.copy_(normal(generator, n).square() + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu, "abs": torch.abs,
    "square": lambda x: x * x, "clamp": lambda x: x.clamp(-0.5, 0.75), "floor": lambda x: (3 * x).floor(),
    "sign": torch.sign, "jump": lambda x: torch.where(x > 0.25, x, x - 2), "round": lambda x: (4 * x).round() / 4,
    "rational": lambda x: x / (1 + x.abs()), "leaky": functional.leaky_relu, "exp": lambda x: torch.exp(-x * x),
    "softmax": lambda x: torch.softmax(x, dim=-1), "mean": lambda x: x - x.mean(-1, keepdim=True), "sin": torch.sin,
    "remainder": lambda x: torch.remainder(x, 1.0), "zero": lambda x: x * 0.0, "negative": lambda x: -x,
    "above": lambda x: (x > 0).to(x.dtype),
}  # fmt: skip


@part("pointwise")
class Pointwise(nn.Module):
    """A function without parameters."""

    def __init__(self, shape: tuple[int, ...], _: torch.Generator, __: list[Spec], function: str) -> None:
        super().__init__()
        self.shape, self.function = shape, POINTWISE[function]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@part("affine")
class Affine(nn.Module):
    """A factor and an offset, for all inputs or for each, and never much more of it than float32 holds."""

    def __init__(
        self, shape: tuple[int, ...], generator: torch.Generator, _: list[Spec], factor: float, offset: float, own: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape = shape
        vary = 1 + 0.2 * normal(generator, *shape) if own else torch.ones(1)
        self.register_buffer("factor", factor * vary)
        self.register_buffer("offset", offset * vary)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.offset) * self.factor


@part("chain")
class Chain(nn.Module):
    """Parts one behind the other, by plain names or by ones that no source code could hold."""

    def __init__(
        self, shape: tuple[int, ...], generator: torch.Generator, inside: list[Spec], odd_names: bool = False
    ) -> None:
        super().__init__()
        self.names = []
        for number, spec in enumerate(inside):
            made = built(spec, shape, generator)
            self.names.append(f"it's \"{number}\"\n\\'class {{}} \u00e9" if odd_names else f"part{number}")
            self.add_module(self.names[-1], made)
            shape = made.shape
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


@part("join")
class Join(nn.Module):
    """Parts that read the same input, joined in one of several ways."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator, inside: list[Spec], how: str) -> None:
        super().__init__()
        self.how, self.parts = how, nn.ModuleList(built(spec, shape, generator) for spec in inside)
        shapes = [made.shape for made in self.parts] + ([shape] if how in ("residual", "gate", "dense") else [])
        need(len({len(one) for one in shapes}) == 1)
        self.dim = 1 if len(shapes[0]) > 2 else -1
        if how in ("cat", "dense"):
            axis = 0 if self.dim == 1 else -1
            rest = {one[1:] if axis == 0 else one[:-1] for one in shapes}
            need(len(rest) == 1)
            joined = list(shapes[0])
            joined[axis] = sum(one[axis] for one in shapes)
            self.shape = tuple(joined)
        else:
            need(len(set(shapes)) == 1)
            self.shape = shapes[0]

    def forward(self, x: Tensor) -> Tensor:
        values = [made(x) for made in self.parts]
        if self.how in ("residual", "gate", "dense"):
            values.append(x)
        if self.how in ("cat", "dense"):
            return torch.cat(values, dim=self.dim)
        y = values[0]
        for value in values[1:]:
            y = y * torch.sigmoid(value) if self.how == "gate" else y * value if self.how == "product" else y + value
        return y


@part("again")
class Again(nn.Module):
    """One part used several times: in a row, on the same input, or on either half of it."""

    def __init__(
        self, shape: tuple[int, ...], generator: torch.Generator, inside: list[Spec], how: str, times: int = 2
    ) -> None:
        super().__init__()
        need(len(shape) in (1, 2) and len(inside) == 1)
        self.how, self.times = how, times
        if how == "halves":
            need(shape[-1] % 2 == 0)
            self.part = built(inside[0], (*shape[:-1], shape[-1] // 2), generator)
            self.shape = (*self.part.shape[:-1], 2 * self.part.shape[-1])
        else:
            self.part = built(inside[0], shape, generator)
            need(how == "same" or self.part.shape == shape)
            self.shape = self.part.shape
        need(len(self.shape) == len(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "halves":
            left, right = x.chunk(2, dim=-1)
            return torch.cat([self.part(left), self.part(right)], dim=-1)
        if self.how == "same":
            return self.part(x) + 0.5 * self.part(x)
        for _ in range(self.times):
            x = self.part(x)
        return x


@part("select")
class Select(nn.Module):
    """Some of the inputs, in another order, with a constant beside them or alone."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator, _: list[Spec], how: str) -> None:
        super().__init__()
        n = shape[-1]
        self.how = how
        self.register_buffer("order", torch.randperm(n, generator=generator))
        self.register_buffer("constant", normal(generator, 1))
        sizes = {
            "permute": n,
            "flip": n,
            "first": (n + 1) // 2,
            "constant": n + 1,
            "twice": 2 * n,
            "every": (n + 1) // 2,
        }
        self.shape = (*shape[:-1], sizes[how])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "permute":
            return x[..., self.order]
        if self.how == "flip":
            return x.flip(-1)
        if self.how == "constant":
            return torch.cat([x, self.constant.expand(*x.shape[:-1], 1)], dim=-1)
        if self.how == "twice":
            return torch.cat([x, x], dim=-1)
        return x[..., : self.shape[-1]] if self.how == "first" else x[..., ::2]
