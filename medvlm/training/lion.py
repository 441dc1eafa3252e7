"""Lion (Chen et al., arXiv 2302.06675, algorithm 2), for whole parameters and ZeRO's flat partitions alike.

DeepSpeed's own needs a compiler at first use, on CPU and GPU.
"""

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """``weight_decay`` is decoupled, as in AdamW. Learning rates are 3 to 10 times smaller than AdamW's."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]  # no closure, no loss
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            momenta = [self.state[p]["exp_avg"] for p in parameters]
            updates = torch._foreach_lerp(gradients, momenta, beta1)  # beta1 m + (1 - beta1) g
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
