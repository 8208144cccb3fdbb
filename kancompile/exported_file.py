"""Load ``.pt2`` files of ``torch.export`` after making sure that loading them runs no code.

``torch.export.load`` unpickles parts of its archive: sample inputs and old weight files whenever the safe loader
refuses them, opaque constants always. Here every such part is tried with the safe loader first and refused otherwise.
"""

from __future__ import annotations

import ast
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from kancompile.errors import KanCompileError

# sympy evaluates shape expressions and PyTorch compiles guards: both may hold arithmetic, never arbitrary Python
_SYNTAX = (
    *(ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Tuple, ast.List),
    *(ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context, ast.keyword, ast.Subscript),
)
_FUNCTION = re.compile(r"[A-Z][A-Za-z0-9]+|max|min|abs|len|int|float|bool|round")
_ATTRIBUTE = re.compile(r"size|shape|stride|storage_offset|ndim|dtype|is[a-z]+|inf|nan|sqrt|floor|ceil|trunc|log2?|pow")


def load_exported(path: Path) -> ExportedProgram:
    """Load an exported program.

    Raises:
        KanCompileError: no such file, no archive of ``torch.export.save``, or one that contains pickled objects.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KanCompileError(f"model {str(path)!r}: cannot be read ({error.strerror})") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check(archive, str(path))
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KanCompileError(
            f"model {str(path)!r}: found no archive of torch.export.save ({error}); export the model again"
        ) from error
    try:
        # the bytes that were checked, not the file, which may have changed
        return torch.export.load(io.BytesIO(content))
    except Exception as error:  # whatever foreign data breaks inside the loader is the data's fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KanCompileError(
            f"model {str(path)!r}: cannot be loaded ({reason}); write it with torch.export.save of this PyTorch version"
        ) from error


def _check(archive: zipfile.ZipFile, name: str) -> None:
    folder_of = {entry: entry.rpartition("/")[0] for entry in archive.namelist()}
    if not any(entry.rpartition("/")[2] == "archive_format" for entry in folder_of):
        raise KanCompileError(f"model {name!r}: found no archive_format entry, expected a file of torch.export.save")
    if len(folder_of) != len(archive.namelist()):
        raise KanCompileError(f"model {name!r}: found two entries of one name, expected a file of torch.export.save")
    for entry, folder in folder_of.items():
        if "/data/aotinductor/" in f"/{entry}":
            raise KanCompileError(f"model {name!r}: found compiled code {entry!r}, expected a graph; export it again")
        if entry.endswith((".pt", ".pkl", ".pickle")):
            _check_tensors(archive.read(entry), f"{name}:{entry}")
        elif entry.endswith("_config.json"):
            for payload in json.loads(archive.read(entry)).get("config", {}).values():
                if payload["path_name"].startswith(("custom_obj", "opaque_obj")):
                    _refuse(f"{name}:{folder}/{payload['path_name']}")
                if payload.get("use_pickle"):
                    _check_tensors(archive.read(f"{folder}/{payload['path_name']}"), f"{name}:{payload['path_name']}")
        elif entry.endswith(".json"):
            for expression in _expressions(json.loads(archive.read(entry))):
                if not is_arithmetic(expression):
                    raise KanCompileError(
                        f"model {name!r}: found shape expression {expression[:80]!r}, expected arithmetic; "
                        "export the model again with torch.export.save"
                    )


def _check_tensors(data: bytes, where: str) -> None:
    if not data:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that are refused anyway
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the safe loader fails in many ways on what it does not know
        raise _refusal(where) from error


def _refuse(where: str) -> None:
    raise _refusal(where)


def _refusal(where: str) -> KanCompileError:
    return KanCompileError(
        f"model {where!r}: found a pickled object, expected tensors only; pickles can run code and are never loaded: "
        "export the model again with tensors as its only inputs and constants"
    )


def is_arithmetic(text: str) -> bool:
    """Tell whether a shape expression or guard only computes, with numbers, names, sympy classes, tensor sizes."""
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    return all(_is_harmless(node) for node in nodes)


def _is_harmless(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=str(text)):
            return text.isidentifier() and not text.startswith("_")
        case ast.Constant(value=value):
            return isinstance(value, int | float | bool) or value is None
        case ast.Name(id=name):
            return not name.startswith("__")
        case ast.Attribute(attr=name):
            return _ATTRIBUTE.fullmatch(name) is not None
        case ast.Call(func=ast.Name(id=name)):
            return _FUNCTION.fullmatch(name) is not None
        case ast.Call(func=function):
            return isinstance(function, ast.Attribute)
        case _:
            return isinstance(node, _SYNTAX)


def _expressions(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "expr_str" and isinstance(value, str):
                yield value
            elif key == "guards_code" and isinstance(value, list):
                yield from map(str, value)
            else:
                yield from _expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _expressions(value)
