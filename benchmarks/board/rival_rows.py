"""Write the section of the board's page about networks that others published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

STORED = Path(__file__).parent.parent / "rivals.json"
NAMES = {
    "moons": "Two moons, 2-2-1",
    "wine": "Wine, 13-4-3",
    "dry_bean": "Dry Bean, 16-2-7",
    "mnist": "MNIST, 784-62-10",
}
_TRAINED = """Networks of the widths, grids and splits of samples that KANELE (FPGA 2026) published for lookup tables in FPGAs,
trained anew as efficient-KAN, each a file in ONNX Runtime (`python -m benchmarks.board.rivals`). Its authors keep the epoch that
is best on the test samples and average over batches; here held-out training samples choose the epoch."""
_PUBLISHED = """Its integer truth tables were computed again from the published weights and learned ranges, and the integer
networks compiled. Outputs are integers, and count as different where they are more than 0.001 apart: the last scale of a file is
a float32. Accuracy is that of the integers on all test samples at once."""


def rival_rows(results: Mapping[str, Any]) -> str:
    """Write both tables; one that nobody has measured is left out."""
    parts = []
    if results["trained"]:
        lines = [
            "| network | published | float | file | accuracy, 95 % interval | bytes |",
            "|---|---|---|---|---|---|",
        ]
        name = ""
        for row in sorted(results["trained"], key=lambda row: list(NAMES).index(row["rival"])):
            low, high = row["interval"]
            shown = NAMES[row["rival"]] if row["rival"] != name else ""
            lines.append(
                f"| {shown} | {row['published'] if shown else ''} | {row['float_accuracy']:.2f} | {row['file']} | "
                f"{row['accuracy']:.2f} ({low:.2f} ... {high:.2f}) | {row['bytes']:,} |"
            )
            name = row["rival"]
        parts += [_TRAINED, "\n".join(lines)]
    if results["published"]:
        lines = [
            "| network | entries that differ | published | integers | file: outputs that differ, bytes | `--precision float` |",
            "|---|---|---|---|---|---|",
        ]
        for row in results["published"]:
            files = [
                f"{file['differing_outputs']} of {file['outputs']:,}, {file['bytes']:,}"
                for file in (row["files"]["int8"], row["files"]["float"])
            ]
            lines.append(
                f"| {NAMES[row['rival']]} | {row['differing_entries']} of {row['entries']:,} | {row['published']} | "
                f"{row['accuracy']:.2f} | {' | '.join(files)} |"
            )
        parts += [_PUBLISHED, "\n".join(lines)]
    return "\n\n".join(parts) or "not run."
