"""What the command line compiles a file from: as its manifest says it, and back to options."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kancompile.recipe import Recipe

_NAMED = (
    "model", "factory_arg", "checkpoint", "checkpoint_key", "data", "data_key", "transform", "target_column", "held_out",
    "dynamic", "device",
)  # fmt: skip
_TEXT, _TEXTS = (str, type(None)), (list, type(None))
ORIGIN_FORM = {
    "model": str, "factory_arg": [str], "checkpoint": _TEXT, "checkpoint_key": _TEXT, "data": str, "data_key": _TEXT,
    "transform": _TEXT, "target_column": [str], "held_out": (float, int), "dynamic": _TEXTS, "device": str, "targets": [str],
    "recipe": dict, "code_sha256": _TEXT, "checkpoint_sha256": _TEXT, "data_sha256": _TEXT, "weights_sha256": str,
}  # fmt: skip
"""What ``made_from`` of a manifest holds; see :func:`kancompile.errors.check_form`."""
HASHES = {
    "code_sha256": "the file that holds the model's code",
    "weights_sha256": "the model's weights",
    "checkpoint_sha256": "the checkpoint",
    "data_sha256": "the calibration data",
}


def origin(options: argparse.Namespace, recipe: Recipe, targets: Sequence[str], model: Any) -> dict[str, Any]:
    """Say what a compilation starts from: what was named, as it was named, with hashes of files and weights.

    Args:
        options: of ``kancompile compile``.
        recipe: as it was asked for, before bits are allocated and layers are refined.
        targets: names in the order of the files.
        model: built and loaded.
    """
    named = {key: getattr(options, key) for key in _NAMED}
    asked = json.loads(recipe.canonical_json())
    return named | {"targets": list(targets), "recipe": asked} | hashes(options, model)


def options_of(made_from: Mapping[str, Any], seed: int, command: argparse.Namespace) -> argparse.Namespace:
    """Give the options of ``kancompile compile`` that :func:`origin` was made of."""
    named = {key: made_from[key] for key in _NAMED}
    about = {
        "seed": seed,
        "trust_model": True,
        "data_name": "--calibration",
        "quiet": command.quiet,
        "json": command.json,
    }
    return argparse.Namespace(**named, **about)


def hashes(options: argparse.Namespace, model: Any) -> dict[str, str | None]:
    """Hash the files that options name, ``None`` for what is no file, and the weights of the model."""
    code, _, _ = options.model.rpartition(":")
    loaded = sys.modules.get(code)
    file = getattr(loaded, "__file__", None) if loaded is not None else code or options.model
    return {
        "code_sha256": _of_file(file),
        "weights_sha256": _of_weights(model),
        "checkpoint_sha256": _of_file(options.checkpoint),
        "data_sha256": _of_file(options.data),
    }


def _of_file(name: str | None) -> str | None:
    if name is None or not Path(name).is_file():
        return None
    with Path(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_weights(model: Any) -> str:
    """Hash names, kinds, shapes and bytes of all parameters and buffers."""
    import torch

    digest = hashlib.sha256()
    state = model.state_dict  # of an exported program it is the mapping itself
    for name, value in (state() if callable(state) else state).items():
        digest.update(f"{name} ".encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
