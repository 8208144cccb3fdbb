"""Fill one cell: compile or train on, and measure the file in ONNX Runtime on all test samples."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

import kancompile
from benchmarks.board.cells import WITH, Cell
from benchmarks.board.networks import Network
from examples.qat_mnist import HELD_OUT, train
from kancompile import qat
from kancompile.ir import joined
from kancompile.progress import quiet
from kancompile.runtimes import RuntimeModel, describe_machine
from kancompile.validation.benchmark import COMPILED, FLOAT_EXPORT, take_turns
from kancompile.validation.error_measures import ErrorMeasure, plain_number
from kancompile.validation.paired_decisions import PairedDecisions

PLAIN = "int8 network of ordinary layers"
BATCHES = (1, 32)
EPOCHS = 3
_RATES = {"kagn": (0.005,)}
_ANY_RATES = (0.01, 0.02)
"""Rates of which the one with less loss on samples that are held out is kept: neither is the better one of all cells."""
_REPEATS = 8


def measure(cell: Cell, network: Network) -> dict[str, Any]:
    """Fill a cell.

    Returns:
        plain data: the cell, accuracies in percent, points lost with their interval (McNemar), the error of the outputs,
        outputs that differ from the simulation, bytes, how many times as fast as the float export and as slow as a network of
        ordinary layers the file is by batch, seconds, and the machine.
    """
    start = time.perf_counter()
    compiled = _trained_on(cell, network) if cell.with_training else _compiled(cell, network)
    seconds = time.perf_counter() - start
    runtime = RuntimeModel(compiled.model_bytes)
    outputs = network.outputs(lambda part: joined(runtime(part)))
    error = ErrorMeasure()
    error.add(network.float_outputs, outputs, cell.network)
    right, float_right = (found.argmax(1) == network.labels for found in (outputs, network.float_outputs))
    paired = PairedDecisions.of(float_right, right)
    return {
        "cell": asdict(cell),
        "float_accuracy": 100 * float(float_right.double().mean()),
        "accuracy": 100 * float(right.double().mean()),
        "lost": paired.loss,
        "interval": list(paired.interval),
        "p_value": paired.p_value,
        "sqnr_db": plain_number(error.sqnr_db),
        "differing": int((outputs != network.outputs(compiled.program)).sum()),
        "outputs": outputs.numel(),
        "bytes": len(compiled.model_bytes),
        "float_bytes": len(network.float_file),
        **_times(network, compiled.model_bytes),
        "seconds": round(seconds, 1),
        "machine": describe_machine(),
    }


def recipe_of(cell: Cell) -> dict[str, Any]:
    """Write the recipe of a cell: what a method does is measured, not what the error gate and joint lookups make of it."""
    recipe: dict[str, Any] = {"levels": 1 << cell.index_bits, "lookup": "each", "goal_sqnr": None}
    if cell.with_training:
        return recipe | {"weight_bits": cell.weight_bits}
    if cell.method == "hawq-v2":
        return recipe | {"method": cell.method, "bits_average": float(cell.weight_bits)}
    return recipe | {"method": cell.method, "weight_bits": cell.weight_bits}


def _compiled(cell: Cell, network: Network) -> kancompile.CompiledModel:
    chosen = torch.randperm(len(network.x), generator=torch.Generator().manual_seed(cell.seed))[: cell.samples]
    with quiet():
        return kancompile.compile(network.model, network.x[chosen], recipe=recipe_of(cell), seed=cell.seed)


def _trained_on(cell: Cell, network: Network) -> kancompile.CompiledModel:
    weights, index = WITH[cell.method]
    with quiet():
        compiled = _compiled(cell, network)
    found: list[tuple[float, qat.TrainedModel]] = []
    for rate in _RATES.get(cell.network.rpartition("_")[2], _ANY_RATES):
        with quiet():
            module = qat.prepare_compiled(compiled, qat.Training(weights, index))
        train(module, network.model, network.x, network.y, EPOCHS, rate=rate, seed=cell.seed)
        found.append((qat.held_out_loss(module, network.x[-HELD_OUT:], network.y[-HELD_OUT:]), module))
    return qat.convert(min(found, key=lambda one: one[0])[1])


def _times(network: Network, content: bytes) -> dict[str, dict[str, float]]:
    files = {COMPILED: content, FLOAT_EXPORT: network.float_file, PLAIN: network.plain_file}
    sessions = {name: RuntimeModel(file) for name, file in files.items()}
    faster, slower = {}, {}
    for batch in BATCHES:
        x = network.test[:batch].contiguous().numpy()
        calls = {name: (lambda session=session, x=x: session.run(x)) for name, session in sessions.items()}
        found = {timing.candidate: timing.median for timing in take_turns(calls, batch, 1, _REPEATS, 2, {})}
        faster[str(batch)] = round(found[FLOAT_EXPORT] / found[COMPILED], 2)
        slower[str(batch)] = round(found[COMPILED] / found[PLAIN], 2)
    return {"times_as_fast_as_float": faster, "times_as_slow_as_plain": slower}
