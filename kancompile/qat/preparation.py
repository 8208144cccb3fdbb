"""Begin quantization-aware training at the post-training result."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kancompile.compiler import CompiledModel, compile
from kancompile.errors import KanCompileError
from kancompile.ir import (
    Expansion,
    IndexQuantizer,
    IntegerContraction,
    JointTable,
    Layer,
    Program,
    TableExpansion,
    Values,
    contraction_in_front,
    nodes_of,
)
from kancompile.passes import Lowering, code_range, layer_limits
from kancompile.progress import quiet
from kancompile.qat.choices import Training, read_training
from kancompile.qat.contraction import TrainedContraction, twin_of
from kancompile.qat.methods import INDEX_METHODS, WEIGHT_METHODS, DoReFaIndex, IndexMethod
from kancompile.qat.table import TrainedJoint, TrainedTable, constant_functions
from kancompile.qat.training_module import TrainedModel
from kancompile.recipe import CPU_PRESETS, TERNARY, Recipe

_MEASURED = 512
_BIAS_UNIT = 0.125  # of an output's standard deviation


def prepare(
    model: Any,
    calibration: Any,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    training: Training | Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
    dynamic: Any = None,
) -> TrainedModel:
    """Compile a model and return the result as a module to train further in your own loop.

    The module computes what the file computes, table codes, int32 biases and clips included; gradients go straight through
    rounding. :func:`kancompile.qat.convert` writes the file; untrained that of :func:`kancompile.compile`, byte for byte.

    Args:
        model, calibration, recipe, seed, device, trust, dynamic: as for :func:`kancompile.compile`. The recipe says bits
            (``weight_bits``), rows (``levels``) and how training's start is rounded.
        training: what is trained, a :class:`Training` or a mapping of its fields.

    Raises:
        KanCompileError: as :func:`kancompile.compile`; choices that do not exist; no layer computes in integers; an index is to
            be trained and no table has one that can be.
    """
    chosen = read_training(training)
    options = {"recipe": recipe, "seed": seed, "device": device, "trust": trust, "dynamic": dynamic}
    return prepare_compiled(compile(model, calibration, **options), chosen)


def prepare_compiled(compiled: CompiledModel, training: Training | Mapping[str, Any] | None = None) -> TrainedModel:
    """Return a compiled model as a module to train further, as :func:`prepare` does.

    Args:
        compiled: what :func:`kancompile.compile` returned.
        training: what is trained.

    Raises:
        KanCompileError: as :func:`prepare`.
    """
    chosen = read_training(training)
    with quiet():
        return _Preparation(compiled, chosen, int(compiled.manifest["seed"])).module()


class _Preparation:
    """Builds the twins of one compiled model."""

    def __init__(self, compiled: CompiledModel, training: Training, seed: int) -> None:
        self.compiled, self.training, self.seed = compiled, training, seed
        # modules of the twin's graph are moved and trained; those of the compiled program are values
        self.program: Program = compiled.lowered
        self.notes: list[str] = []
        self.learns_index = False
        self.indices: dict[tuple[str, IndexQuantizer], IndexMethod] = {}

    def module(self) -> TrainedModel:
        program = self.program
        integer = {str(node.target): module for node, module in program.nodes(IntegerContraction)}
        if not integer:
            kinds = sorted({layer.name for layer in program.layers()})
            raise KanCompileError(
                f"prepare: found no layer that computes in integers ({', '.join(kinds) or 'no KAN layer at all'}), expected one "
                "at least; quantization-aware training needs precision = 'int8' and lowering = 'table'"
            )
        self.notes += [
            f"layer {layer.name!r}: computes in float or 16 bits, not trained"
            for layer in program.layers()
            if layer.contraction not in integer
        ]
        functions = self._functions()
        twins: dict[str, nn.Module] = {}
        for node, table in program.nodes(TableExpansion):
            name = str(node.target)
            if name not in twins:
                twins[name] = self._table(name, table, functions.get(name))
        if self.training.index is not None and not self.learns_index:
            raise KanCompileError(
                f"training: found index {self.training.index!r}, but no table whose index can be trained; "
                f"{'; '.join(self.notes) or 'none has 256 rows at most'}"
            )
        units, live = self._measured([layer for layer in program.layers() if layer.contraction in integer])
        for layer in program.layers():
            name = layer.contraction
            if name in integer:
                twins[name] = self._contraction(layer, integer[name], units[name], live[name])
        copied = copy.deepcopy(program.replace_modules(twins).graph_module)
        named = {name: copied.get_submodule(name) for name in twins}
        for value in copied.parameters():
            value.requires_grad_(False)
        for value in (value for twin in named.values() for value in twin.parameters()):
            value.requires_grad_(True)
        indices = nn.ModuleList(dict.fromkeys(twin.index for twin in _holders(named) if twin.index is not None))
        for value in indices.parameters():
            value.requires_grad_(True)
        return TrainedModel(self.compiled, self.training, copied, named, indices, tuple(dict.fromkeys(self.notes)))

    def _functions(self) -> dict[str, Expansion]:
        """Give the float functions that tables were made of, by the names of the tables, where these still are theirs."""
        compiled = self.compiled
        lowering = Lowering(compiled.captured, compiled.calibration.samples, self.seed)
        functions = lowering.functions(lowering.settled(compiled.recipe))
        return {str(node.target): expansion for node, expansion in functions.nodes(Expansion)}

    def _table(self, name: str, table: TableExpansion, functions: Expansion | None) -> nn.Module:
        layer = next(one for one in self.program.layers() if name in one.expansions)
        if isinstance(table, JointTable):
            if self.training.index is not None or self.training.tables:
                self.notes.append(
                    f"layer {layer.name!r}: inputs share an index, so that its tables and ranges stay; lookup = 'each' has them "
                    "trained"
                )
            return TrainedJoint(table, self._index(name, table.index, None, table.n_in))
        fits = functions is not None and functions.k == table.k and functions.in_shape == table.in_shape
        found = functions if fits else None
        method, trains_codes = self.training.index, self.training.tables
        if self._adds_pairs(layer):
            # codes of weights can move as far as the codes of the tables, as they are now, leave room for
            if method is not None or trains_codes:
                self.notes.append(
                    f"layer {layer.name!r}: tables and ranges stay, since weights of 8 bits must fit them on processors without "
                    "VNNI"
                )
            method, trains_codes = None, False
        if method is not None:
            why = self._why_fixed(table, found)
            if why:
                self.notes.append(f"layer {layer.name!r}: index not trained, since {why}")
                method = None
        self.learns_index |= method is not None
        index = self._index(name, table.index, method, table.n_in)
        rows_are_inputs = functions is not None and functions.is_identity
        twin = TrainedTable(table, index, found, trains_codes and not rows_are_inputs)
        if method is not None and constant_functions([twin.known_slope]):
            raise KanCompileError(
                f"layer {layer.name!r}: its functions have no finite slope over {table.index.low:.4g} ... "
                f"{table.index.high:.4g}, expected functions that vary there, since an index learns through them; leave "
                "training's index out"
            )
        return twin

    def _adds_pairs(self, layer: Layer) -> bool:
        """Whether sums of two products of a layer must fit int16 and may not, whatever its codes are."""
        return CPU_PRESETS[self.compiled.recipe.cpu].int16_pairs and self.program.contraction(layer).weight_bits == 8

    def _why_fixed(self, table: TableExpansion, functions: Expansion | None) -> str:
        if not table.index.is_8_bit:
            return f"it has {table.index.levels} rows, of which the range loses little; set levels = 256 or fewer"
        if functions is None:
            return "the program no longer has its functions"
        if functions.is_identity:
            return "its rows are the inputs of an ordinary layer themselves"
        return ""

    def _index(self, name: str, start: IndexQuantizer, method: str | None, features: int) -> IndexMethod:
        """Return the index of a table; those of one index behind the same source share it, as the file does."""
        front = contraction_in_front(self.program, name)
        source = front[0] if front else ",".join(node.all_input_nodes[0].name for node in nodes_of(self.program, name))
        kind = DoReFaIndex if method is None else INDEX_METHODS[method]
        known = self.indices.get((source, start))
        if known is None:
            known = self.indices[source, start] = kind(start, features)
        elif type(known) is not kind:  # one reader whose index must stay holds it for all
            for parameter in known.parameters():
                parameter.requires_grad_(False)
        return known

    def _contraction(
        self, layer: Layer, contraction: IntegerContraction, unit: float, live: Tensor
    ) -> TrainedContraction:
        name = layer.contraction
        codes = contraction.matrix
        if contraction.multiplier is not None:
            codes = codes // contraction.multiplier.of_column().T
        is_ternary = self.compiled.recipe.for_layer(contraction.layer).is_ternary
        low, high = code_range(TERNARY if is_ternary else contraction.weight_bits)
        sizes = torch.tensor(contraction.group_sizes) * contraction.taps
        method = WEIGHT_METHODS[self.training.weights]
        quantizer = method(codes.flatten(1).float(), low, high, sizes, live)
        if self._adds_pairs(layer):
            quantizer.limits = torch.stack(layer_limits(self.program, layer)).float()
        index = None
        if contraction.output is not None:
            found = self.indices.get((name, contraction.output))
            index = found if found is not None else self._index_of_output(name, contraction.output)
        return twin_of(contraction, quantizer, index, unit)

    def _index_of_output(self, name: str, output: IndexQuantizer) -> IndexMethod:
        return self.indices.setdefault((name, output), DoReFaIndex(output, 1))

    def _measured(self, layers: list[Layer]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Measure the spread of every layer's outputs, in units of its bias, and which columns vary on the calibration data."""
        x: Values = self.compiled.calibration.samples
        units, live = {}, {}
        least: dict[str, Tensor] = {}
        most: dict[str, Tensor] = {}
        for number, part in enumerate(x.split(_MEASURED)):
            traced = self.program.trace(part, [layer.contraction for layer in layers])
            for layer in layers:
                name, contraction = layer.contraction, self.program.node(layer.contraction, IntegerContraction)
                features, y = traced[name]
                columns = torch.cat([one.flatten(-2).reshape(-1, one.shape[-2] * one.shape[-1]) for one in features], 1)
                low, high = columns.amin(0), columns.amax(0)
                least[name] = torch.minimum(least.get(name, low), low)
                most[name] = torch.maximum(most.get(name, high), high)
                if not number:
                    of_row = (
                        contraction.output.scale
                        if contraction.hands_over.kind == "rows" and contraction.output
                        else 1.0
                    )
                    units[name] = max(float(y.float().std()) * of_row * _BIAS_UNIT, 1e-12)
        for layer in layers:
            contraction = self.program.node(layer.contraction, IntegerContraction)
            varies = least[layer.contraction] != most[layer.contraction]
            if contraction.groups > 1:  # a column of the weight stands for one of every channel group
                varies = torch.ones(contraction.matrix_shape[1], dtype=torch.bool)
            live[layer.contraction] = varies.repeat_interleave(contraction.taps)
        return units, live


def _holders(twins: Mapping[str, nn.Module]) -> list[Any]:
    """List the twins, and members of joint ones, that refer to an index."""
    parts = [part for twin in twins.values() for part in twin.modules()]
    return [part for part in parts if "index" in part.__dict__]
