"""BioViL-T's comparison of an image with the one before it (arXiv 2301.04558; dimensions as in microsoft/hi-ml).

Imports only PyTorch: exported folders carry this file.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

DROPOUT = 0.1


def sine_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """[height * width, dim], DETR's: half of the features say the row, half the column, each from 0 to 2 pi."""
    half = dim // 2
    frequency = 10000 ** (-2 * torch.arange(half // 2, device=device) / half).repeat_interleave(2)
    halves = []
    for count in (height, width):
        angle = torch.arange(1, count + 1, device=device)[:, None] / (count + 1e-6) * 2 * math.pi * frequency
        halves.append(torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1))
    rows, columns = halves
    grid = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(grid, -1).flatten(0, 1)


class DropPath(nn.Module):
    """Leaves a branch out for some rows while training, and scales it up for the others (arXiv 1603.09382)."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return branch
        keep = 1 - self.probability
        kept = branch.new_empty(branch.shape[0], *[1] * (branch.dim() - 1)).bernoulli_(keep)
        return branch * kept / keep


class Linear(nn.Linear):
    """Begins as the published model's do: weights from a truncated normal distribution."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Block(nn.Module):
    """Pre-norm transformer block. Positions are added to what attention sees, not to what it adds to."""

    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width, eps=1e-6)
        self.query = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.value = Linear(width, width, bias=False)
        self.out = Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, eps=1e-6)
        self.up = Linear(width, width)
        self.down = Linear(width, width)
        self.dropout = nn.Dropout(DROPOUT)
        self.drop_path = DropPath(drop_path)

    def attention(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value, dropout_p=self.dropout.p if self.training else 0.0)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [I, N, W], positions [N, W] -> [I, N, W]."""
        x = x + self.drop_path(self.attention(self.norm_1(x) + positions))
        hidden = self.dropout(nn.functional.gelu(self.up(self.norm_2(x))))
        return x + self.drop_path(self.dropout(self.down(hidden)))


class PriorImagePooler(nn.Module):
    """Patches of an image, and their difference from those of the image before it."""

    def __init__(self, features: int, width: int, layers: int, heads: int, drop_path: float):
        super().__init__()
        self.width = width
        self.reduce = nn.Conv2d(features, width, 1, bias=False)
        self.time = nn.Parameter(nn.init.trunc_normal_(torch.empty(2, width), std=0.02))
        self.missing = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.blocks = nn.ModuleList(Block(width, heads, drop_path) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, grid: Tensor, priors: Tensor | None = None, has_prior: Tensor | None = None) -> Tensor:
        """grid [I, C, h, w], priors [P, C, h, w] of the rows of ``has_prior`` [I] -> [I, 2 W, h, w].

        The second half is the difference, or a learned embedding where there is no prior image. All layers run either
        way, as ranks of a ZeRO run must run the same ones.
        """
        count, _, height, width = grid.shape
        reduced = self.reduce(grid if priors is None else torch.cat([grid, priors]))
        current, before = reduced[:count], reduced[:count]
        if has_prior is None:
            has_prior = torch.zeros(count, dtype=torch.bool, device=grid.device)
        if priors is not None:
            before = current.masked_scatter(has_prior[:, None, None, None], reduced[count:])
        tokens = self.dropout(torch.cat([current, before], -2).flatten(2).transpose(1, 2))
        places = sine_positions(height, width, self.width, grid.device).to(tokens.dtype)
        positions = (places + self.time[:, None]).flatten(0, 1)
        for block in self.blocks:
            tokens = block(tokens, positions)
        difference = self.norm(tokens)[:, : height * width].transpose(1, 2).view_as(current)
        difference = torch.where(has_prior[:, None, None, None], difference, self.missing[:, None, None])
        return torch.cat([current, difference], 1)
