"""Layers that do not depend on each other are rounded by one process each, to the bits of one process alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from examples.zoo import chebyshev_kan
from kancompile.frontend import capture
from kancompile.ir import Layer, Program
from kancompile.passes.round_weights import RoundWeights
from kancompile.passes.round_weights.options import RoundingOptions
from kancompile.passes.round_weights.solved_layer import SolvedLayer
from kancompile.passes.round_weights.turns import turns
from kancompile.passes.rounding_methods import METHODS, Rounded
from kancompile.passes.rounding_methods.adaround import AdaRound
from kancompile.passes.rounding_methods.awq import Awq
from kancompile.passes.rounding_methods.brecq import Brecq
from kancompile.passes.tabulate_expansions import TabulateExpansions
from kancompile.passes.tabulate_expansions.options import TableOptions
from tests.passes.round_weights.test_drift import called_again
from tests.process_threads import together
from tests.programs import float_program

CHEAP = {
    "adaround": AdaRound(iterations=20),
    "brecq": Brecq(METHODS["uniform"], iterations=20),
    "awq": Awq(METHODS["gptq"]),
    "gptq": METHODS["gptq"],
    "uniform": METHODS["uniform"],
}


class Towers(nn.Module):
    """Two layers on each of two halves of the input, one on the sum of the halves, and one on all that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = chebyshev_kan.build((3, 4, 2)), chebyshev_kan.build((3, 5, 2))
        self.middle, self.last = chebyshev_kan.build((3, 2)), chebyshev_kan.build((6, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, 6]`` to ``[b, 3]``."""
        left, right = x.chunk(2, dim=1)
        return self.last(torch.cat([self.left(left), self.right(right), self.middle(left + right)], dim=1))


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return torch.randn(80, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def towers(samples: Tensor) -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Towers().eval()
    return TabulateExpansions(lambda name: TableOptions())(capture(model, samples[:2]), samples)


def names(divided: list[list[Layer]]) -> list[list[str]]:
    return [[layer.name for layer in turn] for turn in divided]


def test_layers_of_a_turn_do_not_read_from_each_other(towers: Program) -> None:
    layers = towers.layers()
    found = names(turns(towers, layers, 9))
    assert [len(turn) for turn in found] == [3, 2, 1]
    assert {name.split(".")[0] for name in found[0]} == {"left", "right", "middle"}
    for most in (1, 2, 4):
        divided = names(turns(towers, layers, most))
        assert [name for turn in divided for name in turn] == [name for turn in found for name in turn]
        assert max(len(turn) for turn in divided) == min(most, 3)


def test_layers_in_a_row_and_layers_used_again_keep_their_order() -> None:
    program = called_again(float_program((6, 8, 6)))
    assert names(turns(program, program.layers(), 9)) == [[layer.name] for layer in program.layers()]


@pytest.mark.parametrize("method", CHEAP)
def test_several_processes_round_to_the_bits_of_one(
    method: str, towers: Program, samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RoundingOptions(CHEAP[method], method, 3)

    def work() -> tuple[tuple[str, ...], list[Tensor]]:
        rounded = RoundWeights(lambda name: options)(towers, samples)
        state = rounded.graph_module.state_dict()
        return rounded.notes, [state[name] for name in sorted(state)]

    notes, alone = work()
    for count in (2, 3):
        for one in together(work, count, monkeypatch):
            assert not isinstance(one, Exception), one
            assert one[0] == notes
            assert all(torch.equal(a, b) for a, b in zip(one[1], alone, strict=True))


def test_what_travels_is_all_of_a_solution() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [
        Rounded(
            torch.randint(-8, 8, (2, 5), generator=draw, dtype=torch.int8), torch.rand(2, 2, generator=draw),
            torch.rand(2, generator=draw), ("é\n", "b"), (2, 3), fraction,
        )
        for fraction in (None, torch.rand(5, generator=draw))
    ]  # fmt: skip
    for bits in (4, "ternary"):
        solved = SolvedLayer(parts, bits, ("layer 'ü'", ""))
        found = SolvedLayer.of_tensors(solved.as_tensors())
        assert (found.bits, found.notes) == (bits, solved.notes)
        for one, other in zip(found.parts, parts, strict=True):
            assert (one.notes, one.group_sizes) == (other.notes, other.group_sizes)
            for name in ("codes", "scale", "offset", "column_scale"):
                a, b = getattr(one, name), getattr(other, name)
                assert (a is None and b is None) or torch.equal(a, b)
