"""Sources of reports from any model, and a browser that opens pages."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kancompile.compiler.compile import compile
from kancompile.data.calibration import load_calibration
from kancompile.reporting.facts.source import ReportSource, of_compiled
from kancompile.runtimes import web
from kancompile.validation.validate import validate
from tests.tools import browser

DRIVER = Path(__file__).with_name("open_report.mjs")


def source_of(model: nn.Module, x: Tensor, judged: Any, recipe: dict[str, Any] | None = None) -> ReportSource:
    # no layer is refined: that takes several compilations
    compiled = compile(model.eval(), x, recipe={"goal_sqnr": None, **(recipe or {})})
    judging = load_calibration(judged)
    result = validate(
        compiled.session_bytes,
        compiled.reference,
        judging,
        program=compiled.program,
        float_program=compiled.captured,
    )
    return of_compiled(compiled, judging, f"{len(judging)} test samples", result, "model.onnx")


def opened(path: Path, width: int, scheme: str = "light") -> dict[str, Any]:
    """Open a page and say what a reader would notice (see ``open_report.mjs``)."""
    command = ["node", str(DRIVER), str(web.node_modules()), str(browser()), str(path), str(width), scheme]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen
