"""Wrong usage in one line: what was found, the nearest name there is, and where all stand."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the whole usage; its commands get the same."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is left over where the command is known, not at the top."""
        self._given = list(sys.argv[1:] if args is None else args)
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"found {' '.join(map(repr, left))}, which nothing takes")
        return found, left

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2; an option that there is not comes before all else."""
        options = [name for action in self._actions for name in action.option_strings]
        for token in self._given:
            name = token.partition("=")[0]
            if name.startswith("--") and len(name) > 2 and not any(option.startswith(name) for option in options):
                message = f"found no option {name!r}{nearest(name, options)}"
                break
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            text = f"found {value!r}, expected one of {', '.join(names)}{nearest(str(value), names)}"
            raise argparse.ArgumentError(action, text)


def nearest(name: str, names: Sequence[str]) -> str:
    """Name the one that was probably meant, as the end of a sentence; nothing where none is near."""
    found = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {found[0]!r}?" if found else ""
