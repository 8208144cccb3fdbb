"""Put a model's C files where build systems look: an Arduino library, or a CMake project with an example.

The Arduino layout is that of the Arduino library specification (``library.properties``, ``src``, ``examples``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kancompile.errors import KanCompileError

ARDUINO, CMAKE = "arduino", "cmake"
LAYOUTS = (ARDUINO, CMAKE)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
_LINE = re.compile(r"[^\r\n]*")


@dataclass(frozen=True)
class LibraryFacts:
    """What a library says of itself.

    Attributes:
        name: an identifier, which the main header and the folder are called by.
        version: of the model, such as ``"1.0.0"``.
        author: who made it; nobody is named unless given.
        url: of its page; may be empty.
    """

    name: str
    version: str = "1.0.0"
    author: str = "unknown"
    url: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise KanCompileError(
                f"library name: found {self.name!r}, expected letters, digits and underscores, a letter first, such as digits_kan"
            )
        if not re.fullmatch(r"\d+\.\d+\.\d+", self.version):
            raise KanCompileError(f"library version: found {self.version!r}, expected three numbers, such as 1.0.0")
        for what in ("author", "url"):
            if not _LINE.fullmatch(getattr(self, what)):
                raise KanCompileError(f"library {what}: found several lines, expected one")


def library_files(source: bytes, header: bytes, facts: LibraryFacts, layout: str) -> dict[str, bytes]:
    """Give a library's files by their paths below its folder.

    Args:
        source, header: ``model.c`` and ``model.h``.
        facts: what the library says of itself.
        layout: ``"arduino"`` or ``"cmake"``.
    """
    texts = _arduino(facts) if layout == ARDUINO else _cmake(facts)
    folder = "src/" if layout == ARDUINO else ""
    files = {f"{folder}model.c": source, f"{folder}model.h": header}
    return {path: text.encode() for path, text in texts.items()} | files


def _arduino(facts: LibraryFacts) -> dict[str, str]:
    name = facts.name
    properties = {
        "name": name,
        "version": facts.version,
        "author": facts.author,
        "maintainer": facts.author,
        "sentence": "A Kolmogorov-Arnold Network in integer C.",
        "paragraph": "Compiled by kancompile: lookup tables and integer weights, no heap, no floating point but at both ends.",
        "category": "Data Processing",
        "url": facts.url,
        "architectures": "*",
        "includes": f"{name}.h",
    }
    keywords = [
        ("kan_model_state", 1),
        *((f"kan_model_{what}", 2) for what in ("quantize", "run", "output", "largest")),
    ]
    return {
        "library.properties": "".join(f"{key}={value}\n" for key, value in properties.items()),
        "keywords.txt": "".join(f"{word}\tKEYWORD{kind}\n" for word, kind in keywords),
        f"src/{name}.h": f'#ifndef {name.upper()}_H\n#define {name.upper()}_H\n\n#include "model.h"\n\n#endif\n',
        "examples/Classify/Classify.ino": _SKETCH.replace("LIBRARY", name),
    }


def _cmake(facts: LibraryFacts) -> dict[str, str]:
    return {
        "CMakeLists.txt": _LISTS.replace("LIBRARY", facts.name).replace("VERSION_OF_IT", facts.version),
        "main.c": _MAIN,
    }


_SKETCH = """\
#include <LIBRARY.h>

static kan_model_state state;        // all memory that the model needs
static float x[KAN_MODEL_INPUTS];    // inputs, scaled as in training
static float y[KAN_MODEL_OUTPUTS];

void setup() {
  Serial.begin(115200);
}

void loop() {
  // fill x from your sensors here
  const unsigned long start = micros();
  kan_model_quantize(&state, x);
  kan_model_run(&state);
  const unsigned long took = micros() - start;
  kan_model_output(&state, y);
  Serial.print("largest output: ");
  Serial.print(kan_model_largest(&state));
  Serial.print(", microseconds: ");
  Serial.println(took);
  delay(1000);
}
"""

_LISTS = """\
cmake_minimum_required(VERSION 3.13)
project(LIBRARY VERSION VERSION_OF_IT LANGUAGES C)

# the model as a library: target_link_libraries(your_program PRIVATE LIBRARY)
add_library(LIBRARY STATIC model.c)
target_include_directories(LIBRARY PUBLIC ${CMAKE_CURRENT_SOURCE_DIR})
set_target_properties(LIBRARY PROPERTIES C_STANDARD 99 C_EXTENSIONS OFF)

# reads float32 samples from standard input and writes float32 outputs
if(CMAKE_SOURCE_DIR STREQUAL CMAKE_CURRENT_SOURCE_DIR)
  add_executable(LIBRARY_example main.c)
  set_target_properties(LIBRARY_example PROPERTIES C_STANDARD 99 C_EXTENSIONS OFF)
  target_link_libraries(LIBRARY_example PRIVATE LIBRARY)
endif()
"""

_MAIN = """\
/* Read samples as float32 from standard input, write the outputs as float32 to standard output. */
#include "model.h"

#include <stdio.h>

int main(void)
{
    static kan_model_state state;
    static float x[KAN_MODEL_INPUTS], y[KAN_MODEL_OUTPUTS];
    while (fread(x, sizeof x, 1, stdin) == 1) {
        kan_model_quantize(&state, x);
        kan_model_run(&state);
        kan_model_output(&state, y);
        if (fwrite(y, sizeof y, 1, stdout) != 1) {
            return 1;
        }
    }
    return 0;
}
"""
