"""The command ``kancompile``: reads arguments, runs a command, turns errors into exit codes.

Nothing here imports PyTorch before a command really runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from kancompile.cli.exit_codes import INTERNAL, INTERRUPTED, OK, THRESHOLD_MISSED, USAGE
from kancompile.cli.parser import command_parser
from kancompile.errors import KanCompileError, ThresholdMissedError
from kancompile.processes import refuse_several


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = command_parser()
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        parser.print_help()
        return OK
    options = parser.parse_args(given)
    try:
        if options.command != "compile":
            refuse_several(options.command)
        _filter_warnings()
        code = int(options.run(options))
        sys.stdout.flush()  # here a closed pipe can still be handled
        return code
    except ThresholdMissedError as error:
        print(f"kancompile: threshold missed, nothing written: {error}", file=sys.stderr)
        return THRESHOLD_MISSED
    except KanCompileError as error:
        print(f"kancompile: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("kancompile: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader, such as head, has what it wanted; stop Python from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception:
        traceback.print_exc()
        print("kancompile: internal error; please report it with the text above", file=sys.stderr)
        return INTERNAL


def _filter_warnings() -> None:
    """Hide what libraries tell their developers; warnings meant for users stay."""
    import warnings

    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
