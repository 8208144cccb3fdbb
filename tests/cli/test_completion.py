"""Completion: what the real shells offer, and that no option is forgotten."""

import subprocess
from pathlib import Path

import pytest

from kancompile.cli.completion import SHELLS, completion_script
from kancompile.cli.main import main
from kancompile.cli.parser import command_parser


def _run(shell: str, script: str, *arguments: str) -> list[str]:
    process = subprocess.run(
        [shell, *arguments, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )
    assert process.stderr == ""
    return process.stdout.split("\n")


def _bash(line: str) -> set[str]:
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    script = completion_script(command_parser(), "bash")
    call = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _kancompile; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    return set(filter(None, _run("bash", f"{script}\n{call}", "--norc", "--noprofile")))


def _fish(line: str) -> set[str]:
    script = completion_script(command_parser(), "fish")
    lines = _run("fish", f"{script}\ncomplete -C '{line}'", "--no-config")
    return {text.split("\t")[0] for text in lines if text}


@pytest.mark.parametrize(
    "complete",
    [pytest.param(_bash, marks=pytest.mark.needs("bash")), pytest.param(_fish, marks=pytest.mark.needs("fish"))],
)
def test_shells_complete_commands_options_and_choices(
    complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert {"compile", "completion"} <= complete("kancompile comp")
    assert "validate" not in complete("kancompile comp")
    assert {"--calibration", "--calibration-key"} <= complete("kancompile compile --cal")
    assert "--runtime" in complete("kancompile validate --ru")
    assert "--runtime" not in complete("kancompile compile --ru")
    assert {"gptq", "awq", "auto"} <= complete("kancompile compile m.py:f --method ")
    assert complete("kancompile compile --method gp") >= {"gptq"}
    assert {"bash", "zsh"} <= complete("kancompile completion ")


@pytest.mark.needs("zsh")
def test_zsh_accepts_the_script_and_registers_it() -> None:
    script = completion_script(command_parser(), "zsh")
    loaded = (
        f"autoload -Uz compinit; compinit -D -u\n{script}\nprint -r -- $_comps[kancompile] $+functions[_kancompile]"
    )
    assert _run("zsh", loaded, "-f")[0] == "_kancompile 1"


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_of_every_command_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    choices = next(action.choices for action in command_parser()._actions if action.dest == "command")
    assert isinstance(choices, dict)
    for name, parser in choices.items():
        assert name in script
        for action in parser._actions:
            for option in action.option_strings:
                spelled = f"-l {option[2:]}" if shell == "fish" and option.startswith("--") else option
                assert spelled in script or (shell == "fish" and f"-s {option[1:]}" in script), option
