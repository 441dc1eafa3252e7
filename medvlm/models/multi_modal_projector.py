"""Projectors from vision features [I, N, D_vision] to the language model's width [I, N, D].

A new kind is a class here and a line in PROJECTORS. Parameter names follow ``transformers``' LLaVA.
"""

from torch import Tensor, nn


class LinearProjector(nn.Module):
    """LLaVA-Med v1.0's single linear layer."""

    def __init__(self, vision_dim: int, hidden_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_dim, hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_1(features)


class MLPProjector(nn.Module):
    """LLaVA-1.5's two layers with GELU (mlp2x_gelu)."""

    def __init__(self, vision_dim: int, hidden_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_dim, hidden_dim)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


PROJECTORS: dict[str, type[nn.Module]] = {"linear": LinearProjector, "mlp": MLPProjector}
