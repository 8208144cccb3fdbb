"""Recipes: every choice of a compilation, checked when it is made, overridable per layer, from Python, TOML or JSON."""

from kancompile.recipe.choices import (
    CPU_PRESETS,
    GRANULARITIES,
    LOWERINGS,
    METHODS,
    PRECISIONS,
    RANGES,
    STORAGES,
    LayerRecipe,
    Recipe,
    SettledRecipe,
)
from kancompile.recipe.reading import describe_keys, read_recipe

__all__ = [
    "CPU_PRESETS",
    "GRANULARITIES",
    "LOWERINGS",
    "METHODS",
    "PRECISIONS",
    "RANGES",
    "STORAGES",
    "LayerRecipe",
    "Recipe",
    "SettledRecipe",
    "describe_keys",
    "read_recipe",
]
