"""One training for several widths of weights, each of which ends in a file of its own.

EQ-Net (Xu et al., *EQ-Net: Elastic Quantization Neural Networks*, ICCV 2023) draws a width at each step and shares the weights
among all widths; steps and offsets belong to a width. Here the shared part is what training changes,

    latent weights of width b:   codes_b + move unit / step_b        unit: geometric mean of the steps of all widths

``codes_b`` and ``step_b`` being the post-training ones, so that every width begins at the file that compiling alone gives, and
not at the rounded weights of the widest. Scales, biases, tables and ranges are trained for each width.

The progressive form begins with the widest and lets the next narrower one join after some steps, which then starts from what
the wider ones have learned (Jung et al., *QIL*, CVPR 2019; Shen et al., *Once Quantization-Aware Training*, ICCV 2021).
Wider ones go on being drawn, since all of them are written in the end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kancompile.compiler import compile
from kancompile.errors import KanCompileError
from kancompile.ir import IntegerContraction, Layer, Program, group_order, layer_tables, tied_columns
from kancompile.qat.choices import Training, read_training
from kancompile.qat.methods import SharedChange
from kancompile.qat.preparation import prepare_compiled
from kancompile.qat.training_module import PREPARED_WITH, TrainedModel
from kancompile.recipe import CPU_PRESETS, Recipe, read_recipe

_IN_STEPS = ("lsq", "lsq+", "dsq", "qil")
"""Methods whose latent weights are in steps of a width, so that widths can share a change of them."""


class ElasticModel(nn.Module):
    """Modules of several widths that share what training changes their weights by.

    In training mode every forward call is one of a width that is drawn: each once in as many calls as there are widths, in an
    order that the seed gives. In evaluation mode, and where no gradients are taken, it is one of the width ``active``, the
    narrowest until :meth:`use` says another.

    Attributes:
        widths: the modules by bits, widest first.
        moves: the shared changes, by names of contractions.
        active: the width of the last forward call.
        joins_after: steps after which the next narrower width joins, 0: all are drawn from the beginning.
        seed: of the order.
    """

    def __init__(self, modules: Mapping[int, TrainedModel], *, joins_after: int = 0, seed: int = 0) -> None:
        """Join modules that were prepared from one model with recipes that differ in ``weight_bits`` alone.

        Args:
            modules: fresh ones, by bits; they become part of this one.
            joins_after: see above.
            seed: see above.

        Raises:
            KanCompileError: fewer than two widths; layers or their functions differ; a method without latent weights in steps.
        """
        super().__init__()
        if len(modules) < 2 or joins_after < 0:
            raise KanCompileError(
                f"elastic: found {len(modules)} widths, joining after {joins_after} steps, expected two widths at least and 0 "
                "steps or more; qat.prepare makes the module of one"
            )
        ordered = sorted(modules, reverse=True)
        self.bits = tuple(ordered)
        self.widths = nn.ModuleDict({str(bits): modules[bits] for bits in ordered})
        self.joins_after, self.seed, self.active = joins_after, seed, ordered[-1]
        method = modules[ordered[0]].training_choices.weights
        if method not in _IN_STEPS:
            raise KanCompileError(
                f"elastic: found weights {method!r}, expected one of {list(_IN_STEPS)!r}, whose weights are in steps that widths "
                "can share a change in"
            )
        self.moves = nn.ModuleDict(_share(modules))
        for module in modules.values():
            module.__dict__["shared"] = self.moves

    @property
    def steps(self) -> int:
        """Forward calls in training mode."""
        return sum(int(module.steps) for module in self.modules_by_bits().values())

    @property
    def last_checkpoint(self) -> str:
        """Where the last good state is."""
        return self.at(self.bits[0]).last_checkpoint

    @last_checkpoint.setter
    def last_checkpoint(self, path: str) -> None:
        for module in self.modules_by_bits().values():
            module.last_checkpoint = path

    def modules_by_bits(self) -> dict[int, TrainedModel]:
        """Return the modules by bits, widest first."""
        return {bits: self.at(bits) for bits in self.bits}

    def at(self, bits: int) -> TrainedModel:
        """Return the module of a width, which :func:`kancompile.qat.convert` writes.

        Raises:
            KanCompileError: no such width.
        """
        if bits not in self.bits:
            raise KanCompileError(f"elastic: found {bits!r} bits, expected one of the widths {list(self.bits)!r}")
        module = self.widths[str(bits)]
        assert isinstance(module, TrainedModel)
        return module

    def use(self, bits: int) -> ElasticModel:
        """Say which width evaluates (see :meth:`at`)."""
        self.at(bits)
        self.active = bits
        return self

    def drawn(self, step: int) -> int:
        """Return the width of a step: a function of the seed and the step alone, so that a resumed training goes on alike."""
        joined = self.bits if not self.joins_after else self.bits[: 1 + step // self.joins_after]
        turn, place = divmod(step, len(joined))
        generator = torch.Generator().manual_seed(self.seed + 1000003 * turn)
        return joined[int(torch.randperm(len(joined), generator=generator)[place])]

    def forward(self, *x: Any) -> Any:
        """Map inputs to the outputs of one width (see the class).

        Raises:
            KanCompileError: training diverged: a parameter is NaN or infinite.
        """
        if self.training and torch.is_grad_enabled():
            self.active = self.drawn(self.steps)
        return self.at(self.active)(*x)

    def check_finite(self) -> None:
        """Refuse parameters that are not finite."""
        for module in self.modules_by_bits().values():
            module.check_finite()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state of a module that was prepared alike.

        Raises:
            KanCompileError: it was prepared from another model, or with other widths, data or choices.
        """
        for bits, module in self.modules_by_bits().items():
            module.check_belongs(state_dict.get(f"widths.{bits}.{PREPARED_WITH}"))
        return super().load_state_dict(state_dict, strict, assign)

    def __repr__(self) -> str:
        count = sum(value.numel() for value in self.moves.parameters())
        lines = [f"ElasticModel(weights of {', '.join(map(str, self.bits))} bits share {count:,} changes"]
        return "\n".join(lines + [f"{bits} bits: {module}" for bits, module in self.modules_by_bits().items()]) + ")"


