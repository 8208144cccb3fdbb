"""Build the user's model: a factory by name, a state dict from a file that is never unpickled."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kancompile.data.archive_sizes import check_unpacked
from kancompile.data.pickled_names import check_names
from kancompile.data.sample_arrays import is_plain, kind_of
from kancompile.errors import KanCompileError, foreign, reason
from kancompile.progress import say

# averaged weights come last: where a file holds both kinds, a note says so
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "ema",
    "ema_state_dict",
    "model_ema",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
# counters that wrappers such as torch.optim.swa_utils.AveragedModel keep beside the weights
_COUNTERS = ("n_averaged",)
_SHOWN = 6
_DEEPEST = 4  # dictionaries around a state dict
_MOST_UNPACKED = 1 << 28


def _most_bytes(model: nn.Module) -> int:
    """Bound what a checkpoint of a model may unpack to: some copies in float64, of averages and optimizers, and a little."""
    own = sum(value.numel() for value in model.state_dict().values() if isinstance(value, Tensor))
    return 8 * 8 * own + (1 << 24)


def load_state_dict(
    path: str | os.PathLike[str], key: str | None = None, most_bytes: int = _MOST_UNPACKED
) -> dict[str, Tensor]:
    """Read a state dict from safetensors, ``.npz`` or a ``torch.save`` file, and unwrap it.

    Dictionaries around it are opened by the names in :data:`WRAPPERS`, such as ``{"state_dict": ...}``, and where no name is
    known, by the only entry that is a state dict. Nothing is unpickled:
    ``torch.load`` runs with ``weights_only=True``.

    Args:
        path: the file.
        key: entry of the file that holds the weights, such as ``"ema"``; the first known one if ``None``.
        most_bytes: what an archive may unpack to where that is more than a small multiple of its size.

    Raises:
        KanCompileError: unreadable file, pickled objects, no tensors inside, several state dicts and no known name, or an archive
            that unpacks to more than a state dict of its size does.
    """
    path = Path(path)
    where, way_out = f"checkpoint {str(path)!r}", "give a complete .safetensors, .pt or .npz file"
    if not path.is_file():
        raise KanCompileError(f"{where}: no such file; give a .safetensors, .pt or .npz file")
    with foreign(where, way_out):
        if path.suffix == ".safetensors":
            content: Any = load_file(path, device="cpu")
        elif path.suffix == ".npz":
            check_unpacked(path, where, most_bytes)
            # NumPy leaves a file open that it opened itself and could not read
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                content = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        else:
            content = _load_tensors(path, where, most_bytes)
        # the content may be anything that tensors and containers can be put together to, itself included
        return _unwrap(content if key is None else _entry(content, key, where), where)


def _load_tensors(path: Path, where: str, most_bytes: int) -> Any:
    try:
        check_unpacked(path, where, most_bytes)
        check_names(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except KanCompileError:
        raise
    except Exception as error:  # the safe loader fails in many ways on what it does not know
        # PyTorch's own text explains at length how to load such a file unsafely
        is_refusal = str(error).startswith("Weights only load failed")
        found = "Python objects" if is_refusal else f"no file of torch.save ({reason(error)})"
        raise KanCompileError(
            f"{where}: cannot be read, found {found}, expected tensors only; pickled objects can run "
            "code and are never loaded: where you trust the file, save model.state_dict() with torch.save or "
            "safetensors.torch.save_file"
        ) from error


def _entry(content: Any, key: str, where: str) -> Mapping[Any, Any]:
    found = content.get(key) if isinstance(content, Mapping) else None
    if isinstance(found, Mapping):
        return found
    names = (
        [str(name) for name, value in content.items() if isinstance(value, Mapping)]
        if isinstance(content, Mapping)
        else []
    )
    raise KanCompileError(f"{where}: found no state dict under {key!r}; it has {_listed(names) or 'none'}")


def _unwrap(content: Any, where: str) -> dict[str, Tensor]:
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            break
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(key): value for key, value in content.items()}
        inside = {str(key): value for key, value in content.items() if isinstance(value, Mapping) and value}
        named = next((name for name in WRAPPERS if name in inside and _holds_tensors(inside[name])), None)
        if named is None:
            candidates = [key for key, value in inside.items() if _holds_tensors(value)]
            if len(candidates) > 1:
                raise KanCompileError(
                    f"{where}: found several state dicts, {_listed(candidates)}, none under a known name, expected one; "
                    "name it with --checkpoint-key"
                )
            named = candidates[0] if candidates else None
        if named is None:
            break
        others = [key for key in inside if key != named and key in WRAPPERS and _holds_tensors(inside[key])]
        if others:
            say(
                f"{where}: takes the weights under {named!r}; others are chosen with --checkpoint-key: {_listed(others)}"
            )
        content = inside[named]
    found = _listed(list(map(str, content))) if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise KanCompileError(
        f"{where}: found {found or 'nothing'}, expected a state dict (names to tensors), alone or under one of "
        f"{list(WRAPPERS)!r}"
    )


def _holds_tensors(value: Any, depth: int = _DEEPEST) -> bool:
    """Whether this is a state dict, or a wrapper around one; what optimizers keep (numbers for keys) is not."""
    if not depth or not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        return False
    return all(isinstance(item, Tensor) for item in value.values()) or any(
        _holds_tensors(value[key], depth - 1) for key in WRAPPERS if key in value
    )


def apply_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str = "state dict") -> None:
    """Load weights into a model; every key and every shape must fit, and every value be one that the model can hold.

    Prefixes that all keys share and the model does not know (:data:`PREFIXES`, such as ``module.``) are stripped, in any order,
    and counters of averaging left out.

    Raises:
        KanCompileError: keys are missing, unexpected, of another shape or kind, all of them named.
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or key not in _COUNTERS}
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shared = [(key, own[key], state[key]) for key in own if key in state and isinstance(own[key], Tensor)]
    kinds = [
        f"{key}: {kind_of(value)}, the model has {wanted.dtype}"
        for key, wanted, value in shared
        if not _has_kind_of(value, wanted)
    ]
    shapes = [
        f"{key}: {tuple(value.shape)} in the file, {tuple(wanted.shape)} in the model"
        for key, wanted, value in shared
        if not value.is_nested and wanted.shape != value.shape
    ]
    if not kinds and not shapes:
        kinds = [
            f"{key}: values that {wanted.dtype} cannot hold"
            for key, wanted, value in shared
            if not _can_hold(wanted, value)
        ]
    if missing or unexpected or shapes or kinds:
        parts = [
            f"{title} ({len(keys)}): {_listed(keys)}"
            for title, keys in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("other shape", shapes),
                ("other kind", kinds),
            )
            if keys
        ]
        if missing and unexpected and len(missing) == len(own):
            parts.append(
                "no name agrees: the checkpoint is of another class of model, or its names have another prefix"
            )
        raise KanCompileError(
            f"checkpoint {name!r}: does not fit the model\n  "
            + "\n  ".join(parts)
            + "\n  build the model as it was trained, with --factory-arg NAME=VALUE where sizes differ"
        )
    with foreign(f"checkpoint {name!r}", "build the model as it was trained"):
        model.load_state_dict(state)


def _has_kind_of(value: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor holds values that can be copied to another one; of complex ones a real tensor would keep a part."""
    return is_plain(value) and (wanted.is_complex() or not value.is_complex())


def _has_fractions(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _can_hold(wanted: Tensor, value: Tensor) -> bool:
    """Whether copying keeps the values; floats may be rounded to floats, but nothing is cut to an integer."""
    if _has_fractions(wanted):
        return True
    return torch.equal(value.to(wanted.dtype).to(value.dtype), value)


def check_finite_weights(model: nn.Module) -> None:
    """Refuse NaN and infinity among parameters and buffers.

    Raises:
        KanCompileError: naming the first such tensor, and how many values it is about.
    """
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor) and _has_fractions(value) and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise KanCompileError(
                f"weights {key!r}: found {bad} NaN or infinite of {value.numel()} values, expected finite ones; "
                "retrain or take an earlier checkpoint"
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} ... and {len(names) - _SHOWN} more"
