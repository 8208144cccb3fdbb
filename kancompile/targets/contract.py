"""What a target is: its capabilities as data, and the one function that writes a program as the bytes of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kancompile.ir import Program
from kancompile.recipe import CPU_PRESETS, PRECISIONS, WEIGHT_ONLY

METADATA, SHORT = "kancompile.metadata", "short"
"""How metadata say that they leave out what the manifest holds; names in the file are short then."""


class Emit(Protocol):
    """How a target writes a program as the bytes of a file.

    The program is lowered and holds the law of programs (``ir.check``). Its integer weights have widths among the target's
    ``weight_bits``, it was rounded for one of the target's ``cpus``, and its outputs have 8 bits where the target asks for
    ``quantized_outputs``. Nothing else may be taken for granted: layers in float or of 16 bits, tables of any number of
    rows and ATen operators between layers may be there. A program is never changed.

    Args:
        program: what the file computes, bit for bit in its runtime unless the target says otherwise.
        metadata: key-value pairs that the file carries where its format has room for them.
        storage: the recipe's choice; a format that stores weights in one way takes all alike.
        batch: the only batch size of the file; ``None``, as always where the target does not say ``takes_batch``, for
            whatever its files take.

    Returns:
        the whole file. Equal programs, metadata and choices give equal bytes in every process, as long as the packages
        that write them are the same; ``ort-mobile`` alone cannot promise it. No file is left anywhere, on errors neither:
        the compiler names the bytes once it has them all.

    Raises:
        KanCompileError: a part of the program has no form here: its layer or operator is named, what was found, what was
            expected, and the nearest recipe or target that works. Or a package is missing: with the command that
            installs it. Whatever other packages raise about a program is turned into such an error.
    """

    def __call__(self, program: Program, metadata: Mapping[str, str], storage: str, batch: int | None = None) -> bytes:
        """Write ``program``."""


@dataclass(frozen=True)
class Target:
    """What a target can do, as data, and its one function.

    Attributes:
        name: how users call it.
        suffix: of the file it writes.
        weight_bits: widths of weights it stores.
        emit: writes a program as the bytes of a file; :class:`Emit` is its contract.
        cpus: names of the CPU presets that it serves.
        takes_batch: whether it writes files for one batch size too; files of others take any or all the same.
        companions: gives further files by suffix, from the bytes of the first.
        loads_in_ort: whether ONNX Runtime loads its files.
        facts: what the manifest says about a file, such as memory on a device; ``stored_bytes`` among them is what counts
            against a budget, where that is not the size of the file.
        joint_tables: whether it can look inputs up in pairs; for others every input is looked up by itself.
        quantized_outputs: whether what a network returns must have 8 bits.
        several_tensors: whether its files may have several inputs and outputs, and integers among them.
        recurrent_layers: whether it has an operator for an LSTM, a GRU or a plain recurrent layer.
        external_data: whether tensors may stand in a second file where they take more than 2 GB.
        guards_nan: whether its files can let NaN through to the outputs.
        precisions: of layers that its files hold, the finest last.
        most_levels: rows that its tables may have; ``None`` where any number is right.
    """

    name: str
    suffix: str
    weight_bits: tuple[int, ...]
    emit: Emit
    cpus: tuple[str, ...] = tuple(CPU_PRESETS)
    takes_batch: bool = False
    companions: Callable[[bytes], Mapping[str, bytes]] | None = None
    loads_in_ort: bool = True
    facts: Callable[[bytes], dict[str, int]] = lambda data: {}
    joint_tables: bool = False
    quantized_outputs: bool = False
    several_tensors: bool = True
    recurrent_layers: bool = True
    external_data: bool = False
    guards_nan: bool = False
    precisions: tuple[str, ...] = (WEIGHT_ONLY, *PRECISIONS)
    most_levels: int | None = None

    def holds(self, change: Mapping[str, Any]) -> bool:
        """Whether its files hold a layer whose recipe has these keys."""
        rows = change.get("levels")
        has_rows = self.most_levels is None or rows is None or rows <= self.most_levels
        return has_rows and ("precision" not in change or change["precision"] in self.precisions)