def prepare_elastic(
    model: Any,
    calibration: Any,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    widths: Sequence[int] = (8, 4, 3, 2),
    joins_after: int = 0,
    training: Training | Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
    dynamic: Any = None,
) -> ElasticModel:
    """Compile a model at several widths and return the results as one module, for one training of all of them.

    Args:
        model, calibration, recipe, training, seed, device, trust, dynamic: as for :func:`kancompile.qat.prepare`.
        widths: bits of weights, 2 to 8, in the place of the recipe's ``weight_bits``.
        joins_after: steps after which the next narrower width joins (progressive), 0: all are drawn from the beginning.

    Raises:
        KanCompileError: as :func:`kancompile.qat.prepare` and :class:`ElasticModel`.
    """
    chosen = read_training(training)
    options = {"seed": seed, "device": device, "trust": trust, "dynamic": dynamic}
    modules = {}
    for bits in widths:
        compiled = compile(model, calibration, recipe=read_recipe(recipe, weight_bits=bits), **options)
        keeps_tables = bits == 8 and CPU_PRESETS[compiled.recipe.cpu].int16_pairs  # what prepare says in a note
        modules[bits] = prepare_compiled(
            compiled, replace(chosen, index=None, tables=False) if keeps_tables else chosen
        )
    return ElasticModel(modules, joins_after=joins_after, seed=seed)


def _share(modules: Mapping[int, TrainedModel]) -> dict[str, SharedChange]:
    """Exchange latent weights for changes that all widths share."""
    steps = {bits: _steps(module) for bits, module in modules.items()}
    shapes = [{name: step.shape for name, step in found.items()} for found in steps.values()]
    # other choices give layers other functions, or their columns another order
    recipes = {replace(module.compiled.recipe, weight_bits=8).canonical_json() for module in modules.values()}
    if len(recipes) > 1 or shapes.count(shapes[0]) < len(shapes):
        raise KanCompileError(
            f"elastic: found layers or recipes that differ between {', '.join(map(str, modules))} bits, expected one model and "
            "one recipe at all widths but for weight_bits; set goal_sqnr = None, so that no width is refined by itself"
        )
    shared = {}
    for name, step in next(iter(steps.values())).items():
        unit = torch.stack([found[name].double().log() for found in steps.values()]).mean(0).exp()
        change = SharedChange((step.shape[0], step.shape[1]))
        shared[name.replace(".", "/")] = change
        for bits, module in modules.items():
            twin: Any = module.twin(name)
            twin.quantizer.share(change, (unit / steps[bits][name].double()).float())
    return shared


def _steps(module: TrainedModel) -> dict[str, Tensor]:
    """Give what one step of every weight stands for in front of its function, float32 ``[n_out, c]``, by contractions."""
    program = module.compiled.lowered
    layers = {layer.contraction: layer for layer in program.layers()}
    found = {}
    for node, contraction in program.nodes(IntegerContraction):
        name = str(node.target)
        step = contraction.scale_matrix
        if contraction.multiplier is not None:
            step = step * contraction.multiplier.of_column().T
        whole = step.expand(contraction.matrix_shape).flatten(1)
        found[name] = (whole / _column_scales(program, layers[name], contraction)).clamp(min=1e-30)
    return found


def _column_scales(program: Program, layer: Layer, contraction: IntegerContraction) -> Tensor:
    """Give the scale of the table column that every weight reads, float32 ``[n_out, c / groups * taps]``."""
    tables, groups = layer_tables(program, layer), contraction.groups
    order = group_order([(table.n_in, table.k) for table in tables], groups)
    scales = torch.cat([table.scale.flatten() for table in tables])[tied_columns(tables)[order]]
    by_group = scales.reshape(groups, 1, -1).expand(-1, contraction.n_out // groups, -1).flatten(0, 1)
    return by_group.repeat_interleave(contraction.taps, 1)
