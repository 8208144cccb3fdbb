"""Find what a user names in their own code: ``PACKAGE.MODULE:NAME`` or ``path/to/file.py:NAME``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from kancompile.errors import KanCompileError, foreign

_SHOWN = 6


@contextmanager
def found_object(spec: str, who: str, noun: str = "FACTORY", also: str = "") -> Iterator[Any]:
    """Import an object by its name; inside the block its neighbors can be imported as well.

    Args:
        spec: ``PACKAGE.MODULE:NAME`` or ``path/to/file.py:NAME``; the name may have dots.
        who: what errors call the argument, such as ``"model"``.
        noun: what errors call the object, such as ``"FACTORY"``.
        also: what else the argument may be, for the error where it is none of all.

    Raises:
        KanCompileError: no such module, file or name, or importing it fails.
    """
    origin, colon, name = spec.rpartition(":")
    if not colon or not origin or not name:
        raise KanCompileError(f"{who} {spec!r}: expected PACKAGE.MODULE:{noun}, path/to/file.py:{noun}{also}")
    with neighbours(spec), _default_dtype_kept():
        where = f"{who} {spec!r}"
        is_file = origin.endswith(".py")
        module = _import_file(Path(origin), where) if is_file else _import_module(origin, where, noun)
        found: Any = module
        for part in name.split("."):
            if not hasattr(found, part):
                raise KanCompileError(f"{where}: {origin!r} has no {name!r}; it has {_public(module, name)}")
            found = getattr(found, part)
        yield found


def call_with(function: Callable[..., Any], arguments: Mapping[str, Any], where: str, option: str | None) -> Any:
    """Call a user's function; where its arguments do not fit, list those it takes.

    Args:
        function: what to call.
        arguments: by keyword.
        where: what errors call it.
        option: the option that passes an argument, ``None`` where there is none.

    Raises:
        KanCompileError: arguments are missing or unknown, or the function raises.
    """
    signature = _signature(function)
    hint = f"pass them with {option} NAME=VALUE" if option else "give a function without arguments"
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            takes = ", ".join(_parameter(value) for value in signature.parameters.values()) or "no arguments"
            raise KanCompileError(f"{where}: {error}; it takes ({takes}); {hint}") from error
    try:
        return function(**arguments)
    except KanCompileError:
        raise
    except ModuleNotFoundError as error:
        raise KanCompileError(f"{where} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        way_out = f"pass what it needs with {option} NAME=VALUE" if option else "mend it, or what it reads"
        raise KanCompileError(f"{where} raised {type(error).__name__}: {error}; {way_out}") from error


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return None


def _parameter(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return str(parameter).split(":")[0]
    return f"{parameter.name}={parameter.default!r}"


def _public(module: Any, wanted: str) -> str:
    names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    own = [key for key in names if getattr(getattr(module, key), "__module__", None) == module.__name__]
    close = get_close_matches(wanted, names, _SHOWN)
    ordered = list(dict.fromkeys([*close, *own, *names]))
    shown = ", ".join(ordered[:_SHOWN]) or "no functions or classes"
    return shown if len(ordered) <= _SHOWN else f"{shown} ... and {len(ordered) - _SHOWN} more"


@contextmanager
def _default_dtype_kept() -> Iterator[None]:
    """Undo what importing user code does to the type of new tensors: some set float64 for the whole process."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def neighbours(spec: str) -> Iterator[None]:
    """Let code import what stands beside it, at import time or when it runs."""
    origin = spec.rpartition(":")[0]
    entry = str(Path(origin).absolute().parent if origin.endswith(".py") else Path.cwd())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _import_module(name: str, where: str, noun: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent = error.name or name
        if name == absent or name.startswith(f"{absent}."):
            raise KanCompileError(
                f"{where}: no module {name!r} here or among the installed packages; "
                f"run from its folder, or name the file, path/to/file.py:{noun}"
            ) from error
        raise KanCompileError(f"{where}: it imports {absent!r}, which is not installed") from error
    except Exception as error:
        raise KanCompileError(f"{where}: importing it raised {type(error).__name__}: {error}") from error


def _import_file(path: Path, where: str) -> Any:
    if not path.is_file():
        raise KanCompileError(f"{where}: no file {str(path)!r}")
    # the model, a transform and a loader may stand in one file, which then runs once; two files may have one name
    with foreign(where, "give a file that you may read"):
        source = path.read_bytes()
    content = hashlib.sha256(str(path.resolve()).encode() + b"\0" + source).hexdigest()[:12]
    name = f"kancompile_model_{path.stem}_{content}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and torch.export look modules up by name
    try:
        found.loader.exec_module(module)
    except ModuleNotFoundError as error:
        del sys.modules[name]
        raise KanCompileError(f"{where}: it imports {error.name!r}, which is not installed") from error
    except Exception as error:
        del sys.modules[name]
        raise KanCompileError(f"{where}: importing it raised {type(error).__name__}: {error}") from error
    return module
