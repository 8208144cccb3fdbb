"""Rounding all codes of a convolution's table together: the quadratic form, the descent, and what it is for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kancompile.ir import Contraction, Expansion, Geometry, IndexQuantizer, PatchSampler, flat_weight
from kancompile.passes.tabulate_expansions import round_together as round_table_codes
from kancompile.passes.tabulate_expansions.lookup_cost import LookupCost
from kancompile.passes.tabulate_expansions.round_together import Patches, code_hessian, descend, round_together
from tests.convolution_programs import float_convolutions, square

LEVELS, CHANNELS, SIZE = 12, 4, 5


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _patches(x: Tensor, weight: Tensor, geometry: Geometry, k: int) -> Patches:
    """Give what all output pixels see."""
    sampler = PatchSampler(geometry, tuple(weight.shape[2:]), x.shape[2:])
    image, position = sampler.draw(len(x), len(x) * sampler.positions, _generator(0))
    inside = sampler.take(torch.ones(len(x), *x.shape[2:], 1, dtype=torch.bool), image, position, 0)
    return Patches(
        sampler.take(x.movedim(1, -1), image, position, 0.0), inside, tuple(flat_weight(weight, geometry.groups)), k
    )


def _hessian_of(
    x: Tensor, weight: Tensor, geometry: Geometry, k: int, index: IndexQuantizer
) -> Callable[[Tensor], Tensor]:
    return partial(code_hessian, _patches(x, weight, geometry, k), index)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_the_quadratic_form_is_the_variance_of_the_output_error(
    groups: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with PyTorch's convolution of the errors, whose mean is taken out for each output channel."""
    monkeypatch.setattr(round_table_codes, "_UNSEEN_SHARE", 0.0)
    k, n_out, generator = 3, 6, _generator(groups + 2 * padding)
    geometry = Geometry((2, 1), (padding, padding), (1, 1), groups)
    x = torch.randn(8, CHANNELS, SIZE, SIZE, generator=generator)
    weight = torch.randn(n_out, CHANNELS // groups * k, 3, 3, generator=generator)
    index = IndexQuantizer(0.4, 5, LEVELS)
    hessian = code_hessian(_patches(x, weight, geometry, k), index, torch.tensor([0, 2]))

    error = torch.zeros(LEVELS, k, dtype=torch.float64)
    error[:, [0, 2]] = torch.randn(LEVELS, 2, generator=generator, dtype=torch.float64)
    features = error[index(x).long()].movedim(-1, 2).flatten(1, 2)  # channels major, functions minor
    y = functional.conv2d(features, weight.double(), None, geometry.stride, geometry.padding, groups=groups)
    expected = (y - y.mean((0, 2, 3), keepdim=True)).square().mean()

    flat = error[:, [0, 2]].flatten()
    torch.testing.assert_close(flat @ hessian @ flat, expected, rtol=1e-4, atol=0)


def test_rows_that_calibration_does_not_see_have_a_share() -> None:
    x = torch.full((2, CHANNELS, SIZE, SIZE), 0.3)
    weight = torch.randn(3, CHANNELS * 2, 3, 3, generator=_generator(0))
    hessian = code_hessian(
        _patches(x, weight, Geometry((1, 1), (1, 1), (1, 1)), 2), IndexQuantizer(0.4, 5, LEVELS), torch.tensor([0, 1])
    )
    assert bool((torch.linalg.eigvalsh(hessian) > 0).all())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), levels=st.integers(1, 6), m=st.integers(1, 3))
def test_no_row_gains_by_a_neighbour_when_the_descent_ends(seed: int, levels: int, m: int) -> None:
    generator = _generator(seed)
    size = levels * m
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    target = torch.rand(levels, m, generator=generator, dtype=torch.float64) * 262 - 3  # some lie outside
    nearest = target.round().clamp(0, 255)
    codes = descend(nearest, target, hessian)

    def objective(chosen: Tensor) -> float:
        error = (chosen - target).flatten()
        return float(error @ hessian @ error)

    assert bool(((codes >= 0) & (codes <= 255) & (codes == codes.round())).all())
    assert objective(codes) <= objective(nearest)
    for row, move in itertools.product(range(levels), itertools.product((-1, 0, 1), repeat=m)):
        other = codes.clone()
        other[row] += torch.tensor(move, dtype=torch.float64)
        if bool(((other >= 0) & (other <= 255)).all()):
            assert objective(codes) <= objective(other) + 1e-9 * hessian.diagonal().sum()


