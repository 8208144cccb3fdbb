"""Make ``nn.Linear`` and ``nn.Conv2d`` layers whose initial weights come from a given generator."""

import math

import torch
from torch import nn


def seeded_linear(n_in: int, n_out: int, generator: torch.Generator, bias: bool = True) -> nn.Linear:
    """Make a linear layer with PyTorch's default initial distribution, drawn from ``generator``.

    ``nn.Linear`` itself would draw from the global random state.
    """
    # skip_init allocates without drawing, so the global random state stays where it was.
    linear = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias)
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
    if bias:
        bound = 1 / math.sqrt(n_in)
        nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    assert isinstance(linear, nn.Linear)
    return linear


def seeded_conv2d(
    n_in: int, n_out: int, kernel_size: int, generator: torch.Generator, stride: int = 1, padding: int = 0
) -> nn.Conv2d:
    """Make a convolution without bias whose weight [n_out, n_in, kernel, kernel] is Kaiming-uniform (gain 1)."""
    conv = nn.utils.skip_init(nn.Conv2d, n_in, n_out, kernel_size, stride=stride, padding=padding, bias=False)
    nn.init.kaiming_uniform_(conv.weight, nonlinearity="linear", generator=generator)
    assert isinstance(conv, nn.Conv2d)
    return conv
