"""Give the channels of a convolution fewer functions, where they need fewer than they have.

    phi(x) ~ U g(x) + m,   g(x) = A phi(x) - l        ->        y = conv(g(x), V) + conv(1, v) + b,     r < k functions g

``mixtures`` finds the functions, and what the weights would be if channels and taps knew nothing of each other. They do, so
that what one function drops another can carry: ``windows`` fits ``V``, ``v`` and ``b`` to the float output, and says on images
that did not fit what is lost. A network of Gram polynomials kept 34 dB with one of five functions in its last convolution, where
weights that were not fitted left 29.

Every function less saves a lookup of each channel and pixel, and its share of the integer convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kancompile.ir import Branch, Contraction, Expansion, Layer, Program, Values, distinct_inputs, nodes_of
from kancompile.passes.reduce_functions.join import moved
from kancompile.passes.reduce_functions.mixtures import Mixture, Subspace
from kancompile.passes.reduce_functions.windows import Windows

_SAMPLES = 256
_MOST_FUNCTIONS = 12
_CONSTANT = 1e-12  # variance by the mean square, which roundings of float32 reach


def across_channels(program: Program, x: Values, share: Callable[[str], float]) -> Program:
    """Replace the functions of convolutions by fewer mixtures, and fit their weights.

    Args:
        program: a captured program.
        x: calibration inputs ``[n, *input_shape]``.
        share: says for a layer's name which squared error is allowed at its output, as a share of the output's variance;
            layers with 0 stay as they are.

    Returns:
        the program with fewer functions, or the same one.
    """
    found = {
        layer: expansion
        for layer in program.layers()
        if share(layer.name) > 0 and (expansion := _candidate(program, layer)) is not None
    }
    if not found:
        return program
    picked = torch.linspace(0, len(x) - 1, min(len(x), _SAMPLES)).long()
    read = program.inputs(x[picked], [layer.expansions[0] for layer in found])
    modules: dict[str, nn.Module] = {}
    notes = []
    for layer, expansion in found.items():
        contraction = program.node(layer.contraction, Contraction)
        mixed = mix(expansion, contraction, read[layer.expansions[0]], share(layer.name))
        if mixed is None:
            continue
        modules[layer.expansions[0]], modules[layer.contraction], functions, lost = mixed
        made = f"{functions} mixture{'s' if functions != 1 else ''}{' and a constant' if contraction.pads else ''}"
        notes.append(
            f"layer {layer.name!r}: {expansion.k} functions of each channel replaced by {made}, squared error "
            f"{lost:.2g} of the output's variance on samples that did not fit them; function_error = 0 keeps all"
        )
    return program.replace_modules(modules, notes) if modules else program


def _candidate(program: Program, layer: Layer) -> Expansion | None:
    """Give the expansion of a float convolution that has one, which no other layer reads."""
    (expansion, *others) = program.expansions(layer)
    readers = {user.target for node in nodes_of(program, layer.expansions[0]) for user in node.users}
    fits = (
        not others
        and len(readers) == 1
        and program.is_float(layer)
        and len(program.contraction(layer).kernel) > 0  # what reads channels first may be a linear map of every pixel
        and isinstance(expansion, Expansion)
        and expansion.channels_first
        and 2 < expansion.k <= _MOST_FUNCTIONS
    )
    return expansion if fits else None  # type: ignore[return-value]


def mix(
    expansion: Expansion, contraction: Contraction, x: Tensor, tolerance: float
) -> tuple[Expansion, Contraction, int, float] | None:
    """Find fewer functions; ``None`` where none can be saved, or channels have functions of their own.

    Args:
        expansion: of ``k`` functions of each channel.
        contraction: its convolution.
        x: inputs seen in calibration ``[n, n_in, *spatial]``.
        tolerance: squared error allowed, as a share of the output's variance.

    Returns:
        the expansion of the mixtures, and a constant where the convolution pads, its convolution, how many mixtures there are,
        and the share of the output's variance that is lost on samples that did not fit, as they are or moved.
    """
    if len(distinct_inputs(expansion, float(x.min()), float(x.max()))[0]) > 1:
        return None
    subspace = Subspace.of(expansion, contraction, x)
    windows = Windows.of(expansion, contraction, [x, moved(x, torch.Generator().manual_seed(0))])
    power = min(windows.powers)
    if not power > _CONSTANT * float(windows.output.double().square().mean()):
        return None
    for rank in subspace.ranks(tolerance * power):
        functions = subspace.functions(rank)
        fitted, lost = windows.fit(functions, contraction)
        if lost <= tolerance:
            return _expansion(expansion, functions.region), fitted, rank, lost
    return None


def _expansion(expansion: Expansion, region: Mixture) -> Expansion:
    k = region.mix.shape[-1] + region.has_constant
    position = torch.arange(torch.Size(expansion.in_shape).numel() * k).reshape(*expansion.in_shape, k)
    return Expansion(expansion.anchor_shape, [Branch("mixtures", region, position)], channels_first=True)  # type: ignore[arg-type]
