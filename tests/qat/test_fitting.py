"""The loop for those who have none: it never ends worse than it began, resumes to the same bits, and says what it cannot take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kancompile import KanCompileError, qat
from kancompile.ir import NamedTensors
from kancompile.qat import fitting
from kancompile.qat.conversion import quantized
from tests.compiled_kan import make_inputs
from tests.qat.test_elastic import WIDTHS, elastic, lowering, module

SCHEDULE = qat.Schedule(epochs=3, batch_size=40, rate=0.05, seed=1)


def teacher(x: Any) -> Any:
    return lowering().program(x)


def classes(n: int = 150, seed: int = 5) -> qat.Labelled:
    x = make_inputs(n, seed)
    return qat.Labelled(x, teacher(x).argmax(1))


def values(n: int = 150, seed: int = 5) -> qat.Labelled:
    x = make_inputs(n, seed)
    return qat.Labelled(x, teacher(x) + 0.1 * torch.sin(9 * x[:, :3]))


@pytest.mark.parametrize("labelled", [classes, values])
def test_the_best_state_is_left_in_the_module(labelled: Callable[..., qat.Labelled]) -> None:
    model, held_out = module(2, {"index": "lsq+"}), labelled(60, seed=6)
    losses = qat.fit(model, labelled(), held_out, SCHEDULE, teacher)
    assert len(losses) == 4
    assert min(losses) < losses[0]
    assert fitting._loss_on(model, held_out) == min(losses)
    assert not model.training
    assert torch.equal(model(held_out.x), quantized(model)(held_out.x))


def test_a_training_that_gains_nothing_leaves_the_start() -> None:
    model, right = module(2), classes()
    wrong = qat.Labelled(right.x, (right.y + 1) % 3)
    losses = qat.fit(model, wrong, classes(60, seed=6), SCHEDULE, lambda x: teacher(x).roll(1, 1))
    assert len(losses) == 4
    assert min(losses) == losses[0]
    assert quantized(model) is model.compiled.lowered


def test_an_interrupted_training_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(model: torch.nn.Module) -> list[Tensor]:
        return list(model.state_dict().values())

    whole = elastic()
    qat.fit(whole, classes(), classes(60, seed=6), SCHEDULE, teacher)

    half, saved, seen = elastic(), fitting.save_checkpoint, []

    def interrupted(*arguments: Any) -> Path:
        path = saved(*arguments)
        seen.append(path)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(fitting, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qat.fit(half, classes(), classes(60, seed=6), SCHEDULE, teacher, tmp_path)
    monkeypatch.undo()
    resumed = elastic()
    losses = qat.fit(resumed, classes(), classes(60, seed=6), SCHEDULE, teacher, tmp_path, resume=True)
    assert len(losses) < 4
    assert all(torch.equal(one, other) for one, other in zip(state(whole), state(resumed), strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in qat.state_files(tmp_path, SCHEDULE)
    )
    with pytest.raises(KanCompileError, match="found no state"):
        qat.fit(
            elastic(), classes(), classes(), dataclasses.replace(SCHEDULE, epochs=4), teacher, tmp_path, resume=True
        )


def test_divergence_names_the_state_to_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, losses = module(2), fitting._by_label

    def diverges(outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return losses(outputs, y, reduction) * (float("nan") if int(model.steps) > 5 and reduction == "mean" else 1.0)

    monkeypatch.setattr(fitting, "_by_label", diverges)
    last, _ = qat.state_files(tmp_path, SCHEDULE)
    with pytest.raises(KanCompileError, match=rf"found NaN or infinity in 'layers\..* after step 6.*{last.name}"):
        qat.fit(model, classes(), classes(60, seed=6), SCHEDULE, teacher, tmp_path)


def test_what_cannot_be_trained_is_refused() -> None:
    data, model = classes(), module(WIDTHS[-1])

    def fit(samples: qat.Labelled = data, by: Any = teacher) -> None:
        qat.fit(model, samples, samples, SCHEDULE, by)

    with pytest.raises(KanCompileError, match=r"found classes 0 \.\.\. 7, expected 0 \.\.\. 2"):
        fit(qat.Labelled(data.x, torch.arange(150) % 8))
    with pytest.raises(KanCompileError, match="as many values a sample"):
        fit(qat.Labelled(data.x, data.y.float()))
    with pytest.raises(KanCompileError, match="a class a sample"):
        fit(qat.Labelled(data.x, data.y[:, None]))
    with pytest.raises(KanCompileError, match="several outputs"):
        fit(by=lambda x: NamedTensors({"a": teacher(x), "b": teacher(x)}))
    for wrong in ({"epochs": 0}, {"batch_size": 0}, {"rate": float("nan")}):
        with pytest.raises(KanCompileError, match="expected at least 1, at least 1, and a positive number"):
            qat.Schedule(**wrong)  # type: ignore[arg-type]
