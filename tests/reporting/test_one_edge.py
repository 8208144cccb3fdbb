"""A single edge function of a compiled model, as curves and drawn with characters."""

from __future__ import annotations

import pytest
import torch

import kancompile
from kancompile import KanCompileError, Recipe
from kancompile.reporting import edge_of, text_plot
from tests.interfaces import Rbf


def test_an_edge_is_evaluated_and_drawn() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    compiled = kancompile.compile(Rbf(4, 2), x, recipe=Recipe(goal_sqnr=None, method="uniform"))
    edge = edge_of(compiled, "0:1,2")
    assert (edge.name.output, edge.name.input) == (1, 2)
    spread = float(edge.exact.max() - edge.exact.min())
    assert float((edge.exact - edge.compiled).abs().max()) < 0.05 * spread
    plot = text_plot(edge, width=40, height=8).splitlines()
    assert len(plot) == 10
    drawn = [line.partition("|")[2] for line in plot[1:-1]]
    columns = [[row for row, line in enumerate(drawn) if line.ljust(40)[column] == "#"] for column in range(40)]
    assert all(len(rows) == 1 for rows in columns)
    top = max(range(40), key=lambda column: float(edge.compiled[round(column * (len(edge.x) - 1) / 39)]))
    assert columns[top][0] == min(row for rows in columns for row in rows)
    assert edge_of(compiled).importance == pytest.approx(1.0)
    with pytest.raises(KanCompileError, match="input is 4, expected 0"):
        edge_of(compiled, "0:1,4")
