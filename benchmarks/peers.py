"""Set compiled files beside whatever else runs the same network: accuracy, bytes and times; a section of docs/benchmarks.md.

Run from the root of the repository (``pip install kancompile[openvino,examples]``)::

    python -m benchmarks.peers --data FOLDER --checkpoints FOLDER
    python -m benchmarks.peers --only digits      # measures these again and keeps the other rows

Candidates: the float export in ONNX Runtime and in OpenVINO, ``quantize_static`` and ``quantize_dynamic`` of it, PyTorch itself,
``torch.compile``, our own ``precision = "float"``, and an int8 network of ordinary layers of the same widths, trained on the same
data. All are timed interleaved. What was measured is stored after each network, and not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import kancompile
from benchmarks.board import networks as board
from benchmarks.digit_models import build_seeded
from benchmarks.digit_models import load as load_digits
from benchmarks.digit_models import train as train_digits
from benchmarks.generic_quantization import dynamic_int8, static_int8
from benchmarks.marked_section import replace_section
from benchmarks.measured_models import CALIBRATION_SAMPLES
from benchmarks.results_file import read_results, write_results
from examples.zoo import efficient_kan
from kancompile.compiler.atomic_write import write_atomically
from kancompile.progress import quiet, say
from kancompile.runtimes import openvino
from kancompile.runtimes.machine import describe_machine
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.benchmark import COMPILED, EAGER, FLOAT_EXPORT, Candidate, take_turns, torch_threads
from kancompile.validation.error_measures import ErrorMeasure
from kancompile.validation.float_export import export_float

PAGE, SECTION = Path("docs/benchmarks.md"), "peers"
OWN_FLOAT = 'compiled, `precision = "float"`'
STATIC, DYNAMIC = "`quantize_static` of the export", "`quantize_dynamic` of the export"
OPENVINO, INDUCTOR = "float export, OpenVINO", "`torch.compile`"
PERCEPTRON = "int8 perceptron of these widths, no KAN"
ORDER = (COMPILED, OWN_FLOAT, FLOAT_EXPORT, STATIC, DYNAMIC, OPENVINO, INDUCTOR, EAGER, PERCEPTRON)
NOT_IN_SHORT = ("iris, pykan 4-5-3",)
_EPOCHS, _LESS_ACCURATE, _NOT_FASTER = 8, 0.3, 1.0
_SEEN = 100_000
"""Samples that a perceptron sees at least in training, each many times where there are few."""


@dataclass(frozen=True)
class Peer:
    """One way to run a network.

    Attributes:
        call: maps ``[b, n]`` to outputs with some threads; made once for each number of them.
        bytes: of its file, ``None`` where it has none.
    """

    call: Callable[[int], Callable[[Tensor], Any]]
    bytes: int | None


def of_board(name: str, data: Path, checkpoints: Path) -> tuple[board.Network, tuple[int, ...]]:
    """Load a network of the board with its widths."""
    network = board.load(name, 0, [data], checkpoints)
    return network, board.widths(name, network.x.shape[1], int(network.y.max()) + 1)


def digits(data: Path, checkpoints: Path) -> tuple[board.Network, tuple[int, ...]]:
    """Train efficient-KAN 64-64-10 on scikit-learn's digits."""
    widths, found = (64, 64, 10), load_digits((64,))
    model = build_seeded(partial(efficient_kan.build, widths))
    train_digits(model, found, epochs=_EPOCHS)
    samples = (found.x_train, found.y_train, found.x_test, found.y_test)
    return board.Network("digits", 0, model, *samples), widths


NETWORKS: dict[str, Callable[[Path, Path], tuple[board.Network, tuple[int, ...]]]] = {
    "MNIST, efficient-KAN 784-64-10": partial(of_board, "mnist_efficient_kan"),
    "MNIST, FastKAN 784-64-10": partial(of_board, "mnist_fast_kan"),
    "digits, efficient-KAN 64-64-10": digits,
    "iris, pykan 4-5-3": partial(of_board, "pykan_iris"),
    "wine, pykan 13-5-3": partial(of_board, "pykan_wine"),
    "breast cancer, pykan 30-5-2": partial(of_board, "pykan_cancer"),
}


