"""The emitted C as a source file: compilers, memory, equal bytes, and what stands beside it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from kancompile.compiler.compile import compile
from kancompile.compiler.compiled_model import CompiledModel
from kancompile.errors.exceptions import KanCompileError
from kancompile.targets import TARGETS
from kancompile.targets.c99 import companions, emit, facts
from tests.compiled_kan import make_inputs, make_model
from tests.convolution_programs import integer_convolutions, square
from tests.programs import integer_program
from tests.targets.c_programs import STRICT, WORDS, build, evaluate, macro, write
from tests.targets.test_ort_cpu import inputs

WARNINGS = ("-Wall", "-Wextra", "-Werror")
STRICT_CASES = {
    "linear": lambda: integer_program((9, 21, 3), weight_bits=5),
    "scale groups": lambda: integer_program(groups=3, levels=(256, 1024)),
    "wide rows": lambda: integer_program((5, 4, 3), levels=(1024, 512), k=40, tables=2),
    "convolutions": lambda: integer_convolutions(
        (4, 6, 6), [square(6, 3, padding=1, groups=2, features=(1, 4)), square(3, 3)]
    ),
    "depthwise": lambda: integer_convolutions((6, 6, 6), [square(6, 3, padding=1, groups=6)], zero_point=3),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.needs(name)) for name in ("gcc", "clang")])
@pytest.mark.parametrize("case", STRICT_CASES)
def test_compiles_without_warnings(case: str, name: str, tmp_path: Path) -> None:
    program = STRICT_CASES[case]()
    x = inputs(program, 20)
    write(program, tmp_path)
    for words in WORDS:
        found = evaluate(build(tmp_path, [*STRICT, "-O2", words], name), x)
        np.testing.assert_array_equal(found, program(x).numpy())


@pytest.mark.needs("gcc")
def test_portable_code_without_gnu_builtins(tmp_path: Path) -> None:
    program = integer_program((9, 8, 3), levels=(256, 1024), groups=2)
    write(program, tmp_path)
    text = (tmp_path / "model.c").read_text()
    assert text.count("#ifdef __GNUC__") == 2
    (tmp_path / "model.c").write_text(text.replace("#ifdef __GNUC__", "#ifdef KAN_NEVER"))
    x = inputs(program)
    np.testing.assert_array_equal(evaluate(build(tmp_path, [*STRICT, "-O2"]), x), program(x).numpy())


@pytest.mark.needs("gcc")
def test_header_and_source_agree(tmp_path: Path) -> None:
    folder = write(integer_program(), tmp_path)
    source, header = (folder / "model.c").read_text(), (folder / "model.h").read_text()
    assert header.split("*/\n", 1)[1].strip() in source
    both = folder / "both.c"
    both.write_text('#include "model.h"\n#include "model.c"\n')
    build(folder, STRICT)
    subprocess.run(["gcc", *WARNINGS, "-c", str(both), "-o", str(folder / "o")], check=True)


@pytest.mark.needs("g++")
def test_header_is_cpp_too(tmp_path: Path) -> None:
    folder = write(integer_program(), tmp_path)
    cpp = folder / "user.cpp"
    cpp.write_text('#include "model.h"\nvoid f(kan_model_state *s) { kan_model_run(s); }\n')
    subprocess.run(["g++", *WARNINGS, "-c", str(cpp), "-o", str(folder / "o")], check=True)


def test_no_float_between_quantization_and_output() -> None:
    text = emit(integer_program(levels=(256, 1024), groups=2), {}).decode()
    begin, end = (
        text.index("static void kan_quantize0"),
        text.index("void kan_model_output(const kan_model_state *state, float y[KAN_MODEL_OUTPUTS])\n{"),
    )
    layers = text[text.index("\n}\n", begin) : end]
    assert "kan_layer1" in layers
    code = [line for line in layers.splitlines() if not line.lstrip().startswith(("/*", "void kan_model_quantize"))]
    assert not [line for line in code if "float" in line and "kan_float(" not in line]
    assert not {"malloc", "<math.h>", "<string.h>"} & set(text.split())


@pytest.mark.needs("gcc")
def test_stated_memory_is_what_the_compiler_finds(tmp_path: Path) -> None:
    for number, program in enumerate(
        [integer_program((7, 5, 3), levels=(1024, 256)), integer_convolutions((3, 5, 5), [square(4, 3)])]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(program, folder)
        main = '#include "model.h"\nint main(void) { return sizeof(kan_model_state) != KAN_MODEL_RAM_BYTES; }\n'
        (folder / "program.c").write_text(main)
        subprocess.run([build(folder, STRICT)], check=True)
        size = subprocess.run(["size", "-A", "program"], cwd=folder, capture_output=True, text=True)
        sections = {line.split()[0]: int(line.split()[1]) for line in size.stdout.splitlines() if line.startswith(".")}
        stated = macro((folder / "model.c").read_text(), "FLASH_BYTES")
        assert stated <= sections[".rodata"] <= stated + 2048  # alignment, and constants that the compiler makes itself


def test_weights_take_as_few_bytes_as_their_bits_need() -> None:
    sizes = {
        bits: facts(emit(integer_program((64, 64, 10), k=9, weight_bits=bits), {}))["stored_bytes"]
        for bits in range(2, 9)
    }
    for bits, size in sizes.items():
        saved = 64 * 64 * 9 * (8 - bits) // 8
        assert sizes[8] - size >= saved, bits


def test_equal_programs_give_equal_bytes() -> None:
    first, second = (emit(integer_program(seed=3), {"a": "b"}) for _ in range(2))
    assert first == second
    assert emit(integer_program(seed=4), {"a": "b"}) != first


@pytest.mark.needs("gcc")
def test_fast_math_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.c").write_bytes(emit(integer_program(), {}))
    command = ["gcc", "-std=c99", "-ffast-math", "-c", "model.c"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "without -ffast-math" in done.stderr


@pytest.mark.needs("gcc")
def test_metadata_cannot_leave_its_comment(tmp_path: Path) -> None:
    source = emit(integer_program(), {"kancompile.layers": "*/ #error /* caf\u00e9 ??/"})
    (tmp_path / "model.c").write_bytes(source)
    subprocess.run(["gcc", *STRICT, "-c", "model.c"], cwd=tmp_path, check=True)


@pytest.fixture(scope="module")
def small() -> CompiledModel:
    return compile(make_model(), make_inputs(), target="c99")


def test_compiled_model_saves_source_header_and_manifest(small: CompiledModel, tmp_path: Path) -> None:
    path = small.save(tmp_path / "kan.c")
    assert {file.name for file in tmp_path.iterdir()} >= {"kan.c", "kan.h"}
    assert len(list(tmp_path.iterdir())) == 3
    assert small.manifest["stored_bytes"] == macro(path.read_text(), "FLASH_BYTES")
    assert small.manifest["ram_bytes"] == macro(path.read_text(), "RAM_BYTES")
    with pytest.raises(KanCompileError, match="file exists"):
        small.save(tmp_path / "kan.c")
    (tmp_path / "kan.c").unlink()
    with pytest.raises(KanCompileError, match="file exists"):
        small.save(tmp_path / "kan.c")
    assert not (tmp_path / "kan.c").exists()


def test_latency_budget_is_refused() -> None:
    with pytest.raises(KanCompileError, match="max_latency_us with target 'c99'"):
        compile(make_model(), make_inputs(), target="c99", recipe={"max_latency_us": 100})


def test_byte_budget_counts_constants_not_text(small: CompiledModel) -> None:
    limit = small.manifest["stored_bytes"] - 60
    fitted = compile(make_model(), make_inputs(), target="c99", recipe={"max_bytes": limit, "levels": 64})
    assert fitted.manifest["stored_bytes"] <= limit < len(fitted.model_bytes)


def test_registry() -> None:
    target = TARGETS["c99"]
    assert target.suffix == ".c"
    assert target.companions is not None
    source = target.emit(integer_program(), {}, "smallest")
    assert target.companions(source) == companions(source)
    assert set(target.companions(source)) == {".h"}
