"""A LoRA run's checkpoint -> a PEFT adapter folder on a stock LLaVA folder, proven by a fresh process.

Parts that trained without adapters, as a rule the projector, go along whole as PEFT's ``modules_to_save``.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from medvlm.config.model import Model
from medvlm.errors import UserError
from medvlm.export.llava import stock_name, tower_buffers, trained_model, values_of_identity, verify, write_llava
from medvlm.export.writing import open_run
from medvlm.models import lora
from medvlm.models.build import build_components
from medvlm.models.trainable import part_config
from medvlm.training import checkpoint

PREFIX = "base_model.model."  # peft's name for the model that it wraps
LAYER_MARK = ".lora_A."


def export_adapter(
    run: Path, out: Path, base: Path | None = None, tag: str | None = None, ema: bool = False
) -> dict[str, Any]:
    """Write adapters and trained parts of a run to ``out``; returns what was proven.

    ``base``: the stock folder with the frozen weights, such as the export of the run that this one began from; by
    default they are written to ``out/base``. Raises UserError if base and adapter together do not give the logits of
    the trained model.
    """
    config, source = open_run(run, out, tag)
    if config.model.family != "llava":
        raise UserError(f"{run}: --adapter is of language models; leave it out, and adapters are merged")
    if not any(lora.lora_of(config.model, part) for part in config.model.PARTS):
        raise UserError(f"{run}: no part of it has `train: lora`; leave out --adapter")
    parts = build_components(config.llava)
    state = checkpoint.consolidate(source, ema=ema)
    model = trained_model(config, parts, state)
    plain = checkpoint.StockWeights(state, merge=False, built=model)

    staging = checkpoint.new_folder(out)
    frozen = base or staging / "base"
    if base is None:
        frozen.mkdir()
        write_llava(frozen, plain, parts, config, buffers=tower_buffers(parts, source))
    tensors = {adapter_name(name): value for name, value in state.items() if lora.is_adapter(name)}
    whole = _whole_modules(config.model)
    for name, value in [*plain.items(), *values_of_identity(config, parts)] if whole else []:
        if any(module in stock_name(name).split(".") for module in whole):
            tensors[PREFIX + stock_name(name)] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, staging / "adapter_model.safetensors")
    settings = adapter_config(config.model, list(state), whole)
    settings.base_model_name_or_path = str(base or out / "base")
    settings.inference_mode = True
    settings.save_pretrained(staging)
    parts.processor.save_pretrained(staging)
    proof = verify(model, parts, frozen, staging)
    checkpoint.finish_folder(staging, out)
    return {"path": str(out), "base": settings.base_model_name_or_path, "checkpoint": str(source), **proof}


def adapter_name(name: str) -> str:
    """``language_model.model.layers.0.mlp.up_proj.lora_A.default.weight`` as peft stores it."""
    return PREFIX + stock_name(name).replace(".default.", ".")


def adapter_config(model: Model, names: list[str], whole: list[str]) -> Any:
    """One configuration for all parts: where there are several, ranks and alphas are given by layer."""
    adapted = {part: own for part in model.PARTS if (own := lora.lora_of(model, part))}
    common = next(iter(adapted.values()))
    targets, ranks, alphas = [], {}, {}
    for layer in sorted({name.partition(LAYER_MARK)[0] for name in names if LAYER_MARK in name}):
        own, target = adapted[layer.partition(".")[0]], stock_name(layer)
        targets.append(target)
        if len(adapted) > 1:
            ranks[target] = own.rank
            # use_rslora is the first part's: the alpha that it turns into this part's scale
            alphas[target] = lora.scale(own) * (own.rank**0.5 if common.rslora else own.rank)
    return lora.peft_config(
        common, targets, rank_pattern=ranks, alpha_pattern=alphas, modules_to_save=whole or None, task_type="CAUSAL_LM"
    )


def _whole_modules(model: Model) -> list[str]:
    """Modules of the stock class that trained without adapters."""
    trained = [part for part in model.PARTS if part_config(model, part).train in ("full", "norm_and_bias")]
    return trained + ["lm_head"] * ("language_model" in trained)
