"""Say whether every output reaches its goal, on the data that judge, and what would help where one does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kancompile.compiler import target_named
from kancompile.reporting.facts.beside import computes_in_float
from kancompile.validation import RUINED_DB, OutputError, Validation

_ELSEWHERE = "files of {} hold integers of 8 bits alone; --target ort-cpu has 16 bits too"


def goal_missed(manifest: Mapping[str, Any], result: Validation) -> str | None:
    """Say what misses the goal of a compilation and the next step, ``None`` where nothing does.

    Args:
        manifest: what the compilation said.
        result: what was measured afterwards.
    """
    gate = manifest.get("error_gate", {})
    wanted, worst = gate.get("wanted"), result.compiled.worst
    if not wanted or worst is None or not worst.sqnr_db < wanted:
        return None
    if result.paired is not None and result.paired.is_within_chance:
        return None  # classes stay what they are, which is what such a model is for
    which = "the output" if result.compiled.n_outputs == 1 else f"output {worst.called}"
    text = f"{which} is at {worst.sqnr_db:.1f} dB about its mean, below the goal of {wanted:g} dB: {_error(worst)}"
    if worst.sqnr_db < RUINED_DB:
        text = f"{which} is ruined: {text}"
    step = gate.get("next_step")
    if step is not None:
        return f"{text}; on the calibration samples {step['text']}"
    if "int16" not in target_named(manifest["target"]).precisions:
        return f"{text}; {_ELSEWHERE.format(manifest['target'])}"
    reached = (gate.get("worst") or {}).get("sqnr_db")
    if reached is not None and reached >= wanted:
        return f"{text}; calibration samples reach {reached:.1f} dB: give more of them, or try --precision int16"
    return f"{text}; none of the changes that were tried brings more"


def _error(worst: OutputError) -> str:
    if worst.is_constant:
        return worst.text()
    return f"rms error {100 * worst.rms_share:.2g} % of its spread {worst.spread:.3g}"


def needs_int16(manifest: Mapping[str, Any], input_shape: Sequence[int], result: Validation) -> str | None:
    """Name 16 bits where errors of 8 bits weigh more than a ratio shows: outputs of unlike scale, and loops."""
    if any(map(computes_in_float, manifest["layers"])):
        return None
    found = []
    if manifest.get("error_gate", {}).get("outputs_differ_in_scale"):
        found.append(
            "spreads of the outputs differ by more than 100 times, where they are compared or added as they are"
        )
    if not result.is_classifier and result.compiled.n_outputs > 1 and list(input_shape) == [result.compiled.n_outputs]:
        found.append(
            "outputs have the shape of inputs, where they are fed back (a closed loop, a rollout) and errors of every step add up"
        )
    if not found:
        return None
    if "int16" not in target_named(manifest["target"]).precisions:
        return f"{'; '.join(found)}: {_ELSEWHERE.format(manifest['target'])}"
    return f"{'; '.join(found)}: use --precision int16 there"
