"""Every planted fault is ranked first, in two families, with and without data apart; healthy models raise no alarm."""

import json

import numpy as np
import pytest

from kancompile.diagnosis.cause import KINDS
from kancompile.diagnosis.diagnosing import examine, open_laboratory, samples_for
from kancompile.diagnosis.result import Diagnosis
from kancompile.progress import quiet
from kancompile.recipe import read_recipe
from tests.diagnosis.planted_faults import FAMILIES, Samples, captured, samples, trained

HIDDEN, FIRST = "layers.1", "layers.0"


def diagnosed(
    family: str,
    calibration: Samples,
    data: Samples | None = None,
    labelled: bool = True,
    seed: int = 0,
    **recipe: object,
) -> Diagnosis:
    chosen = read_recipe(recipe)
    given = calibration.pair if labelled else calibration.x
    fitting, judging, which = samples_for(given, None if data is None else data.pair, chosen, 0.2, seed)
    with quiet():
        laboratory = open_laboratory(trained(family), fitting, judging, chosen, seed, "cpu", captured(family))
        return examine(laboratory, which, data is not None)


def layers(name: str, **keys: object) -> dict[str, object]:
    return {"layers": {name: keys}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["held out", "data", "unlabelled"])
def test_nothing_stands_out_on_a_healthy_model(family: str, form: str) -> None:
    data = samples("test") if form == "data" else None
    found = diagnosed(family, samples("calibration"), data, labelled=form != "unlabelled")
    assert found.is_healthy, found.text()
    assert "nothing stands out" in found.text()
    assert found.outcome.sqnr_db > 40


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(1, 6))
def test_nothing_stands_out_whatever_is_held_out(family: str, seed: int) -> None:
    assert diagnosed(family, samples("calibration").shuffled(seed), seed=seed).is_healthy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("percentile", [75.0, pytest.param(90.0, marks=pytest.mark.slow)])
def test_a_clipped_range_is_ranked_first(family: str, percentile: float) -> None:
    found = diagnosed(family, samples("calibration"), **layers(HIDDEN, range="percentile", percentile=percentile))
    first = found.causes[0]
    assert first.stands_out
    assert first.kind in ("table range", "hand-over range")
    assert first.layers == (HIDDEN,)
    assert first.change.layers == {HIDDEN: {"range": "mse"}}
    # what was cut off on both sides, as planted
    assert first.evidence["outside_share"] == pytest.approx(2 * (1 - percentile / 100), abs=0.15)
    assert first.effect.predicted_db is not None
    assert first.effect.gain_db is not None
    assert abs(first.effect.gain_db - first.effect.predicted_db) < 10


@pytest.mark.parametrize(("family", "layer"), [("efficient_kan", HIDDEN), ("chebyshev_kan", FIRST)])
def test_a_layer_of_2_bits_is_ranked_first(family: str, layer: str) -> None:
    found = diagnosed(family, samples("calibration"), labelled=False, **layers(layer, weight_bits=2))
    first = found.causes[0]
    assert first.stands_out
    assert (first.kind, first.layers) == ("weight bits", (layer,))
    assert first.change.layers[layer]["weight_bits"] > 4
    assert first.effect.gain_db is not None
    assert first.effect.gain_db > 15


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("feature", "value", "seed"), [(20, 9999.0, 0), pytest.param(33, -999.0, 1, marks=pytest.mark.slow)]
)
def test_an_outlier_feature_is_ranked_first(family: str, feature: int, value: float, seed: int) -> None:
    planted = samples("calibration").with_outlier(feature, value, 0.1, seed)
    data = samples("test") if seed == 0 else None
    found = diagnosed(family, planted, data, seed=seed, range="minmax")
    first = found.causes[0]
    assert first.stands_out, found.text()
    assert first.kind == "outlier feature"
    assert first.layers == (FIRST,)
    assert first.evidence["features"] == [feature]
    assert first.evidence["stretch"] > 100


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("factor", "offset", "cure"), [(127.5, 127.5, "x / 127.5 - 1"), (0.5, 0.5, "2 x - 1")], ids=["0..255", "0..1"]
)
def test_wrong_preprocessing_is_ranked_first(family: str, apart: bool, factor: float, offset: float, cure: str) -> None:
    planted = samples("calibration").scaled(factor, offset)
    found = diagnosed(family, planted, samples("test") if apart else None)
    first = found.causes[0]
    assert first.stands_out, found.text()
    assert first.kind == "preprocessing"
    assert first.evidence["scaling"] == cure
    assert cure in first.change.text()
    assert first.effect.gain_points is not None
    assert first.effect.gain_points > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_pixels_are_found_without_labels_by_the_grid(family: str) -> None:
    found = diagnosed(family, samples("calibration").scaled(127.5, 127.5), labelled=False)
    first = found.causes[0]
    assert first.kind == "inputs outside the grid"
    assert first.stands_out
    assert "x / 127.5 - 1" in first.change.text()


