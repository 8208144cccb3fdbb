"""The one ladder: from what is free to what is slow, and all that refine a recipe stay on it."""

import pytest

from kancompile.compiler.ladder import BITS, FREE, FUNCTIONS, KIND_OF_KEY, PRECISION, ROWS, Rung, rungs
from kancompile.diagnosis.anatomy import Anatomy
from kancompile.diagnosis.suspects import suspects
from kancompile.passes.rounding_methods import METHODS, quick_methods
from kancompile.recipe import LayerRecipe

KINDS = [FREE, ROWS, FUNCTIONS, BITS, PRECISION]
CHOICES = [
    LayerRecipe(),
    LayerRecipe(weight_bits=2),
    LayerRecipe(weight_bits=4, method="uniform", range="minmax", levels=64, column_scaling=0.5),
    LayerRecipe(method="gptq", granularity="group", group_size=4, range="percentile", function_error=0.0),
]


def keys(found: list[Rung], kind: str) -> list[object]:
    return [rung.value for rung in found if rung.kind == kind]


@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("is_convolution", [False, True])
def test_rungs_go_from_free_to_slow_and_each_changes_something(chosen: LayerRecipe, is_convolution: bool) -> None:
    found = rungs(chosen, 100, 64, 256, is_convolution)
    order = [KINDS.index(rung.kind) for rung in found]
    assert order == sorted(order)
    assert len({(rung.key, rung.value) for rung in found}) == len(found)
    assert all(getattr(chosen, rung.key) != rung.value for rung in found)
    assert keys(found, ROWS) == [256]
    assert keys(found, FUNCTIONS) == ([chosen.shared_error / 4] if is_convolution and chosen.shared_error else [])
    assert keys(found, BITS) == list(range(chosen.weight_bits + 1, 9))
    assert keys(found, PRECISION) == ["int16", "float"]


def test_integers_off_the_ladder_leave_what_is_wider() -> None:
    assert rungs(LayerRecipe(precision="int16"), 100, 0, 0, False) == [Rung("precision", "float")]
    assert rungs(LayerRecipe(precision="float"), 100, 0, 0, False) == []
    assert rungs(LayerRecipe(lowering="keep"), 100, 64, 256, False) == []


def test_methods_say_themselves_whether_they_are_worth_a_trial() -> None:
    assert quick_methods() == ["gptq", "awq+gptq"]
    assert quick_methods(2048) == ["gptq", "awq+gptq"]
    assert quick_methods(8192) == ["gptq"]
    assert quick_methods(8193) == []
    assert {name for name, method in METHODS.items() if method.quick_columns == 0} == {
        "adaround",
        "awq+adaround",
        "brecq",
    }


@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("is_convolution", [False, True])
def test_a_diagnosis_measures_rungs_of_the_ladder(chosen: LayerRecipe, is_convolution: bool) -> None:
    parts = {"outside": 1.0, "levels": 1.0, "codes": 1.0, "weights": 1.0, "outside_share": 0.1, "outside_judged": 0.1}
    extent = {"low": -1.0, "high": 1.0, "input_low": -2.0, "input_high": 2.0}
    anatomy = Anatomy(
        "a", **parts, **extent, rows=64, weight_bits=chosen.weight_bits, pair_cost=1.0, reads="real", columns=100,
        dead_columns=0, is_convolution=is_convolution,
    )  # fmt: skip
    ladder = [rung.change for rung in rungs(chosen, 100, 64, anatomy.most_rows, is_convolution)]
    tried = [suspect.change.layers["a"] for suspect in suspects(chosen, anatomy, 4.0, 4.0, 100.0)]
    assert all(change in ladder for change in tried)
    assert {key for change in tried for key in change} <= set(KIND_OF_KEY)
    assert {"precision": "int16"} in tried
    assert {"levels": 256} in tried
    assert ({"range": "minmax"} if chosen.range == "mse" else {"range": "mse"}) in tried
