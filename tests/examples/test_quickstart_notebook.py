"""The notebook runs as it is committed, from what a wheel brings, and shows what it printed on one machine."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# torch, numpy and what 'kancompile[examples,plots]' installs
BROUGHT = {"kancompile", "torch", "numpy", "matplotlib", "sklearn"}
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_cells_are_short_and_import_what_a_wheel_brings() -> None:
    assert max(len(cell["source"]) for cell in CELLS) <= 15
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in CELLS))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {(name or "").split(".")[0] for name in imported} <= BROUGHT


def test_outputs_are_stored_and_say_nothing_of_a_machine() -> None:
    kinds = {output["output_type"] for cell in CELLS for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    text = json.dumps([cell["outputs"] for cell in CELLS])
    assert "image/png" in text
    assert "simulation and ONNX Runtime: 0 of" in text
    assert not re.search(r'"stderr"|/home/|/root/|/tmp/|/work/|C:', re.sub(r'"image/png": "[^"]*"', "", text))
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the machinery of notebooks
@pytest.mark.needs("nbclient", "matplotlib")
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    accuracy = re.search(r"float accuracy ([\d.]+) %", text)
    assert accuracy is not None
    assert float(accuracy[1]) > 90
    assert "simulation and ONNX Runtime: 0 of" in text
    ratio = re.search(r"takes ([\d.]+) times as long", text)
    assert ratio is not None
    assert float(ratio[1]) > 1
