"""Models may return booleans and numbers of classes beside real values, with and without a dimension behind the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kancompile
from kancompile.ir import NamedTensors, joined
from kancompile.validation.error_measures import ErrorMeasure
from tests.compiled_kan import make_inputs, make_model


class Decisions(nn.Module):
    """A network and what follows from its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        return {"score": y[:, 0], "above": y > 0, "which": y.argmax(1)}


@pytest.mark.slow
def test_a_file_of_real_values_booleans_and_classes() -> None:
    x = make_inputs(60)
    compiled = kancompile.compile(Decisions().eval(), x, recipe={"goal_sqnr": None})
    result = compiled.validate(x)
    assert result.runtime is not None
    assert result.runtime.differing == 0
    assert list(result.compiled.parts) == ["score", "above", "which"]


def test_booleans_are_compared() -> None:
    measure = ErrorMeasure()
    expected = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    found = expected.clone()
    found[1, 0] = True
    measure.add(expected, found, "a model")
    assert (measure.differing, measure.count, measure.largest) == (1, 8, 1.0)
    assert np.isfinite(measure.sqnr_db)


def test_outputs_without_further_dimensions_are_joined() -> None:
    values = NamedTensors({"a": torch.tensor([1, 2]), "b": torch.tensor([[True, False], [False, True]])})
    assert joined(values).tolist() == [[1, 1, 0], [2, 0, 1]]
