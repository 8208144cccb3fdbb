"""Trace a model to a decomposed ATen graph whose batch dimension is dynamic.

The graph is the only thing the rest of the front end sees, so what it relies on is established here: one float32
tensor in, a dynamic first dimension, nothing written to, finite constants. What cannot be had is refused with the
user's line.
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

from kancompile.data import check_one_input, evaluation_mode, load_exported
from kancompile.errors import KanCompileError, error_source, reason
from kancompile.frontend.trace.decompositions import DECOMPOSITIONS, WHOLE, is_checked

EXAMPLE_ROWS = 3
"""Batch of the example that is traced and analysed: the smallest that torch.export does not specialise, and odd."""


def export(
    model: nn.Module | ExportedProgram | str | os.PathLike[str], example: Tensor | Sequence[int], trust: bool = False
) -> ExportedProgram:
    """Trace a model with a dynamic batch and decompose it to core ATen operators.

    A module is traced in evaluation mode (its training flags are restored), first non-strict, then strict: some models
    pass only one of the two.

    Args:
        model: module, exported program, or path of a ``.pt2`` file.
        example: an input ``[b, *input_shape]`` (float32), or ``input_shape`` without the batch.
        trust: whether a ``.pt2`` file may be opened, which can run code.

    Raises:
        KanCompileError: a file that is not trusted, the model cannot be traced with a dynamic batch, does not map one float32
            tensor, writes to its state, or holds non-finite constants.
    """
    rows = example_rows(example)
    if isinstance(model, nn.Module):
        _check_state(dict(model.named_parameters()), dict(model.named_buffers()))
        traced = _trace(model, rows)
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
    with quiet():
        decomposed: ExportedProgram = traced.run_decompositions(_decompositions())
    _check_decomposition(traced, decomposed, rows)
    _check_writes(decomposed, isinstance(model, nn.Module))
    state = {**decomposed.state_dict, **decomposed.constants}
    parameters = set(decomposed.graph_signature.parameters)
    _check_state(
        {key: value for key, value in state.items() if key in parameters},
        {key: value for key, value in state.items() if key not in parameters},
    )
    return decomposed


def example_rows(example: Tensor | Sequence[int], rows: int = EXAMPLE_ROWS, seed: int = 0) -> Tensor:
    """Give an input batch of ``rows`` rows: the example's own first rows, then seeded ones of like mean and spread.

    Args:
        example: ``[b, *input_shape]`` float32, or ``input_shape`` (then standard normal).
        rows: size of the batch.
        seed: of the rows drawn.

    Raises:
        KanCompileError: the example is no float32 batch or its shape is not positive.
    """
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(example, Tensor):
        shape = tuple(example)
        if not shape or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in shape):
            raise KanCompileError(
                f"input_shape: found {shape!r}, expected positive sizes of one input without the batch, such as (784,)"
            )
        return torch.randn(rows, *shape, generator=generator)
    if example.dtype != torch.float32 or example.dim() < 2 or example.numel() == 0:
        raise KanCompileError(
            f"example input: found {example.dtype} of shape {tuple(example.shape)!r}, expected float32 with a batch "
            "dimension first and at least one row; convert with .float(), add a batch with .unsqueeze(0)"
        )
    own = example.detach().cpu()[:rows]
    if not bool(torch.isfinite(own).all()):
        raise KanCompileError("example input: found NaN or infinite values, expected finite ones; clean the data first")
    spread = own.std() if own.numel() > 1 else torch.tensor(1.0)
    drawn = own.mean() + spread * torch.randn(rows - len(own), *own.shape[1:], generator=generator)
    return torch.cat([own, drawn])


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


def _trace(model: nn.Module, rows: Tensor) -> ExportedProgram:
    name = type(model).__name__
    check_one_input(model)
    failures: list[tuple[str, str]] = []
    for strict in (False, True):
        try:
            with quiet(), evaluation_mode(model), torch.no_grad():
                batch = torch.export.Dim("batch")
                traced = torch.export.export(model, (rows,), dynamic_shapes=({0: batch},), strict=strict)
        except Exception as error:  # torch.export raises whatever the user's code or the tracer raises
            failures.append((error_source(error), reason(error)))
        else:
            if _has_dynamic_batch(traced):
                return traced
            failures.append(("", "the batch dimension was specialised to a constant"))
    source = next((source for source, _ in failures if source), "")
    reasons = "; strict: ".join(reason for _, reason in failures)
    raise KanCompileError(
        f"model {name!r}: {source + ': ' if source else ''}found code that torch.export cannot trace with a dynamic "
        f"batch ({reasons}), expected tensor operations only; replace choices that depend on data by torch.where and "
        "sizes by x.shape[0]"
    )


def _has_dynamic_batch(traced: ExportedProgram) -> bool:
    inputs = [node for node in traced.graph.nodes if node.name in traced.graph_signature.user_inputs]
    return all(
        isinstance(node.meta["val"], Tensor)
        and node.meta["val"].dim() > 0
        and isinstance(node.meta["val"].shape[0], torch.SymInt)
        for node in inputs
    )


def _check_signature(traced: ExportedProgram, rows: Tensor) -> None:
    """Verify one dynamic float32 input, a single tensor output and no writes."""
    signature = traced.graph_signature
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder" and node.name in signature.user_inputs]
    if len(signature.user_inputs) != 1 or len(inputs) != 1 or not isinstance(inputs[0].meta["val"], Tensor):
        raise KanCompileError(
            f"model: found {len(signature.user_inputs)} inputs {list(signature.user_inputs)!r}, expected exactly one "
            "tensor input; wrap the model in a module of one input"
        )
    value = inputs[0].meta["val"]
    if not _has_dynamic_batch(traced):
        raise KanCompileError(
            f"model: found the static input shape {tuple(value.shape)!r}, expected a dynamic batch; export with "
            'dynamic_shapes=({0: torch.export.Dim("batch")},)'
        )
    if value.dtype != torch.float32 or value.device.type != "cpu":
        raise KanCompileError(
            f"model: found an input of {value.dtype} on {value.device}, expected float32 on cpu; convert the model "
            "with .float().cpu() before exporting it"
        )
    if any(not isinstance(size, int) for size in value.shape[1:]) or tuple(value.shape[1:]) != tuple(rows.shape[1:]):
        raise KanCompileError(
            f"model: found the input shape {tuple(value.shape)!r}, expected [batch, {', '.join(map(str, rows.shape[1:]))}]"
            "; give the shape that the model was exported with, with only the batch dynamic"
        )
    outputs = signature.user_outputs
    returned = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    if len(outputs) != 1 or not isinstance(_value(returned[-1]), Tensor):
        raise KanCompileError(
            f"model: found {len(outputs)} outputs, expected a single tensor; wrap the model in a module that returns one"
        )
    if _value(returned[-1]).dtype != torch.float32:
        raise KanCompileError(
            f"model: found an output of {_value(returned[-1]).dtype}, expected float32; convert the model with .float()"
        )


def _check_decomposition(traced: ExportedProgram, decomposed: ExportedProgram, rows: Tensor) -> None:
    """Compare both programs where an operator was decomposed that has such a form only for some inputs."""
    if any(is_checked(node.target) for node in traced.graph.nodes):
        with quiet(), torch.no_grad():
            expected, found = traced.module()(rows), decomposed.module()(rows)
        size = float(expected.nan_to_num().abs().max())
        if not torch.allclose(expected, found, rtol=0, atol=1e-4 * size, equal_nan=True):
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
