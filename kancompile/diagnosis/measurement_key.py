"""Say what a measurement depends on, so that one that is kept in a file is used for nothing else."""

from __future__ import annotations

import hashlib
from importlib import metadata
from typing import Any

import torch

from kancompile.diagnosis.laboratory import Laboratory
from kancompile.ir import Program


def depends_on(laboratory: Laboratory) -> dict[str, Any]:
    """Give hashes of the float program and of all samples, the seed and the version as plain data."""
    targets = laboratory.judging.targets
    return {
        "model": program_sha256(laboratory.program),
        "fitting": laboratory.fitting.sha256(),
        "judging": laboratory.judging.sha256(),
        "labels": hashlib.sha256(b"" if targets is None else targets.tobytes()).hexdigest(),
        "seed": laboratory.seed,
        "version": _version(),
    }


def program_sha256(program: Program) -> str:
    """Hash a float program: its graph and all its constants."""
    digest = hashlib.sha256(program.graph_module.code.encode())
    for name, value in sorted(program.graph_module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _version() -> str:
    try:
        return metadata.version("kancompile")
    except metadata.PackageNotFoundError:
        return "unknown"
