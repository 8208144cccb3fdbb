"""A layer that a model uses several times is one layer of the file: one table, one rounding, one copy, one entry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from examples.zoo.efficient_kan import KANLinear
from kancompile.compiler.compile import compile
from kancompile.compiler.compiled_model import CompiledModel
from kancompile.ir import IntegerContraction
from kancompile.runtimes.session import RuntimeModel
from tests.targets.c_programs import UNDEFINED, build, evaluate, write


def layer(n_in: int, n_out: int) -> KANLinear:
    return KANLinear(n_in, n_out, 3, 1, generator=torch.Generator().manual_seed(0))


class Cell(nn.Module):
    """A state and the steps of a sequence; the first step, whose state is constant, reads fewer inputs: a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = layer(8, 5), layer(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 5)
        for step in range(x.shape[1]):
            h = self.cell(torch.cat([x[:, step], h], dim=1))
        return self.head(h)  # type: ignore[no-any-return]


class Chain(nn.Module):
    """Two layers in turn: what the first hands over always meets the second, what the second does, another one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = layer(4, 6), layer(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.b(self.a(x))
        return x


class Images(nn.Module):
    """A convolution of functions, in turn with itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights, self.head = nn.Conv2d(6, 3, 3, padding=1), layer(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.weights(torch.cat([torch.sin(x), torch.cos(2 * x)], dim=1))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def compiled(model: nn.Module, shape: tuple[int, ...], **recipe: Any) -> tuple[CompiledModel, np.ndarray]:  # type: ignore[type-arg]
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1)).numpy()
    return compile(model.eval(), x, recipe={"goal_sqnr": None, **recipe}), x


def assert_equal_to_the_simulation(found: CompiledModel, x: np.ndarray) -> None:  # type: ignore[type-arg]
    expected = found.program(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(RuntimeModel(found.model_bytes).run({"input": x})[0], expected)


CASES: list[tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any], dict[str, int]]] = [
    (Cell, (4, 3), {}, {"cell": 1, "cell_1": 3, "head": 1}),
    (Cell, (4, 3), {"weight_bits": 3, "granularity": "group", "group_size": 4}, {"cell": 1, "cell_1": 3, "head": 1}),
    (Chain, (4,), {"granularity": "branch"}, {"a": 3, "b": 3}),
    (Chain, (4,), {"method": "brecq"}, {"a": 3, "b": 3}),
    (Chain, (4,), {"levels": 64}, {"a": 3, "b": 3}),
    (Chain, (4,), {"levels": 1024}, {"a": 3, "b": 3}),
    (Chain, (4,), {"lookup": "joint"}, {"a": 3, "b": 3}),
    (Images, (3, 4, 4), {"method": "gptq"}, {"layer0": 3, "head": 1}),
]


@pytest.mark.parametrize(("model", "shape", "recipe", "uses"), CASES)
def test_uses_share_what_they_read(
    model: Callable[[], nn.Module], shape: tuple[int, ...], recipe: dict[str, Any], uses: dict[str, int]
) -> None:
    found, x = compiled(model(), shape, **recipe)
    assert {entry["name"]: entry.get("uses", 1) for entry in found.manifest["layers"]} == uses
    assert_equal_to_the_simulation(found, x)
    graph = onnx.load_from_string(found.model_bytes).graph
    large = [tensor.raw_data for tensor in graph.initializer if len(tensor.raw_data) > 64]
    assert len(large) == len(set(large))


@pytest.mark.slow
def test_a_file_grows_by_nodes_alone() -> None:
    graphs = []
    for steps in (3, 6):
        found, _ = compiled(Cell(), (steps, 3))
        graphs.append(onnx.load_from_string(found.model_bytes).graph)
    shapes = [
        sorted(tuple(tensor.dims) for tensor in graph.initializer if np.prod(tensor.dims) > 8) for graph in graphs
    ]
    assert [shape[1:] for shape in shapes[0]] == [shape[1:] for shape in shapes[1]]  # tables may differ in rows
    products = [sum(node.op_type == "Gemm" for node in graph.node) for graph in graphs]
    assert products == [4, 7]


def test_a_layer_hands_rows_over_where_every_use_meets_the_same_table() -> None:
    found, _ = compiled(Chain(), (4,), levels=64)
    forms = {c.layer: c.hands_over.kind for _, c in found.program.nodes(IntegerContraction)}
    assert forms == {"a": "rows", "b": "real"}


@pytest.mark.parametrize(("precision", "expected"), [("float", 90.0), ("int16", 50.0)])
def test_functions_of_other_precisions_are_shared(precision: str, expected: float) -> None:
    found, x = compiled(Chain(), (4,), precision=precision)
    assert [entry["uses"] for entry in found.manifest["layers"]] == [3, 3]
    assert found.validate(x).compiled.worst_db > expected


@pytest.mark.needs("gcc")
@pytest.mark.parametrize("levels", [64, 1024])
def test_c_has_one_function_for_all_uses(levels: int, tmp_path: Path) -> None:
    found, x = compiled(Chain(), (4,), levels=levels)
    write(found.program, tmp_path)
    text = (tmp_path / "model.c").read_text()
    assert text.count("static void kan_layer0(") == text.count("static void kan_layer1(") == 1
    assert "kan_layer2" not in text
    assert sum(line.strip().startswith("kan_layer0(state, ") for line in text.splitlines()) == 3
    outputs = evaluate(build(tmp_path, ["-std=c99", "-O1", *UNDEFINED]), torch.from_numpy(x))
    np.testing.assert_array_equal(outputs, found.program(torch.from_numpy(x)).numpy())
