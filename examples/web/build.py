"""Build the page that recognises drawn digits with an integer KAN, and serve it.

    npm install --prefix ~/.cache/kancompile/node onnxruntime-web@1.30.0
    python -m examples.web.build --serve

Compiles the digits model, writes ``digits.onnx``, the float model (``digits.float.onnx``) and the integers of the edge functions
(``digits.json``) beside the page and a copy of onnxruntime-web: one folder of static files that any web server can offer.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

import kancompile
from examples.web.network_file import describe_network
from examples.zoo.efficient_kan import build as build_model
from kancompile.errors import KanCompileError
from kancompile.progress import quiet
from kancompile.runtimes import web
from kancompile.validation import export_float

DIGITS = Path(__file__).parents[1] / "digits"
PAGE = Path(__file__).parent / "page"
SITE = Path("compiled") / "web"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def build_site(folder: Path) -> None:
    """Write the site into a folder, over what is there.

    Raises:
        KanCompileError: onnxruntime-web is not installed.
    """
    package = web.node_modules() / web.PACKAGE / "dist"
    absent = [name for name in RUNTIME_FILES if not (package / name).is_file()]
    if absent:
        raise KanCompileError(
            f"examples.web: found no {', '.join(absent)} in {package}, expected {web.PACKAGE}; "
            f"install it: {web.install_command(web.node_modules())}"
        )
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    (folder / "ort").mkdir(exist_ok=True)
    for name in RUNTIME_FILES:
        shutil.copyfile(package / name, folder / "ort" / name)
    model = build_model(widths=(64, 64, 10))
    model.load_state_dict(load_file(DIGITS / "efficient_kan_digits.safetensors"))
    with quiet():
        compiled = kancompile.compile(model, np.load(DIGITS / "digits_calibration.npz")["x"])
    compiled.save(folder / "digits.onnx", force=True)
    (folder / "digits.float.onnx").write_bytes(export_float(model, (64,)))
    network = {"layers": describe_network(compiled.program), "examples": example_images()}
    (folder / "digits.json").write_text(json.dumps(network, separators=(",", ":")) + "\n", encoding="utf-8")


def example_images() -> list[dict[str, object]]:
    """Take the first test image of every digit, pixels 0 ... 16."""
    test = np.load(DIGITS / "digits_test.npz")
    first = [int(np.flatnonzero(test["y"] == digit)[0]) for digit in range(10)]
    pixels = np.rint((test["x"][first] + 1) * 8).astype(int)
    return [{"label": digit, "pixels": row.tolist()} for digit, row in enumerate(pixels)]


def make_server(folder: Path, port: int, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """Return a server of a folder's files; port 0 takes any free one."""

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = SimpleHTTPRequestHandler.extensions_map | {
            ".mjs": "text/javascript",
            ".wasm": "application/wasm",
            ".onnx": "application/octet-stream",
        }

        def log_message(self, *arguments: object) -> None:
            pass

    return ThreadingHTTPServer((host, port), functools.partial(Handler, directory=str(folder)))


def main() -> None:
    """Build, and serve where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SITE, help="folder of the site (default: %(default)s)")
    parser.add_argument("--serve", action="store_true", help="serve it until interrupted")
    parser.add_argument("--port", type=int, default=8000, help="of the server (default: %(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for phones in the same network"
    )
    arguments = parser.parse_args()
    try:
        build_site(arguments.out)
    except KanCompileError as error:
        sys.exit(str(error))
    print(f"written: {arguments.out}")
    if arguments.serve:
        with make_server(arguments.out, arguments.port, arguments.host) as server:
            print(f"open http://{arguments.host}:{server.server_port}/ (stop with Ctrl-C)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()


if __name__ == "__main__":
    main()
