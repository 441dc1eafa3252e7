"""From features of a tower to the joint space of images and texts.

Imports only PyTorch: exported folders carry this file.
"""

from typing import Any

from torch import Tensor, nn

from medvlm.models.prior_image import PriorImagePooler

ACTIVATIONS: dict[str, Any] = {"relu": nn.functional.relu, "gelu": nn.functional.gelu}


class Head(nn.Module):
    """``none`` gives the features as they are; the others as `medvlm.config.model.Head` says."""

    def __init__(
        self,
        kind: str,
        features: int,
        embedding_dim: int,
        hidden_dim: int | None = None,
        activation: str = "relu",
        norm: str = "none",
        bias: bool = False,
    ):
        super().__init__()
        self.kind, self.norm_of = kind, norm
        self.activation = ACTIVATIONS[activation]
        if kind == "none":
            return
        if kind == "linear":
            self.linear_1: nn.Module = nn.Linear(features, embedding_dim, bias)
            return
        hidden = hidden_dim or embedding_dim

        def layer(width: int, out: int, has_bias: bool) -> nn.Module:
            return nn.Conv2d(width, out, 1, bias=has_bias) if kind == "conv" else nn.Linear(width, out, has_bias)

        self.linear_1 = layer(features, hidden, bias and norm != "batch")  # that norm takes a bias away again
        if norm != "none":
            self.norm = nn.BatchNorm2d(hidden) if norm == "batch" else nn.LayerNorm(hidden)
        self.linear_2 = layer(hidden, embedding_dim, bias)

    def forward(self, features: Tensor) -> Tensor:
        """[..., C] -> [..., D]; of ``conv`` [I, C, h, w] -> [I, D, h, w]."""
        if self.kind == "none":
            return features
        hidden = self.linear_1(features)
        if self.kind == "linear":
            return hidden
        if self.norm_of == "batch":
            hidden = self.norm(hidden)
        hidden = self.activation(hidden)
        if self.norm_of == "layer":
            hidden = self.norm(hidden.movedim(1, -1)).movedim(-1, 1) if self.kind == "conv" else self.norm(hidden)
        return self.linear_2(hidden)


class ImageHead(Head):
    """With ``prior_image``, arguments of `PriorImagePooler`, features are first compared with a prior image's."""

    def __init__(self, features: int, prior_image: dict[str, Any] | None = None, **options: Any):
        super().__init__(features=2 * prior_image["width"] if prior_image else features, **options)
        self.prior_image = PriorImagePooler(features, **prior_image) if prior_image else None

    def forward(self, features: Tensor, priors: Tensor | None = None, has_prior: Tensor | None = None) -> Tensor:
        """As `Head`; priors [P, C, h, w] belong to the rows of ``has_prior`` [I]."""
        if self.prior_image is not None:
            features = self.prior_image(features, priors, has_prior)
        return super().forward(features)
