"""Integer truth tables of a network that was trained with brevitas: read, computed again, and run as a PyTorch module.

The checkpoint holds, for the input and for every layer, the threshold ``t`` of a quantizer of ``b`` bits, whose step is
``t / 2^(b-1)``. An edge's table has an integer for every value of its input's quantizer: its function there, in steps of the
layer's own quantizer, rounded and clipped. A network adds up the integers of its edges, clips the sums, and takes them as rows
of the next layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.zoo.efficient_kan import b_spline_basis

_THRESHOLD = "brevitas_module.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"moons": functional.gelu, "wine": functional.gelu}
_ORDER = 3


@dataclass(frozen=True)
class TruthTables:
    """Published tables and the checkpoint that they were made of.

    Attributes:
        state: of the checkpoint, by name.
        bits: of the quantizers, that of the input first.
        tables: int32 ``[n_in, rows, n_out]`` of every layer.
        activation: of the base branch.
    """

    state: Mapping[str, Tensor]
    bits: tuple[int, ...]
    tables: tuple[Tensor, ...]
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def read(cls, checkpoint: Path, tables: Path, bits: tuple[int, ...]) -> TruthTables:
        """Read both files; nothing is unpickled but tensors.

        Raises:
            SystemExit: a file is missing.
        """
        for file in (checkpoint, tables):
            if not file.is_file():
                raise SystemExit(f"{file}: no such file")
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
        edges = json.loads(tables.read_text(encoding="utf-8"))
        activation = _ACTIVATIONS.get(checkpoint.stem, functional.silu)
        return cls(found.get("model_state_dict", found), bits, tuple(_layers(edges)), activation)

    def steps(self) -> list[float]:
        """Give the steps of the quantizers, that of the input first."""
        layers = range(len(self.tables))
        names = ["input_layer", *(f"layers.{number}.output_quantizer" for number in layers)]
        return [
            float(self.state[f"{name}.{_THRESHOLD}"]) / 2 ** (bits - 1)
            for name, bits in zip(names, self.bits, strict=True)
        ]

    def computed(self) -> list[Tensor]:
        """Compute the tables from weights and learned ranges, int32 ``[n_in, rows, n_out]`` of every layer."""
        found = []
        for number, (step, own_step) in enumerate(zip(self.steps()[:-1], self.steps()[1:], strict=True)):
            weights = {key: self.state[f"layers.{number}.{key}"] for key in _KEYS}
            half, own_half = 2 ** (self.bits[number] - 1), 2 ** (self.bits[number + 1] - 1)
            x = (torch.arange(-half, half) * step)[:, None].expand(-1, len(weights["grid"]))
            spline = weights["spline_weight"] * weights["spline_scaler"][..., None]
            values = self.activation(x)[..., None] * weights["base_weight"].T
            values = values + torch.einsum("rik,oik->rio", b_spline_basis(x, weights["grid"], _ORDER), spline)
            integers = (values * weights["spline_selector"].T / own_step).round().clamp(-own_half, own_half - 1)
            found.append(integers.transpose(0, 1).int())
        return found

    def compare(self) -> tuple[int, int]:
        """Count entries, and those that come out differently."""
        pairs = list(zip(self.tables, self.computed(), strict=True))
        return sum(one.numel() for one, _ in pairs), sum(int((one != other).sum()) for one, other in pairs)

    def network(self) -> nn.Module:
        """Build the integer network of the published tables."""
        return _IntegerNetwork(self).eval()


_KEYS = ("grid", "spline_weight", "spline_scaler", "spline_selector", "base_weight")


def _layers(edges: Mapping[str, Mapping[str, list[int]]]) -> list[Tensor]:
    places = {tuple(map(int, name.split("_"))): torch.tensor(edge["values_int"]) for name, edge in edges.items()}
    layers = []
    for number in range(1 + max(place[0] for place in places)):
        own = {place[1:]: values for place, values in places.items() if place[0] == number}
        n_in, n_out = (1 + max(place[axis] for place in own) for axis in (0, 1))
        table = torch.zeros(n_in, len(next(iter(own.values()))), n_out, dtype=torch.int32)
        for (i, o), values in own.items():
            table[i, :, o] = values.int()
        layers.append(table)
    return layers


class _IntegerNetwork(nn.Module):
    """Inputs ``[b, n_in]`` to integers ``[b, n_out]``, as float32."""

    def __init__(self, tables: TruthTables) -> None:
        super().__init__()
        self.bits, self.step = tables.bits, tables.steps()[0]
        prefix = "input_layer.pre_transforms."
        self.norm = nn.BatchNorm1d(tables.tables[0].shape[0])
        state = {key.rpartition(".")[2]: value for key, value in tables.state.items() if key.startswith(f"{prefix}0.")}
        self.norm.load_state_dict(state)
        self.register_buffer("offset", tables.state[f"{prefix}1.bias"])
        for number, table in enumerate(tables.tables):
            self.register_buffer(f"table_{number}", table.float())
        self.count = len(tables.tables)

    def forward(self, x: Tensor) -> Tensor:
        values = torch.round((self.norm(x) + self.offset) / self.step)
        for number in range(self.count):
            half = 2 ** (self.bits[number] - 1)
            rows = (values.clamp(-half, half - 1) + half).long()
            table: Tensor = getattr(self, f"table_{number}")
            values = table[torch.arange(len(table)), rows].sum(1)
        half = 2 ** (self.bits[-1] - 1)
        return values.clamp(-half, half - 1)
