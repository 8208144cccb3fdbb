"""README, docs, help, messages and docstrings keep to the word list of CONTRIBUTING.md."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest

from kancompile.cli.parser import command_parser
from tests.documentation_pages import PAGES, read, without_blocks

ROOT = Path(__file__).parent.parent
LIST = re.compile(r"## Words\n.*?\n\|---\|---\|\n(.*?)\n\n", re.S)
READ = [page for page in PAGES if page not in ("ARCHITECTURE.md", "CONTRIBUTING.md") and "/project/" not in page]
CODE = re.compile(r"`[^`\n]+`|\]\([^)]*\)|\w*_\w*")


def off_the_list() -> list[str]:
    """The words of the table's right column."""
    found = LIST.search(read("CONTRIBUTING.md"))
    assert found is not None
    return [word.strip() for line in found[1].splitlines() for word in line.strip("|").split("|")[1].split(",")]


def faults(text: str, words: list[str]) -> list[str]:
    prose = " ".join(CODE.sub(" ", text).split())
    return [word for word in words if re.search(rf"\b{re.escape(word)}", prose, re.I)]


@pytest.mark.parametrize("page", READ)
def test_pages_keep_to_the_word_list(page: str) -> None:
    assert faults(without_blocks(page), off_the_list()) == []


def test_help_keeps_to_the_word_list() -> None:
    parser = command_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    texts = {"kancompile": parser.format_help()} | {name: sub.format_help() for name, sub in commands.choices.items()}
    words = off_the_list()
    assert {name: found for name, text in texts.items() if (found := faults(text, words))} == {}


def test_messages_and_docstrings_keep_to_the_word_list() -> None:
    """All texts of the package with a space in them: a word alone may be a name."""
    words = off_the_list()
    any_of_them = re.compile(
        r"\b(?:" + "|".join(r"\s+".join(map(re.escape, word.split())) for word in words) + ")", re.I
    )
    found: list[str] = []
    for path in sorted((ROOT / "kancompile").rglob("*.py")):
        text = path.read_text()
        nodes = ast.walk(ast.parse(text)) if any_of_them.search(text) else ()
        texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        found += [
            f"{path.name}:{node.lineno}: {word}"
            for node in texts
            if " " in node.value
            for word in faults(node.value, words)
        ]
    assert found == []


def test_the_list_is_found_and_faults_are_noticed() -> None:
    words = off_the_list()
    assert len(words) > 20
    assert faults("All candidates run in\nturns; the colour of a `look-up`.", words) == ["in turns", "colour"]
