"""A regression with the package pykan, from training to a validated file: disease progression from three measurements.

    python -m examples.pykan_regression [FOLDER]

Needs ``pip install kancompile[pykan]``. The model is pykan's own, unmodified: a hidden layer,
grids that adapt to the data, then edges without effect pruned. It is compiled in 8 bits, held to 35 dB, and in 16 bits,
whose error must stay below a ten-thousandth of the output's range.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

import kancompile

FEATURES = (2, 3, 8)  # body mass index, blood pressure, a blood serum value


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split 442 patients into training and test inputs and targets, all standardised."""
    found = load_diabetes()
    x = torch.tensor(found.data[:, FEATURES], dtype=torch.float32)
    y = torch.tensor(found.target, dtype=torch.float32)[:, None]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    training, test = order[:342], order[342:]
    return x[training], y[training], x[test], y[test]


def train(folder: Path, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> Any:
    """Train, prune, and train what is left."""
    import kan

    dataset = {"train_input": x, "train_label": y, "test_input": x_test, "test_label": y_test}
    model = kan.KAN(width=[len(FEATURES), 3, 1], grid=3, k=3, seed=0, ckpt_path=str(folder / "pykan"))
    model.fit(dataset, steps=6, lamb=0.01)
    model(x)
    model = model.prune()
    model.fit(dataset, steps=6)
    return model.speed().eval()


def main(folder: Path) -> tuple[Any, dict[str, kancompile.CompiledModel]]:
    """Train, compile twice, validate on the test patients; returns the model and what it was compiled to."""
    x, y, x_test, y_test = data()
    model = train(folder, x, y, x_test, y_test)
    with torch.no_grad():
        span = float(model(x_test).max() - model(x_test).min())
    compiled = {}
    for name, recipe in (("int8", {"min_sqnr": 35}), ("int16", {"precision": "int16"})):
        # Tables end where calibration inputs end, and a KAN is steep where it extrapolates. So calibrate with inputs, no
        # labels, of all patients. 16-bit tables continue in straight lines and would not need that.
        compiled[name] = kancompile.compile(model, torch.cat([x, x_test]), recipe=recipe)
        path = compiled[name].save(folder / f"{name}.onnx", force=True)
        result = kancompile.validate(path, model, x_test, y_test, program=compiled[name].program, max_drop=0.5)
        rmse = (result.compiled.noise / result.compiled.count) ** 0.5
        print(f"\n{name}: {path.stat().st_size:,} bytes, root mean squared error {rmse / span:.1e} of the range")
        print(result.table())
        print("\n".join(note for note in compiled[name].manifest["notes"] if note.startswith("error gate")))
        if not result.passed or (name == "int16" and rmse >= 1e-4 * span):
            raise SystemExit(f"{name}: not accurate enough, see above")
    return model, compiled


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
