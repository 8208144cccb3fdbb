"""Draw the plots of the benchmark page from the tables of the documentation: ``python -m benchmarks.pictures``.

One shows points of accuracy lost by bits of the weights, of the emitted files; the other how many times as fast as its float ONNX
export a file is, one dot for each small model of the compatibility table, by family. Both are narrow, for phones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = DOCS / "pictures"
STYLE: Any = {
    "svg.hashsalt": "kancompile",
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
BITS = (8, 4, 3, 2)
FAMILIES = {  # first words of a row's family -> its name in the plot
    "B-spline": "B-spline",
    "radial": "radial basis",
    "reflectional": "radial basis",
    **dict.fromkeys(("Chebyshev", "Gram", "Jacobi", "Legendre", "Hermite", "Laguerre", "Taylor"), "polynomial"),
    **dict.fromkeys(("Fourier", "sine"), "Fourier, sine"),
    "wavelet": "wavelet",
    **dict.fromkeys(("rational", "fractional", "ReLU"), "rational, ReLU"),
}


def accuracy_lost() -> dict[str, dict[str, list[float]]]:
    """Read the table of accuracy: by network and method the points lost at :data:`BITS`."""
    found: dict[str, dict[str, list[float]]] = {}
    methods: list[str] = []
    network = ""
    for cells in _rows("benchmarks.md"):
        if cells[0] == "model" and cells[1] == "bits":
            methods = [cell.strip("`") for cell in cells[2:-1]]
        elif methods and len(cells) == len(methods) + 3 and cells[1].isdecimal():
            network = cells[0] or network
            for method, cell in zip(methods, cells[2:-1], strict=True):
                if cell:
                    found.setdefault(network, {}).setdefault(method, []).append(float(cell.split()[0]))
    return found


def speed() -> dict[str, list[float]]:
    """Read the table of compatibility: by family, times of the float export over those of the file."""
    found: dict[str, list[float]] = {}
    column = None
    for cells in _rows("compatibility.md"):
        if cells[0] == "family":
            column = cells.index("faster")
        elif column is not None and len(cells) > column and re.fullmatch(r"[\d.]+x", cells[column]):
            family = FAMILIES.get(cells[0].split()[0].rstrip(","), "others")
            found.setdefault(family, []).append(float(cells[column].removesuffix("x")))
    return found


def _rows(page: str) -> Iterator[list[str]]:
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.split("|")[1:-1]]


def accuracy_plot() -> Figure:
    """Draw what is lost by bits, a line for each network."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for network, methods in accuracy_lost().items():
        best = [min(values) for values in zip(*_same_length(methods), strict=True)]
        axes.plot(range(len(BITS)), best, marker="o", label=network.partition(" (")[0])
    axes.set_xticks(range(len(BITS)), [str(bits) for bits in BITS])
    axes.set_xlabel("bits of the weights, best method")
    axes.set_ylabel("points of accuracy lost")
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.legend(fontsize=8, frameon=False)
    return figure


def speed_plot() -> Figure:
    """Draw how many times as fast files are, a row for each family."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    families = sorted(speed().items(), key=lambda entry: sorted(entry[1])[len(entry[1]) // 2])
    for place, (_, values) in enumerate(families):
        axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
    axes.set_yticks(range(len(families)), [name for name, _ in families])
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    axes.minorticks_off()
    axes.axvline(1, color="0.7", linewidth=0.8)
    axes.set_xlabel("times as fast as the float export, batch 32")
    return figure


def _same_length(methods: dict[str, list[float]]) -> list[list[float]]:
    return [values for values in methods.values() if len(values) == len(BITS)]


def main() -> None:
    """Write the pictures; the same tables give the same bytes."""
    with mpl.rc_context(STYLE):
        for name, figure in {"accuracy_by_bits": accuracy_plot(), "speed_by_family": speed_plot()}.items():
            figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
            print(f"wrote {name}.svg")


if __name__ == "__main__":
    main()
