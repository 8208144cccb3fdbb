"""The shortest way from a trained KAN to an integer ONNX file: ``python -m examples.quickstart``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

import kancompile
from examples.zoo.efficient_kan import build

DIGITS = Path(__file__).parent / "digits"


def main() -> None:
    """Compile the digits model, validate the file and print what was measured."""
    model = build(widths=(64, 64, 10))
    model.load_state_dict(load_file(DIGITS / "efficient_kan_digits.safetensors"))
    calibration = np.load(DIGITS / "digits_calibration.npz")["x"]
    test = np.load(DIGITS / "digits_test.npz")

    compiled = kancompile.compile(model, calibration)
    with tempfile.TemporaryDirectory() as folder:
        path = compiled.save(Path(folder) / "digits.onnx")
        print(kancompile.validate(path, model, (test["x"], test["y"]), program=compiled.program).table())
    print(compiled.audit.table())


if __name__ == "__main__":
    main()
