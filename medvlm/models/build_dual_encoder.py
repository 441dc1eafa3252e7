"""Builds a dual encoder and what prepares its inputs, from a recipe."""

import inspect
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

from medvlm.config.model import DualEncoder, ImageEncoder
from medvlm.config.objective import Objective
from medvlm.errors import UserError
from medvlm.models.backbones import (
    CONVOLUTIONAL,
    backbone_config,
    feature_width,
    image_processor_of,
    load,
    load_tower,
    load_whole,
    square_size,
    stock_processor,
    zero3_switch,
)
from medvlm.models.born import Born
from medvlm.models.dual_encoder import DualEncoderModel
from medvlm.models.poolings import CLASS_TOKENS

INTERPOLATING = "dinov2"  # between its positions, for whole numbers of patches: those of the hub are for 518 pixels


@dataclass
class DualComponents:
    """Everything but the weights: cheap to build, needed by loader, model and export alike."""

    image_processor: Any
    tokenizer: Any
    vision_config: Any
    text_config: Any
    image_size: int
    embedding_dim: int
    text_limit: int
    """Tokens of the longest text that the text tower takes."""
    unused: dict[str, set[str]]
    """By part: the parameters that nothing the model gives depends on."""
    objective: Objective | None
    parameters: int = 0
    """Of the whole model, frozen ones too."""
    image_numbers: int = 0
    token_numbers: int = 0
    """Elements of all that the operations of a forward pass make of one image, and of one token."""

    @property
    def masked(self) -> bool:
        """Whether the text tower is a masked language model."""
        return bool(self.objective and self.objective.masked_language_modeling)


def build_components(config: DualEncoder, objective: Objective | None) -> DualComponents:
    """Configurations, tokenizer and image processor of a recipe's model. Raises UserError for what does not fit."""
    vision = backbone_config(config.vision_tower, "model.vision_tower", "vision_config")
    text = backbone_config(config.text_tower, "model.text_tower", "text_config")
    if vision.model_type not in CLASS_TOKENS:
        raise UserError(
            f"model.vision_tower: {vision.model_type!r} is not supported; known: {', '.join(sorted(CLASS_TOKENS))}"
        )
    _check_poolings(config, vision, text)
    tokenizer = _tokenizer(config, text)
    image_processor = _image_processor(config.vision_tower, vision)
    parts = DualComponents(
        image_processor=image_processor,
        tokenizer=tokenizer,
        vision_config=vision,
        text_config=text,
        image_size=square_size(image_processor),
        embedding_dim=config.embedding_dim,
        text_limit=0,
        unused={},
        objective=objective,
    )
    if parts.masked and tokenizer.mask_token_id is None:
        raise UserError("objective.masked_language_modeling: the text tower's tokenizer has no mask token")
    _check_size(parts)
    for part, dim in (("vision", feature_width(vision)), ("text", _text_dim(config, text))):
        if getattr(config, f"{part}_head").kind == "none" and dim != config.embedding_dim:
            raise UserError(
                f"model.{part}_head.kind: none needs model.embedding_dim to be the tower's {dim}, not "
                f"{config.embedding_dim}"
            )
    _probe(config, parts)
    return parts


def build_model(
    config: DualEncoder,
    parts: DualComponents,
    dtype: torch.dtype,
    deepspeed_config: dict[str, Any] | None = None,
    seed: int = 0,
) -> DualEncoderModel:
    """The model in ``dtype``; its towers are born sharded if ``deepspeed_config`` says ZeRO-3, and the rest, which is
    small, is divided with them by ``deepspeed.initialize``. Same seed, same new weights on all ranks.

    Raises UserError where a folder lacks a weight.
    """
    keep_alive = zero3_switch(deepspeed_config)
    transformers.set_seed(seed)
    vision, text = (load_backbone(config, parts, part, dtype) for part in ("vision_tower", "text_tower"))
    torch.manual_seed(seed)  # sharded towers have drawn other random numbers than whole ones
    model = _assemble(config, parts, vision, text, dtype)
    model.__dict__["keep_alive"] = keep_alive  # transformers holds the ZeRO-3 switch by a weak reference
    return model


