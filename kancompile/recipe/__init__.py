"""Recipes: every choice of a compilation, checked when it is made, overridable per layer, from Python, TOML or JSON."""

from kancompile.recipe.choices import DEFAULT_PROFILE, STORAGES, Recipe, SettledRecipe
from kancompile.recipe.cost_profile import (
    OPERATORS,
    PROFILES,
    CostProfile,
    FunctionCosts,
    LookUpCosts,
    package_profile,
    read_profile,
)
from kancompile.recipe.cpu_presets import CPU_PRESETS
from kancompile.recipe.layer_choices import (
    DRIFTS,
    GRANULARITIES,
    LOWERINGS,
    METHODS,
    PRECISIONS,
    RANGES,
    TERNARY,
    WEIGHT_ONLY,
    LayerRecipe,
)
from kancompile.recipe.reading import describe_keys, read_recipe

__all__ = [
    "CPU_PRESETS",
    "DEFAULT_PROFILE",
    "DRIFTS",
    "GRANULARITIES",
    "LOWERINGS",
    "METHODS",
    "OPERATORS",
    "PRECISIONS",
    "PROFILES",
    "RANGES",
    "STORAGES",
    "TERNARY",
    "WEIGHT_ONLY",
    "CostProfile",
    "FunctionCosts",
    "LayerRecipe",
    "LookUpCosts",
    "Recipe",
    "SettledRecipe",
    "describe_keys",
    "package_profile",
    "read_profile",
    "read_recipe",
]
