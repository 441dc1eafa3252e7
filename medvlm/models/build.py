"""Builds the model and its processor from a recipe: pretrained or from scratch, whole or sharded under ZeRO-3."""

import math
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import AddedToken
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaProcessor,
)

from medvlm.config.model import LanguageModel, Llava, VisionTower
from medvlm.data.conversation import asked_as_trained, multimodal_template, plain_template
from medvlm.data.schema import IMAGE_MARK
from medvlm.errors import UserError
from medvlm.models.backbones import (
    backbone_config,
    feature_width,
    from_scratch,
    image_processor_of,
    load,
    load_tower,
    load_whole,
    refuse_quantized,
    square_size,
    zero3_switch,
)
from medvlm.models.batch_norm import convert_batch_norm
from medvlm.models.born import Born
from medvlm.models.kernels import (
    Machine,
    apply_liger,
    attention_implementation,
    choose_attention,
    choose_kernels,
    liger_loss,
)
from medvlm.models.multi_modal_projector import PROJECTORS
from medvlm.models.poolings import CLASS_TOKENS
from medvlm.models.vision_language_model import VisionLanguageModel, layer_features

VOCABULARY_MULTIPLE = 64


@dataclass
class Components:
    """Everything but the weights: cheap to build, needed by loader, model and export alike."""

    processor: LlavaProcessor
    vision_config: Any
    text_config: Any
    image_tokens: int
    vision_dim: int
    image_size: int
    vision_parameters: int
    image_numbers: int
    """Elements of all that the operations of the tower's forward pass make of one image."""
    unused: dict[str, set[str]]
    """By part: the parameters that nothing the model gives depends on."""
    vocabulary_grown: bool
    """Whether the language model gets rows for tokens that its weights do not have."""

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def chat_template(self) -> str:
        return self.processor.chat_template  # type: ignore[return-value]  # ours is always one string

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(IMAGE_MARK)


