"""The last results in use are kept, against a list of what was used."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kancompile.passes.recently_used import RecentlyUsed


@given(st.lists(st.integers(0, 6)), st.integers(1, 4))
def test_what_is_made_again_is_what_was_not_in_use_for_longest(keys: list[int], limit: int) -> None:
    kept: RecentlyUsed[int, str] = RecentlyUsed(limit)
    used: list[int] = []
    for key in keys:
        made: list[int] = []

        def make(key: int = key, made: list[int] = made) -> str:
            made.append(key)
            return str(key)

        assert kept.get(key, make) == str(key)
        assert bool(made) == (key not in used[-limit:])
        used = [other for other in used if other != key] + [key]
        assert list(kept) == [str(other) for other in used[-limit:]]
