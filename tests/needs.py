"""The mark ``needs`` names the optional tools that a test calls (``tests/tools.py`` lists them).

A test is skipped where one of its tools is missing, and fails, on every machine, where it calls one that it does not name.
What a program starts in its turn is not seen.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from tests.tools import TOOLS

COLLECTION = object()
"""Stands for all test modules while they are imported, which must work on a machine without any tool."""

# the test that runs and the fixtures that are being set up for it, innermost last; empty between tests
_active: list[Any] = []
# by test or fixture, since fixtures of a module or session are set up for one test and serve others
_required: dict[Any, set[str]] = {}
_called: dict[Any, dict[str, tuple[str, ...]]] = {}


def _naming(what: str, kind: str) -> tuple[str, ...]:
    return tuple(name for name, tool in TOOLS.items() if what in getattr(tool, kind))


PROGRAMS = {what: _naming(what, "programs") for tool in TOOLS.values() for what in tool.programs}
MODULES = {what: _naming(what, "modules") for tool in TOOLS.values() for what in tool.modules}


@functools.cache
def _missing(name: str) -> str | None:
    return TOOLS[name].missing()


def require(*names: str) -> None:
    """Do in a test or fixture what the mark does, for tools that are known there only.

    A fixture's tools count as named by every test that uses the fixture.
    """
    for name in names:
        reason = _missing(name)
        if reason is not None:
            pytest.skip(reason)
    if _active:
        _required[_active[-1]].update(names)


def _marked(item: pytest.Item) -> list[str]:
    return [name for mark in item.iter_markers("needs") for name in mark.args]


def _fixtures(item: pytest.Item) -> list[Any]:
    info = getattr(item, "_fixtureinfo", None)  # pytest has no public name for it
    return [] if info is None else [defined[-1] for defined in info.name2fixturedefs.values()]


def _named() -> set[str]:
    if _active[0] is COLLECTION:
        return set()
    owners = [*_active, *_fixtures(_active[0])]
    return set(_marked(_active[0])).union(*(_required.get(owner, ()) for owner in owners))


def _call(what: str, names: tuple[str, ...]) -> None:
    """Fail unless the running test names one of the tools that a program or module belongs to."""
    __tracebackhide__ = True
    if not _active:
        return
    _called[_active[-1]][what] = names
    if _named().isdisjoint(names):
        marks = " or ".join(f'@pytest.mark.needs("{name}")' for name in names)
        if _active[0] is COLLECTION:
            pytest.fail(
                f"{what}, which a machine may lack, is used while tests are collected; use it in tests with {marks}"
            )
        pytest.fail(f"{what} is used, which a machine may lack: mark the test {marks}")


# what is run


def _program_called(event: str, details: tuple[Any, ...]) -> None:
    """Look at a program before it is started, whether it is there or not."""
    __tracebackhide__ = True
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec"):
        words = details[1].split() if isinstance(details[1], str) else details[1]  # one text on Windows
        arguments = [os.fsdecode(word) for word in words]
        paths = [os.fsdecode(details[0] or words[0]), *arguments[:1], *filter(os.path.isabs, arguments)]
    elif event == "os.system":
        arguments, paths = ["sh", "-c", os.fsdecode(details[0])], []
    else:
        return
    if arguments[1:] == ["--version"]:
        return  # how one finds out whether it is there
    for program in dict.fromkeys([*map(os.path.basename, paths), *_shell_commands(arguments)]):
        if program in PROGRAMS:
            _call(f"the program {program}", PROGRAMS[program])
    for option, module in pairwise(arguments):
        if option == "-m" and module.partition(".")[0] in MODULES:
            _imported(module.partition(".")[0])


def _shell_commands(arguments: Sequence[str]) -> list[str]:
    """List the first words of the commands that a shell is given."""
    if os.path.basename(arguments[0]) not in ("sh", "bash") or "-c" not in arguments[:-1]:
        return []
    text = arguments[arguments.index("-c") + 1]
    return [os.path.basename(word) for word in re.findall(r"(?:^|[;&|(\n])\s*([^\s;&|()]+)", text)]


def _imported(module: str) -> None:
    __tracebackhide__ = True
    _call(f"the Python module {module}", MODULES[module])


# what is imported: of the project and its tests, at any time; the packages that they use may import what they like

_PACKAGES = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))


def _of_project(importer: Mapping[str, Any] | None) -> bool:
    if importer is None or importer is globals():  # an extension module imports through the frame of this module
        return False
    by_importorskip = importer.get("__name__") == "_pytest.outcomes"
    return by_importorskip or not (importer.get("__file__") or "").startswith(_PACKAGES)


def _module_called(name: str, importer: Mapping[str, Any] | None) -> None:
    __tracebackhide__ = True
    module = name.partition(".")[0]
    played_missing = sys.modules.get(module, ...) is None  # by a test that puts None there
    if module in MODULES and not played_missing and _of_project(importer):
        _imported(module)


def _watched_import(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def imports(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        __tracebackhide__ = True
        if _active and level == 0:
            _module_called(name, globals)
        return original(name, globals, locals, fromlist, level)

    return imports


def _watched_import_module(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def import_module(name: str, package: str | None = None) -> Any:
        __tracebackhide__ = True
        if _active:
            _module_called(name, sys._getframe(1).f_globals)
        return original(name, package)

    return import_module


def pytest_configure(config: pytest.Config) -> None:
    sys.addaudithook(_program_called)  # which cannot be taken back, and does nothing between tests
    patches = pytest.MonkeyPatch()
    patches.setattr(builtins, "__import__", _watched_import(builtins.__import__))
    patches.setattr(importlib, "import_module", _watched_import_module(importlib.import_module))
    config.add_cleanup(patches.undo)


# when it counts


@contextmanager
def _watching(owner: Any) -> Iterator[None]:
    _active.append(owner)
    _required.setdefault(owner, set())
    _called.setdefault(owner, {})
    try:
        yield
    finally:
        _active.pop()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    with _watching(COLLECTION):
        return (yield)


def pytest_itemcollected(item: pytest.Item) -> None:
    unknown = sorted(set(_marked(item)) - set(TOOLS))
    if unknown:
        raise pytest.UsageError(f"{item.nodeid} needs {unknown}, expected names of tests/tools.py: {sorted(TOOLS)}")


@pytest.hookimpl(trylast=True)  # what is not selected is not asked for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reasons = [reason for name in _marked(item) if (reason := _missing(name)) is not None]
        if reasons:
            item.add_marker(pytest.mark.skip(reason="; ".join(reasons)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    with _watching(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    _required[fixturedef], _called[fixturedef] = set(), {}
    with _watching(fixturedef):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    with _watching(item):
        for fixture in _fixtures(item):  # one that was set up for another test, which names its tools
            for what, names in _called.get(fixture, {}).items():
                _call(what, names)
        return (yield)
