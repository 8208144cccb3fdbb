"""Sources of reports from any model, and a browser that opens pages."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kancompile.calibration import load_calibration
from kancompile.pipeline import compile
from kancompile.reporting.source import ReportSource, of_compiled
from kancompile.runtimes import web
from kancompile.validation import validate

DRIVER = Path(__file__).with_name("open_report.mjs")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def source_of(model: nn.Module, x: Tensor, judged: Any, recipe: dict[str, Any] | None = None) -> ReportSource:
    compiled = compile(model.eval(), x, recipe=recipe)
    judging = load_calibration(judged)
    result = validate(
        compiled.session_bytes,
        compiled.reference,
        judging,
        program=compiled.program,
        float_program=compiled.captured,
    )
    return of_compiled(compiled, judging, f"{len(judging)} test samples", result, "model.onnx")


def no_browser() -> str | None:
    if shutil.which("node") is None:
        return "no node on the PATH; install it: apt-get install nodejs"
    if CHROMIUM is None:
        return "no chromium on the PATH; install it: apt-get install chromium"
    if not (web.node_modules() / "playwright-core").is_dir():
        folder = web.node_modules().parent
        return f"no playwright-core; install it: npm install --prefix {folder} playwright-core@1.65.1"
    return None


def opened(path: Path, width: int, scheme: str = "light") -> dict[str, Any]:
    """Open a page and say what a reader would notice (see ``open_report.mjs``)."""
    command = ["node", str(DRIVER), str(web.node_modules()), str(CHROMIUM), str(path), str(width), scheme]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen
