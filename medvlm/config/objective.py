"""What a dual encoder is trained for."""

from typing import Literal

from pydantic import Field

from medvlm.config.model import Section


class MaskedLanguageModeling(Section):
    """BERT's loss on the same texts, beside the contrastive one."""

    weight: float = Field(default=0.1, gt=0)
    """Of its mean over the masked tokens of the global batch."""
    probability: float = Field(default=0.15, gt=0, lt=1)
    """That a token is to be predicted: 8 of 10 of them are masked, one is replaced, one stays."""


class Objective(Section):
    """``info_nce`` and ``sigmoid`` take pairs; ``semantic_matching`` takes images and texts that need not belong
    together, with labels of both."""

    kind: Literal["info_nce", "sigmoid", "semantic_matching"] = "info_nce"
    image_weight: float = Field(default=0.5, ge=0, le=1)
    """Of the direction image -> text in ``info_nce``; the other has the rest."""
    label_similarity: Literal["cosine", "dot"] = "cosine"
    """Of ``semantic_matching``."""
    masked_language_modeling: MaskedLanguageModeling | None = None
