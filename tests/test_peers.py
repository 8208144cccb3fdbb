"""The table of peers says first where a compiled file is not the fastest."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import COMPILED, EAGER, FLOAT_EXPORT, PERCEPTRON, not_faster, section, short_form


def row(accuracy: float, *seconds: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "bytes": 1000, "times": dict(zip(("1 1", "0 64"), seconds, strict=False))}


RESULTS = {
    "a network": {
        "rows": {
            COMPILED: row(97.0, 1e-5, 4e-5),
            FLOAT_EXPORT: row(97.1, 0.5e-5, 8e-5),
            EAGER: row(97.1, 2e-5, 3e-5),
            PERCEPTRON: row(90.0, 1e-6, 2e-6),
        },
        "unavailable": {"another": "not installed"},
    }
}


def test_what_is_faster_and_as_accurate_is_said_first() -> None:
    said = not_faster(RESULTS["a network"])
    assert said == [f"{FLOAT_EXPORT} at batch 1 (0.50 x)", f"{EAGER} at batch 64, all threads (0.75 x)"]
    page = section(RESULTS)
    assert page.index(said[0]) < page.index("| accuracy |")
    assert "| 90.00 % |  | 1,000 | 0.10 x | 0.05 x |" in page
    assert "| **10 us** | **40 us** |" in page
    assert "another: not installed" in page


def test_the_short_form_says_what_is_less_accurate() -> None:
    lines = short_form(
        {"a network": {"rows": {one: RESULTS["a network"]["rows"][one] for one in (COMPILED, FLOAT_EXPORT)}}}
    )
    assert lines.splitlines()[-1] == "| a network | 1,000, 1,000 |  |  |  |  |  |"
    rows = {
        COMPILED: row(97.0, 1e-5) | {"times": {"1 64": 1e-5}},
        FLOAT_EXPORT: row(97.1, 1e-5) | {"times": {"1 64": 5e-5}},
        PERCEPTRON: row(90.0, 1e-6) | {"times": {"1 64": 1e-6}},
    }
    assert short_form({"b": {"rows": rows}}).endswith(
        "| b | 1,000, 1,000 | 5.00 x |  |  |  | 0.10 x, 7.0 points less |"
    )
