"""A rectifier in front of a layer is a range that begins at 0."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import nn

import kancompile
from kancompile.ir import Branch, Expansion, TableExpansion
from kancompile.passes.tabulate_expansions.rectifier import identity_of, is_rectifier
from tests.interfaces import Rbf

X = np.random.default_rng(0).standard_normal((200, 2, 8, 8)).astype(np.float32)


def expansion_of(function: nn.Module) -> Expansion:
    graph = torch.fx.symbolic_trace(function)
    return Expansion((3, 2), [Branch("f", graph, torch.arange(6).reshape(3, 2).T[..., None].contiguous())], True)


def test_only_rectifiers_are_recognised() -> None:
    x = torch.linspace(-8, 8, 9)
    assert is_rectifier(expansion_of(nn.ReLU()), x)
    for other in (nn.LeakyReLU(0.01), nn.ReLU6(), nn.SiLU(), nn.Identity(), nn.Softplus(50)):
        assert not is_rectifier(expansion_of(other), x)
    y = torch.randn(4, 3, 2)
    assert torch.equal(identity_of(expansion_of(nn.ReLU()))(y.relu()), expansion_of(nn.ReLU())(y))


def test_nothing_is_looked_up_between_rectified_convolutions() -> None:
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
    ]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Rbf(8, 3)).eval()
    compiled = kancompile.compile(model, X, recipe=kancompile.Recipe(goal_sqnr=None))
    tables = [table for _, table in compiled.program.nodes(TableExpansion) if table.channels_first]
    assert [table.index.zero_point for table in tables[1:]] == [0, 0]
    assert all(torch.equal(table.table.flatten(), torch.arange(256).byte()) for table in tables)
    nodes = collections.Counter(node.op_type for node in onnx.load_from_string(compiled.model_bytes).graph.node)
    assert nodes["GatherElements"] == nodes["Unsqueeze"] == 0
    found = onnxruntime.InferenceSession(compiled.model_bytes).run(None, {"input": X})[0]
    assert np.array_equal(found, compiled.program(torch.from_numpy(X)).numpy())


def test_rows_asked_for_stay_those_of_the_whole_range() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), Rbf(4, 3)).eval()
    compiled = kancompile.compile(model, X.reshape(-1, 4)[:500], recipe=kancompile.Recipe(levels=64, goal_sqnr=None))
    assert [table.index.zero_point > 0 for _, table in compiled.program.nodes(TableExpansion)][:2] == [True, True]
