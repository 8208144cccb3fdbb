"""The error gate: what misses the ratio is lowered more finely, in the order of the ladder, or the compilation fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import kancompile
from kancompile.compiler.error_gate import ErrorGate
from kancompile.compiler.layer_trials import LayerTrials, Trial
from kancompile.errors import KanCompileError, ThresholdMissedError
from kancompile.recipe import LayerRecipe, SettledRecipe
from kancompile.reporting.facts import goal_missed
from kancompile.runtimes.session import RuntimeModel
from kancompile.targets import TARGETS
from tests.compiled_kan import make_inputs, make_model


def worst_db(compiled: kancompile.CompiledModel, x: torch.Tensor, model: nn.Module | None = None) -> float:
    with torch.no_grad():
        expected = (make_model() if model is None else model)(x).double()
    noise = (RuntimeModel(compiled.model_bytes)(x).double() - expected).square().sum(0)
    return float(10 * torch.log10((expected - expected.mean(0)).square().sum(0) / noise).min())


@pytest.mark.slow
def test_layers_go_up_the_ladder_to_a_limit_and_it_is_said() -> None:
    x = make_inputs()
    plain = kancompile.compile(make_model(), x)
    assert plain.manifest["error_gate"]["refinements"] == []
    assert 30 < worst_db(plain, x) < 60
    held = kancompile.compile(make_model(), x, recipe={"min_sqnr": 70})
    assert worst_db(held, x) >= 70
    steps = held.manifest["error_gate"]["refinements"]
    assert {step["change"].get("precision") for step in steps} <= {"int16", "float", None}
    last = {step["layer"]: step["change"] for step in steps}  # rows may come before
    assert {change["precision"] for change in last.values()} <= {"int16", "float"}
    assert all(step["refined_db"] > step["noise_db"] for step in steps)
    assert all(any(step["layer"] in note and "error gate" in note for note in held.manifest["notes"]) for step in steps)
    changed = set(last)
    for layer in held.manifest["layers"]:
        assert (layer["weight_bits"] == 8) == (layer["name"] not in changed)
    assert held.recipe.for_layer(steps[-1]["layer"]).precision == steps[-1]["change"]["precision"]


@pytest.mark.slow
def test_more_rows_come_before_more_bits_where_they_suffice() -> None:
    held = kancompile.compile(make_model(), make_inputs(), recipe={"levels": 24, "min_sqnr": 30})
    steps = held.manifest["error_gate"]["refinements"]
    assert {"levels": 96} in [step["change"] for step in steps]
    assert {step["kind"] for step in steps} <= {"free", "rows"}
    assert worst_db(held, make_inputs()) >= 30


@pytest.mark.slow
def test_a_goal_leaves_what_the_recipe_chose() -> None:
    """More rows would reach it; the recipe says how many there are, so that it is said and not done."""
    held = kancompile.compile(make_model(), make_inputs(), recipe={"levels": 24})
    gate = held.manifest["error_gate"]
    assert gate["worst"]["sqnr_db"] < 30
    assert not any("levels" in step["change"] for step in gate["refinements"])
    assert gate["next_step"] is not None


@pytest.mark.slow
def test_a_limit_out_of_reach_fails_plainly() -> None:
    with pytest.raises(
        ThresholdMissedError, match=r"output \d: SQNR is \d+\.\d+ dB .* at least 500 .*float32 rounding"
    ):
        kancompile.compile(make_model(), make_inputs(), recipe={"min_sqnr": 500})


def test_without_goal_and_limit_nothing_is_measured() -> None:
    recipe = {"goal_sqnr": None, "levels": 16, "weight_bits": 2}
    free = kancompile.compile(make_model(), make_inputs(), recipe=recipe).manifest["error_gate"]
    assert (free["refinements"], free["worst"], free["next_step"]) == ([], None, None)


class Scaled(nn.Module):
    """Multiply the outputs of a network, for outputs of very different scale."""

    def __init__(self, model: nn.Module, factors: Sequence[float], offsets: Sequence[float] | None = None) -> None:
        super().__init__()
        self.model = model
        self.factors = nn.Buffer(torch.tensor(factors))
        self.offsets = nn.Buffer(torch.tensor([0.0] * len(factors) if offsets is None else offsets))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) * self.factors + self.offsets  # type: ignore[no-any-return]


def test_every_output_counts_and_a_small_one_does_not_hide() -> None:
    """The error of the large output is a thousand times what the small one varies by, if both share a scale; they do not."""
    x = make_inputs()
    model = Scaled(make_model(), [1e3, 1.0, 1e-3])
    compiled = kancompile.compile(model, x)
    gate = compiled.manifest["error_gate"]
    assert gate["outputs_differ_in_scale"]
    assert worst_db(compiled, x, model) >= 30
    assert gate["worst"]["sqnr_db"] == pytest.approx(worst_db(compiled, x, model), abs=3)


@pytest.mark.slow
def test_a_constant_part_of_an_output_does_not_pass_for_signal() -> None:
    x = make_inputs()
    model = Scaled(make_model(), [1.0, 1.0, 1.0], [3000.0, 0.0, 0.0])
    compiled = kancompile.compile(model, x)
    result = compiled.validate(x)
    assert result.compiled.worst is not None
    assert result.compiled.worst_db == pytest.approx(worst_db(compiled, x, model), abs=0.1)
    missed = compiled.validate(x, min_sqnr=200)
    assert "of output 0" in missed.reasons[0] or result.compiled.worst.output != 0


@pytest.mark.slow
def test_what_misses_the_goal_is_told_the_next_step() -> None:
    """A method that the user chose stays; another one would reach the goal for nothing, and is measured."""
    recipe: dict[str, Any] = {"weight_bits": 4, "method": "uniform"}
    compiled = kancompile.compile(make_model(), make_inputs(), recipe=recipe)
    gate = compiled.manifest["error_gate"]
    assert gate["wanted"] == 20
    assert 12 < gate["worst"]["sqnr_db"] < 20
    assert all(layer["weight_bits"] == 4 for layer in compiled.manifest["layers"])
    step = gate["next_step"]
    assert "method" in step["change"]
    assert step["worst_db"] >= 20
    assert step["layers"][0] in step["text"]
    assert f"method={step['change']['method']}" in step["text"]
    # what is predicted is what a compilation does
    after = kancompile.compile(
        make_model(), make_inputs(), recipe=recipe | {"layers": [[name, step["change"]] for name in step["layers"]]}
    )
    assert after.manifest["error_gate"]["worst"]["sqnr_db"] == pytest.approx(step["worst_db"], abs=0.01)


@pytest.mark.slow
def test_bits_that_a_user_chose_stay_and_more_are_named() -> None:
    recipe: dict[str, Any] = {"weight_bits": 2, "method": "awq+gptq", "range": "minmax", "column_scaling": 0.5}
    compiled = kancompile.compile(make_model(), make_inputs(), recipe=recipe)
    gate = compiled.manifest["error_gate"]
    assert 12 < gate["worst"]["sqnr_db"] < 20
    assert all(layer["weight_bits"] == 2 for layer in compiled.manifest["layers"])
    step = gate["next_step"]
    assert step["change"] == {"weight_bits": 8}
    assert step["worst_db"] >= 20
    # the bytes that are named are those of the file
    more = {"layers": [[name, step["change"]] for name in step["layers"]]}
    after = kancompile.compile(make_model(), make_inputs(), recipe=recipe | more)
    assert step["extra_bytes"] == pytest.approx(len(after.model_bytes) - len(compiled.model_bytes), abs=600)


class Differences(nn.Module):
    """Two functions of nearly equal inputs; the first output is their difference, which 8-bit inputs do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Buffer(torch.linspace(-1, 1, 6))
        self.mix = nn.Linear(12, 2, bias=False)
        w = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
        self.mix.weight = nn.Parameter(torch.stack([torch.cat([w[0], -w[0]]), torch.cat([w[1], w[1]])]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.exp(-((2 * (x.unsqueeze(-1) - self.centers)) ** 2)).flatten(1))  # type: ignore[no-any-return]


def test_ruined_outputs_take_16_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, 1, generator=generator) * 2 - 1
    x = torch.cat([x, x + 1e-3 * torch.randn(300, 1, generator=generator)], 1)
    plain = kancompile.compile(Differences().eval(), x, recipe={"goal_sqnr": None})
    assert worst_db(plain, x, Differences()) < 6
    compiled = kancompile.compile(Differences().eval(), x)
    assert compiled.manifest["error_gate"]["refinements"][-1]["change"] == {"precision": "int16"}
    assert worst_db(compiled, x, Differences()) >= 30


