"""Rebuild models of the ``pykan`` package from what ``KAN.saveckpt`` wrote, without unpickling anything.

``model.saveckpt("model/0.1")`` writes three files. ``model/0.1_state`` holds the tensors; sizes, spline orders and grids are
read off their shapes. ``model/0.1_config.yml`` holds what tensors cannot: the names of the symbolic functions, the base
function and how many factors a multiplication node has. It may contain Python objects, which are skipped: pykan's own
loader refuses such files. ``model/0.1_cache_data``, the inputs of the last training step, is not read; it makes good
calibration data where it is trusted (it holds a single tensor).

The network itself is built by pykan, so that it computes what pykan computes. On the command line such a model is called
``pykan``: ``kancompile compile pykan --checkpoint model/0.1 ...``. A base function that was a lambda or another object of Python
is not in the files: ``--factory-arg base_fun=silu``, or any function by its name, says what it was.
"""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from torch import Tensor, nn

from kancompile.data.evaluation_mode import set_evaluating
from kancompile.data.imported_objects import found_object
from kancompile.data.sample_arrays import is_plain, kind_of
from kancompile.data.state_dict import load_state_dict
from kancompile.errors import KanCompileError, check_depth, foreign, read_text, shown

_HIGHEST_ORDER = 32
_NAMED = ("silu", "identity", "zero")
_SAME_AS_NAMED = {"torch.nn.modules.activation.SiLU": "silu", "torch.nn.modules.linear.Identity": "identity"}
BaseFunction = str | Callable[[Tensor], Tensor]


class _PythonObject:
    """Stands for an object in the configuration that is not constructed; false, as what is absent."""

    def __init__(self, name: str) -> None:
        self.name = unquote(name.partition(":")[2])  # behind what kind it is of

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"the Python object {self.name!r}"


def load(path: str | os.PathLike[str], base_fun: BaseFunction | None = None) -> nn.Module:
    """Build the model of a checkpoint, in evaluation mode.

    Args:
        path: what ``saveckpt`` was given, such as ``model/0.1``, or the ``_state`` file itself.
        base_fun: the base function, where the configuration does not name it: ``"silu"``, ``"identity"``, ``"zero"``, a function
            of ``torch.nn.functional`` or ``torch`` by its name, ``PACKAGE.MODULE:FUNCTION``, or the function.

    Raises:
        KanCompileError: pykan is not installed, a file is missing or unreadable, or something that only the configuration
            knows is missing.
    """
    prefix = os.fspath(path).removesuffix("_state")
    state = load_state_dict(f"{prefix}_state")
    return build(state, _read_config(Path(f"{prefix}_config.yml")), f"checkpoint {prefix!r}", base_fun)


def build(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    who: str = "pykan state",
    base_fun: BaseFunction | None = None,
) -> nn.Module:
    """Build the model of a state dict.

    Args:
        state: tensors by name, as ``KAN.state_dict()`` gives them.
        config: what the configuration file says; ``None`` where there is none.
        who: how errors call it.
        base_fun: see :func:`load`.

    Raises:
        KanCompileError: see :func:`load`.
    """
    given = dict(config or {})
    given["base_fun_name"] = _base_function(given.get("base_fun_name", "silu"), base_fun, who)
    with foreign(who, "keep the files of saveckpt as it wrote them, or build the model in Python"):
        return _build(state, given, who, _package())


def _build(state: Mapping[str, Tensor], given: dict[str, Any], who: str, kan: Any) -> nn.Module:
    for key, value in state.items():
        if (
            not is_plain(value)
            or value.is_complex()
            or value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ):
            raise KanCompileError(
                f"{who}: found {key!r} as {kind_of(value)}, expected dense real values, each of them stored"
            )
    depth = sum(1 for key in state if key.startswith("act_fun.") and key.endswith(".coef"))
    if depth == 0 or any(f"act_fun.{layer}.grid" not in state for layer in range(depth)):
        raise KanCompileError(
            f"{who}: found {sorted(state)[:4]!r}, expected the tensors of pykan 0.2 (act_fun.0.grid, act_fun.0.coef ...)"
        )
    orders, sizes = [], []
    for layer in range(depth):
        grid, coef = state[f"act_fun.{layer}.grid"], state[f"act_fun.{layer}.coef"]
        orders.append(int(grid.shape[1] - coef.shape[2] - 1))
        sizes.append(int(coef.shape[2]) - orders[-1])
    if not all(0 <= order <= _HIGHEST_ORDER for order in orders) or min(sizes) < 1:
        raise KanCompileError(
            f"{who}: found grids and coefficients for splines of orders {shown(orders)} on {shown(sizes)} cells, expected orders "
            f"of 0 to {_HIGHEST_ORDER}"
        )
    symbolic = [layer for layer in range(depth) if bool(state.get(f"symbolic_fun.{layer}.mask", torch.zeros(1)).any())]
    with _random_state_kept():
        model: nn.Module = kan.KAN(
            width=_widths(state, depth, given, who),
            grid=sizes,
            k=orders,
            mult_arity=given.get("mult_arity") or 2,
            base_fun=given["base_fun_name"],
            symbolic_enabled=bool(symbolic) and bool(given.get("symbolic_enabled", True)),
            auto_save=False,
            save_act=False,
        )
    wanted = model.state_dict()
    found = {key: value for key, value in state.items() if key in wanted}
    wrong = [key for key in wanted if key not in found or found[key].shape != wanted[key].shape]
    if wrong:
        raise KanCompileError(
            f"{who}: {wrong[:4]!r} are missing or of another shape than widths {model.width!r} and mult_arity "
            f"{model.mult_arity!r} ask for; keep the _config.yml beside the _state file"
        )
    model.load_state_dict(found)
    for layer in symbolic:
        _restore_functions(model, layer, given.get(f"symbolic.funs_name.{layer}"), kan.SYMBOLIC_LIB, who)
    set_evaluating(model)
    return model


