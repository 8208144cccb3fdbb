"""Names in an ONNX file are those of the user's modules, and every product says where it stands in the user's source."""

from __future__ import annotations

import re

import onnx
import pytest
import torch
from torch import nn

import kancompile
from examples.zoo import efficient_kan, kagn_conv
from examples.zoo.efficient_kan import KANLinear

RECIPES = {
    "8 bits": {},
    "4 bits": {"weight_bits": 4},
    "2 bits, groups": {"weight_bits": 2, "granularity": "group", "group_size": 4},
    "int16": {"precision": "int16"},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["linear", "convolutions"])
def test_a_person_finds_the_layers(family: str, recipe: str) -> None:
    model = efficient_kan.build((6, 5, 3)) if family == "linear" else kagn_conv.build((1, 4), (1,), 3)
    shape = (6,) if family == "linear" else (1, 8, 8)
    x = torch.rand(64, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    compiled = kancompile.compile(model, x, recipe=RECIPES[recipe] | {"method": "uniform", "goal_sqnr": None})
    graph = onnx.load_from_string(compiled.model_bytes).graph
    layers = [layer.name for layer in compiled.program.layers()]  # ordinary layers too
    names = [node.name for node in graph.node if node.name]  # what widens weights at load has none
    assert len(set(names)) == len(names)
    values = [tensor.name for tensor in graph.initializer] + [name for node in graph.node for name in node.output]
    assert len(set(values)) == len(values)
    # numbered, or of a module; nothing that the exporter made up
    owned = re.compile(rf"({'|'.join(map(re.escape, layers))})[./+]")
    assert not [value for value in values if not (re.fullmatch(r"[cv]\d+|output", value) or owned.match(value))]
    assert not [name for name in names if "node_" in name or "val_" in name]
    for layer in layers:
        assert any(value.startswith(f"{layer}.weight") for value in values)
        products = [node for node in graph.node if node.name.startswith(layer) and node.op_type in ("Gemm", "Conv")]
        assert products
        file = "efficient_kan.py" if family == "linear" else "kagn_conv.py"
        if layer in compiled.program.sources:
            assert all(re.fullmatch(rf"{file}:\d+", node.doc_string) for node in products)
    assert compiled.program.sources
    looked_up = [node for node in graph.node if "/lookup" in node.name]
    assert looked_up, "what evaluates the functions stands under its layer"


def test_a_layer_says_its_line() -> None:
    captured = kancompile.capture(efficient_kan.build((6, 5, 3)), (6,))
    assert set(captured.sources) == {"layers.0", "layers.1"}
    assert all(re.fullmatch(r"efficient_kan\.py:\d+", line) for line in captured.sources.values())


class Awkward(nn.Module):
    """Modules with names that a file could take for its own."""

    def __init__(self) -> None:
        super().__init__()
        self.node_a = KANLinear(6, 5)
        self.node_a.lookup = KANLinear(5, 4)
        self.c0 = KANLinear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c0(torch.tanh(self.node_a.lookup(torch.tanh(self.node_a(x)))))  # type: ignore[no-any-return, operator]


def test_awkward_names_stay_apart() -> None:
    x = torch.rand(64, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    compiled = kancompile.compile(Awkward(), x, recipe={"method": "uniform", "goal_sqnr": None, "weight_bits": 4})
    assert [row.node for row in compiled.audit.rows] == ["node_a/Gemm", "node_a.lookup/Gemm", "c0/Gemm"]
    graph = onnx.load_from_string(compiled.model_bytes).graph
    names = [node.name for node in graph.node if node.name]  # what widens weights at load has none
    assert len(set(names)) == len(names)
    owners = ("node_a/", "node_a.lookup/", "node_a.lookup.lookup/", "c0/", "c0.lookup/")
    assert all(name.startswith(owners) or "/" not in name for name in names)
