"""What is trained, by which method; the recipe says the bits, rows and ranges that training keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kancompile.errors import KanCompileError, shown
from kancompile.qat.methods import INDEX_METHODS, WEIGHT_METHODS


@dataclass(frozen=True)
class Training:
    """The choices of quantization-aware training.

    Attributes:
        weights: method for the weights of all layers.
        index: method for the row index of tables of at most 256 rows, ``None``: calibrated ranges stay.
        tables: whether the codes of tables are trained.

    Raises:
        KanCompileError: no such method, or one that is for the other kind.
    """

    weights: str = "lsq"
    index: str | None = None
    tables: bool = True

    def __post_init__(self) -> None:
        _check_method("weights", self.weights, list(WEIGHT_METHODS), list(INDEX_METHODS), "index")
        if self.index is not None:
            _check_method("index", self.index, list(INDEX_METHODS), list(WEIGHT_METHODS), "weights")
        if not isinstance(self.tables, bool):
            raise KanCompileError(f"training: found tables {shown(self.tables)}, expected True or False")

    def canonical_json(self) -> str:
        """Write the choices in one fixed form, for hashing."""
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return (
            f"weights {self.weights}, index {self.index or 'calibrated'}, tables {'trained' if self.tables else 'kept'}"
        )


def read_training(training: Training | Mapping[str, Any] | None) -> Training:
    """Read choices as a user gives them.

    Raises:
        KanCompileError: an unknown key or method.
    """
    if training is None:
        return Training()
    if isinstance(training, Training):
        return training
    if not isinstance(training, Mapping):
        raise KanCompileError(
            f"training: found {type(training).__name__}, expected a mapping such as {{'weights': 'lsq'}}"
        )
    known = [field.name for field in fields(Training)]
    for key in training:
        if key not in known:
            raise KanCompileError(
                f"training: found the key {shown(key)}, expected some of {known!r}; bits belong to the recipe"
            )
    return Training(**training)


def _check_method(what: str, given: Any, known: list[str], others: list[str], other: str) -> None:
    if given in known:
        return
    if given in others:
        raise KanCompileError(
            f"training: found {what} {given!r}, which is a method for {other}, expected one of {known!r}; "
            f"set {other} = {given!r}"
        )
    raise KanCompileError(f"training: found {what} {shown(given)}, expected one of {known!r}")