class OwnSines(nn.Module):
    """Three sines of every input, each of its own frequency, so that every input has a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frequency = nn.Parameter(1 + 5 * torch.rand(4, 3, generator=generator))
        self.mix = nn.Linear(12, 2, bias=False)
        nn.init.normal_(self.mix.weight, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.sin(x.unsqueeze(-1) * self.frequency).flatten(1))  # type: ignore[no-any-return]


def test_tables_that_are_larger_than_16_bits_give_way_to_them() -> None:
    x = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) * 4 - 2
    plain = kancompile.compile(OwnSines().eval(), x, recipe={"goal_sqnr": None})
    assert worst_db(plain, x, OwnSines()) < 60
    compiled = kancompile.compile(OwnSines().eval(), x, recipe={"goal_sqnr": 60})
    assert compiled.manifest["error_gate"]["refinements"][-1]["change"] == {"precision": "int16"}
    assert worst_db(compiled, x, OwnSines()) >= 60
    assert len(compiled.model_bytes) < len(plain.model_bytes)
    with pytest.raises(
        KanCompileError, match=r"^target 'c99', layer 'layer0': found precision = int16, which the error gate"
    ):
        compiled.for_target("c99")


def test_layers_get_what_all_targets_hold() -> None:
    """Sixteen bits would reach the goal in fewer bytes; C has none, and says where they are."""
    x = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) * 4 - 2
    compiled = kancompile.compile(OwnSines().eval(), x, recipe={"goal_sqnr": 60}, also_for=["c99"])
    gate = compiled.manifest["error_gate"]
    assert all("precision" not in step["change"] for step in gate["refinements"])
    assert gate["next_step"]["change"] == {"precision": "int16"}
    assert gate["next_step"]["text"].endswith("in a file that c99 cannot have")
    in_c = compiled.for_target("c99")
    alone = kancompile.compile(OwnSines().eval(), x, recipe={"goal_sqnr": 60}, target="c99")
    assert alone.model_bytes == in_c.model_bytes
    assert alone.manifest["error_gate"]["next_step"] is None
    missed = goal_missed(alone.manifest, alone.validate(x))
    assert missed is not None
    assert missed.endswith("files of c99 hold integers of 8 bits alone; --target ort-cpu has 16 bits too")
    with pytest.raises(ThresholdMissedError, match="every layer in int8 already, the finest that target 'c99' holds"):
        kancompile.compile(OwnSines().eval(), x, recipe={"min_sqnr": 80}, target="c99")


def test_rows_stay_bytes_where_a_target_has_no_others() -> None:
    held = [TARGETS["qnn"].holds({"levels": rows}) for rows in (32, 256, 1024)]
    assert held == [True, True, False]
    assert TARGETS["c99"].holds({"levels": 1024})
    x = torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) * 4 - 2
    compiled = kancompile.compile(OwnSines().eval(), x, recipe={"goal_sqnr": 60}, target="qnn")
    assert compiled.recipe.for_layer("layer0").levels == 256  # of itself it takes 2,048
    assert all(step["change"].get("levels", 0) <= 256 for step in compiled.manifest["error_gate"]["refinements"])
    with pytest.raises(KanCompileError, match="use levels = 256 for this layer"):
        kancompile.compile(OwnSines().eval(), x, recipe={"levels": 512}, target="qnn")


def test_classes_that_stay_are_good_enough() -> None:
    """With labels of classes the error of the scores does not matter while no more decisions change than chance explains."""
    x = make_inputs(200)
    with torch.no_grad():
        decisions = make_model()(x).argmax(1)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(200, generator=generator) < 0.3
    labels = torch.where(wrong, torch.randint(0, 3, (200,), generator=generator), decisions)
    recipe = {"goal_sqnr": 60}
    labeled = kancompile.compile(make_model(), (x, labels), recipe=recipe).manifest["error_gate"]
    assert labeled["next_step"] is None
    assert labeled["refinements"] == []
    assert labeled["worst"]["sqnr_db"] < 60


@pytest.mark.slow
def test_a_budget_of_bytes_leaves_only_what_is_free() -> None:
    compiled = kancompile.compile(
        make_model(), make_inputs(), recipe={"weight_bits": 8, "max_bytes": 20000, "goal_sqnr": 50}
    )
    assert {step["kind"] for step in compiled.manifest["error_gate"]["refinements"]} <= {"free"}


@pytest.mark.slow
def test_a_layer_does_not_go_back_to_a_recipe_that_it_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step promises much and brings little, so that the goal is never met."""
    left: dict[str, list[LayerRecipe]] = {}
    take = ErrorGate._taken

    def taken(gate: ErrorGate, recipe: SettledRecipe, name: str, *rest: Any) -> SettledRecipe:
        refined = take(gate, recipe, name, *rest)
        left.setdefault(name, []).append(recipe[name])
        assert refined[name] not in left[name]
        return refined

    def trial(trials: LayerTrials, recipe: SettledRecipe, name: str, change: Mapping[str, Any]) -> Trial:
        return Trial(torch.full((3,), 1e-9, dtype=torch.float64), 0)

    monkeypatch.setattr(ErrorGate, "_taken", taken)
    monkeypatch.setattr(LayerTrials, "trial", trial)
    compiled = kancompile.compile(make_model(), make_inputs(), recipe={"levels": 24, "goal_sqnr": 200})
    assert sum(map(len, left.values())) > 4
    plain = kancompile.compile(make_model(), make_inputs(), recipe={"levels": 24, "goal_sqnr": None})
    assert worst_db(compiled, make_inputs()) >= worst_db(plain, make_inputs())  # what made it worse is not kept
