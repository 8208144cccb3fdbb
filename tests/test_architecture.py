"""Imports go one way, every module imports alone, and loading the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kancompile"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
PARTS = ("frontend", "passes", "targets", "runtimes")
TOP = {"pipeline", "lowering", "diagnosis", "__main__", "__init__"}
TOP |= {"command_line", "command_parser", "command_session", "commands", "diagnosis_commands"}
KNOW_THE_PIPELINE = TOP | {"inspection", "reporting", "report_command"}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] == "kancompile"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0]
    for name in imported(path):
        target = name.split(".")[1] if "." in name else ""
        if part in PARTS:
            assert target not in set(PARTS) - {part}, f"{dotted(path)} imports {name}"
            assert target not in TOP, f"{dotted(path)} imports {name}"
        elif part.removesuffix(".py") not in KNOW_THE_PIPELINE:
            assert target != "pipeline", f"{dotted(path)} imports {name}"
    if part.removesuffix(".py") in (
        "program",
        "modules",
        "operators",
        "quantizers",
        "calibration",
        "errors",
        "rounding",
    ):
        assert not any(name.split(".")[1:2] and name.split(".")[1] in PARTS for name in imported(path))


def test_every_module_imports_alone() -> None:
    script = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    # one process for each would take minutes to load torch; reversed order is what catches a hidden dependency
    names = [dotted(path) for path in MODULES if path.name != "__main__.py"]
    for order in (names, names[::-1]):
        subprocess.run([sys.executable, "-c", script, *order], check=True, cwd=PACKAGE.parent)


def test_importing_the_package_does_not_load_torch() -> None:
    script = "import sys, kancompile, kancompile.command_line\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent)


def test_files_hold_one_idea() -> None:
    long = [f"{dotted(path)}: {len(path.read_text().splitlines())} lines" for path in MODULES]
    assert not [line for line in long if int(line.split()[1]) > 420]


def test_nothing_is_unpickled() -> None:
    for path in MODULES:
        text = path.read_text()
        assert "weights_only=False" not in text
        assert "allow_pickle=True" not in text
        assert "import pickle" not in text


@pytest.mark.needs("ruff", "git")
def test_the_linter_sees_every_file() -> None:
    """An exclusion of the links at the top once hid every folder of their names, half of the compiler."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        pytest.skip("no checkout")
    shown = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files", "."],
        check=True,
        cwd=root,
        capture_output=True,
        text=True,
    )
    seen = {Path(line).relative_to(root) for line in shown.stdout.splitlines() if line.endswith((".py", ".ipynb"))}
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py", "*.ipynb"],
        check=True,
        cwd=root,
        capture_output=True,
        text=True,
    )
    files = {Path(name) for name in listed.stdout.split("\0") if name and (root / name).exists()}
    assert len(files) > 300
    assert seen == files
