"""What the tests of the front end share: the comparison of a program with the model it was captured from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kancompile.frontend import capture
from kancompile.ir import Branch, Contraction, Expansion, Program


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Draw normal values from a seed."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captured(model: nn.Module, shape: Sequence[int], export_again: bool = False) -> Program:
    """Capture a model without any warning and check that the program equals it at several batch sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = capture(model, shape)
    model.eval()
    for batch in (1, 2, 5, 33):
        for scale in (1.0, 4.0):
            x = draw(batch, *shape, seed=batch, scale=scale)
            with torch.no_grad():
                expected = model(x)
            found = program(x)
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
    if export_again:
        again = torch.export.export(
            program.graph_module, (draw(3, *shape),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        x = draw(6, *shape, seed=9)
        torch.testing.assert_close(again.module()(x), program(x), rtol=1e-5, atol=1e-6)
    return program


def expansions(program: Program, layer: int = 0) -> list[Expansion]:
    """Give the expansions of a layer."""
    found = [program.module(target) for target in program.layers()[layer].expansions]
    assert all(isinstance(expansion, Expansion) for expansion in found)
    return found  # type: ignore[return-value]


def contraction(program: Program, layer: int = 0) -> Contraction:
    """Give the contraction of a layer."""
    found = program.module(program.layers()[layer].contraction)
    assert isinstance(found, Contraction)
    return found


def branches(expansion: Expansion) -> list[Branch]:
    """Give the branches of an expansion."""
    return [branch for branch in expansion.branches if isinstance(branch, Branch)]


def functions_are_shared(expansion: Expansion) -> bool:
    """Whether all inputs have the same functions, so that one table serves them all."""
    values = expansion.sample(torch.linspace(-3, 3, 101))
    return torch.allclose(values, values[..., :1, :], rtol=1e-5, atol=1e-6)
