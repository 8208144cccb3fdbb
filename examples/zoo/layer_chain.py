"""Chain layers under the name ``layers``, as most public KANs do."""

from collections.abc import Sequence

from torch import Tensor, nn


class LayerChain(nn.Module):
    """Layers in a row, with a module between each two.

    Args:
        layers: the layers.
        between: what follows each layer but the last; nothing if empty.
    """

    def __init__(self, layers: Sequence[nn.Module], between: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.between = nn.ModuleList(between or [nn.Identity() for _ in layers[1:]])

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the network on [..., n_in]."""
        x = self.layers[0](x)
        for between, layer in zip(self.between, self.layers[1:], strict=True):
            x = layer(between(x))
        return x
