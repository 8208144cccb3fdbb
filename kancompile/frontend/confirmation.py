"""Compare a finished program with the exported graph: its outputs, and where these differ, every layer by itself.

A deep network can enlarge what float32 leaves until two evaluations that are equal by algebra give different outputs. Whether
the capture is at fault then shows layer by layer: each is given what the *model* holds in front of it, so that nothing adds up
and values at a jump stay on their side. A layer that reads another tensor, or has other weights, differs at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from kancompile.errors import KanCompileError
from kancompile.frontend.flow import Flow, layout_of, run
from kancompile.frontend.layers import TOLERANCE, sizes_of_terms
from kancompile.frontend.trace import Examples
from kancompile.ir import Contraction, Program, Values, tensors_of


def confirm_program(
    flow: Flow, program: Program, layers: Mapping[str, tuple[fx.Node, bool]], examples: Examples
) -> Program:
    """Compare a program with the exported graph at several batch sizes.

    Args:
        flow: the exported graph.
        program: what was captured.
        layers: as :func:`~kancompile.frontend.rewrite.rewrite` gives them.
        examples: rows to compare on.

    Returns:
        the program, with a note where it agrees in every layer, but float32 does not determine its outputs.

    Raises:
        KanCompileError: outputs differ, and a layer differs or the outputs behind equal layers.
    """
    generator = torch.Generator().manual_seed(3)
    worst = own = 0.0
    for size in (2, 7):
        rows = examples.made(size, generator)
        if size == 2:
            rows = program.interface.resized(rows)
        difference = _difference(_outputs(flow, rows), tensors_of(program(rows)))
        if difference <= 100 * TOLERANCE:
            continue
        if not _agrees_by_layers(flow, program, layers, rows):
            raise KanCompileError(
                f"model: found outputs of the captured program that differ from the model at batch {size}, expected "
                "equal ones although every layer was confirmed; please report this with the model"
            )
        worst = max(worst, difference)
        own = max(own, _difference(_outputs(flow, rows), _outputs(flow, rows, torch.float64)))
    if not worst:
        return program
    note = (
        f"float32 does not determine the outputs of this model: they differ by {own:.2%} of their largest between float32 and "
        f"float64, and by {worst:.2%} between the model and the captured program, in which every layer equals the model's to "
        f"{TOLERANCE:g} of its terms where it is given the model's own values; accuracy is measured against the model in float32"
    )
    return replace(program, notes=(*program.notes, note))


def _outputs(flow: Flow, rows: Values, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    values = run(flow, tensors_of(rows), dtype=dtype)
    return [values[node] for node in flow.outputs]


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Give the largest difference as a share of the largest value; infinite for other shapes, or values that are not finite."""
    shares = [0.0]
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            return torch.inf
        if not one.numel():
            continue
        one, other = one.double(), other.double()
        same = (one == other) | (one.isnan() & other.isnan())
        scale = one.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1e-6)
        shares.append(float(torch.where(same, 0.0, (one - other).abs() / scale).nan_to_num(torch.inf).max()))
    return max(shares)


class _OnValuesOfModel(fx.Interpreter):
    """Evaluate a program; behind every layer go on with what the model holds there.

    Attributes:
        agrees: whether all layers so far gave that, to the tolerance at which layers are confirmed.
    """

    def __init__(self, program: Program, values: Mapping[str, Any]) -> None:
        super().__init__(program.graph_module)
        self.agrees = True
        self._values = values
        self._contractions = dict(program.nodes(Contraction))
        self._size = torch.tensor(0.0)

    def run_node(self, n: fx.Node) -> Any:
        if n in self._contractions:
            terms = sizes_of_terms(self._contractions[n], self.fetch_args_kwargs_from_env(n)[0])
            self._size = terms.nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1e-30)
        found = super().run_node(n)
        expected = self._values.get(n.name)
        if expected is None:
            return found
        same = found.shape == expected.shape and torch.allclose(
            found, expected, rtol=0, atol=TOLERANCE * float(self._size), equal_nan=True
        )
        self.agrees &= same
        return expected


def _agrees_by_layers(flow: Flow, program: Program, layers: Mapping[str, tuple[fx.Node, bool]], rows: Values) -> bool:
    values = run(flow, tensors_of(rows), keep=True)
    forced = _OnValuesOfModel(
        program,
        {
            name: values[node] if whole else layout_of(node, flow.batch).to_samples(values[node])
            for name, (node, whole) in layers.items()
        },
    )
    with torch.no_grad():
        outputs = forced.run(*program.arguments(rows))
    found = outputs if isinstance(outputs, tuple) else (outputs,)
    return forced.agrees and _difference([values[node] for node in flow.outputs], found) <= TOLERANCE
