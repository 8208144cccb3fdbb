"""A single edge function of a compiled model, as curves, drawn with characters and by matplotlib."""

from __future__ import annotations

import pytest
import torch

import kancompile
from kancompile import CompiledModel, KanCompileError, Recipe
from kancompile.reporting import text_plot
from tests.interfaces import Rbf


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return kancompile.compile(Rbf(4, 2), x, recipe=Recipe(goal_sqnr=None, method="uniform"))


def test_an_edge_is_evaluated_and_drawn_with_characters(compiled: CompiledModel) -> None:
    edge = compiled.edge(0, 2, 1)
    assert (edge.name.input, edge.name.output) == (2, 1)
    spread = float(edge.exact.max() - edge.exact.min())
    assert float((edge.exact - edge.compiled).abs().max()) < 0.05 * spread
    plot = text_plot(edge, width=40, height=8).splitlines()
    assert len(plot) == 10
    drawn = [line.partition("|")[2] for line in plot[1:-1]]
    columns = [[row for row, line in enumerate(drawn) if line.ljust(40)[column] == "#"] for column in range(40)]
    assert all(len(rows) == 1 for rows in columns)
    top = max(range(40), key=lambda column: float(edge.compiled[round(column * (len(edge.x) - 1) / 39)]))
    assert columns[top][0] == min(row for rows in columns for row in rows)


def test_without_numbers_the_edge_that_varies_most_is_taken(compiled: CompiledModel) -> None:
    assert compiled.edge().importance == pytest.approx(1.0)
    name = compiled.captured.layers()[0].name
    assert compiled.edge(name, 2, 1).name == compiled.edge(0, 2, 1).name


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ((0, 4, 1), "input is 4, expected 0"),
        ((0, 2, -1), "output is -1, expected 0"),
        (("nowhere", 0, 0), "no layer 'nowhere'"),
        ((0, 2, None), "expected both numbers or none"),
    ],
)
def test_edges_that_do_not_exist_are_refused(compiled: CompiledModel, edge: tuple[int, int, int], message: str) -> None:
    with pytest.raises(KanCompileError, match=message):
        compiled.edge(*edge)


@pytest.mark.needs("matplotlib")
def test_an_edge_is_plotted(compiled: CompiledModel) -> None:
    from matplotlib.figure import Figure

    axes = compiled.plot_edge(0, 2, 1, axes=Figure().subplots())
    assert "input 2 to output 1" in axes.get_title()
    edge = compiled.edge(0, 2, 1)
    curves = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert curves["float"] == pytest.approx(edge.exact.numpy())
    assert curves["compiled"] == pytest.approx(edge.compiled.numpy())
