"""Transformers, mixers and deep networks of KAN layers, each in a small form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.field_layers import ChebyshevKan, GaussianKan
from examples.zoo.efficient_kan import KANLinear
from examples.zoo.spline_conv import SplineConv2d


class GroupedRational(nn.Module):
    """The functions of a Kolmogorov-Arnold transformer: one numerator, a denominator for every group of channels.

    ``(a_0 + ... + a_5 z^5) / (1 + |b_1 z + ... + b_4 z^4|)`` of ``[b, tokens, width]``, which is brought to ``[groups, rest]``
    first as in the published PyTorch code. It begins as the identity or as SiLU.
    """

    numerator: Tensor
    denominator: Tensor

    def __init__(self, groups: int = 8, identity: bool = False) -> None:
        super().__init__()
        silu = [-0.0055, 0.4966, 0.3447, 0.1044, 0.0157, 0.0009], [-0.0466, 0.1779, 0.0313, 0.0004]
        above, below = ([0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 4) if identity else silu
        self.numerator = nn.Parameter(torch.tensor(above)[None])
        self.denominator = nn.Parameter(torch.tensor(below).repeat(groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, tokens, width = x.shape
        groups = len(self.denominator)
        z = x.view(b, tokens, groups, width // groups).permute(2, 0, 1, 3).contiguous().view(groups, -1)
        powers = [torch.ones_like(z), z]
        for _ in range(4):
            powers.append(powers[-1] * z)
        above = torch.stack(powers, dim=1)
        below = torch.stack(powers[1:5], dim=1)
        top = torch.bmm(self.numerator.expand(groups, 6).unsqueeze(1), above).squeeze(1)
        bottom = 1 + torch.bmm(self.denominator.unsqueeze(1), below).squeeze(1).abs()
        shaped = (top / bottom).view(groups, b, tokens, width // groups)
        return shaped.permute(1, 2, 0, 3).contiguous().view(b, tokens, width)


class RationalMlp(nn.Sequential):
    """Rational functions and linear layers in turn, in place of a perceptron."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__(
            GroupedRational(identity=True),
            nn.Linear(width, ratio * width),
            GroupedRational(),
            nn.Linear(ratio * width, width),
        )


class Attention(nn.Module):
    """Attention of several heads over ``[b, tokens, width]``."""

    def __init__(self, width: int, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, tokens, width = x.shape
        parts = self.qkv(x).reshape(b, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        joined: Tensor = self.joined(mixed.transpose(1, 2).reshape(b, tokens, width))
        return joined


class TransformerBlock(nn.Module):
    """Attention, then a module for every token, each behind a norm and beside a straight arm."""

    def __init__(self, width: int, for_tokens: nn.Module, causal: bool = False) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.for_tokens = Attention(width, causal=causal), for_tokens

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        output: Tensor = x + self.for_tokens(self.between(x))
        return output


class VisionTransformer(nn.Module):
    """Patches, a class token, places, blocks, and a head on the class token: ``[b, 1, 8, 8]`` -> logits ``[b, 10]``."""

    def __init__(self, for_tokens: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, module) for module in for_tokens))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class RationalTransformer(VisionTransformer):
    """Four blocks of a Kolmogorov-Arnold transformer."""

    def __init__(self, width: int = 48) -> None:
        super().__init__([RationalMlp(width) for _ in range(4)], width)


class KanTransformer(VisionTransformer):
    """Two blocks with two KAN layers each."""

    def __init__(self, width: int = 32) -> None:
        kans = [nn.Sequential(ChebyshevKan(width, 2 * width), ChebyshevKan(2 * width, width)) for _ in range(2)]
        super().__init__(kans, width)


class KanGpt(nn.Module):
    """Embeddings of tokens and places, causal blocks with B-spline layers, and a linear head without bias."""

    def __init__(self, characters: int, tokens: int = 16, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(characters, width), nn.Embedding(tokens, width)
        kans = [nn.Sequential(KANLinear(width, width), KANLinear(width, width)) for _ in range(depth)]
        self.blocks = nn.Sequential(*(TransformerBlock(width, kan, causal=True) for kan in kans))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)

    def forward(self, token: Tensor) -> Tensor:
        x = self.token(token) + self.place(torch.arange(token.shape[1], device=token.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Mixer(nn.Module):
    """Two KAN layers over tokens, two over channels, four times, behind norms and in residual sums."""

    def __init__(self, tokens: int = 16, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.over_tokens = nn.ModuleList(
            nn.Sequential(GaussianKan(tokens, tokens), GaussianKan(tokens, tokens)) for _ in range(depth)
        )
        self.over_channels = nn.ModuleList(
            nn.Sequential(GaussianKan(width, width), GaussianKan(width, width)) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        for number, (over_tokens, over_channels) in enumerate(zip(self.over_tokens, self.over_channels, strict=True)):
            x = x + over_tokens(self.norms[2 * number](x).transpose(1, 2)).transpose(1, 2)
            x = x + over_channels(self.norms[2 * number + 1](x))
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class RowAndColumnMixer(nn.Module):
    """One KAN layer over the columns of a feature map, one over its rows and one over its channels, all in residual sums."""

    def __init__(self, width: int = 12, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.kans = nn.ModuleList(nn.ModuleList(GaussianKan(n, n) for n in (8, 8, width)) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.head = GaussianKan(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).permute(0, 2, 3, 1)
        for kans, norm in zip(self.kans, self.norms, strict=True):
            assert isinstance(kans, nn.ModuleList)
            columns, rows, channels = kans
            x = x + columns(x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
            x = x + rows(x.permute(0, 1, 3, 2)).permute(0, 1, 3, 2)
            x = norm(x + channels(x))
        logits: Tensor = self.head(x.mean((1, 2)))
        return logits


class KanUNet(nn.Module):
    """B-spline convolutions down to a quarter of the pixels and back, with a skip connection: images to images."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.down = SplineConv2d(1, width, 3, generator, padding=1)
        self.low = SplineConv2d(width, 2 * width, 3, generator, padding=1)
        self.narrow = SplineConv2d(2 * width, width, 3, generator, padding=1)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.last = SplineConv2d(2 * width, width, 3, generator, padding=1)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        high = self.down(image)
        low = self.narrow(self.low(functional.avg_pool2d(high, 2)))
        output: Tensor = self.head(self.last(torch.cat([high, self.up(low)], dim=1)))
        return output


class DeepChain(nn.Sequential):
    """Twenty-four layers in a row, without a sum or a norm between them: [b, 64] -> [b, 10]."""

    def __init__(self, width: int = 32, depth: int = 24) -> None:
        widths = [64, *[width] * (depth - 1), 10]
        super().__init__(*(GaussianKan(n_in, n_out) for n_in, n_out in zip(widths, widths[1:], strict=False)))
        for layer in self:  # signals that neither fade nor grow
            assert isinstance(layer, GaussianKan)
            nn.init.orthogonal_(layer.base.weight, 1.6)
            nn.init.normal_(layer.spline.weight, 0.0, 0.03)