def _dependent_functions(index: IndexQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Give values of two nearly equal functions and a constant at all rows, and their code steps."""
    u = index.rows()
    values = torch.stack([torch.tanh(u), torch.ones_like(u), torch.tanh(1.1 * u)], dim=1)
    return values, torch.tensor([2 / 255] * 3), torch.tensor([-1.0, 0.0, -1.0])


def test_errors_of_functions_that_depend_on_each_other_cancel() -> None:
    """Where weights nearly cancel, the error on images that were not seen falls by more than half."""
    generator = _generator(1)
    index = IndexQuantizer(4 / 63, 32, 64)
    values, scale, offset = _dependent_functions(index)
    weight = torch.randn(8, CHANNELS, 3, 3, 3, generator=generator)
    weight[:, :, 2] = 0.2 * weight[:, :, 2] - weight[:, :, 0]
    weight = weight.flatten(1, 2)
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    nearest = torch.round((values - offset) / scale).clamp(0, 255)
    nearest[:, 1] = 255
    scale[1] = 1 / 255
    seen, unseen = torch.randn(2, 64, CHANNELS, SIZE, SIZE, generator=generator)
    together = round_together(nearest, values, scale, offset, _hessian_of(seen, weight, geometry, 3, index))

    def error(codes: Tensor) -> float:
        wrong = (codes * scale + offset - values).float()[index(unseen).long()].movedim(-1, 2).flatten(1, 2)
        y = functional.conv2d(wrong, weight, padding=1)
        return float((y - y.mean((0, 2, 3), keepdim=True)).square().mean())

    assert torch.equal(together[:, 1], nearest[:, 1])
    assert float((together - nearest).abs().max()) >= 1
    assert error(together) < 0.5 * error(nearest)


def test_many_functions_stay_at_the_nearest_codes() -> None:
    index = IndexQuantizer(0.4, 5, LEVELS)
    codes = torch.arange(LEVELS)[:, None].expand(-1, 6).float()
    hessian_of = _hessian_of(
        torch.randn(2, 1, SIZE, SIZE, generator=_generator(0)),
        torch.randn(2, 6, 3, 3, generator=_generator(1)),
        Geometry((1, 1), (0, 0), (1, 1)),
        6,
        index,
    )
    assert round_together(codes, codes + 0.3, torch.ones(6), torch.zeros(6), hessian_of) is codes


def test_hessians_are_kept_by_index_and_functions() -> None:
    program = float_convolutions((3, 8, 8), [square(6, 3, padding=1)])
    expansion, contraction = program.module("layer0_expand0"), program.module("layer0_convolve")
    assert isinstance(expansion, Expansion)
    assert isinstance(contraction, Contraction)
    x = torch.randn(8, 3, 8, 8, generator=_generator(0))
    cost = LookupCost(expansion, contraction, contraction.weight, x, torch.zeros(3, dtype=torch.int64))
    wanted = [
        (IndexQuantizer(step, 8, 16), torch.tensor(functions))
        for step in (0.2, 0.4)
        for functions in ([0], [0, 1], [1])
    ]
    found = [cost.code_hessian(index, functions) for index, functions in [*wanted, *wanted[::-1]]]
    patches = Patches(cost.seen, cost.inside.squeeze(-1), tuple(cost.weights), expansion.k)
    for (index, functions), first, again in zip(wanted, found, found[::-1], strict=False):
        expected = code_hessian(patches, index, functions)
        assert torch.equal(first, expected)
        assert torch.equal(again, expected)
