"""Whatever is in a file, its reader takes it or refuses it: by one kind of error, which names the file and fits on a screen."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing.mutations import KINDS, Mutation, mutated
from tests.fuzzing.readers import CASES, Case, error_of, fault_in, limited_memory

MUTATIONS = st.lists(
    st.builds(
        Mutation,
        st.sampled_from(KINDS),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, (1 << 16) - 1),
    ),
    min_size=1,
    max_size=3,
)
PARAMETERS = [
    pytest.param(case, id=name, marks=[pytest.mark.needs(case.needs)] if case.needs else [])
    for name, case in CASES.items()
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PARAMETERS)
def test_changed_files(case: Case, tmp_path: Path) -> None:
    path, valid = case.placed(tmp_path), case.valid()
    with limited_memory():
        case.read(path)

    @settings(
        max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(MUTATIONS)
    def check(mutations: list[Mutation]) -> None:
        path.unlink(missing_ok=True)  # of a file that is mapped, the pages must not change
        path.write_bytes(mutated(valid, mutations, case.inside))
        started = time.process_time()
        with limited_memory():
            error = error_of(case, path)
        assert error is None or fault_in(error, path) is None
        assert time.process_time() - started < 20

    check()
