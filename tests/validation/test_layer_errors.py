"""Errors of single layers against NumPy, and against faults planted in other layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kancompile
from examples.zoo import spline_conv
from kancompile.compiler.compiled_model import CompiledModel
from kancompile.ir import IntegerContraction, Program, TableExpansion
from kancompile.validation.layer_errors import LayerError, LayerErrors
from kancompile.validation.validate import validate
from tests.compiled_kan import compiled_kan, make_inputs


def images(n: int) -> Tensor:
    return torch.rand(n, 2, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1


@lru_cache
def compiled_convolutions() -> CompiledModel:
    """Compile three convolutions: the first two hand over row numbers, one of them moves by 2."""
    model = spline_conv.build((2, 4, 5, 4), (1, 2, 1), 4).eval()
    return kancompile.compile(model, images(48), recipe={"goal_sqnr": None})


def errors(float_program: Program, program: Program, x: Tensor) -> dict[str, LayerError]:
    found = LayerErrors(float_program, program, own=True)
    for part in x.split(50):  # the last part is smaller
        found.add(part)
    return {error.layer: error for error in found.result()}


def looked_up(table: TableExpansion, x: np.ndarray) -> np.ndarray:
    """Look real values ``[b, n_in]`` up as the file's operators are documented, codes ``[b, n_in, k]``."""
    index = table.index
    if index.is_8_bit:
        rows = np.rint(x.astype(np.float32) / np.float32(index.scale)) + index.zero_point
    else:
        rows = np.floor(x.astype(np.float64) / index.scale + index.zero_point + 0.5)
    rows = np.clip(rows, 0, index.levels - 1).astype(np.int64)
    first = np.zeros(table.n_in, dtype=np.int64) if table.first_row is None else table.first_row.numpy()
    return table.table.numpy()[rows + first].astype(np.int64)


def decibel(reference: np.ndarray, found: np.ndarray) -> float:
    """Ratio of what varies, about the mean of every output (a column, or the channel of an image)."""
    reference, found = reference.astype(np.float64), found.astype(np.float64)
    mean = reference.mean(axis=(0, *range(2, reference.ndim)), keepdims=True)
    return float(10 * np.log10(((reference - mean) ** 2).sum() / ((found - reference) ** 2).sum()))


@pytest.mark.parametrize("levels", [64, 256, 1000])
def test_own_error_is_that_of_the_layer_on_float_inputs(levels: int) -> None:
    compiled = compiled_kan(levels)
    x = make_inputs(120, seed=9)
    found = errors(compiled.captured, compiled.program, x)
    float_layer, layer = compiled.captured.layers()[1], compiled.program.layers()[1]
    hidden, expected = (
        compiled.captured.trace(x, [float_layer.expansions[0]])[float_layer.expansions[0]][0][0].numpy(),
        compiled.captured(x).numpy(),
    )
    contraction = compiled.program.module(layer.contraction)
    assert isinstance(contraction, IntegerContraction)
    columns = []
    for target in layer.expansions:
        table = compiled.program.module(target)
        assert isinstance(table, TableExpansion)
        columns.append(looked_up(table, hidden).reshape(len(x), -1))
    weight = torch.cat(contraction.weights).numpy().astype(np.int64)
    (scale,) = contraction.scales
    sums = np.concatenate(columns, axis=1) @ weight + contraction.bias.numpy()
    assert found["layers.1"].own_sqnr_db == pytest.approx(decibel(expected, sums * scale.numpy()), abs=0.02)
    # nothing is in front of the first layer
    assert found["layers.0"].own_sqnr_db == pytest.approx(found["layers.0"].sqnr_db, abs=1e-9)


