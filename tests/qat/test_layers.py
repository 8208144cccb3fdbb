"""Convolutions, channel groups, joint look-ups and split layers train as linear layers do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.zoo import fast_kan
from examples.zoo.efficient_kan import KAN
from kancompile import capture, qat
from kancompile.data import load_calibration
from kancompile.ir import JointTable, Program, TableExpansion
from kancompile.passes import lower
from kancompile.progress import quiet
from kancompile.qat.conversion import quantized
from kancompile.recipe import read_recipe
from tests.convolution_programs import float_convolutions, square

QUICK = {"weight_bits": 4, "method": "uniform", "drift": "off"}


def prepared(program: Program, x: Tensor, recipe: dict[str, Any], training: qat.Training) -> qat.TrainedModel:
    """Prepare a program that was captured or built by hand."""
    whole = read_recipe({**QUICK, **recipe})
    with quiet():
        lowered = lower(program, x, whole)
    facts = SimpleNamespace(
        captured=program, lowered=lowered, recipe=whole, calibration=load_calibration(x.numpy()), manifest={"seed": 0}
    )
    return qat.prepare_compiled(facts, training)  # type: ignore[arg-type]


def check(module: qat.TrainedModel, x: Tensor, steps: int = 8) -> None:
    """Train on a target and compare with the integer program before and after."""
    lowered = module.compiled.lowered
    with torch.no_grad():
        assert torch.equal(module(x), lowered(x))
    assert quantized(module) is lowered
    target = lowered(x).flatten(1).roll(1, 0)
    optimizer = torch.optim.Adam(qat.parameter_groups(module, 0.02))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (module(x).flatten(1) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # inputs of a product that are all 0 leave an index without gradient; parameters of layers always have one
    assert all(value.grad is not None for name, value in module.named_parameters() if name.startswith("layers."))
    after = quantized(module)
    with torch.no_grad():
        assert torch.equal(module(x), after(x))
    assert not torch.equal(after(x), lowered(x))


def image_inputs(n: int, seed: int) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


CONVOLUTIONS: dict[str, Callable[[], Program]] = {
    "padded": lambda: float_convolutions((3, 8, 8), [square(4, 3, padding=1), square(3, 3, stride=2)]),
    "own tables": lambda: float_convolutions((3, 8, 8), [square(4, 3), square(3, 3)], same_functions=False),
    "two expansions": lambda: float_convolutions((3, 8, 8), [square(4, 3, padding=1), square(2, 3)], split=True),
}


@pytest.mark.parametrize(
    "case", ["padded", *(pytest.param(case, marks=pytest.mark.slow) for case in list(CONVOLUTIONS)[1:])]
)
def test_convolutions_train(case: str) -> None:
    module = prepared(CONVOLUTIONS[case](), image_inputs(24, 0), {"levels": 16}, qat.Training(index="lsq+"))
    check(module, image_inputs(6, 1) * 1.3)


@pytest.mark.slow
def test_channel_groups_train() -> None:
    layers = [square(6, 3, padding=1, groups=3), square(4, 3)]
    module = prepared(float_convolutions((3, 8, 8), layers), image_inputs(24, 0), {}, qat.Training())
    check(module, image_inputs(6, 1))


@pytest.mark.slow  # captures a network of its own
def test_joint_look_ups_train_their_weights() -> None:
    """Where inputs share an index, tables and ranges stay, and a note says so."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 24, generator=generator) * 2 - 1
    program = capture(KAN([24, 16, 3], generator).eval(), x[:4])
    module = prepared(program, x, {"lookup": "joint"}, qat.Training(tables=True))
    tables = [node for node, _ in module.compiled.lowered.nodes(JointTable)]
    assert tables
    assert any("share an index" in note for note in module.notes)
    check(module, x[:50] * 1.2)


class Loop(nn.Module):
    """One layer used three times."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.cell, self.out = KAN([6, 6], generator), KAN([6, 3], generator)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.cell(x)
        return self.out(x)


class Residual(nn.Module):
    """Branches that meet in a sum, and an ordinary layer."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.a, self.b, self.out = KAN([6, 6], generator), KAN([6, 6], generator), KAN([6, 3], generator)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(h + self.b(torch.relu(self.linear(h))))


@pytest.mark.slow  # each captures a network of its own
@pytest.mark.parametrize("kind", [Loop, Residual])
@pytest.mark.parametrize("recipe", [{"levels": 16}, {}])
def test_wired_networks_train(kind: Callable[[torch.Generator], nn.Module], recipe: dict[str, Any]) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(100, 6, generator=generator) * 2 - 1
    program = capture(kind(generator).eval(), x[:4])
    check(prepared(program, x, recipe, qat.Training(index="lsq+" if recipe else None)), x[:40] * 1.2)


@pytest.mark.slow  # captures a network of its own
def test_float_indices_train() -> None:
    """A norm beside a table makes both read real values, of which the table finds rows in float."""
    x = torch.rand(100, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    program = capture(fast_kan.build((6, 5, 3)).eval(), x[:4])
    module = prepared(program, x, {"levels": 16}, qat.Training(index="lsq+"))
    assert "float" in {table.input for _, table in module.compiled.lowered.nodes(TableExpansion)}
    assert len(list(module.indices.parameters())) == 8
    check(module, x[:40] * 1.2)
