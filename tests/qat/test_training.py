"""Training begins at the post-training result, computes what the file computes, and ends in a file."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kancompile import KanCompileError, compile, qat
from kancompile.compiler import CompiledModel
from kancompile.data import load_calibration
from kancompile.ir import IntegerContraction, TableExpansion
from kancompile.passes import check_pairs, lower
from kancompile.progress import quiet
from kancompile.qat import preparation
from kancompile.qat.conversion import quantized
from kancompile.qat.methods import INDEX_METHODS, WEIGHT_METHODS
from kancompile.qat.table import constant_functions
from kancompile.recipe import read_recipe
from kancompile.runtimes import RuntimeModel
from tests.compiled_kan import make_inputs, make_model

RECIPE = {"weight_bits": 4, "levels": 16, "method": "uniform", "drift": "off", "goal_sqnr": None}


@lru_cache
def four_bits() -> CompiledModel:
    with quiet():
        return compile(make_model(), make_inputs(), recipe=RECIPE)


def lowered_by(**recipe: object) -> CompiledModel:
    """The same model lowered by another recipe, without its file."""
    first = four_bits()
    changed = read_recipe({**RECIPE, **recipe})
    with quiet():
        lowered = lower(first.captured, first.calibration.samples, changed)
    return dataclasses.replace(first, lowered=lowered, recipe=changed)


def train(module: qat.TrainedModel, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Fit the outputs of another network, so that there is something to learn."""
    x = make_inputs(64, seed=9)
    target = torch.sin(3 * x[:, :3]) + 0.5 * x[:, 3:]
    module.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.mse_loss(module(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def outputs(module: qat.TrainedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(x)
    return found


@pytest.mark.parametrize(
    ("weights", "index"), [(weights, None) for weights in WEIGHT_METHODS] + [("lsq", index) for index in INDEX_METHODS]
)
def test_without_training_the_program_stays_and_with_it_all_bits_agree(weights: str, index: str | None) -> None:
    compiled = four_bits()
    module = qat.prepare_compiled(compiled, {"weights": weights, "index": index})
    assert quantized(module) is compiled.lowered
    x = make_inputs(400, seed=3) * 1.5  # beyond the ranges too
    assert torch.equal(outputs(module.train(), x), compiled.lowered(x))

    losses = train(module, torch.optim.Adam(qat.parameter_groups(module, 0.02)), 25)
    assert losses[-1] < losses[0]
    after = quantized(module)
    assert after is not compiled.lowered
    assert torch.equal(outputs(module.eval(), x), after(x))
    assert torch.equal(outputs(module.train(), x), after(x))
    assert not torch.equal(compiled.lowered(x), after(x))


def test_the_file_of_a_trained_module_gives_its_outputs() -> None:
    compiled = four_bits()
    module = qat.prepare_compiled(compiled, qat.Training(index="lsq+"))
    assert qat.convert(module).model_bytes == compiled.model_bytes
    train(module, torch.optim.Adam(qat.parameter_groups(module, 0.02)), 25)
    written = qat.convert(module)
    assert qat.convert(module, target="c99").manifest["target"] == "c99"
    x = make_inputs(1000, seed=4) * 1.5
    (found,) = RuntimeModel(written.model_bytes).run(x.numpy())
    np.testing.assert_array_equal(found, written.program(x).numpy())
    np.testing.assert_array_equal(found, outputs(module.eval(), x).numpy())
    assert written.audit.to_dict() == compiled.audit.to_dict()
    assert any("quantization-aware" in note for note in written.program.notes)


def test_prepare_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def compiles(*arguments: object, **options: object) -> CompiledModel:
        asked.extend([*arguments, options])
        return four_bits()

    monkeypatch.setattr(preparation, "compile", compiles)
    module = qat.prepare("model", "data", RECIPE, training={"index": "lsq"}, seed=3)
    assert asked == ["model", "data", {"recipe": RECIPE, "seed": 3, "device": "cpu", "trust": False, "dynamic": None}]
    assert module.compiled is four_bits()
    assert len(repr(module).splitlines()) == 3


def test_other_forms_of_tables_train_too() -> None:
    """Tables of many rows hand over scaled values, and keep their index."""
    compiled = lowered_by(levels=1024)
    module = qat.prepare_compiled(compiled)
    x = make_inputs(300, seed=3) * 1.5
    assert torch.equal(outputs(module.train(), x), compiled.lowered(x))
    losses = train(module, torch.optim.Adam(qat.parameter_groups(module, 0.02)), 25)
    assert losses[-1] < losses[0]
    assert torch.equal(outputs(module, x), quantized(module)(x))
    few = lowered_by(weight_bits="ternary", table_bits=3)
    module = qat.prepare_compiled(few, {"index": "lsq+"})
    train(module, torch.optim.Adam(qat.parameter_groups(module, 0.1)), 12)
    after = quantized(module)
    assert torch.equal(outputs(module, x), after(x))
    assert all(contraction.is_ternary for _, contraction in after.nodes(IntegerContraction))
    assert all(int(table.table.max()) < 8 for _, table in after.nodes(TableExpansion))
    grouped = lowered_by(weight_bits=2, granularity="group", group_size=2)
    module = qat.prepare_compiled(grouped)
    train(module, torch.optim.Adam(qat.parameter_groups(module, 0.02)), 3)
    assert torch.equal(outputs(module, x), quantized(module)(x))
    with pytest.raises(KanCompileError, match=r"no table whose index can be trained.*1024 rows"):
        qat.prepare_compiled(compiled, {"index": "lsq"})


def test_sums_cannot_come_to_saturate() -> None:
    """Weights of 8 bits move as far as every processor multiplies exactly, beside tables that stay."""
    module = qat.prepare_compiled(lowered_by(weight_bits=8))
    assert any("tables and ranges stay" in note for note in module.notes)
    check_pairs(quantized(module))
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name.endswith("quantizer.weight"):
                value.add_(torch.where(value > 0, 100.0, -100.0))
    moved = quantized(module)
    assert moved is not module.compiled.lowered
    check_pairs(moved)
    x = make_inputs(300, seed=3) * 1.5
    assert torch.equal(outputs(module, x), moved(x))
    twin: Any = module.twin("layer1_contract")
    twin.quantizer.limits = None
    with pytest.raises(KanCompileError, match="can leave int16"):
        qat.convert(module)
    free = qat.prepare_compiled(lowered_by(weight_bits=8, cpu="x86-vnni"), {"index": "lsq+"})
    assert not free.notes


def test_training_resumes_where_it_was_saved(tmp_path: Path) -> None:
    def begin() -> tuple[qat.TrainedModel, torch.optim.Optimizer]:
        module = qat.prepare_compiled(four_bits(), {"index": "lsq+"})
        return module, torch.optim.Adam(qat.parameter_groups(module, 0.02))

    whole, optimizer = begin()
    train(whole, optimizer, 6)
    half, optimizer = begin()
    train(half, optimizer, 3)
    qat.save_checkpoint(half, tmp_path / "state.safetensors", optimizer)
    resumed, optimizer = begin()
    qat.load_checkpoint(resumed, tmp_path / "state.safetensors", optimizer)
    assert int(resumed.steps) == 3
    train(resumed, optimizer, 3)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    other = qat.prepare_compiled(four_bits(), {"weights": "dsq", "index": "lsq+"})
    with pytest.raises(KanCompileError, match="state of another module"):
        qat.load_checkpoint(other, tmp_path / "state.safetensors")
    qat.save_checkpoint(whole, tmp_path / "alone.safetensors")
    with pytest.raises(KanCompileError, match="no optimizer"):
        qat.load_checkpoint(whole, tmp_path / "alone.safetensors", optimizer)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "state.safetensors").read_bytes()[:-9])
    with pytest.raises(KanCompileError, match="cannot be read"):
        qat.load_checkpoint(whole, tmp_path / "torn.safetensors")
    with pytest.raises(KanCompileError, match="found no file"):
        qat.load_checkpoint(whole, tmp_path / "missing.safetensors")


def test_divergence_names_step_parameter_and_state(tmp_path: Path) -> None:
    module = qat.prepare_compiled(four_bits())
    optimizer = torch.optim.Adam(qat.parameter_groups(module, 0.01))
    train(module, optimizer, 2)
    saved = qat.save_checkpoint(module, tmp_path / "good.safetensors")
    with torch.no_grad():
        next(value for name, value in module.named_parameters() if name.endswith("layer1_contract.bias"))[0] = math.nan
    with pytest.raises(KanCompileError, match=r"layer1_contract\.bias' after step 2.*good\.safetensors"):
        train(module, optimizer, 1)
    with pytest.raises(KanCompileError, match="NaN"):
        qat.convert(module)
    with pytest.raises(KanCompileError, match="NaN"):
        qat.save_checkpoint(module, saved)


def test_the_compiled_model_and_copies_stay_as_they_are() -> None:
    compiled = four_bits()
    before = copy.deepcopy(compiled.lowered.graph_module.state_dict())
    module = qat.prepare_compiled(compiled)
    other = copy.deepcopy(module)
    train(module, torch.optim.Adam(qat.parameter_groups(module, 0.02)), 3)
    after = compiled.lowered.graph_module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert quantized(other) == other.compiled.lowered


def test_parameter_groups_have_every_parameter_once() -> None:
    module = qat.prepare_compiled(four_bits(), {"index": "qil", "weights": "qil"})
    groups = qat.parameter_groups(module, 0.5, weight_decay=0.1)
    listed = [id(value) for group in groups for value in group["params"]]
    assert sorted(listed) == sorted(map(id, module.parameters()))
    assert [group["lr"] for group in groups] == [0.5, 0.5, 0.05]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]


