"""Networks of the field that read sequences by PyTorch's recurrent layers."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.field_layers import GaussianKan


class LstmKan(nn.Module):
    """Read ``[b, steps, n_in]``, then a head of two KAN layers on the last state: logits ``[b, 10]``."""

    def __init__(self, n_in: int = 8, width: int = 48) -> None:
        super().__init__()
        self.lstm = nn.LSTM(n_in, width, batch_first=True)
        self.first, self.second = GaussianKan(width, 16), GaussianKan(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(self.lstm(x)[0][:, -1]))
        return logits


class GruKan(nn.Module):
    """Predict every next character by two layers and two KAN layers: ``[b, steps]`` (int64) -> ``[b, steps, characters]``."""

    def __init__(self, characters: int, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 16)
        self.gru = nn.GRU(16, width, num_layers=2, batch_first=True)
        self.first, self.second = GaussianKan(width, 24), GaussianKan(24, characters)

    def forward(self, token: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(self.gru(self.embedding(token))[0]))
        return logits
