"""What of each part trains, and the table that says so."""

from dataclasses import dataclass

from torch import nn

from medvlm.config.model import Backbone, Model, Part
from medvlm.models.layers import checkpoint_activations
from medvlm.models.lora import is_adapter


@dataclass
class PartSummary:
    name: str
    train: str
    parameters: int
    trainable: int
    learning_rate: float


def part_config(config: Model, part: str) -> Part:
    return getattr(config, part)


def part_parameters(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """By their names inside the part."""
    return dict(getattr(model, part).named_parameters())


def apply_trainable(model: nn.Module, config: Model, unused: set[str]) -> list[PartSummary]:
    """Set ``requires_grad`` per part. ``unused`` names vision parameters that cannot influence the features.

    Sizes come from ``ds_numel`` where ZeRO-3 has partitioned a parameter.
    """
    summaries = []
    for name in config.PARTS:
        part = part_config(config, name)
        norms = _norm_parameters(getattr(model, name))
        parameters = part_parameters(model, name)
        for key, p in parameters.items():
            chosen = {
                "frozen": False,
                "full": True,
                "norm_and_bias": key in norms or key.endswith("bias"),
                "lora": is_adapter(key),
            }[part.train]
            p.requires_grad_(chosen and not (name == "vision_tower" and key in unused))
        total = sum(map(_numel, parameters.values()))
        trainable = sum(_numel(p) for p in parameters.values() if p.requires_grad)
        summaries.append(PartSummary(name, part.train, total, trainable, part.learning_rate))
        if isinstance(part, Backbone):
            checkpoint_activations(getattr(model, name), part.gradient_checkpointing, f"model.{name}")
    return summaries


def _numel(p: nn.Parameter) -> int:
    return getattr(p, "ds_numel", p.numel())


def _norm_parameters(module: nn.Module) -> set[str]:
    return {
        f"{name}.{key}" if name else key
        for name, child in module.named_modules()
        if "norm" in type(child).__name__.lower()
        for key, _ in child.named_parameters(recurse=False)
    }
