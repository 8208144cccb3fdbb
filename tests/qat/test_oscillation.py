"""Weights that jump between two codes: against the definitions, weight by weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kancompile import KanCompileError, qat
from kancompile.qat.conversion import quantized
from tests.compiled_kan import make_inputs
from tests.qat.test_elastic import elastic, module

MOMENTUM, THRESHOLD = 0.1, 0.3


def weights(model: qat.TrainedModel) -> torch.nn.Parameter:
    twin: Any = model.twin("layer0_contract")
    return twin.quantizer.weight


def test_the_loss_is_the_distance_to_the_codes() -> None:
    model = module(4)
    assert qat.dampening_loss(model).item() == 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = 0.0
        for name, value in model.named_parameters():
            if name.endswith("quantizer.weight"):
                value += torch.randn(value.shape, generator=generator)
                inside = np.clip(value.detach().double().numpy(), -8, 7)
                expected += float(((inside - np.round(inside)) ** 2).sum())
    loss = qat.dampening_loss(model)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    inside = weights(model).detach().clamp(-8, 7)
    within = (weights(model).detach() == inside).float()
    torch.testing.assert_close(weights(model).grad, 2 * (inside - inside.round()) * within, rtol=1e-5, atol=1e-6)
    assert not any(value.grad is not None for name, value in model.named_parameters() if "quantizer.weight" not in name)


def test_what_jumps_is_frozen_where_it_was_most() -> None:
    """One weight jumps for two steps of three, one climbs, the others stay; against the recurrence written out."""
    model = module(4)
    latent = weights(model)
    with torch.no_grad():
        latent.zero_()
    freezer = qat.OscillationFreezer(model, THRESHOLD, MOMENTUM)
    frequency = average = 0.0
    last = before = step = 0
    while frequency <= THRESHOLD:
        assert freezer.frozen == 0
        step += 1
        code = 1 if step % 3 else 0
        with torch.no_grad():
            latent[0, 0], latent[0, 1] = 0.9 * code, float(min(step, 6))
        freezer.step()
        direction = code - before
        frequency += MOMENTUM * ((direction * last < 0) - frequency)
        average += MOMENTUM * (code - average)
        last, before = direction or last, code
    assert step > 4
    assert freezer.frozen == 1
    assert latent[0, 0].item() == round(average)

    with torch.no_grad():
        latent[0, :2] = 5.0
    freezer.step()
    assert latent[0, :2].tolist() == [round(average), 5.0]
    x = make_inputs(50, seed=2)
    assert torch.equal(model.eval()(x), quantized(model)(x))


def test_other_modules_are_refused() -> None:
    with pytest.raises(KanCompileError, match="found weights 'qil'"):
        qat.dampening_loss(module(4, {"weights": "qil"}))
    with pytest.raises(KanCompileError, match="weights that widths share"):
        qat.OscillationFreezer(elastic().at(4))
    with pytest.raises(KanCompileError, match="between 0 and 1"):
        qat.OscillationFreezer(module(4), threshold=0.0)
