"""Whatever the content of a file, its reader accepts it or says what is wrong with it, and soon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kancompile.cli.main import main
from kancompile.data.model import parse_factory_args
from kancompile.errors.exceptions import KanCompileError, ThresholdMissedError
from kancompile.errors.foreign import (
    check_depth,
    check_form,
    foreign,
    naming_file,
    parse_json,
    parse_literal,
    read_bytes,
    shown,
)
from kancompile.recipe import read_recipe

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "error", [RecursionError(), MemoryError("4 TiB"), OverflowError("x"), AttributeError("y"), OSError(5, "z")]
)
def test_whatever_a_reader_raises_is_the_files_fault(error: Exception) -> None:
    with (
        pytest.raises(KanCompileError, match=r"^file 'f': cannot be read \(.+\); mend it$") as caught,
        foreign("file 'f'", "mend it"),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, KanCompileError])
def test_ctrl_c_exits_and_errors_of_our_own_pass(kind: type[BaseException]) -> None:
    with pytest.raises(kind, match=r"^as it is$"), foreign("file 'f'", "mend it"):
        raise kind("as it is")


def test_json_can_be_written_as_json_again() -> None:
    read = parse_json('{"a": NaN, "b": [1e999, -Infinity, 1.5], "c": "\\ud800"}')
    assert read == {"a": "NaN", "b": ["1e999", "-Infinity", 1.5], "c": "\ud800"}
    json.dumps(read, allow_nan=False)
    for text in ("[" * 70 + "]" * 70, DEEP, "9" * 5000, "{"):
        with pytest.raises(Exception):  # noqa: B017, PT011 (of any kind, which `foreign` takes)
            parse_json(text)


def test_forms_name_the_place_that_does_not_fit() -> None:
    form = {"a": [{"b": int, "c?": (str, type(None))}], "d?": float}
    check_form({"a": [{"b": 1}, {"b": 2, "c": None}], "d": 3, "more": 0}, form, "f", "mend it")
    for content, text in (
        ([], "found [] at the top, expected keys and values"),
        ({}, "found no 'a' at the top"),
        ({"a": {}}, "found {} at .a, expected a list"),
        ({"a": [{"b": True}]}, "found True at .a[0].b, expected int"),
        ({"a": [{"b": 1, "c": 2}]}, "found 2 at .a[0].c, expected str or null"),
        ({"a": [], "d": "x"}, "found 'x' at .d, expected float"),
    ):
        with pytest.raises(KanCompileError) as caught:
            check_form(content, form, "f", "mend it")
        assert str(caught.value) == f"f: {text}; mend it"


def test_values_are_shown_in_bounded_length() -> None:
    assert shown("a" * 9) == repr("a" * 9)
    assert len(shown([0] * 10_000)) < 400
    assert shown(1 << 30_000) == "a int that cannot be shown"


@pytest.mark.parametrize(
    "text", [DEEP, "-" * 100_000 + "1", "9" * 5000, "{[]: 1}", "'\0'", "+".join("1" * 100_000), "f(1)"]
)
def test_texts_that_are_no_literals_are_texts(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_literal(text)
    if "[" in text:
        with pytest.raises(KanCompileError, match="is no Python literal"):
            parse_factory_args([f"n={text}"])


def test_errors_fit_on_a_screen_with_their_end() -> None:
    for text in (
        "who: found " + "x" * 50_000 + ", expected y; do z",
        "who: found\n" + "line\n" * 500 + "do z",
        "x\n" * 19 + "y" * 9_000,
    ):
        told = str(KanCompileError(text))
        assert len(told) <= 1_900
        assert told.count("\n") < 24
        assert (told[:3], told[-4:]) == (text[:3], text[-4:])
    assert str(KanCompileError("short\nand whole")) == "short\nand whole"


def test_errors_steer_no_terminal() -> None:
    assert str(KanCompileError("found 'a\x1b[2J\r\x9b\ud800\u2028é'")) == r"found 'a\x1b[2J\r\x9b\ud800\u2028é'"


@pytest.mark.parametrize("kind", [KanCompileError, ThresholdMissedError])
def test_errors_about_content_name_the_file(kind: type[KanCompileError]) -> None:
    for source in ("a/b.npy", Path("a/b.npy")):
        with pytest.raises(kind, match=r"^data: found nan \(in 'a/b.npy'\)$"), naming_file(source):
            raise kind("data: found nan")
    for text, source in (
        ("data 'a/b.npy': found nan", "a/b.npy"),
        ("data: found nan", None),
        ("data: found nan", [1.0]),
    ):
        with pytest.raises(kind) as caught, naming_file(source):
            raise kind(text)
        assert str(caught.value) == text


def test_values_of_a_recipe_name_its_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('weight_bits = 99\n[layers."a"]\nweight_bits = 4\n')
    with pytest.raises(KanCompileError, match=r"weight_bits is 99, .*\(in '.*r\.toml'\)$"):
        read_recipe(tmp_path / "r.toml", levels=64)
    (tmp_path / "r.toml").write_text("weight_bits = 4")
    with pytest.raises(KanCompileError, match=r"levels is 1, expected an integer 4 to 65536 or unset$"):
        read_recipe(tmp_path / "r.toml", levels=1)


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert read_bytes(tmp_path / "f", "file", "mend it", 5) == b"12345"
    with pytest.raises(KanCompileError, match=r"^file: found more than 4 bytes, expected a smaller file; mend it$"):
        read_bytes(tmp_path / "f", "file", "mend it", 4)


def test_few_lines_that_mean_millions_of_values() -> None:
    value: Any = "x"
    for _ in range(9):
        value = [value] * 10
    with pytest.raises(ValueError, match="more than 4,194,304 values"):
        check_depth(value)


RECIPES = {
    "deep.json": DEEP,
    "deep but closed.json": '{"levels": ' + "[" * 900 + "]" * 900 + "}",
    "huge.json": '{"levels": ' + "9" * 5000 + "}",
    "infinite.json": '{"percentile": Infinity}',
    "number in layers.json": '{"layers": [1]}',
    "half a pair.json": '{"layers": [["a"]]}',
    "more than a pair.json": '{"layers": [["a", {}, 1]]}',
    "rows of lists.json": '{"layers": [["a", [[[1], 2]]]]}',
    "deep.toml": "a = " + DEEP,
    "deep tables.toml": "a = " + "{a=" * 50_000,
    "huge.toml": "levels = " + "9" * 5000,
    "huge in another base.toml": "levels = 0x" + "F" * 5000,
    "number in layers.toml": "layers = [1]",
    "dotted.toml": "a." * 50_000 + "b = 1",
    "dotted and quoted.toml": '"a" . ' * 50_000 + "b = 1",
    "dotted and quoted otherwise.toml": "'a'." * 50_000 + "b = 1",
    "dotted table.toml": "[" + "a." * 50_000 + "b]",
    "long.toml": "#" * 3_000_000,
    "long word.toml": "a" * 900_000,
    "not text.toml": "\ud800",
    "date.toml": "levels = 1979-05-27",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(RECIPES[name], encoding="utf-8", errors="surrogatepass")
    started = time.process_time()
    with pytest.raises(KanCompileError, match=r"^recipe"):
        read_recipe(tmp_path / name)
    assert time.process_time() - started < 1


def test_recipes_that_never_end(tmp_path: Path) -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("needs a file without an end")
    (tmp_path / "r.toml").symlink_to("/dev/zero")
    with pytest.raises(KanCompileError, match=r"more than 1,048,576 bytes"):
        read_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize(
    "recipe", [{1: 2}, {"layers": {"a": {1: 2}}}, {"layers": {"a": 3}}, {"levels": 1 << 30_000}, {"method": [1]}]
)
def test_recipes_as_mappings(recipe: Any) -> None:
    with pytest.raises(KanCompileError, match=r"^recipe"):
        read_recipe(recipe)


def test_overrides_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--layer", "a", "levels={[]: 1}"]) == 2
    assert "recipe: levels is '{[]: 1}'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compile", "m:M", "--calibration", "x.npz", "--out", "o", "--seed", str(1 << 64)])
    assert "is no seed" in capsys.readouterr().err
