"""The compatibility table: what it says about models that compile, and about models that do not."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.compatibility import FIGURES, Row, figures, folder_models, measure, page, worse
from benchmarks.digit_models import FamilyModel, load, train
from benchmarks.results_file import read_results


class Powers(nn.Module):
    def __init__(self, over_the_batch: bool = False) -> None:
        super().__init__()
        self.over_the_batch = over_the_batch
        self.linear = nn.Linear(2 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.over_the_batch:
            x = x - x.mean(0)
        u = torch.tanh(x)
        return self.linear(torch.cat([u, u**2], dim=1))


def test_a_model_that_compiles_has_figures() -> None:
    row = measure(FamilyModel("powers", "test", Powers, epochs=2), 3, print)
    assert (row.error, row.float_reason, row.layers) == ("", "", 1)
    assert row.accuracy is not None
    assert row.accuracy > 60
    assert row.float_error is not None
    assert row.float_error < 1e-5
    assert row.layer_sqnr is not None
    assert row.layer_sqnr > 35
    assert row.own_sqnr is not None
    assert row.own_sqnr >= row.layer_sqnr - 3  # without the errors of earlier layers
    assert row.speedup is not None


def test_a_model_that_does_not_compile_has_its_error() -> None:
    row = measure(FamilyModel("powers", "test", lambda: Powers(True), epochs=1), 3, lambda text: None)
    assert "test_compatibility.py" in row.error
    assert "other samples of its batch" in row.error
    good = Row("good", "zoo", accuracy=90.0, layers=2, float_error=2e-5, layer_sqnr=30.0, own_sqnr=36.0, speedup=4.0)
    text = page([row, good])
    assert "1 of 2 models compile. Median speed-up 4.0x." in text
    assert "Float lowering error above 1e-5: good of zoo (2.0e-05)." in text
    assert "Layers below 35 dB, earlier layers' errors included: good of zoo (30.0 dB)." in text
    assert "Layers below 35 dB alone: none." in text
    assert "| 30.0 dB | 36.0 dB |" in text
    assert f"1. {row.error}" in text


def test_what_got_worse_is_found_and_nothing_else() -> None:
    stored = {"bytes": 1000, "sqnr": 45.0, "worst": 40.0}
    assert worse(stored, {"bytes": 1019, "sqnr": 44.6, "worst": 50.0}) == []
    assert worse(stored, {"bytes": 1021, "sqnr": 44.4, "worst": None}) == [
        "bytes 1,000 -> 1,021",
        "sqnr 45 -> 44.4",
        "worst 40 -> none",
    ]
    row = Row("good", "zoo", sqnr=45.0, worst=40.0, bytes=1000)
    assert worse(figures(row), figures(row)) == []


def test_figures_are_stored_for_every_model_of_the_table() -> None:
    stored = read_results(FIGURES)
    assert len(stored) >= 36
    for figures_of_model in stored.values():
        assert set(figures_of_model) == {"bytes", "sqnr", "worst"}
        assert figures_of_model["worst"] <= figures_of_model["sqnr"] + 0.01


def test_models_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "from torch import nn\nFAMILY = 'plain'\nSHAPE = (1, 8, 8)\n"
        "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    (tmp_path / "b.py").write_text("import absent_package\n")
    good, bad = folder_models(tmp_path)
    assert (good.family, good.source, good.shape) == ("plain", "a.py", (1, 8, 8))
    assert isinstance(good.build(), nn.Sequential)
    row = measure(bad, 3, lambda text: None)
    assert row.error == ("RuntimeError: b.py cannot be loaded: ModuleNotFoundError: No module named 'absent_package'")


def test_training_is_seeded_and_leaves_the_global_random_state_alone() -> None:
    digits = load((64,))
    state = torch.get_rng_state()
    weights = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = nn.Linear(64, 10)
        train(model, digits, 1)
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)
    assert torch.equal(torch.get_rng_state(), state)
