"""Batched products with one matrix are ordinary layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from torch import Tensor, nn

import kancompile
from tests.interfaces import Rbf

X = np.random.default_rng(0).standard_normal((120, 5, 6)).astype(np.float32)
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda y, w: torch.einsum("btd,do->bto", y, w),
    "matmul": lambda y, w: y @ w[None],
    "bmm": lambda y, w: torch.bmm(y, w.expand(len(y), 5, 8)),
    "tensordot": lambda y, w: torch.tensordot(y, w, dims=([2], [0])),
}


class Mixed(nn.Module):
    """A product over transposed tokens between two layers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.first, self.last = Rbf(6, 6), Rbf(8, 4)
        self.weight = nn.Parameter(0.4 * torch.randn(5, 8))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(WAYS[self.way](self.first(x).transpose(1, 2), self.weight))


@pytest.mark.parametrize("way", list(WAYS))
def test_one_matrix_of_all_rows_is_an_ordinary_layer(way: str) -> None:
    compiled = kancompile.compile(Mixed(way), X)
    assert list(compiled.manifest["kinds"].values()) == ["ordinary"]
    assert compiled.manifest["left_in_float"] == []
    for rows in (1, 7):
        found = onnxruntime.InferenceSession(compiled.model_bytes).run(None, {"input": X[:rows]})[0]
        assert np.array_equal(found, compiled.program(torch.from_numpy(X[:rows])).numpy())


def test_matrices_that_differ_stay_as_they_are() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.weight = Rbf(6, 6), Rbf(8, 4), nn.Parameter(torch.randn(5, 6, 8))
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.bmm(self.first(x).transpose(0, 1), self.weight).transpose(0, 1))

    compiled = kancompile.compile(Heads(), X)
    assert not compiled.program.kinds
    assert [part["operator"] for part in compiled.manifest["left_in_float"]] == ["bmm"]
