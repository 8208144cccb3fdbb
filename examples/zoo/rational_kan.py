"""GR-KAN: one rational function for each group of channels, then a linear layer.

Yang and Wang, *Kolmogorov-Arnold Transformer* (arXiv 2409.10594)::

    r_g(x)  = (a[0] + a[1] x + ... + a[5] x^5) / (1 + |b[g, 0] x + ... + b[g, 3] x^4|)
    y[b, o] = bias[o] + sum_i weight[o, i] * r_{group of i}(x[b, i])

State dict per layer ``layers.N.``: ``act.weight_numerator`` [1, 6], ``act.weight_denominator`` [groups, 4], ``linear.weight``,
``linear.bias``. The denominator is 1 plus an absolute value, so it has no pole.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.zoo.layer_chain import LayerChain
from examples.zoo.seeded_layers import seeded_linear


class GroupedRational(nn.Module):
    """A rational function of degrees 5 and 4 for each of ``groups`` equal parts of the channels; starts near SiLU."""

    def __init__(self, groups: int, generator: torch.Generator) -> None:
        super().__init__()
        start = torch.tensor([[-0.0094, 0.5, 0.3077, 0.1196, 0.0129, 0.0]])
        self.weight_numerator = nn.Parameter(start)
        below = torch.tensor([0.0, 0.2463, 0.0, 0.0092]).repeat(groups, 1)
        self.weight_denominator = nn.Parameter(below + 0.01 * torch.randn(groups, 4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., channels] to the same shape."""
        groups = self.weight_denominator.shape[0]
        part = x.reshape(*x.shape[:-1], groups, -1)
        above = self.weight_numerator[0]
        top = above[5]
        for power in range(4, -1, -1):
            top = top * part + above[power]
        below = self.weight_denominator.unsqueeze(-1)
        bottom = part * (below[:, 0] + part * (below[:, 1] + part * (below[:, 2] + part * below[:, 3])))
        return (top / (1 + bottom.abs())).reshape(x.shape)


class GRKANLayer(nn.Module):
    """Map [..., n_in] to [..., n_out]."""

    def __init__(self, n_in: int, n_out: int, groups: int, generator: torch.Generator) -> None:
        super().__init__()
        self.act = GroupedRational(groups, generator)
        self.linear = seeded_linear(n_in, n_out, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer on [..., n_in]."""
        return self.linear(self.act(x))


def build(widths: Sequence[int] = (64, 32, 10), groups: int = 8, seed: int = 0) -> nn.Module:
    """Build a chain of GR-KAN layers of the given widths (input first, all but the last multiples of ``groups``)."""
    generator = torch.Generator().manual_seed(seed)
    return LayerChain([GRKANLayer(n_in, n_out, groups, generator) for n_in, n_out in itertools.pairwise(widths)])
