"""A report with a diagnosis of every family of the zoo, with convolutions, on seeded weights: nothing may be missing."""

from __future__ import annotations

import json
from collections.abc import Callable

import jsonschema
import pytest
import torch
from torch import Tensor, nn

from examples.zoo import (
    bsrbf_kan,
    chebyshev_kan,
    efficient_kan,
    fast_kan,
    faster_kan,
    fourier_kan,
    gram_kan,
    kagn_conv,
    polynomial_kan,
    rational_kan,
    relu_kan,
    sine_kan,
    spline_conv,
    wav_kan,
)
from kancompile.compiler.compile import compile
from kancompile.data.calibration import load_calibration
from kancompile.reporting.facts.collect import ReportOptions, collect
from kancompile.reporting.facts.source import of_compiled
from kancompile.reporting.render.html import render
from kancompile.reporting.schema import report_schema

WIDTHS = (8, 8, 3)
LINEAR, IMAGES = (8,), (3, 6, 6)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "efficient_kan": (lambda: efficient_kan.build(WIDTHS), LINEAR),
    "fast_kan": (lambda: fast_kan.build(WIDTHS), LINEAR),
    "faster_kan": (lambda: faster_kan.build(WIDTHS), LINEAR),
    "bsrbf_kan": (lambda: bsrbf_kan.build(WIDTHS), LINEAR),
    "chebyshev_kan": (lambda: chebyshev_kan.build(WIDTHS), LINEAR),
    "gram_kan": (lambda: gram_kan.build(WIDTHS), LINEAR),
    "polynomial_kan": (lambda: polynomial_kan.build(WIDTHS, "legendre"), LINEAR),
    "fourier_kan": (lambda: fourier_kan.build(WIDTHS), LINEAR),
    "sine_kan": (lambda: sine_kan.build(WIDTHS), LINEAR),
    "relu_kan": (lambda: relu_kan.build(WIDTHS), LINEAR),
    "rational_kan": (lambda: rational_kan.build(WIDTHS), LINEAR),
    "wav_kan": (lambda: wav_kan.build(WIDTHS, "mexican_hat"), LINEAR),
    "kagn_conv": (lambda: kagn_conv.build((3, 6, 8), (1, 2), 3), IMAGES),
    "kagn_conv, groups": (lambda: kagn_conv.build((3, 6, 8), (1, 2), 3, groups=2), IMAGES),
    "spline_conv": (lambda: spline_conv.build((3, 4, 6), (1, 2), 3), IMAGES),
}
SLOW = {"kagn_conv, groups", "spline_conv", "bsrbf_kan", "gram_kan", "polynomial_kan", "fourier_kan"}
"""Kin of families that stay in the default run."""
OPTIONS = ReportOptions(edge_count=2, sweep=False, float_export=False, latency=False, diagnose=True)


def _samples(shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAMILIES]
)
def test_every_family_is_reported_and_diagnosed(family: str) -> None:
    build, shape = FAMILIES[family]
    model = build().eval()
    x = _samples(shape, 40, 2)
    with torch.no_grad():
        judging = load_calibration(x, labels=model(x).argmax(1))
    compiled = compile(model, _samples(shape, 96, 1), recipe={"goal_sqnr": None, "function_error": 1e-3})
    report = collect(of_compiled(compiled, judging, "40 samples", compiled.validate(judging)), OPTIONS)
    jsonschema.validate(json.loads(json.dumps(report, allow_nan=False)), report_schema())
    names = [layer["name"] for layer in report["layers"]]
    diagnosis = report["diagnosis"]
    assert [layer["layer"] for layer in diagnosis["layers"]] == names
    assert {entry["layer"] for entry in diagnosis["sensitivities"]} == set(names)
    # the functions are counted in the form that is tabulated, which a pass may have given them
    for parts, layer in zip(diagnosis["layers"], report["layers"], strict=True):
        assert parts["columns"] == sum(e["n_in"] * e["k"] for e in layer["expansions"])
        assert sum(parts[part] for part in ("outside", "levels", "codes", "weights")) > 0
    if family.startswith("kagn"):  # which has functions that depend on each other
        changes = next(step["changes"] for step in report["pipeline"] if step["name"] == "reduce-functions")
        assert changes
    page = render(report)
    assert page.count("<svg") >= len(report["edges"]) > 0
