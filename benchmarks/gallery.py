"""Draw the pictures of the gallery from the digits model that ships here: ``python -m benchmarks.gallery``.

Edge functions before and after, the error by layer and the front of bits come from a report of the model at 4 bits, the bars of
the firmware from a run on emulated Cortex-M cores. ``--screenshots`` takes those of the report and of the web page as well, which
needs Chromium, playwright-core and onnxruntime-web. All pictures are narrow, so that a phone shows their text.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.torch import load_file

import kancompile
from benchmarks.pictures import PICTURES, STYLE
from examples.c99 import cortex_m
from examples.web.build import DIGITS, build_site, make_server
from examples.zoo.efficient_kan import build
from kancompile.compiler import CompiledModel
from kancompile.data import load_calibration
from kancompile.reporting import ReportOptions, collect, of_compiled, render, report_figures
from kancompile.runtimes import web

EDGES = ((0, 27, 7), (0, 43, 59), (1, 2, 2), (1, 35, 6))  # layer, input, output
_SHOOT = Path(__file__).with_name("screenshot.mjs")
_FIFTH_IMAGE = "#examples button:nth-child(5)"


def digits_model(target: str = "ort-cpu") -> tuple[CompiledModel, tuple[NDArray[Any], NDArray[Any]]]:
    """Compile the model at 4 bits; also its test images and labels."""
    model = build(widths=(64, 64, 10))
    model.load_state_dict(load_file(DIGITS / "efficient_kan_digits.safetensors"))
    calibration, test = np.load(DIGITS / "digits_calibration.npz")["x"], np.load(DIGITS / "digits_test.npz")
    compiled = kancompile.compile(model.eval(), calibration, target=target, recipe={"weight_bits": 4})
    return compiled, (test["x"], test["y"])


def edges(compiled: CompiledModel) -> Figure:
    """Draw four edge functions in float, on the lookup table, and as compiled."""
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    for axes, edge in zip(figure.subplots(2, 2).flatten(), EDGES, strict=True):
        compiled.plot_edge(*edge, axes=axes)
        axes.set_title(axes.get_title().replace(": ", "\n"), fontsize=8)
        axes.get_legend().remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def firmware(runs: dict[str, cortex_m.Run]) -> Figure:
    """Draw the instructions of a sample on every core, and name the memory."""
    figure = Figure(figsize=(4.6, 1.8), layout="constrained")
    axes = figure.subplots()
    names = list(runs)
    axes.barh(names, [run.instructions / 1000 for run in runs.values()], color="#9ec5e8")
    for place, run in enumerate(runs.values()):
        text = f" {run.instructions:,}; flash {run.flash / 1000:.0f} kB, stack {run.stack} bytes"
        axes.annotate(text, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("thousand instructions for a sample")
    return figure


def run_firmware() -> dict[str, cortex_m.Run]:
    """Run the C model on every emulated core; its outputs are those of the simulation, bit for bit."""
    compiled, (x, _) = digits_model("c99")
    header = compiled.companions[".h"]
    expected = compiled.program(load_calibration(x[:8]).samples).detach().numpy()
    runs = {core.name: cortex_m.run(core, compiled.model_bytes, header, x[:8]) for core in cortex_m.CORES}
    assert all(np.array_equal(run.outputs, expected) for run in runs.values())
    return runs


def screenshots(address: str, name: str, narrow_height: int, click: str = "") -> None:
    """Take the first screen of a page, wide for README and narrow for the gallery, after a click where one is asked for."""
    for picture, width, height in ((f"{name}.png", 1000, 700), (f"{name}_narrow.png", 480, narrow_height)):
        size = [str(width), str(height)]
        command = ["node", str(_SHOOT), str(web.node_modules()), address, str(PICTURES / picture), *size, click]
        subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screenshots", action="store_true", help="also of the report and of the web page")
    arguments = parser.parse_args()
    compiled, test = digits_model()
    judging = load_calibration(test)
    source = of_compiled(compiled, judging, f"{len(judging)} test images", compiled.validate(judging), "model.onnx")
    report = collect(source, ReportOptions(latency=arguments.screenshots, float_export=arguments.screenshots))
    drawn = report_figures(report, ("svg",))
    for name in ("layers.svg", "front.svg"):
        (PICTURES / name).write_bytes(drawn[name])
    with mpl.rc_context(STYLE), tempfile.TemporaryDirectory() as name:
        edges(compiled).savefig(PICTURES / "edges.svg", metadata={"Date": None})
        firmware(run_firmware()).savefig(PICTURES / "firmware.svg", metadata={"Date": None})
        if arguments.screenshots:
            page, site = Path(name) / "report.html", Path(name) / "site"
            page.write_text(render(report), encoding="utf-8")
            screenshots(page.as_uri(), "report", 760)
            build_site(site)
            with make_server(site, 0) as server:
                thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
                thread.start()
                screenshots(f"http://127.0.0.1:{server.server_port}/", "web", 1300, _FIFTH_IMAGE)
                server.shutdown()
                thread.join()
    print("wrote", *sorted(path.name for path in PICTURES.iterdir()))


if __name__ == "__main__":
    main()
