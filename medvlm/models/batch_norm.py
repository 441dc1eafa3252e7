"""Batch normalisation over the micro-batch of all ranks, as one rank with all of it would do it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm


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
        weight, bias = self.weight.float(), self.bias.float()
        if self.fixed or not (self.training and self.weight.requires_grad):
            given = x.float() if x.dtype == torch.float64 else x  # which mixes with no other type
            return batch_norm(given, self.running_mean, self.running_var, weight, bias, eps=self.eps).to(x.dtype)
        mean, variance, count = global_statistics(x)
        if torch.is_grad_enabled():
            with torch.no_grad():
                unbiased = variance * count / (count - 1).clamp(min=1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(unbiased, self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        return _Normalize.apply(x, weight, bias, mean, torch.rsqrt(variance + self.eps), count)

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


@torch.no_grad()
def global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and number [] of the values of [I, C, h, w] on all ranks, in fp32.

    Ranks exchange their own mean and variance once; these are put together by Chan et al. (1979).
    """
    rows = x.float().transpose(0, 1).flatten(1)
    n = rows.shape[1]
    mean = rows.sum(1) / max(n, 1)
    squares = (rows - mean[:, None]).square().sum(1)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mean, squares / max(n, 1), torch.tensor(float(n), device=x.device)
    mine = torch.cat([mean, squares, mean.new_tensor([n])])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    every = torch.stack(parts)
    means, squares, counts = every[:, : len(mean)], every[:, len(mean) : -1], every[:, -1:]
    count = counts.sum().clamp(min=1)
    mean = (means * counts).sum(0) / count
    variance = (squares.sum(0) + (counts * (means - mean).square()).sum(0)) / count
    return mean, variance, count


class _Normalize(torch.autograd.Function):
    """[I, C, h, w] by the mean [C] and inverse deviation [C] of ``count`` [] values on all ranks, then weight [C] and
    bias [C]; what is kept for the backward pass is the input as it came (Ioffe and Szegedy, arXiv 1502.03167)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, count: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse, count)
        scaled = (x.float() - _of_channels(mean)) * _of_channels(inverse * weight)
        return (scaled + _of_channels(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, inverse, count = ctx.saved_tensors
        gradient = gradients[0].float()
        normal = (x.float() - _of_channels(mean)) * _of_channels(inverse)
        sums = torch.stack([(gradient * normal).sum((0, 2, 3)), gradient.sum((0, 2, 3))])
        found = None
        if ctx.needs_input_grad[0]:
            totals = sums.clone()
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(totals)
            of_normal, of_all = (_of_channels(total / count) for total in totals)
            found = ((gradient - normal * of_normal - of_all) * _of_channels(inverse * weight)).to(x.dtype)
        return found, *sums, None, None, None  # of the weights, this rank's share


def _of_channels(values: Tensor) -> Tensor:
    return values[:, None, None]
