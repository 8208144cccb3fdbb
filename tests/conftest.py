"""Settings of the whole suite."""

from __future__ import annotations

import copy
import functools

import torch
from torch._export import utils as torch_export
from torch.onnx._internal.exporter import _registration

# the mark of tests that need optional tools, and that of cases that take long
pytest_plugins = ["tests.needs", "tests.slow_cases"]

# small tensors gain nothing from threads, and on a busy machine lose several times their own cost to them
torch.set_num_threads(1)


def _keep_translations() -> None:
    """Read PyTorch's own ONNX translations once in a process, not for every file: they are a fifth of a small one's time."""
    read = _registration.ONNXRegistry.from_torchlib
    kept: dict[int, _registration.ONNXRegistry] = {}

    def from_torchlib(opset_version: int = _registration._constants.TORCHLIB_OPSET) -> _registration.ONNXRegistry:
        if opset_version not in kept:
            kept[opset_version] = read(opset_version)
        registry = copy.copy(kept[opset_version])
        registry.functions = {target: [*found] for target, found in registry.functions.items()}
        return registry

    _registration.ONNXRegistry.from_torchlib = staticmethod(from_torchlib)


_keep_translations()
# what PyTorch's C++ offers is listed 27 times for every decomposition; operators that a test registers are not among it
torch_export._materialize_cpp_cia_ops = functools.cache(torch_export._materialize_cpp_cia_ops)
