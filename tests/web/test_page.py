"""The example page in headless Chromium: what is drawn there is classified as ONNX Runtime classifies it."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from examples.web.build import DIGITS, build_site, make_server
from examples.web.network_file import describe_network
from kancompile.errors.exceptions import KanCompileError
from kancompile.runtimes import web
from tests.convolution_programs import integer_convolutions, square
from tests.tools import browser

DRIVER = Path(__file__).with_name("drive_page.mjs")


def arc(x: float, y: float, width: float, height: float, begin: float, end: float) -> list[list[float]]:
    """Give points on an ellipse between two angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(begin, end, 9))
    return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], 1).tolist()


DRAWINGS = {
    0: [arc(0.5, 0.5, 0.25, 0.38, -90, 270)],
    1: [[[0.35, 0.3], [0.52, 0.12], [0.52, 0.88]]],
    2: [[*arc(0.5, 0.32, 0.22, 0.2, 190, 380), [0.3, 0.86], [0.75, 0.86]]],
    3: [[*arc(0.47, 0.3, 0.2, 0.18, 200, 450), *arc(0.47, 0.68, 0.24, 0.2, -90, 160)]],
    4: [[[0.55, 0.12], [0.25, 0.6], [0.78, 0.6]], [[0.6, 0.35], [0.6, 0.9]]],
    7: [[[0.27, 0.15], [0.74, 0.15], [0.42, 0.88]]],
}


needs_browser = pytest.mark.needs("web", "chromium", "playwright-core")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build_site(folder)
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with make_server(site, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def visit(tmp_path: Path, address: str, digits: list[int], images: np.ndarray, phone: bool) -> dict[str, Any]:
    request = tmp_path / "request.json"
    drawings = [DRAWINGS[digit] for digit in digits]
    asked = {"url": address, "phone": phone, "drawings": drawings, "images": images.tolist(), "screenshot": None}
    request.write_text(json.dumps(asked))
    command = ["node", str(DRIVER), str(web.node_modules()), str(browser()), str(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["errors"] == []
    assert answer["layout"]["overflow"] <= 0  # nothing to scroll sideways
    assert answer["layout"]["steps"] == 2
    return answer


def logits_of(site: Path, pixels: np.ndarray, file: str = "digits.onnx") -> np.ndarray:
    session = onnxruntime.InferenceSession(site / file, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: (pixels / 8 - 1).astype(np.float32)})[0]


@needs_browser
@pytest.mark.parametrize(("phone", "digits"), [(False, [1, 4]), (True, [7, 2])], ids=["mouse", "finger"])
def test_drawn_digits_are_classified_as_onnxruntime_does(
    tmp_path: Path, site: Path, address: str, phone: bool, digits: list[int]
) -> None:
    test = np.load(DIGITS / "digits_test.npz")
    images = np.rint((test["x"][:200] + 1) * 8).astype(int)
    answer = visit(tmp_path, address, digits, images, phone)
    assert [drawn["digit"] for drawn in answer["drawn"]] == [str(digit) for digit in digits]
    pixels = np.array([drawn["pixels"] for drawn in answer["drawn"]])
    assert pixels.max() <= 16
    expected = logits_of(site, pixels)
    np.testing.assert_array_equal(np.array([drawn["logits"] for drawn in answer["drawn"]], np.float32), expected)
    assert expected.argmax(1).tolist() == digits
    exact = logits_of(site, pixels, "digits.float.onnx")
    np.testing.assert_allclose([drawn["floats"] for drawn in answer["drawn"]], exact, atol=1e-4)
    # the page's own integer arithmetic, from which it draws the edge functions, agrees as well
    assert [drawn["equal"] for drawn in answer["drawn"]] == ["yes"] * len(digits)
    np.testing.assert_array_equal(np.array(answer["logits"], np.float32), logits_of(site, images))


@needs_browser
@pytest.mark.slow
def test_all_drawings_are_recognised(tmp_path: Path, site: Path, address: str) -> None:
    answer = visit(tmp_path, address, list(DRAWINGS), np.zeros((0, 64)), False)
    assert [int(drawn["digit"]) for drawn in answer["drawn"]] == list(DRAWINGS)


def test_network_that_the_page_cannot_draw_is_refused() -> None:
    with pytest.raises(KanCompileError, match=r"layer 'layers\.0'.*IntegerContraction, expected one shared table"):
        describe_network(integer_convolutions((3, 8, 8), [square(4, 3)]))


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(web.NODE_MODULES, str(tmp_path / "node_modules"))
    with pytest.raises(KanCompileError, match=r"install it: npm install --prefix .* onnxruntime-web@"):
        build_site(tmp_path / "site")
    assert not (tmp_path / "site").exists()
