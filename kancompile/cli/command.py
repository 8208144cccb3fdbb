"""What a command of the command line consists of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: what users type.
        summary: what it does, in one clause.
        text: examples and explanations below the list of options.
        add_options: describes its options.
        run: does it, given the parsed options, and returns an exit code. ``options.parser`` is the whole parser.
    """

    name: str
    summary: str
    text: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
