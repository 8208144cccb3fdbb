"""Small seeded rounding problems with the traits of KAN features: correlated columns, large means, dead columns."""

import torch
from torch import Tensor

from kancompile.passes.rounding_methods.problem import FeatureSource, RoundingProblem


def table_codes(n: int, c: int, seed: int, dead: int = 0, latent: int | None = None) -> Tensor:
    """Draw correlated uint8 features ``[n, c]`` around 128 from ``latent`` factors; the last ``dead`` are constant."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, latent or max(2, c // 2), generator=generator)
    mixed = factors @ torch.randn(factors.shape[1], c, generator=generator) / factors.shape[1] ** 0.5
    noise = torch.randn(n, c, generator=generator)
    spread = 10 + 30 * torch.rand(c, generator=generator)
    codes = (128 + spread * (mixed + 0.2 * noise)).round().clamp(0, 255).to(torch.uint8)
    if dead:
        codes[:, c - dead :] = 77
    return codes


def problem(
    n: int = 512,
    c: int = 40,
    n_out: int = 6,
    bits: int = 3,
    seed: int = 0,
    dead: int = 0,
    group_sizes: tuple[int, ...] = (),
    tied_columns: Tensor | None = None,
    latent: int | None = None,
) -> RoundingProblem:
    """Build a problem with normally distributed weights."""
    weight = torch.randn(n_out, c, generator=torch.Generator().manual_seed(seed + 1)) * 0.01
    features = FeatureSource.from_tensor(table_codes(n, c, seed, dead, latent), chunk=200)
    return RoundingProblem("layers.0", weight, features, bits, group_sizes, tied_columns=tied_columns)


def generator(seed: int = 0) -> torch.Generator:
    """Make a generator of its own."""
    return torch.Generator().manual_seed(seed)