def test_two_faults_are_ranked_by_what_they_cost() -> None:
    recipe = {"layers": {HIDDEN: {"levels": 16}, FIRST: {"weight_bits": 4, "method": "uniform"}}}
    found = diagnosed("efficient_kan", samples("calibration"), labelled=False, **recipe)
    told = [cause for cause in found.causes if cause.effect.gain_db is not None and cause.stands_out]
    for is_free in (True, False):  # what is free comes first, and 16 bits, which always bring most, last
        gains = [c.effect.gain_db for c in told if c.change.is_free == is_free and c.kind != "precision"]
        assert gains == sorted(gains, reverse=True)
    assert [c.change.is_free for c in told] == sorted((c.change.is_free for c in told), reverse=True)
    assert {"levels", "weight bits"} <= {cause.kind for cause in found.causes}


def test_the_dictionary_is_json_and_names_known_kinds() -> None:
    found = diagnosed("efficient_kan", samples("calibration"), **layers(HIDDEN, levels=16))
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["healthy"] is False
    assert plain["causes"][0]["kind"] == "levels"
    assert {cause["kind"] for cause in plain["causes"]} <= set(KINDS)
    assert {entry["layer"] for entry in plain["sensitivities"]} == {FIRST, HIDDEN}


@pytest.mark.slow
def test_calibration_unlike_the_data_is_named() -> None:
    # the darker half of the digits, in a narrow range, against all of them
    given = samples("calibration")
    dark = Samples(np.clip(given.x, -1, -0.5), given.y)
    found = diagnosed("efficient_kan", dark, samples("test"))
    assert not found.is_healthy
    assert found.causes[0].kind in ("inputs outside the calibrated range", "preprocessing")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(1, 5))
def test_faults_are_ranked_first_whatever_the_seed(family: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    given = samples("calibration").shuffled(seed)
    percentile = float(draw.uniform(65, 92))
    first = diagnosed(family, given, seed=seed, **layers(HIDDEN, range="percentile", percentile=percentile)).causes[0]
    assert (first.kind, first.stands_out) in (("table range", True), ("hand-over range", True))
    layer = [FIRST, HIDDEN][int(draw.integers(2))]
    first = diagnosed(family, given, labelled=False, seed=seed, **layers(layer, weight_bits=2)).causes[0]
    assert (first.kind, first.layers) == ("weight bits", (layer,))
    feature, value = int(draw.integers(64)), float(draw.choice([-9999.0, 500.0, 4000.0]))
    found = diagnosed(family, given.with_outlier(feature, value, 0.1, seed), seed=seed, range="minmax")
    assert (found.causes[0].kind, found.causes[0].evidence["features"]) == ("outlier feature", [feature])
    found = diagnosed(family, given.scaled(127.5, 127.5), samples("test") if seed % 2 else None, seed=seed)
    assert found.causes[0].kind == "preprocessing"
