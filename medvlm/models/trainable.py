"""What of each part trains, and the table that says so."""

import re
from dataclasses import dataclass

from torch import nn

from medvlm.config.model import Backbone, Model, Part
from medvlm.errors import UserError
from medvlm.models.layers import checkpoint_activations
from medvlm.models.lora import is_adapter

BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|stages)\.(\d+)\.")


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


def backbones(config: Model) -> list[str]:
    """The parts that are Hugging Face models."""
    return [part for part in config.PARTS if isinstance(part_config(config, part), Backbone)]


def layer_depths(names: list[str]) -> dict[str, int]:
    """By parameter of a backbone: its layer (stage, of a convolutional one) from 1; empty where it has none.

    What comes before the layers (embeddings) is at 0, what comes after them one above the last, by the order of
    ``names``, which is that in which the model registers them.
    """
    blocks = {name: int(found[1]) for name in names if (found := BLOCK.search(name))}
    if not blocks:
        return {}
    top, first = max(blocks.values()) + 2, names.index(next(iter(blocks)))
    return {n: blocks[n] + 1 if n in blocks else (0 if at < first else top) for at, n in enumerate(names)}


def first_layers(names: list[str], count: int, field: str) -> set[str]:
    """The parameters of the first ``count`` layers and of what comes before them."""
    depths = layer_depths(names)
    layers = max((depth for name, depth in depths.items() if BLOCK.search(name)), default=0)
    if count > layers:
        raise UserError(f"{field}.frozen_layers: {count} is more than the {layers} there are")
    return {name for name, depth in depths.items() if depth <= count}


def apply_trainable(model: nn.Module, config: Model, unused: dict[str, set[str]]) -> list[PartSummary]:
    """Set ``requires_grad`` per part, and training mode. ``unused`` names, by part, those that no output depends on.

    Sizes come from ``ds_numel`` where ZeRO-3 has partitioned a parameter.
    """
    summaries = []
    for name in config.PARTS:
        part = part_config(config, name)
        norms = _norm_parameters(getattr(model, name))
        parameters = part_parameters(model, name)
        idle = unused.get(name, set())
        if isinstance(part, Backbone) and part.frozen_layers:
            idle = idle | first_layers(list(parameters), part.frozen_layers, f"model.{name}")
        for key, p in parameters.items():
            chosen = {
                "frozen": False,
                "full": True,
                "norm_and_bias": key in norms or key.endswith("bias"),
                "lora": is_adapter(key),
            }[part.train]
            p.requires_grad_(chosen and key not in idle)
        total = sum(map(_numel, parameters.values()))
        trainable = sum(_numel(p) for p in parameters.values() if p.requires_grad)
        summaries.append(PartSummary(name, part.train, total, trainable, part.learning_rate))
        if isinstance(part, Backbone):
            checkpoint_activations(getattr(model, name), part.gradient_checkpointing, f"model.{name}")
    model.train()  # pretrained backbones come without dropout, checkpointing and statistics of their batches
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
