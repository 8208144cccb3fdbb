"""What a report is about: a compiled model with its float twin, the data, and what was measured.

It comes from a compilation that has just ended, or from a file on disk. A file holds tables and integer weights but not the
program that they were made from, so the program is lowered again from the float model, the recipe and the seed that the
file names and the calibration data that it names by hash; that it is the same is then measured, output by output.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from kancompile.compiler import (
    MANIFEST_FORM,
    METADATA_FORM,
    CompiledModel,
    describe_interface,
    describe_layer,
    left_in_float,
    manifest_path,
    prepare_model,
    target_named,
    why_torn,
)
from kancompile.data import Calibration, float32_by_default
from kancompile.errors import KanCompileError, check_form, naming_file
from kancompile.ir import Program, with_history
from kancompile.passes import Lowering, QuantizeOutputs
from kancompile.progress import say
from kancompile.recipe import Recipe, read_recipe
from kancompile.reporting.facts.inspection import describe_file, read_manifest
from kancompile.runtimes import read_model
from kancompile.validation import KernelAudit, Validation, audit_kernels, validate


@dataclass(frozen=True)
class ReportSource:
    """All that a report is computed from.

    Attributes:
        name: of the file.
        session_bytes: a file that ONNX Runtime loads.
        captured, program: the float program and the lowered one.
        lowering: makes one of the other, with the calibration samples.
        reference: the user's model.
        manifest: what was compiled from what.
        audit: kernels in ONNX Runtime.
        calibration: samples that the tables and weights were fitted to.
        judging: samples that the result is measured with.
        judged_on: what those are, in words.
        validation: what was measured on them.
        recipe: the effective recipe.
        judged_apart: whether the judging samples come from elsewhere than the calibration samples.
    """

    name: str
    session_bytes: bytes
    captured: Program
    program: Program
    lowering: Lowering
    reference: Any
    manifest: Mapping[str, Any]
    audit: KernelAudit
    calibration: Calibration
    judging: Calibration
    judged_on: str
    validation: Validation
    recipe: Recipe
    judged_apart: bool = False

    @property
    def seed(self) -> int:
        """Seed of the compilation."""
        return int(self.manifest["seed"])


def of_compiled(
    compiled: CompiledModel, judging: Calibration, judged_on: str, validation: Validation, name: str = "model"
) -> ReportSource:
    """Take a compilation that has just ended.

    Args:
        compiled: its result.
        judging: samples that ``validation`` was measured with.
        judged_on: what those are, such as ``"51 held-out calibration samples"``.
        validation: of the file, with the errors of its layers.
        name: of the file.
    """
    return ReportSource(
        name,
        compiled.session_bytes,
        compiled.captured,
        compiled.program,
        Lowering(compiled.captured, compiled.calibration.samples, int(compiled.manifest["seed"])),
        compiled.reference,
        compiled.manifest,
        compiled.audit,
        compiled.calibration,
        judging,
        judged_on,
        validation,
        compiled.recipe,
    )


@float32_by_default()
def of_file(
    path: str | os.PathLike[str],
    model: nn.Module,
    calibration: Calibration,
    judging: Calibration,
    judged_on: str,
    judged_apart: bool = False,
) -> ReportSource:
    """Take a compiled file, and lower its program again.

    Args:
        path: an ``.onnx`` file that kancompile wrote.
        model: the float model it was compiled from.
        calibration: the samples it was compiled with; their hash is compared with the file's.
        judging: samples to measure with.
        judged_on: what those are.
        judged_apart: whether they come from elsewhere than the calibration samples.

    Raises:
        KanCompileError: not such a file, other samples, or another model.
    """
    content, facts = _read(path)
    if calibration.sha256() != facts["calibration_sha256"]:
        raise KanCompileError(
            f"report: found {len(calibration)} calibration samples with SHA-256 {calibration.sha256()[:12]}..., expected "
            f"{facts['calibration_sha256'][:12]}... as {os.fspath(path)!r} was compiled with; pass --calibration, "
            "--calibration-key, --held-out and --seed as in the compilation"
        )
    recipe, seed = recipe_and_seed(path)
    prepared = prepare_model(model, calibration, without_budgets(recipe), seed)
    captured, lowering = prepared.program, prepared.lowering()
    program = lowering(prepared.recipe)
    if target_named(facts["target"]).quantized_outputs:
        program = with_history(QuantizeOutputs.name, program, QuantizeOutputs()(program, calibration.samples))
    manifest = _manifest(Path(path), content) or _facts(program, captured, calibration, recipe, facts)
    validation = validate(content, prepared.model, judging, program=program, float_program=captured)
    audit = audit_kernels(content)
    return ReportSource(
        Path(path).name,
        content,
        captured,
        program,
        lowering,
        prepared.model,
        manifest,
        audit,
        calibration,
        judging,
        judged_on,
        validation,
        recipe,
        judged_apart,
    )


def recipe_and_seed(path: str | os.PathLike[str]) -> tuple[Recipe, int]:
    """Read from a compiled file how it was made.

    Raises:
        KanCompileError: not a file that kancompile wrote.
    """
    _, facts = _read(path)
    with naming_file(path):
        return read_recipe(facts["recipe"]), int(facts["seed"])


def calibration_hash(path: str | os.PathLike[str]) -> str:
    """Read from a compiled file the hash of the samples it was compiled with."""
    return str(_read(path)[1]["calibration_sha256"])


def _read(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    content = read_model(path)
    name = os.fspath(path)
    if Path(path).suffix != ".onnx":
        raise KanCompileError(
            f"report: found {name!r}, expected an .onnx file; for other targets pass --report to kancompile compile"
        )
    facts = describe_file(name)["metadata"]
    if facts.get("metadata") == "short":
        facts = _said_beside(Path(path), content)
    if "recipe" not in facts or "calibration_sha256" not in facts:
        raise KanCompileError(
            f"report: {name!r} names no recipe and no calibration data, expected an .onnx file that kancompile wrote"
        )
    who = f"report: metadata of {name!r}"
    check_form(facts, METADATA_FORM, who, "compile the model again")
    if not -(1 << 63) <= facts["seed"] < 1 << 63:
        raise KanCompileError(f"{who}: found a seed that is no integer of 64 bits; compile the model again")
    return content, facts


def _said_beside(path: Path, content: bytes) -> dict[str, Any]:
    """Take from the manifest beside a file what its metadata leaves out.

    Raises:
        KanCompileError: there is no manifest of this very file.
    """
    manifest = _manifest(path, content)
    if manifest is None:
        raise KanCompileError(
            f"report: the metadata of {os.fspath(path)!r} is short, and no {manifest_path(path).name} of this very file stands "
            "beside it; copy the manifest there, or compile with metadata = 'full'"
        )
    kept = ("target", "seed", "recipe", "recipe_sha256", "versions", "layers")
    version, samples = manifest["kancompile"]["version"], manifest["calibration"]["sha256"]
    return {key: manifest[key] for key in kept} | {"version": version, "calibration_sha256": samples}


def without_budgets(recipe: Recipe) -> Recipe:
    """Take budgets out: the recipe in a file already says what they led to."""
    method = "auto" if recipe.method == "hawq-v2" else recipe.method
    unset = {"bits_average": None, "max_bytes": None, "max_latency_us": None, "min_sqnr": None}
    return replace(recipe, method=method, optimize="balanced", **unset)  # type: ignore[arg-type]


def _manifest(path: Path, content: bytes) -> dict[str, Any] | None:
    """Read the manifest beside a file; ``None`` where there is none, that of another file, or one that was changed.

    Raises:
        KanCompileError: it cannot be read, or is not what kancompile writes.
    """
    beside = manifest_path(path)
    if not beside.is_file():
        say(
            f"report: found no {beside.name} beside the file; notes of the compilation that stand only there are left out"
        )
        return None
    found: dict[str, Any] = read_manifest(beside)
    torn = why_torn(found, content)
    if torn is not None:
        say(f"report: {beside.name} {torn}, so it is not used; compile again, or copy both together")
        return None
    check_form(found, MANIFEST_FORM, f"manifest {str(beside)!r}", "delete it, or compile the model again")
    return found


def _facts(
    program: Program, captured: Program, calibration: Calibration, recipe: Recipe, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Put together what a manifest would say, for a file that lost its own."""
    return {
        "kancompile": {"version": metadata["version"]},
        "target": metadata["target"],
        "seed": int(metadata["seed"]),
        "recipe": recipe.to_dict(),
        "recipe_sha256": metadata["recipe_sha256"],
        "calibration": {"samples": len(calibration), "sha256": calibration.sha256(), "notes": list(calibration.notes)},
        "input_shape": list(program.input_shape),
        **({} if program.declared is None else describe_interface(program.declared)),
        "versions": metadata["versions"],
        "layers": [describe_layer(program, layer) for layer in program.layers()],
        "kinds": dict(program.kinds),
        "unrecognized": [
            {"node": p.node, "operator": p.operator, "reason": p.reason, "source": Path(p.source).name}
            for p in captured.unrecognized
        ],
        "left_in_float": left_in_float(program, calibration.first(2), recipe.costs.look_up),
        "notes": list(program.notes),
        "bit_allocation": {},
    }
