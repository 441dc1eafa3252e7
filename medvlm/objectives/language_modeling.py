"""Next-token cross-entropy, summed. The caller divides by the global count of supervised tokens."""

from typing import Any

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


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """hidden [S, D], weight [V, D], bias [V] and targets [S] -> ``token_cross_entropy_sum`` of the linear layer.

    Logits exist for ``chunk`` positions at a time, [chunk, V] instead of [S, V], by default in 256 MiB. Gradients are
    computed along with the loss, since its own gradient is a factor: nothing is computed twice, and ``weight`` is not
    needed again in the backward pass. Those of weight and bias are summed in fp32. There is no second derivative.
    The idea is Liger's (Hsu et al., arXiv 2410.10989); from 2.13 on, ``torch.nn.functional`` has it too.
    """
    if not torch.is_grad_enabled():  # else autograd would ask for gradients that nobody wants
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, bias, chunk or max(1, 2**26 // len(weight)))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
        need_hidden, need_weight, _, need_bias, _ = ctx.needs_input_grad
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            rows, wanted = hidden[part], targets[part, None]
            logits = torch.nn.functional.linear(rows, weight, bias).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += (log_sum - logits.gather(1, wanted)).sum()
            if not any(ctx.needs_input_grad):
                continue
            d_logits = logits.sub_(log_sum).exp_()  # in place: [chunk, V] is what this function saves on
            d_logits.scatter_add_(1, wanted, d_logits.new_full(wanted.shape, -1.0))
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ weight
            if d_weight is not None and d_weight.dtype == d_logits.dtype:
                torch.addmm(d_weight, d_logits.T, rows, out=d_weight)
            elif d_weight is not None:
                d_weight += d_logits.T @ rows
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        if d_bias is not None and bias is not None:
            d_bias = d_bias.to(bias.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if d is None else d.mul_(grad) for d in ctx.saved_tensors]  # in place: [V, D] is large
        return gradients[0], gradients[1], None, gradients[2], None
