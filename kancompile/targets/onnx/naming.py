"""Names that a person reads in a viewer: the user's modules, what a node is for, where the source stands.

    layers.0/lookup/Gather           looks the functions of a layer up (``lookup_1`` where it reads several expansions)
    layers.0/Gemm                    the layer's product; its doc string says ``file:line`` of the user's source
    layers.0.weight, .bias, .scale   what the product reads; layers.0.lookup.table what the lookup reads
    layers.0+layers.1.plane4         bits of the codes of both layers, which nodes without names widen when the file is loaded
    c0, c1, ...  v0, v1, ...         scalars and shapes, and what nodes hand on

What has no name of the user's is numbered: every name stands in a file once for each of its readers, and the names of nodes
for all values made small files up to 31 % larger. The exporter's own notes are dropped.
With short metadata only products keep their names.
"""

from __future__ import annotations

import ast
import itertools
import string
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from kancompile.ir import IntegerContraction, Program
from kancompile.targets.onnx.narrow_weights import SHARED_BY

# the product that joins row numbers in pairs is no layer
PAIR_INDEX = "pair-index"
_PRODUCTS = ("Gemm", "MatMul", "Conv")
_DIGITS = string.ascii_letters


def name_nodes(graph: ir.Graph, program: Program) -> set[ir.Node]:
    """Name inputs, outputs, the batch dimension and nodes; drop what the exporter noted.

    Returns:
        the nodes that have their names now, not yet told apart by numbers.
    """
    layer_of = {layer.contraction: layer.name for layer in program.layers()}
    owner_of = _readable(program, "/")
    interface = program.interface
    for value, entry in zip(graph.inputs, interface.inputs, strict=True):
        value.name = entry.name
    for value, name in zip(graph.outputs, interface.outputs, strict=True):
        value.name = name
    graph.name = "kancompile"
    symbols: dict[str, str] = {}
    for value, entry in zip(graph.inputs, interface.inputs, strict=True):
        for dim, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                symbols.setdefault(str(size.value), entry.dynamic.get(dim, "batch"))
    values = list(graph.inputs) + [value for node in graph for value in node.outputs]
    for value in values:
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = ir.Shape([_rename(dimension, symbols) for dimension in value.shape])
    for initializer in graph.initializers.values():
        initializer.metadata_props.clear()
        initializer.doc_string = None
    graph.metadata_props.clear()
    for node in graph:
        owner, source = _owner(node, owner_of), None
        if node.op_type in _PRODUCTS:
            owner = _layer_of(node, layer_of) or owner
            source = program.sources.get(owner)
        if node.op_type == "MatMulInteger":
            owner = PAIR_INDEX
        node.metadata_props.clear()
        node.doc_string = source
        node.name = f"{owner}/{node.op_type}" if owner else node.op_type
    return set(graph)


def name_values(model: ir.Model, program: Program, named: set[ir.Node]) -> None:
    """Name values and constants, once nothing is looked for by the exporter's names.

    Args:
        model: the file's.
        program: what it computes.
        named: nodes that have their names; others, which widen weights and tables when the file is loaded, have none.
    """
    graph, readable = model.graph, _readable(program, ".")
    # one product has one weight and one scale
    single = {
        str(node.target)
        for node, contraction in program.nodes(IntegerContraction)
        if contraction.weight_names == ["weight_0"]
    }
    fixed = {str(value.name) for value in (*graph.inputs, *graph.outputs)}
    taken = set(fixed)

    def unique(name: str) -> str:
        count, found = 0, name
        while found in taken:
            count, found = count + 1, f"{name}_{count + 1}"
        taken.add(found)
        return found

    others = []
    for value in list(graph.initializers.values()):
        target, dot, rest = str(value.name).partition(".")
        sharing = target.split(SHARED_BY)
        if dot and len(sharing) > 1 and sharing[0] in readable:
            value.name = unique(f"{SHARED_BY.join(readable.get(one, one) for one in sharing)}.{rest}")
            continue
        if not dot or target not in readable:
            others.append(value)
            continue
        if target in single:
            rest = rest.replace("weight_0", "weight").replace("scale_0", "scale")
        value.name = unique(f"{readable[target]}.{rest}")
    for number, value in enumerate(others):
        value.name = unique(f"c{number}")
    results = [value for node in graph for value in node.outputs if value.name not in fixed]
    for number, value in enumerate(results):
        target, _, rest = str(value.name).partition(".")
        if rest.endswith(".codes") and target in readable:  # weights as the product reads them
            rest = rest.removesuffix(".codes")
            value.name = unique(f"{readable[target]}.{'weight' if target in single else rest}")
        else:
            value.name = unique(f"v{number}")
    NameFixPass()(model)
    for node in graph:
        if node not in named:
            node.name = None


def shorten_names(graph: ir.Graph) -> None:
    """Leave only products named, as the kernel audit calls them, and number all values and constants, in place."""
    ends = {*graph.inputs, *graph.outputs}
    values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    taken = {str(value.name) for value in ends}
    numbers = itertools.count()
    for value in values:
        if value not in ends:
            value.name = next(name for number in numbers if (name := _digits(number)) not in taken)
    for node in graph:
        node.doc_string = None
        if node.op_type not in _PRODUCTS:
            node.name = None


def _digits(number: int) -> str:
    return (
        _DIGITS[number] if number < len(_DIGITS) else _digits(number // len(_DIGITS)) + _DIGITS[number % len(_DIGITS)]
    )


def _readable(program: Program, join: str) -> dict[str, str]:
    """Map the targets of a program's modules to the names that files show: the layer's, ``lookup`` joined to it."""
    found: dict[str, str] = {}
    for layer in program.layers():
        found[layer.contraction] = layer.name
        own = [target for target in layer.expansions if target not in found]
        for number, target in enumerate(own):
            found[target] = f"{layer.name}{join}lookup" + (f"_{number}" if len(own) > 1 else "")
    return found


def _rename(dimension: int | ir.SymbolicDim, symbols: dict[str, str]) -> int | str | None:
    if isinstance(dimension, int):
        return dimension
    if dimension.value is None:
        return None
    return symbols.setdefault(str(dimension.value), "batch" if not symbols else f"batch_{len(symbols)}")


def _owner(node: ir.Node, owner_of: Mapping[str, str]) -> str:
    """Find the module of a layer from which the exporter translated a node; empty for all other nodes."""
    return next((owner_of[scope] for scope in reversed(_scopes(node)) if scope in owner_of), "")


def _layer_of(node: ir.Node, layer_of: Mapping[str, str]) -> str:
    """Find the layer of a contraction that reads a layer's weight, through its DequantizeLinear; empty for other nodes.

    The exporter merges equal initializers, so that the weight may carry the name of another layer. Whose product it is then
    says the module from which the exporter translated it.
    """
    for source in node.inputs:
        producer = source.producer() if source is not None else None
        value = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else source
        target = (value.name or "").rpartition(".")[0] if value is not None else ""
        if target in layer_of:
            return next((layer_of[scope] for scope in _scopes(node) if scope in layer_of), layer_of[target])
    return ""


def _scopes(node: ir.Node) -> list[str]:
    """List the modules from which the exporter translated a node, as it noted them."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes
