"""An exponential moving average of the weights, as one more fp32 state of the optimizer.

Each rank averages what it updates: its fp32 partition under ZeRO. Checkpoints, resharding and offload treat the average
as they treat Adam's moments.
"""

from typing import Any

import torch

from medvlm.training.checkpoint.pieces import EMA


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """After each update: a <- decay * a + (1 - decay) * weights, beginning with the first update's result."""

    @torch.no_grad()
    def average(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # DeepSpeed steps through its partitions: at each call, only what is being updated is in the groups
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state[p]
                if EMA in state:
                    state[EMA].lerp_(p, 1 - decay)
                else:
                    state[EMA] = p.detach().float().clone()

    optimizer.register_step_post_hook(average)
