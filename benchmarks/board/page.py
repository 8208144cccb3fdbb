"""Write the page of the board from its cells: ``docs/board.md`` and ``docs/pictures/board.svg``."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.board.advice import NEARLY, advice
from benchmarks.board.cells import (
    AFTER,
    BITS_AFTER,
    BITS_WITH,
    CONVOLUTIONS,
    NETWORKS,
    OTHER_SAMPLES,
    PERCEPTRONS,
    SAMPLES,
    WITH,
    Cell,
    bits_text,
    everything,
    required,
)
from benchmarks.board.findings import findings
from benchmarks.board.networks import title
from benchmarks.board.rival_rows import STORED as RIVALS
from benchmarks.board.rival_rows import rival_rows
from benchmarks.results_file import read_results, write_results

ROOT = Path(__file__).parent.parent.parent
STORED = ROOT / "benchmarks" / "board.json"
PAGE = ROOT / "docs" / "board.md"
PICTURE = ROOT / "docs" / "pictures" / "board.svg"
NOT_RUN = "not run"
Results = Mapping[str, Mapping[str, Any]]

_HEAD = """# The board

Methods by bits by networks, every cell measured on an emitted file in ONNX Runtime with all test samples. `python -m
benchmarks.board --data FOLDER --checkpoints FOLDER` fills what is missing, one cell after another, and trains networks that have
no weights yet; `python -m benchmarks.board --page` writes this page. {filled} of {required} required cells are filled, and {more}
others; a cell that nobody has run says so.

`W4A8` are weights of 4 bits and tables of 256 rows for an input (2 to the power of A), entries of 8 bits; single lookups, no
error gate, 1,000 calibration samples (all that there are of smaller sets). A number is points of accuracy lost against the float
model, mean ± standard deviation over seeds of training, three for perceptrons and one for the others (how many stands in brackets
where some are missing); below zero the file is the better one.

{differing}

