"""Small integer programs as files, and inputs that could tell two runtimes apart."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import fx

from kancompile.ir import Program, TableExpansion
from tests.convolution_programs import integer_convolutions, square
from tests.programs import integer_program


def layer_used_again() -> Program:
    """Use a layer of many rows twice, on the input of the network and on what the first use gives."""
    program = integer_program((16, 16), levels=(2048,))
    (layer,) = program.layers()
    table = program.node(layer.expansions[0], TableExpansion)
    program = program.replace_modules({layer.expansions[0]: table.replace(input="float")})
    graph = fx.Graph()
    end = graph.graph_copy(program.graph_module.graph, {})
    graph.output(graph.call_module(layer.contraction, (graph.call_module(layer.expansions[0], (end,)),)))
    return program.with_graph(graph, program.graph_module)


PROGRAMS = {
    "MLP W8, row numbers handed over": lambda: integer_program((24, 16, 10), k=9),
    "MLP W8, values handed over": lambda: integer_program((24, 16, 10), levels=(17, 2048), k=9),
    "MLP W4": lambda: integer_program((24, 16, 10), levels=(256, 512), k=9, weight_bits=4),
    "MLP W8, pairs of inputs": lambda: integer_program((512, 16, 10), levels=(200, 256)),
    "MLP W3, scale groups and several tables": lambda: integer_program(
        (24, 10), (64,), weight_bits=3, groups=2, tables=3
    ),
    "a layer used again": layer_used_again,
    "conv W8": lambda: integer_convolutions(
        (3, 8, 8), [square(6, 3, padding=1), square(5, 3, stride=2)], zero_point=90
    ),
    "conv W4": lambda: integer_convolutions(
        (4, 8, 8), [square(8, 3, padding=1, groups=2), square(5, 3)], weight_bits=4
    ),
}


def probing_inputs(program: Program, n: int, seed: int = 3) -> NDArray[np.float32]:
    """Draw inputs: a third exact ties between two table rows, a third far outside the table, the rest within it."""
    rng = np.random.default_rng(seed)
    index = next(program.module(layer.expansions[0]).index for layer in program.layers())
    x = rng.uniform(index.low, index.high, (n, *program.input_shape)).astype(np.float32)
    third = n // 3
    step = np.float32(index.scale)
    x[:third] = (np.rint(x[:third] / step) + np.float32(0.5)) * step
    x[third : 2 * third] *= 4
    x[third, ...] = np.float32(3e38)
    x[third + 1, ...] = np.float32(-3e38)
    return x


def onnxruntime_outputs(model: bytes, x: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": part})[0] for part in np.array_split(x, max(1, len(x) // 500))])


def simulated_outputs(program: Program, x: NDArray[np.float32]) -> NDArray[np.float32]:
    return program(torch.from_numpy(x)).numpy()