def load_backbone(config: DualEncoder, parts: DualComponents, part: str, dtype: torch.dtype) -> Any:
    """The vision or the text tower: pretrained or from scratch."""
    tower, given = getattr(config, part), parts.vision_config if part == "vision_tower" else parts.text_config
    if part == "vision_tower" or not parts.masked:
        return load_tower(tower, given, dtype, f"model.{part}", **_without_pooler(given, tower.pooling))
    if tower.path:
        return load_whole(AutoModelForMaskedLM, tower.path, f"model.{part}.path", dtype)
    return AutoModelForMaskedLM.from_config(given, dtype=dtype)


def _assemble(config: DualEncoder, parts: DualComponents, vision: Any, text: Any, dtype: torch.dtype) -> Any:
    fixed = fixed_length(config, parts.text_config)
    model = DualEncoderModel(
        config,
        vision,
        text,
        vision_dim=feature_width(parts.vision_config),
        text_dim=_text_dim(config, parts.text_config),
        text_length=parts.text_config.max_position_embeddings if fixed else None,
        pad_token_id=parts.tokenizer.pad_token_id,
        mean=list(parts.image_processor.image_mean),
        std=list(parts.image_processor.image_std),
    )
    for part in ("vision_head", "text_head", "similarity"):
        getattr(model, part).to(dtype)
    if parts.masked and model.masked_head is None:
        raise UserError(
            f"objective.masked_language_modeling: is not supported for a text tower of type "
            f"{text.config.model_type!r}; give one of BERT's or RoBERTa's family"
        )
    return model


def fixed_length(config: DualEncoder, text: Any) -> bool:
    """SigLIP's text tower pools the last position, so that its texts are all padded to the same length."""
    return text.model_type == "siglip_text_model" and config.text_tower.pooling == "pooler"


def _without_pooler(config: Any, pooling: str) -> dict[str, Any]:
    """Folders of other tasks' models lack a pooler's weights; one that is not asked for need not be there."""
    cls: Any = transformers.MODEL_MAPPING[type(config)]
    known = "add_pooling_layer" in inspect.signature(cls).parameters
    return {"add_pooling_layer": False} if known and pooling != "pooler" else {}


def _text_dim(config: DualEncoder, text: Any) -> int:
    return text.projection_size if fixed_length(config, text) else text.hidden_size


def _check_poolings(config: DualEncoder, vision: Any, text: Any) -> None:
    pooling = config.vision_tower.pooling
    if pooling == "cls" and not CLASS_TOKENS[vision.model_type]:
        raise UserError(f"model.vision_tower.pooling: {vision.model_type!r} has no class token; give pooler or mean")
    if pooling == "pooler" and not getattr(vision, "vision_use_head", True):
        raise UserError("model.vision_tower.pooling: this tower has no pooler (vision_use_head); give mean")
    if text.model_type == "clip_text_model" and config.text_tower.pooling == "cls":
        raise UserError("model.text_tower.pooling: cls is a token that sees no other in CLIP's text tower; give pooler")
    layers = config.text_tower.pooling_layers
    depth = text.num_hidden_layers
    if wrong := [layer for layer in layers if not -depth - 1 <= layer <= depth]:
        raise UserError(f"model.text_tower.pooling_layers: {wrong[0]} is beyond the tower's {depth} layers")


def _tokenizer(config: DualEncoder, text: Any) -> Any:
    source = config.text_tower.tokenizer or config.text_tower.path
    if source is None:
        raise UserError("model.text_tower.tokenizer: a text tower from scratch needs a tokenizer folder")
    tokenizer = load(AutoTokenizer, source, "model.text_tower.tokenizer")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"model.text_tower.tokenizer: {source} has no padding token")
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > text.vocab_size:
        raise UserError(
            f"model.text_tower.tokenizer: {source} has {len(tokenizer)} tokens, the text tower {text.vocab_size}"
        )
    ids = tokenizer("a")["input_ids"]
    if text.model_type == "clip_text_model" and config.text_tower.pooling == "pooler":
        # as transformers finds the end of a text; 2 stands for OpenAI's models, whose configuration is wrong
        end = max(ids) if text.eos_token_id == 2 else text.eos_token_id
        if end not in ids or ids.index(end) != len(ids) - 1:
            raise UserError(
                f"model.text_tower.pooling: the tower pools at token {text.eos_token_id}, but the tokenizer of "
                f"{source} does not end texts with it"
            )
    return tokenizer


