"""Layers whose inputs have functions of their own: rows, bytes and precision are one choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kancompile


class OwnBumps(nn.Module):
    """Gaussian bumps of each input's own centers and widths."""

    def __init__(self, n_in: int = 120, n_out: int = 6, k: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(n_out, n_in, k, generator=generator) / n_in**0.5)
        self.center = nn.Parameter(torch.rand(n_in, k, generator=generator) * 6 - 3)
        self.width = nn.Parameter(0.1 + 0.2 * torch.rand(n_in, k, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-(((x[..., None] - self.center) / self.width) ** 2))
        return torch.einsum("bik,oik->bo", bumps, self.weight)


X = torch.randn(300, 120, generator=torch.Generator().manual_seed(1))


def test_rows_for_every_input_are_not_bought_where_16_bits_are_smaller() -> None:
    model = OwnBumps().eval()
    compiled = kancompile.compile(model, X)
    assert len(compiled.model_bytes) <= 4 * sum(value.numel() for value in model.parameters()) + (1 << 12)
    with torch.no_grad():
        expected = model(X)
        error = compiled.program(X) - expected
    assert float(error.square().mean().log10()) < float(expected.var().log10()) - 3.5


def test_a_limit_of_rows_by_size_is_said() -> None:
    compiled = kancompile.compile(OwnBumps().eval(), X, recipe={"goal_sqnr": 5})
    (note,) = [note for note in compiled.program.notes if "size limits the rows" in note]
    assert "levels = " in note
    assert "bytes more" in note
