"""Serve files from many threads at once, and look at every answer: ``python -m benchmarks.serving --minutes 10``.

A network of layers and one of convolutions are compiled. Each is asked by one client for a sixth of its time, then by eight
that share one session of one thread; nine requests in ten have one sample, the others 7, none or 4096. Every answer is
compared with that of one thread to all samples at once, bit for bit. Reported are wrong answers, requests in a second and the
latency of single samples, both relative to one client's in the same run, and how the memory of the process grew.

Before that, batches of 0, 1, 7 and 4096 samples are computed with 1 and 2 threads of the runtime at every level of graph
optimization, and compared. The network of layers computes in integers alone, so its bits must be those of the simulation at
levels that fuse; the other one has activations and a normalization in float between its layers.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

import kancompile
from benchmarks.results_file import write_results
from examples.zoo import efficient_kan, kagn_conv
from kancompile.progress import quiet
from kancompile.runtimes import output_quantum

_CLIENTS, _ROWS = 8, 4096
_SIZES, _SHARES = (1, 7, 0, _ROWS), (0.9, 0.09, 0.007, 0.003)
_BINS_IN_A_DECADE, _FASTEST = 100, 1e-6
"""Of the counts of latencies, which take the same memory however long a run is."""
_LEVELS = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FUSES, _IN_INTEGERS = ("extended", "all"), "MLP"
"""Levels that choose integer kernels, and the network that has nothing else."""
Case = tuple[bytes, NDArray[np.float32], NDArray[np.float32], NDArray[Any]]
"""A file, samples, what the simulation says about them, and what one thread of the runtime says."""


def compiled(name: str) -> Case:
    """Compile a network."""
    draw = torch.Generator().manual_seed(1)
    shape = (8,) if name == "MLP" else (1, 8, 8)
    model = efficient_kan.build((8, 24, 3), grid_size=3) if name == "MLP" else kagn_conv.build((1, 6, 8), (1, 2), 3)
    with quiet():
        made = kancompile.compile(model.eval(), torch.randn(300, *shape, generator=draw), seed=7)
    samples = torch.randn(_ROWS, *shape, generator=draw)
    with torch.no_grad():
        said = made.program(samples)
    assert isinstance(said, torch.Tensor)
    return made.model_bytes, samples.numpy(), said.numpy(), session_of(made.model_bytes)(samples.numpy())


def session_of(content: bytes, threads: int = 1, level: str = "all") -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Open a file; give the function that answers requests."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = _LEVELS[level]
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x})[0])


def levels(case: Case) -> dict[str, dict[str, Any]]:
    """Compare answers of every level of graph optimization: with one another, and with the simulation."""
    content, x, simulated, _ = case
    quantum = output_quantum(content)
    found: dict[str, dict[str, Any]] = {}
    for level in _LEVELS:
        expected = session_of(content, 1, level)(x)
        changed = 0
        for threads in (1, 2):
            answer = session_of(content, threads, level)
            for size in (0, 1, 7, _ROWS):
                said, wanted = answer(x[:size]), expected[:size]
                if said.shape != wanted.shape:
                    raise SystemExit(f"batch {size}: found the shape {said.shape}, expected {wanted.shape}")
                changed += int((said != wanted).sum())
        away = np.abs(expected - simulated)
        found[level] = {
            "changed_by_threads_or_batch": changed,
            "unlike_simulation": int((expected != simulated).sum()),
            "share_of_spread": float(away.max() / simulated.std()),
            "steps": None if quantum is None else float((away / quantum).max()),
            "outputs": simulated.size,
        }
    return found


@dataclass
class Client:
    """What one client met.

    Attributes:
        requests: answered.
        wrong: answers that differ in a bit or in their shape, or errors.
        bins: number of single samples by the logarithm of their latency.
    """

    requests: int = 0
    wrong: int = 0
    bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(9 * _BINS_IN_A_DECADE, np.int64))

    def ask(self, answer: Callable[[NDArray[Any]], NDArray[Any]], case: Case, seed: int, until: float) -> None:
        """Ask until the time is over."""
        _, x, _, expected = case
        chance = np.random.default_rng(seed)
        while time.perf_counter() < until:
            for size, start in zip(chance.choice(_SIZES, 200, p=_SHARES), chance.integers(0, _ROWS, 200), strict=True):
                first = int(start) % (_ROWS - size + 1)
                began = time.perf_counter()
                try:
                    said: NDArray[Any] | None = answer(x[first : first + size])
                except Exception:  # counted as a wrong answer, whatever it is
                    said = None
                seconds = time.perf_counter() - began
                self.requests += 1
                self.wrong += said is None or not np.array_equal(said, expected[first : first + size])
                if size == 1:
                    place = int(_BINS_IN_A_DECADE * np.log10(max(seconds, _FASTEST) / _FASTEST))
                    self.bins[min(place, len(self.bins) - 1)] += 1


def serve(case: Case, clients: int, seconds: float) -> dict[str, Any]:
    """Let clients ask one session; say what they met."""
    answer = session_of(case[0])
    met = [Client() for _ in range(clients)]
    began = time.perf_counter()
    threads = [
        threading.Thread(target=one.ask, args=(answer, case, number, began + seconds)) for number, one in enumerate(met)
    ]
    for thread in threads:
        thread.start()
    memory: list[tuple[float, int]] = []
    while any(thread.is_alive() for thread in threads):
        memory.append((time.perf_counter() - began, _resident_bytes()))
        time.sleep(min(1.0, seconds / 50))
    took = time.perf_counter() - began
    bins = np.sum([one.bins for one in met], axis=0)
    early = [size for at, size in memory if 0.2 * seconds <= at < 0.4 * seconds]
    late = [size for at, size in memory if at >= 0.8 * seconds]
    return {
        "clients": clients,
        "seconds": took,
        "requests": sum(one.requests for one in met),
        "wrong": sum(one.wrong for one in met),
        "requests_in_a_second": sum(one.requests for one in met) / took,
        "p50_us": 1e6 * quantile(bins, 0.5),
        "p99_us": 1e6 * quantile(bins, 0.99),
        "growth_kib": float(np.median(late) - np.median(early)) / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def quantile(bins: NDArray[np.int64], share: float) -> float:
    """Return the upper bound of the bin below which so many latencies lie, in seconds."""
    place = int(np.searchsorted(np.cumsum(bins), share * bins.sum()))
    return float(_FASTEST * 10 ** ((place + 1) / _BINS_IN_A_DECADE))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Measure both networks, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all (default 10)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    is_bad = False
    for name in ("MLP", "convolutions"):
        case = compiled(name)
        at_levels = levels(case)
        for level, said in at_levels.items():
            steps = "" if said["steps"] is None else f", {said['steps']:.2g} steps of the output"
            print(
                f"{name}, {level}: {said['changed_by_threads_or_batch']} outputs changed by threads or batch; "
                f"{said['unlike_simulation']} of {said['outputs']} unlike the simulation's, by up to "
                f"{said['share_of_spread']:.2g} of their spread{steps}"
            )
            is_bad |= level in _FUSES and bool(said["changed_by_threads_or_batch"])
            is_bad |= name == _IN_INTEGERS and level in _FUSES and bool(said["unlike_simulation"])
        one = serve(case, 1, 60 * options.minutes / 2 / 6)
        many = serve(case, _CLIENTS, 60 * options.minutes / 2 * 5 / 6)
        ratios = {key: many[key] / one[key] for key in ("requests_in_a_second", "p50_us", "p99_us")}
        results[name] = {"levels": at_levels, "one": one, "many": many, "ratios": ratios}
        is_bad |= bool(one["wrong"] or many["wrong"])
        print(
            f"{name}: {one['requests'] + many['requests']:,} requests, {one['wrong'] + many['wrong']} wrong; {_CLIENTS} clients "
            f"get {ratios['requests_in_a_second']:.2f} times as many answers as one, p50 {ratios['p50_us']:.1f} and p99 "
            f"{ratios['p99_us']:.1f} times one's; memory grew by {many['growth_kib']:.0f} KiB from the second to the last fifth"
        )
        write_results(options.out, results)
    if is_bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
