"""What a run is: typed sections. Unknown keys are refused; the defaults are what a first run should use."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from medvlm.config.model import AnyModel, DualEncoder, Llava, Section
from medvlm.config.objective import Objective
from medvlm.errors import UserError


class DataSource(Section):
    """Shards that a mixture draws from as one source."""

    path: str
    name: str | None = None
    """For ``stages``; the path by default."""
    weight: float | None = Field(default=None, gt=0)
    """The share of samples drawn from it, relative to the others'. All sources of a mixture have one, or none."""


class CurriculumStage(Section):
    """A part of the curriculum. ``weights`` are by source name; one that is not named is not drawn."""

    epochs: float | None = Field(default=None, gt=0)
    """Its length, in epochs of the whole data; the last stage has none and lasts to the end."""
    weights: dict[str, float]


class PackingBounds(Section):
    tokens: int = Field(default=4096, gt=1)
    """Text and image tokens of a pack, which is one row."""
    images: int = Field(default=12, gt=0)
    """Images of a pack: bounds the vision tower's work and memory."""


class Augmentation(Section):
    """Bounds of random changes to training images, see `medvlm.data.augment`. Nothing is mirrored unless asked."""

    rotate: float = Field(default=0, ge=0, le=180)
    """Degrees, either way."""
    translate: float = Field(default=0, ge=0, le=0.5)
    """Share of the side, either way."""
    scale: float = Field(default=0, ge=0, lt=1)
    crop: float = Field(default=1, gt=0, le=1)
    """The least share of the area that a random crop keeps; 1 is off."""
    horizontal_flip: float = Field(default=0, ge=0, le=1)
    """The probability. Side matters in most radiology; leave it at 0 there."""
    brightness: float = Field(default=0, ge=0, le=1)
    contrast: float = Field(default=0, ge=0, lt=1)
    gamma: float = Field(default=0, ge=0, le=4)
    blur: float = Field(default=0, ge=0, le=10)
    """The largest standard deviation, in pixels."""
    noise: float = Field(default=0, ge=0, le=100)
    """The largest standard deviation, in grey levels."""
    gain: float = Field(default=0, ge=0, lt=1)
    """All values times 1 - gain to 1 + gain."""


class Pairs(Section):
    """What of a study is the image and the text of a dual encoder."""

    sections: list[str] = Field(default=["findings", "impression"], min_length=1)
    """Of the report, joined in this order; those that it lacks are left out. ``answers`` are the conversation's
    assistant turns, where captions are."""
    text: Literal["report", "sentence", "either"] = "report"
    """All of these, or one sentence of them, drawn anew each epoch; or either, by equal chance, so that prompts as well
    as reports are like what was trained on."""
    min_words: int = Field(default=3, gt=0)
    """Of a sentence that is drawn, or of a report."""
    shuffle_sentences: bool = False
    """Within a section, anew each epoch."""
    alter_words: float = Field(default=0, ge=0, le=1)
    """Probability that a text is altered by EDA (arXiv 1901.11196), anew each epoch; its labels stay."""
    synonyms: str | None = None
    """Folder of a WordNet database, for altering words by exchanging them too."""
    views: list[str] | None = None
    """Images of these views only, such as [PA, AP]."""
    labels: list[str] = []
    """Names of ``semantic_matching``; CheXpert's 14 by default."""
    max_left_out: float = Field(default=0.5, ge=0, le=1)
    """Share of samples without such an image or text, which are left out; the run stops above it."""


