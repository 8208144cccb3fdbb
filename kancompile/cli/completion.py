"""``kancompile completion``: scripts that complete ``kancompile`` in bash, zsh and fish, written from its own argument parser.

The scripts are static, so that pressing Tab starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kancompile.cli.command import Command
from kancompile.cli.exit_codes import OK
from kancompile.cli.session import show_result

SHELLS = ("bash", "zsh", "fish")
TEXT = """\
examples:
  kancompile completion bash > ~/.local/share/bash-completion/completions/kancompile
  kancompile completion zsh > ~/.zfunc/_kancompile
  kancompile completion fish > ~/.config/fish/completions/kancompile.fish

Completes commands, options and their choices. For zsh the folder must be in fpath before compinit runs."""


@dataclass(frozen=True)
class _Option:
    names: tuple[str, ...]
    meaning: str
    choices: tuple[str, ...]
    takes_value: bool


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Write the completion script of a parser with subcommands.

    Args:
        parser: the parser.
        shell: one of :data:`SHELLS`.
    """
    commands = {name: (_meaning(text), list(_options(sub))) for name, text, sub in _commands(parser)}
    writers: dict[str, Callable[[str, _Commands], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return writers[shell](parser.prog, commands)


_Commands = dict[str, tuple[str, list[_Option]]]


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, sub in action.choices.items():
                yield name, texts.get(name, ""), sub


def _options(parser: argparse.ArgumentParser) -> Iterator[_Option]:
    for action in parser._actions:
        choices = tuple(map(str, action.choices or ()))
        yield _Option(tuple(action.option_strings), _meaning(action.help or ""), choices, action.nargs != 0)


def _meaning(text: str) -> str:
    """Shorten a help text to its first clause, in characters that no shell reads as its own."""
    short = text.replace("%%", "%").split(";")[0].split(" (")[0]
    return "".join(letter for letter in short if letter.isalnum() or letter in " .,-_/")[:60].strip()


def _bash(prog: str, commands: _Commands) -> str:
    cases, values = [], []
    for name, (_, options) in commands.items():
        words = [word for option in options for word in option.names]
        words += [choice for option in options if not option.names for choice in option.choices]
        cases.append(f'    {name}) words="{" ".join(words)}" ;;')
        for option in options:
            if option.names and option.takes_value:
                names = "|".join(f"{name}:{word}" for word in option.names)
                action = (
                    f'COMPREPLY=($(compgen -W "{" ".join(option.choices)}" -- "$current"))' if option.choices else ":"
                )
                values.append(f"    {names}) {action}; return ;;")
    return f"""\
# {prog}: completion for bash
_{prog}() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD - 1]}}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$current"))
    return
  fi
  # values of options: choices where there are some, else the names of files
  case "${{COMP_WORDS[1]}}:$previous" in
{chr(10).join(values)}
  esac
  case "${{COMP_WORDS[1]}}" in
{chr(10).join(cases)}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _{prog} {prog}
"""


def _zsh(prog: str, commands: _Commands) -> str:
    names = " ".join(f"'{name}:{text}'" for name, (text, _) in commands.items())
    cases = []
    for name, (_, options) in commands.items():
        lines = []
        for option in options:
            value = f"({' '.join(option.choices)})" if option.choices else "_files"
            if not option.names:
                lines.append(f"'*:{option.meaning}:{value}'")
            ending = f":value:{value}'" if option.takes_value else "'"
            lines += [f"'*{word}[{option.meaning}]{ending}" for word in option.names]
        cases.append(f"    {name}) _arguments {' '.join(lines)} ;;")
    return f"""\
#compdef {prog}
# {prog}: completion for zsh
_{prog}() {{
  if (( CURRENT == 2 )); then
    local -a commands=({names})
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
{chr(10).join(cases)}
  esac
}}
if [ "$funcstack[1]" = "_{prog}" ]; then _{prog} "$@"; else compdef _{prog} {prog}; fi
"""


def _fish(prog: str, commands: _Commands) -> str:
    lines = [f"# {prog}: completion for fish"]
    for name, (text, options) in commands.items():
        lines.append(f"complete -c {prog} -n __fish_use_subcommand -f -a {name} -d '{text}'")
        inside = f"complete -c {prog} -n '__fish_seen_subcommand_from {name}'"
        for option in options:
            # -s is a short option, -l a long one
            words = " ".join(f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}" for word in option.names)
            value = " -r" if option.takes_value and option.names else ""
            choices = f" -f -a '{' '.join(option.choices)}'" if option.choices else ""
            if words or choices:
                lines.append(f"{inside}{' ' if words else ''}{words}{value}{choices} -d '{option.meaning}'")
    return "\n".join(lines) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the options of the command."""
    parser.add_argument("shell", choices=SHELLS, help="which shell")


def run(options: argparse.Namespace) -> int:
    """Print the completion script of a shell."""
    script = completion_script(options.parser, options.shell)
    show_result(options, {"shell": options.shell, "script": script}, script.rstrip())
    return OK


COMMAND = Command("completion", "print a script that completes commands in a shell", TEXT, add_options, run)
