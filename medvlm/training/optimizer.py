"""AdamW with a learning rate per part, and the cosine schedule as a pure function of the step."""

import math
from typing import Any

import torch

from medvlm.config.schema import RunConfig
from medvlm.errors import UserError
from medvlm.models.trainable import part_config
from medvlm.models.vision_language_model import PARTS, VisionLanguageModel


def learning_rate_factor(step: int, total: int, warmup_ratio: float, minimum: float) -> float:
    """Of the peak, for the update number ``step`` (from 0): linear warm-up, then cosine down to ``minimum``."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: VisionLanguageModel, config: RunConfig) -> list[dict[str, Any]]:
    """Trainable parameters by part, matrices apart from vectors (which are never decayed)."""
    groups = []
    taken: set[int] = set()
    for name in PARTS:
        chosen = [p for p in model.part_parameters(name).values() if p.requires_grad and id(p) not in taken]
        taken.update(map(id, chosen))
        peak = part_config(config.model, name).learning_rate
        for decay in (True, False):
            params = [p for p in chosen if (len(getattr(p, "ds_shape", p.shape)) >= 2) == decay]
            if params:
                wd = config.training.weight_decay if decay else 0.0
                groups.append({"params": params, "lr": peak, "weight_decay": wd, "name": name})
    if not groups:
        raise UserError("model: every part is frozen; set `train: full` for at least one")
    return groups


def make_optimizer(groups: list[dict[str, Any]], config: RunConfig, offload: bool) -> torch.optim.Optimizer:
    betas = config.training.betas
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, betas=betas, adamw_mode=True)
    return torch.optim.AdamW(groups, betas=betas, fused=torch.cuda.is_available())