def build_components(config: Llava) -> Components:
    """Configurations, tokenizer and image processor of a recipe's model. Raises UserError where a folder lacks them."""
    vision = _vision_config(config.vision_tower)
    text = _text_config(config)
    source = config.language_model.tokenizer or config.language_model.path
    if source is None:
        raise UserError("model.language_model.tokenizer: a language model from scratch needs a tokenizer folder")
    gguf = {} if config.language_model.tokenizer else _gguf(config)
    tokenizer = load(AutoTokenizer, source, "model.language_model.tokenizer", **gguf)
    if IMAGE_MARK not in tokenizer.get_vocab():
        tokenizer.add_tokens(AddedToken(IMAGE_MARK, normalized=False, special=True), special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    grown = len(tokenizer) > text.vocab_size
    if grown:
        text.vocab_size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    image_processor = image_processor_of(config.vision_tower, vision)
    size = square_size(image_processor)
    probe = _probe_vision(vision, size, config.vision_tower)
    tokens = probe.features.shape[1]
    dropped = 1 if config.vision_tower.select_strategy == "default" else 0
    # The processor counts tokens by the side of a patch. Of a tower in stages that is not the configuration's.
    patch = size // math.isqrt(tokens + dropped - CLASS_TOKENS[vision.model_type])
    grid = (size // patch) ** 2
    template = _with_bos(tokenizer, multimodal_template(plain_template(tokenizer)))
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=config.vision_tower.select_strategy,
        num_additional_image_tokens=tokens + dropped - grid,
        image_token=IMAGE_MARK,
        chat_template=asked_as_trained(tokenizer, template),
    )
    return Components(
        processor,
        vision,
        text,
        image_tokens=tokens,
        vision_dim=probe.features.shape[2],
        image_size=size,
        vision_parameters=probe.parameters,
        image_numbers=probe.numbers,
        unused={"vision_tower": probe.unused},
        vocabulary_grown=grown,
    )


def build_plain_model(config: Llava, parts: Components, seed: int = 0) -> VisionLanguageModel:
    """The model in fp32 on the CPU, whatever attention and kernels the recipe asks of its GPUs: for export."""
    plain = config.model_copy(update={"attention": "auto", "kernels": "torch"})
    return build_model(plain, parts, torch.float32, seed=seed, machine=Machine())


def build_model(
    config: Llava,
    parts: Components,
    dtype: torch.dtype,
    deepspeed_config: dict[str, Any] | None = None,
    seed: int = 0,
    machine: Machine | None = None,
) -> VisionLanguageModel:
    """The model in ``dtype``; born sharded if ``deepspeed_config`` says ZeRO-3. Same seed, same new weights.

    Attention and kernels are those of ``machine``, by default this one. Raises UserError if it lacks what is asked for.
    """
    machine = machine or Machine.here(dtype)
    attention = choose_attention(config.attention, machine, parts.text_config)
    kernels = choose_kernels(config.kernels, machine, parts.text_config)
    keep_alive = zero3_switch(deepspeed_config)
    context: Any = nullcontext()
    if keep_alive is not None:
        import deepspeed

        # No dtype argument: on CPU zero.Init(dtype=float32) silently means bfloat16.
        context = deepspeed.zero.Init(config_dict_or_path=deepspeed_config)
    transformers.set_seed(seed)
    tower = load_backbone(config, parts, "vision_tower", dtype)
    language = load_backbone(config, parts, "language_model", dtype, attention_implementation(attention))
    with context:
        projector = PROJECTORS[config.multi_modal_projector.kind](parts.vision_dim, parts.text_config.hidden_size)
        projector = projector.to(dtype) if keep_alive is None else projector
    image_processor = parts.processor.image_processor
    model = VisionLanguageModel(
        tower,
        projector,
        language,
        image_token_id=parts.image_token_id,
        image_size=parts.image_size,
        feature_layer=config.vision_tower.feature_layer,
        select_strategy=config.vision_tower.select_strategy,
        mean=list(image_processor.image_mean),
        std=list(image_processor.image_std),
    )
    if kernels.name == "liger":
        apply_liger(language)
        language.get_output_embeddings().loss = liger_loss
    model.choices = (attention.line("attention"), kernels.line("kernels"))
    model.__dict__["keep_alive"] = keep_alive  # transformers holds the ZeRO-3 switch by a weak reference
    return model


def load_backbone(config: Llava, parts: Components, part: str, dtype: torch.dtype, attention: str | None = None) -> Any:
    """The vision tower or the language model, for which ``attention`` is: pretrained or from scratch."""
    if part == "vision_tower":
        return load_tower(config.vision_tower, parts.vision_config, dtype, "model.vision_tower")
    return _language_model(config.language_model, parts.text_config, dtype, attention)


def _language_model(part: LanguageModel, config: Any, dtype: torch.dtype, attention: str | None) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if part.path is None:
        return AutoModelForCausalLM.from_config(config, **options)
    if part.gguf_file:
        options["gguf_file"] = part.gguf_file
    model = load_whole(AutoModelForCausalLM, part.path, "model.language_model.path", **options)
    if config.vocab_size > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    return model


def _with_bos(tokenizer: Any, template: str) -> str:
    """A tokenizer that begins every text with BOS by itself must be trained so: its template then prints BOS."""
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + template if adds and "bos_token" not in template else template


def _gguf(config: Llava) -> dict[str, str]:
    return {"gguf_file": config.language_model.gguf_file} if config.language_model.gguf_file else {}


def _vision_config(part: VisionTower) -> Any:
    field = "model.vision_tower"
    config = backbone_config(part, field, "vision_config")
    if config.model_type not in CLASS_TOKENS:
        raise UserError(f"{field}: {config.model_type!r} is not supported; known: {', '.join(sorted(CLASS_TOKENS))}")
    if part.select_strategy == "default" and not CLASS_TOKENS[config.model_type]:
        raise UserError(
            f"{field}.select_strategy: default drops the first token, which in {config.model_type!r} is a patch and no "
            "class token; give full"
        )
    return config


def _text_config(config: Llava) -> Any:
    part, field = config.language_model, "model.language_model"
    if part.config is not None:
        text = from_scratch(part.config, field)
    else:
        text = load(AutoConfig, str(part.path), field, **_gguf(config))
        refuse_quantized(text, field)
    if hasattr(text, "text_config"):
        raise UserError(
            f"{field}: {text.model_type!r} is a model of several towers, and this takes a language model alone; "
            "model.init_from goes on from a run of medvlm"
        )
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(text, "is_decoder", True) is False:
        raise UserError(f"{field}: {text.model_type!r} is no causal language model, which predicts the next token")
    return text


@dataclass
class _Probe:
    features: torch.Tensor
    """[1, N, D_vision], without values."""
    unused: set[str]
    """The parameters no feature depends on: later layers, pooling head."""
    parameters: int
    numbers: int


def _probe_vision(vision: Any, size: int, part: VisionTower) -> _Probe:
    """What the tower makes of an image, found by running it forward and backward on the meta device, which costs no
    memory: parameters that cannot learn are frozen, so that "trainable" means what it says.

    Raises UserError for layers that do not exist, or that transformers' LLaVA cannot take.
    """
    field, layers = "model.vision_tower.feature_layer", part.feature_layer
    with torch.device("meta"):
        tower = AutoModel.from_config(deepcopy(vision), attn_implementation="eager")  # which it would remember
        pixels = torch.zeros(1, 3, size, size)
    convert_batch_norm(tower, fixed=True)
    try:
        with Born() as born:
            found = layer_features(tower, pixels, layers, part.select_strategy)
    except IndexError:
        raise UserError(f"{field}: {layers} does not exist") from None
    width = feature_width(vision)
    for layer, features in zip([layers] if isinstance(layers, int) else layers, found, strict=True):
        if features.shape[1:] != (found[-1].shape[1], width):
            raise UserError(
                f"{field}: layer {layer} gives {features.shape[1]} tokens of width {features.shape[2]}, where "
                f"transformers' LLaVA takes the same number of tokens of each layer, of the tower's width {width}; "
                "give -1"
            )
    features = torch.cat(found, dim=-1)
    features.sum().backward()
    unused = {name for name, p in tower.named_parameters() if p.grad is None}
    return _Probe(features.detach(), unused, sum(p.numel() for p in tower.parameters()), born.numbers)
