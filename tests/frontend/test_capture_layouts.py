"""Layers over the channels of an image, whichever side the channels stand on: one small map for all pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import kancompile
from examples.zoo import spline_conv
from examples.zoo.efficient_kan import KANLinear
from kancompile.ir import AnyContraction, Expansion, TableExpansion
from kancompile.passes import SplitBranches
from kancompile.runtimes import RuntimeModel


class BehindPooling(nn.Module):
    """Channels are moved to the end behind a convolution and a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kan = nn.Conv2d(3, 6, 3), KANLinear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kan(functional.max_pool2d(self.conv(x), 2).movedim(1, -1)).sin()  # type: ignore[no-any-return]


class PatchSequence(nn.Module):
    """An image becomes a sequence of patches, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.kan = nn.Conv2d(3, 8, 4, stride=4), KANLinear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kan(self.patches(x).flatten(2).transpose(1, 2)).sin()  # type: ignore[no-any-return]


class ChannelsLast(nn.Module):
    """Channels stand last until a convolution needs them first."""

    def __init__(self) -> None:
        super().__init__()
        self.kan, self.conv = KANLinear(3, 4), spline_conv.build((4, 6), (1,), 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.tanh(self.kan(x)).movedim(-1, 1))  # type: ignore[no-any-return]


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int]]] = {
    "channels moved to the end": (BehindPooling, (3, 10, 10), (6, 8)),
    "image to sequence": (PatchSequence, (3, 12, 20), (8, 5)),
    "channels last": (ChannelsLast, (8, 8, 3), (3, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_over_channels_is_one_small_map(case: str) -> None:
    build, shape, (n_in, n_out) = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    x = torch.rand(48, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    captured = kancompile.capture(model, x[:2])
    torch.testing.assert_close(captured(x), model(x).detach(), rtol=1e-3, atol=1e-4)
    node, kan = next((node, one) for node, one in captured.nodes(AnyContraction) if one.layer.startswith("kan"))
    expansion = captured.node(str(node.all_input_nodes[0].target), Expansion)
    assert (expansion.n_in, kan.n_out) == (n_in, n_out)

    compiled = kancompile.compile(model, x, recipe={"goal_sqnr": None, "method": "uniform"})
    tables = [table for _, table in compiled.program.nodes(TableExpansion)]
    assert all(table.n_tables == 1 for table in tables)
    found = np.asarray(RuntimeModel(compiled.model_bytes)(x))
    np.testing.assert_allclose(found, compiled.program(x).numpy(), rtol=0, atol=2e-2)
    assert compiled.validate(x, min_sqnr=15).passed


def test_branches_of_channels_first_layers_split_without_a_change() -> None:
    build, shape, _ = CASES["channels moved to the end"]
    x = torch.rand(8, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    captured = kancompile.capture(build().eval(), x[:2])
    split = SplitBranches(lambda name: name.startswith("kan"))(captured)
    assert len(split.layer("kan").expansions) == 2
    torch.testing.assert_close(split(x), captured(x))
