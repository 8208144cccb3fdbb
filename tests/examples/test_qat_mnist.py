"""The script that trains a compiled network on, on the digits that ship here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.qat_mnist import main
from tests.documentation_pages import ROOT

DIGITS = ROOT / "examples" / "digits"


@pytest.mark.slow
def test_it_trains_and_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {}
    for split, name in (("train", "digits_calibration"), ("test", "digits_test")):
        with np.load(DIGITS / f"{name}.npz") as found:
            pixels = (found["x"] - found["x"].min()) / (found["x"].max() - found["x"].min())
            arrays |= {f"x_{split}": (255 * pixels).astype(np.uint8), f"y_{split}": found["y"].astype(np.uint8)}
    np.savez(tmp_path / "digits.npz", **arrays)
    checkpoint = DIGITS / "efficient_kan_digits.safetensors"
    out = tmp_path / "digits.onnx"
    main([str(tmp_path / "digits.npz"), "--checkpoint", str(checkpoint), "--epochs", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "epoch 2/2: held-out loss" in printed
    assert "test accuracy: float" in printed
    assert out.is_file()
    assert out.with_name("digits.manifest.json").is_file()
