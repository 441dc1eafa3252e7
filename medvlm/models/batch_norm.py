"""Batch normalisation over the micro-batch of all ranks, as one rank with all of it would do it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """In training, statistics are those of all ranks' rows, whose numbers may differ; every rank calls it.

    A frozen layer, whose weight takes no gradient, and one that is ``fixed`` use their running statistics and keep
    them. These change only where gradients are enabled, so that a pass without them (gradient caching runs one first)
    leaves no trace; all ranks compute the same. They stay in fp32 whatever the type of the weights: in bf16 small
    updates would be lost.
    """

    fixed = False

    def forward(self, x: Tensor) -> Tensor:
        """[I, C, h, w] -> [I, C, h, w], computed in fp32."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        if self.fixed or not (self.training and self.weight.requires_grad):
            mean, variance = self.running_mean, self.running_var
        else:
            mean, variance, count = global_statistics(x)
            if torch.is_grad_enabled():
                with torch.no_grad():
                    unbiased = variance * count / (count - 1).clamp(min=1)
                    self.running_mean.lerp_(mean.float(), self.momentum)
                    self.running_var.lerp_(unbiased.float(), self.momentum)
                    if self.num_batches_tracked is not None:
                        self.num_batches_tracked.add_(1)
        scale = self.weight.float() * torch.rsqrt(variance.float() + self.eps)
        shift = self.bias.float() - mean.float() * scale
        return (x.float() * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = [getattr(self, name) for name in ("running_mean", "running_var")]
        super()._apply(fn, recurse)
        for name, before in zip(("running_mean", "running_var"), kept, strict=True):
            after = getattr(self, name)
            setattr(self, name, after.float() if before.is_meta else before.to(after.device, torch.float32))
        return self


def convert_batch_norm(model: nn.Module, *, fixed: bool = False) -> None:
    """In place: names and values stay. ``fixed``: in training, too, layers use their running statistics."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            assert module.running_mean is not None and module.running_var is not None
            module.__class__ = BatchNorm2d
            vars(module)["fixed"] = fixed
            module.running_mean, module.running_var = module.running_mean.float(), module.running_var.float()


def global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number [] of the values of [I, C, h, w] on all ranks, with gradient.

    Ranks exchange their own mean and variance once; these are put together by Chan et al. (1979).
    """
    rows = x.float().transpose(0, 1).flatten(1)
    n = rows.shape[1]
    mean = rows.sum(1) / max(n, 1)
    squares = (rows - mean[:, None]).square().sum(1)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mean, squares / max(n, 1), torch.tensor(float(n), device=x.device)
    stacked = torch.cat([mean, squares, mean.new_tensor([n])])
    every = _Gather.apply(stacked)
    means, squares, counts = every[:, : len(mean)], every[:, len(mean) : -1], every[:, -1:]
    count = counts.sum().clamp(min=1)
    mean = (means * counts).sum(0) / count
    variance = (squares.sum(0) + (counts * (means - mean).square()).sum(0)) / count
    return mean, variance, count


class _Gather(torch.autograd.Function):
    """[N] of each rank -> [world, N], the gradient summed over ranks: by the collectives that gloo and NCCL share."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]
