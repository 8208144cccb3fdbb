"""Target ``c99``: one C99 file without dependencies, integer arithmetic from the first table to the last sum.

It computes what the ONNX file of the same program computes in ONNX Runtime, bit for bit: sums are integers anyway, and the
float32 operations between layers are reproduced in integers (``arithmetic``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kancompile.ir import Program
from kancompile.targets.c99.interface import INTERFACE_BEGINS, INTERFACE_ENDS
from kancompile.targets.c99.packaging import LibraryFacts, library_files
from kancompile.targets.c99.plan import make_plan
from kancompile.targets.c99.render import render
from kancompile.targets.contract import Target


def emit(program: Program, metadata: Mapping[str, str], storage: str = "smallest", batch: int | None = None) -> bytes:
    """Write a program as the text of a ``.c`` file, which compiles alone; :func:`companions` gives the ``.h`` to it.

    Weights always take as few bits as they have.
    """
    return render(make_plan(program), metadata).encode("ascii")


def companions(source: bytes) -> dict[str, bytes]:
    """Return the header that belongs to a ``.c`` file: its interface, word for word."""
    text = source.decode("ascii")
    begin, end = text.index(INTERFACE_BEGINS) + len(INTERFACE_BEGINS), text.index(INTERFACE_ENDS)
    title = text[: text.index("*/\n") + 3]
    return {".h": (title + "\n" + text[begin:end]).encode("ascii")}


def facts(source: bytes) -> dict[str, int]:
    """Return what a ``.c`` file states about itself.

    Returns:
        ``stored_bytes`` of constants in flash, ``ram_bytes`` of state, and ``products``: multiplications with a weight for one
        sample, whatever the sample.
    """
    names = {"stored_bytes": "FLASH_BYTES", "ram_bytes": "RAM_BYTES", "products": "PRODUCTS"}
    return {key: macro(source, name) for key, name in names.items()}


def macro(source: bytes, name: str) -> int:
    """Return the value of a macro ``KAN_MODEL_<name>`` of the interface."""
    found = re.search(rf"#define KAN_MODEL_{name} (\d+)".encode(), source)
    assert found is not None
    return int(found.group(1))


TARGET = Target(
    "c99",
    ".c",
    (2, 3, 4, 5, 6, 7, 8),
    emit,
    companions=companions,
    loads_in_ort=False,
    facts=facts,
    several_tensors=False,
    recurrent_layers=False,
    precisions=("int8",),
)

__all__ = ["TARGET", "LibraryFacts", "library_files"]
