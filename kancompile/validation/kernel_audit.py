"""Read which kernel ONNX Runtime really gave each layer of a file.

A QDQ graph only *allows* integer kernels. Whether they are used is decided when a session is created, so the audit
creates one, takes the optimized graph that the session would run and looks for the node that consumes each weight.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from kancompile.errors import KanCompileError, first_line, foreign
from kancompile.ir import ModelWithExternalData
from kancompile.runtimes import ModelFile, name_of, open_session, read_model
from kancompile.targets import PAIR_INDEX
from kancompile.validation.text_table import Printed

INTEGER_KERNELS = frozenset(
    {"QGemm", "QLinearMatMul", "QLinearConv", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"}
)
_PORTABLE_OPSET = 21
FLOAT_KERNELS = frozenset({"Gemm", "MatMul", "Conv", "FusedGemm", "FusedMatMul", "FusedConv", "MatMulNBits"})


@dataclass(frozen=True)
class KernelRow:
    """One contraction of the optimized graph: node name, operator, and whether it computes in integers."""

    node: str
    operator: str
    is_integer: bool


@dataclass(frozen=True, repr=False)
class KernelAudit(Printed):
    """What a session runs.

    Attributes:
        rows: every contraction in order of evaluation.
        dequantized_constants: DequantizeLinear nodes that read a constant at every call.
        operators: count of each operator in the optimized graph.
        runtime: name and version of the runtime.
    """

    rows: tuple[KernelRow, ...]
    dequantized_constants: tuple[str, ...]
    operators: dict[str, int]
    runtime: str

    def __repr__(self) -> str:
        return self.table()

    @property
    def problems(self) -> list[str]:
        """Contractions in float and constants dequantized at run time, in words."""
        found = [f"{row.node}: runs as float {row.operator}" for row in self.rows if not row.is_integer]
        return found + [f"{name}: constant dequantized at every call" for name in self.dequantized_constants]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"problems": self.problems}

    def table(self) -> str:
        """Print the rows for people."""
        lines = [f"kernels in {self.runtime}"]
        width = max((len(row.node) for row in self.rows), default=0)
        lines += [f"  {row.node:<{width}}  {row.operator}{'' if row.is_integer else '  (float)'}" for row in self.rows]
        counted = ", ".join(f"{count} {name}" for name, count in sorted(self.operators.items()))
        lines.append(f"  all operators: {counted}")
        lines.extend(f"  problem: {problem}" for problem in self.problems)
        return "\n".join(lines)


def optimized_graph(model: ModelFile) -> onnx.GraphProto:
    """Return the graph that an ONNX Runtime CPU session runs for a file."""
    content = read_model(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ONNX")
        if isinstance(content, ModelWithExternalData):
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "large.data")
        try:
            open_session(content, options)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise KanCompileError(_why_not_loaded(content, name_of(model), error)) from error
        return onnx.load(path, load_external_data=False).graph


def _why_not_loaded(content: bytes, who: str, error: Exception) -> str:
    with foreign(who, "give a complete ONNX file"):
        opset = next((entry.version for entry in onnx.load_from_string(content).opset_import if not entry.domain), 0)
    text = f"{who}: onnxruntime {onnxruntime.__version__} cannot load the file (opset {opset}): {first_line(error)}"
    if opset > _PORTABLE_OPSET:
        return f"{text}; int2 tensors need onnxruntime 1.24 or newer, storage 'smallest' loads from 1.20 on"
    return f"{text}; the file needs onnxruntime 1.20 or newer"


def audit_kernels(model: ModelFile) -> KernelAudit:
    """Audit an ONNX or ORT-format file in the installed ONNX Runtime."""
    graph = optimized_graph(model)
    with foreign(name_of(model), "give a complete ONNX file"):  # names that are no UTF-8 are read as bytes
        return _audited(graph)


def _audited(graph: onnx.GraphProto) -> KernelAudit:
    constants = {initializer.name for initializer in graph.initializer}
    rows, dequantized = [], []
    operators: dict[str, int] = {}
    for node in graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
        if node.name.startswith(PAIR_INDEX):
            continue
        if node.op_type in INTEGER_KERNELS | FLOAT_KERNELS:
            rows.append(KernelRow(node.name, node.op_type, node.op_type in INTEGER_KERNELS))
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            dequantized.append(node.name)
    return KernelAudit(tuple(rows), tuple(dequantized), operators, f"onnxruntime {onnxruntime.__version__}")
