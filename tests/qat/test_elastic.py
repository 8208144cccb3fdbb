"""One training for several widths: all begin at their own post-training result, share what they learn, and end in files."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kancompile import KanCompileError, qat
from kancompile.data import load_calibration
from kancompile.ir import Program
from kancompile.passes import Lowering
from kancompile.progress import quiet
from kancompile.qat.conversion import quantized
from kancompile.qat.elastic import _steps
from kancompile.recipe import read_recipe
from kancompile.runtimes import RuntimeModel
from tests.compiled_kan import N_HIDDEN, N_IN, N_OUT, make_inputs, make_model
from tests.programs import float_program

RECIPE = {"levels": 16, "lookup": "each", "drift": "off", "goal_sqnr": None}
WIDTHS = (8, 4, 2)


@lru_cache
def lowering() -> Lowering:
    return Lowering(float_program((N_IN, N_HIDDEN, N_OUT), seed=2), make_inputs())


@lru_cache
def facts(bits: int, **recipe: Any) -> Any:
    """What a compiled model says of a program, without its file."""
    whole = read_recipe({"method": "uniform"} | RECIPE | recipe, weight_bits=bits)
    with quiet():
        lowered = lowering()(lowering().settled(whole))
    return SimpleNamespace(
        captured=lowering().program,
        lowered=lowered,
        recipe=whole,
        calibration=load_calibration(make_inputs().numpy()),
        manifest={"seed": 0},
    )


def module(bits: int, training: Any = None, **recipe: Any) -> qat.TrainedModel:
    return qat.prepare_compiled(facts(bits, **recipe), training)


def elastic(training: Any = None, **options: Any) -> qat.ElasticModel:
    return qat.ElasticModel({bits: module(bits, training) for bits in WIDTHS}, **options)


def train(model: qat.ElasticModel, optimizer: torch.optim.Optimizer, steps: int) -> list[tuple[int, float]]:
    x = make_inputs(64, seed=9)
    target = torch.sin(3 * x[:, :3]) + 0.5 * x[:, 3:]
    model.train()
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        found.append((model.active, loss.item()))
    return found


def adam(model: qat.ElasticModel) -> torch.optim.Optimizer:
    return torch.optim.Adam(qat.parameter_groups(model, 0.05))


@torch.no_grad()
def outputs(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return model(x)


def test_all_widths_begin_at_their_result_and_learn_together() -> None:
    model, x = elastic(seed=3), make_inputs(300, seed=3) * 1.5
    before = {bits: one.compiled.lowered for bits, one in model.modules_by_bits().items()}
    assert all(quantized(one) is before[bits] for bits, one in model.modules_by_bits().items())

    history = train(model, adam(model), 45)
    for turn in range(0, 45, 3):
        assert sorted(bits for bits, _ in history[turn : turn + 3]) == [2, 4, 8]
    assert [bits for bits, _ in history] == [model.drawn(step) for step in range(45)]
    for bits, one in model.modules_by_bits().items():
        losses = [loss for width, loss in history if width == bits]
        assert losses[-1] < losses[0], bits
        after: Program = quantized(one)
        assert after is not before[bits]
        assert torch.equal(outputs(model.eval().use(bits), x), after(x))
        assert torch.equal(outputs(one, x), after(x))
    assert model.steps == 45


@pytest.mark.parametrize("weights", ["dsq", "qil"])
def test_other_methods_share_their_weights_too(weights: str) -> None:
    model, x = elastic({"weights": weights, "index": None}), make_inputs(100, seed=3) * 1.5
    assert all(quantized(one) is one.compiled.lowered for one in model.modules_by_bits().values())
    train(model, adam(model), 9)
    for one in model.eval().modules_by_bits().values():
        after = quantized(one)
        assert after is not one.compiled.lowered
        assert torch.equal(outputs(one, x), after(x))


def test_a_shared_change_is_the_same_in_real_units() -> None:
    """Against real weights: of 8 and 4 bits alike, in front of the functions and not of the codes of their tables."""
    model = elastic()
    change: Any = model.moves["layer0_contract"]
    reals = {bits: _steps(one)["layer0_contract"].double() for bits, one in model.modules_by_bits().items()}
    twins: dict[int, Any] = {bits: one.twin("layer0_contract") for bits, one in model.modules_by_bits().items()}
    with torch.no_grad():
        before = {bits: twin.quantizer.latent() * reals[bits] for bits, twin in twins.items()}
        change.move += torch.randn(change.move.shape, generator=torch.Generator().manual_seed(0))
        after = {bits: twin.quantizer.latent() * reals[bits] for bits, twin in twins.items()}
    unit = torch.stack([real.log() for real in reals.values()]).mean(0).exp()
    for bits in WIDTHS:
        moved = (after[bits] - before[bits]) / unit
        torch.testing.assert_close(moved, change.move.detach().double(), rtol=1e-4, atol=1e-4)


def test_narrower_widths_join_later() -> None:
    model = elastic(joins_after=6)
    drawn = [model.drawn(step) for step in range(40)]
    assert set(drawn[:6]) == {8}
    assert set(drawn[6:12]) == {8, 4}
    assert set(drawn[12:]) == {8, 4, 2}


def test_an_elastic_training_resumes(tmp_path: Path) -> None:
    whole = elastic({"index": None})
    train(whole, adam(whole), 7)
    half = elastic({"index": None})
    optimizer = adam(half)
    train(half, optimizer, 4)
    saved = qat.save_checkpoint(half, tmp_path / "state.safetensors", optimizer)
    resumed = elastic({"index": None})
    optimizer = adam(resumed)
    qat.load_checkpoint(resumed, saved, optimizer)
    train(resumed, optimizer, 3)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    with torch.no_grad():
        next(resumed.moves.parameters())[0, 0] = math.nan
    with pytest.raises(KanCompileError, match=r"move' after step.*state\.safetensors"):
        train(resumed, optimizer, 1)
    with pytest.raises(KanCompileError, match="NaN"):
        quantized(resumed.at(2))
    other = qat.ElasticModel({bits: module(bits) for bits in (4, 2)})
    with pytest.raises(KanCompileError, match="state of another module"):
        other.load_state_dict({name: value for name, value in whole.state_dict().items() if ".2." not in name})


def test_the_best_state_is_that_of_all_widths() -> None:
    model, x, y = elastic(), make_inputs(50, seed=1), torch.arange(50) % 3
    loss = qat.held_out_loss(model, x, y)
    expected = [functional.cross_entropy(one.compiled.lowered(x), y) for one in model.modules_by_bits().values()]
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-6)
    best = qat.BestState(model, loss)
    train(model, adam(model), 3)
    best.restore()
    assert all(quantized(one) is one.compiled.lowered for one in model.modules_by_bits().values())


def test_wrong_widths_are_refused() -> None:
    with pytest.raises(KanCompileError, match="found 1 widths"):
        qat.ElasticModel({4: module(4)})
    with pytest.raises(KanCompileError, match="found weights 'dorefa'"):
        elastic({"weights": "dorefa"})
    with pytest.raises(KanCompileError, match="one recipe at all widths"):
        qat.ElasticModel({4: module(4), 2: module(2, granularity="branch")})
    with pytest.raises(KanCompileError, match=r"found 5 bits, expected one of the widths \[8, 4, 2\]"):
        elastic().at(5)
    with pytest.raises(KanCompileError, match=r"give module\.at\(bits\)"):
        qat.convert(elastic())


@pytest.mark.slow  # four compilations and files
def test_files_of_four_widths_from_one_training() -> None:
    with quiet():
        model = qat.prepare_elastic(make_model(), make_inputs(), RECIPE, training={"index": "lsq+"})
    assert "weights of 8, 4, 3, 2 bits" in repr(model)
    train(model, adam(model), 40)
    x = make_inputs(1000, seed=4) * 1.5
    for bits, one in model.eval().modules_by_bits().items():
        written = qat.convert(one)
        (found,) = RuntimeModel(written.model_bytes).run(x.numpy())
        np.testing.assert_array_equal(found, outputs(model.use(bits), x).numpy())
        assert written.manifest["layers"][0]["weight_bits"] == bits
