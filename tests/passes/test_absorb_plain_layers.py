"""Ordinary layers as modules: equal in value, integer in the file, and an account of what stays in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from kancompile.compiler.compile import compile
from kancompile.compiler.left_in_float import left_in_float
from kancompile.frontend import capture
from kancompile.ir import Contraction, NamedTensors, check
from kancompile.passes.absorb_plain_layers import AbsorbPlainLayers
from kancompile.recipe import Recipe
from kancompile.reporting.facts.layer_kinds import count_layers
from kancompile.runtimes.session import RuntimeModel

COSTS = Recipe().costs.look_up


class Around(nn.Module):
    """A KAN layer (a sine and a square of every channel, convolved) with ordinary layers in front and behind."""

    def __init__(self, front: nn.Module, behind: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.front, self.behind = front, behind
        self.kan = nn.Conv2d(8, 6, 3, padding=1)
        self.names = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in [*self.named_parameters(), *self.named_buffers()]:
                if value.dim():
                    drawn = torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5
                    value.copy_(drawn.abs() + 0.5 if "var" in name else drawn)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        x = self.kan(torch.cat([torch.sin(x), x * x], dim=1))
        return self.behind(x, *(self.get_submodule(name) for name in self.names))


CASES = {
    "convolution with batch norm and activation": (
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        lambda x, conv: conv(functional.gelu(x)),
        {"conv": nn.Conv2d(6, 6, 3, groups=2, dilation=2, padding=2)},
        ["front.0", "conv"],
    ),
    "head behind a pooling": (
        nn.Conv2d(3, 4, 1, bias=False),
        lambda x, hidden, norm, head: head(functional.silu(norm(hidden(x.mean((2, 3)))))),
        {"hidden": nn.Linear(6, 12), "norm": nn.BatchNorm1d(12), "head": nn.Linear(12, 3, bias=False)},
        ["front", "hidden", "head"],
    ),
    "tokens and a skip connection": (
        nn.Conv2d(3, 4, 3, padding=1),
        lambda x, norm, mix: mix(norm(x.flatten(2).transpose(1, 2))) + x.flatten(2).transpose(1, 2),
        {"norm": nn.LayerNorm(6), "mix": nn.Linear(6, 6)},
        ["front", "mix"],
    ),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case == "head behind a pooling" else []) for case in CASES],
)
def test_ordinary_layers_become_modules(case: str) -> None:
    front, behind, layers, names = CASES[case]
    model = Around(front, behind, **layers)
    x = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    program = capture(model, x[:2])
    absorbed = AbsorbPlainLayers()(program, x)
    check(absorbed)
    assert [layer.name for layer in program.layers()] == ["layer0"]
    assert sorted(layer.name for layer in absorbed.layers()) == sorted([*names, "layer0"])
    torch.testing.assert_close(absorbed(x), program(x), rtol=1e-4, atol=1e-5)
    assert AbsorbPlainLayers()(absorbed, x) is absorbed
    operators = [entry["operator"] for entry in left_in_float(absorbed, x, COSTS)]
    assert not {"addmm", "mm", "convolution", "_native_batch_norm_legit_no_training"} & set(operators)
    for layer in absorbed.layers():
        assert isinstance(absorbed.module(layer.contraction), Contraction)

    compiled = compile(model, x, recipe={"goal_sqnr": None})
    assert not compiled.audit.problems, compiled.audit.table()
    assert len(compiled.audit.rows) == len(names) + 1
    expected, found = model(x).detach(), torch.as_tensor(np.asarray(RuntimeModel(compiled.model_bytes)(x)))
    error = (expected - found).square().sum() / expected.square().sum()
    assert error < 10**-3.2, f"{-10 * float(error.log10()):.1f} dB"
    # float operators between layers may round to the other side of a step, nothing else may differ
    torch.testing.assert_close(found, compiled.program(x), rtol=0, atol=0.02 * float(expected.abs().max()))
    share = float(((found - compiled.program(x)).abs() > 1e-4 * float(expected.abs().max())).float().mean())
    assert share < 0.01
    stated = {entry["operator"]: entry["reason"] for entry in compiled.manifest["left_in_float"]}
    assert ("native_layer_norm" in stated) == ("norm" in layers and isinstance(layers["norm"], nn.LayerNorm))


def test_kept_layers_and_read_activations_stay() -> None:
    model = Around(
        nn.Conv2d(3, 4, 1), lambda x, last: last(torch.relu(x)) + torch.relu(x), last=nn.Conv2d(6, 6, 3, padding=1)
    )
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    program = capture(model, x)
    absorbed = AbsorbPlainLayers(lambda name: name != "front")(program, x)
    assert sorted(layer.name for layer in absorbed.layers()) == ["last", "layer0"]
    torch.testing.assert_close(absorbed(x), program(x), rtol=1e-4, atol=1e-5)
    operators = [entry["operator"] for entry in left_in_float(absorbed, x, COSTS)]
    assert "convolution" in operators
    assert AbsorbPlainLayers(lambda name: False)(program, x) is program


def test_steps_of_a_recurrence_are_further_uses_of_one_ordinary_layer() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.kan = nn.Linear(5, 5), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros_like(x[:, 0])
            for step in range(3):
                state = torch.tanh(self.cell(state + x[:, step]))
            return self.kan(torch.cat([torch.sin(2 * state), state * state], dim=1))

    x = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(2))
    absorbed = AbsorbPlainLayers()(capture(Steps(), x), x)
    assert absorbed.kinds == {"cell": "ordinary"}
    uses = {layer.name: layer.uses for layer in absorbed.layers()}
    assert count_layers(uses, absorbed.kinds) == "1 KAN layer and 1 ordinary layer in 3 uses"


def test_what_stays_in_float_is_ranked_by_its_share_of_the_time() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.kan = nn.LayerNorm(4096), nn.Linear(4096, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.kan(torch.sin(self.norm(x))))

    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(2))
    parts = left_in_float(capture(Normalised(), x), x, COSTS)
    assert [part["operator"] for part in parts] == ["native_layer_norm", "relu"]
    assert 0 < parts[1]["share"] < 0.1 < parts[0]["share"] < 1
    dear = left_in_float(capture(Normalised(), x), x, replace(COSTS, node=1e9))  # beside which elements do not count
    assert dear[0]["share"] == dear[1]["share"]
    assert parts[1]["source"].startswith("test_absorb_plain_layers.py:")


@pytest.mark.parametrize("layer", ["linear", "linear without bias", "product"])
def test_layers_of_transposed_tokens_are_taken_up(layer: str) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.kan = nn.Linear(6, 6), nn.Linear(16, 3)
            self.mix = nn.Linear(5, 8, bias=layer == "linear")

        def forward(self, x: Tensor) -> Tensor:
            x = self.front(x).transpose(1, 2)
            x = x @ self.mix.weight.T if layer == "product" else self.mix(x)
            return self.kan(torch.cat([torch.sin(2 * x), x * x], dim=2))

    model = Mixing()
    x = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(2))
    absorbed = AbsorbPlainLayers()(capture(model, x), x)
    assert len(absorbed.layers()) == 3
    assert not left_in_float(absorbed, x, COSTS)
    torch.testing.assert_close(absorbed(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_attention_looks_for_empty_rows_only_where_a_mask_can_make_one(mask: str) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.out, self.kan = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            b, tokens, width = x.shape
            q, k, v = self.parts(x).view(b, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            seen = x[:, None, None, :, 0] > 0 if mask == "padding" else None
            y = scaled_dot_product_attention(q, k, v, seen, is_causal=mask == "causal")
            y = self.out(y.transpose(1, 2).reshape(b, tokens, width))
            return self.kan(torch.cat([torch.sin(2 * y), y * y], dim=2))

    model = Attending()
    x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(2))
    x[0, :, 0] = -1  # of this sample no token is seen
    absorbed = AbsorbPlainLayers()(capture(model, x), x)
    torch.testing.assert_close(absorbed(x), model(x), rtol=1e-4, atol=1e-5)
    operators = {part["operator"] for part in left_in_float(absorbed, x, COSTS)}
    assert {"bmm", "_softmax"} <= operators
    assert ("where" in operators) == ("logical_not" in operators) == (mask == "padding")
    assert sum(kind == "ordinary" for kind in absorbed.kinds.values()) == 2


def test_what_stays_in_float_of_several_inputs_is_what_depends_on_one() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.kan = nn.Embedding(4096, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, word: Tensor) -> Tensor:
            before = torch.arange(5)[:, None] >= torch.arange(5)
            weight = torch.softmax(torch.where(before, x @ x.mT, -1e9), dim=2)
            return self.kan(torch.sin(weight @ self.words(word)))

    generator = torch.Generator().manual_seed(2)
    word = torch.randint(4096, (4, 5), generator=generator)
    x = NamedTensors({"x": torch.randn(4, 5, 8, generator=generator), "word": word})
    parts = {part["operator"]: part["share"] for part in left_in_float(capture(Attending(), x), x, COSTS)}
    assert set(parts) == {"bmm", "_softmax", "where", "embedding"}, "the mask is a constant, which runtimes fold"
    assert 0 < parts["embedding"] < 0.2, "of 4096 rows 5 are read"


def test_row_numbers_of_ordinary_layers_are_not_looked_up() -> None:
    model = Around(nn.Conv2d(3, 4, 3, padding=1), lambda x, last: last(x), last=nn.Conv2d(6, 4, 3))
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    compiled = compile(model, x, recipe={"goal_sqnr": None})
    assert compiled.audit.operators["GatherElements"] == 1, "the sine and the square, packed"
    assert "Gather" not in compiled.audit.operators
    np.testing.assert_array_equal(np.asarray(RuntimeModel(compiled.model_bytes)(x)), compiled.program(x).numpy())


def test_a_part_of_a_parameter_is_a_matrix_like_another() -> None:
    class OfPart(nn.Module):
        """Heads whose matrices are rows, slices and sums of stored ones."""

        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.matrices = nn.Parameter(torch.randn(3, 6, 5, generator=generator))
            self.offsets = nn.Parameter(torch.randn(3, 5, generator=generator))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([torch.sin(2 * x), x * x], dim=1)
            first = torch.addmm(self.offsets[0], h, self.matrices[0]).softmax(1)
            return first @ self.matrices[1, :5] + first @ (self.matrices[1:, :5].sum(0))

    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    program = capture(OfPart(), x)
    absorbed = AbsorbPlainLayers()(program, x)
    assert not [entry for entry in left_in_float(absorbed, x, COSTS) if entry["operator"] in ("mm", "addmm", "sum")]
    torch.testing.assert_close(absorbed(x), program(x), rtol=1e-4, atol=1e-5)
