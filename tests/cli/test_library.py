"""Libraries of C models: the Arduino specification's fields, and a CMake project that computes what the file does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kancompile.cli.main import main
from tests.compiled_kan import compiled_kan, make_inputs

# Arduino library specification 1.5: required fields, and the categories that there are
REQUIRED = ("name", "version", "author", "maintainer", "sentence", "paragraph", "category", "url", "architectures")
CATEGORIES = (
    "Display", "Communication", "Signal Input/Output", "Sensors", "Device Control", "Timing", "Data Storage",
    "Data Processing", "Other",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("c") / "model.c"
    compiled_kan().for_target("c99").save(path)
    return path


def test_an_arduino_library_has_what_its_specification_asks_for(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits_kan"
    assert main(["library", str(model), "--layout", "arduino", "--name", "digits_kan", "--out", str(out)]) == 0
    lines = (out / "library.properties").read_text().splitlines()
    properties = dict(line.split("=", 1) for line in lines)
    assert set(REQUIRED) <= set(properties)
    assert re.fullmatch(r"\d+\.\d+\.\d+", properties["version"])
    assert properties["category"] in CATEGORIES
    assert (out / "src" / properties["includes"]).is_file()
    assert (out / "src" / "model.c").read_bytes() == model.read_bytes()
    (sketch,) = out.glob("examples/*/*.ino")
    assert sketch.stem == sketch.parent.name  # or the Arduino IDE does not open it
    assert f"#include <{properties['includes']}>" in sketch.read_text()
    keywords = [line.split("\t") for line in (out / "keywords.txt").read_text().splitlines()]
    assert all(len(entry) == 2 and entry[0] in model.read_text() for entry in keywords)


@pytest.mark.needs("gcc", "cmake")
def test_a_cmake_project_computes_what_the_model_does(model: Path, tmp_path: Path) -> None:
    out, build, x = tmp_path / "kan", tmp_path / "build", make_inputs(20, seed=4)
    assert main(["library", str(model), "--layout", "cmake", "--name", "kan", "--out", str(out), "--quiet"]) == 0
    for command in (
        ["cmake", "-S", out, "-B", build, "-DCMAKE_C_FLAGS=-Wall -Wextra -Werror"],
        ["cmake", "--build", build],
    ):
        subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([build / "kan_example"], input=x.numpy().tobytes(), check=True, capture_output=True)
    expected = compiled_kan().program(x).numpy()  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.float32).reshape(expected.shape), expected)


ARDUINO = """\
#pragma once
unsigned long micros();
void delay(unsigned long);
struct Port { void begin(long) {} void print(const char *) {} void print(int) {} void println(unsigned long) {} };
extern Port Serial;
"""
BOARD = """\
#include <Arduino.h>
Port Serial;
unsigned long micros() { return 0; }
void delay(unsigned long) {}
void setup();
void loop();
int main() { setup(); for (;;) loop(); }
"""
CORE = ("-mcpu=cortex-m0", "-mthumb", "-Os", "-Wall", "-Wextra", "-Werror")


@pytest.mark.needs("cortex-m")
def test_the_arduino_sketch_is_built_for_a_microcontroller(model: Path, tmp_path: Path) -> None:
    """With the declarations of Arduino.h that a sketch may use, for a Cortex-M0, down to firmware without an open symbol."""
    out = tmp_path / "kan"
    assert main(["library", str(model), "--layout", "arduino", "--name", "kan", "--out", str(out), "--quiet"]) == 0
    (tmp_path / "Arduino.h").write_text(ARDUINO)
    (tmp_path / "board.cpp").write_text(BOARD)
    (sketch,) = out.glob("examples/*/*.ino")
    units = {"model.o": ["-std=c99", out / "src" / "model.c"]}
    for name, source in (("sketch.o", sketch), ("board.o", tmp_path / "board.cpp")):
        units[name] = ["-I", out / "src", "-I", tmp_path, "-include", "Arduino.h", "-x", "c++", source]
    for name, arguments in units.items():
        command = ["arm-none-eabi-gcc", *CORE, "-c", "-o", tmp_path / name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    objects = [tmp_path / name for name in units]
    link = ["arm-none-eabi-gcc", *CORE[:2], "--specs=nosys.specs", "-Wl,--fatal-warnings", *objects]
    done = subprocess.run([*link, "-o", tmp_path / "firmware.elf"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = subprocess.run(["arm-none-eabi-size", tmp_path / "model.o"], check=True, capture_output=True, text=True)
    text, data, bss = map(int, sizes.stdout.splitlines()[1].split()[:3])
    declared = re.search(r"KAN_MODEL_FLASH_BYTES (\d+)", (out / "src" / "model.h").read_text())
    assert declared is not None
    assert int(declared[1]) < text < int(declared[1]) + 8192  # constants and their code
    assert (data, bss) == (0, 0)


@pytest.mark.needs("cortex-m", "cmake")
def test_the_cmake_library_is_built_by_a_cross_compiler(model: Path, tmp_path: Path) -> None:
    out, build = tmp_path / "kan", tmp_path / "build"
    assert main(["library", str(model), "--layout", "cmake", "--name", "kan", "--out", str(out), "--quiet"]) == 0
    cross = {
        "SYSTEM_NAME": "Generic",
        "C_COMPILER": "arm-none-eabi-gcc",
        "TRY_COMPILE_TARGET_TYPE": "STATIC_LIBRARY",
        "C_FLAGS": " ".join(CORE),
    }
    configure = ["cmake", "-S", out, "-B", build, *(f"-DCMAKE_{key}={value}" for key, value in cross.items())]
    for command in (configure, ["cmake", "--build", build, "--target", "kan"]):
        subprocess.run(command, check=True, capture_output=True)
    assert (build / "libkan.a").stat().st_size > 0


def test_what_is_no_library_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["library", str(model), "--layout", "arduino", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--name", "my kan"]) == 2
    assert "library name: found 'my kan', expected letters" in capsys.readouterr().err
    assert main([*arguments, "--name", "kan", "--author", "a\nurl=b"]) == 2
    assert "found several lines" in capsys.readouterr().err
    (tmp_path / "model.c").write_bytes(model.read_bytes())
    assert (
        main(["library", str(tmp_path / "model.c"), "--layout", "cmake", "--name", "kan", "--out", str(tmp_path / "o")])
        == 2
    )
    assert "found no manifest beside it" in capsys.readouterr().err
