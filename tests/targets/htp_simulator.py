"""Run a model on the HTP simulator of onnxruntime-qnn, every node of it: ``htp_simulator.py MODEL INPUTS.npy OUTPUTS.npy``.

A process of its own: the library stays loaded, and its simulator may abort when Python ends.
"""

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_qnn


def main(model: str, source: str, result: str) -> None:
    onnxruntime.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == "QNNExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices[:1], {"backend_path": onnxruntime_qnn.get_qnn_htp_path()})
    session = onnxruntime.InferenceSession(model, options)
    np.save(result, np.concatenate([session.run(None, {"input": row[None]})[0] for row in np.load(source)]))
    Path(result).with_suffix(".done").touch()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
