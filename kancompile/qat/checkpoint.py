"""Write and read the state of a training: module and optimizer in one safetensors file, and no pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kancompile.compiler import write_atomically
from kancompile.errors import KanCompileError, foreign, naming_file
from kancompile.qat.elastic import ElasticModel
from kancompile.qat.training_module import TrainedModel

_MODULE, _OPTIMIZER, _PLAIN = "module/", "optimizer/", "optimizer"


def save_checkpoint(
    module: TrainedModel | ElasticModel, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
) -> Path:
    """Write the state of a module, and of its optimizer, in place of what is there.

    Raises:
        KanCompileError: a parameter is not finite, the optimizer's state holds more than numbers, or the folder cannot be
            written.
    """
    module.check_finite()
    tensors = {_MODULE + name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    plain: dict[str, Any] = {}
    if optimizer is not None:
        state = optimizer.state_dict()
        plain = {"param_groups": state["param_groups"], "state": {}}
        for number, entries in state["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}{number}/{name}"] = value.detach().cpu().contiguous()
                else:
                    plain["state"].setdefault(str(number), {})[name] = value
    try:
        text = json.dumps(plain)
    except TypeError as error:
        raise KanCompileError(
            f"checkpoint: found an optimizer state that is no plain data ({error}), expected numbers and tensors; save the "
            "module alone"
        ) from error
    whole = Path(path)
    # equal tensors that share memory would be refused
    write_atomically({whole: save({name: value.clone() for name, value in tensors.items()}, {_PLAIN: text})}, True)
    module.last_checkpoint = str(whole)
    return whole


def load_checkpoint(
    module: TrainedModel | ElasticModel, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Load the state of a module that was prepared alike, and of its optimizer.

    Raises:
        KanCompileError: the file is missing or damaged, of a module prepared otherwise, or holds no state of the optimizer.
    """
    name = Path(path)
    if not name.is_file():
        raise KanCompileError(f"checkpoint: found no file {str(name)!r}, expected one of save_checkpoint")
    way_out = "give a complete file of save_checkpoint"
    with naming_file(name), foreign(str(name), way_out), safe_open(name, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        plain = json.loads((file.metadata() or {}).get(_PLAIN, "{}"))
        module.load_state_dict(
            {key.removeprefix(_MODULE): value for key, value in tensors.items() if key.startswith(_MODULE)}
        )
        if optimizer is not None:
            if not plain:
                raise KanCompileError(
                    f"checkpoint: found no optimizer in {str(name)!r}, expected its state; load the module alone"
                )
            state = {int(number): dict(entries) for number, entries in plain["state"].items()}
            for key, value in tensors.items():
                if key.startswith(_OPTIMIZER):
                    number, entry = key.removeprefix(_OPTIMIZER).split("/", 1)
                    state.setdefault(int(number), {})[entry] = value
            optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})
        module.check_finite()
    module.last_checkpoint = str(name)