class Data(Section):
    train: list[str | DataSource]
    """Shard folders, tars or URLs; several are drawn together by size, or by weight."""
    validation: list[str] = []
    max_length: int = Field(default=2048, gt=1)
    """Tokens, image tokens included. A longer conversation is quarantined; a dual encoder's text is cut."""
    temperature: float | None = Field(default=None, ge=1)
    """Draw sources by size to the power 1/temperature: 1 keeps the data's proportions, large values even them out."""
    stages: list[CurriculumStage] = []
    shuffle: Literal["global", "block"] = "global"
    """``block`` shuffles shards, then samples among ``shuffle_window`` neighbours, for storage that reads ahead."""
    shuffle_window: int = Field(default=16, gt=0)
    packing: PackingBounds | None = None
    """Pack several samples into one row; batch sizes then count packs."""
    length_grouped: bool = False
    """Deal the samples of a global batch to micro-batches by length, so that less is padding."""
    shuffle_turns: bool = False
    """Ask the questions about an image in another order each epoch."""
    augment: Augmentation = Augmentation()
    volume_slices: int | None = Field(default=None, gt=0)
    """Evenly spaced axial slices that stand for a volume, each an image of its own. Without it volumes are refused."""
    volume_window: tuple[float, float] | None = None
    """Centre and width, for volumes that are stored in modality units; those stored with windows keep theirs."""
    pairs: Pairs = Pairs()
    """Of a dual encoder."""
    padding_free: bool = False
    """Lay a micro-batch out as one row of segments that do not see each other, instead of padding it."""
    workers: int = Field(default=2, ge=0)
    max_quarantined: float = Field(default=0.01, ge=0, le=1)
    """Share of samples; the run stops above it."""
    cache_dir: str | None = None
    """For token counts and remote shards; by default $MEDVLM_CACHE or ~/.cache/medvlm."""
    cache_gib: float = Field(default=100, gt=0)
    """What remote shards may take up there; the least recently used parts make room."""

    @property
    def sources(self) -> list[DataSource]:
        return [DataSource(path=s) if isinstance(s, str) else s for s in self.train]

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        names = [s.name or s.path for s in self.sources]
        weighted = sum(s.weight is not None for s in self.sources)
        if weighted and weighted < len(names):
            raise ValueError("give every source of `train` a weight, or none")
        if sum([bool(weighted), self.temperature is not None, bool(self.stages)]) > 1:
            raise ValueError("give one of source weights, `temperature` and `stages`")
        for n, stage in enumerate(self.stages):
            unknown = sorted(stage.weights.keys() - set(names))
            if unknown:
                raise ValueError(f"stages.{n}.weights: no source {unknown[0]!r}; sources: {', '.join(names)}")
            if min(stage.weights.values(), default=0) < 0 or sum(stage.weights.values()) <= 0:
                raise ValueError(f"stages.{n}.weights: must not be negative, and not all zero")
            if (stage.epochs is None) != (n == len(self.stages) - 1):
                raise ValueError(f"stages.{n}.epochs: every stage but the last has a length")
        if self.packing and self.packing.tokens < self.max_length:
            raise ValueError(f"packing.tokens: {self.packing.tokens} is less than max_length {self.max_length}")
        if self.volume_window and not self.volume_window[1] > 0:
            raise ValueError("volume_window: give centre and width, the width above 0")
        if self.packing and self.length_grouped:
            raise ValueError("length_grouped: packs need no grouping; give one of `packing` and `length_grouped`")
        return self


class Optimizer(Section):
    name: Literal["adamw", "adamw_8bit", "lion", "muon"] = "adamw"
    betas: tuple[float, float] | None = None
    """By default 0.9, 0.999, for Lion 0.9, 0.99."""
    muon_learning_rate: float = Field(default=0.02, gt=0)
    """The peak of the matrices that Muon updates; everything else follows AdamW and the learning rate of its part."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's."""


class Spike(Section):
    """A loss or gradient norm out of proportion to the median of the last ``window`` updates."""

    loss_factor: float | None = Field(default=2.0, gt=1)
    grad_norm_factor: float | None = Field(default=10.0, gt=1)
    window: int = Field(default=100, gt=1)
    """Updates before the first judgement, and in the median."""
    action: Literal["warn", "skip", "rollback"] = "warn"
    """``rollback`` goes back to the newest checkpoint and leaves out the steps from there to the spike."""


