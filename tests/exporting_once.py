"""What PyTorch's exporter would read again for every file, read once in a process."""

from __future__ import annotations

import copy
import functools

from torch._export import utils as torch_export
from torch.onnx._internal.exporter import _registration


def keep_what_exporters_read() -> None:
    """Keep PyTorch's own ONNX translations, a fifth of a small file's time, and the list of what its C++ offers."""
    read = _registration.ONNXRegistry.from_torchlib
    kept: dict[int, _registration.ONNXRegistry] = {}

    def from_torchlib(opset_version: int = _registration._constants.TORCHLIB_OPSET) -> _registration.ONNXRegistry:
        if opset_version not in kept:
            kept[opset_version] = read(opset_version)
        registry = copy.copy(kept[opset_version])
        registry.functions = {target: [*found] for target, found in registry.functions.items()}
        return registry

    _registration.ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
    # it is listed 27 times for every decomposition; operators that a test registers are not among it
    torch_export._materialize_cpp_cia_ops = functools.cache(torch_export._materialize_cpp_cia_ops)
