"""Names of operators for people: those of PyTorch's modules where there are any."""

from __future__ import annotations

import re

_MODULES = {
    "native_layer_norm": "LayerNorm",
    "native_group_norm": "GroupNorm",
    "_native_batch_norm_legit": "BatchNorm",
    "_native_batch_norm_legit_no_training": "BatchNorm",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "mm": "matrix product",
    "bmm": "matrix product",
    "addmm": "matrix product",
}


def operator_name(target: str) -> str:
    """Name an operator: ``aten.native_layer_norm.default`` and ``native_layer_norm`` are ``LayerNorm``."""
    name = re.sub(r"^aten\.|\.(default|Tensor|Scalar|dim_IntList|int|dim)$", "", target)
    return _MODULES.get(name, name)
