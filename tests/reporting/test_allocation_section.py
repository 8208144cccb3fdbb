"""The front of an allocation in a report: measured points beside predictions, drawn against bytes and microseconds."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest

from kancompile.reporting.facts.allocation_front import allocation_front
from kancompile.reporting.render.html_allocation import allocation_section
from kancompile.reporting.schema import report_schema


def point(bits: int, size: int, ratio: Any, **others: Any) -> dict[str, Any]:
    return {
        "layers": {"first": {"weight_bits": bits, "levels": 64}},
        "predicted_db": ratio,
        "measured_db": ratio,
        "predicted_constant_bytes": size - 1000,
        "bytes": size,
        "predicted_us": 10.0 * bits,
        "measured_us": 11.0 * bits,
        "chosen": False,
    } | others


ALLOCATION = {
    "points": [
        point(4, 5000, 30.0, chosen=True),
        point(8, 9000, 44.0),
        point(6, 7004, "inf", predicted_db=None, predicted_constant_bytes=None, predicted_us=None),
    ],
    "front": [
        {"layers": {"first": {"weight_bits": bits}}, "constant_bytes": 500 * bits, "us": 10.0 * bits, "db": 6.0 * bits}
        for bits in (3, 5, 7)
    ],
}


def test_files_take_more_than_their_constants_and_every_point_says_what_layers_got() -> None:
    found = allocation_front({"allocation": ALLOCATION})
    assert found is not None
    jsonschema.validate(found, {"$ref": "#/$defs/allocation", "$defs": report_schema()["$defs"]})
    assert [one["bytes"] for one in found["front"]] == [2500, 3500, 4500]
    assert [one["predicted_bytes"] for one in found["points"]] == [5000, 9000, None]
    assert found["points"][0]["text"] == "first 4 bits and 64 rows"
    assert [one["chosen"] for one in found["points"]] == [True, False, False]
    assert allocation_front({}) is None
    assert allocation_front({"allocation": {"points": [], "front": []}}) is None


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("has_times", [True, False])
def test_the_front_is_drawn_against_bytes_and_against_time_where_it_is_known(has_times: bool) -> None:
    allocation = copy.deepcopy(ALLOCATION)
    for one in () if has_times else (*allocation["points"], *allocation["front"]):
        one |= dict.fromkeys({"us", "predicted_us", "measured_us"} & one.keys())
    found = allocation_front({"allocation": allocation})
    assert found is not None
    page = allocation_section(found)
    assert page.count("<svg") == 1 + has_times
    assert page.count("(this file)") == 1
    assert ("microseconds" in page) == has_times
    assert "exact" in page
    assert page == allocation_section(found)
