"""Run models once between two calls of getppid, at which a plugin of QEMU says how many instructions ran: FOLDER COUNT.

It runs in a Python that has only NumPy and ONNX Runtime.
"""

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped, unused-ignore]


def run(folder: Path, count: int) -> None:
    """Run ``0.onnx`` on the arrays of ``0.npz`` and so on, each a second time between the calls."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for number in range(count):
        session = onnxruntime.InferenceSession(
            str(folder / f"{number}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        with np.load(folder / f"{number}.npz") as feeds:
            for name in feeds:
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(feeds[name]))
        for output in session.get_outputs():
            if all(isinstance(size, int) for size in output.shape):
                value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, _kind(output.type))
                binding.bind_ortvalue_output(output.name, value)
            else:  # a size is known once it has run
                binding.bind_output(output.name)
        session.run_with_iobinding(binding)
        os.getppid()
        session.run_with_iobinding(binding)
        os.getppid()


def _kind(name: str) -> type[np.generic]:
    kinds: dict[str, type[np.generic]] = {
        "tensor(float)": np.float32,
        "tensor(uint8)": np.uint8,
        "tensor(int32)": np.int32,
    }
    return kinds[name]


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