class Training(Section):
    zero: str = "zero3"
    """A file of ``ds_configs/`` by name, or a path."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: str | None = None
    """Compile each transformer layer with this backend of ``torch.compile``, such as ``inductor``."""
    global_batch_size: int = Field(default=128, gt=0)
    micro_batch_size: int = Field(default=8, gt=0)
    sequence_parallel: int = Field(default=1, gt=0)
    """Consecutive ranks that share each micro-batch, every one with a part of each row, for long contexts."""
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    """Instead of `warmup_ratio`."""
    decay_ratio: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps that `warmup_stable_decay` ends with."""
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    optimizer: Optimizer = Optimizer()
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clipping: float | None = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep a moving average of the weights, for `medvlm export --ema`."""
    checkpoint_every: int = Field(default=500, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    """The newest ones; older ones are removed."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints of steps that are multiples of this stay as well."""
    checkpoint_in_background: bool = True
    """Write from a copy in the host's memory while training goes on. Off: training waits, and needs no such memory."""
    evaluate_every: int | None = Field(default=None, gt=0)
    evaluation_batches: int | None = Field(default=None, gt=0)
    profile: int | None = Field(default=None, gt=0)
    """Steps of which rank 0 writes a Chrome trace, after the first two."""
    stop_after: int | None = Field(default=None, gt=0)
    """Stop at this step, with a checkpoint, as an interruption would; the schedule stays that of the whole run."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite never changes the weights: stop there, or go on with the next."""
    spike: Spike | None = None
    max_skipped: int = Field(default=20, ge=0)
    """Updates left out by ``non_finite`` and ``spike`` before the run stops."""
    collective_timeout: float = Field(default=600, gt=0, le=3600)
    """Seconds without a step forward after which the run ends and names the rank that the others wait for."""

    @model_validator(mode="after")
    def _one_length(self) -> "Training":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of `epochs` and `steps`")
        return self


class Run(Section):
    name: str = Field(pattern=r"^[\w.\-]+$")
    root: str = "runs"
    seed: int = Field(default=0, ge=0, lt=2**32)
    resume: Literal["auto", "never", "require"] = "auto"
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    notify: str | None = None
    """A web address to post to, or a shell command to run, when the run starts and however it ends."""

    @property
    def dir(self) -> Path:
        return Path(self.root) / self.name


class RunConfig(Section):
    description: str = ""
    run: Run
    model: AnyModel
    objective: Objective | None = None
    """Of a dual encoder; a language model is trained for the next token."""
    data: Data
    training: Training

    def public(self) -> dict[str, Any]:
        """As JSON, for files and servers that others read: without the address or command of ``run.notify``, which may
        hold a token."""
        return self.model_dump(mode="json", exclude={"run": {"notify"}})

    @property
    def llava(self) -> Llava:
        """The model's section, where nothing but this family is supported. Raises UserError for another."""
        if not isinstance(self.model, Llava):
            raise UserError(f"model.family: {self.model.family} is not supported here, only llava")
        return self.model

    @model_validator(mode="after")
    def _objective_of_family(self) -> "RunConfig":
        dual = isinstance(self.model, DualEncoder)
        if dual != (self.objective is not None):
            raise ValueError("objective: " + ("a dual encoder needs one" if dual else "is of a dual encoder only"))
        if isinstance(self.model, DualEncoder) and self.objective is not None:
            if (self.objective.kind == "sigmoid") != (self.model.similarity.bias is not None):
                raise ValueError("model.similarity.bias: the sigmoid objective needs one, such as -10, the others none")
            if self.objective.masked_language_modeling and self.model.text_tower.train == "frozen":
                raise ValueError("objective.masked_language_modeling: the text tower is frozen")
            for name in ("packing", "length_grouped", "padding_free", "volume_slices", "shuffle_turns"):
                if getattr(self.data, name):
                    raise ValueError(f"data.{name}: is for language models, not for a dual encoder")
            if self.training.sequence_parallel > 1:
                raise ValueError("training.sequence_parallel: is for language models, not for a dual encoder")
            if self.training.global_batch_size < 2:
                raise ValueError("training.global_batch_size: a contrastive loss compares at least 2 pairs")
        return self

    @model_validator(mode="after")
    def _whole_rows(self) -> "RunConfig":
        if self.training.sequence_parallel > 1:
            if self.data.packing or self.data.padding_free:
                raise ValueError(
                    "training.sequence_parallel: not with data.packing or data.padding_free: a row's "
                    "segments would see each other"
                )
            if self.training.compile:
                raise ValueError("training.sequence_parallel: not with training.compile")
        return self
