"""Write lookups whose row number several inputs share, in standard operators, with one column of the batch after another.

    index [b, n] -> Transpose -> Gather of all members -> MatMulInteger, L * first + second -> GatherElements [w, L^2]
                 -> BitShift [k, w, b] -> Cast -> Transpose

In that order all steps run along the batch. To pick the inputs takes a copy of ``b`` bytes each, where a product with a matrix
of zeros and ones took half the time of a whole file; a word reads one row of its own table, which stays in the first-level cache.
Measured on 784 inputs, 250 words of three functions, 256 samples: 255 us with the product behind it, against 865 us for the
same with a product in front and samples first, and 1,660 us for a file that looks up each input.

The tables of all combinations of rows are sums of the parts, by nodes on constants that ONNX Runtime folds when it loads the
file: 408 words of 32 rows for either of two inputs take 78 kB in the file and 1.6 MB in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kancompile.ir import LARGEST_PART, MOST_SHIFT
from kancompile.targets.onnx.folded_nodes import FoldedNodes
from kancompile.targets.onnx.translation import STAND_INS


def write_joint_tables(graph: ir.Graph) -> None:
    """Replace every stand-in of ``translation.expand_joint``, in place; uses of one table share what is made of it."""
    known: dict[tuple[ir.Value, ...], _JointLookup] = {}
    for node in [node for node in graph if node.domain == STAND_INS]:
        index, members, *parts = (value for value in node.inputs if value is not None)
        nodes = known.setdefault((members, *parts), _JointLookup(graph, f"joint{len(known)}"))
        before = len(nodes.nodes)
        columns = nodes.columns(index, _numbers(members), parts)
        nodes.put_for_columns(node, columns, before)
    graph.opset_imports.pop(STAND_INS, None)


def _numbers(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


class _JointLookup(FoldedNodes):
    tables: ir.Value | None = None

    def columns(self, index: ir.Value, members: NDArray[np.int64], stored: Sequence[ir.Value]) -> ir.Value:
        """Write one lookup and return its columns, uint8 ``[b, k * w]``.

        Args:
            index: row numbers.
            members: int64 ``[m, w]``.
            stored: the parts, or basis, mix, bias and shift that they are made of.
        """
        is_made = len(stored) > 1
        shape = (*_numbers(stored[1]).shape[:3], len(_numbers(stored[0]))) if is_made else _numbers(stored[0]).shape
        parts = None
        if self.tables is None:
            parts = self._made(*stored) if is_made else self.cast(stored[0], ir.DataType.FLOAT)
        rows = self._rows(index, members, shape[3])
        if parts is not None:
            self.tables = self._words(parts, shape)
        words = self.op("GatherElements", [self.tables, rows], {"axis": 1})
        return self.op("Transpose", [self._apart(words, shape[1], shape[2])], {"perm": [1, 0]})

    def _rows(self, index: ir.Value, members: NDArray[np.int64], levels: int) -> ir.Value:
        """Write the row numbers of words, int32 ``[w, b]``: a product of all members' numbers with powers of the rows."""
        count, words = members.shape
        powers = levels ** np.arange(count - 1, -1, -1)
        is_product = count > 1 and powers[0] < 256  # a product of bytes, with sums that no kernel saturates
        if is_product and index.dtype == ir.DataType.INT32:
            index = self.cast(index, ir.DataType.UINT8)
        by_input = self.op("Transpose", [index], {"perm": [1, 0]})
        numbers = self.op(
            "Gather", [by_input, self.stored("members", members.astype(np.int32).reshape(-1))], {"axis": 0}
        )
        if count > 1:
            numbers = self.op("Reshape", [numbers, self.shape(count, -1)])
        if is_product:
            numbers = self.op("MatMulInteger", [self.stored("rows", powers.astype(np.uint8)[None]), numbers])
        elif index.dtype != ir.DataType.INT32:
            numbers = self.cast(numbers, ir.DataType.INT32)
        if count > 1 and not is_product:
            numbers = self.op("Mul", [numbers, self.stored("rows", powers.astype(np.int32)[:, None])])
            numbers = self.op("ReduceSum", [numbers, self.stored("first", np.array([0], np.int64))], {"keepdims": 0})
        return numbers if count == 1 else self.op("Reshape", [numbers, self.shape(words, -1)])

    def _made(self, basis: ir.Value, mix: ir.Value, bias: ir.Value, shift: ir.Value) -> ir.Value:
        """Write the parts that follow from integers, float32 ``[m, k, w, levels]`` (see ``ir.basis_parts``)."""
        *columns, functions = _numbers(mix).shape
        by_function = self.op("Transpose", [self.op("Reshape", [mix, self.shape(-1, functions)])], {"perm": [1, 0]})
        # in float32, which is exact: MatMulInteger saturates pairs of products on processors without VNNI
        numbers = [self.cast(value, ir.DataType.FLOAT) for value in (basis, by_function)]
        offset = self.cast(self.op("Reshape", [bias, self.shape(-1)]), ir.DataType.FLOAT)
        total = self.op("Add", [self.op("MatMul", numbers), offset])
        powers = self.stored("powers", np.ldexp(np.float32(1), -np.arange(MOST_SHIFT + 1)).astype(np.float32))
        number = self.cast(self.op("Reshape", [shift, self.shape(-1)]), ir.DataType.INT32)
        real = self.op("Mul", [total, self.op("Gather", [powers, number])])
        ends = [self.stored(name, np.array(end, np.float32)) for name, end in (("least", 0), ("most", LARGEST_PART))]
        codes = self.op("Clip", [self.op("Floor", [real]), *ends])
        return self.op("Reshape", [self.op("Transpose", [codes], {"perm": [1, 0]}), self.shape(*columns, -1)])

    def _words(self, parts: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Write the packed codes of all combinations of rows, uint32 ``[w, levels^m]``, of parts in float32."""
        members, planes, words, levels = shape
        found = self._member(parts, 0)
        for member in range(1, members):
            left = self.op("Reshape", [found, self.shape(planes, words, -1, 1)])
            right = self.op("Reshape", [self._member(parts, member), self.shape(planes, words, 1, levels)])
            both = self.op("Add", [left, right])
            found = self.op("Reshape", [both, self.shape(planes, words, levels ** (member + 1))])
        # a float32 holds three bytes exactly
        places = np.float32(256) ** np.arange(planes, dtype=np.float32)
        scaled = self.op("Mul", [found, self.stored("places", places.reshape(planes, 1, 1))])
        packed = self.op("ReduceSum", [scaled, self.stored("first", np.array([0], np.int64))], {"keepdims": 0})
        return self.cast(packed, ir.DataType.UINT32)

    def _member(self, parts: ir.Value, member: int) -> ir.Value:
        return self.op("Gather", [parts, self.stored(f"number{member}", np.array(member, np.int64))], {"axis": 0})

    def _apart(self, word: ir.Value, planes: int, words: int) -> ir.Value:
        """Write the bytes of words ``[w, b]`` one plane below the other, uint8 ``[k * w, b]``."""
        if planes == 1:
            return self.cast(word, ir.DataType.UINT8)
        bits = self.stored("bits", 8 * np.arange(planes, dtype=np.uint32).reshape(planes, 1, 1))
        shifted = self.op("BitShift", [word, bits], {"direction": "RIGHT"})
        return self.op("Reshape", [self.cast(shifted, ir.DataType.UINT8), self.shape(planes * words, -1)])
