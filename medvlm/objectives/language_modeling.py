"""Next-token cross-entropy, summed. The caller divides by the global count of supervised tokens."""

import torch
from torch import Tensor

IGNORE = -100


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels [B, T] -> (mask of the positions that predict a supervised token [B, T], their targets [S])."""
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    mask = targets != IGNORE
    return mask, targets[mask]


def token_cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [S, V] and targets [S] -> the sum of -log p(target), in fp32."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
