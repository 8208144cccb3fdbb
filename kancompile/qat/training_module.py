"""The module that a user trains: the lowered program with latent weights, ranges and table codes."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from kancompile.compiler import CompiledModel
from kancompile.errors import KanCompileError
from kancompile.ir import Layer, NamedTensors
from kancompile.qat.choices import Training

PREPARED_WITH = "prepared_with"
STEPS = "steps"


class TrainedModel(nn.Module):
    """A model in quantization-aware training; made by :func:`kancompile.qat.prepare`.

    Its outputs are, in training mode and out of it, those of the file that :func:`kancompile.qat.convert` would write now. Parts
    that the file keeps in float compute as they did and are not trained.

    Attributes:
        compiled: the post-training result that it began with.
        training: what is trained.
        notes: what is not trained, and why.
        last_checkpoint: where the last good state is, empty where none was saved.
        steps: int64 scalar, forward calls in training mode.
        shared: what weights of other widths change by, too, where one training serves several (see ``ElasticModel``).
    """

    steps: Tensor
    compiled: CompiledModel
    graph: fx.GraphModule
    shared: nn.Module | None

    def __init__(
        self,
        compiled: CompiledModel,
        training: Training,
        graph: fx.GraphModule,
        twins: Mapping[str, nn.Module],
        indices: nn.ModuleList,
        notes: tuple[str, ...],
    ) -> None:
        """Take the graph of twins, which of its modules they are, by name, and the indices that they share."""
        super().__init__()
        self.__dict__["compiled"] = compiled
        self.training_choices, self.notes, self.last_checkpoint = training, notes, ""
        self.names = dict.fromkeys(twins)
        self.layers = nn.ModuleDict({name.replace(".", "/"): module for name, module in twins.items()})
        self.indices = indices
        # not registered: its parameters are those of the layers, which would stand in a state twice
        self.__dict__["graph"] = graph
        self.__dict__["shared"] = None
        self.register_buffer(STEPS, torch.zeros((), dtype=torch.int64))
        self.register_buffer(PREPARED_WITH, _identity(compiled, training))

    def twin(self, name: str) -> nn.Module:
        """Return the twin of a module of the program, by its name."""
        return self.layers[name.replace(".", "/")]

    def forward(self, *x: Any) -> Any:
        """Map inputs, as the program takes them in order, to what the file gives: float32, one output or ``NamedTensors``.

        Raises:
            KanCompileError: training diverged: a parameter is NaN or infinite.
        """
        program = self.compiled.lowered
        values = program.arguments(x[0]) if len(x) == 1 and isinstance(x[0], NamedTensors) else x
        if self.training and torch.is_grad_enabled():
            self.check_finite()
            self.steps += 1
        return program.by_name(self.graph(*values))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move what the graph holds beside the layers, too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.graph._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def check_finite(self) -> None:
        """Refuse to go on with parameters that are not finite, which index no table."""
        shared = () if self.shared is None else self.shared.named_parameters()
        for name, value in itertools.chain(self.named_parameters(), shared):
            if not bool(torch.isfinite(value.detach().sum())):  # one pass, where asking every element takes five
                where = (
                    f"the last good state is {self.last_checkpoint!r}" if self.last_checkpoint else "no state was saved"
                )
                raise KanCompileError(
                    f"training: found NaN or infinity in {name!r} after step {int(self.steps)}, expected finite parameters; "
                    f"{where}; lower the learning rate, or clip gradients"
                )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state of a module that was prepared alike.

        Raises:
            KanCompileError: it was prepared from another model, or with other data or choices.
        """
        self.check_belongs(state_dict.get(PREPARED_WITH))
        return super().load_state_dict(state_dict, strict, assign)

    def check_belongs(self, prepared_with: object) -> None:
        """Refuse a state of a module that was prepared otherwise, told by what it holds as ``prepared_with``."""
        own = self.get_buffer(PREPARED_WITH).cpu()
        if not isinstance(prepared_with, Tensor) or not torch.equal(prepared_with.cpu(), own):
            raise KanCompileError(
                "training: found a state of another module, expected one that was prepared with the same model, calibration "
                f"data, recipe and choices ({self.training_choices}); prepare the module as it was when the state was saved"
            )

    def __repr__(self) -> str:
        count = sum(value.numel() for value in self.parameters() if value.requires_grad)
        lines = [f"TrainedModel({count:,} parameters, {int(self.steps)} steps; {self.training_choices}"]
        lines += [f"  {layer.name}: {self.compiled.lowered.contraction(layer).text()}" for layer in self._layers()[:8]]
        more = len(self._layers()) - 8
        return (
            "\n".join(
                [*lines, *([f"  and {more} more layers"] if more > 0 else []), *map("  {}".format, self.notes[:4])]
            )
            + ")"
        )

    def _layers(self) -> list[Layer]:
        return self.compiled.lowered.layers()


def _identity(compiled: CompiledModel, training: Training) -> Tensor:
    """Hash what a module begins with: recipe, choices, and every number of the program, uint8 ``[32]``."""
    found = hashlib.sha256(compiled.recipe.canonical_json().encode() + training.canonical_json().encode())
    for name, value in sorted(compiled.lowered.graph_module.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8).clone()
