"""Read and write the JSON files of measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kancompile.compiler.atomic_write import write_atomically


def write_results(path: Path, results: Any) -> None:
    """Write plain data as JSON, replacing the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path: (json.dumps(results, indent=1) + "\n").encode()}, force=True)


def read_results(path: Path) -> Any:
    """Read what :func:`write_results` wrote.

    Raises:
        SystemExit: the file is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path}: {error}; move it away to begin anew") from error
