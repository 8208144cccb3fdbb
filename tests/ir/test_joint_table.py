"""Look-ups of pairs of inputs against plain Python, and against the tables of their members."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kancompile.ir import IndexQuantizer, JointTable, check, differentiable, quantized, show
from tests.programs import joint_program, joint_table

SHAPES = st.fixed_dictionaries(
    {
        "n_in": st.integers(1, 6),
        "members": st.integers(1, 3),
        "planes": st.integers(1, 3),
        "words": st.integers(1, 4),
        "levels": st.integers(2, 7),
        "seed": st.integers(0, 1000),
    }
)


def by_hand(table: JointTable, rows: np.ndarray) -> np.ndarray:
    """Add the codes of the members, one at a time."""
    members, parts = table.members.numpy(), table.parts.numpy()
    count, planes, words, _ = parts.shape
    found = np.zeros((len(rows), planes * words, 1), np.int64)
    for sample, row in enumerate(rows):
        for plane in range(planes):
            for word in range(words):
                codes = (int(parts[m, plane, word, row[members[m, word]]]) for m in range(count))
                found[sample, plane * words + word, 0] = sum(codes)
    return found


def rows_of(table: JointTable, x: torch.Tensor) -> np.ndarray:
    index = table.index
    rows = np.rint(x.numpy() / np.float32(index.scale)) + index.zero_point
    return np.clip(rows, 0, index.levels - 1).astype(int)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SHAPES)
def test_columns_are_sums_of_functions_of_members(shape: dict[str, int]) -> None:
    table = joint_table(**shape)
    x = torch.randn(9, shape["n_in"], generator=torch.Generator().manual_seed(shape["seed"])) * 3
    rows = rows_of(table, x)
    expected = by_hand(table, rows)
    np.testing.assert_array_equal(table(x).numpy(), expected)
    np.testing.assert_array_equal(table.evaluate_inputs(x).numpy(), expected)
    planes, words, levels = table.parts.shape[1:]
    parts = [part(x).long().transpose(1, 2).reshape(len(x), -1, 1) for part in table.by_member()]
    np.testing.assert_array_equal(torch.stack(parts).sum(0).numpy(), expected)
    # the table of all combinations, the last member's rows innermost
    combined = table.table.reshape(planes * words, -1).numpy()
    place = np.zeros((len(x), words), int)
    for inputs in table.members.numpy():
        place = place * levels + rows[:, inputs]
    for column in range(planes * words):
        np.testing.assert_array_equal(combined[column, place[:, column % words]], expected[:, column, 0])
    assert table.stored_bytes() == table.parts.numel()
    assert (table.rows, table.n_tables, table.n_in, table.k) == (combined.shape[1], len(combined), len(combined), 1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SHAPES, st.floats(0.01, 1.0))
def test_columns_that_use_less_of_their_codes_stay_codes(shape: dict[str, int], fraction: float) -> None:
    table = joint_table(**shape)
    fractions = torch.linspace(fraction, 1.0, table.n_in)[:, None]
    narrowed = table.rescaled(fractions, 0)
    assert int(narrowed.parts.long().amax(3).sum(0).max()) <= 255
    members = len(table.parts)
    before, after = (t.table.reshape(t.n_in, -1).double() * t.scale for t in (table, narrowed))
    # every member's code is rounded by half a step at most
    assert bool(((before - after).abs() <= (members / 2 + 1e-3) * narrowed.scale).all())
    assert torch.equal(narrowed.offset, table.offset)


def test_members_evaluate_like_the_whole_and_read_its_inputs() -> None:
    table = joint_table(n_in=5, words=3, planes=2)
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    parts = [part.evaluate_inputs(x).transpose(1, 2).reshape(20, -1, 1) for part in table.by_member()]
    assert torch.equal(torch.stack(parts).sum(0), table.evaluate_inputs(x))
    assert not table.is_of_each
    for part in table.by_member():
        assert not part.is_of_each
        assert part.inputs_last(x).shape == (20, 5)
        assert torch.equal(part.replace(input="float")(x), part(x))
    assert torch.equal(table.inputs_last(x.reshape(20, 5, 1)), x)


def test_replaced_arguments_and_no_others_change() -> None:
    table = joint_table()
    scaled = table.replace(scale=table.scale * 2)
    assert isinstance(scaled, JointTable)
    assert torch.equal(scaled.scale, table.scale * 2)
    assert torch.equal(scaled.table, table.table)
    assert (scaled.read_shape, scaled.name, scaled.input) == (table.read_shape, table.name, table.input)
    assert table.replace(input="index").reading_real().input == "real"
    wide = table.replace(index=IndexQuantizer(0.1, 3, table.index.levels))
    assert wide.index.scale == 0.1
    described = table.describe()
    assert (described["words"], described["members"], described["levels"]) == (4, 2, 8)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_twin_has_equal_values_and_leads_back(hidden: bool) -> None:
    program = joint_program(hidden)
    check(program)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(3))
    twin = differentiable(program, trainable=True)
    torch.testing.assert_close(twin(x), program(x), rtol=1e-4, atol=1e-4)
    back = quantized(twin)
    check(back)
    ours, theirs = program.graph_module.state_dict(), back.graph_module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert show(back) == show(program)
    assert torch.equal(back(x), program(x))


def test_the_slope_of_the_twin_is_that_of_the_functions() -> None:
    ramp = torch.arange(32).to(torch.uint8)
    parts = torch.stack([ramp * 2, ramp]).reshape(2, 1, 1, 32)
    index = IndexQuantizer(0.25, 16, 32)
    table = JointTable((2,), index, torch.tensor([[1], [0]]), parts, torch.ones(1, 1), torch.zeros(1, 1), "joint")
    program = joint_program(table=table)
    x = torch.tensor([[0.3, -0.4]], requires_grad=True)
    differentiable(program).graph_module(x).sum().backward()
    weight = program.contraction(program.layers()[0]).real_weight().sum()
    # codes for one unit of an input, by the straight line through the rows
    expected = torch.tensor([[1 / 0.25, 2 / 0.25]]) * weight
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)
