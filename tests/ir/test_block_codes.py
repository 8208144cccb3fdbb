"""16-bit codes in blocks: exact where they can be, half a step off where not."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kancompile.ir import round_to_blocks


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 6))
def test_error_is_at_most_half_a_step_and_values_are_exact_products(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(4 * torch.randn(rows, 1, generator=generator)) * torch.exp(
        4 * torch.randn(1, columns, generator=generator)
    )
    values = torch.randn(rows, columns, generator=generator) * spread
    coded = round_to_blocks(values)
    assert coded.codes.dtype == torch.int16
    for scale in (coded.row_scale, coded.column_scale):
        assert bool((torch.frexp(scale).mantissa == 0.5).all())
    step = coded.row_scale[:, None].double() * coded.column_scale.double()
    # a code at the limit, which rounding alone reaches, is clamped by one step
    assert bool(
        ((coded.values().double() - values.double()).abs() <= 0.5 * step * (1 + (coded.codes.abs() == 32767))).all()
    )
    # the largest entry of a row, all columns scaled alike, uses at least 14 bits
    assert int(coded.codes.to(torch.int32).abs().amax(1).min()) >= 1 << 14
    exact = coded.codes.double() * step
    assert torch.equal(coded.values().double(), exact)


def test_zeros_powers_of_two_and_steep_rows() -> None:
    values = torch.tensor([[0.0, 0.0], [1.0, -0.5], [1e-12, 3e-13], [1e17, 2e16]])
    coded = round_to_blocks(values)
    assert torch.equal(coded.values()[:2], values[:2])
    assert bool(((coded.values() - values).abs() <= 2.0**-14 * values.abs().amax(1, keepdim=True)).all())
    part = coded.columns(1, 2)
    assert torch.equal(part.values(), coded.values()[:, 1:])