def trained_perceptron(widths: Sequence[int], network: board.Network) -> nn.Module:
    """Train a network of ordinary layers on the data of a KAN."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [[nn.Linear(n_in, n_out), nn.ReLU()] for n_in, n_out in itertools.pairwise(widths)]
    model = nn.Sequential(*itertools.chain.from_iterable(layers))[:-1]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(max(_EPOCHS, _SEEN // len(network.y))):
        for batch in torch.randperm(len(network.y), generator=generator).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(network.x[batch]), network.y[batch]).backward()
            optimizer.step()
    return model.eval()


def peers_of(
    network: board.Network, widths: Sequence[int], unavailable: dict[str, str], folder: Path
) -> dict[str, Peer]:
    """Make all candidates; why one cannot be made is put into ``unavailable``."""
    few = network.x[:CALIBRATION_SAMPLES]
    shape = tuple(few.shape[1:])

    def file(content: bytes) -> Peer:
        return Peer(partial(_of_file, content), len(content))

    def compiled(**recipe: Any) -> Peer:
        with quiet():
            return file(kancompile.compile(network.model, few, recipe=recipe).model_bytes)

    exported = export_float(network.model, shape)
    name = next(iter(RuntimeModel(exported).input_shapes))

    def in_openvino() -> Peer:
        reason = openvino.missing()
        if reason is not None:
            raise RuntimeError(reason)
        (folder / "float.onnx").write_bytes(exported)
        return Peer(partial(_in_openvino, folder / "float.onnx"), len(exported))

    def perceptron() -> Peer:
        content = export_float(trained_perceptron(widths, network), shape)
        return file(static_int8(content, few.numpy(), next(iter(RuntimeModel(content).input_shapes))))

    makers: dict[str, Callable[[], Peer]] = {
        COMPILED: compiled,
        OWN_FLOAT: partial(compiled, precision="float"),
        FLOAT_EXPORT: partial(file, exported),
        STATIC: lambda: file(static_int8(exported, few.numpy(), name)),
        DYNAMIC: lambda: file(dynamic_int8(exported)),
        OPENVINO: in_openvino,
        INDUCTOR: lambda: Peer(partial(_inductor, network.model), None),
        EAGER: lambda: Peer(lambda threads: network.model, None),
        PERCEPTRON: perceptron,
    }
    found = {}
    for candidate, make in makers.items():
        say(f"{candidate} ...")
        try:
            found[candidate] = make()
        except Exception as error:  # foreign tools fail in their own ways
            if candidate == COMPILED:
                raise
            unavailable[candidate] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return found


def _of_file(content: bytes, threads: int) -> Callable[[Tensor], Any]:
    session = RuntimeModel(content, threads)
    return lambda x: session.run(x.numpy())[0]


def _in_openvino(path: Path, threads: int) -> Callable[[Tensor], Any]:
    loaded = openvino.load(path, threads)
    return lambda x: loaded.call(x.numpy())


def _inductor(model: nn.Module, threads: int) -> Callable[[Tensor], Any]:
    compiled: Callable[[Tensor], Any] = torch.compile(model)
    return compiled


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one network: quality of each candidate on the test samples, and interleaved times."""
    network, widths = NETWORKS[name](arguments.data, arguments.checkpoints)
    unavailable: dict[str, str] = {}
    test, labels, expected = network.test, network.labels, network.float_outputs
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with torch.enable_grad():
            made = peers_of(network, widths, unavailable, Path(folder))
        rows: dict[str, Any] = {}
        for threads in arguments.threads:
            with torch_threads(threads), _on_one_core(threads == 1):
                calls = {candidate: peer.call(threads) for candidate, peer in made.items()}
                for candidate in [] if rows else list(calls):
                    try:
                        outputs = network.outputs(lambda x, call=calls[candidate]: torch.as_tensor(call(x)))  # type: ignore[misc]
                    except Exception as error:  # kernels of foreign runtimes
                        unavailable[candidate] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                        continue
                    accuracy = 100 * float((outputs.argmax(1) == labels).float().mean())
                    rows[candidate] = {"accuracy": accuracy, "bytes": made[candidate].bytes, "times": {}}
                    if candidate != PERCEPTRON:
                        error_of = ErrorMeasure()
                        error_of.add(expected, outputs, candidate)
                        rows[candidate]["worst_db"] = min(error_of.worst_db, 999.0)
                for batch in arguments.batches:
                    x = test[torch.arange(batch) % len(test)].contiguous()
                    runs: dict[str, Candidate] = {one: partial(calls[one], x) for one in rows}
                    for timing in take_turns(runs, batch, threads, arguments.repeats, 2, unavailable):
                        rows[timing.candidate]["times"][f"{threads} {batch}"] = timing.median
                    say(f"{name}: batch {batch}, {threads or 'all'} threads, done")
    machine = describe_machine() | {"load": round(os.getloadavg()[0], 1)}
    return {"rows": rows, "unavailable": unavailable, "machine": machine}


@contextlib.contextmanager
def _on_one_core(wanted: bool) -> Iterator[None]:
    """Keep this process on one core, as far as the system can: the pools of some runtimes take more than they are told."""
    if not wanted or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def not_faster(found: Mapping[str, Any]) -> list[str]:
    """Name the candidates that are as accurate and faster, with the batch size and by how much."""
    rows, said = found["rows"], []
    for candidate, row in rows.items():
        if candidate == COMPILED or row["accuracy"] < rows[COMPILED]["accuracy"] - _LESS_ACCURATE:
            continue
        for key, time in row["times"].items():
            ratio = time / rows[COMPILED]["times"][key]
            if ratio < _NOT_FASTER:
                threads, batch = key.split()
                said.append(f"{candidate} at batch {batch}{'' if threads == '1' else ', all threads'} ({ratio:.2f} x)")
    return said


