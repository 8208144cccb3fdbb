"""Whatever the content of a file, its reader accepts it or says what is wrong with it, and soon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kancompile.cli.main import main
from kancompile.data.model import parse_factory_args
from kancompile.errors.exceptions import KanCompileError
from kancompile.errors.foreign import check_form, foreign, parse_json, parse_literal, shown
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
