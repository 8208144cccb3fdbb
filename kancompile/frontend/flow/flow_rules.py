"""What each operator family does to element ids: one small function for each family, named in one table.

Every element of a data-dependent tensor carries the *id* of the one element of its *anchor* that it depends on, or
``CONSTANT`` where it depends on none. A rule computes the ids of an operator's result, or says that its elements depend on
several elements: affinely (``Mixes``, a contraction or a join) or otherwise (``Stops``). Rules know operators of
PyTorch, never classes of layers, and they run the operator itself on the ids wherever it only moves elements, so that
reshapes that reinterpret memory, permutations and writes in place need no algebra of shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kancompile.frontend.flow.table_rules import read, write
from kancompile.frontend.flow.verdicts import CONSTANT, Call, Follows, Mixes, Stops, Verdict, combine, merge_along
from kancompile.ir import RECURRENCES

# --- movement -------------------------------------------------------------------------------------------------------

_FLOAT_ONLY = frozenset({"im2col", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"})
_MOVED = {  # operator -> positions of the arguments whose elements it moves; the others must be constant
    **dict.fromkeys(
        (
            *(
                "view",
                "_unsafe_view",
                "reshape",
                "permute",
                "transpose",
                "t",
                "unsqueeze",
                "squeeze",
                "slice",
                "select",
            ),
            *("expand", "clone", "alias", "detach", "lift_fresh_copy", "flip", "roll", "diagonal", "unfold", "repeat"),
            *("unbind", "split", "split_with_sizes", "constant_pad_nd", "index", "index_select", "as_strided", "tril"),
            *("triu", "masked_fill", "cat", "stack", *_FLOAT_ONLY),
        ),
        (0,),
    ),
    "where": (1, 2),
    "copy": (1,),
    "select_scatter": (0, 1),
    "slice_scatter": (0, 1),
    "index_put": (0, 2),
    "scatter": (0, 3),
    "gather": (0,),
}
_FILLED = {"constant_pad_nd": 2, "masked_fill": 2}  # operator -> position of the constant that fills new elements


def movement(call: Call) -> Verdict | None:
    """Run the operator on the ids (shifted by one, so that zeros which it puts in mean constant)."""
    positions = _MOVED[call.name]
    if call.name == "scatter" and (call.kwargs or not isinstance(call.argument(3), Tensor | float | int)):
        return None
    if call.name == "index_put" and call.argument(3, False):
        return None
    moved = {node for p in positions if p < len(call.node.args) for node in _nodes(call.node.args[p])}
    if call.name == "copy":
        moved |= set(_nodes(call.node.args[0]))  # overwritten altogether
    if any(node not in moved for node in call.tracks):
        return None
    if not call.one_anchor:
        return Mixes(contraction=False) if isinstance(call.value, Tensor) else Stops("splits a tensor of two origins")
    dtype = torch.float64 if call.name in _FLOAT_ONLY else torch.int64

    def shifted(argument: fx.Node) -> Tensor:
        return (call.tracks[argument].ids + 1).to(dtype).contiguous()

    def zeroed(argument: Any, value: Any) -> Any:
        if isinstance(argument, Tensor) and not (isinstance(value, fx.Node) and value in call.tracks):
            return torch.zeros(argument.shape, dtype=dtype)
        return argument

    arguments = []
    for position, (symbolic, value) in enumerate(zip(call.node.args, call.args, strict=True)):
        if position in positions or call.name == "copy":
            items = symbolic if isinstance(symbolic, list | tuple) else [symbolic]
            values = value if isinstance(value, list | tuple) else [value]
            new = [shifted(s) if s in call.tracks else zeroed(v, s) for s, v in zip(items, values, strict=True)]
            if call.name == "scatter" and position == 3 and not isinstance(value, Tensor):
                new = [0]
            arguments.append(new if isinstance(symbolic, list | tuple) else new[0])
        elif _FILLED.get(call.name) == position:
            arguments.append(torch.zeros((), dtype=dtype) if isinstance(value, Tensor) else 0)
        else:
            arguments.append(value)
    keep = {key: value for key, value in call.kwargs.items() if key not in ("dtype", "memory_format")}
    if call.name in ("view", "_unsafe_view"):  # ids need not have the strides of the values
        ids = call.ids(0)
        assert ids is not None
        result = (ids + 1).reshape(call.value.shape)
    else:
        result = call.node.target(*arguments, **keep)  # type: ignore[operator]
    if isinstance(result, Tensor):
        return Follows(result.to(torch.int64) - 1, linear=True)
    return Follows(tuple(part.to(torch.int64) - 1 for part in result), linear=True)


def _nodes(argument: Any) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(argument) if isinstance(leaf, fx.Node)]


# --- pointwise ------------------------------------------------------------------------------------------------------

_OF_PYTORCH = ("aten", "prims")
_AFFINE = frozenset({"add", "sub", "rsub", "neg", "positive", "_native_batch_norm_legit_no_training"})
_ALSO_POINTWISE = frozenset({"_to_copy", "where", "floor_divide", "remainder", "bucketize", "searchsorted"})


def pointwise(call: Call) -> Verdict | None:
    """Let every element of the result depend on what its operands' elements depend on."""
    several = isinstance(call.value, tuple | list)
    first = call.value[0] if several else call.value
    linear = _is_affine(call, first)
    if call.name == "searchsorted" and call.ids(0) is not None:
        return None
    if not call.one_anchor:
        return Mixes(contraction=False) if linear else Stops("nonlinear function of values of two origins")
    parts = [track.ids for track in call.tracks.values()]
    ids = combine(parts, first.shape)
    if ids is None:
        return Mixes(contraction=False) if linear else Stops("nonlinear function of several features")
    zero = _zeros(call)
    if zero is not None:
        ids = torch.where(zero.broadcast_to(ids.shape), CONSTANT, ids)
    if several:
        return Follows((ids, *(None for _ in call.value[1:])), linear)
    return Follows(ids, linear)


