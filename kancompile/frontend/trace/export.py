"""Trace a model to a decomposed ATen graph whose batch dimension is dynamic.

The graph is the only thing the rest of the front end sees, so what it relies on is established here: tensors in and out,
a dynamic first dimension, nothing written to, finite constants. What cannot be had is refused with the user's line.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kancompile.data import (
    arguments,
    check_arguments,
    dynamic_dimensions,
    evaluation_mode,
    load_exported,
    named_forward,
    named_leaves,
    output_names,
    register_dataclasses,
)
from kancompile.errors import KanCompileError, error_source, reason
from kancompile.frontend.trace.control_flow import inline_control_flow
from kancompile.frontend.trace.decompositions import DECOMPOSITIONS, WHOLE, is_checked
from kancompile.frontend.trace.examples import Examples
from kancompile.frontend.trace.fake_quantizers import plain_fake_quantizers, refuse_observers
from kancompile.frontend.trace.plain_names import give_plain_names
from kancompile.frontend.trace.recurrence import WholeRecurrences, drop_zero_states
from kancompile.frontend.trace.zero_terms import drop_zero_terms
from kancompile.ir import Input, Interface, Values, by_name, export_dynamic, tensors_of

Dynamic = Mapping[str, Mapping[int, str]]
"""Names of dynamic dimensions beside the batch, by input and number of the dimension; an only input is called ``input``."""


def export(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    example: Values | Sequence[int],
    trust: bool = False,
    dynamic: Dynamic | None = None,
) -> ExportedProgram:
    """Trace a model with a dynamic batch and decompose it to core ATen operators.

    A module is traced in evaluation mode (its training flags are restored), first non-strict, then strict: some models
    pass only one of the two.

    Args:
        model: module, exported program, or path of a ``.pt2`` file.
        example: an input ``[b, *input_shape]`` (float32), several by name, or ``input_shape`` without the batch.
        trust: whether a ``.pt2`` file may be opened, which can run code.
        dynamic: dynamic dimensions beside the batch; an exported program says its own.

    Raises:
        KanCompileError: a file that is not trusted, the model cannot be traced with a dynamic batch, does not map tensors to
            tensors, writes to its state, or holds non-finite constants.
    """
    rows = Examples.of(example).first()
    if isinstance(model, nn.Module):
        _check_state(dict(model.named_parameters()), dict(model.named_buffers()))
        traced = _trace(model, rows, dynamic or {})
    elif isinstance(model, ExportedProgram):
        traced = model
    elif isinstance(model, str | os.PathLike):
        with quiet():
            traced = load_exported(Path(model), trust)
    else:
        raise KanCompileError(
            f"model: found {type(model).__name__}, expected an nn.Module, an ExportedProgram or the path of a .pt2 file"
            + (
                "; these are weights alone: build the model and call its load_state_dict"
                if isinstance(model, Mapping)
                else ""
            )
        )
    _check_signature(traced, rows)
    if traced is not model:  # which stays the user's
        drop_zero_terms(traced)
    give_plain_names(traced, traced is not model)
    with quiet():
        decomposed: ExportedProgram = traced.run_decompositions(_decompositions())
    inline_control_flow(decomposed)
    drop_zero_states(decomposed.graph)
    _check_decomposition(traced, decomposed, rows)
    _check_writes(decomposed, isinstance(model, nn.Module))
    state = {**decomposed.state_dict, **decomposed.constants}
    parameters = set(decomposed.graph_signature.parameters)
    _check_state(
        {key: value for key, value in state.items() if key in parameters},
        {key: value for key, value in state.items() if key not in parameters},
    )
    return decomposed


def interface_of(exported: ExportedProgram, rows: Values, dynamic: Dynamic | None = None) -> Interface:
    """Name inputs and outputs of an exported program.

    Args:
        exported: what :func:`export` returned.
        rows: an input, several by name in the order of the program.
        dynamic: names of dynamic dimensions; others are called as the program calls them.
    """
    signature = exported.graph_signature
    names = [name for name in signature.user_inputs if isinstance(name, str)]
    inputs = by_name(rows, ["input"] if len(names) == 1 else names)
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]
    called = {
        position: {
            dim: (dynamic or {}).get(name, {}).get(dim, str(size))
            for dim, size in enumerate(node.meta["val"].shape)
            if dim and not isinstance(size, int)
        }
        for position, (name, node) in enumerate(zip(inputs, nodes, strict=True))
    }
    other = {
        position: {
            dim: _other_size(exported, node.meta["val"].shape[dim], value.shape[dim]) for dim in called[position]
        }
        for position, (node, value) in enumerate(zip(nodes, inputs.values(), strict=True))
    }
    places: list[Any] = list(range(len(signature.user_outputs)))
    structure = torch.utils._pytree.tree_unflatten(places, exported.call_spec.out_spec)
    named = {place: name for name, place in named_leaves(structure)}
    outputs = [named[place] for place, node in enumerate(returned_nodes(exported)) if node is not None]
    return Interface(
        tuple(
            Input(name, tuple(value.shape[1:]), value.dtype, called[position], other[position])
            for position, (name, value) in enumerate(inputs.items())
        ),
        tuple(output_names(outputs, inputs)) if len(outputs) > 1 else ("output",),
    )


def _other_size(exported: ExportedProgram, size: torch.SymInt, own: int) -> int:
    """Choose another size than that of the samples for a dynamic dimension: half of it, more where the network needs more."""
    times, symbol = size.node.expr.as_coeff_Mul()
    limits, found = exported.range_constraints[symbol], own // int(times)
    smaller = max(found // 2, int(limits.lower), 2)
    return int(times) * (smaller if smaller < found else int(min(2 * found, limits.upper)))


def returned_nodes(exported: ExportedProgram) -> list[torch.fx.Node | None]:
    """List what the network returns, in order; ``None`` for what is no tensor, such as ``None`` itself."""
    count = len(exported.graph_signature.user_outputs)
    returned = next(node for node in exported.graph.nodes if node.op == "output").args[0]
    return [node if isinstance(_value(node), Tensor) else None for node in returned[len(returned) - count :]]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, log records and graph dumps of tracing from the user's terminal; the caller reports errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Core ATen decompositions and our own; collecting them takes as long as applying them, so it is done once."""
    table: dict[Any, Callable[..., Any]] = torch.export.default_decompositions().materialize()
    # patches of images stay one call, from which the convolution that they are for can be read
    return {operator: rule for operator, rule in {**table, **DECOMPOSITIONS}.items() if operator not in WHOLE}


