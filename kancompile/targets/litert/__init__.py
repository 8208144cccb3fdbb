"""Target ``litert``: LiteRT (TensorFlow Lite) files."""

from kancompile.targets.litert.emit import TARGET

__all__ = [
    "TARGET",
]
