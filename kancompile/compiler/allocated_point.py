"""A point of an allocation: what every layer got, predicted beside measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kancompile.validation import plain_number

Changes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    """Bits, rows and functions of all layers, lowered and measured.

    Attributes:
        changes: keys of the recipe by layer.
        predicted_db, measured_db: SQNR of the worst output, added up, ``None`` where that was not done, and measured.
        bytes: of the file.
        predicted_us: of a call in one thread by the costs of the profile, ``None`` where times are not asked for.
        measured_us: of a call on this machine, by which nothing is chosen.
        predicted_bytes: of constants, added up.
    """

    changes: Changes
    predicted_db: float | None
    measured_db: float
    bytes: int
    predicted_us: float | None = None
    measured_us: float | None = None
    predicted_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {
            "layers": {name: dict(change) for name, change in self.changes.items()},
            "predicted_db": plain_number(self.predicted_db),
            "measured_db": plain_number(self.measured_db),
            "predicted_constant_bytes": self.predicted_bytes,
            "bytes": self.bytes,
            "predicted_us": self.predicted_us,
            "measured_us": self.measured_us,
        }

    def text(self) -> str:
        """Say it in a line, without what a clock found: notes of equal compilations are equal."""
        layers = ", ".join(f"{name} {change_text(change)}" for name, change in self.changes.items())
        predicted = "" if self.predicted_db is None else f"{self.predicted_db:.1f} dB predicted, "
        errors = f"worst output {predicted}{self.measured_db:.1f}{'' if predicted else ' dB'} measured"
        time = "" if self.predicted_us is None else f", {self.predicted_us:.4g} us predicted"
        return f"{self.bytes:,} bytes, {errors}{time}: {layers}"

    def measured_text(self) -> str:
        """Say it with the time that was measured."""
        return self.text() + ("" if self.measured_us is None else f"; {self.measured_us:.4g} us measured")


def change_text(change: Mapping[str, Any]) -> str:
    """Name what one layer got shortly."""
    if "precision" in change:
        return f"{change['precision']}"
    rows = f" and {change['levels']} rows" if "levels" in change else ""
    lost = (
        f", {'joint ' if 'lookup' in change else ''}functions within {change['function_error']:g}"
        if "function_error" in change
        else ""
    )
    return f"{change['weight_bits']} bits{rows}{lost}"