def _is_affine(call: Call, result: Tensor) -> bool:
    """Tell whether the result is affine in all data-dependent operands together."""
    if not result.is_floating_point():
        return False
    data = [p for p, argument in enumerate(call.node.args) if isinstance(argument, fx.Node) and argument in call.tracks]
    if any(not call.args[p].is_floating_point() for p in data):
        return False
    if call.name in _AFFINE:
        return call.name != "_native_batch_norm_legit_no_training" or data == [0]
    if call.name == "mul":
        return len(data) == 1
    if call.name == "div":
        return data == [0] and call.kwargs.get("rounding_mode") is None
    return call.name == "_to_copy"


def _zeros(call: Call) -> Tensor | None:
    """Where a constant operand makes the result constant: a factor 0, an exponent 0."""
    positions = {"mul": (0, 1), "pow": (1,)}.get(call.name, ())
    zero: Tensor | None = None
    for position in positions:
        if call.ids(position) is None:
            here = torch.as_tensor(call.args[position]) == 0
            zero = here if zero is None else zero | here
    return zero if zero is not None and bool(zero.any()) else None


# --- contractions ---------------------------------------------------------------------------------------------------


def matrix_product(call: Call) -> Verdict:
    """mm, bmm, addmm and baddbmm: affine in one operand; univariate where all ids along the sum are equal."""
    left_at = 1 if call.name in ("addmm", "baddbmm") else 0
    left, right = call.ids(left_at), call.ids(left_at + 1)
    added = call.ids(0) if left_at else None
    if not call.one_anchor:
        if left is not None and right is not None:
            return Stops("product of two data-dependent matrices")
        return Mixes(contraction=True)
    shape = call.value.shape
    parts = []
    for ids, summed, spread in ((left, -1, -1), (right, -2, -2)):
        if ids is not None:
            merged = merge_along(ids, (summed,))
            if merged is None:
                if left is not None and right is not None:
                    return Stops("product of two data-dependent matrices")
                return Mixes(contraction=True)
            parts.append(merged.unsqueeze(spread).expand(shape))
    linear = not (left is not None and right is not None)
    if added is not None:
        parts.append(added.broadcast_to(shape))
    ids = combine(parts, shape)
    if ids is None:
        return Mixes(contraction=True) if linear else Stops("product of two data-dependent matrices")
    return Follows(ids, linear)


