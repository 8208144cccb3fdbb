"""Small models of the operators of compiled files, by whose times the costs of a profile are found.

A probe does known amounts of one or two kinds of work, in the form in which files hold it (``kancompile.targets.onnx``), in
several sizes, so that what every call costs whatever its size tells itself apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, parser

Arrays = Mapping[str, NDArray[Any]]

BESIDE = "beside "
"""Begins the names of work that is no cost of a profile."""
CALL = "call"
"""The cost of what any call takes, of probes that are called as files are."""
_TYPES = {"float32": "float", "uint8": "uint8", "int8": "int8", "int32": "int32", "int64": "int64"}
_INPUTS, _OUTPUTS, _FUNCTIONS, _ROWS = 784, 64, 9, 64
_BATCHES = (1, 16, 128)
_WORDS = 256
_VALUES = (1 << 16, 1 << 18)
"""Of float layers: the larger ones leave the second-level cache."""
_BREAKPOINTS = 16
_CELLS = 5000
_COLUMNS = 64 * _FUNCTIONS
_UNARY = ("Gelu", "Erf", "Log", "Sin", "Cos", "Tan", "Acos", "Asin", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh")


@dataclass(frozen=True)
class Probe:
    """A model, what it reads, and how much work it does.

    Attributes:
        section: of the profile.
        counts: units of work by the name of their cost, or of work that is done beside it (:data:`BESIDE`).
        model: bytes of the ONNX file.
        feeds: inputs by name.
        outputs: type and shape of every output by name.
    """

    section: str
    counts: Mapping[str, int]
    model: bytes
    feeds: Arrays
    outputs: Mapping[str, tuple[type[np.generic], tuple[int, ...]]]


def probes() -> Iterator[tuple[Probe, ...]]:
    """Yield the probes of every group of costs that are found together."""
    yield tuple(map(_node, (1, 4, 12)))
    yield tuple(map(_quantize, (1 << 12, 1 << 15, 1 << 17)))
    yield tuple(map(_gather, _BATCHES))
    yield tuple(map(_gather_paired, _BATCHES))
    yield tuple(map(_code, _BATCHES))
    yield tuple(_product(batch, columns) for batch in (1, 16, 256) for columns in (1024, 7056))
    yield tuple(map(_pick, (64, 256, 1024)))
    yield tuple(map(_word, (4, 32, 256)))
    yield tuple(map(_column, (4, 32, 256)))
    yield tuple(_gather_floats(rows, k) for rows in (1 << 13, 1 << 16) for k in (1, _FUNCTIONS, 32))
    yield tuple(map(_step, _VALUES))
    yield tuple(map(_copy, (1 << 12, 1 << 15)))
    yield tuple(map(_elementwise, _VALUES))
    yield tuple(map(_compare, (1 << 11, 1 << 14)))
    yield tuple(products(rows) for rows in (64, 512) for products in (_one_product, _two_products))
    yield tuple(_operation(n) for n in _VALUES) + tuple(_broadcast(n) for n in (1 << 13, 1 << 15))
    yield tuple(map(_index, _VALUES))
    yield tuple(_elements("pow", "y = Pow (x, c)", n, {"c": np.array(2, np.float32)}) for n in _VALUES)
    for operator in _UNARY:
        yield tuple(_elements(operator.lower(), f"y = {operator} (x)", n) for n in _VALUES)


def _probe(
    section: str,
    counts: Mapping[str, int],
    nodes: str,
    feeds: Arrays,
    constants: Arrays,
    **outputs: NDArray[Any],
) -> Probe:
    """Make a probe of nodes in ONNX's text; outputs are given by arrays of their type and shape."""
    inputs, results = (
        ", ".join(f"{_TYPES[str(a.dtype)]}[{','.join(map(str, a.shape))}] {name}" for name, a in arrays.items())
        for arrays in (feeds, outputs)
    )
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> probe ({inputs}) => ({results}) {{ {nodes} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.checker.check_model(model)
    shapes = {name: (array.dtype.type, array.shape) for name, array in outputs.items()}
    return Probe(section, counts, model.SerializeToString(), feeds, shapes)


def _bytes(*shape: int, below: int = 256) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, below, shape).astype(np.uint8)


def _floats(*shape: int) -> NDArray[np.float32]:
    """Draw from 0.1 ... 0.9, where all functions are defined but acosh."""
    return np.random.default_rng(0).uniform(0.1, 0.9, shape).astype(np.float32)


def _node(layers: int) -> Probe:
    """Chain small layers as files hold them, called as users call files: six nodes each, of which the runtime fuses some."""
    width, functions, lines = 12, _FUNCTIONS, ["v0 = QuantizeLinear (x, s, z)"]
    for number in range(layers):
        after = "y" if number + 1 == layers else f"v{number + 1}"
        lines += [
            f"r{number} = Cast <to = 6> (v{number})",
            f"t{number} = Gather <axis = 0> (table, r{number})",
            f"f{number} = Reshape (t{number}, flat)",
            f"d{number} = DequantizeLinear (f{number}, s, z)",
            f"w{number} = DequantizeLinear (weight, s, zero)",
            f"b{number} = DequantizeLinear (bias, ss)",
            f"g{number} = Gemm (d{number}, w{number}, b{number})",
            f"{after} = QuantizeLinear (g{number}, s, z)",
        ]
    constants: Arrays = {
        "s": np.array(0.0078125, np.float32),
        "ss": np.array(0.0078125**2, np.float32),
        "z": np.array(0, np.uint8),
        "zero": np.array(0, np.int8),
        "table": _bytes(256, functions),
        "flat": np.array([-1, width * functions], np.int64),
        "weight": _bytes(width * functions, width).view(np.int8),
        "bias": np.zeros(width, np.int32),
    }
    counts = {"node": 6 * layers, CALL: 1}
    return _probe(
        "look_up", counts, "\n".join(lines), {"x": _floats(1, width)}, constants, y=np.empty((1, width), np.uint8)
    )


def _quantize(values: int) -> Probe:
    constants: Arrays = {"s": np.array(0.01, np.float32), "z": np.array(3, np.uint8)}
    x = _floats(values)
    return _probe(
        "look_up", {"quantize": values}, "y = QuantizeLinear (x, s, z)", {"x": x}, constants, y=x.astype(np.uint8)
    )


def _gather(batch: int) -> Probe:
    nodes = "r = Cast <to = 6> (x)\n y = Gather <axis = 0> (t, r)"
    x, constants = _bytes(batch, _INPUTS, below=_ROWS), {"t": _bytes(_ROWS, _FUNCTIONS)}
    y = np.empty((batch, _INPUTS, _FUNCTIONS), np.uint8)
    return _probe("look_up", {"gather": x.size}, nodes, {"x": x}, constants, y=y)


def _gather_paired(batch: int) -> Probe:
    size = 16
    join = np.zeros((size, size // 2), np.uint8)
    join[np.arange(0, size, 2), np.arange(size // 2)], join[np.arange(1, size, 2), np.arange(size // 2)] = _ROWS, 1
    constants: Arrays = {"shape": np.array([-1, size], np.int64), "join": join, "t": _bytes(_ROWS**2, 2 * _FUNCTIONS)}
    nodes = "f = Reshape (x, shape)\n p = MatMulInteger (f, join)\n y = Gather <axis = 0> (t, p)"
    x = _bytes(batch, _INPUTS, below=_ROWS)
    y = np.empty((x.size // size, size // 2, 2 * _FUNCTIONS), np.uint8)
    return _probe("look_up", {"gather_paired": x.size}, nodes, {"x": x}, constants, y=y)


def _code(batch: int) -> Probe:
    nodes = "r = Cast <to = 6> (x)\n y = GatherElements <axis = 0> (t, r)"
    x = _bytes(batch, _INPUTS, below=_ROWS)
    return _probe("look_up", {"code": x.size}, nodes, {"x": x}, {"t": _bytes(_ROWS, _INPUTS)}, y=x)


def _product(batch: int, columns: int) -> Probe:
    weight = _bytes(columns, _OUTPUTS).view(np.int8)
    counts = {"product": batch * weight.size, "load": weight.size}
    y = np.empty((batch, _OUTPUTS), np.int32)
    return _probe("look_up", counts, "y = MatMulInteger (x, w)", {"x": _bytes(batch, columns)}, {"w": weight}, y=y)


def _pick(picked: int, batch: int = 64) -> Probe:
    own = np.random.default_rng(0).integers(0, _INPUTS, picked).astype(np.int32)
    y = np.empty((picked, batch), np.uint8)
    nodes = "y = Gather <axis = 0> (x, own)"
    return _probe("look_up", {"pick": picked}, nodes, {"x": _bytes(_INPUTS, batch)}, {"own": own}, y=y)


def _word(batch: int) -> Probe:
    rows = 32
    nodes = """
        s = MatMulInteger (rows, x)
        r = Reshape (s, words)
        w = GatherElements <axis = 1> (t, r)
        u = BitShift <direction = "RIGHT"> (w, bits)
        y = Cast <to = 2> (u)
    """
    constants: Arrays = {
        "rows": np.array([[rows, 1]], np.uint8),
        "words": np.array([_WORDS, -1], np.int64),
        "bits": np.array([0, 8, 16], np.uint32).reshape(3, 1, 1),
        "t": np.random.default_rng(0).integers(0, 1 << 24, (_WORDS, rows**2)).astype(np.uint32),
    }
    x = _bytes(2, _WORDS * batch, below=rows)
    y = np.empty((3, _WORDS, batch), np.uint8)
    return _probe("look_up", {"word": _WORDS * batch}, nodes, {"x": x}, constants, y=y)


def _column(batch: int) -> Probe:
    y = np.empty((batch, 3 * _WORDS), np.uint8)
    codes = _bytes(3 * _WORDS, batch)
    return _probe("look_up", {"column": y.size}, "y = Transpose <perm = [1, 0]> (x)", {"x": codes}, {}, y=y)


def _gather_floats(rows: int, k: int) -> Probe:
    x = np.random.default_rng(0).integers(0, _CELLS, rows).astype(np.int32)
    y = np.empty((rows, k), np.float32)
    nodes = "y = Gather <axis = 0> (t, x)"
    return _probe("functions", {"gather": rows, "gathered": y.size}, nodes, {"x": x}, {"t": _floats(_CELLS, k)}, y=y)


def _step(values: int) -> Probe:
    x = _floats(values)
    nodes = "p = Mul (x, t)\n y = Add (p, c)"
    return _probe("functions", {"step": values}, nodes, dict.fromkeys("xtc", x), {}, y=x)


def _copy(places: int) -> Probe:
    size = 16
    matrix = np.kron(np.eye(size), np.ones((1, _FUNCTIONS))).astype(np.float32)
    x, y = _floats(places // size, size), np.empty((places // size, size * _FUNCTIONS), np.float32)
    return _probe("functions", {"copy": y.size}, "y = MatMul (x, m)", {"x": x}, {"m": matrix}, y=y)


def _elementwise(values: int) -> Probe:
    x = _floats(values)
    nodes = "c = Clip (x, low, high)\n f = Floor (c)\n y = Sub (x, f)"
    ends: Arrays = {"low": np.array(-3, np.float32), "high": np.array(3, np.float32)}
    return _probe("functions", {"elementwise": 3 * values}, nodes, {"x": x}, ends, y=x)


def _compare(values: int) -> Probe:
    x, points = _floats(values // 64, 64, 1), np.sort(_floats(64, _BREAKPOINTS))
    nodes = "g = GreaterOrEqual (x, b)\n f = Cast <to = 1> (g)\n y = ReduceSum <keepdims = 0> (f, last)"
    constants: Arrays = {"b": points, "last": np.array([-1], np.int64)}
    return _probe("functions", {"compare": values * _BREAKPOINTS}, nodes, {"x": x}, constants, y=x[..., 0])


def _one_product(rows: int) -> Probe:
    x, y = _floats(rows, _COLUMNS), np.empty((rows, _OUTPUTS), np.float32)
    constants = {"w": _floats(_COLUMNS, _OUTPUTS), "c": _floats(_OUTPUTS)}
    counts = {f"{BESIDE}product": rows * _COLUMNS}
    return _probe("functions", counts, "y = Gemm (x, w, c)", {"x": x}, constants, y=y)


def _two_products(rows: int) -> Probe:
    """Multiply the columns of one function apart from the others."""
    one = _COLUMNS // _FUNCTIONS
    x, y = _floats(rows, _COLUMNS - one), np.empty((rows, _OUTPUTS), np.float32)
    weight = _floats(_COLUMNS, _OUTPUTS)
    constants = {"v": weight[:-one], "w": weight[-one:], "c": _floats(_OUTPUTS)}
    counts = {f"{BESIDE}product": rows * _COLUMNS, "apart": rows * _COLUMNS}
    nodes = "p = Gemm (a, v, c)\n q = MatMul (b, w)\n y = Add (p, q)"
    return _probe("functions", counts, nodes, {"a": x, "b": x[:, :one].copy()}, constants, y=y)


def _operation(values: int) -> Probe:
    x = _floats(values)
    return _probe("functions", {"operation": values}, "y = Add (a, b)", dict.fromkeys("ab", x), {}, y=x)


def _broadcast(runs: int) -> Probe:
    x = _floats(runs, _FUNCTIONS)
    nodes, feeds = "y = Mul (a, b)", {"a": x, "b": x[:, :1].copy()}
    return _probe("functions", {"operation": x.size, "run": runs}, nodes, feeds, {}, y=x)


def _index(values: int) -> Probe:
    x = np.random.default_rng(0).integers(0, values, values)
    nodes = "y = GatherND (t, i)"
    return _probe("functions", {"index": values}, nodes, {"t": _floats(values), "i": x[:, None]}, {}, y=_floats(values))


def _elements(cost: str, nodes: str, values: int, constants: Arrays | None = None) -> Probe:
    x = _floats(values) + np.float32(cost == "acosh")
    return _probe("functions", {cost: values}, nodes, {"x": x}, constants or {}, y=x)