def _base_function(saved: Any, given: BaseFunction | None, who: str) -> BaseFunction:
    """Choose between what the configuration says and what the caller says."""
    if isinstance(saved, _PythonObject):
        saved = _SAME_AS_NAMED.get(saved.name, saved)
    is_named = isinstance(saved, str) and saved in _NAMED
    if given is None:
        if is_named:
            return str(saved)
        raise KanCompileError(
            f"{who}: found {shown(saved)} as base function, expected the name 'silu', 'identity' or 'zero'; say which function "
            "it is: --factory-arg base_fun=silu (in Python base_fun=), or another name such as gelu, torch.nn.functional:gelu or "
            "'path/to/file.py:FUNCTION' in quotes"
        )
    if is_named and given != saved:
        raise KanCompileError(
            f"{who}: found base function {saved!r}, and {shown(given)} as base_fun; leave the latter out"
        )
    if callable(given) or given in _NAMED:
        return given
    if isinstance(given, str) and ":" in given:
        with found_object(given, "base_fun", "FUNCTION") as function:
            found = function
    else:
        found = getattr(torch.nn.functional, str(given), None) or getattr(torch, str(given), None)
    if not callable(found):
        raise KanCompileError(
            f"base_fun: found {shown(given)}, expected 'silu', 'identity', 'zero', a function of torch.nn.functional or torch by "
            "its name, PACKAGE.MODULE:FUNCTION or path/to/file.py:FUNCTION"
        )
    return found  # type: ignore[no-any-return]


def _widths(state: Mapping[str, Tensor], depth: int, config: Mapping[str, Any], who: str) -> list[list[int]]:
    """Read the nodes of every layer off the shapes; with multiplication nodes, off the configuration."""
    nodes = [int(state[f"act_fun.{layer}.coef"].shape[0]) for layer in range(depth)]
    outputs = [int(state[f"act_fun.{layer}.coef"].shape[1]) for layer in range(depth)]
    inner = [*nodes[1:], int(state.get(f"node_bias_{depth - 1}", torch.empty(outputs[-1])).numel())]
    if inner == outputs:
        return [[nodes[0], 0], *([count, 0] for count in outputs)]
    arity = config.get("mult_arity", 2)
    most = max(outputs)
    arities = [number for layer in arity for number in layer] if isinstance(arity, list) else [arity]
    if any(isinstance(number, int) and number > most for number in arities):
        raise KanCompileError(
            f"{who}: found multiplication nodes of arity {shown(arity)} in the _config.yml, where no layer has more than {most} "
            "outputs; keep the files of saveckpt together"
        )
    stated = config.get("width")
    if isinstance(stated, list) and len(stated) == depth + 1:
        widths = [list(map(int, layer)) if isinstance(layer, list) else [int(layer), 0] for layer in stated]
        if [sum(layer) for layer in widths] != [nodes[0], *inner] or min(map(min, widths)) < 0:
            raise KanCompileError(
                f"{who}: found widths {shown(stated)} in the _config.yml, expected {[nodes[0], *inner]!r} nodes as the tensors "
                "have them; keep the files of saveckpt together"
            )
        return widths
    if not isinstance(arity, int) or arity < 2:
        raise KanCompileError(
            f"{who}: found multiplication nodes of arity {shown(arity)} but no widths in the _config.yml"
        )
    products = [(below - above) // (arity - 1) for above, below in zip(inner, outputs, strict=True)]
    return [[nodes[0], 0], *([above - count, count] for above, count in zip(inner, products, strict=True))]


def _restore_functions(model: Any, layer: int, names: Any, library: Mapping[str, Any], who: str) -> None:
    """Put the symbolic functions of a layer back by their names, where their edges are switched on."""
    part = model.symbolic_fun[layer]
    if not isinstance(names, list):
        raise KanCompileError(
            f"{who}: layer {layer} has symbolic functions, whose names only the _config.yml knows; keep it beside the "
            "_state file"
        )
    for out, row in enumerate(names):
        for into, name in enumerate(row):
            if not bool(part.mask[out, into]):
                continue
            if not isinstance(name, str) or name not in library:
                raise KanCompileError(
                    f"{who}: edge {into} -> {out} of layer {layer} has the symbolic function {shown(name)}, which pykan's "
                    f"library lacks; it has {sorted(library)!r}; register it with kan.add_symbolic first"
                )
            part.funs_name[out][into] = name
            part.funs[out][into] = library[name][0]
            part.funs_sympy[out][into] = library[name][1]
            part.funs_avoid_singularity[out][into] = library[name][3]


def _read_config(path: Path) -> dict[str, Any] | None:
    """Read plain YAML; Python objects are kept as their names, so nothing is ever constructed."""
    if not path.is_file():
        return None
    yaml = _package("yaml")

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        pass

    PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: _PythonObject(suffix))
    where, way_out = f"checkpoint {str(path)!r}", "keep the file as saveckpt wrote it"
    text = read_text(path, where, way_out)
    with foreign(where, way_out):
        content = yaml.load(text, PlainLoader)
        check_depth(content)
    if not isinstance(content, dict):
        raise KanCompileError(f"{where}: found {type(content).__name__}, expected keys and values")
    return content


def _package(name: str = "kan") -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise KanCompileError(
            f"pykan: {error.name!r} is not installed; pip install pykan matplotlib pandas pyyaml scikit-learn tqdm"
        ) from error


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Undo what building a KAN does to the global generators: it seeds them all."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
