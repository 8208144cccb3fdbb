"""The command line: one file a command."""

from kancompile.cli.main import main

__all__ = [
    "main",
]
