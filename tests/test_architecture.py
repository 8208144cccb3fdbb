"""Every module imports alone, loading the package is cheap, and while files move to their rooms faults only shrink."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_graph import HERE, ImportGraph, counts

GRAPH = ImportGraph(HERE)
MOST = {"rooms": 67, "floors": 17, "arrows": 320, "circles": 2}


def test_the_house_only_gets_simpler(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "rooms": len(GRAPH.rooms),
        "floors": GRAPH.floors,
        "arrows": len(GRAPH.arrows),
        "circles": len(GRAPH.circles),
    }
    assert not {name: count for name, count in found.items() if count > MOST[name]}
    with capsys.disabled():
        print(f"\n{counts(GRAPH)}")


def test_every_module_imports_alone() -> None:
    script = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    # one process for each would take minutes to load torch; reversed order is what catches a hidden dependency
    names = [name for name in GRAPH.files if not name.endswith("__main__")]
    for order in (names, names[::-1]):
        subprocess.run([sys.executable, "-c", script, *order], check=True, cwd=HERE)


def test_the_command_line_answers_without_torch() -> None:
    script = """
import sys
import kancompile
from kancompile.cli import main
try:
    main(["--help"])
except SystemExit as done:
    assert done.code == 0
assert "torch" not in sys.modules and "onnx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=HERE, stdout=subprocess.DEVNULL)


def test_files_hold_one_idea() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in GRAPH.files.items()}
    assert not {module: length for module, length in lengths.items() if length > 420}


def test_nothing_is_unpickled() -> None:
    for path in GRAPH.files.values():
        text = path.read_text()
        assert "weights_only=False" not in text
        assert "allow_pickle=True" not in text
        assert "import pickle" not in text


@pytest.mark.needs("ruff", "git")
def test_the_linter_sees_every_file() -> None:
    """An exclusion of the links at the top once hid every folder of their names, half of the compiler."""
    if not (HERE / ".git").exists():
        pytest.skip("no checkout")
    shown = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files", "."],
        check=True,
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    seen = {Path(line).relative_to(HERE) for line in shown.stdout.splitlines() if line.endswith((".py", ".ipynb"))}
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py", "*.ipynb"],
        check=True,
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    files = {Path(name) for name in listed.stdout.split("\0") if name and (HERE / name).exists()}
    assert len(files) > 300
    assert seen == files
