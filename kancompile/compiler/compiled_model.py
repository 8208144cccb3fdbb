"""A compiled model and its files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from kancompile.compiler.atomic_write import check_destinations, write_atomically
from kancompile.compiler.emission import for_target, target_named, write
from kancompile.compiler.manifest import describe, describe_file_bytes
from kancompile.compiler.pair import sealed
from kancompile.data import Calibration, float32_by_default
from kancompile.errors import KanCompileError
from kancompile.ir import EXTERNAL_SUFFIX, ModelWithExternalData, Program, file_bytes
from kancompile.progress import Timings
from kancompile.recipe import Recipe
from kancompile.targets import TARGETS
from kancompile.validation import (
    BesideFloat,
    Edge,
    FloatExport,
    KernelAudit,
    Printed,
    Validation,
    audit_kernels,
    check_matplotlib,
    edge_of,
    measure_beside_float,
    plot,
    validate,
)

MANIFEST_SUFFIX = ".manifest.json"


ABOUT_THE_CHOICES = ("bit_allocation", "error_gate", "fresh_data")
"""What a manifest says about how the recipe came about; files of all targets share it."""
_SHARED = (*ABOUT_THE_CHOICES, "allocation", "made_from")


@dataclass(frozen=True)
class CompiledModel(Printed):
    """A compiled model and how it came about.

    Attributes:
        model_bytes: the file.
        companions: further files of the target, by suffix.
        session_bytes: a file of the same program that ONNX Runtime loads: the file itself where it does.
        program: the lowered program, whose evaluation in PyTorch is what the file computes.
        lowered: the program as every target gets it, before what this one asks for, such as outputs of 8 bits.
        captured: the float program it was lowered from.
        reference: the user's model, in whatever mode it was, for validation; its float32 copy where it has another precision.
        manifest: what was compiled from what, as plain data for JSON.
        audit: which kernels ONNX Runtime uses.
        calibration: the samples that were used.
        recipe: the effective recipe.
    """

    model_bytes: bytes
    program: Program
    lowered: Program
    captured: Program
    reference: nn.Module | ExportedProgram
    manifest: dict[str, Any]
    audit: KernelAudit
    calibration: Calibration
    recipe: Recipe
    session_bytes: bytes
    companions: Mapping[str, bytes] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        layers = self.manifest["layers"]
        bits = ", ".join(str(count) for count in sorted({layer["weight_bits"] for layer in layers}))
        return (
            f"CompiledModel for {self.manifest['target']!r}: {file_bytes(self.model_bytes):,} bytes, {len(layers)} layers with "
            f"weights of {bits} bits; .save(path), .validate(data), .plot_edge(layer, i, o)"
        )

    @property
    def report(self) -> dict[str, Any]:
        """Everything known without running the model again, as plain data for JSON."""
        return self.manifest | {"kernels": self.audit.to_dict(), "seconds": self.timings}

    def made_from(self, origin: Mapping[str, Any]) -> CompiledModel:
        """Say in the manifest what the model was compiled from, as plain data (``made_from``)."""
        return replace(self, manifest=self.manifest | {"made_from": dict(origin)})

    def validate(
        self,
        data: Any,
        *,
        min_sqnr: float | None = None,
        max_drop: float | None = None,
        is_classifier: bool | None = None,
    ) -> Validation:
        """Compare the file with the float model and the simulation, output by output and layer by layer.

        Args:
            data: samples, with labels or without (see :func:`kancompile.validate`).
            min_sqnr: least SQNR of every output in dB, about its mean.
            max_drop: most points that accuracy may lose, or hundredths of R2; needs labels.
            is_classifier: whether the largest output is a decision; ``None``: where labels are classes.

        Raises:
            KanCompileError: data that does not fit, or a threshold on something not measurable.
        """
        return validate(
            self.session_bytes,
            self.reference,
            data,
            program=self.program,
            float_program=self.captured,
            min_sqnr=min_sqnr,
            max_drop=max_drop,
            is_classifier=is_classifier,
        )

    @float32_by_default()
    def beside_float(self, *, timing: bool = True, export: FloatExport | None = None) -> BesideFloat:
        """Compare the file with the float export of the model: bytes, and times on this machine in one thread.

        Args:
            timing: whether times are measured; they are not where this machine cannot run the target.
            export: one under way.
        """
        x = self.calibration.samples
        export = FloatExport(self.reference, x[:2]) if export is None else export
        timing = timing and TARGETS[self.manifest["target"]].loads_in_ort
        return measure_beside_float(self.reference, export, self.session_bytes, len(self.model_bytes), x, timing)

    @float32_by_default()
    def edge(self, layer: str | int | None = None, i: int | None = None, o: int | None = None) -> Edge:
        """Evaluate the function from input ``i`` of a layer to its output ``o``, in float and as compiled.

        Args:
            layer: its name, such as ``"layers.0"``, or its number from 0; ``None`` for the first.
            i, o: numbers from 0; ``None`` for the edge of the layer that varies most.

        Raises:
            KanCompileError: no such edge.
        """
        seed = int(self.manifest["seed"])
        return edge_of(self.captured, self.program, self.calibration.samples, layer, i, o, seed)

    def plot_edge(
        self, layer: str | int | None = None, i: int | None = None, o: int | None = None, axes: Any = None
    ) -> Any:
        """Draw the function from input ``i`` of a layer to its output ``o``: in float, on the lookup table, as in the file.

        Args:
            layer, i, o: as :meth:`edge` takes them.
            axes: of matplotlib; ``None`` for those of a new figure.

        Returns:
            the axes.

        Raises:
            KanCompileError: no such edge, or no matplotlib.
        """
        check_matplotlib("plot_edge")
        return plot(self.edge(layer, i, o), axes)

    def save(self, path: str | os.PathLike[str], force: bool = False, shared: bool = False) -> Path:
        """Write the model to ``path``, and beside it its manifest and what else its target needs: all of them or none.

        Args:
            path: the file.
            force: whether existing files are replaced.
            shared: see :func:`manifest_path`.

        Raises:
            KanCompileError: a file exists and ``force`` is not set, or the folder cannot be written.
        """
        model = Path(path)
        contents = self.files(model, shared)
        check_destinations(contents, force)
        write_atomically(contents, force)
        return model

    def files(self, model: Path, shared: bool = False) -> dict[Path, bytes | memoryview]:
        """Give the content of every file that :meth:`save` writes for a model file (``shared``: see :func:`manifest_path`)."""
        content, manifest, external = self.model_bytes, self.manifest, {}
        if isinstance(content, ModelWithExternalData):
            beside = model.with_name(model.name + EXTERNAL_SUFFIX)
            content = content.renamed(beside.name)
            external = {beside: content.external}
            manifest = manifest | describe_file_bytes(content)
        text = json.dumps(sealed(manifest), indent=2, sort_keys=True) + "\n"
        companions = {model.with_name(model.stem + suffix): content for suffix, content in self.companions.items()}
        return {model: content, **external, **companions, manifest_path(model, shared): text.encode()}

    @float32_by_default()
    def for_target(self, name: str) -> CompiledModel:
        """Write the same program for another target; nothing is rounded again.

        Raises:
            KanCompileError: no such target, or it cannot express the program.
        """
        target = target_named(name)
        for step in self.manifest.get("error_gate", {}).get("refinements", ()):
            if not target.holds(step["change"]):
                keys = " and ".join(f"{key} = {value}" for key, value in step["change"].items())
                raise KanCompileError(
                    f"target {name!r}, layer {step['layer']!r}: found {keys}, which the error gate chose, expected what these "
                    f"files hold; compile for {name!r}, or with also_for=[{name!r}], which leaves it out unless an output is "
                    "ruined"
                )
        timings = Timings()
        program = for_target(target, self.lowered, self.calibration.samples, timings, self.recipe)
        about = {key: self.manifest[key] for key in _SHARED if key in self.manifest}
        facts = describe(program, self.calibration, self.recipe, name, self.manifest["seed"]) | about
        data = timings.measure("emit", lambda: write(target, program, facts, self.recipe))
        session = data if target.loads_in_ort else write(TARGETS["ort-cpu"], program, facts, self.recipe)
        audit = audit_kernels(session)
        return replace(
            self,
            model_bytes=data,
            program=program,
            companions=target.companions(data) if target.companions is not None else {},
            session_bytes=session,
            manifest=facts | describe_file_bytes(data) | target.facts(data),
            audit=audit,
            timings=timings.seconds,
        )


def manifest_path(model: Path, shared: bool = False) -> Path:
    """Return where the manifest of a model file stands: ``model.onnx`` -> ``model.manifest.json``.

    Args:
        model: the file.
        shared: whether files of other targets stand beside it; then ``model.ort`` -> ``model.ort.manifest.json``.
    """
    return model.with_name((model.name if shared and model.suffix != ".onnx" else model.stem) + MANIFEST_SUFFIX)
