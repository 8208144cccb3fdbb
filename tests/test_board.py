"""The board: which cells there are, and a page that says what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.board.advice import advice
from benchmarks.board.cells import Cell, everything, required
from benchmarks.board.findings import findings
from benchmarks.board.page import PAGE, STORED, page, stored_rivals
from benchmarks.board.truth_tables import TruthTables

NO_RIVALS: dict[str, list[Any]] = {"trained": [], "published": []}


def result(cell: Cell, lost: float, **others: Any) -> tuple[str, dict[str, Any]]:
    """Invent what was measured of a cell."""
    measured = {
        "cell": vars(cell),
        "float_accuracy": 97.0,
        "accuracy": 97.0 - lost,
        "lost": lost,
        "differing": 0,
        "bytes": 1000,
        "float_bytes": 4000,
        "times_as_fast_as_float": {"1": 2.0, "32": 4.0},
        "times_as_slow_as_plain": {"1": 1.5, "32": 3.0},
        "machine": {"cpu": "x", "cores": 2, "instructions": "none"},
    }
    return cell.key, measured | others


def test_the_required_cells_are_those_of_the_grid() -> None:
    """Six methods after training at five widths, six with training at three, seeds as the grid says."""
    cells = required()
    after = 4 * 3 * 6 * 5 + 2 * (5 * 5 + 1) + 3 * 6 * 5
    trained = (2 * 3 + 1) * 6 * 3
    assert len(cells) == len({cell.key for cell in cells}) == after + trained + 9 * 2
    assert set(cells) <= set(everything())


def test_a_page_says_means_spreads_and_what_was_not_run() -> None:
    """Two of three seeds are marked; a network without a cell, and a method without one, are not run."""
    cells = [Cell("mnist_efficient_kan", "gptq", 4, 8, seed) for seed in range(3)]
    two = dict(result(cell, lost) for cell, lost in zip(cells, (0.1, 0.3), strict=False))
    three = two | dict([result(cells[2], 0.2)])
    assert "| `gptq` | not run | 0.20 ± 0.14 (2) | not run |" in page(two, NO_RIVALS)
    assert "| `gptq` | not run | 0.20 ± 0.10 | not run |" in page(three, NO_RIVALS)
    assert "| FastKAN, MNIST | all | not run |" in page(three, NO_RIVALS)
    assert "| efficient-KAN, MNIST | W4A8 | 1,000 | 4,000 | 2.0 x | 4.0 x | 1.5 x | 3.0 x |" in page(three, NO_RIVALS)
    assert "in 3 of 3 files none differs" in page(three, NO_RIVALS)
    assert f"outputs differ in {cells[2].key}." in page(three | dict([result(cells[2], 0.2, differing=4)]), NO_RIVALS)


def test_a_finding_holds_only_where_its_numbers_say_so() -> None:
    """Near full precision is half a point at most, in the worst network."""
    methods = ("lsq", "lsq+", "pact")
    good = dict(result(Cell("mnist_fast_kan", method, 4, 4), 0.4) for method in methods)
    text = "LSQ, LSQ+ and PACT near full precision at 4 bits on shallow KANs"
    assert f"| {text} | holds |" in findings(good)
    bad = good | dict([result(Cell("mnist_efficient_kan", "pact", 4, 4), 0.6)])
    assert f"| {text} | does not hold |" in findings(bad)
    assert f"| {text} | not run |" in findings(dict(list(good.items())[:2]))


def test_advice_is_the_quickest_method_that_is_nearly_best() -> None:
    """Within a tenth of a point of the best one, and only where all methods were run."""
    lost = {"uniform": 1.0, "gptq": 0.25, "awq+gptq": 0.2, "adaround": 0.3, "brecq": 0.17, "hawq-v2": 0.3}
    cells = dict(result(Cell("mnist_fast_kan", method, 4, 8), value) for method, value in lost.items())
    row = "| FastKAN | not run | `gptq` 0.25; best `brecq` 0.17 (1) | not run | not run | not run |"
    assert row in advice(cells)
    del cells[Cell("mnist_fast_kan", "brecq", 4, 8).key]
    assert advice(cells) == "not run."


def test_the_page_is_that_of_the_stored_cells() -> None:
    """Nobody writes the page by hand."""
    cells = {Cell(**found["cell"]).key: found for found in json.loads(STORED.read_text(encoding="utf-8"))}
    assert PAGE.read_text(encoding="utf-8") == page(cells, stored_rivals())


def test_truth_tables_are_computed_from_weights_and_ranges() -> None:
    """Of one edge, silu and no spline: integers in steps of the layer's quantizer, clipped; a pruned edge is 0."""
    step, bits = "brevitas_module.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value", (3, 4)
    state = {
        f"input_layer.{step}": torch.tensor(4.0),
        f"layers.0.output_quantizer.{step}": torch.tensor(2.0),
        "layers.0.grid": torch.arange(-7.0, 8.0).expand(2, -1),
        "layers.0.spline_weight": torch.zeros(1, 2, 11),
        "layers.0.spline_scaler": torch.ones(1, 2),
        "layers.0.spline_selector": torch.tensor([[1.0, 0.0]]),
        "layers.0.base_weight": torch.ones(1, 2),
    }
    x = np.arange(-4, 4) * 1.0  # 4 / 2^2 a step
    wanted = np.clip(np.rint(x / (1 + np.exp(-x)) / 0.25), -8, 7).astype(np.int32)
    published = torch.tensor(np.stack([wanted, wanted * 0]))[..., None]
    tables = TruthTables(state, bits, (published,), torch.nn.functional.silu)
    assert tables.compare() == (16, 0)
    assert TruthTables(state, bits, (published + 1,), torch.nn.functional.silu).compare() == (16, 16)


@pytest.mark.slow
@pytest.mark.needs("pykan")
def test_a_cell_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network is trained, compiled and measured; the second run has nothing left to do."""
    from benchmarks.board import __main__ as board

    arguments = ["board", "--checkpoints", str(tmp_path), "--out", str(tmp_path / "cells"), "--networks", "pykan_iris"]
    monkeypatch.setattr("sys.argv", [*arguments, "--methods", "gptq", "--bits", "W4A8"])
    monkeypatch.setattr(board, "STORED", tmp_path / "absent.json")
    board.main()
    (file,) = (tmp_path / "cells").glob("*.json")
    found = json.loads(file.read_text())
    assert file.stem == "pykan_iris-gptq-W4A8-1000-0"
    assert found["differing"] == 0
    assert found["accuracy"] > 80
    written = file.stat().st_mtime_ns
    board.main()
    assert file.stat().st_mtime_ns == written
