"""Gradients between the backward pass and the update: their norm by part, and clipping by part.

Where DeepSpeed keeps them is read from 0.19's ``stage_1_and_2.py`` and ``stage3.py``; it clips by the global norm
inside its ``step``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medvlm.training import distributed


def pieces(engine: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """What this rank holds of each parameter's gradient, summed over ranks and micro-steps. Not with an offloaded
    optimizer, whose gradients have left already."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        yield from ((p, p.grad) for p in engine.module.parameters() if p.grad is not None)
        return
    groups = zero.fp16_groups if stage == 3 else zero.params_in_partition
    for n, parameters in enumerate(groups):
        found = [g for g in zero.averaged_gradients[n] if not getattr(g, "_zero_padding", False)]
        yield from zip(parameters, found, strict=False)  # ZeRO-1 and 2 may fill up the last rank's with zeros


def part_norms(engine: Any, owners: Mapping[int, str]) -> dict[str, float]:
    """The norm of the gradient of each part; ``owners`` maps the identity of a parameter to its part."""
    parts = sorted(set(owners.values()))
    sums = torch.zeros(len(parts), device=distributed.device())
    by_part: dict[str, list[Tensor]] = {part: [] for part in parts}
    for p, gradient in pieces(engine):
        by_part[owners[id(p)]].append(gradient.detach())
    for n, part in enumerate(parts):
        if by_part[part]:
            sums[n] = torch.stack(torch._foreach_norm(by_part[part], dtype=torch.float32)).square().sum()
    if (stage := engine.zero_optimization_stage()) > 0:
        zero = engine.optimizer
        group = zero._get_param_partition_group(zero.fp16_groups[0][0]) if stage == 3 else zero.dp_process_group
        distributed.comm.all_reduce(sums, group=group)
    return dict(zip(parts, sums.sqrt().tolist(), strict=True))


def clip_parts(engine: Any, owners: Mapping[int, str], norms: Mapping[str, float], limits: Mapping[str, float]) -> None:
    """Scale the gradients of each part in ``limits`` to at most that norm, as ``torch.nn.utils.clip_grad_norm_``."""
    factors = {part: min(1.0, limit / (norms[part] + 1e-6)) for part, limit in limits.items()}
    for p, gradient in pieces(engine):
        if (factor := factors.get(owners[id(p)], 1.0)) < 1:
            gradient.mul_(factor)
