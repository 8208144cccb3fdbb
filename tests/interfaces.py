"""Small networks of several inputs and outputs, each the same at every call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Rbf(nn.Module):
    """Radial functions of each input, one linear map, and a SiLU branch."""

    def __init__(self, n_in: int, n_out: int, functions: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(n_in * 100 + n_out)
        self.register_buffer("centers", torch.linspace(-2, 2, functions))
        self.weight = nn.Parameter(
            torch.randn(n_out, n_in * functions, generator=generator) / (n_in * functions) ** 0.5
        )
        self.base = nn.Parameter(torch.randn(n_out, n_in, generator=generator) / n_in**0.5)

    def forward(self, x: Tensor) -> Tensor:
        phi = torch.exp(-(((x.unsqueeze(-1) - self.centers) / 0.8) ** 2)).flatten(-2)
        return nn.functional.linear(phi, self.weight) + nn.functional.linear(nn.functional.silu(x), self.base)


def _embedding(count: int, width: int) -> nn.Embedding:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    return nn.Embedding.from_pretrained(drawn, freeze=False)


class Two(nn.Module):
    """Adds a second real input between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Rbf(4, 8), Rbf(8, 3)
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(self.a(x) + t)


class Unused(Two):
    """Takes a second input and leaves it alone."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(self.a(x))


class Diffusion(nn.Module):
    """Embeds a time step, takes a mask if there is one, and returns what it hides as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Rbf(4, 8), Rbf(8, 4)
        self.steps, self.norm = _embedding(10, 8), nn.LayerNorm(8)
        self.eval()

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.a(x) + self.steps(t)
        if mask is not None:
            hidden = hidden * mask
        return {"noise": self.b(self.norm(hidden)), "hidden": hidden}


@dataclass
class Sample:
    """What a network takes at once."""

    image: Tensor
    ids: Tensor


class DictInput(nn.Module):
    """Takes a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.of_ids = Rbf(4, 8), Rbf(8, 3), _embedding(10, 8)
        self.eval()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.b(self.a(batch["image"]) + self.of_ids(batch["ids"]))


class DataclassInput(DictInput):
    """Takes a dataclass."""

    def forward(self, batch: Sample) -> Tensor:  # type: ignore[override]
        return self.b(self.a(batch.image) + self.of_ids(batch.ids))


class Tokens(nn.Module):
    """Embeds tokens, sums over those before, and predicts the next."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = _embedding(20, 8), nn.LayerNorm(8)
        self.a, self.b = Rbf(8, 8), Rbf(8, 20)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        return self.b(self.a(self.norm(hidden + hidden.cumsum(1))))
