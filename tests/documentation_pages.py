"""The pages of the documentation, their code blocks, links and headings, and a way to run the blocks."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
        *ROOT.glob("docs/**/*.md"),
    )
    if "_build" not in path.parts
)
EXIT_CODES = {"kancompile: threshold missed": 1, "kancompile: error": 2}
# a timing is no result here: one batch size and a few repeats show that the command runs
SHORT_BENCHMARK = ["--batch-sizes", "1", "--threads", "1", "--repeats", "3"]

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+)(?P<language>[^\s`]*)[^\n`]*\n(?P<text>.*?)^ *(?P=ticks) *$", re.M | re.S
)
_MARK = re.compile(r"<!-- not run: (?P<reason>[^\n]+?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path in the repository.
        line: of the fence.
        language: first word behind the fence, which may be empty.
        text: what it holds.
        not_run: the reason that the page gives for not running it, or ``None``.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str | None


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """List the fenced blocks of a page in their order."""
    text = read(page)
    found = []
    for match in _FENCE.finditer(text):
        mark = _MARK.search(text[: match.start()])
        depth = len(match["indent"])
        body = "\n".join(line[depth:] if line[:depth].isspace() else line for line in match["text"].splitlines()) + "\n"
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], body, mark["reason"] if mark else None))
    return found


def without_blocks(page: str) -> str:
    return _FENCE.sub("", read(page))


def headings(page: str) -> set[str]:
    """The anchors of a page, as GitHub and MyST name them."""
    lines = re.findall(r"^#+ (.+)$", without_blocks(page), re.M)
    words = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line).lower()) for line in lines)
    return {word.strip().replace(" ", "-") for word in words}


def links(page: str) -> list[str]:
    """The targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "``", without_blocks(page)))


class Runner:
    """Run the blocks of one page one after the other: in one Python namespace, in one folder."""

    def __init__(self, folder: Path, names: dict[str, Any]) -> None:
        self.folder = folder
        self.names = {"__name__": "__main__"} | names  # a module that exists: dataclasses look it up

    def run(self, block: Block) -> None:
        """Run a block.

        Raises:
            AssertionError: a command's exit code or output is not what the page says.
        """
        if block.language == "python":
            # as many newlines in front as there are lines above, so that a traceback names the line of the page
            code = compile("\n" * block.line + block.text, str(ROOT / block.page), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.names)
        else:
            for command, shown in commands(block):
                output, code = self.command(command)
                expected = next((code for text, code in EXIT_CODES.items() if any(text in line for line in shown)), 0)
                where = f"{block.page}, line {block.line}: {command}\n{output}"
                assert code == expected, f"exit code {code} instead of {expected}\n{where}"
                missing = first_missing(shown, output.splitlines())
                assert missing is None, f"the page shows a line that was not printed: {missing!r}\n{where}"

    def command(self, command: str) -> tuple[str, int]:
        """Run a command line, one of kancompile in this process, and return its output and exit code."""
        words = shlex.split(command, comments=True)
        if words[:1] == ["kancompile"] and words[-2:-1] == [">"]:
            output, code = self.command(shlex.join(words[:-2]))
            (self.folder / words[-1]).write_text(output)
            return "", code
        if words[:1] != ["kancompile"]:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                ["bash", "-c", command], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
            )
            return done.stdout + done.stderr, done.returncode
        from kancompile.cli.main import main

        if words[1] == "benchmark":
            words += SHORT_BENCHMARK
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = main(words[1:])
            except SystemExit as error:  # argparse, for --help and wrong usage
                code = int(error.code or 0)
        return output.getvalue(), code


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Split a block into commands, each with the output lines that the page shows (``console`` blocks only)."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            if line.strip():
                found[-1][1].append(line)
        elif line.strip() and not line.startswith("#"):
            found.append((line.removeprefix("$ ") if block.language == "console" else line, []))
    return found


def first_missing(shown: list[str], output: list[str]) -> str | None:
    """Return the first line of ``shown`` that ``output`` lacks; the order counts, and ``...`` stands for anything."""
    rest = iter(output)
    for line in shown:
        pattern = ".*".join(re.escape(part) for part in re.split(r"\.\.\.", " ".join(line.split())))
        if not any(re.fullmatch(pattern, " ".join(printed.split())) for printed in rest):
            return line
    return None
