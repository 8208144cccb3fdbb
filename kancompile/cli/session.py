"""What commands do alike: open the model and the data that options name, and keep standard output for the result.

What loads PyTorch is imported where a command needs it: wrong usage is answered at once, and a recipe needs none of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kancompile.errors import printable
from kancompile.progress import quiet


@contextlib.contextmanager
def working(options: argparse.Namespace) -> Iterator[None]:
    """Keep standard output for the result: whatever models and libraries print goes to the error stream."""
    with contextlib.redirect_stdout(sys.stderr), quiet(options.quiet):
        yield


def show_result(options: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    """Print data as JSON, or text, as the options say."""
    if options.json:
        print(json.dumps(data, indent=2, allow_nan=False))
    elif not options.quiet:
        # what files say may hold what the terminal would obey, or what its encoding cannot hold
        encoding = sys.stdout.encoding or "utf-8"
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding))


def load_float_model(options: argparse.Namespace) -> Any:
    """Build the float model that the options name."""
    from kancompile.data import load_model, parse_factory_args

    arguments = parse_factory_args(options.factory_arg)
    return load_model(options.model, options.checkpoint, arguments, options.checkpoint_key, options.trust_model)


def weights_note(options: argparse.Namespace) -> tuple[str, ...]:
    """Say where weights come from that no checkpoint gave."""
    if options.checkpoint is not None or options.model.endswith(".pt2"):
        return ()
    return ("weights are as the factory made them, untrained unless it loads some; --checkpoint FILE gives others",)


def opened_data(options: argparse.Namespace, dest: str = "data") -> Any:
    """Open what ``--calibration`` or ``--data`` names, ``dest`` being the option's name in ``options``."""
    from kancompile.data import TABLES, open_data

    spec = getattr(options, dest)
    named = [getattr(options, name, None) for name in ("calibration", "data")]
    # of two kinds of data, a transform is for those that are images; where none are, it is refused
    is_for_others = not Path(spec).is_dir() and any(other and Path(other).is_dir() for other in named)
    transform = None if is_for_others else options.transform
    is_table = [Path(other).suffix in TABLES for other in named if other]
    targets = [] if any(is_table) and Path(spec).suffix not in TABLES else options.target_column
    name = options.data_name if dest == "data" else f"--{dest}"
    return open_data(spec, transform, target_columns=targets, name=name, seed=getattr(options, "seed", 0))
