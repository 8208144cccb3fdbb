"""Networks of the kinds that people build around KAN layers, each in a small form."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.field_layers import ChebyshevKan, GaussianKan, LocalSplineKan
from examples.zoo.efficient_kan import KANLinear

KanMaker = Callable[[int, int], nn.Module]
"""Makes a KAN layer from the widths of its input and output."""


class GraphKan(nn.Module):
    """Two rounds of messages, and a head on the mean over nodes.

    Takes node features ``[b, nodes, n_in]`` and a row-normalised adjacency ``[b, nodes, nodes]``, gives logits ``[b, 10]``.
    """

    def __init__(self, n_in: int = 6, width: int = 24) -> None:
        super().__init__()
        self.first, self.second = GaussianKan(2 * n_in, width), GaussianKan(width, width)
        self.head = GaussianKan(width, 10)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        h = self.first(torch.cat([nodes, torch.bmm(adjacency, nodes)], dim=2))
        h = h + torch.bmm(adjacency, self.second(h))
        logits: Tensor = self.head(h.mean(1))
        return logits


class DiffusionStep(nn.Module):
    """Predict the noise in images ``[b, 64]`` at steps ``t`` ``[b]`` (int64): ``[b, 64]``."""

    def __init__(self, steps: int = 50, width: int = 64) -> None:
        super().__init__()
        self.time = nn.Embedding(steps, width)
        self.into, self.middle, self.out = GaussianKan(64, width), GaussianKan(width, width), GaussianKan(width, 64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.into(x) + self.time(t)
        h = h + self.middle(h)
        noise: Tensor = self.out(h)
        return noise


class Detector(nn.Module):
    """Say which digit stands in ``[b, 1, 16, 16]``, and where: logits ``[b, 10]`` and box ``[b, 4]`` (center, size; 0 ... 1)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.trunk = GaussianKan(16 * width, 48)
        self.label, self.box = GaussianKan(48, 10), GaussianKan(48, 4)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(self.stem(image).flatten(1))
        return self.label(h), torch.sigmoid(self.box(h))


class Block(nn.Module):
    """Causal attention and a KAN in place of the perceptron, each behind a layer norm: ``[b, tokens, width]``."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = GaussianKan(width, width), GaussianKan(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, tokens, width = x.shape
        parts = self.qkv(self.before(x)).view(b, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.joined(mixed.transpose(1, 2).reshape(b, tokens, width))
        output: Tensor = x + self.down(self.up(self.between(x)))
        return output


class CharacterModel(nn.Module):
    """Predict every next character: ``[b, tokens]`` (int64) -> logits ``[b, tokens, characters]``."""

    def __init__(self, characters: int, tokens: int = 16, width: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, width)
        self.place = nn.Parameter(torch.randn(tokens, width) * 0.1)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, token: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.token(token) + self.place)))
        return logits


class Autoencoder(nn.Module):
    """Images ``[b, 1, 8, 8]`` through 12 numbers and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(GaussianKan(64, 32), GaussianKan(32, 12))
        self.decoder = nn.Sequential(GaussianKan(12, 32), GaussianKan(32, 64))

    def forward(self, image: Tensor) -> Tensor:
        image = self.decoder(self.encoder(image.flatten(1))).view(-1, 1, 8, 8)
        return image


class TokenKanBlock(nn.Module):
    """The block of U-KAN: a layer norm, then KAN, depthwise convolution, batch norm and ReLU, twice: ``[b, c, h, w]``."""

    def __init__(self, channels: int, kan: KanMaker) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.kans = nn.ModuleList(kan(channels, channels) for _ in range(2))
        self.depthwise = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.BatchNorm2d(channels), nn.ReLU()
            )
            for _ in range(2)
        )

    def forward(self, image: Tensor) -> Tensor:
        b, c, h, w = image.shape
        tokens = self.norm(image.flatten(2).transpose(1, 2))
        for kan, depthwise in zip(self.kans, self.depthwise, strict=True):
            tokens = kan(tokens)
            tokens = depthwise(tokens.transpose(1, 2).view(b, c, h, w)).flatten(2).transpose(1, 2)
        output: Tensor = image + tokens.transpose(1, 2).view(b, c, h, w)
        return output


class TokenKanNet(nn.Module):
    """A convolutional stem, a block of U-KAN and a KAN head: ``[b, 1, 8, 8]`` -> logits ``[b, 10]``."""

    def __init__(self, kan: KanMaker = GaussianKan, channels: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.block, self.head = TokenKanBlock(channels, kan), kan(channels, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.stem(image)).mean((2, 3)))
        return logits


class Experts(nn.Module):
    """A mixture of KAN experts, weighted by a softmax gate: ``[b, 64]`` -> logits ``[b, 10]``."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(64, count)
        self.experts = nn.ModuleList(nn.Sequential(GaussianKan(64, 24), GaussianKan(24, 10)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.softmax(self.gate(x), dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (weight.unsqueeze(-1) * outputs).sum(1)


class LocalSplineNet(nn.Sequential):
    """Two layers of local splines: ``[b, 64]`` -> logits ``[b, 10]``."""

    def __init__(self) -> None:
        super().__init__(LocalSplineKan(64, 32), LocalSplineKan(32, 10))


class HeatEquation(nn.Module):
    """A solution u of the heat equation at points ``[b, 2]`` (x, t), in float64: ``[b, 1]``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(ChebyshevKan(2, width), ChebyshevKan(width, width), ChebyshevKan(width, 1)).double()

    def forward(self, point: Tensor) -> Tensor:
        u: Tensor = self.layers(point)
        return u


class ResidualKan(nn.Module):
    """Four residual blocks of two spline layers each: ``[b, 64]`` -> logits ``[b, 10]``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def layer(n_in: int, n_out: int) -> KANLinear:
            return KANLinear(n_in, n_out, grid_range=(-2.0, 2.0), generator=generator)

        self.into, self.head = layer(64, width), layer(width, 10)
        self.blocks = nn.ModuleList(nn.Sequential(layer(width, width), layer(width, width)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        for block in self.blocks:
            h = h + block(h) / math.sqrt(len(self.blocks))
        logits: Tensor = self.head(h)
        return logits


class ConvBlock(nn.Module):
    """The basic block of ResNet, with a projection where the image shrinks: ``[b, c, h, w]``."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        projection = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        self.skip = nn.Identity() if stride == 1 and n_in == n_out else projection

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.path(x) + self.skip(x))


class ResNetKan(nn.Module):
    """A small ResNet whose classifier is two KAN layers: ``[b, 1, 8, 8]`` -> logits ``[b, 10]``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(ConvBlock(width, width, 1), ConvBlock(width, 2 * width, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(GaussianKan(2 * width, 24), GaussianKan(24, 10))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.blocks(self.stem(image))).flatten(1))
        return logits
