"""Which parameters are updated how: groups by part, kind and depth, and the optimizer for them."""

from typing import Any

import torch
from torch import nn

from medvlm.config.model import Backbone
from medvlm.config.schema import RunConfig
from medvlm.errors import UserError
from medvlm.models.trainable import layer_depths, part_config, part_parameters
from medvlm.training.adamw_8bit import AdamW8bit
from medvlm.training.ema import keep_average
from medvlm.training.lion import Lion
from medvlm.training.schedule import Rate, warmup_steps


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """Trainable parameters by part and, with layer-wise decay, by depth; matrices apart from vectors (which are never
    decayed); for Muon, the weights of hidden linear layers apart from other matrices.

    A group's ``lr`` is its peak. ``muon`` says whether Muon updates it; its rate then is Muon's own.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    taken: set[int] = set()
    optimizer = config.training.optimizer
    for part in config.model.PARTS:
        section, hidden = part_config(config.model, part), _hidden_matrices(getattr(model, part))
        decay = config.training.weight_decay if section.weight_decay is None else section.weight_decay
        parameters = part_parameters(model, part)
        for name, factor in layer_factors(model, config, part).items():
            p = parameters[name]
            if not p.requires_grad or id(p) in taken:
                continue
            taken.add(id(p))
            matrix = len(getattr(p, "ds_shape", p.shape)) >= 2
            muon = optimizer.name == "muon" and id(p) in hidden
            peak = optimizer.muon_learning_rate if muon else section.learning_rate
            key = (part, factor, muon, matrix)
            if key not in groups:
                groups[key] = {
                    "params": [],
                    "lr": peak * factor,
                    "weight_decay": decay if matrix else 0.0,
                    "name": part,
                    "matrix": matrix,
                    "muon": muon,
                }
            groups[key]["params"].append(p)
    if not groups:
        raise UserError("model: every part is frozen; set `train: full` for at least one")
    return list(groups.values())


def layer_factors(model: nn.Module, config: RunConfig, part: str) -> dict[str, float]:
    """By parameter of a part: layer_decay to the power of the layers above it (BEiT, Bao et al., arXiv 2106.08254)."""
    names = list(part_parameters(model, part))
    section = part_config(config.model, part)
    decay = section.layer_decay if isinstance(section, Backbone) else 1.0
    depths = layer_depths(names)
    if decay == 1.0 or not depths:
        return dict.fromkeys(names, 1.0)
    top = max(depths.values())
    return {name: decay ** (top - depth) for name, depth in depths.items()}


def rates(groups: list[dict[str, Any]], config: RunConfig, total: int) -> list[Rate]:
    """Of the groups, in their order."""
    found = []
    for group in groups:
        own = part_config(config.model, group["name"]).warmup_steps
        found.append(Rate(group["name"], group["lr"], warmup_steps(config.training, total) if own is None else own))
    return found


def make_optimizer(
    groups: list[dict[str, Any]], config: RunConfig, stage: int, offload: str = "none"
) -> torch.optim.Optimizer:
    """``offload``: none, cpu or nvme. Raises UserError for what DeepSpeed computes wrongly or not at all."""
    if offload != "none":
        _refuse_with_offload(config, offload)
    if config.training.ema_decay and config.training.optimizer.name == "adamw_8bit":
        raise UserError("training.ema_decay: an average in fp32 undoes what adamw_8bit saves; use one of them")
    optimizer = _new(groups, config, stage, offload != "none")
    if decay := config.training.ema_decay:
        keep_average(optimizer, decay)
    return optimizer


def _refuse_with_offload(config: RunConfig, device: str) -> None:
    name = config.training.optimizer.name
    if name != "adamw":
        raise UserError(f"training.optimizer.name: {name} has no update for an offloaded optimizer; use adamw")
    if config.training.ema_decay and device == "nvme":
        raise UserError("training.ema_decay: NVMe offload knows Adam's states only; offload to cpu, or unset it")
    if any(part_config(config.model, part).gradient_clipping for part in config.model.PARTS):
        raise UserError("gradient_clipping of a part: an offloaded optimizer's gradients are gone; set it to null")


def _new(groups: list[dict[str, Any]], config: RunConfig, stage: int, offload: bool) -> torch.optim.Optimizer:
    chosen = config.training.optimizer
    betas = chosen.betas or ((0.9, 0.99) if chosen.name == "lion" else (0.9, 0.999))
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, betas=betas, adamw_mode=True)
    if chosen.name == "lion":
        return Lion(groups, betas=betas)
    if chosen.name == "adamw_8bit":
        return AdamW8bit(groups, betas=betas)
    if chosen.name == "muon":
        return _muon(groups, config, betas, stage)
    # the meta device, where a step may be rehearsed, has no fused kernel
    return torch.optim.AdamW(groups, betas=betas, fused=not any(p.is_meta for g in groups for p in g["params"]))


def optimizer_line(optimizer: torch.optim.Optimizer, offload: str) -> str:
    """Which implementation an update runs in, and why none better; for the start of a run."""
    name = type(optimizer).__name__
    if offload != "none":
        return f"optimizer: {name} (its states are offloaded: {offload})"
    if name == "AdamW":
        return f"optimizer: {name}, fused"
    return f"optimizer: {name} (there is no fused kernel of it)"


def _muon(groups: list[dict[str, Any]], config: RunConfig, betas: tuple, stage: int) -> torch.optim.Optimizer:
    """DeepSpeed's: its ZeRO stages gather each matrix, orthogonalise its momentum and keep the result as gradient."""
    if stage > 0 and config.training.gradient_clipping is not None:
        raise UserError(
            "training.gradient_clipping: under ZeRO-1 to 3 DeepSpeed clips Muon's update, not the gradient, which "
            "shortens every step; set it to null with muon"
        )
    if any(part_config(config.model, part).gradient_clipping is not None for part in config.model.PARTS):
        raise UserError("gradient_clipping of a part: under ZeRO-1 and 2 it would come after Muon; set it to null")
    if not any(group["muon"] for group in groups):
        raise UserError("training.optimizer.name: muon updates weights of linear layers, and none of them trains")
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        group["use_muon"] = group["muon"]
        for p in group["params"]:
            p.use_muon = group["muon"]  # the ZeRO stages look there
        if group["muon"]:
            group["momentum"] = config.training.optimizer.momentum
        else:
            group |= {"betas": betas, "eps": 1e-8}
    return MuonWithAuxAdam(groups)


def _hidden_matrices(module: nn.Module) -> set[int]:
    """Identities of the weights of linear layers but the output layer: what Muon is made for
    (https://kellerjordan.github.io/posts/muon/). Embeddings and convolutions are not."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear) and m is not head}
