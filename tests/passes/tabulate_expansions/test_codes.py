"""The choice of code steps for the tables of a convolution, against loops over every candidate and column."""

from __future__ import annotations

import itertools

import pytest
import torch

from kancompile.ir import Contraction, Expansion, IndexQuantizer
from kancompile.passes.tabulate_expansions import codes as convolution_codes
from kancompile.passes.tabulate_expansions.codes import ColumnSizes, TableDraft, codes_errors, zero_preserving
from tests.convolution_programs import float_convolutions, square

BITS = 4


def _drafts(groups: int, tables: int) -> tuple[list[TableDraft], Contraction]:
    """Give two drafts of random values in front of one convolution; the channels take turns in ``tables`` tables."""
    program = float_convolutions((4, 5, 5), [square(4, 3, padding=1, groups=groups)], split=True)
    contraction = program.module("layer0_convolve")
    assert isinstance(contraction, Contraction)
    generator = torch.Generator().manual_seed(groups + 10 * tables)
    drafts, start = [], 0
    for number in range(2):
        expansion = program.module(f"layer0_expand{number}")
        assert isinstance(expansion, Expansion)
        k = expansion.k
        columns = 4 // groups * k
        values = torch.randn(tables, 16, k, generator=generator) + 0.5
        part = contraction.weight[:, start : start + columns]
        start += columns
        index = IndexQuantizer(0.25, 8, 16)
        variance = torch.rand(4, k, generator=generator)
        group = torch.arange(4) % tables
        drafts.append(TableDraft(expansion, index, values, group, part, variance, lambda functions: functions))
    return drafts, contraction


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_errors_are_those_of_a_loop_over_columns(groups: int, tables: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution_codes, "_BLOCK_ELEMENTS", 100)  # several blocks of candidates
    drafts, contraction = _drafts(groups, tables)
    low, high = ([getattr(draft.values, end)(1) for draft in drafts] for end in ("amin", "amax"))
    scales, _ = zero_preserving(low, high, (0.0, 0.5))
    found = codes_errors([ColumnSizes.of(draft, contraction) for draft in drafts], scales, BITS)

    for candidate in range(0, len(found), 37):
        errors = []
        for output in range(4):
            group = output * groups // 4
            codes = variances = largest = 0.0
            for draft, scale in zip(drafts, scales, strict=True):
                k = draft.values.shape[2]
                members = range(4 // groups * group, 4 // groups * (group + 1))
                for place, (channel, function) in enumerate(itertools.product(members, range(k))):
                    table = int(draft.group[channel])
                    step = float(scale[candidate, table, function])
                    for weight in draft.weight[output, place].flatten().tolist():
                        codes += (weight * step) ** 2 / 12
                        variances += float(draft.variance[channel, function]) / step**2
                        largest = max(largest, abs(weight) * step)
            errors.append(codes + (largest / (2 ** (BITS - 1) - 1)) ** 2 / 12 * variances)
        assert float(found[candidate]) == pytest.approx(sum(errors) / 4, rel=1e-4)


def test_every_candidate_reaches_both_ends_of_every_function() -> None:
    drafts, _ = _drafts(1, 2)
    low, high = ([getattr(draft.values, end)(1) for draft in drafts] for end in ("amin", "amax"))
    scales, zero_points = zero_preserving(low, high, (0.0, 0.25, 1.0))
    assert len(zero_points) == 3 * 254  # 1 ... 254: with 0 or 255 one side would have no code
    for steps, a, b in zip(scales, low, high, strict=True):
        reach = zero_points[:, None, None]
        assert bool((-steps * reach <= a + 1e-5).all())
        assert bool((steps * (255 - reach) >= b - 1e-5).all())
