"""One training sample as it is stored in a shard: ``<key>.json`` plus the image members ``<key>.<i>.<ext>``.

The format is documented for users in ``docs/data-format.md``.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medvlm.errors import UserError

IMAGE_MARK = "<image>"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
VOLUME_EXTENSION = "b2"  # a blosc2 frame: int16 (or float32) [D, H, W], or uint8 [C, D, H, W], one per window
DEIDENTIFICATION_MASK = "___"
Split = Literal["train", "validation", "test"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image"]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One turn. ``content`` follows Hugging Face chat messages; ``<image>`` inside a string becomes an image part.

    ``answer_type`` and ``question_type`` belong to assistant turns and are what evaluation groups by.
    """

    role: Literal["system", "user", "assistant"]
    content: list[Part]
    answer_type: Literal["closed", "open"] | None = None
    question_type: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _split_marks(cls, content: Any) -> Any:
        if not isinstance(content, str):
            return content
        parts: list[dict[str, str]] = []
        for i, piece in enumerate(content.split(IMAGE_MARK)):
            if i:
                parts.append({"type": "image"})
            if piece.strip():
                parts.append({"type": "text", "text": piece.strip()})
        return parts

    @model_validator(mode="after")
    def _answers_are_text(self) -> "Message":
        if any(IMAGE_MARK in p.text for p in self.content if isinstance(p, TextPart)):
            raise ValueError(f"a text part holds a literal {IMAGE_MARK}; write it as an image part")
        if self.role == "assistant" and (self.n_images or not self.text.strip()):
            raise ValueError("an assistant turn must be non-empty text without images")
        if self.role == "assistant" and DEIDENTIFICATION_MASK in self.text:
            raise ValueError(f"an assistant turn holds the mask {DEIDENTIFICATION_MASK}, which a model must not learn")
        return self

    @property
    def text(self) -> str:
        return " ".join(p.text for p in self.content if isinstance(p, TextPart))

    @property
    def n_images(self) -> int:
        return sum(isinstance(p, ImagePart) for p in self.content)


def make_message(role: str, text: str) -> Message:
    """A message from a string, in which ``<image>`` stands for an image."""
    return Message.model_validate({"role": role, "content": text})


class Image(_Strict):
    """One image or volume member. ``file`` is its extension in the shard (``0.jpg``); sizes are of the stored pixels.

    ``depth`` is the number of slices of a volume, None for a picture. ``original_size`` is (width, height[, depth])
    before any shrinking or resampling; ``spacing`` is of the stored pixels in mm, in the order x, y[, z]; ``windows``
    are the (centre, width) pairs that were applied, one per channel.
    """

    file: str = Field(pattern=r"^\d+\.(jpg|jpeg|png|b2)$")
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    depth: int | None = Field(default=None, gt=0)
    original_size: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    windows: list[tuple[float, float]] | None = None
    image_id: str | None = None
    view: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class Box(_Strict):
    """``xyxy`` in pixels of the stored image number ``image``; x grows to the viewer's right, y downwards."""

    label: str
    xyxy: tuple[float, float, float, float]
    image: int = Field(default=0, ge=0)


class Sample(_Strict):
    """A study, an image with questions, images with labels and no text, or text (conversation, report) without images.

    ``labels`` follow CheXpert: 1 positive, 0 negative, -1 uncertain, None not mentioned. Samples of images and labels
    alone, and of text alone, are what contrastive training on unpaired data takes.
    """

    key: str = Field(pattern=r"^[A-Za-z0-9_\-]+$")
    source: str
    license: str
    split: Split
    synthetic: bool = False
    patient_id: str | None = None
    study_id: str | None = None
    images: list[Image] = Field(default_factory=list)
    messages: list[Message] = Field(default_factory=list)
    report: dict[str, str] = Field(default_factory=dict)
    labels: dict[str, Literal[-1, 0, 1] | None] = Field(default_factory=dict)
    boxes: list[Box] = Field(default_factory=list)
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Sample":
        wanted = sum(m.n_images for m in self.messages)
        if self.messages and wanted != len(self.images):
            raise ValueError(f"the conversation refers to {wanted} image(s) but the sample has {len(self.images)}")
        if any(box.image >= len(self.images) for box in self.boxes):
            raise ValueError(f"a box refers to image {max(b.image for b in self.boxes)} of {len(self.images)}")
        labelled = bool(self.images) and any(value is not None for value in self.labels.values())
        if not (self.messages or self.has_report or labelled):
            raise ValueError("nothing to learn from: neither a conversation, nor a report, nor images with a label")
        return self

    @property
    def has_report(self) -> bool:
        return any(text.strip() for text in self.report.values())

    @property
    def group(self) -> str:
        """What must never be split between train and test: the patient if known, else the study, else the image."""
        return self.patient_id or self.study_id or (self.images[0].image_id if self.images else None) or self.key


def parse_sample(data: bytes | str, where: str) -> Sample:
    """Validate one ``<key>.json``. Raises UserError naming ``where`` and the first wrong field."""
    try:
        return Sample.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        message = re.sub(r"^Value error, ", "", first["msg"])
        raise UserError(f"{where}: {field + ': ' if field else ''}{message}") from None
