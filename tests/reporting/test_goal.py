"""What a summary ends in: the output that misses its goal with the next step, and 16 bits where ratios say too little."""

from __future__ import annotations

import torch
from torch import nn

import kancompile
from examples.zoo.efficient_kan import KAN
from kancompile.reporting import compile_summary
from kancompile.reporting.facts import goal_missed, needs_int16
from tests.compiled_kan import make_inputs


class Step(nn.Module):
    """One step of a system of four states, one of which varies a thousand times less."""

    def __init__(self) -> None:
        super().__init__()
        self.model = KAN([4, 6, 4], torch.Generator().manual_seed(3))
        self.scale = nn.Buffer(torch.tensor([1.0, 1.0, 1.0, 1e-3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) * self.scale  # type: ignore[no-any-return]


def test_a_summary_ends_in_what_misses_the_goal_and_names_16_bits() -> None:
    x = make_inputs(200)[:, :4]
    recipe = {"weight_bits": 4, "method": "uniform", "goal_sqnr": 60.0}
    compiled = kancompile.compile(Step().eval(), x, recipe=recipe)
    result = compiled.validate(x, min_sqnr=0)
    missed = goal_missed(compiled.manifest, result)
    assert missed is not None
    assert "% of its spread" in missed
    assert "on the calibration samples --layer" in missed
    wide = needs_int16(compiled.manifest, (4,), result)
    assert wide is not None
    assert "differ by more than 100 times" in wide
    assert "fed back" in wide
    assert "--precision int16" in wide
    lines = compile_summary(compiled, result, "calibration samples").splitlines()
    assert lines[-1] == f"warning: {missed}"
    assert f"note: {wide}" in lines


def test_where_every_output_reaches_it_nothing_is_said() -> None:
    x = make_inputs(200)[:, :4]
    compiled = kancompile.compile(Step().eval(), x, recipe={"precision": "int16"})
    result = compiled.validate(x)
    assert goal_missed(compiled.manifest, result) is None
    assert needs_int16(compiled.manifest, (4,), result) is None