def test_the_best_state_comes_back() -> None:
    module = qat.prepare_compiled(four_bits())
    x, y = make_inputs(50, seed=1), torch.arange(50) % 3
    best = qat.BestState(module, qat.held_out_loss(module, x, y))
    train(module, torch.optim.SGD(module.parameters(), lr=0.1), 2)
    assert not best.offer(math.nan)
    assert not best.offer(best.loss)
    best.restore()
    assert quantized(module) is module.compiled.lowered
    assert module.training
    expected = functional.cross_entropy(module.compiled.lowered(x), y)
    assert best.loss == pytest.approx(float(expected), rel=1e-6)


def test_distillation_is_the_divergence_of_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(8, 3, generator=generator).requires_grad_()
    theirs = torch.randn(8, 3, generator=generator)
    qat.distillation_loss(ours, theirs, temperature=2.0).backward()
    expected = 2.0 * (torch.softmax(ours.detach() / 2, 1) - torch.softmax(theirs / 2, 1)) / 8
    torch.testing.assert_close(ours.grad, expected)
    with pytest.raises(KanCompileError, match="expected"):
        qat.distillation_loss(ours, theirs[:, :2])


def test_choices_that_do_not_exist_are_refused() -> None:
    with pytest.raises(KanCompileError, match=r"weights 'pact', which is a method for index"):
        qat.Training(weights="pact")
    with pytest.raises(KanCompileError, match="expected one of"):
        qat.Training(index="awq")
    with pytest.raises(KanCompileError, match="bits belong to the recipe"):
        qat.prepare_compiled(four_bits(), {"weight_bits": 4})
    with pytest.raises(KanCompileError, match="tables"):
        qat.Training(tables=1)  # type: ignore[arg-type]
    with pytest.raises(KanCompileError, match="expected a mapping"):
        qat.prepare_compiled(four_bits(), "lsq")  # type: ignore[arg-type]
    with pytest.raises(KanCompileError, match="was not prepared with"):
        qat.convert(qat.prepare_compiled(four_bits()), recipe=read_recipe(None))
    with pytest.raises(KanCompileError, match="prepare returned"):
        qat.convert(torch.nn.Identity())
    floating = dataclasses.replace(four_bits(), lowered=four_bits().captured)
    with pytest.raises(KanCompileError, match="no layer that computes in integers"):
        qat.prepare_compiled(floating)


