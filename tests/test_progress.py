"""Progress: a bar on a terminal, few lines elsewhere, silence where wanted; the items always come through."""

import io
import os
from pathlib import Path
from typing import Any

import pytest

from kancompile import progress
from kancompile.progress import quiet, say, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_short_work_prints_nothing(clock: list[float]) -> None:
    stream = io.StringIO()
    assert list(track(range(5), "work", stream=stream)) == [0, 1, 2, 3, 4]
    assert stream.getvalue() == ""


def test_long_work_prints_a_line_now_and_then_and_one_at_its_end(clock: list[float]) -> None:
    stream = io.StringIO()
    for _ in track(range(30), "rounding weights", stream=stream):
        clock[0] += 1
    lines = stream.getvalue().splitlines()
    assert lines[0] == "rounding weights: 1/30 (1 s)"
    assert lines[-1] == "rounding weights: 30/30 done in 30.0 s"
    assert len(lines) == 4


def test_unknown_totals_are_left_out(clock: list[float]) -> None:
    stream = io.StringIO()
    for _ in track((i for i in range(3)), "reading", stream=stream):
        clock[0] += 1
    assert stream.getvalue().splitlines()[-1] == "reading: 3 done in 3.0 s"


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SILENT_SECONDS", 0)
    stream = Terminal()
    assert list(track([7, 8], "work", stream=stream)) == [7, 8]
    assert "work" in stream.getvalue()
    assert "\r" in stream.getvalue()


def test_quiet_silences_inside_its_block_only(clock: list[float]) -> None:
    stream = io.StringIO()
    with quiet():
        for _ in track(range(3), "work", stream=stream):
            clock[0] += 5
        say("text", stream)
        with quiet(False):
            say("inner", stream)
    say("after", stream)
    assert stream.getvalue() == "inner\nafter\n"


NOTEBOOK_CELL = """
import sys
from kancompile import progress
progress._SILENT_SECONDS = 0
%s
assert list(progress.track(range(4), "rounding weights")) == [0, 1, 2, 3]
"""


def outputs_in_a_notebook(monkeypatch: pytest.MonkeyPatch, before: str = "") -> list[dict[str, Any]]:
    """Execute a cell that tracks work in a real kernel; a bar would be closed at the end, so updates are looked at."""
    import nbclient
    import nbformat

    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    cells = [nbformat.v4.new_code_cell(NOTEBOOK_CELL % before)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs: list[dict[str, Any]] = notebook.cells[0].outputs
    return outputs


@pytest.mark.filterwarnings("ignore")  # of the machinery of notebooks
@pytest.mark.needs("nbclient", "ipywidgets")
def test_a_notebook_shows_a_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = outputs_in_a_notebook(monkeypatch)
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    views = [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    text = [output["data"].get("text/plain", "") for output in views]
    assert len(views) == 1, outputs
    assert "rounding weights" in text[0] or "0/4" in text[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.needs("nbclient")
def test_a_notebook_without_widgets_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    hide = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "ipywidgets" else find(name, *more)
"""
    outputs = outputs_in_a_notebook(monkeypatch, hide)
    assert {output.get("name") for output in outputs} == {"stderr"}
    assert "rounding weights: 4/4 done" in "".join(output["text"] for output in outputs)
