"""Without data, inputs lie where the first layer's functions, or its batch norm, say; what says nothing is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import kancompile
from examples.zoo import fast_kan
from kancompile.cli.main import main
from kancompile.compiler.sampled_inputs import SAMPLES, for_sampled_inputs, grid_of_inputs, sampled_inputs
from kancompile.errors import KanCompileError
from kancompile.ir import Expansion
from kancompile.recipe import Recipe
from tests.compiled_kan import FACTORY, FACTORY_ARGS, N_IN, make_model
from tests.programs import float_program


def test_splines_are_sampled_inside_their_knots() -> None:
    """The grid of the model is -1 ... 1, and its knots reach 2.2: oracle, its own buffers."""
    samples = sampled_inputs(make_model())
    assert samples.inputs.shape == (SAMPLES, N_IN)
    assert -1.02 < samples.inputs.min() <= -1
    assert 1 <= samples.inputs.max() < 1.02
    assert samples.is_sampled
    assert "1,024 inputs sampled from the grid -1" in samples.remarks[0]


def test_every_input_has_its_own_range() -> None:
    """Bumps of width 1 about centers moved by up to 1: each input's range is that of its own centers and their flanks."""
    program = float_program((5, 3), same_functions=False)
    expansion = program.node("layer0_expand", Expansion)
    found = grid_of_inputs(expansion, 4.0)
    assert found is not None
    points = torch.linspace(-8, 8, 4001)
    bumps = expansion.sample_inputs(points)[..., :4]  # the last one is the base function, which has no range
    for i, (low, high) in enumerate(zip(*found, strict=True)):
        active = points[(bumps[:, i] > 0.05).any(1)]
        assert abs(float(active[0]) - float(low)) < 0.05
        assert abs(float(active[-1]) - float(high)) < 0.05


def test_a_batch_norm_in_front_says_more() -> None:
    norm = nn.BatchNorm1d(N_IN)
    norm.running_mean.copy_(torch.arange(6.0))
    norm.running_var.fill_(4.0)
    samples = torch.from_numpy(sampled_inputs(nn.Sequential(norm, make_model()).eval()).inputs.copy())
    assert torch.allclose(samples.mean(0), torch.arange(6.0), atol=0.3)
    assert torch.allclose(samples.std(0), torch.full((6,), 2.0), atol=0.3)


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return x + z


REFUSED = {
    "two inputs": (TwoInputs, r"inputs \['x', 'z'\], expected one input"),
    "images": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), "no sizes .* expected one"),
    "functions without a range": (lambda: fast_kan.build((6, 5, 3)), "whose functions have a grid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_says_nothing_is_refused_with_the_way_out(case: str) -> None:
    make, said = REFUSED[case]
    with pytest.raises(KanCompileError, match=f"calibration none: .*{said}.*pass a few hundred samples"):
        sampled_inputs(make().eval())


@pytest.mark.slow
def test_a_file_says_that_no_data_calibrated_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--factory-arg", FACTORY_ARGS, "--calibration", "none", "--out", str(tmp_path), "--no-timing"]
    assert main(["compile", FACTORY, *options, "--method", "uniform", "--goal-sqnr", "1"]) == 0
    shown = capsys.readouterr().out
    assert "warning: inputs: no calibration data" in shown
    assert "measured on 205 inputs that were sampled too, no data" in shown
    manifest = json.loads((tmp_path / "model.manifest.json").read_text())
    assert manifest["calibration"]["sampled"] is True
    assert {layer["expansions"][0]["n_in"] for layer in manifest["layers"]} == {6, 5}  # each input by itself


def test_what_only_data_say_is_left_out() -> None:
    assert for_sampled_inputs(Recipe()) == Recipe(lookup="each", range="minmax")
    assert for_sampled_inputs(Recipe(lookup="joint", range="percentile")) == Recipe(lookup="joint", range="percentile")
    with pytest.raises(KanCompileError, match="calibration none: found inputs"):
        kancompile.compile(TwoInputs(), None)
