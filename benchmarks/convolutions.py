"""Time compiled convolutional KANs beside their float export in the same runtime, in turns, in one run.

Run from the root of the repository::

    python -m benchmarks.convolutions [--checkpoint cifar10_kagn.safetensors --data cifar10.npz]

Networks of 3-16-32-64-64 channels, kernels of 3x3, images of 32x32: KAGN of degree 3, and cubic B-splines on a grid of 5. Speed
does not depend on the weights; without a checkpoint they are random, and so are the images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kancompile
from benchmarks.results_file import write_results
from examples.train_cifar10 import load_split
from examples.zoo import kagn_conv, spline_conv
from kancompile.progress import quiet, say
from kancompile.runtimes.machine import describe_machine
from kancompile.runtimes.session import RuntimeModel
from kancompile.validation.benchmark import COMPILED, FLOAT_EXPORT, Benchmark, Timing, take_turns
from kancompile.validation.float_export import export_float

CALIBRATION_SAMPLES = 64
TARGETS = {"KAGN": 3.0, "B-splines": 10.0}


def normalised(model: nn.Module, x: Tensor) -> nn.Module:
    """Let the batch norms of an untrained model see data, so that its activations have the sizes of a trained one."""
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(x)
    return model.eval()


def measure(name: str, model: nn.Module, x: Tensor, arguments: argparse.Namespace) -> tuple[Benchmark, bytes]:
    """Compile one network and time it."""
    say(f"{name}: compiling ...")
    with quiet():
        compiled = kancompile.compile(model, x[:CALIBRATION_SAMPLES]).model_bytes
        files = {COMPILED: compiled, FLOAT_EXPORT: export_float(model, tuple(x.shape[1:]))}
    timings: list[Timing] = []
    unavailable: dict[str, str] = {}
    machine = describe_machine()
    for threads in arguments.threads:
        sessions = {candidate: RuntimeModel(content, threads) for candidate, content in files.items()}
        for batch in arguments.batch_sizes:
            say(f"{name}: timing batch {batch}, {threads or 'all'} threads ...")
            images = x[:batch].numpy()
            runnable = {candidate: _call(session, images) for candidate, session in sessions.items()}
            timings += take_turns(runnable, batch, threads, arguments.repeats, 3, unavailable)
    return Benchmark(name, tuple(timings), unavailable, machine), compiled


def _call(session: RuntimeModel, x: np.ndarray[Any, Any]) -> Callable[[], Any]:
    return lambda: session.run(x)


def main() -> None:
    """Measure both networks and say which targets were met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="weights of the KAGN network (.safetensors)")
    parser.add_argument("--data", type=Path, help="cifar10.npz, for its images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 128], help="default: %(default)s")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="0: one per core (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=40, help="blocks of a candidate (default: %(default)s)")
    parser.add_argument("--networks", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/convolutions.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    count = max(CALIBRATION_SAMPLES, *arguments.batch_sizes)
    if arguments.data is None:
        x = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    else:
        x = load_split(arguments.data, "test")[0][:count]
    results: dict[str, Any] = {}
    for name in arguments.networks:
        if name == "KAGN" and arguments.checkpoint is not None:
            model = kagn_conv.build()
            model.load_state_dict(load_file(arguments.checkpoint))
            model.eval()
        else:
            model = normalised((kagn_conv if name == "KAGN" else spline_conv).build(), x[:CALIBRATION_SAMPLES])
        timed, compiled = measure(name, model, x, arguments)
        results[name] = timed.to_dict() | {"bytes": len(compiled)}
        write_results(arguments.out, results)
        print(timed.table(), flush=True)
        if 32 in arguments.batch_sizes and 1 in arguments.threads:
            ratio = timed.ratio(FLOAT_EXPORT, 32, 1)
            print(f"  batch 32, one thread: {ratio:.2f} times as fast as its float export, target {TARGETS[name]:g}\n")


if __name__ == "__main__":
    main()
