"""A chain of a KAN layer and an ordinary convolution: two integer layers, no larger than its parts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kancompile.compiler.compile import compile
from kancompile.runtimes.session import RuntimeModel
from tests.frontend.test_chains import Bumps

_NODES = 4096
"""Bytes of the nodes and the names of a convolution in a file."""


class Tokens(nn.Module):
    """A KAN layer over the pixels of an image, and what reads the image of its outputs."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.kan, self.behind = Bumps(8, 8), behind

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.kan(x.flatten(2).transpose(1, 2))
        return self.behind(tokens.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


def test_a_depthwise_convolution_behind_a_layer_is_an_integer_layer_of_its_own() -> None:
    torch.manual_seed(0)
    chain = Tokens(nn.Conv2d(8, 8, 3, padding=1, groups=8)).eval()
    x = torch.randn(48, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    compiled, alone = (compile(model, x, recipe={"goal_sqnr": None}) for model in (chain, Tokens(nn.Identity()).eval()))
    assert [row.operator for row in compiled.audit.rows] == ["QGemm", "QLinearConv"]
    assert not compiled.audit.problems, compiled.audit.table()
    assert compiled.manifest["kinds"] == {"behind": "ordinary"}
    assert len(compiled.model_bytes) < len(alone.model_bytes) + 8 * 9 + _NODES
    expected, found = chain(x).detach(), torch.as_tensor(np.asarray(RuntimeModel(compiled.model_bytes)(x)))
    assert (expected - found).square().sum() / expected.square().sum() < 10**-3
