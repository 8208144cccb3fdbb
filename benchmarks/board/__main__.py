"""Fill the board: accuracy, bytes and speed of the emitted file for every network, method and width.

Run from the root of the repository, with ``mnist.npz``, ``fashion_mnist.npz``, ``cifar10.npz`` and ``cifar100.npz`` in folders::

    python -m benchmarks.board --data FOLDER --checkpoints FOLDER                 # what is required and not yet there
    python -m benchmarks.board --data FOLDER --checkpoints FOLDER --networks mnist_fast_kan --minutes 60
    python -m benchmarks.board --page                                            # docs/board.md and its plots, from the results

Every cell is a JSON file under ``--out``, so that a run goes on where the last one ended. Networks that have no weights yet are
trained first. ``--page`` gathers the cells in ``benchmarks/board.json``, which stays in the repository, and writes the page.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.board.cells import AFTER, NETWORKS, WITH, Cell, everything, required
from benchmarks.board.measurement import measure
from benchmarks.board.networks import Network, load
from benchmarks.board.page import STORED, write_page
from benchmarks.results_file import read_results, write_results
from kancompile.progress import say


def stored(folder: Path) -> dict[str, dict[str, object]]:
    """Read all cells that are filled, those of the repository first, by their keys."""
    found = {Cell(**result["cell"]).key: result for result in (read_results(STORED) if STORED.is_file() else [])}
    for file in sorted(folder.glob("*.json")):
        found[file.stem] = read_results(file)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders with the .npz files")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("benchmarks/results/networks"), help="of trained networks"
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="default: all")
    parser.add_argument("--methods", nargs="+", choices=(*AFTER, *WITH), default=(*AFTER, *WITH), help="default: all")
    parser.add_argument("--bits", nargs="+", help="such as W4A8 (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--all", action="store_true", help="also the cells that are not required")
    parser.add_argument("--minutes", type=float, help="begin no cell after as many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/board"), help="default: %(default)s")
    parser.add_argument("--page", action="store_true", help="write the page; measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = stored(arguments.out)
    if arguments.page:
        write_page(done)
        return

    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    wanted = [
        cell
        for cell in (everything() if arguments.all else required())
        if cell.network in arguments.networks
        and cell.method in arguments.methods
        and cell.seed in arguments.seeds
        and (arguments.bits is None or cell.bits in arguments.bits)
    ]
    missing = [cell for cell in wanted if cell.key not in done]
    say(f"{len(wanted) - len(missing)} of {len(wanted)} cells are filled")
    network: Network | None = None
    for number, cell in enumerate(missing, 1):
        if time.monotonic() > end:
            say(f"{len(missing) - number + 1} cells are left; the same command goes on")
            return
        if network is None or (network.name, network.seed) != (cell.network, cell.seed):
            network = load(cell.network, cell.seed, arguments.data, arguments.checkpoints)
        result = measure(cell, network)
        write_results(arguments.out / f"{cell.key}.json", result)
        low, high = result["interval"]
        say(
            f"{number}/{len(missing)} {cell.key}: {result['accuracy']:.2f} %, {result['lost']:+.2f} points lost "
            f"({low:+.2f} ... {high:+.2f}), {result['bytes']:,} bytes, {result['seconds']} s"
        )


if __name__ == "__main__":
    main()
