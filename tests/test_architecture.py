"""Every file has a floor, imports go down, folders have doors, every module imports alone, loading the package is cheap."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_graph import HERE, ImportGraph, counts, names_in, offered

GRAPH = ImportGraph(HERE)
PACKAGE = HERE / GRAPH.package
FLOORS = (
    ("errors", "progress"),
    ("recipe", "processes"),
    ("ir",),
    ("data",),
    ("frontend", "passes", "targets", "runtimes"),
    ("validation",),
    ("compiler",),
    ("diagnosis", "qat"),
    ("reporting",),
    ("cli",),
)
"""The rooms from the ground up; rooms of one floor know nothing of each other."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_ARROWS = 76


def test_every_room_has_a_floor(capsys: pytest.CaptureFixture[str]) -> None:
    entries = {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries - {"__init__", "__main__", "py"} == set(FLOOR), "give a new entry of kancompile/ a floor, or a room"
    assert set(GRAPH.rooms) == set(FLOOR)
    assert len(GRAPH.arrows) <= MOST_ARROWS
    with capsys.disabled():
        print(f"\n{counts(GRAPH)}")


@pytest.mark.parametrize("room", FLOOR)
def test_imports_go_down(room: str) -> None:
    up = [
        f"{entry.file} imports {GRAPH.file_of(entry)}"
        for entry in GRAPH.imports
        if GRAPH.room(entry.file) == room
        and (other := GRAPH.room(GRAPH.file_of(entry))) != room
        and FLOOR.get(other, len(FLOORS)) >= FLOOR[room]
    ]
    assert not up


def test_no_file_imports_itself_by_a_detour() -> None:
    assert not GRAPH.circles


def test_folders_are_entered_by_their_doors() -> None:
    """From outside a folder only names of its ``__all__`` are used, by the package and by the examples."""
    imports = list(GRAPH.imports)
    for path in sorted((HERE / "examples").rglob("*.py")):
        imports += GRAPH.imports_of(f"examples.{path.stem}", path)
    past = [
        f"{entry.file}: from {entry.module} import {entry.name}"
        for entry in imports
        if (door := GRAPH.door(entry)) is not None
        and not (entry.module == door and not entry.name)
        and entry.name not in offered(GRAPH.files[door])
    ]
    assert not past


@pytest.mark.parametrize("folder", sorted(GRAPH.folders))
def test_doors_offer_what_there_is_and_what_is_used(folder: str) -> None:
    names = offered(GRAPH.files[folder])
    assert names, "a folder says in __all__ what it offers"
    assert set(names) <= names_in(GRAPH.files[folder])
    assert not [name for name in names if name.startswith("_")]
    assert GRAPH.files[folder].read_text().startswith('"""')


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


def test_nodes_answer_for_themselves() -> None:
    """What depends on the class of a node, or on whether it has a window, may only become less."""
    classes = r"(Any|Integer)?Contraction|(Any|Table|Polynomial)?Expansion"
    texts = {module: path.read_text() for module, path in GRAPH.files.items()}
    tests = re.compile(rf"isinstance\([^)]*\b({classes})\b")
    assert sum(len(tests.findall(text)) for text in texts.values()) <= 35
    contractions = re.compile(r"isinstance\([^)]*Contraction\b|geometry is (not )?None")
    assert sum(bool(contractions.search(text)) for text in texts.values()) <= 27


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
