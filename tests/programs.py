"""Small programs built by hand, so that passes and targets are tested without a frontend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from kancompile.ir import (
    REAL,
    BasisParts,
    Branch,
    Contraction,
    Expansion,
    IndexQuantizer,
    IntegerContraction,
    JointTable,
    Program,
    TableExpansion,
    rows_of,
)
from tests.saturation import code_limit


def integer_program(
    widths: Sequence[int] = (6, 5, 4),
    levels: Sequence[int] = (256, 256),
    k: int = 3,
    weight_bits: int = 8,
    groups: int = 1,
    tables: int = 1,
    fused: bool = True,
    seed: int = 0,
) -> Program:
    """Build layers of random tables and weights; ``fused`` hands row numbers from layer to layer where they fit 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    root: dict[str, nn.Module] = {}
    graph = fx.Graph()
    value = graph.placeholder("x")
    indices = [IndexQuantizer(4.0 / (count - 1), count // 2, count) for count in levels]
    for number, (n_in, n_out) in enumerate(zip(widths, widths[1:], strict=False)):
        index = indices[number]
        receives_index = fused and number > 0 and index.is_8_bit and groups == 1
        expansion = TableExpansion(
            (n_in,),
            index,
            torch.randint(0, 256, (tables * index.levels, k), dtype=torch.uint8, generator=generator),
            None if tables == 1 else (torch.arange(n_in, dtype=torch.int32) % tables) * index.levels,
            torch.full((tables, k), 1 / 255),
            torch.zeros(tables, k),
            (k,),
            ("basis",),
            "index" if receives_index else "real" if number == 0 else "float",
        )
        limit = code_limit(weight_bits)
        columns = n_in * k
        sizes = [columns // groups] * (groups - 1) + [columns - columns // groups * (groups - 1)]
        hands_index = fused and groups == 1 and number + 2 < len(widths) and indices[number + 1].is_8_bit
        contraction = IntegerContraction(
            f"layers.{number}",
            torch.randint(
                -limit + (weight_bits == 8), limit, (columns, n_out), dtype=torch.int8, generator=generator
            ).T,
            torch.randint(-2000, 2000, (n_out,), dtype=torch.int32, generator=generator),
            (torch.rand(groups, n_out, generator=generator) + 0.5) * 2.0 / (255 * limit * columns**0.5),
            (n_out,),
            weight_bits=weight_bits,
            group_sizes=sizes,
            hands_over=rows_of(indices[number + 1]) if hands_index else REAL,
        )
        root[f"layer{number}_expand"], root[f"layer{number}_contract"] = expansion, contraction
        value = graph.call_module(f"layer{number}_expand", (value,))
        value = graph.call_module(f"layer{number}_contract", (value,))
    graph.output(value)
    return Program(fx.GraphModule(root, graph), (widths[0],))


class Bumps(nn.Module):
    """Gaussian bumps at given centers, ``[n_in, k]``, as a region that a frontend could have captured."""

    centers: torch.Tensor

    def __init__(self, centers: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("centers", centers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(-((x.unsqueeze(-1) - self.centers) ** 2))


class Silu(nn.Module):
    """The usual base function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


def float_program(widths: Sequence[int] = (6, 5, 4), k: int = 4, same_functions: bool = True, seed: int = 0) -> Program:
    """Build layers of Gaussian bumps and a SiLU branch; ``same_functions`` gives all inputs the same centers."""
    generator = torch.Generator().manual_seed(seed)
    root: dict[str, nn.Module] = {}
    graph = fx.Graph()
    value = graph.placeholder("x")
    for number, (n_in, n_out) in enumerate(zip(widths, widths[1:], strict=False)):
        centers = torch.linspace(-2, 2, k).expand(n_in, k)
        if not same_functions:
            centers = centers + torch.rand(n_in, 1, generator=generator)
        bumps = Branch("bumps", fx.symbolic_trace(Bumps(centers.contiguous())), torch.arange(n_in * k).view(n_in, k))
        base = Branch("base", fx.symbolic_trace(Silu()), torch.arange(n_in).view(n_in, 1))
        columns = n_in * (k + 1)
        weight = torch.randn(n_out, columns, generator=generator) / columns**0.5
        root[f"layer{number}_expand"] = Expansion((n_in,), [bumps, base])
        bias = torch.randn(n_out, generator=generator) / 10
        root[f"layer{number}_contract"] = Contraction(f"layers.{number}", weight, bias, (n_out,))
        value = graph.call_module(f"layer{number}_expand", (value,))
        value = graph.call_module(f"layer{number}_contract", (value,))
    graph.output(value)
    return Program(fx.GraphModule(root, graph), (widths[0],))


def calibration_inputs(program: Program, n: int = 400, seed: int = 1) -> torch.Tensor:
    """Draw standard normal inputs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *program.input_shape, generator=generator)


def joint_table(
    n_in: int = 6,
    members: int = 2,
    planes: int = 3,
    words: int = 4,
    levels: int = 8,
    functions: int = 0,
    seed: int = 0,
) -> JointTable:
    """Draw a table of pairs (or more) of inputs, with codes that may add up to 255.

    It is made of that many ``functions`` that inputs share, if any; two products of theirs leave int16.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randint(0, 255 // members + 1, (members, planes, words, levels), generator=generator)
    made_of = None
    if functions:
        mix = torch.randint(100, 128, (members, planes, words, functions), generator=generator)
        made_of = BasisParts(
            torch.randint(0, 256, (levels, functions), dtype=torch.uint8, generator=generator),
            mix.to(torch.int8),
            torch.randint(0, 2000, (members, planes, words), dtype=torch.int16, generator=generator),
            torch.full((members, planes, words), 8 + (functions - 1).bit_length(), dtype=torch.uint8),
        )
        parts = made_of.parts()
    return JointTable(
        (n_in,),
        IndexQuantizer(4.0 / levels, levels // 2, levels),
        torch.randint(0, n_in, (members, words), generator=generator),
        parts.to(torch.uint8),
        torch.rand(planes * words, 1, generator=generator) / 100 + 0.01,
        torch.randn(planes * words, 1, generator=generator),
        "joint",
        made_of=made_of,
    )


def joint_program(hidden: bool = False, table: JointTable | None = None, weight_bits: int = 8) -> Program:
    """Build a layer of pairs of inputs, ``hidden`` behind a layer of single ones that hands row numbers over."""
    table = joint_table() if table is None else table
    generator = torch.Generator().manual_seed(1)
    limit = code_limit(weight_bits) - 1
    root: dict[str, nn.Module] = {}
    graph = fx.Graph()
    value = graph.placeholder("x")
    first, n_in = [], table.read_shape[0]
    if hidden:
        index = IndexQuantizer(4.0 / 31, 16, 32)
        codes = torch.randint(0, 256, (32, 3), dtype=torch.uint8, generator=generator)
        ones, none = torch.full((1, 3), 1 / 255), torch.zeros(1, 3)
        first = [TableExpansion((6,), index, codes, None, ones, none, (3,), ("basis",))]
        table = table.replace(input="index")
    for number, expansion in enumerate([*first, table]):
        is_last, columns = expansion is table, expansion.n_in * expansion.k
        n_out = 4 if is_last else n_in
        weight = torch.randint(-limit, limit + 1, (n_out, columns), dtype=torch.int8, generator=generator)
        bias = torch.randint(-2000, 2000, (n_out,), dtype=torch.int32, generator=generator)
        scale = (torch.rand(1, n_out, generator=generator) + 0.5) * 2.0 / (255 * limit * columns**0.5)
        hands_over = REAL if is_last else rows_of(table.index)
        root[f"layer{number}_expand"] = expansion
        root[f"layer{number}_contract"] = IntegerContraction(
            f"layers.{number}", weight, bias, scale, (n_out,), weight_bits=weight_bits, hands_over=hands_over
        )
        value = graph.call_module(f"layer{number}_expand", (value,))
        value = graph.call_module(f"layer{number}_contract", (value,))
    graph.output(value)
    return Program(fx.GraphModule(root, graph), (6 if hidden else n_in,))