def test_statistics_look_at_live_columns_alone() -> None:
    """A pixel that never varies counts in no maximum and no gradient scale."""
    x = make_inputs().clone()
    x[:, 2] = 0.25
    compiled = dataclasses.replace(four_bits(), calibration=load_calibration(x.numpy()))
    twin: Any = qat.prepare_compiled(compiled, {"weights": "dorefa"}).twin("layer0_contract")
    quantizer = twin.quantizer
    live = quantizer.live
    assert not bool(live.reshape(6, -1)[2].any())
    assert bool(live.reshape(6, -1)[[0, 1, 3, 4, 5]].any(1).all())
    with torch.no_grad():
        before, _ = quantizer()
        quantizer.weight[:, ~live] += 100.0
        after, _ = quantizer()
    assert torch.equal(after[:, live], before[:, live])


def test_functions_without_slope_are_recognized() -> None:
    assert constant_functions([torch.zeros(4, 2), torch.full((2, 2), math.nan)])
    assert not constant_functions([torch.zeros(4, 2), torch.eye(2)])


def test_slopes_are_mean_derivatives_over_cells() -> None:
    """Against the derivatives of the float functions by autograd, at many points of each cell."""
    module = qat.prepare_compiled(four_bits())
    twin: Any = module.twin("layer1_expand0")
    functions, index, scale = twin.functions, twin.table.index, twin.scale
    rows = index.rows().float()
    inside = (torch.arange(200) + 0.5) / 200 - 0.5
    points = (rows[:, None] + inside * index.scale).flatten()
    x = points[:, None].expand(-1, functions.n_in).contiguous().requires_grad_()
    derivatives = torch.stack(
        [torch.autograd.grad(functions(x)[:, 0, k].sum(), x)[0][:, 0] for k in range(functions.k)], dim=1
    )
    expected = derivatives.reshape(len(rows), 200, -1).mean(1) / scale
    torch.testing.assert_close(twin.known_slope, expected, rtol=2e-2, atol=0.02 * float(expected.abs().max()))
