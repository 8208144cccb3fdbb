"""Keep measured facts in a file of JSON lines, so that tuning goes on where it was interrupted.

A line is ``{"key": sha256, "fact": {...}}``. The key hashes what was measured together with everything that the measurement
depends on: the float program, the samples, the seed and the version. A line that a power cut or Ctrl-C left half written is
skipped, and what is written next begins on a line of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from kancompile.errors import KanCompileError, read_bytes, shown

Fact = TypeVar("Fact")
_MOST_BYTES = 1 << 28


class TuneCache:
    """A file of facts.

    Attributes:
        path: the file; it and its folder are created when the first fact is put.
        context: plain data that every key depends on.
        hits: facts that were found in the file.
    """

    def __init__(self, path: Path, context: Mapping[str, Any]) -> None:
        """Read the file where it exists.

        Raises:
            KanCompileError: it cannot be read.
        """
        self.path, self.context, self.hits = path, dict(context), 0
        self._facts: dict[str, dict[str, Any]] = {}
        self._ends_midline = False
        way_out = "delete it or give another folder"
        content = read_bytes(path, f"cache {str(path)!r}", way_out, _MOST_BYTES) if path.exists() else b""
        for line in content.split(b"\n"):
            try:
                entry = json.loads(line)
                self._facts[str(entry["key"])] = dict(entry["fact"])
            except Exception:  # an empty or half-written line, or one that is nobody's
                continue
        self._ends_midline = bool(content) and not content.endswith(b"\n")

    def __len__(self) -> int:
        """Count the facts."""
        return len(self._facts)

    def get(self, key: Mapping[str, Any], kind: type[Fact]) -> Fact | None:
        """Return the fact, a dataclass of plain values, that was put under a key.

        Raises:
            KanCompileError: it has other fields, or other types in them.
        """
        fact, types = self._facts.get(self._hash(key)), get_type_hints(kind)
        if fact is None:
            return None
        if fact.keys() != types.keys() or not all(_is_of(fact[name], types[name]) for name in types):
            raise KanCompileError(
                f"cache {str(self.path)!r}: found a fact {shown(fact)}, expected the fields of {kind.__name__}; delete the file"
            )
        self.hits += 1
        return kind(**fact)

    def put(self, key: Mapping[str, Any], fact: Any) -> None:
        """Append a fact, a dataclass of plain values, in one write.

        Raises:
            KanCompileError: the file cannot be written.
        """
        hashed = self._hash(key)
        self._facts[hashed] = asdict(fact)
        text = json.dumps({"key": hashed, "about": dict(key), "fact": asdict(fact)}, sort_keys=True) + "\n"
        line = (b"\n" if self._ends_midline else b"") + text.encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                written = os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise KanCompileError(
                f"cache {str(self.path)!r}: cannot be written ({error.strerror}); free space or give another folder"
            ) from error
        self._ends_midline = written < len(line)  # a disk that is full takes a part

    def _hash(self, key: Mapping[str, Any]) -> str:
        text = json.dumps({"context": self.context, "about": dict(key)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))
