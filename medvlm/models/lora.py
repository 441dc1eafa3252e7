"""Low-rank adapters (Hu et al., arXiv 2106.09685) on a backbone's linear layers, by ``peft``, and their exact merge.

Adapters are put into the backbone itself: a linear layer ``x`` becomes ``x.base_layer``, ``x.lora_A.default`` and
``x.lora_B.default``. Everything else keeps its name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medvlm.config.model import Backbone, Lora, Model
from medvlm.errors import UserError


def lora_of(config: Model, part: str) -> Lora | None:
    section = getattr(config, part)
    return section.lora if isinstance(section, Backbone) and section.train == "lora" else None


def scale(lora: Lora) -> float:
    """The factor of B A: alpha / r, or alpha / sqrt(r) where rank-stabilised (Kalajdzievski, arXiv 2312.03732)."""
    return lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)


def add_adapters(model: nn.Module, config: Model, unused: dict[str, set[str]], seed: int) -> None:
    """Put adapters into the parts with ``train: lora``, in place; all ranks draw the same initial weights.

    ``unused`` names, by part, parameters that no output depends on: their layers get none. Base weights may be
    partitioned by ZeRO-3 already; the adapters are partitioned with the rest by ``deepspeed.initialize``.
    """
    for part in config.PARTS:
        if lora := lora_of(config, part):
            names = _targets(getattr(model, part), lora, unused.get(part, set()), f"model.{part}.lora.targets")
            torch.manual_seed(seed)
            _inject(getattr(model, part), lora, names)


def peft_config(lora: Lora, names: list[str], **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=names,
        **more,
    )


def merge(weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """W + factor B A in fp32: weight [out, in], a [r, in], b [out, r]."""
    return weight.float() + factor * (b.float() @ a.float())


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def merged(state: Mapping[str, Tensor], config: Model) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint under their stock names, adapters merged; reads one layer at a time."""
    for name in state:
        if is_adapter(name):
            continue
        layer, mark, rest = name.partition(".base_layer.")
        if not mark:
            yield name, state[name]
        elif rest != "weight":
            yield f"{layer}.{rest}", state[name]
        else:
            lora = lora_of(config, name.partition(".")[0])
            assert lora is not None, name
            a, b = (state[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            yield f"{layer}.weight", merge(state[name], a, b, scale(lora))


def _targets(module: nn.Module, lora: Lora, skip: set[str], field: str) -> list[str]:
    """Names of the linear layers that get an adapter: all but the output layer, or those whose name ends as asked."""
    left = {id(getattr(module, "get_output_embeddings", lambda: None)())}
    # PyTorch's own attention reads this layer's weight without calling it, and would pass an adapter by
    left |= {id(child.out_proj) for child in module.modules() if isinstance(child, nn.MultiheadAttention)}
    linear = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and id(child) not in left and f"{name}.weight" not in skip
    ]
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    if not linear:
        raise UserError(f"{field}: this model has no torch.nn.Linear layers")
    if lora.targets is None:
        return linear
    chosen = []
    for target in lora.targets:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found:
            raise UserError(f"{field}: no linear layer {target!r}; the model has {', '.join(kinds)}")
        chosen += found
    return sorted(set(chosen), key=linear.index)


def _inject(module: nn.Module, lora: Lora, names: list[str]) -> None:
    # Not get_peft_model: it would wrap the module, rename everything and, by default, cast bf16 adapters to fp32,
    # which ZeRO-3 refuses beside bf16 weights.
    from peft import inject_adapter_in_model

    inject_adapter_in_model(peft_config(lora, names), module)
