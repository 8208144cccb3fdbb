"""Compile a trained KAN that ships with the repository and print what the integer file is worth: ``make demo``."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

import kancompile
from examples.zoo.efficient_kan import build
from kancompile.progress import quiet
from kancompile.reporting import text_plot
from kancompile.validation import FLOAT_EXPORT, export_float

DIGITS = Path(__file__).parent / "digits"
OUTPUT = Path("compiled")
YOURS = """\
Your own model, in Python:

  compiled = kancompile.compile(model, calibration)   # an array [n, ...] of inputs as in training
  compiled.save("model.onnx")
  print(compiled.validate((x_test, y_test)).table())"""


@contextmanager
def working(what: str) -> Iterator[None]:
    """Run without notes of progress, and say every four seconds that work goes on."""
    is_done = threading.Event()

    def tick() -> None:
        start = time.monotonic()
        while not is_done.wait(4):
            print(f"  {what}, {time.monotonic() - start:.0f} s ...", flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        with quiet():
            yield
    finally:
        is_done.set()
        thread.join()


def main() -> None:
    """Compile, validate, time and audit the digits model; the file stays in ``compiled/``."""
    print(
        "efficient-KAN 64-64-10, trained on 8 x 8 handwritten digits: 4,736 edges, each a learned B-spline", flush=True
    )
    model = build(widths=(64, 64, 10))
    model.load_state_dict(load_file(DIGITS / "efficient_kan_digits.safetensors"))
    calibration = np.load(DIGITS / "digits_calibration.npz")["x"]
    test = np.load(DIGITS / "digits_test.npz")
    print(f"compiling to 8-bit integers with {len(calibration)} calibration samples ...", flush=True)
    with working("compiling"):
        compiled = kancompile.compile(model, calibration)
        OUTPUT.mkdir(exist_ok=True)
        path = compiled.save(OUTPUT / "digits.onnx", force=True)
    print("\nOne edge function of the model and of the file:\n")
    print(text_plot(compiled.edge(0, 27, 7)), flush=True)
    print(f"\ncomparing the file with the model on {len(test['x'])} test images ...\n", flush=True)
    with working("comparing"):
        result = kancompile.validate(path, model, (test["x"], test["y"]), program=compiled.program)
    print(result.table())
    print(
        "(simulation: the file's integer arithmetic in PyTorch, which the runtime must equal bit for bit)\n", flush=True
    )
    with working("exporting the float model"):
        float_bytes, size = len(export_float(model, (64,))), path.stat().st_size
    print(f"size     {size:,} bytes, float export {float_bytes:,} bytes ({float_bytes / size:.1f} x)", flush=True)
    print("timing the file beside the float export ...", flush=True)
    with working("timing"):
        timing = kancompile.benchmark(path, model, batch_sizes=(1, 256), threads=(1,))
    for batch in (1, 256):
        ratio = timing.ratio(FLOAT_EXPORT, batch, 1)
        print(f"latency  batch {batch}: {ratio:.1f} x faster than the float export in ONNX Runtime, one thread")
    print(f"\n{compiled.audit.table()}")
    print("(QGemm: ONNX Runtime's matrix product of 8-bit integers)")
    print(f"\nwritten: {path}, {path.with_name('digits.manifest.json')}\n\n{YOURS}")


if __name__ == "__main__":
    main()
