"""Sweeps, anatomies and looks at inputs against what can be computed otherwise."""

import numpy as np
import pytest
import torch

from kancompile.diagnosis.anatomy import Anatomy, dissect
from kancompile.diagnosis.diagnosing import open_laboratory, samples_for
from kancompile.diagnosis.input_faults import compare_distributions, find_outliers
from kancompile.diagnosis.laboratory import Laboratory, constant_bytes
from kancompile.diagnosis.sensitivity import branch_programs, sensitivities_of
from kancompile.diagnosis.suspects import suspects
from kancompile.errors.exceptions import KanCompileError
from kancompile.ir import Expansion, IntegerContraction
from kancompile.recipe import Recipe, SettledRecipe, read_recipe
from kancompile.validation.error_measures import ErrorMeasure
from kancompile.validation.input_region import grid_of
from tests.diagnosis.planted_faults import captured, samples, trained

HIDDEN, FIRST = "layers.1", "layers.0"


def laboratory(**recipe: object) -> tuple[Laboratory, SettledRecipe]:
    chosen = read_recipe(recipe)
    fitting, judging, _ = samples_for(samples("calibration").pair, samples("test").pair, chosen, 0.2, 0)
    model = trained("efficient_kan")
    found = open_laboratory(model, fitting, judging, chosen, 0, "cpu", captured("efficient_kan"))
    return found, found.recipe


def dissected(name: str, **keys: object) -> Anatomy:
    lab, recipe = laboratory(layers={name: keys})
    return dissect(lab, recipe, name)


def test_an_outcome_is_the_error_of_the_simulation() -> None:
    lab, recipe = laboratory(weight_bits=3, method="uniform")
    outcome, measure = lab.outcome(recipe), ErrorMeasure()
    x, y = lab.judging.samples, lab.judging.labels
    assert y is not None
    found = lab.lowered(recipe)(x)
    measure.add(lab.program(x), found, "output")
    assert outcome.sqnr_db == pytest.approx(measure.sqnr_db, rel=1e-9)
    assert outcome.score == pytest.approx(100 * float((found.argmax(1) == y).double().mean()))


def test_errors_of_branches_add_up_to_the_error_of_the_layer() -> None:
    lab, recipe = laboratory(layers={HIDDEN: {"weight_bits": 3, "method": "uniform"}})
    lowered = lab.lowered(lab.alone(recipe, HIDDEN))
    x = lab.x[:64]
    exact = lab.program(x)
    branches = list(branch_programs(lab, lowered, HIDDEN))
    assert len(branches) == 2
    together = sum(program(x) - exact for _, program in branches)
    whole = lowered(x) - exact
    layer = next(layer for layer in lowered.layers() if layer.name == HIDDEN)
    contraction = lowered.module(layer.contraction)
    assert isinstance(contraction, IntegerContraction)
    # the layer's bias takes up the mean error of all samples, as whole steps of its scale; the rest is float32 rounding
    offset = (whole - together).mean(0)
    assert float((whole - together - offset).abs().max()) < 1e-4
    assert float(offset.abs().max()) < 0.1 * float(whole.abs().max())


def test_each_fault_shows_in_its_part() -> None:
    assert dissected(HIDDEN, range="percentile", percentile=75.0).share("outside") > 0.9
    assert dissected(HIDDEN, levels=16, range="minmax").share("levels") > 0.8
    assert dissected(HIDDEN, weight_bits=2, method="uniform").share("weights") > 0.95


def test_parts_of_an_anatomy_are_near_the_whole_error() -> None:
    lab, recipe = laboratory(layers={HIDDEN: {"weight_bits": 4, "method": "uniform", "levels": 64}})
    anatomy = dissect(lab, recipe, HIDDEN)
    lowered = lab.lowered(lab.alone(recipe, HIDDEN))
    error = float((lowered(lab.x) - lab.program(lab.x)).double().square().mean())
    # parts are taken as independent, which costs a factor of two at most where two of equal size are equal in sign
    assert error / 2 < anatomy.total < 2 * error