@pytest.mark.slow
def test_own_error_of_a_convolution_is_that_of_its_integers_on_float_inputs() -> None:
    compiled = compiled_convolutions()
    x = images(60)
    found = errors(compiled.captured, compiled.program, x)
    measured = 0
    for float_layer, layer in zip(compiled.captured.layers(), compiled.program.layers(), strict=True):
        traced = compiled.captured.trace(x, [*float_layer.expansions, float_layer.contraction])
        contraction = compiled.program.module(layer.contraction)
        float_contraction = compiled.captured.module(float_layer.contraction)
        assert isinstance(contraction, IntegerContraction)
        if contraction.geometry is None:
            continue  # the classifier behind the last image
        assert float_contraction.geometry == contraction.geometry
        measured += 1
        columns = []
        for target in layer.expansions:
            table = compiled.program.module(target)
            assert isinstance(table, TableExpansion)
            (pixels, _) = traced[float_layer.origin(target)]
            values = pixels[0].movedim(1, -1).reshape(-1, table.n_in).numpy()
            codes = looked_up(table, values).reshape(len(x), *pixels[0].shape[2:], -1)
            columns.append(torch.from_numpy(codes - contraction.zero_point).movedim(-1, 1).double())
        assert contraction.geometry.groups == 1
        sums = nn.functional.conv2d(
            torch.cat(columns, 1),
            contraction.matrix.double(),
            contraction.bias.double(),
            contraction.geometry.stride,
            contraction.geometry.padding,
        )
        real = (sums * contraction.scales[0].double()[:, None, None]).numpy()
        expected = traced[float_layer.contraction][1].numpy()
        if contraction.hands_over.kind == "real" and contraction.output is not None:
            index = contraction.output
            rows = np.clip(np.rint(real / index.scale) + index.zero_point, 0, index.levels - 1)
            real = (rows - index.zero_point) * index.scale
        assert found[layer.name].own_sqnr_db == pytest.approx(decibel(expected, real), abs=0.05)
    assert measured == 3
    names = list(found)
    assert found[names[0]].own_sqnr_db == pytest.approx(found[names[0]].sqnr_db, abs=1e-9)


def with_a_fault(program: Program, number: int) -> Program:
    """Turn the sign of the weights of one layer."""
    target = program.layers()[number].contraction
    contraction = program.module(target)
    assert isinstance(contraction, IntegerContraction)
    return program.replace_modules({target: contraction.replace(codes=-contraction.matrix)})


@pytest.mark.parametrize(
    ("make", "x"),
    [(lambda: compiled_kan(256), make_inputs(90, seed=4)), (compiled_convolutions, images(20))],
    ids=["linear", "convolutional"],
)
def test_a_fault_shows_in_its_own_layer_alone(make: Callable[[], CompiledModel], x: Tensor) -> None:
    compiled = make()
    before = errors(compiled.captured, compiled.program, x)
    after = errors(compiled.captured, with_a_fault(compiled.program, 0), x)
    first, *others = before
    for name in others:
        assert after[name].own_sqnr_db == before[name].own_sqnr_db
        assert after[name].sqnr_db < before[name].sqnr_db - 10
    assert after[first].own_sqnr_db == pytest.approx(after[first].sqnr_db, abs=1e-9)
    assert after[first].sqnr_db < 0


@pytest.mark.parametrize("recipe", [{"precision": "int16"}, {"precision": "float"}, {"lowering": "keep"}, {}])
def test_every_precision_and_the_table_of_a_validation(recipe: dict[str, str]) -> None:
    compiled = kancompile.compile(compiled_kan().reference, make_inputs(), recipe=recipe)
    result = validate(
        compiled.model_bytes,
        compiled.reference,
        make_inputs(60, seed=2),
        program=compiled.program,
        float_program=compiled.captured,
    )
    least = 20 if recipe == {} else 70
    for layer, written in zip(result.layers, result.to_dict()["layers"], strict=True):
        own = layer.own_sqnr_db
        assert own is not None
        assert own > least
        assert written["own_sqnr_db"] == (own if math.isfinite(own) else "inf")
    head, first = result.table().splitlines()[-4:-2]
    assert head.split() == ["layer", "SQNR", "dB", "worst", "dB", "own", "dB", "max", "error"]
    worst = result.layers[0].worst
    assert worst is not None
    assert first.split()[:4] == [
        "layers.0",
        f"{result.layers[0].sqnr_db:.2f}",
        f"{worst.sqnr_db:.2f}",
        f"{result.layers[0].own_sqnr_db:.2f}",
    ]


def test_the_error_gate_does_not_pay_for_it() -> None:
    compiled = compiled_kan(64)
    measured = LayerErrors(compiled.captured, compiled.program)
    measured.add(make_inputs(10))
    assert [error.own_sqnr_db for error in measured.result()] == [None, None]
    assert measured.result()[0].cells()[3] == ""
