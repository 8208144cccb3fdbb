"""The package as a newcomer meets it in Python: names, versions, short texts of results, misspelled keys."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

import kancompile
from kancompile import KanCompileError, Recipe
from tests.interfaces import Rbf


def test_the_package_lists_its_names_and_its_version() -> None:
    names = [name for name in dir(kancompile) if not name.startswith("_")]
    assert names == sorted(kancompile.__all__)
    assert kancompile.__version__ == metadata.version("kancompile")
    assert kancompile.__doc__ is not None
    assert not [name for name in ("compile", "validate", "tune", "Recipe") if f"\n{name} " not in kancompile.__doc__]


def test_a_misspelled_key_names_the_nearest() -> None:
    with pytest.raises(KanCompileError, match=r"recipe: unknown key 'wieght_bits'; did you mean 'weight_bits'\?"):
        Recipe(wieght_bits=4)  # type: ignore[call-arg]


def test_results_show_themselves_in_a_few_lines() -> None:
    assert repr(Recipe()) == "Recipe()"
    recipe = Recipe(weight_bits=4, layers={"head*": {"levels": 32}}, goal_sqnr=None)
    assert eval(repr(recipe)) == recipe

    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    compiled = kancompile.compile(Rbf(4, 2), x, recipe=Recipe(goal_sqnr=None))
    assert len(repr(compiled)) < 200
    assert f"{len(compiled.model_bytes):,} bytes" in repr(compiled)
    assert repr(compiled.audit) == compiled.audit.table()
    assert repr(compiled.calibration) == "Calibration of 64 samples: input float32 [64, 4], no labels"
    assert repr(compiled.edge(0, 2, 1)).startswith("Edge of ")
    assert repr(compiled.captured).startswith("Program of 1 layers: ")
    validation = compiled.validate(x)
    assert repr(validation) == validation.table()
    assert validation._repr_html_().startswith("<pre>")
