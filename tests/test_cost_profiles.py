"""Profiles of costs: read and written without loss, refused where wrong, held by recipes and files, and decisive."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kancompile
from examples.zoo.efficient_kan import KAN
from kancompile import compile
from kancompile.errors import KanCompileError
from kancompile.frontend import capture
from kancompile.ir import JointTable
from kancompile.passes import Lowering
from kancompile.passes.lower_to_polynomials import LowerToPolynomials
from kancompile.passes.reduce_functions.look_up_time import most_columns
from kancompile.recipe import (
    DEFAULT_PROFILE,
    OPERATORS,
    PROFILES,
    CostProfile,
    Recipe,
    package_profile,
    read_profile,
    read_recipe,
)
from tests.compiled_kan import make_inputs, make_model

FOLDER = Path(kancompile.__file__).parent / "recipe" / "cost_profiles"
USUAL = package_profile(DEFAULT_PROFILE)


def changed(name: str = "mine", **costs: float) -> CostProfile:
    return CostProfile(name, replace(USUAL.look_up, **costs), USUAL.functions)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_of_the_package_are_named_explained_and_written_alike(name: str) -> None:
    profile, text = package_profile(name), (FOLDER / f"{name}.toml").read_text()
    comments, _, values = text.partition("name =")
    assert profile.name == name
    assert comments.startswith("# ")
    assert profile.to_toml().partition("name =")[2] == values
    assert {path.stem for path in FOLDER.iterdir()} == set(PROFILES)


def test_the_default_has_the_costs_that_files_were_made_by() -> None:
    assert list(USUAL.to_dict()["look_up"].values()) == [
        500.0,
        0.2,
        8.2,
        4.51,
        0.0053,
        0.008,
        6.0,
        2.5,
        0.12,
        1.7,
        5000.0,
    ]
    assert list(USUAL.to_dict()["functions"].values())[:9] == [4.6, 0.5, 1.0, 0.45, 0.5, 1.2, 0.3, 16.0, 0.4]
    assert [USUAL.functions.of_operator(name) for name in ("exp", "index", "pow", "tan")] == [0.4, 10.0, 0.9, 4.0]
    assert "exp" not in OPERATORS


def test_a_profile_round_trips_through_its_file_and_through_recipes(tmp_path: Path) -> None:
    profile = changed(node=300.0)
    path = tmp_path / "p.toml"
    path.write_text(profile.to_toml("two lines\nof comments"))
    assert read_profile(path) == read_profile(str(path)) == read_profile(profile.to_dict()) == profile
    recipes = [read_recipe(profile=source) for source in (path, str(path), profile, profile.to_dict())]
    assert len({hash(recipe) for recipe in recipes}) == len({recipe.sha256() for recipe in recipes}) == 1
    recipe = recipes[0]
    assert recipe.costs == profile
    assert read_recipe(recipe.to_dict()) == recipe
    assert Recipe(**tomllib.loads(recipe.to_toml(with_meanings=True))) == recipe
    assert recipe.sha256() != read_recipe().sha256()
    assert changed("other", node=300.0).sha256() == profile.sha256() != changed(node=301.0).sha256()


def test_plain_data_of_a_recipe_hold_a_profile_only_where_one_was_chosen() -> None:
    assert read_recipe(profile=DEFAULT_PROFILE) == read_recipe(profile=USUAL) == read_recipe()
    assert "profile" not in read_recipe().to_dict()
    assert read_recipe(profile="aarch64").to_dict()["profile"] == "aarch64"


def without(section: str, key: str) -> dict[str, Any]:
    content = changed().to_dict()
    del content[section][key]
    return content


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("x86-vni", r"expected one of \['x86-vnni', 'x86', 'aarch64'\].*did you mean 'x86-vnni'"),
        ("quick", r"expected one of \['x86-vnni', 'x86', 'aarch64'\].*kancompile profile --out"),
        ("absent.toml", "cannot be read"),
        (3, r"found 3, expected one of \['x86-vnni'"),
        (None, r"found None, expected one of \['x86-vnni'"),
        (without("look_up", "node"), "look_up: found no 'node', expected all of"),
        ({"name": "n"}, "found no 'look_up', 'functions', expected all of"),
        ({"nmae": "n"}, "unknown key 'nmae'; did you mean 'name'"),
        (
            changed().to_dict() | {"look_up": changed().to_dict()["look_up"] | {"nodes": 1}},
            "unknown key 'nodes'; did you",
        ),
        (changed().to_dict() | {"look_up": 4}, "look_up: found 4, expected a table of costs"),
        (changed(node=-1.0).to_dict(), "look_up: node is -1.0, expected nanoseconds above 0"),
        (changed(node=0).to_dict(), "look_up: node is 0, expected nanoseconds above 0"),
        (changed(node=float("nan")).to_dict(), "look_up: node is nan"),
        (changed(node=1 << 2000).to_dict(), "look_up: node is 1148"),
        (changed(node=True).to_dict(), "look_up: node is True"),
        (changed(node="1").to_dict(), "look_up: node is '1'"),
        (changed("").to_dict(), "name is ''"),
        (changed("x86").to_dict(), "profile 'x86': found other costs than those of the package"),
    ],
)
def test_wrong_profiles_are_refused(source: Any, text: str) -> None:
    with pytest.raises(KanCompileError, match=text):
        read_profile(source)
    with pytest.raises(KanCompileError, match=text):
        read_recipe(profile=source)


@pytest.mark.parametrize(
    ("content", "text"), [(b"node = = 1", "valid TOML"), (b"\xff", "cannot be read"), (b"", "no 'name'")]
)
def test_wrong_files_are_refused_by_their_name(content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(content)
    with pytest.raises(KanCompileError, match=rf"p\.toml.*{text}"):
        read_profile(path)


def test_costs_decide_between_single_and_joint_look_ups() -> None:
    wide = [(784, 9)]
    assert all(most_columns(wide, 64, package_profile(name).look_up) > 1000 for name in PROFILES)
    assert most_columns(wide, 64, replace(USUAL.look_up, word=100.0)) < 200
    assert (
        most_columns([(16, 9)], 10, replace(USUAL.look_up, node=1.0)) > 0 == most_columns([(16, 9)], 10, USUAL.look_up)
    )
    batches = [most_columns(wide, 64, replace(USUAL.look_up, node=node), (1,)) for node in (50.0, 500.0, 5000.0)]
    assert batches == sorted(batches, reverse=True)
    assert batches[0] > batches[-1]


@pytest.mark.slow
def test_a_file_says_which_costs_it_was_made_by_and_its_recipe_makes_it_again() -> None:
    model = KAN([24, 24, 3], torch.Generator().manual_seed(5)).eval()
    x = torch.rand(400, 24, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    keys = {"goal_sqnr": None, "method": "uniform", "function_error": 1e-2}
    profile = changed("no nodes", node=0.1, pick=0.01, word=0.01, gather=1000.0)
    made = compile(model, x, recipe=keys | {"profile": profile})
    assert made.manifest["cost_profile"] == {"name": "no nodes", "sha256": profile.sha256()}
    assert compile(model, x, recipe=made.manifest["recipe"]).model_bytes == made.model_bytes
    lowering = Lowering(made.captured, x)
    recipes = [
        read_recipe(keys),
        made.recipe,
        read_recipe(keys),
    ]  # one after the other, with what the first found out known
    joint = [len(list(lowering(lowering.settled(recipe)).nodes(JointTable))) for recipe in recipes]
    assert joint == [0, 1, 0]


@pytest.mark.slow
def test_costs_decide_between_polynomials_and_operators() -> None:
    program, x = capture(make_model(), make_inputs(2)), torch.linspace(-1, 1, 60).reshape(10, 6)
    slow = replace(USUAL.functions, gather=1e6, gathered=1e6)
    assert LowerToPolynomials()(program, x).graph_module is not program.graph_module
    assert LowerToPolynomials(costs=slow)(program, x).graph_module is program.graph_module
