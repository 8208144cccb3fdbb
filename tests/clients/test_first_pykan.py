"""The first versions of pykan, which other packages pin: their KAN has a ``train`` of its own, and is often in float64.

They have the module name of the present one, so that they run in a folder and a process of their own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_graph import HERE

VERSION = "0.0.5"
SCRIPT = """
import contextlib, io, sys
import kan, torch
import kancompile

assert "train" in vars(kan.KAN)
x = torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
y = torch.sin(3 * x[:, [0]]) + x[:, [1]] ** 2
data = {"train_input": x, "train_label": y, "test_input": x, "test_label": y}
with contextlib.redirect_stdout(sys.stderr):
    model = kan.KAN(width=[2, 3, 1], grid=4, k=3, seed=0)
    model.train(data, steps=3)
    model.fix_symbolic(0, 1, 0, "sin")
    for kind in (torch.float32, torch.float64):
        model.to(kind)
        flags = [module.training for module in model.modules()]
        compiled = kancompile.compile(model, x.to(kind))
        result = compiled.validate(x.to(kind))
        assert len(result.layers) == 2 and result.compiled.sqnr_db > 35, result.table()
        assert result.runtime.differing == 0
        copied = any(note.startswith("model: holds float64 values") for note in compiled.manifest["notes"])
        assert copied == (kind == torch.float64)
        assert compiled.beside_float().float_bytes is not None
        assert [module.training for module in model.modules()] == flags
        assert next(model.parameters()).dtype == kind
"""


@pytest.mark.slow
@pytest.mark.needs("matplotlib")
def test_the_first_pykan_compiles(tmp_path: Path) -> None:
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--target",
        str(tmp_path),
        "--no-deps",
        f"pykan=={VERSION}",
    ]
    installed = subprocess.run(install, capture_output=True, text=True, check=False, timeout=120)
    if installed.returncode:
        pytest.skip(
            f"pip cannot install pykan=={VERSION}: {(installed.stderr.strip().splitlines() or ['no reason'])[-1]}"
        )
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"PYTHONPATH": f"{tmp_path}:{HERE}", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
