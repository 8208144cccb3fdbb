"""Fewer functions of a channel where they depend on each other; what is lost stays below the stated share."""

import pytest
import torch

from examples.zoo import kagn_conv, spline_conv
from kancompile.frontend.capture import capture
from kancompile.ir import Contraction, Expansion, Program, check
from kancompile.passes.reduce_functions.channels import across_channels
from kancompile.passes.reduce_functions.mixtures import Subspace
from kancompile.passes.reduce_functions.windows import Windows
from kancompile.passes.tabulate_expansions.choose_index import IndexChoice, index_over, refine_ends
from tests.frontend.test_chains import SumOverAxes


def _kagn(groups: int = 1, padding: int = 1) -> tuple[Program, torch.Tensor]:
    model = kagn_conv.build(channels=(4, 8, 8), strides=(1, 2), n_classes=3, groups=groups)
    for layer in model.layers:  # type: ignore[union-attr]
        layer.padding = padding
        for base in layer.base_conv:
            base.padding = (padding, padding)
    x = torch.rand(48, 4, 9, 9, generator=torch.Generator().manual_seed(1)) * 2 - 1
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(x)
    return capture(model.eval(), x[:2]), x


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
def test_what_is_lost_stays_below_the_tolerance(groups: int, tolerance: float) -> None:
    program, x = _kagn(groups)
    with torch.no_grad():
        mixed = across_channels(program, x, lambda _: tolerance)
        check(mixed)
        saved = 0
        for layer in program.layers():
            before, after = program.module(layer.expansions[0]), mixed.module(layer.expansions[0])
            if before is after:
                continue
            assert isinstance(before, Expansion)
            assert isinstance(after, Expansion)
            saved += 1
            assert after.k < before.k
            read = program.inputs(x, [layer.expansions[0]])[layer.expansions[0]]
            expected = program.module(layer.contraction)(before(read))
            found = mixed.module(layer.contraction)(after(read))
            error = (found - expected).double().square().mean()
            variance = expected.double().movedim(1, 0).flatten(1).var(1, correction=0).mean()
            # judged on other pixels than all of them
            assert float(error) <= 1.5 * tolerance * float(variance) + 1e-10
            assert torch.equal(after(read)[..., -1], torch.ones_like(read.movedim(1, -1)))
        assert saved


def test_a_second_run_returns_the_same_program_and_the_first_leaves_its_input() -> None:
    program, x = _kagn()
    with torch.no_grad():
        expected = program.graph_module(x)
        mixed = across_channels(program, x, lambda _: 1e-3)
        assert mixed is not program
        assert across_channels(mixed, x, lambda _: 1e-3) is mixed
        assert torch.equal(program.graph_module(x), expected)
    assert across_channels(program, x, lambda _: 0.0) is program


@pytest.mark.slow
def test_independent_functions_stay() -> None:
    model = spline_conv.build().eval()
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    program = capture(model, x[:2])
    with torch.no_grad():
        mixed = across_channels(program, x, lambda name: 1e-9 * (name == program.layers()[0].name))
    assert mixed is program


def test_ends_move_to_where_the_function_is_not_flat() -> None:
    class Rectified:
        """Error of quantizing what a rectifier lets through."""

        x = torch.linspace(-10, 10, 4001)

        def __call__(self, index: object) -> float:
            rounded = index.real(index(self.x))  # type: ignore[attr-defined]
            return float((rounded.clamp(min=0) - self.x.clamp(min=0)).double().square().mean())

    start = index_over(-10, 10, 64)
    refined = refine_ends(Rectified(), IndexChoice(start, Rectified()(start), "minmax"))
    assert refined.index.low > -6
    assert refined.index.high >= 9.5
    # half the step or less is a quarter of the error, up to the rounding of the ends
    assert refined.error < 0.5 * Rectified()(start)


def test_fitted_weights_carry_what_a_function_drops() -> None:
    program, _ = _kagn()
    layer = program.layers()[0]
    expansion, contraction = program.node(layer.expansions[0], Expansion), program.node(layer.contraction, Contraction)

    def images(seed: int) -> torch.Tensor:  # channels keep to parts of the range
        x = torch.rand(128, 4, 9, 9, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return 0.4 * x + torch.tensor([-1.2, -0.4, 0.4, 1.2])[:, None, None]

    with torch.no_grad():
        functions = Subspace.of(expansion, contraction, images(1)).functions(2)
        fitted, lost = Windows.of(expansion, contraction, [images(1)]).fit(functions, contraction)
        weight = torch.cat([functions.weight, functions.constant[:, :, None]], dim=2).flatten(1, 2)
        given = contraction.with_weight(weight.reshape(8, -1, 3, 3).float())
        exact, mixed = contraction(expansion(images(2))), functions.region(images(2))
        power = exact.double().var([0, 2, 3]).mean()
        cut, fit = (float((one(mixed) - exact).double().square().mean() / power) for one in (given, fitted))
    assert fit < 0.5 * cut
    assert lost == pytest.approx(fit, rel=0.3)


def test_a_convolution_that_pads_nothing_needs_no_constant() -> None:
    program, x = _kagn(padding=0)
    with torch.no_grad():
        mixed = across_channels(program, x, lambda _: 1e-2)
        assert mixed is not program
        for layer in mixed.layers():
            expansion = mixed.module(layer.expansions[0])
            assert not getattr(expansion.branches[0].region, "has_constant", False)  # type: ignore[union-attr, index]
        expected, found = program.graph_module(x), mixed.graph_module(x)
    assert float((found - expected).square().mean() / expected.var()) < 2e-2


def test_a_linear_map_of_every_pixel_is_no_convolution() -> None:
    """It may read channels first all the same."""
    x = torch.randn(40, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    program = capture(SumOverAxes(), x[:2])
    read = [program.node(layer.expansions[0], Expansion) for layer in program.layers()]
    assert any(expansion.channels_first for expansion in read)
    assert across_channels(program, x, lambda _: 0.1) is program
