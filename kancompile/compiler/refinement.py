"""What an error gate changed, and what it would change next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kancompile.compiler.ladder import FREE
from kancompile.validation import plain_number


@dataclass(frozen=True)
class Refinement:
    """One layer that was lowered more exactly.

    Attributes:
        layer: its name.
        output: number of the output that missed.
        sqnr_db: what was found there.
        noise_db: ratio that this layer alone allows there, before.
        refined_db: the same after; ``None`` where it was taken without a trial.
        kind: what it costs (see ``ladder``).
        change: recipe keys and their new values.
    """

    layer: str
    output: int
    sqnr_db: float
    noise_db: float
    refined_db: float | None
    kind: str
    change: Mapping[str, Any]

    def note(self, wanted: float) -> str:
        """Return a line for the report."""
        return (
            f"error gate: output {self.output} at {self.sqnr_db:.1f} dB, wanted {wanted:g}; layer {self.layer!r} alone at "
            f"{self.noise_db:.1f} dB, with {_keys(self.change)}"
            + ("" if self.refined_db is None else f" at {self.refined_db:.1f} dB")
            + (", at no cost" if self.kind == FREE else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        numbers = {key: plain_number(getattr(self, key)) for key in ("sqnr_db", "noise_db", "refined_db")}
        return {"layer": self.layer, "output": self.output, "kind": self.kind, "change": dict(self.change)} | numbers


@dataclass(frozen=True)
class NextStep:
    """What would bring an output to its goal, and what that costs.

    Attributes:
        layers: to be changed.
        change: recipe keys and their values.
        worst_db: least ratio of any output then, on the calibration samples.
        extra_bytes: how many more the file would take.
        lacking: names of further targets whose files do not hold it.
    """

    layers: tuple[str, ...]
    change: Mapping[str, Any]
    worst_db: float
    extra_bytes: int
    lacking: tuple[str, ...] = ()

    def text(self) -> str:
        """Say it for people, with the options of the command line."""
        keys = " ".join(f"{key}={value}" for key, value in self.change.items())
        options = " ".join(f"--layer '{name}' {keys}" for name in self.layers)
        more = f"takes {self.extra_bytes:,} bytes more" if self.extra_bytes > 0 else "takes no more bytes"
        lacking = f", in a file that {' and '.join(self.lacking)} cannot have" if self.lacking else ""
        return f"{options} brings it to {self.worst_db:.1f} dB and {more}{lacking}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "layers": list(self.layers),
            "change": dict(self.change),
            "worst_db": plain_number(self.worst_db),
            "extra_bytes": self.extra_bytes,
            "text": self.text(),
        }


def _keys(change: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in change.items())
