"""Compile a trained KAN that ships with the repository and print what the integer file is worth: ``make demo``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import load_file

import kancompile
from examples.zoo.efficient_kan import build
from kancompile.progress import quiet
from kancompile.validation import FLOAT_EXPORT, export_float

DIGITS = Path(__file__).parent / "digits"
OUTPUT = Path("compiled")


def main() -> None:
    """Compile, validate, time and audit the digits model; the file stays in ``compiled/``."""
    model = build(widths=(64, 64, 10))
    model.load_state_dict(load_file(DIGITS / "efficient_kan_digits.safetensors"))
    calibration = np.load(DIGITS / "digits_calibration.npz")["x"]
    test = np.load(DIGITS / "digits_test.npz")
    print("efficient-KAN 64-64-10 on handwritten digits: compiling to 8-bit integers ...")
    with quiet():
        compiled = kancompile.compile(model, calibration)
        OUTPUT.mkdir(exist_ok=True)
        path = compiled.save(OUTPUT / "digits.onnx", force=True)
        result = kancompile.validate(path, model, (test["x"], test["y"]), program=compiled.program)
        timing = kancompile.benchmark(path, model, batch_sizes=(1, 256), threads=(1,))
    print(f"\n{result.table()}\n")
    float_bytes = len(export_float(model, (64,)))
    size = path.stat().st_size
    print(f"size     {size:,} bytes, float export {float_bytes:,} bytes ({float_bytes / size:.1f} x)")
    for batch in (1, 256):
        ratio = timing.ratio(FLOAT_EXPORT, batch, 1)
        print(f"latency  batch {batch}: {ratio:.1f} x faster than the float export in ONNX Runtime, one thread")
    print(f"\n{compiled.audit.table()}\n\nwritten: {path}, {path.with_name('digits.manifest.json')}")


if __name__ == "__main__":
    main()
