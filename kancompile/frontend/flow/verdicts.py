"""Element ids, an operator call with the ids of its inputs, and what a rule can say about its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

CONSTANT = -1
LARGEST = torch.iinfo(torch.int64).max


def operator_name(node: fx.Node) -> str:
    """Name of a call's operator without namespace and overload, such as ``"add"``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return getattr(target, "__name__", str(target))


@dataclass(frozen=True)
class Track:
    """Ids of a tensor's elements: element ``e`` is a function of element ``ids[e]`` of ``anchor`` alone."""

    anchor: fx.Node
    ids: Tensor


@dataclass(frozen=True)
class Follows:
    """Every element of the result depends on at most one element of the anchor.

    ``linear`` says whether the result is affine in the operator's data-dependent inputs. Several results have one ids
    tensor each, ``None`` for an empty one.
    """

    ids: Tensor | tuple[Tensor | None, ...]
    linear: bool


@dataclass(frozen=True)
class Mixes:
    """Elements of the result are affine in several elements: a contraction, or a join (sum, concatenation) of tensors."""

    contraction: bool


@dataclass(frozen=True)
class Stops:
    """Elements of the result depend on several elements and not affinely: nothing can be said behind this operator."""

    reason: str


Verdict = Follows | Mixes | Stops


@dataclass(frozen=True)
class Call:
    """One operator call on a concrete example.

    Attributes:
        node: the call.
        name: name of the operator without overload.
        value: its result.
        args, kwargs: its arguments, nodes replaced by their values.
        tracks: ids of the data-dependent inputs.
        bounds: gives the least and largest value that the elements of an input can have, whatever the network's input.
    """

    node: fx.Node
    name: str
    value: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tracks: Mapping[fx.Node, Track]
    bounds: Callable[[fx.Node], tuple[Tensor, Tensor]]

    def ids(self, position: int) -> Tensor | None:
        """Ids of an argument, ``None`` where it is constant."""
        argument = self.node.args[position] if len(self.node.args) > position else None
        track = self.tracks.get(argument) if isinstance(argument, fx.Node) else None
        return None if track is None else track.ids

    def argument(self, position: int, default: Any = None) -> Any:
        """Value of a positional argument."""
        return self.args[position] if len(self.args) > position else default

    @property
    def one_anchor(self) -> bool:
        """Whether all data-dependent inputs have the same anchor."""
        return len({track.anchor for track in self.tracks.values()}) == 1


def merge_along(ids: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor | None:
    """Give the id that all elements along ``dims`` share, constants aside; ``None`` where two ids differ."""
    high = ids.amax(tuple(dims), keepdim=keepdim)
    low = torch.where(ids < 0, LARGEST, ids).amin(tuple(dims), keepdim=keepdim)
    return None if bool(((high >= 0) & (low != high)).any()) else high


def combine(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor | None:
    """Give the ids of a pointwise function of several tensors; ``None`` where two ids meet in one element."""
    merged = parts[0].broadcast_to(shape)
    for part in parts[1:]:
        other = part.broadcast_to(shape)
        if bool(((merged != other) & (merged >= 0) & (other >= 0)).any()):
            return None
        merged = torch.maximum(merged, other)
    return merged
