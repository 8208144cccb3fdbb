"""Recipes: every key checked, every source equal, overrides by layer, one canonical form."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kancompile.errors.exceptions import KanCompileError
from kancompile.recipe import GRANULARITIES, METHODS, Recipe, describe_keys, read_recipe

TOML = """
weight_bits = 4
method = "gptq"
levels = 256

[layers."layers.*"]
granularity = "group"
group_size = 16

[layers."layers.1"]
weight_bits = 8
"""


def test_defaults_are_valid_and_apply_to_every_layer() -> None:
    recipe = read_recipe()
    assert recipe == Recipe()
    assert recipe.for_layer("anything").weight_bits == 8
    recipe.check_layers([])


def test_a_mapping_toml_json_and_keywords_give_equal_recipes(tmp_path: Path) -> None:
    mapping = {
        "weight_bits": 4,
        "method": "gptq",
        "levels": 256,
        "layers": {"layers.*": {"granularity": "group", "group_size": 16}, "layers.1": {"weight_bits": 8}},
    }
    (tmp_path / "r.toml").write_text(TOML)
    (tmp_path / "r.json").write_text(json.dumps(mapping))
    recipes = [
        read_recipe(mapping),
        read_recipe(tmp_path / "r.toml"),
        read_recipe(str(tmp_path / "r.json")),
        read_recipe(**mapping),
        read_recipe(read_recipe(mapping)),
    ]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert len({recipe.sha256() for recipe in recipes}) == 1
    assert len({hash(recipe) for recipe in recipes}) == 1


def test_later_patterns_win_key_by_key() -> None:
    recipe = read_recipe(layers={"*": {"weight_bits": 3, "method": "awq"}, "layers.0": {"weight_bits": 6}})
    assert (recipe.for_layer("layers.0").weight_bits, recipe.for_layer("layers.0").method) == (6, "awq")
    assert recipe.for_layer("layers.1").weight_bits == 3
    reverse = read_recipe(layers={"layers.0": {"weight_bits": 6}, "*": {"weight_bits": 3}})
    assert reverse.for_layer("layers.0").weight_bits == 3
    assert recipe.sha256() != read_recipe(layers=dict(reversed(recipe.to_dict()["layers"].items()))).sha256()


def test_keywords_have_the_last_word() -> None:
    recipe = read_recipe(
        {"weight_bits": 4, "layers": {"a": {"levels": 64}}}, weight_bits=5, layers=[("a", {"levels": 32})]
    )
    assert recipe.weight_bits == 5
    assert recipe.for_layer("a").levels == 32


def test_a_layer_may_leave_a_general_group_granularity() -> None:
    recipe = read_recipe(granularity="group", group_size=8, layers={"b": {"granularity": "channel"}})
    assert recipe.for_layer("a").group_size == 8
    assert recipe.for_layer("b").group_size is None


values = st.fixed_dictionaries(
    {},
    optional={
        "weight_bits": st.integers(2, 8),
        "levels": st.none() | st.integers(16, 4096),
        "method": st.sampled_from([method for method in METHODS if method != "hawq-v2"]),
        "percentile": st.floats(50, 100),
        "column_scaling": st.none() | st.floats(0, 1),
        "function_error": st.floats(0, 1e-2),
    },
)


@given(base=values, layers=st.dictionaries(st.text("ab.*", min_size=1, max_size=4), values, max_size=3))
def test_plain_data_json_and_toml_round_trip(base: dict[str, Any], layers: dict[str, dict[str, Any]]) -> None:
    recipe = read_recipe(base, layers=layers)
    assert read_recipe(recipe.to_dict()) == recipe
    assert read_recipe(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert read_recipe(recipe.to_dict()).canonical_json() == recipe.canonical_json()


def test_printed_toml_reads_back(tmp_path: Path) -> None:
    recipe = read_recipe(method="gptq", levels=99, layers={"layers.*": {"weight_bits": 3, "range": "minmax"}})
    for with_meanings in (False, True):
        (tmp_path / "r.toml").write_text(recipe.to_toml(with_meanings))
        assert read_recipe(tmp_path / "r.toml") == recipe
    assert all(meaning in recipe.to_toml(True) for *_, meaning in describe_keys())


def test_equal_values_of_another_type_hash_equally() -> None:
    assert read_recipe(column_scaling=1).sha256() == read_recipe(column_scaling=1.0).sha256()
    assert (
        read_recipe(layers={"a": {"column_scaling": 1}}).sha256()
        == read_recipe(layers={"a": {"column_scaling": 1.0}}).sha256()
    )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"weight_bit": 4}, "unknown key 'weight_bit'; did you mean 'weight_bits'?"),
        ({"zzz": 4}, "unknown key 'zzz'; valid keys are"),
        ({"weight_bits": 1}, "weight_bits is 1, expected an integer 2 to 8"),
        ({"weight_bits": 9}, "weight_bits is 9"),
        ({"weight_bits": 4.0}, "weight_bits is 4.0, expected an integer"),
        ({"weight_bits": True}, "weight_bits is True"),
        ({"weight_bits": None}, "weight_bits is None"),
        ({"weight_bits": "4"}, "weight_bits is '4'"),
        ({"levels": 3}, "levels is 3, expected an integer 4 to 65536 or unset"),
        ({"layers": {"a": {"method": "hawq-v2"}}}, "layers 'a': method 'hawq-v2' divides bits between layers"),
        ({"levels": 70000}, "levels is 70000"),
        ({"method": "gtpq"}, "method is 'gtpq', expected one of .*did you mean 'gptq'"),
        ({"method": ["gptq"]}, r"method is \['gptq'\]"),
        ({"percentile": float("nan")}, "percentile is nan"),
        ({"column_scaling": 1.5}, "column_scaling is 1.5"),
        ({"lookup": "joint", "granularity": "branch"}, "lookup 'joint' with granularity 'branch'"),
        ({"function_error": 0.5}, "function_error is 0.5"),
        ({"granularity": "group"}, "granularity 'group' with group_size None"),
        ({"group_size": 4}, "granularity 'channel' with group_size 4"),
        ({"layers": 3}, "layers of type int"),
        ({"layers": {"a": 3}}, r'quote patterns with dots, \[layers."layers.0"\]'),
        ({"layers": {"layers": {"0": {"weight_bits": 4}}}}, "unknown key '0'"),
        ({"layers": {"a": {"levles": 3}}}, "layers 'a': unknown key 'levles'; did you mean 'levels'"),
        ({"layers": {"a": {"storage": "fastest"}}}, "holds for the whole model"),
        ({"layers": {"a": {"weight_bits": 1}}}, r"weight_bits is 1.*\(in layers 'a'\)"),
    ],
)
def test_wrong_recipes_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(KanCompileError, match=text):
        read_recipe(given)


def test_overrides_that_do_not_fit_together_are_found_with_the_layers() -> None:
    recipe = read_recipe(layers={"a": {"granularity": "group"}})
    with pytest.raises(KanCompileError, match="for layer 'a'"):
        recipe.settled(["a"])


def test_a_pattern_without_a_layer_is_an_error_that_lists_the_layers() -> None:
    recipe = read_recipe(layers={"layers.*": {}, "layer.0": {"weight_bits": 4}})
    with pytest.raises(
        KanCompileError, match=r"pattern 'layer.0' matches no layer, expected one of \['layers.0', 'head'\]"
    ):
        recipe.check_layers(["layers.0", "head"])


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("r.toml", "weight_bits = = 4", "expected valid TOML"),
        ("r.json", "{", "expected valid JSON"),
        ("r.json", "[1]", "found a list, expected a JSON object"),
        ("r.yaml", "a: 1", "suffix '.yaml'"),
        ("r.toml", b"\xff\xfe", "cannot be read"),
    ],
)
def test_unreadable_files_are_refused(name: str, content: str | bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KanCompileError, match=text):
        read_recipe(tmp_path / name)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KanCompileError, match="cannot be read"):
        read_recipe(tmp_path / "absent.toml")
    with pytest.raises(KanCompileError, match="found int, expected a mapping"):
        read_recipe(3)  # type: ignore[arg-type]


def test_recipes_offer_exactly_the_rounding_methods_that_exist() -> None:
    from kancompile.passes import rounding_methods as methods

    assert set(METHODS) == {*methods.METHODS, "hawq-v2"}


def test_hawq_allocates_the_bits_asked_for_on_average() -> None:
    assert read_recipe(method="hawq-v2", weight_bits=3).allocated_bits == 3.0
    assert read_recipe(method="hawq-v2", bits_average=2.5).allocated_bits == 2.5
    assert read_recipe(method="hawq-v2", max_bytes=1000).allocated_bits is None
    assert read_recipe(weight_bits=3).allocated_bits is None


def test_recipes_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Recipe().weight_bits = 4  # type: ignore[misc]
    assert set(GRANULARITIES) == {"channel", "branch", "group"}


def test_overrides_of_a_layer_are_kept_in_one_pattern() -> None:
    recipe = read_recipe({"layers": {"a": {"weight_bits": 2, "method": "uniform"}, "*": {"weight_bits": 3}}})
    changed = recipe.with_overrides({"a": {"levels": 64}}).with_overrides({"a": {"levels": 128}})
    assert [pattern for pattern, _ in changed.layers] == ["*", "a"]
    for name in ("a", "b"):
        before, after = recipe.for_layer(name), changed.for_layer(name)
        assert (after.weight_bits, after.method) == (before.weight_bits, before.method)
    assert changed.for_layer("a").levels == 128
    assert read_recipe(tomllib.loads(changed.to_toml())) == changed


def test_a_recipe_made_from_a_recipe_keeps_a_pattern_that_stands_twice() -> None:
    recipe = Recipe(layers=[("a", {"weight_bits": 2}), ("a", {"levels": 64})])
    again = read_recipe(recipe)
    assert again == recipe
    assert again.for_layer("a").weight_bits == 2


@given(base=values, layers=st.dictionaries(st.text("ab.*", min_size=1, max_size=4), values, max_size=3), keys=values)
def test_a_settled_recipe_goes_on_as_its_recipe_does(
    base: dict[str, Any], layers: dict[str, dict[str, Any]], keys: dict[str, Any]
) -> None:
    recipe, names = read_recipe(base, layers=layers), ["a", "b", "a.b"]
    settled = recipe.settled(names)
    assert settled["a"] == recipe.for_layer("a")
    changed = settled.with_overrides({"a": keys}).with_overrides({"a": {"levels": 64}, "b": keys})
    assert changed.whole == recipe.with_overrides({"a": keys}).with_overrides({"a": {"levels": 64}, "b": keys})
    assert changed == changed.whole.settled(names)
    assert settled == recipe.settled(names)
