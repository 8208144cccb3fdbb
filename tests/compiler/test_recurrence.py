"""Files of models with recurrent layers: one node a layer, one copy of its weights, no larger than the float export."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from torch import Tensor, nn

import kancompile
from kancompile.compiler import left_in_float, write
from kancompile.errors import KanCompileError
from kancompile.frontend.capture import capture
from kancompile.frontend.trace.recurrence import WholeRecurrences
from kancompile.ir import GATES, NamedTensors
from kancompile.passes.absorb_plain_layers import AbsorbPlainLayers
from kancompile.recipe import Recipe
from kancompile.reporting.facts.layer_kinds import count_layers
from kancompile.targets import TARGETS
from kancompile.targets.onnx.export import quiet
from kancompile.targets.onnx.translate_recurrence import RECURRENCE_TRANSLATIONS
from kancompile.validation.float_export import FloatExport
from tests.frontend.test_recurrence import Head, first_states, flat, layer
from tests.interfaces import Rbf

RNG = np.random.default_rng(0)
X = RNG.standard_normal((100, 12, 4)).astype(np.float32)
PAIRS = [(1, False, True, False), (1, True, False, True), (2, False, False, True), (2, True, True, False)]
"""Layers, bidirectional, bias, and whether the first state is given: every pair of choices."""


class Kinds(nn.Module):
    """A layer of each kind on ``[b, t, 4]``, from given states or zeros."""

    def __init__(self, layers: int, bidirectional: bool, bias: bool, started: bool) -> None:
        super().__init__()
        self.kinds = nn.ModuleDict({kind: layer(kind, 4, 6, layers, bidirectional, True, bias) for kind in GATES})
        self.states = {kind: first_states(kind, layers, 1 + bidirectional, 3, 6) for kind in GATES} if started else {}

    def forward(self, x: Tensor) -> list[Tensor]:
        given = {kind: (self.states[kind],) if self.states else () for kind in GATES}
        return [part for kind, one in self.kinds.items() for part in flat(one(x, *given[kind]))]


def file_of(model: Any, samples: Any, **options: Any) -> tuple[Any, Any]:
    compiled = kancompile.compile(model, samples, recipe={"min_sqnr": 0}, **options)
    return compiled, onnx.load_from_string(compiled.model_bytes).graph


def run(data: bytes, x: Any) -> Any:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


@pytest.mark.parametrize("options", PAIRS)
def test_onnx_runtime_computes_what_pytorch_does(options: tuple[int, bool, bool, bool]) -> None:
    model, x = Kinds(*options).eval(), torch.from_numpy(X[:3])
    with torch.no_grad(), quiet():
        with WholeRecurrences():
            traced = torch.export.export(model, (x,))
        program = torch.onnx.export(
            traced, dynamo=True, opset_version=21, verbose=False, custom_translation_table=dict(RECURRENCE_TRANSLATIONS)
        )
        assert program is not None
        found = run(program.model_proto.SerializeToString(), x.numpy())
        for expected, value in zip(model(x), found, strict=True):
            np.testing.assert_allclose(value, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_layer_is_one_node_at_every_length_and_its_weights_are_stored_once() -> None:
    model = Head(layer("lstm", 4, 32), 32)
    files = {}
    for steps in (3, 12):
        compiled, graph = file_of(model, X[:, :steps])
        assert [node.op_type for node in graph.node].count("LSTM") == 1
        assert [entry.name for entry in compiled.program.layers()] == ["kan"]
        files[steps] = compiled, graph
    assert len(files[3][1].node) == len(files[12][1].node)
    compiled, graph = files[12]
    stored = sum(onnx.numpy_helper.to_array(entry).size for entry in graph.initializer if entry.data_type == 1)
    weights = sum(parameter.numel() for parameter in model.recurrent.parameters())
    assert weights <= stored < 1.1 * weights
    exported = FloatExport(model, torch.from_numpy(X)).result()
    assert len(graph.node) < len(onnx.load_from_string(exported).graph.node)
    assert len(compiled.model_bytes) < len(exported)
    validation = compiled.validate(X)
    assert validation.runtime is not None
    assert validation.compiled.worst_db > 25


def test_a_file_for_sequences_of_every_length() -> None:
    model = Head(layer("gru", 4, 8, 2, True, True, True), 16)
    compiled, graph = file_of(model, X, dynamic="x: batch, time, 4")
    assert [size.dim_param for size in graph.input[0].type.tensor_type.shape.dim][:2] == ["batch", "time"]
    for steps in (1, 5, 30):
        x = RNG.standard_normal((7, steps, 4)).astype(np.float32)
        expected = compiled.program(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(run(compiled.model_bytes, x)[0], expected, rtol=0, atol=0.02)


def test_recurrent_layers_are_listed_by_their_share_of_the_time() -> None:
    program = capture(Head(layer("lstm", 4, 32), 32), torch.from_numpy(X))
    (part,) = left_in_float(program, torch.from_numpy(X[:2]), Recipe().costs.look_up)
    assert part["operator"] == "lstm"
    assert part["share"] > 0.5
    assert "recurrent" in part["reason"]


def test_steps_of_a_cell_are_uses_of_ordinary_layers() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.kan = nn.LSTMCell(4, 6), Rbf(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = cell = x.new_zeros(x.shape[0], 6)
            for step in range(3):
                state, cell = self.cell(x[:, step], (state, cell))
            result: Tensor = self.kan(state)
            return result

    x = torch.from_numpy(X)
    program = AbsorbPlainLayers()(capture(Cell().eval(), x), x)
    counted = count_layers({entry.name: entry.uses for entry in program.layers()}, program.kinds)
    assert counted == "1 KAN layer and 2 ordinary layers in 6 uses"


@pytest.mark.parametrize("target", ["c99", "qnn", "litert"])
def test_targets_without_recurrent_layers_say_so(target: str) -> None:
    with pytest.raises(
        KanCompileError, match=rf"target '{target}': found recurrent layers.*gru.*compile for 'ort-cpu'"
    ):
        write(TARGETS[target], capture(Head(layer("gru", 4, 8), 8), torch.from_numpy(X)), {"layers": []}, Recipe())


def test_a_state_that_is_fed_back_has_a_name() -> None:
    class Fed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.kan = layer("gru", 4, 8), Rbf(8, 3)

        def forward(self, x: Tensor, h: Tensor) -> dict[str, Tensor]:
            y, last = self.recurrent(x, h[None])
            return {"y": self.kan(y[:, -1]), "h": last[0]}

    samples = {"x": X, "h": RNG.uniform(-1, 1, (100, 8)).astype(np.float32)}
    compiled, graph = file_of(Fed().eval(), samples)
    assert [value.name for value in graph.output] == ["y", "h_1"]
    tensors = NamedTensors({name: torch.from_numpy(value) for name, value in samples.items()})
    session = onnxruntime.InferenceSession(compiled.model_bytes)
    for found, expected in zip(session.run(None, samples), compiled.program(tensors).tensors.values(), strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=0.02)
