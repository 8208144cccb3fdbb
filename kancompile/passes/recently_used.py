"""Keep the last few results of work that takes long."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class RecentlyUsed(Generic[Key, Value]):
    """The values of the last keys in use, at most ``limit``."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[Key, Value] = {}

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made now if need be; the one that was not in use for longest makes room for it."""
        if key in self._kept:
            self._kept[key] = self._kept.pop(key)  # dictionaries keep the order of insertion
        else:
            while len(self._kept) >= self.limit:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = make()
        return self._kept[key]

    def __iter__(self) -> Iterator[Value]:
        """Yield the values that are kept."""
        return iter(self._kept.values())
