"""Compile what was drawn, and compare PyTorch, the captured program, the simulation and the runtime of the target."""

from __future__ import annotations

import copy
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import kancompile
from kancompile.errors import KanCompileError
from kancompile.ir import NamedTensors
from kancompile.progress import quiet
from kancompile.runtimes import RUNTIMES, RuntimeModel

CAPTURE_TOLERANCE = 1e-3
"""Of the largest output of a batch, what capture itself allows (``frontend/confirmation.py``)."""
ROWS = 40
_EQUAL = frozenset(
    [
        "clone",
        "add",
        "sub",
        "mul",
        "neg",
        "abs",
        "relu",
        "view",
        "reshape",
        "permute",
        "transpose",
        "cat",
        "select",
        "slice",
        "expand",
        "unsqueeze",
        "squeeze",
        "clamp",
        "where",
        "gt",
        "lt",
        "ge",
        "le",
        "floor",
        "round",
        "sign",
        "flip",
        "amax",
        "index",
        "full",
        "movedim",
        "zeros_like",
        "maximum",
        "minimum",
        "getitem",
        "split",
        "_to_copy",
        "alias",
        "t",
        "detach",
        "embedding",
    ]
)
"""ATen operators between layers that every runtime computes to equal bits."""


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        kind: ``"equal"``; ``"close"`` where float arithmetic promises no equal bits; ``"refused"``; else what is wrong.
        detail: in words.
    """

    kind: str
    detail: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it should not be so."""
        return self.kind not in ("equal", "close", "refused")


def judged(
    model: nn.Module,
    data: Mapping[str, np.ndarray],
    fresh: Mapping[str, np.ndarray],
    recipe: dict[str, Any],
    target: str,
) -> Verdict:
    """Compile a model and compare all that should agree.

    Args:
        model: in evaluation mode.
        data: calibration samples by input, an only input being ``x``.
        fresh: others of the same kind.
        recipe: its keys.
        target: whose file it becomes.
    """
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            compiled = kancompile.compile(
                model, dict(data) if len(data) > 1 else data["x"], recipe=recipe, target=target
            )
            return _compared(model, compiled, data, fresh, target)
        except KanCompileError as error:
            return Verdict("please report" if "please report" in str(error) else "refused", str(error))
        except Exception as error:
            return Verdict(f"{type(error).__name__} at {_place(error)}", f"{error}"[:600])