def _trace(model: nn.Module, rows: Values, dynamic: Dynamic) -> ExportedProgram:
    name = type(model).__name__
    check_arguments(model, rows)
    refuse_observers(model)
    args, kwargs = arguments(model, rows)
    failures: list[tuple[str, str]] = []
    for strict in (False, True):
        try:
            with quiet(), evaluation_mode(model), named_forward(model, kwargs), torch.no_grad():
                register_dataclasses((args, kwargs, model(*args, **kwargs)))
                shapes = dynamic_dimensions(model, args, kwargs, rows, dynamic)
                with WholeRecurrences(), plain_fake_quantizers(model):
                    traced = export_dynamic(model, args, kwargs, shapes, strict)
        except Exception as error:  # torch.export raises whatever the user's code or the tracer raises
            failures.append((error_source(error), reason(error)))
        else:
            if _has_dynamic_batch(traced):
                return traced
            failures.append(("", "the batch dimension was specialised to a constant"))
    if dynamic:
        _refuse_dynamic(name, dynamic, failures)
    source = next((source for source, _ in failures if source), "")
    reasons = "; strict: ".join(reason for _, reason in failures)
    raise KanCompileError(
        f"model {name!r}: {source + ': ' if source else ''}found code that torch.export cannot trace with a dynamic "
        f"batch ({reasons}), expected tensor operations only; replace choices that depend on data by torch.where and "
        "sizes by x.shape[0]"
    )


def _refuse_dynamic(name: str, dynamic: Dynamic, failures: Sequence[tuple[str, str]]) -> None:
    """Name the dynamic dimensions that a model keeps torch.export from keeping."""
    called = sorted({size for sizes in dynamic.values() for size in sizes.values()})
    source = next((source for source, _ in failures if source), "")
    raise KanCompileError(
        f"model {name!r}: {source + ': ' if source else ''}found code that needs a fixed size where {', '.join(called)} "
        f"should be dynamic ({failures[0][1]}), expected sizes taken from x.shape; mend that line, or leave the dimension fixed"
    )


def _has_dynamic_batch(traced: ExportedProgram) -> bool:
    inputs = [node for node in traced.graph.nodes if node.name in traced.graph_signature.user_inputs]
    return all(
        isinstance(node.meta["val"], Tensor)
        and node.meta["val"].dim() > 0
        and isinstance(node.meta["val"].shape[0], torch.SymInt)
        for node in inputs
    )