![Points lost by bits, by bytes and by time](pictures/board.svg)
"""
_TRAINED = """Three epochs from the compiled file on, half on labels and half on the float model's classes, by the rates 0.01 and
0.02, of which the one with less loss on samples that are held out is kept ([quantization-aware
training](quantization_aware_training.md))."""
_SPEED = """Medians over the cells of one column above: bytes; how many times as fast as the float export at batch 1 and 32;
how many times as long as an int8 network of ordinary layers of the same widths they take; interleaved runs, one thread."""
_ADVICE = f"""The quickest method after training that loses at most {NEARLY} points more than the best one (from quick
to slow: `uniform`, `gptq`, `awq+gptq`, `hawq-v2`, `adaround`, `brecq`), its points lost, and the best one where that is another.
Means over the networks and seeds, whose number stands in brackets, for which all of them were run. Test sets of pykan's networks
are small: one decision is 0.5 to 2 points. `auto`, the default below 8 bits, chooses by the error on samples held out."""
_SAMPLES = "Points lost with `awq+gptq`, W3A8, seed 0."
_PUBLISHED = """What QuantKAN (arXiv 2511.18689) states, checked on these files. Its cells are of other networks and of fake
quantization, so they are not repeated."""


def write_page(results: Results) -> None:
    """Gather the cells in the repository and write page and plots from them; equal cells give equal bytes."""
    from benchmarks.board.picture import draw  # matplotlib, which the page alone does without

    known = {cell.key for cell in everything()}
    kept = {key: results[key] for key in sorted(results) if key in known}
    write_results(STORED, list(kept.values()))
    PAGE.write_text(page(kept, stored_rivals()), encoding="utf-8")
    draw(kept, PICTURE)
    print(f"wrote {PAGE.name} and {PICTURE.name} from {len(kept)} cells")


def stored_rivals() -> Mapping[str, Any]:
    """Read what ``benchmarks.board.rivals`` measured."""
    found: dict[str, Any] = read_results(RIVALS) if RIVALS.is_file() else {"trained": [], "published": []}
    return found


def page(results: Results, rivals: Mapping[str, Any]) -> str:
    """Write the page: the cells by their keys, and what ``benchmarks.board.rivals`` measured."""
    wanted = {cell.key for cell in required()}
    head = _HEAD.format(
        filled=len(wanted & set(results)),
        required=len(wanted),
        more=len(set(results) - wanted),
        differing=_differing(results),
    )
    parts = [
        head,
        "## After training",
        _grid(results, NETWORKS, AFTER, BITS_AFTER),
        "## Which method",
        _ADVICE,
        advice(results),
        "## With training",
        _TRAINED,
        _grid(results, (*PERCEPTRONS, *CONVOLUTIONS), tuple(WITH), BITS_WITH),
        "## Bytes and speed",
        _SPEED,
        _sizes(results),
        "## Calibration samples",
        _SAMPLES,
        _samples(results),
        "## What the reference system found",
        _PUBLISHED,
        findings(results),
        "## Published for lookup tables",
        rival_rows(rivals),
        "## Machines",
        _machines(results),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def lost(results: Results, network: str, method: str, bits: tuple[int, int]) -> list[float]:
    """List points lost, a number a seed."""
    cells = (Cell(network, method, *bits, seed) for seed in range(3))
    return [results[cell.key]["lost"] for cell in cells if cell.key in results]


def _grid(results: Results, networks: Sequence[str], methods: Sequence[str], columns: Sequence[tuple[int, int]]) -> str:
    rows = [["network", "method", *(bits_text(*bits) for bits in columns)]]
    for network in networks:
        found = [[lost(results, network, method, bits) for bits in columns] for method in methods]
        if not any(values for row in found for values in row):
            rows.append([title(network), "all", *[NOT_RUN] * len(columns)])
            continue
        name = f"{title(network)} ({_float(results, network)})"
        for method, row in zip(methods, found, strict=True):
            rows.append([name, f"`{method}`", *(_spread(values, network) for values in row)])
            name = ""
    return _table(rows)


def _float(results: Results, network: str) -> str:
    return f"{statistics.mean(r['float_accuracy'] for r in results.values() if r['cell']['network'] == network):.2f}"


def _spread(values: Sequence[float], network: str) -> str:
    if not values:
        return NOT_RUN
    wanted = 3 if network in PERCEPTRONS else 1
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2f}"
    return text if len(values) == wanted else f"{text} ({len(values)})"


def _sizes(results: Results) -> str:
    columns = tuple(dict.fromkeys((*BITS_AFTER, *BITS_WITH)))
    rows = [
        ["network", "bits", "bytes", "float bytes", "batch 1", "batch 32", "slower than plain, batch 1", "batch 32"]
    ]
    for network in NETWORKS:
        for weight, index in columns:
            found = [
                result
                for result in results.values()
                if result["cell"]["network"] == network
                and (result["cell"]["weight_bits"], result["cell"]["index_bits"]) == (weight, index)
                and result["cell"]["samples"] == SAMPLES
            ]
            if not found:
                continue
            faster = [statistics.median(r["times_as_fast_as_float"][batch] for r in found) for batch in ("1", "32")]
            slower = [statistics.median(r["times_as_slow_as_plain"][batch] for r in found) for batch in ("1", "32")]
            size, float_size = (statistics.median(r[key] for r in found) for key in ("bytes", "float_bytes"))
            numbers = [f"{value:.1f} x" for value in (*faster, *slower)]
            rows.append([title(network), bits_text(weight, index), f"{size:,.0f}", f"{float_size:,.0f}", *numbers])
    return _table(rows) if len(rows) > 1 else f"{NOT_RUN}."


def _samples(results: Results) -> str:
    counts = (*OTHER_SAMPLES, SAMPLES)
    rows = [["network", *(f"{count:,}" for count in counts)]]
    for network in NETWORKS:
        cells = [Cell(network, "awq+gptq", 3, 8, 0, count) for count in counts]
        rows.append(
            [title(network), *(f"{results[c.key]['lost']:.2f}" if c.key in results else NOT_RUN for c in cells)]
        )
    return _table(rows)


def _differing(results: Results) -> str:
    exact = [result for result in results.values() if not result["cell"]["network"].endswith("fast_kan")]
    off = [Cell(**result["cell"]).key for result in exact if result["differing"]]
    same = len(exact) - len(off)
    checked = (
        f"The outputs of all files were compared with the simulation: in {same} of {len(exact)} files none differs"
    )
    others = " (FastKAN normalizes in float between its layers, where the last bits may differ)"
    text = f"{checked}{others}." if not off else f"{checked}{others}; outputs differ in {', '.join(off)}."
    return textwrap.fill(text, 130, break_long_words=False, break_on_hyphens=False)


def _machines(results: Results) -> str:
    loads: dict[str, list[float]] = {}
    for result in results.values():
        loads.setdefault(_machine(result["machine"]), []).append(result["machine"].get("load", 0.0))
    lines = [
        f"* {machine}; {len(found)} cells, other work beside them: a load of {min(found):.1f} to {max(found):.1f}"
        for machine, found in sorted(loads.items())
    ]
    return "\n".join(lines) or f"{NOT_RUN}."


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "onnxruntime") if name in machine)
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['instructions']}; {versions}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