def convolution(call: Call) -> Verdict:
    """Convolution by a constant kernel: univariate only where every window of every group sees one id."""
    weight_is_data, bias_is_data = call.ids(1) is not None, call.ids(2) is not None
    ids = call.ids(0)
    if weight_is_data or bias_is_data or ids is None:
        return Stops("convolution with a data-dependent kernel")
    weight, (stride, padding, dilation, transposed, _, groups) = call.args[1], call.args[3:9]
    if transposed or weight.dim() not in (3, 4):
        return Mixes(contraction=True)
    if weight.dim() == 3:
        ids = ids.unsqueeze(2)
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    window = (1, weight.shape[2]) if weight.dim() == 3 else tuple(weight.shape[2:])

    def merge(part: Tensor) -> Tensor | None:
        patches = torch.nn.functional.unfold(
            (part + 1).double(), window, tuple(dilation), tuple(padding), tuple(stride)
        )
        return merge_along(patches.view(len(part), groups, -1, patches.shape[-1]).long() - 1, (2,))

    # all windows of a large image take much memory, and mostly the first one tells: two ids that meet in it meet anyway
    height, width = (reach * (side - 1) + 1 for reach, side in zip(dilation, window, strict=True))
    merged = None if merge(ids[:1, :, :height, :width]) is None else merge(ids)
    if merged is None:
        return Mixes(contraction=True)
    spread = merged.unsqueeze(2).expand(-1, -1, weight.shape[0] // groups, -1)
    return Follows(spread.reshape(call.value.shape), linear=True)


def summation(call: Call) -> Verdict:
    """Sum and mean: affine."""
    merged = _reduced(call)
    return Mixes(contraction=True) if merged is None else Follows(merged, linear=True)


def linear_filter(call: Call) -> Verdict:
    """Average pooling, interpolation and the like: affine, and treated as mixing."""
    return Mixes(contraction=True) if list(call.tracks) == [call.node.args[0]] else Stops("data-dependent filter")


# --- reductions and orders ------------------------------------------------------------------------------------------


def _reduced(call: Call) -> Tensor | None:
    ids = call.ids(0)
    assert ids is not None
    result = call.value if isinstance(call.value, Tensor) else call.value[0]
    dims = call.argument(1)
    if dims is None or dims == []:
        dims = list(range(ids.dim()))
    dims = dims if isinstance(dims, list | tuple) else [dims]
    merged = merge_along(ids, dims, keepdim=result.dim() == ids.dim())
    return None if merged is None else merged.reshape(result.shape)


def reduction(call: Call) -> Verdict:
    """Max, prod, argmax, norms and so on along dimensions."""
    if call.name == "linalg_vector_norm":
        call = replace(call, args=(call.args[0], call.argument(2)))
    merged = _reduced(call) if len(call.tracks) == 1 and call.ids(0) is not None else None
    if merged is None:
        return Stops("nonlinear reduction over several features")
    return Follows(merged if isinstance(call.value, Tensor) else tuple(merged for _ in call.value), linear=False)


def along_one_dimension(call: Call) -> Verdict:
    """Softmax, sort, topk, cumprod and the like, whose result depends on everything along one dimension."""
    ids = call.ids(0)
    if ids is None or len(call.tracks) != 1:
        return Stops("operates on several data-dependent tensors")
    dim = call.kwargs.get("dim", call.argument(2 if call.name == "topk" else 1, -1))
    merged = merge_along(ids, (dim,), keepdim=True)
    if merged is None:
        return Mixes(contraction=True) if call.name == "cumsum" else Stops("depends on several features at once")
    if isinstance(call.value, Tensor):
        return Follows(merged.expand(call.value.shape), linear=call.name == "cumsum")
    return Follows(tuple(merged.expand(part.shape) for part in call.value), linear=False)


def layer_norm(call: Call) -> Verdict:
    """Normalization over the last dimensions: univariate only within the functions of one element."""
    ids = call.ids(0)
    if ids is None or len(call.tracks) != 1:
        return Stops("normalization with data-dependent scale")
    merged = merge_along(ids, range(-len(call.args[1]), 0), keepdim=True)
    if merged is None:
        return Stops("normalization over several features")
    return Follows(tuple(merged.expand(part.shape) for part in call.value), linear=False)


def normalisation(call: Call) -> Verdict:
    """Group and instance norm."""
    return Stops("normalization over several features")


def max_pool(call: Call) -> Verdict:
    """Max pooling."""
    return Stops("maximum over several positions")


def recurrence(call: Call) -> Verdict:
    """Every step of a recurrent layer depends on all inputs of the steps before."""
    return Stops("a recurrent layer stays in float, as one operator for all steps")


def loop(call: Call) -> Verdict:
    """Which steps a loop takes depends on all values, of all samples."""
    return Stops("a loop whose number of steps depends on the samples stays in float, layers inside as well")


# --- all of them -----------------------------------------------------------------------------------------------------

Rule = Callable[[Call], Verdict | None]

RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(_MOVED, (movement,)),
    "where": (movement, pointwise),
    **dict.fromkeys(("index", "index_select", "gather"), (movement, read)),
    **dict.fromkeys(("scatter", "index_put"), (movement, write)),
    **dict.fromkeys(("scatter_add", "scatter_reduce"), (write,)),
    "embedding": (read,),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", *sorted(_ALSO_POINTWISE - {"where"})), (pointwise,)),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), (matrix_product,)),
    "convolution": (convolution,),
    **dict.fromkeys(("sum", "mean"), (summation,)),
    **dict.fromkeys(
        (
            *("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
            *("upsample_bilinear2d", "upsample_nearest2d"),
        ),
        (linear_filter,),
    ),
    **dict.fromkeys(
        ("amax", "amin", "prod", "max", "min", "any", "all", "argmax", "argmin", "var", "linalg_vector_norm"),
        (reduction,),
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "sort", "topk", "cumsum", "cumprod"), (along_one_dimension,)),
    **dict.fromkeys(RECURRENCES, (recurrence,)),
    "while_loop": (loop,),
    "native_layer_norm": (layer_norm,),
    **dict.fromkeys(("native_group_norm", "_native_batch_norm_legit"), (normalisation,)),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d"), (max_pool,)),
}


def judge(call: Call) -> Verdict:
    """Apply the first rule that says something about an operator; unknown operators stop the analysis."""
    rules = RULES.get(call.name, ())
    target = call.node.target
    if not rules and isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        rules = (pointwise,)
    for rule in rules:
        verdict = rule(call)
        if verdict is not None:
            return verdict
    if isinstance(target, torch._ops.OpOverload) and target.namespace not in _OF_PYTORCH:
        return Stops(
            "a custom operator, whose formula is not in the graph; write it with ordinary operators, or pass torch.export's "
            f"program after run_decompositions({{torch.ops.{target}: FORMULA}})"
        )
    return Stops("no rule for this use of the operator" if rules else "no rule for this operator")