def _place(error: BaseException) -> str:
    """Name the innermost line of this project."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "kancompile/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "the test itself"


def _compared(
    model: nn.Module, compiled: Any, data: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray], target: str
) -> Verdict:
    for rows in (data, fresh):
        found = _against_pytorch(model, compiled, {name: values[:ROWS] for name, values in rows.items()})
        if found is not None:
            return found
    exact = _promises_equal_bits(compiled)
    compared = compiled.program, compiled.model_bytes
    for rows in _probing(compiled, data, fresh):
        expected = [part.numpy() for part in _parts(compared[0](_values(rows)))]
        found = _session(compiled.session_bytes, rows, compiled.recipe.batch)
        verdict = difference(expected, found, exact, "simulation and ONNX Runtime")
        if verdict is None and target == "c99":
            verdict = difference(expected, [_in_c(compared[1], rows["x"])], exact, "simulation and C")
        if verdict is not None:
            return verdict
    return Verdict("equal" if exact else "close")


def _against_pytorch(model: nn.Module, compiled: Any, rows: Mapping[str, np.ndarray]) -> Verdict | None:
    """Compare with the model where float32 determines what it says."""
    values = [torch.from_numpy(part) for part in rows.values()]
    precise = [part.double() if part.is_floating_point() else part for part in values]
    with torch.no_grad():
        expected, sure = _parts(model(*values)), _parts(copy.deepcopy(model).double()(*precise))
        found = _parts(compiled.captured(_values(rows)))
    if any("float32 does not determine" in note for note in compiled.captured.notes):
        return None
    for one, exactly, other in zip(expected, sure, found, strict=True):
        if one.shape != other.shape:
            return Verdict("captured: another shape", f"{tuple(other.shape)} for {tuple(one.shape)}")
        allowed = CAPTURE_TOLERANCE * max(float(exactly.abs().nan_to_num(0, 0, 0).max()), 1e-30)
        is_sure = (one.double() - exactly).abs() <= 0.1 * allowed
        differs = ~((one.double() - other.double()).abs() <= allowed) & is_sure
        if bool(differs.any()):
            worst = float((one - other).abs()[differs].max())
            return Verdict(
                "captured: other values",
                f"{int(differs.sum())} of {differs.numel()}, by up to {worst / allowed * CAPTURE_TOLERANCE:.3g} of the largest",
            )
    return None


def _parts(values: Any) -> list[Tensor]:
    found = [values] if isinstance(values, Tensor) else list(values.values() if isinstance(values, Mapping) else values)
    return [one if one.is_floating_point() else one.float() for one in found]


def _values(rows: Mapping[str, np.ndarray]) -> Any:
    tensors = {name: torch.from_numpy(part) for name, part in rows.items()}
    return tensors["x"] if len(tensors) == 1 else NamedTensors(tensors)


def _promises_equal_bits(compiled: Any) -> bool:
    """Say whether all is in integers, and what stands between layers is exact arithmetic of single values."""
    calls = [node.target for node in compiled.program.graph_module.graph.nodes if node.op == "call_function"]
    kept = [str(target).removeprefix("aten.").split(".")[0] for target in calls]
    whole = all(layer.get("weight_bits", 8) <= 8 for layer in compiled.manifest["layers"])
    return whole and all(operator in _EQUAL for operator in kept)


def _probing(
    compiled: Any, data: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """Give samples, fresh ones, ones far outside, and ones halfway between rows of the first table."""
    far = {name: part if part.dtype.kind == "i" else (-1.7 * part).astype(np.float32) for name, part in fresh.items()}
    found = [{name: part[:ROWS] for name, part in rows.items()} for rows in (data, fresh, far)]
    index = next(
        (getattr(one, "index", None) for one in compiled.program.graph_module.modules() if hasattr(one, "index")), None
    )
    if index is not None and len(fresh) == 1:
        step = np.float32(index.scale)
        found.append({"x": (np.rint(fresh["x"][:ROWS] / step) + np.float32(0.5)) * step})
    return found


def _session(content: bytes, rows: Mapping[str, np.ndarray], batch: int | None) -> list[np.ndarray]:
    session = RuntimeModel(content)
    count = len(next(iter(rows.values())))
    if batch is None:
        return [part.numpy() for part in _parts(session(_values(rows)))]
    starts = range(0, count, batch)  # whole batches: after the last row the first ones come again
    whole = {name: np.resize(values, (len(starts) * batch, *values.shape[1:])) for name, values in rows.items()}
    parts = [
        [part.numpy() for part in _parts(session(_values({n: v[s : s + batch] for n, v in whole.items()})))]
        for s in starts
    ]
    return [np.concatenate(one)[:count] for one in zip(*parts, strict=True)]


def _in_c(source: bytes, x: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.c").write_bytes(source)
        with RUNTIMES["c99"].prepare(Path(folder) / "model.c", 1) as prepared:
            return prepared.run(x)


def difference(expected: list[np.ndarray], found: list[np.ndarray], exact: bool, between: str) -> Verdict | None:
    """Compare outputs: all bits, or where float arithmetic is part of it, nearly all values nearly."""
    for one, other in zip(expected, found, strict=True):
        if one.size != other.size or len(one) != len(other):
            return Verdict(f"{between}: another shape", f"{other.shape} for {one.shape}")
        other = other.reshape(one.shape)
        differs = ~((one == other) | (np.isnan(one) & np.isnan(other)))
        if not differs.any():
            continue
        finite = np.nan_to_num(one, nan=0, posinf=0, neginf=0)
        # outputs that are all the same differ by what float32 rounds
        spread = max(float(finite.std()), 1e-5 * float(np.abs(finite).max())) or 1e-30
        with np.errstate(invalid="ignore", over="ignore"):
            away = np.abs(one.astype(np.float64) - other) / spread
        away[np.isnan(away) & differs] = np.inf
        text = f"{int(differs.sum())} of {differs.size} outputs, by up to {away[differs].max():.3g} of their spread"
        if exact:
            return Verdict(f"{between}: other bits", text)
        if float(np.quantile(away, 0.9)) > 0.05:
            return Verdict(f"{between}: other values", text)
    return None
