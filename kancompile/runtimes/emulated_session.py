"""Run a model in a Python that has only NumPy and ONNX Runtime: ``emulated_session.py MODEL INPUTS.npy OUTPUTS.npy``."""

import sys

import numpy as np
import onnxruntime  # type: ignore[import-untyped, unused-ignore]

BATCH = 256
# kernels differ for a few rows, so the first batches are small
FIRST_BATCHES = (1, 1, 2, 3, 4, 5, 7)


def run(model: str, source: str, result: str) -> None:
    """Run a model on the inputs of one file and write its only output to another."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    only = session.get_inputs()[0]
    x = np.load(source)
    count = len(x)
    if isinstance(only.shape[0], int):
        ends = list(range(only.shape[0], count + only.shape[0], only.shape[0]))
        x = np.concatenate([x, np.repeat(x[-1:], -count % only.shape[0], axis=0)])
    else:
        first = np.cumsum(FIRST_BATCHES).tolist()
        ends = [*first, *range(first[-1] + BATCH, count + BATCH, BATCH)]
    starts = [0, *ends[:-1]]
    parts = [
        session.run(None, {only.name: x[start:end]})[0]
        for start, end in zip(starts, ends, strict=True)
        if start < count
    ]
    np.save(result, np.concatenate(parts)[:count])


if __name__ == "__main__":
    run(*sys.argv[1:])
