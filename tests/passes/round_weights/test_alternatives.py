"""Other rounding methods are judged on rows that they have not seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kancompile.passes.round_weights.alternatives import best_method
from kancompile.passes.rounding_methods import METHODS, FeatureSource, RoundingProblem, Uniform


def overlapping(rows: int, chunk: int, noise: float = 0.02) -> RoundingProblem:
    """Codes of functions that nearly depend on each other, with large weights of alternating sign."""
    generator = torch.Generator().manual_seed(0)
    common = torch.rand(rows, 2, generator=generator) @ torch.rand(2, 24, generator=generator)
    codes = (60 * (common + noise * torch.randn(rows, 24, generator=generator))).round().clamp(-127, 127).to(torch.int8)
    # weights that cancel what the functions have in common
    shared = torch.linalg.svd(codes.float(), full_matrices=False).Vh[:2]
    drawn = torch.randn(3, 24, generator=generator)
    weight = drawn - drawn @ shared.T @ shared

    def chunks() -> Iterator[Tensor]:
        yield from codes.split(chunk)

    return RoundingProblem("layer", weight, FeatureSource(chunks, rows, 24), 8)


def chosen(problem: RoundingProblem) -> str | None:
    generator = torch.Generator().manual_seed(0)
    nearest = Uniform()(problem, generator)
    found = best_method([problem], [nearest], {"gptq": METHODS["gptq"]}, generator)
    return None if found is None else found[0]


@pytest.mark.parametrize("chunk", [1, 7, 8, 64, 400])
def test_the_choice_does_not_depend_on_how_rows_come(chunk: int) -> None:
    """Chunks that lie whole among the rows held out, or outside, give no rows to the other side."""
    assert chosen(overlapping(400, chunk)) == chosen(overlapping(400, 400)) == "gptq"


@pytest.mark.parametrize("rows", [2, 4, 5, 6])
def test_few_rows_leave_nearest_rounding(rows: int) -> None:
    chosen(overlapping(rows, 1))  # no error, whatever is chosen
