"""A search within so many bytes is no worse than any one key changed by hand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kancompile.compiler.layer_options import ROWS
from kancompile.diagnosis import budget_search
from kancompile.diagnosis.budget_search import BudgetSearch
from kancompile.diagnosis.tuning import tune
from kancompile.ir import Program
from kancompile.recipe import RANGES, SettledRecipe, read_recipe
from tests.diagnosis.planted_faults import samples, trained
from tests.programs import integer_program

NAMES = ("layers.0", "layers.1")
WEIGHTS = {"layers.0": 4000, "layers.1": 500}
GAINS = {"method": {"gptq": 0.5, "awq+gptq": 0.4}, "range": {"minmax": 1.2, "percentile": 0.9}}


class Formula:
    """A laboratory whose errors and bytes follow formulas."""

    def __init__(self, points: list[dict[str, Any]]) -> None:
        self.program, self.x, self.points = integer_program((3, 4, 2)), None, points
        self.memory = SimpleNamespace(get=lambda *_: budget_search._Allocated(json.dumps(self.points)))

    def integer_layers(self, recipe: SettledRecipe) -> list[str]:
        return list(NAMES)

    def outcome(self, recipe: SettledRecipe) -> SimpleNamespace:
        noise = 0.0
        for number, name in enumerate(NAMES):
            layer = recipe[name]
            gain = GAINS["method"].get(layer.rounding_method, 1.0) * GAINS["range"].get(layer.range, 1.0)
            noise += (1 + 3 * number) * gain * 4.0**-layer.bits + (layer.levels or 128) ** -2.0
        return SimpleNamespace(worst_db=-10 * math.log10(noise))

    def file_bytes(self, recipe: SettledRecipe) -> int:
        return 900 + sum(WEIGHTS[name] * recipe[name].bits // 8 + 9 * (recipe[name].levels or 128) for name in NAMES)


def by_hand() -> list[dict[str, dict[str, Any]]]:
    ladders: dict[str, tuple[Any, ...]] = {
        "weight_bits": tuple(range(2, 9)),
        "levels": ROWS,
        "method": ("uniform", "gptq"),
        "range": RANGES,
    }
    scopes = (NAMES, NAMES[:1], NAMES[1:])
    return [{name: {key: value} for name in scope} for key, few in ladders.items() for value in few for scope in scopes]


@pytest.mark.parametrize("max_bytes", [4400, 5600, 7200, 9000])
@pytest.mark.parametrize("points", [[], [{"layers.0": {"weight_bits": 4, "levels": 64}, "layers.1": {"levels": 64}}]])
def test_no_change_by_hand_is_better(points: list[Any], max_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def many(program: Program, x: None) -> int:
        return 1000

    monkeypatch.setattr(budget_search, "trials_for", many)
    laboratory = Formula(points)
    recipe = read_recipe(None).settled(NAMES)
    search = BudgetSearch(cast("Any", laboratory), recipe, max_bytes)
    search.run()
    assert search.changes is not None
    assert search.outcome is not None
    assert laboratory.file_bytes(recipe.with_overrides(search.changes)) <= max_bytes
    changed = [recipe.with_overrides(change) for change in (*by_hand(), *points)]
    best = max(laboratory.outcome(one).worst_db for one in changed if laboratory.file_bytes(one) <= max_bytes)
    assert search.outcome.worst_db >= best - 0.06


def test_where_nothing_fits_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_search, "trials_for", lambda program, x: 1000)
    search = BudgetSearch(cast("Any", Formula([])), read_recipe(None).settled(NAMES), 1000)
    search.run()
    assert search.changes is None


@pytest.mark.slow
def test_digits_within_a_budget_are_better_than_four_bits_and_256_rows_for_all() -> None:
    given, data = samples("calibration"), samples("test")
    found = tune(trained("efficient_kan"), given.x, data.x, max_bytes=40_000)
    assert found.is_met, found.missed
    assert found.outcome.sqnr_db >= 44.4