def _image_processor(part: ImageEncoder, vision: Any) -> Any:
    """The tower's own, at the size that the recipe asks for."""
    processor = image_processor_of(part, vision)
    if part.image_size in (None, square_size(processor)):
        return processor
    if vision.model_type == INTERPOLATING and part.image_size and part.image_size % vision.patch_size:
        raise UserError(f"model.vision_tower.image_size: is no multiple of the tower's patches of {vision.patch_size}")
    if vision.model_type not in (CONVOLUTIONAL, INTERPOLATING):
        raise UserError(
            "model.vision_tower.image_size: only a convolutional tower, and DINOv2, takes images of another size"
        )
    common = {"image_mean": processor.image_mean, "image_std": processor.image_std, "resample": processor.resample}
    cropping = {"size": {"shortest_edge": part.image_size}, "crop_size": part.image_size}
    return stock_processor("CLIPImageProcessor")(**cropping, **common)


def _check_size(parts: DualComponents) -> None:
    vision = parts.vision_config
    if vision.model_type == INTERPOLATING and not parts.image_size % vision.patch_size:
        return
    if vision.model_type != CONVOLUTIONAL and vision.image_size != parts.image_size:
        raise UserError(
            f"model.vision_tower: its image processor gives {parts.image_size} pixels, the tower takes "
            f"{vision.image_size}"
        )


def _probe(config: DualEncoder, parts: DualComponents) -> None:
    """Fill in the length of texts, and the parameters that no output depends on: layers above those that are pooled,
    poolers and class tokens that are not asked for.

    The model runs forward and backward on the meta device, which costs no memory.
    """
    masked, options = parts.masked, {"attn_implementation": "eager"}
    vision_options = options | _without_pooler(parts.vision_config, config.vision_tower.pooling)
    text_options = options | ({} if masked else _without_pooler(parts.text_config, config.text_tower.pooling))
    auto = AutoModelForMaskedLM if masked else transformers.AutoModel
    try:
        with torch.device("meta"):
            vision = transformers.AutoModel.from_config(
                deepcopy(parts.vision_config), **vision_options
            )  # which it would remember
            text = auto.from_config(deepcopy(parts.text_config), **text_options)
            model = _assemble(config, parts, vision, text, torch.float32).eval()
            pixels = torch.zeros(1, 1, parts.image_size, parts.image_size, dtype=torch.uint8)
            ids = torch.zeros(1, 8, dtype=torch.long)
    except ValueError as error:
        if not masked:
            raise
        raise UserError(f"objective.masked_language_modeling: {str(error).splitlines()[0]}") from None
    if masked and config.text_tower.pooling == "pooler":
        raise UserError("model.text_tower.pooling: a masked language model has no pooler; give cls or mean")
    if config.text_tower.pooling == "pooler" and getattr(model.encode_text(ids, None), "pooler_output", None) is None:
        raise UserError(f"model.text_tower.pooling: {parts.text_config.model_type!r} has no pooler; give cls or mean")
    parts.text_limit = _positions(model.text_encoder)
    parts.parameters = sum(p.numel() for p in model.parameters())
    with Born() as of_image:
        model.image_features(pixels)
    with Born() as of_text:
        model.text_features(ids)
    parts.image_numbers, parts.token_numbers = of_image.numbers, of_text.numbers // ids.numel()
    outputs = model(pixels, ids)
    total = sum(value.sum() for value in outputs.values())
    if masked:
        total = total + model.masked_head(model.encode_text(ids, None).last_hidden_state).sum()
    total.backward()
    parts.unused = {
        name: {key for key, p in getattr(model, name).named_parameters() if p.grad is None} for name in config.PARTS
    }


def _positions(encoder: nn.Module) -> int:
    """How many tokens a text tower has positions for; RoBERTa's family counts them from its padding token on."""
    for name, module in encoder.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "position_embedding") and isinstance(
            module, nn.Embedding
        ):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return encoder.config.max_position_embeddings  # type: ignore[union-attr, return-value]
