"""The mark of optional tools, in a suite of its own: with the tools and without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from kancompile.runtimes import RUNTIMES
from kancompile.runtimes.contract import available
from tests.needs import pytest_itemcollected
from tests.tools import TOOLS

ROOT = Path(__file__).parent.parent
SUITE = """
import contextlib
import importlib
import subprocess
import sys

import pytest

from tests.needs import require
from tests.tools import TOOLS

needs_fish = pytest.mark.needs("fish")


def call():
    subprocess.run(["fish"], check=True)


def test_unmarked():
    call()

def test_unmarked_and_swallowed():
    with contextlib.suppress(Exception):
        call()

@needs_fish
def test_marked():
    call()

@pytest.mark.needs("zsh", "fish")
def test_marked_with_both():
    call()

@pytest.mark.needs("bash")
def test_marked_with_another():
    call()

def test_looked_for():
    assert (TOOLS["fish"].missing() is None) == (TOOLS["zsh"].missing() is None)

@pytest.mark.parametrize("shell", [pytest.param("fish", marks=needs_fish), "/bin/sh"])
def test_parameter(shell):
    subprocess.run([shell, "-c", "exit 0"], check=True)

def test_required():
    require("fish")
    call()


@pytest.fixture(scope="module")
def shared():
    call()

@needs_fish
def test_marked_with_fixture(shared):
    pass

def test_unmarked_with_fixture_of_another(shared):
    pass

@pytest.fixture(scope="module")
def requiring():
    require("fish")

@pytest.mark.parametrize("time", ["first", "again"])
def test_fixture_requires(requiring, time):
    call()

@pytest.fixture
def until_the_end():
    yield
    call()

@needs_fish
def test_ends_with_a_call(until_the_end):
    pass


def test_in_a_shell():
    subprocess.run(["/bin/sh", "-c", "cd . && fish"])

def test_as_an_argument():
    subprocess.run(["/bin/sh", "/somewhere/fish"])

def test_emulator():
    subprocess.run(["qemu-x86_64-static", "-cpu", "Haswell", "/bin/sh"])

def test_version_may_be_asked_for():
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(["fish", "--version"])

def test_module_in_a_process():
    subprocess.run([sys.executable, "-m", "sphinx", "--version"])

def test_import():
    import tract

def test_import_by_name():
    importlib.import_module("tract.part")

def test_import_or_skip():
    pytest.importorskip("tract")

@pytest.mark.needs("tract")
def test_marked_import():
    import tract

def test_played_absence(monkeypatch):
    monkeypatch.setitem(sys.modules, "tract", None)
    with pytest.raises(ImportError):
        import tract
"""
FISH = 'mark the test @pytest.mark.needs("fish")'
ABSENT_FISH = "no fish on the PATH; install it: apt-get install fish"
ABSENT_BOTH = f"no zsh on the PATH; install it: apt-get install zsh; {ABSENT_FISH}"
TRACT = 'the Python module tract is used, which a machine may lack: mark the test @pytest.mark.needs("tract")'
# where the tools are there, where they are not; None where a test passes
OUTCOMES = {
    "test_unmarked": (f"the program fish is used, which a machine may lack: {FISH}",) * 2,
    "test_unmarked_and_swallowed": (FISH, FISH),
    "test_marked": (None, ABSENT_FISH),
    "test_marked_with_both": (None, ABSENT_BOTH),
    "test_marked_with_another": (FISH, "no bash on the PATH; install it: apt-get install bash"),
    "test_looked_for": (None, None),
    "test_parameter[fish]": (None, ABSENT_FISH),
    "test_parameter[/bin/sh]": (None, None),
    "test_required": (None, ABSENT_FISH),
    "test_marked_with_fixture": (None, ABSENT_FISH),
    "test_unmarked_with_fixture_of_another": (FISH, FISH),
    "test_fixture_requires[first]": (None, ABSENT_FISH),
    "test_fixture_requires[again]": (None, ABSENT_FISH),
    "test_ends_with_a_call": (None, ABSENT_FISH),
    "test_in_a_shell": (FISH, FISH),
    "test_as_an_argument": (FISH, FISH),
    "test_emulator": ('mark the test @pytest.mark.needs("ort-x86-haswell") or @pytest.mark.needs("ort-x86-nehalem")',)
    * 2,
    "test_version_may_be_asked_for": (None, None),
    "test_module_in_a_process": ("the Python module sphinx is used, which a machine may lack: mark the test",) * 2,
    "test_import": (TRACT, TRACT),
    "test_import_by_name": (TRACT, TRACT),
    "test_import_or_skip": (TRACT, TRACT),
    "test_marked_import": (None, "no tract; install it: pip install 'kancompile[tract]'"),
    "test_played_absence": (None, None),
    # a test module that imports a tool for itself
    "": ("the Python module tract, which a machine may lack, is used while tests are collected",) * 2,
}


def outcomes(folder: Path, there: bool) -> dict[str, str | None]:
    """Run the suite on a PATH and with modules of its own; give the reason that a test failed or was skipped for."""
    programs, modules = folder / "programs", folder / "modules"
    (modules / "tract").mkdir(parents=True)
    programs.mkdir()
    (modules / "tract" / "__init__.py").touch()
    (modules / "tract" / "part.py").touch()
    for name in ("bash", "fish", "zsh") if there else ():
        (programs / name).write_text("#!/bin/sh\nexit 0\n")
        (programs / name).chmod(0o755)
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "test_imports.py").write_text("import tract\n")
    report = folder / "report.xml"
    options = ["-c", ROOT / "pyproject.toml", "-p", "tests.conftest", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    # a machine without the module, which may be installed here
    hidden = (
        ""
        if there
        else "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'tract' else f(n, *a); "
    )
    command = f"{hidden}import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", command, *options, "--continue-on-collection-errors", folder],
        cwd=folder,
        env=environment | {"PATH": str(programs), "PYTHONPATH": f"{ROOT}{os.pathsep}{modules}"},
        capture_output=True,
        text=True,
    )
    assert report.exists(), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        reasons = [element for element in case if element.tag in ("failure", "error", "skipped")]
        found[case.get("name") if "test_suite" in str(case.get("classname")) else ""] = (
            f"{reasons[0].get('message')}\n{reasons[0].text}" if reasons else None
        )
    return found


@pytest.mark.parametrize("there", [True, False], ids=["with the tools", "without them"])
def test_calls_are_marked_calls(there: bool, tmp_path: Path) -> None:
    found = outcomes(tmp_path, there)
    assert set(found) == set(OUTCOMES)
    for name, expected in OUTCOMES.items():
        reason = expected[0 if there else 1]
        if reason is None:
            assert found[name] is None, f"{name}: {found[name]}"
        else:
            assert reason in (found[name] or ""), f"{name}: {found[name]}"


def test_an_unknown_tool_is_refused() -> None:
    item = SimpleNamespace(nodeid="test_it", iter_markers=lambda name: [pytest.mark.needs("gcc", "fihs").mark])
    with pytest.raises(pytest.UsageError, match=r"test_it needs \['fihs'\], expected names of tests/tools.py"):
        pytest_itemcollected(item)  # type: ignore[arg-type]


def test_every_runtime_that_may_be_missing_has_a_mark() -> None:
    assert {name for name, runtime in RUNTIMES.items() if runtime.missing is not available} <= set(TOOLS)


def test_what_is_missing_comes_with_the_way_to_install_it() -> None:
    reasons = [tool.missing() for name, tool in TOOLS.items() if name != "cuda"]
    assert [reason for reason in reasons if reason is not None and "install" not in reason] == []