def section(results: Mapping[str, Any]) -> str:
    """Write the tables, what is not faster first."""
    lines = [HEAD, ""]
    behind = {name: said for name, found in results.items() if (said := not_faster(found))}
    lines += ["Faster than the compiled file, at an accuracy no more than 0.3 points below it:", ""]
    lines += [f"* {name}: {'; '.join(said)}" for name, said in behind.items()] or ["* nothing"]
    for name, found in results.items():
        rows = found["rows"]
        keys = list(rows[COMPILED]["times"])
        heads = [f"batch {batch}{'' if threads == '1' else ', all threads'}" for threads, batch in map(str.split, keys)]
        lines += ["", f"**{name}**", "", "| | accuracy | worst output | bytes | " + " | ".join(heads) + " |"]
        lines += ["|---" * (4 + len(heads)) + "|"]
        for candidate in ORDER:
            if candidate not in rows:
                continue
            row = rows[candidate]
            ratios = [_ratio(row["times"].get(key), rows[COMPILED]["times"][key], candidate) for key in keys]
            worst = f"{row['worst_db']:.1f} dB" if "worst_db" in row and row["worst_db"] < 150 else ""
            size = "" if row["bytes"] is None else f"{row['bytes']:,}"
            lines.append(f"| {candidate} | {row['accuracy']:.2f} % | {worst} | {size} | {' | '.join(ratios)} |")
        if "machine" in found:
            machine = found["machine"]
            lines += ["", "On {cpu} ({instructions}), cores {cores}, load {load}.".format(**machine)]
            if machine["load"] > 2 * machine["cores"]:
                lines[-1] += (
                    " A busy machine interrupts calls of milliseconds, so that ratios of slow candidates are too large."
                )
        lines += [f"\n{candidate}: {reason}" for candidate, reason in found["unavailable"].items()]
    return "\n".join(lines)


def short_form(results: Mapping[str, Any]) -> str:
    """Write one line for each network: bytes, and times of batch 64 in one thread as multiples of the compiled file's."""
    lines = [
        SHORT_HEAD,
        "",
        f"| network | bytes: compiled, export | {' | '.join(SHORT_ORDER.values())} |",
        "|---" * 7 + "|",
    ]
    for name, found in results.items():
        if name in NOT_IN_SHORT:
            continue
        rows = found["rows"]
        own = rows[COMPILED]
        ratios = [_accurate_ratio(rows, one) for one in SHORT_ORDER]
        lines.append(f"| {name} | {own['bytes']:,}, {rows[FLOAT_EXPORT]['bytes']:,} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _accurate_ratio(rows: Mapping[str, Any], candidate: str) -> str:
    if candidate not in rows or "1 64" not in rows[candidate]["times"]:
        return ""
    lost = rows[COMPILED]["accuracy"] - rows[candidate]["accuracy"]
    ratio = rows[candidate]["times"]["1 64"] / rows[COMPILED]["times"]["1 64"]
    return f"{ratio:.2f} x" + (f", {lost:.1f} points less" if lost > _LESS_ACCURATE else "")


def _ratio(time: float | None, own: float, candidate: str) -> str:
    if time is None:
        return ""
    return f"**{1e6 * own:,.0f} us**" if candidate == COMPILED else f"{time / own:.2f} x"


SHORT_HEAD = """Times as long as the compiled file's at batch 64, one thread, on a busy machine
([all figures](docs/benchmarks.md#peers)). **We lose** to an int8 perceptron of the same widths, which is no KAN: it is faster
everywhere, and at least as accurate on digits, wine and breast cancer."""
SHORT_ORDER = {
    FLOAT_EXPORT: "export, ONNX Runtime",
    OPENVINO: "OpenVINO",
    STATIC: "`quantize_static`",
    INDUCTOR: "`torch.compile`",
    PERCEPTRON: "int8 perceptron",
}
HEAD = """## Peers

Generated by `python -m benchmarks.peers`; do not edit. The first row has microseconds of a call, the others how many times as
long they take, interleaved in one process, medians, one thread on one core; accuracy and the worst output on all test samples."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument(
        "--checkpoints", type=Path, required=True, help="folder of weights; trained where there are none"
    )
    parser.add_argument("--only", help="measure networks whose name contains this again")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="0: one per core (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="blocks of 50 ms a candidate (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).with_name("peers.json"), help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=PAGE, help="page that holds the section (default: %(default)s)")
    parser.add_argument(
        "--readme", type=Path, default=Path("README.md"), help="page of the short form (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = read_results(arguments.results) if arguments.results.is_file() else {}
    for name in NETWORKS:
        if name in results if arguments.only is None else arguments.only not in name:
            continue
        results[name] = measure(name, arguments)
        results = {one: results[one] for one in NETWORKS if one in results}
        write_results(arguments.results, results)
        texts = {
            page: replace_section(page.read_text(encoding="utf-8"), SECTION, write(results)).encode()
            for page, write in ((arguments.out, section), (arguments.readme, short_form))
        }
        write_atomically(texts, force=True)
        print(f"{name}: {'; '.join(not_faster(results[name])) or 'nothing is faster'}", flush=True)


if __name__ == "__main__":
    main()
