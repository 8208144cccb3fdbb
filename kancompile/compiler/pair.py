"""A file and its manifest are one pair: whoever reads a manifest can tell whether it belongs to the file beside it and is whole.

The manifest names the hash of the file and the hash of what it says itself. The file holds recipe, layers, versions and the hash
of the samples, but not a hash of its manifest, which says what was measured: then files of equal models would differ in the
last digits that another number of threads gives a measurement.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kancompile.errors import parse_json

_OWN_HASH = "manifest_sha256"


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Add the hash of what a manifest says."""
    return {**manifest, _OWN_HASH: _hash(manifest)}


def why_torn(manifest: Any, content: bytes) -> str | None:
    """Say in a clause why a manifest is not that of a file; ``None`` where it is, or came from a version without own hashes.

    Args:
        manifest: as :func:`kancompile.errors.parse_json` read it, whatever it is.
        content: bytes of the file.
    """
    if not isinstance(manifest, dict) or manifest.get("model_sha256") != hashlib.sha256(content).hexdigest():
        return "is the manifest of another file"
    return None if own_hash_fits(manifest) else "was changed after it was written"


def own_hash_fits(manifest: Mapping[str, Any]) -> bool:
    """Say whether a manifest is as it was written, or came from a version without own hashes."""
    said = {key: value for key, value in manifest.items() if key != _OWN_HASH}
    return _OWN_HASH not in manifest or bool(manifest[_OWN_HASH] == _hash(said))


def _hash(manifest: Mapping[str, Any]) -> str:
    as_read = parse_json(json.dumps(manifest))  # where infinity is a text
    return hashlib.sha256(json.dumps(as_read, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