def _check_signature(traced: ExportedProgram, rows: Values) -> None:
    """Verify tensors with a dynamic batch in, float32 or integers, tensors out and no writes."""
    signature = traced.graph_signature
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder" and node.name in signature.user_inputs]
    given = by_name(rows, [node.name for node in inputs] or [""])
    if len(inputs) != len(given):
        raise KanCompileError(
            f"model: found the inputs {list(signature.user_inputs)!r}, expected {len(given)} tensors as the data hold; name the "
            "arrays as the model names its inputs"
        )
    for node, found in zip(inputs, given.values(), strict=True):
        what, value = f"input {node.name!r}" if len(inputs) > 1 else "input", node.meta["val"]
        if not isinstance(value, Tensor):
            raise KanCompileError(f"model: found the {what} of {type(value).__name__}, expected a tensor; make it one")
        if value.dim() == 0 or not isinstance(value.shape[0], torch.SymInt):
            raise KanCompileError(
                f"model: found the static {what} shape {tuple(value.shape)!r}, expected a dynamic batch; export with "
                'dynamic_shapes=({0: torch.export.Dim("batch")},)'
            )
        if value.dtype != found.dtype or value.device.type != "cpu":
            raise KanCompileError(
                f"model: found an {what} of {value.dtype} on {value.device}, expected {str(found.dtype).removeprefix('torch.')} "
                "on cpu; convert the model with .float().cpu() before exporting it"
            )
        fits = value.dim() == found.dim() and all(
            own == size for own, size in zip(value.shape[1:], found.shape[1:], strict=True) if isinstance(own, int)
        )
        if not fits:
            raise KanCompileError(
                f"model: found the {what} shape {tuple(value.shape)!r}, expected [batch, {', '.join(map(str, found.shape[1:]))}]"
                "; give the shape that the model was exported with, with only the batch dynamic"
            )
    returned = [_value(node) for node in returned_nodes(traced) if node is not None]
    if not returned:
        raise KanCompileError("model: found no output that is a tensor, expected at least one; return what it computes")
    batch = inputs[0].meta["val"].shape[0].node.expr
    for value in returned:
        count = value.shape[0] if value.dim() else 1
        if isinstance(count, torch.SymInt) and count.node.expr != batch:
            raise KanCompileError(
                f"model: found an output of {count} rows for {batch} samples, expected one row for each; a size that the model "
                "knows, such as that of a reshape, cannot be dynamic"
            )
        if value.is_floating_point() and value.dtype != torch.float32:
            raise KanCompileError(
                f"model: found an output of {value.dtype}, expected float32; convert the model with .float()"
            )


def _check_decomposition(traced: ExportedProgram, decomposed: ExportedProgram, rows: Values) -> None:
    """Compare both programs where an operator was decomposed that has such a form only for some inputs."""
    if not any(is_checked(node.target) for node in traced.graph.nodes):
        return
    with quiet(), torch.no_grad():
        args, kwargs = torch.utils._pytree.tree_unflatten(list(tensors_of(rows)), traced.call_spec.in_spec)
        outputs = [torch.utils._pytree.tree_leaves(p.module()(*args, **kwargs)) for p in (traced, decomposed)]
    for expected, found in zip(*outputs, strict=True):
        size = float(expected.float().nan_to_num().abs().max())
        if not torch.allclose(expected.float(), found.float(), rtol=0, atol=1e-4 * size, equal_nan=True):
            raise KanCompileError(
                "model: found an embedding_bag whose bags differ in length, expected bags of equal length; call it with "
                "indices of two dimensions"
            )


def _check_writes(decomposed: ExportedProgram, is_evaluating: bool) -> None:
    """Refuse updates of buffers and inputs, which only the decomposed (functional) program lists.

    Args:
        decomposed: the program.
        is_evaluating: whether it was traced here, in evaluation mode.
    """
    signature = decomposed.graph_signature
    trained = [node for node in decomposed.graph.nodes if "batch_norm_legit_functional" in str(node.target)]
    if trained and not is_evaluating:
        raise KanCompileError(
            f"model: found batch normalization in training mode, which writes to {[*signature.buffers_to_mutate.values()]!r}, "
            "expected a program in evaluation mode; call model.eval() before torch.export.export"
        )
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        raise KanCompileError(
            f"model: found writes to {written!r}{' in evaluation mode' if is_evaluating else ''}, expected a function of the "
            "input alone; remove the in-place update or guard it with self.training"
        )


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, torch.fx.Node) else node


def _check_state(parameters: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
    """Refuse parameters in another precision, NaN anywhere, and infinite parameters.

    Infinite buffers are sentinels in some models (knots at infinity); whether they do harm shows in the outputs.
    """
    for key, value in {**parameters, **buffers}.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.device.type != "cpu":
            raise KanCompileError(
                f"{key!r}: found a tensor on {value.device}, expected cpu; move the model with .cpu()"
            )
        if key in parameters and value.dtype != torch.float32:
            raise KanCompileError(
                f"parameter {key!r}: found {value.dtype}, expected float32; convert with model.float() and measure its "
                "accuracy in float32, which is the reference of the compiler"
            )
        bad = torch.isnan(value) if key not in parameters else ~torch.isfinite(value)
        if bool(bad.any()):
            raise KanCompileError(
                f"{'parameter' if key in parameters else 'buffer'} {key!r}: found {int(bad.sum())} non-finite of "
                f"{value.numel()} values, expected finite ones; retrain or repair the checkpoint"
            )
