"""What ``kancompile validate --runtime`` needs to know of a runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Runtime:
    """A program that runs a compiled file.

    Attributes:
        name: how users call it.
        artifact: name of the target whose file it runs.
        missing: ``None`` where it can be used, else what is missing and the command that installs it.
        run: maps the path of a file and inputs float32 ``[n, ...]`` to outputs float32 ``[n, ...]``.
        tolerance_steps: quantization steps that an output may lie off.
    """

    name: str
    artifact: str
    missing: Callable[[], str | None]
    run: Callable[[Path, NDArray[np.float32]], NDArray[np.float32]]
    tolerance_steps: int
