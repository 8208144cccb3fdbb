"""A layer whose sums of two products overflow int16 loses a bit on old processors, and the diagnosis says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kancompile.diagnosis.diagnosing import examine, open_laboratory, samples_for
from kancompile.diagnosis.laboratory import Laboratory
from kancompile.diagnosis.result import Diagnosis
from kancompile.ir import IntegerContraction, TableExpansion
from kancompile.progress import quiet
from kancompile.recipe import Recipe, SettledRecipe, read_recipe

N_IN, N_OUT, K = 16, 12, 2


class Steps(nn.Module):
    """Both functions of an input are large together, and both their weights, with equal signs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rate = nn.Parameter(torch.tensor([1.0, 3.0]))
        sign = torch.where(torch.rand(N_OUT, N_IN, 1, generator=generator) < 0.5, -1.0, 1.0)
        size = 0.55 + 0.45 * torch.rand(N_OUT, N_IN, K, generator=generator)
        self.weight = nn.Parameter((sign * size).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        phi = torch.tanh(x[..., None] * self.rate)
        return phi.flatten(1) @ self.weight.T


def diagnosed(recipe: Recipe) -> tuple[Laboratory, Diagnosis]:
    x = torch.rand(300, N_IN, generator=torch.Generator().manual_seed(1)) * 4 - 2
    with quiet():
        fitting, judging, which = samples_for(x.numpy(), None, recipe, 0.2, 0)
        laboratory = open_laboratory(Steps(), fitting, judging, recipe, 0, "cpu")
        return laboratory, examine(laboratory, which, False)


def largest_pair(laboratory: Laboratory, recipe: SettledRecipe) -> int:
    """Find the largest sum of the two products of one input over all rows of its table."""
    program = laboratory.lowered(recipe)
    (layer,) = program.layers()
    table, contraction = program.module(layer.expansions[0]), program.module(layer.contraction)
    assert isinstance(table, TableExpansion)
    assert isinstance(contraction, IntegerContraction)
    codes = table.table.long().reshape(-1, K)
    weights = torch.cat(list(contraction.weights)).long().reshape(N_IN, K, N_OUT)
    return int(torch.einsum("rk,iko->rio", codes, weights).abs().max())


def test_saturation_is_a_cause_with_its_cure() -> None:
    laboratory, found = diagnosed(read_recipe({"method": "gptq"}))
    recipe = laboratory.recipe
    (cause,) = [cause for cause in found.causes if cause.kind == "saturation"]
    assert cause.change.keys == {"cpu": "x86-vnni"}
    assert cause.change.text() == "--cpu x86-vnni"
    assert "sums of two products would not fit int16" in cause.title
    anatomy = found.anatomies[0]
    assert anatomy.pair_cost > 2
    # the fault is real, and is what the change takes away
    free = cause.change.applied(recipe)
    assert free.whole == read_recipe({"method": "gptq", "cpu": "x86-vnni"})
    assert largest_pair(laboratory, recipe) <= 32767 < largest_pair(laboratory, free)
    assert cause.effect.after == laboratory.outcome(free)
    assert cause.effect.gain_db is not None
    assert cause.effect.predicted_db == pytest.approx(cause.effect.gain_db, abs=1.0)
    assert cause.effect.gain_db > 1.5


def test_processors_that_add_in_32_bits_have_no_such_cause() -> None:
    _, found = diagnosed(read_recipe({"method": "gptq", "cpu": "x86-vnni"}))
    assert "saturation" not in {cause.kind for cause in found.causes}
    assert [anatomy.weight_bits for anatomy in found.anatomies] == [8]
