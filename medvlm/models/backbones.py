"""Hugging Face models as parts: from a hub name, a folder or a configuration, whole or born sharded under ZeRO-3."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, SiglipTextConfig, SiglipTextModel
from transformers.integrations import deepspeed as integration
from transformers.utils import is_torchvision_available

from medvlm.config.model import Backbone
from medvlm.errors import UserError

IMAGE_PROCESSORS = {
    "clip_vision_model": "CLIPImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "vit": "ViTImageProcessor",
    "dinov2": "BitImageProcessor",
    "swin": "ViTImageProcessor",
}
CONVOLUTIONAL = "resnet"
WHOLE_IMAGE_BELOW = 384  # ConvNextImageProcessor crops smaller images out of larger ones
IMAGE_SIZE = 224  # of a convolutional tower from scratch, which takes any
AutoModel.register(SiglipTextConfig, SiglipTextModel, exist_ok=True)  # transformers lists only its vision tower
TOWER = "vision_tower"
"""Folder of an exported dual encoder in which its image tower lies as a model of its own."""


def load(auto: Any, path: str, field: str, **options: Any) -> Any:
    """``auto.from_pretrained``; what fails is a UserError that names ``field``."""
    try:
        return auto.from_pretrained(path, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{field}: cannot load {path}: {reason}") from error


def from_scratch(values: dict[str, Any], field: str) -> Any:
    """A configuration from a recipe's ``config``. Raises UserError for a model type that transformers lacks."""
    try:
        rest = {k: v for k, v in values.items() if k != "model_type"}
        return AutoConfig.for_model(values["model_type"], **rest)
    except ValueError as error:
        raise UserError(f"{field}.config: {str(error).splitlines()[0]}") from None


def tower_path(path: str) -> str:
    """Where an image tower's weights are: of an exported dual encoder, in a folder of their own."""
    return str(Path(path) / TOWER) if (Path(path) / TOWER / "config.json").exists() else path


def backbone_config(part: Backbone, field: str, half: str) -> Any:
    """``half`` is ``vision_config`` or ``text_config``: what counts of a CLIP's or SigLIP's configuration."""
    if part.config is not None:
        return from_scratch(part.config, field)
    path = tower_path(str(part.path)) if half == "vision_config" else str(part.path)
    config = load(AutoConfig, path, field)
    refuse_quantized(config, field)
    return getattr(config, half, config)


def refuse_quantized(config: Any, field: str) -> None:
    """Weights of 8 bits and less can neither be trained here nor exported."""
    if given := getattr(config, "quantization_config", None):
        method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
        raise UserError(f"{field}: the folder's weights are quantised ({method}); give one with bf16 or fp32 weights")


def feature_width(vision: Any) -> int:
    """Of an image tower's last layer."""
    return vision.hidden_sizes[-1] if vision.model_type == CONVOLUTIONAL else vision.hidden_size


def load_tower(part: Backbone, config: Any, dtype: torch.dtype, field: str, **options: Any) -> Any:
    """A model without output layers, such as half of a CLIP or SigLIP. Running statistics of batches are in fp32 as its
    folder has them, whatever ``dtype``. Raises UserError where a weight is absent."""
    if part.path is None:
        return AutoModel.from_config(config, dtype=dtype, **options)
    path = tower_path(part.path) if field == f"model.{TOWER}" else part.path
    cls = transformers.MODEL_MAPPING[type(config)]
    model = load_whole(cls, path, f"{field}.path", dtype, config=config, **options)
    if dtype != torch.float32 and any(_statistics(model)):
        with _not_sharded():
            exact = load_whole(cls, path, f"{field}.path", torch.float32, config=config, **options)
        for (norm, name), (same, _) in zip(_statistics(model), _statistics(exact), strict=True):
            setattr(norm, name, getattr(same, name))
    return model


@contextmanager
def _not_sharded() -> Iterator[None]:
    """While this lasts, transformers builds models whole, though ZeRO-3 is switched on."""
    switch = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = switch


def rest_frozen(*backbones: nn.Module) -> None:
    """One without trainable parameters stays in evaluation mode while others train: its dropout, or Swin's stochastic
    depth, would be noise on features that cannot learn from it."""
    for backbone in backbones:
        if not any(p.requires_grad for p in backbone.parameters()):
            backbone.eval()


def _statistics(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Running means and variances: their layers and names there."""
    for module in model.modules():
        yield from ((module, name) for name in ("running_mean", "running_var") if name in module._buffers)


def load_whole(auto: Any, path: str, field: str, dtype: torch.dtype, **options: Any) -> Any:
    """By an auto class or a class of transformers. Raises UserError where the folder lacks a weight of the model."""
    model, info = load(auto, path, field, dtype=dtype, output_loading_info=True, **options)
    # A tied layer is listed as missing by some versions though it shares the input embedding.
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if getattr(model.config, "tie_word_embeddings", False):
        tied.add("lm_head.weight")
    missing = set(info["missing_keys"]) - tied
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise UserError(f"{field}: {path} lacks {len(missing)} weights of the model, among them {some}")
    return model


def own_image_processor(part: Backbone) -> Any:
    """That of a tower's folder or hub name; None of a tower from scratch, or a folder without."""
    path = None if part.path is None else tower_path(part.path)
    if path is None or (Path(path).is_dir() and not (Path(path) / "preprocessor_config.json").exists()):
        return None
    return load(AutoImageProcessor, path, "model.vision_tower")


def stock_processor(name: str) -> Any:
    """A class of transformers: Pillow's where there is no torchvision, which transformers else takes with a warning."""
    return getattr(transformers, name if is_torchvision_available() else f"{name}Pil")


def image_processor_of(part: Backbone, vision: Any) -> Any:
    """The tower's own, or else its family's at the size that its configuration says; a ConvNeXT processor, ResNet's, in
    the terms of one that says how it resizes and crops."""
    own = own_image_processor(part)
    if own is None and vision.model_type == CONVOLUTIONAL:
        own = stock_processor("ConvNextImageProcessor")(size={"shortest_edge": IMAGE_SIZE})
    if own is not None:
        return _as_crop(own) if type(own).__name__.startswith("ConvNextImageProcessor") else own
    cls = stock_processor(IMAGE_PROCESSORS[vision.model_type])
    side = {"height": vision.image_size, "width": vision.image_size}
    if vision.model_type in ("siglip_vision_model", "vit", "swin"):
        return cls(size=side)
    return cls(size={"shortest_edge": vision.image_size}, crop_size=side)


def _as_crop(processor: Any) -> Any:
    size = processor.size["shortest_edge"]
    common = {"image_mean": processor.image_mean, "image_std": processor.image_std, "resample": processor.resample}
    if size >= WHOLE_IMAGE_BELOW:
        return stock_processor("ViTImageProcessor")(size={"height": size, "width": size}, **common)
    cropping = {"size": {"shortest_edge": int(size / processor.crop_pct)}, "crop_size": size}
    return stock_processor("CLIPImageProcessor")(**cropping, **common)


def square_size(image_processor: Any) -> int:
    """The side of its images. Raises UserError where they are not square."""
    size = dict(
        image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    )
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise UserError(f"model.vision_tower: its image processor does not give square images ({size})")
    return size["height"]


def zero3_switch(deepspeed_config: dict[str, Any] | None) -> Any:
    """While what this returns is alive, transformers builds models sharded; None where ``deepspeed_config`` does not
    say ZeRO-3."""
    if not deepspeed_config or deepspeed_config["zero_optimization"]["stage"] != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(deepspeed_config)
