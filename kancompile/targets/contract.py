"""What a target is: its capabilities as data, and the one function that writes a program as the bytes of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kancompile.ir import Program
from kancompile.recipe import CPU_PRESETS


@dataclass(frozen=True)
class Target:
    """What a target can do, as data, and its one function.

    Attributes:
        name: how users call it.
        suffix: of the file it writes.
        weight_bits: widths of weights it stores.
        emit: writes a program with metadata and a choice of storage as the bytes of a file.
        cpus: names of the CPU presets that it serves.
        emit_batch: the same for one batch size, ``None`` where files take any or all the same.
        companions: gives further files by suffix, from the bytes of the first.
        loads_in_ort: whether ONNX Runtime loads its files.
        facts: what the manifest says about a file, such as memory on a device; ``stored_bytes`` among them is what counts
            against a budget, where that is not the size of the file.
        joint_tables: whether it can look inputs up in pairs; for others every input is looked up by itself.
        quantized_outputs: whether what a network returns must have 8 bits.
    """

    name: str
    suffix: str
    weight_bits: tuple[int, ...]
    emit: Callable[[Program, Mapping[str, str], str], bytes]
    cpus: tuple[str, ...] = tuple(CPU_PRESETS)
    emit_batch: Callable[[Program, Mapping[str, str], str, int], bytes] | None = None
    companions: Callable[[bytes], Mapping[str, bytes]] | None = None
    loads_in_ort: bool = True
    facts: Callable[[bytes], dict[str, int]] = lambda data: {}
    joint_tables: bool = False
    quantized_outputs: bool = False