def test_predictions_follow_the_parts() -> None:
    anatomy = dissected(HIDDEN, weight_bits=2, method="uniform")
    _, recipe = laboratory(layers={HIDDEN: {"weight_bits": 2, "method": "uniform"}})
    found = suspects(recipe[HIDDEN], anatomy, noise=1.0, alone=1.0, signal=100.0)
    more = {s.change.layers[HIDDEN].get("weight_bits"): s.predicted_noise for s in found if s.kind == "weight bits"}
    others = 1 - anatomy.share("weights")
    # six more bits leave 4^-6 of the rounding error; other parts stay or shrink
    assert more[8] <= others + 4.0**-6
    assert "rounding method" in {suspect.kind for suspect in found}


def test_constant_bytes_count_what_a_file_stores() -> None:
    lab, recipe = laboratory(weight_bits=4, method="uniform", levels=64)
    weights = (64 * 9 * 64 + 64 * 9 * 10) // 2
    tables = sum(
        int(lab.lowered(recipe).module(target).get_buffer("table").numel())
        for layer in lab.lowered(recipe).layers()
        for target in layer.expansions
    )
    assert constant_bytes(lab.lowered(recipe)) == weights + tables


def test_all_but_one_and_only_one_agree_for_two_layers() -> None:
    lab, recipe = laboratory()
    whole = [
        entry
        for name in lab.integer_layers(recipe)
        for entry in sensitivities_of(lab, recipe, name)
        if entry.branch is None
    ]
    assert [entry.layer for entry in whole] == [FIRST, HIDDEN]
    assert whole[0].without is not None
    # with two layers, all but the first is only the second
    assert whole[0].without.noise == pytest.approx(whole[1].only.noise, rel=0.02)


def test_outliers_are_the_features_that_stretch_the_range() -> None:
    x = torch.rand(100, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert find_outliers(x) is None
    x[3, 7], x[5, 2] = 60.0, -20.0
    found = find_outliers(x)
    assert found is not None
    assert found.features == (7, 2)
    assert found.stretch == pytest.approx(80 / 2, rel=0.05)
    assert find_outliers(x * 5) is not None
    assert find_outliers(torch.randn(100, 3, generator=torch.Generator().manual_seed(1))) is None


@pytest.mark.parametrize(
    ("factor", "offset", "text"), [(255.0, 0.0, "x / 255"), (0.5, 0.5, "2 x - 1"), (7.3, 2.1, "0.1")]
)
def test_scalings_are_recognised(factor: float, offset: float, text: str) -> None:
    generator = torch.Generator().manual_seed(2)
    data = torch.rand(500, 8, generator=generator)
    other = torch.rand(400, 8, generator=generator) * factor + offset
    if text == "2 x - 1":
        data, other = data * 2 - 1, torch.rand(400, 8, generator=generator)
    found = compare_distributions(other, data)
    assert text in found.scaling.text
    if text != "2 x - 1":
        assert found.scaling.factor == pytest.approx(1 / factor, rel=0.02)
        assert found.scaling.offset == pytest.approx(-offset / factor, abs=0.02)
    assert found.scaled_distance < 0.05 < found.distance


def test_the_grid_of_a_spline_is_its_support() -> None:
    program = captured("efficient_kan")
    expansion = program.module(program.layers()[0].expansions[0])
    assert isinstance(expansion, Expansion)
    grid = grid_of(expansion, 255.0)
    assert grid is not None
    # five intervals of 0.4 over -1 ... 1 and three more knots on either side
    assert grid[0] == pytest.approx(-2.2, abs=0.1)
    assert grid[1] == pytest.approx(2.2, abs=0.1)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(KanCompileError, match="found 8 samples, expected at least 16"):
        samples_for(np.zeros((8, 64), np.float32), None, Recipe(), 0.2, 0)
