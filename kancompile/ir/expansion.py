"""Pointwise expansions, ``phi[b, i, k] = basis_k(x[b, i])``, as captured and as tables, and the quantizer of their input.

Shapes use ``b`` for the batch, ``*`` for leading dimensions that a layer treats alike (tokens, pixels), ``n_in`` inputs and
``k`` functions per input. Expansions that feed a convolution read their anchor channels first, as PyTorch stores images,
and yield their functions channels last, ``[b, *, n_in, k]`` with the pixels as ``*``: one lookup then fills the ``k``
neighboring columns of a channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kancompile.ir.index import HandOver


def to_channels_first(x: Tensor) -> Tensor:
    """View ``[b, *, c]`` as ``[b, c, *]``."""
    return x.movedim(-1, 1)


def to_channels_last(x: Tensor) -> Tensor:
    """View ``[b, c, *]`` as ``[b, *, c]``."""
    return x.movedim(1, -1)


def regroup(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View ``[b, ...]`` as ``[b, *shape]``, without an operator where it already has that shape."""
    return x if tuple(x.shape[1:]) == shape else x.reshape(-1, *shape)


class Branch(nn.Module):
    """One captured univariate region of an expansion: K functions of every input.

    Attributes:
        name: how reports call it, such as ``"spline"`` is not known here, so the name of the region's last node.
        region: module, as captured a graph, that maps the anchor tensor ``[b, *anchor_shape]`` to a tensor of any shape;
            ``None`` for the identity.
        position: int64 ``[*, n_in, k]``, where function ``k`` of input ``i`` stands in the region's flattened output
            (batch excluded); -1 where input ``i`` has fewer functions, which reads as 0.
    """

    position: Tensor

    def __init__(self, name: str, region: nn.Module | None, position: Tensor) -> None:
        super().__init__()
        self.name = name
        self.region = region
        self.register_buffer("position", position)
        self._window = _window(position)

    @property
    def k(self) -> int:
        """Number of functions of one input."""
        return int(self.position.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map the anchor ``[b, *anchor_shape]`` to basis values ``[b, *, n_in, k]``."""
        values = (x if self.region is None else self.region(x)).flatten(1)
        if self._window is not None and values.shape[1] == self._window[0] * self.position[..., 0].numel():
            width, first = self._window
            return values.reshape(-1, *self.position.shape[:-1], width)[..., first : first + self.k]
        picked = values[:, self.position.clamp(min=0).flatten()]
        return picked.reshape(-1, *self.position.shape) * (self.position >= 0)


def _window(position: Tensor) -> tuple[int, int] | None:
    """Recognize positions that are a slice of rows of equal length: ``(row length, first)``, or ``None``.

    A file then needs a reshape and a slice, where picking single elements takes a gather of each.
    """
    flat = position.reshape(-1, position.shape[-1])
    first = int(flat[0, 0])
    width = int(flat[1, 0]) - first if len(flat) > 1 else 0
    regular = torch.arange(len(flat))[:, None] * width + first + torch.arange(flat.shape[1])
    fits = first >= 0 and first + flat.shape[1] <= width and torch.equal(flat, regular)
    return (width, first) if fits else None


class AnyExpansion(nn.Module):
    """What the forms of an expansion have in common.

    Attributes:
        in_shape: ``(*, n_in)``.
        channels_first: whether it reads ``[b, n_in, *]``, as in front of a convolution.
        yields_codes: whether it yields table codes, or real values.
    """

    yields_codes = False
    in_shape: tuple[int, ...]
    channels_first: bool

    @property
    def n_in(self) -> int:
        """Number of inputs that a contraction weighs separately."""
        return int(self.in_shape[-1])

    @property
    def k(self) -> int:
        """Number of functions of one input, all branches together."""
        raise NotImplementedError

    @property
    def branch_functions(self) -> list[tuple[str, int]]:
        """List the captured branches and how many functions of one input each has, in order."""
        raise NotImplementedError

    @property
    def is_of_each(self) -> bool:
        """Whether it has functions of each input that it reads, in their order."""
        return True

    @property
    def is_identity(self) -> bool:
        """Whether it is known to pass its inputs on unchanged (a plain linear layer)."""
        return False

    def inputs_last(self, x: Tensor) -> Tensor:
        """View what it reads, ``[b, ...]``, as ``[b, *, n_in]``."""
        return to_channels_last(x) if self.channels_first else regroup(x, self.in_shape)

    def verify(self, layer: str) -> None:
        """Verify what it holds, for a layer of that name."""

    def reading_real(self) -> AnyExpansion:
        """Return the same functions of real values, whatever the layer before hands over."""
        return self

    def accepts(self, handed: HandOver) -> bool:
        """Whether it reads outputs of that form as what they are."""
        return handed.kind == "real"

    def column_scale(self) -> Tensor:
        """Real value of one unit of every column, float32 ``[n_in, k]``."""
        return torch.ones(self.n_in, self.k)

    def column_offset(self) -> Tensor:
        """Real value of 0 of every column, float32 ``[n_in, k]``."""
        return torch.zeros(self.n_in, self.k)

    def evaluate_inputs(self, points: Tensor) -> Tensor:
        """Evaluate the functions of every input at points of its own, where leading dimensions are treated alike.

        Points are dealt out over the leading dimensions (tokens, pixels), so that they cost no more than a few samples.

        Args:
            points: ``[n, n_in]`` input values.

        Returns:
            ``[n, n_in, k]``: float32 values, or the codes of a table.
        """
        lead = self.in_shape[:-1]
        padded = nn.functional.pad(points.to(torch.float32), (0, 0, 0, -len(points) % math.prod(lead)))
        values = self._evaluate(padded.reshape(-1, *self.in_shape))
        return values.reshape(-1, self.n_in, self.k)[: len(points)]

    def _evaluate(self, x: Tensor) -> Tensor:
        """Evaluate at real ``[b, *, n_in]``."""
        with torch.no_grad():
            values: Tensor = self.reading_real()((to_channels_first(x) if self.channels_first else x).contiguous())
        return values

    def stored_bytes(self) -> int:
        """Count the bytes that a file needs for tables of its values; 0 where it computes them."""
        return 0

    def describe(self) -> dict[str, Any]:
        """Describe it in plain data for manifests and reports."""
        return {"form": type(self).__name__, "n_in": self.n_in, "k": self.k}

    def text(self) -> str:
        """Describe it in a line of a printed program."""
        return f"expand[{'x'.join(map(str, self.in_shape))} -> {self.k}: {self.form()}]"

    def form(self) -> str:
        """Say in a printed program in which form it stands."""
        raise NotImplementedError

    def in_words(self) -> str:
        """Say to a reader of a report what it is: how many functions of how many inputs, and how they are evaluated."""
        inputs = f"{self.n_in} input{'s' if self.n_in != 1 else ''}"
        functions = f"{inputs} x {self.k} function{'s' if self.k != 1 else ''}"
        return f"{functions}: {self.evaluated_as()}"

    def evaluated_as(self) -> str:
        """Say to a reader of a report how the functions are evaluated."""
        return "in float"

    def _branch_text(self) -> str:
        return " | ".join(f"{name}:{k}" for name, k in self.branch_functions)


class Expansion(AnyExpansion):
    """A float expansion: the captured regions of one anchor, evaluated as PyTorch computes them.

    Attributes:
        anchor_shape: shape of the tensor it reads, without the batch.
        branches: regions whose functions stand side by side along ``k``.
        in_shape: ``(*, n_in)``: the anchor's elements, regrouped.
        channels_first: whether the anchor is ``(n_in, *)``, that is, ``in_shape`` is the anchor's shape with the first
            dimension moved to the end, as in front of a convolution. The positions of the branches are channels last. Where
            a side of the anchor is 1, it reads images of any such side, whose pixels all have the functions of that one.
    """

    def __init__(self, anchor_shape: Sequence[int], branches: Sequence[Branch], channels_first: bool = False) -> None:
        super().__init__()
        self.anchor_shape = tuple(anchor_shape)
        self.branches = nn.ModuleList(branches)
        self.in_shape = tuple(branches[0].position.shape[:-1])
        self.channels_first = channels_first

    @property
    def k(self) -> int:
        """Number of functions of one input, all branches together."""
        return sum(branch.k for branch in self.branches)  # type: ignore[misc]

    @property
    def branch_functions(self) -> list[tuple[str, int]]:
        """List the captured branches and how many functions of one input each has, in order."""
        return [(str(branch.name), int(branch.k)) for branch in self.branches]  # type: ignore[arg-type]

    @property
    def is_identity(self) -> bool:
        """Whether it passes its inputs on unchanged (a plain linear layer)."""
        return len(self.branches) == 1 and self.branches[0].region is None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[b, *anchor_shape]`` to ``[b, *, n_in, k]``; of an image larger than one pixel, every pixel of it."""
        sides = self._larger_sides(x)
        if not sides:
            return self._of_image(x)
        fixed = [dim for dim in range(2, x.dim()) if dim not in sides]
        rows = x.permute([0, *sides, 1, *fixed]).reshape(-1, *self.anchor_shape)
        lead = [x.shape[dim] for dim in (0, *sides, *fixed)]
        values = self._of_image(rows).reshape(*lead, self.n_in, self.k)
        order = [1 + [*sides, *fixed].index(dim) for dim in range(2, x.dim())]
        return values.permute([0, *order, -2, -1]) if fixed else values

    def _of_image(self, x: Tensor) -> Tensor:
        values = [branch(x) for branch in self.branches]
        return values[0] if len(values) == 1 else torch.cat(values, dim=-1)

    def _larger_sides(self, x: Tensor) -> list[int]:
        """Give the dimensions along which its functions are those of one pixel and an image has more, or any number."""
        if not self.channels_first or x.dim() != 1 + len(self.anchor_shape):
            return []
        sizes = zip(x.shape[2:], self.anchor_shape[1:], strict=True)
        return [
            dim for dim, (size, own) in enumerate(sizes, 2) if own == 1 and not (isinstance(size, int) and size == 1)
        ]

    def sample(self, points: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Evaluate all functions of all inputs at the same points, in float32 as the model computes them.

        Args:
            points: ``[n]`` input values.
            shape: of what it reads, where that is an image of another size than ``anchor_shape``.

        Returns:
            float32 ``[n, *, n_in, k]``.
        """
        shape = self.anchor_shape if shape is None else tuple(shape)
        filled = points.to(torch.float32).reshape(-1, *[1] * len(shape))
        with torch.no_grad():
            values: Tensor = self(filled.expand(-1, *shape).contiguous())
        return values

    def sample_inputs(self, points: Tensor) -> Tensor:
        """Evaluate the functions of every input at the same points, where leading dimensions are treated alike.

        Points are dealt out over the leading dimensions (tokens, pixels), so that they cost no more than a few samples.

        Args:
            points: ``[n]`` input values.

        Returns:
            float32 ``[n, n_in, k]``.
        """
        return self.evaluate_inputs(points[:, None].expand(-1, self.n_in))

    def sample_shared(self, points: Tensor) -> Tensor:
        """Evaluate the functions at points where all inputs have the same functions.

        Points are dealt out over the inputs, so that many points cost no more than a few samples.

        Args:
            points: ``[n]`` input values.

        Returns:
            float32 ``[n, k]``.
        """
        padded = nn.functional.pad(points.to(torch.float32), (0, -len(points) % math.prod(self.in_shape)))
        return self._evaluate(padded.reshape(-1, *self.in_shape)).reshape(-1, self.k)[: len(points)]

    def form(self) -> str:
        """Name the branches."""
        return self._branch_text()

    def _evaluate(self, x: Tensor) -> Tensor:
        anchor = to_channels_first(x) if self.channels_first else x.reshape(-1, *self.anchor_shape)
        with torch.no_grad():
            values: Tensor = self(anchor.contiguous())
        return values
