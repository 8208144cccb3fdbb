"""Draw the plot of the benchmark page from the tables of the documentation: ``python -m benchmarks.pictures``.

Left: points of accuracy lost by bits of the weights, of the emitted files. Right: how many times as fast as its float ONNX export
a file is, one dot for each small model of the compatibility table, by family.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"
PICTURE = DOCS / "pictures" / "accuracy_and_speed.svg"
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


def draw() -> Figure:
    """Draw both plots side by side."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for network, methods in accuracy_lost().items():
        best = [min(values) for values in zip(*_same_length(methods), strict=True)]
        left.plot(range(len(BITS)), best, marker="o", label=network.partition(" (")[0])
    left.set_xticks(range(len(BITS)), [str(bits) for bits in BITS])
    left.set_xlabel("bits of the weights, best method")
    left.set_ylabel("points of accuracy lost")
    left.axhline(0, color="0.7", linewidth=0.8)
    left.legend(fontsize=8, frameon=False)
    families = sorted(speed().items(), key=lambda entry: sorted(entry[1])[len(entry[1]) // 2])
    for place, (_, values) in enumerate(families):
        right.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
    right.set_yticks(range(len(families)), [name for name, _ in families])
    right.set_xscale("log")
    right.set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    right.minorticks_off()
    right.axvline(1, color="0.7", linewidth=0.8)
    right.set_xlabel("times as fast as the float export, batch 32")
    return figure


def _same_length(methods: dict[str, list[float]]) -> list[list[float]]:
    return [values for values in methods.values() if len(values) == len(BITS)]


def main() -> None:
    """Write the picture; the same tables give the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "kancompile", "svg.fonttype": "path", "axes.spines.top": False}):
        draw().savefig(PICTURE, metadata={"Date": None})
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
