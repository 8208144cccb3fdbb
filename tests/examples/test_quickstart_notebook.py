"""The notebook runs as it is committed, and is committed without what one machine made of it."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_notebook_is_committed_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.filterwarnings("ignore")  # of the machinery of notebooks
@pytest.mark.needs("nbclient", "matplotlib")
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    found = re.search(r"SQNR of this function: (\d+) dB", text)
    assert found is not None
    assert int(found[1]) >= 20  # the drawn table is that function, not another
    assert "simulation and ONNX Runtime: 0 of" in text
    ratio = re.search(r"takes ([\d.]+) times as long", text)
    assert ratio is not None
    assert float(ratio[1]) > 1
