"""The cells of a comparison: a rounding method at a width, measured, and kept in a file of its own so that a run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kancompile.compiler import write_atomically
from kancompile.diagnosis.laboratory import Outcome
from kancompile.errors import KanCompileError, check_form, parse_json, read_text, reason

_FORM = {"key": str, "about": dict, "outcome": (dict, type(None)), "file_bytes": (int, type(None)), "refused": str}


@dataclass(frozen=True)
class Cell:
    """One rounding method at one width.

    Attributes:
        method: as the recipe's key.
        weight_bits: as the recipe's key.
        outcome: what was measured, ``None`` where the method cannot do that.
        file_bytes: of the ONNX file, ``None`` likewise.
        refused: why not; empty where it was measured.
    """

    method: str
    weight_bits: int | str
    outcome: Outcome | None
    file_bytes: int | None
    refused: str = ""


class CellFiles:
    """A folder with one JSON file a cell, each with the hash of all that its measurement depends on.

    Attributes:
        folder: where they are; it is created when the first one is written.
    """

    def __init__(self, folder: Path, context: Mapping[str, Any], force: bool = False) -> None:
        """Take where cells are.

        Args:
            folder: where they are.
            context: plain data that every measurement depends on.
            force: whether cells of another context are measured again, instead of refused.
        """
        self.folder, self._force = folder, force
        self._key = hashlib.sha256(json.dumps(dict(context), sort_keys=True).encode()).hexdigest()
        self._context = dict(context)

    def path(self, method: str, weight_bits: int | str) -> Path:
        """Name the file of a cell."""
        return self.folder / f"{method.replace('+', '-')}-{weight_bits}.json"

    def read(self, method: str, weight_bits: int | str) -> Cell | None:
        """Return a cell that was measured before, ``None`` where it was not.

        Raises:
            KanCompileError: the file is damaged, or was measured with something else.
        """
        path = self.path(method, weight_bits)
        if not path.is_file():
            return None
        who, way_out = f"cell {str(path)!r}", "give another folder, or --force to measure it again"
        text = read_text(path, who, way_out)
        try:
            found = parse_json(text)
            check_form(found, _FORM, who, way_out)
            outcome = None if found["outcome"] is None else Outcome(**found["outcome"])
        except Exception as error:
            if self._force:
                return None
            raise KanCompileError(f"{who}: found no measurement ({reason(error)}); {way_out}") from error
        if found["key"] != self._key:
            if self._force:
                return None
            changed = [key for key, value in self._context.items() if found["about"].get(key) != value]
            raise KanCompileError(
                f"{who}: measured with another {', '.join(changed) or 'setting'}, expected the same as now; {way_out}"
            )
        return Cell(method, weight_bits, outcome, found["file_bytes"], found["refused"])

    def write(self, cell: Cell) -> None:
        """Keep a cell.

        Raises:
            KanCompileError: the file cannot be written.
        """
        outcome = None if cell.outcome is None else asdict(cell.outcome)
        content = {
            "key": self._key,
            "about": self._context,
            "outcome": outcome,
            "file_bytes": cell.file_bytes,
            "refused": cell.refused,
        }
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        write_atomically({self.path(cell.method, cell.weight_bits): text.encode()}, force=True)
