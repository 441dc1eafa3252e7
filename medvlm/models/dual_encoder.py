"""The dual encoders: image tower and text tower, each with a head into one space (ConVIRT, MedCLIP, BioViL, CLIP)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medvlm.config.model import DualEncoder
from medvlm.models.backbones import rest_frozen
from medvlm.models.batch_norm import convert_batch_norm
from medvlm.models.heads import Head, ImageHead
from medvlm.models.joint_space import JointSpace, Similarity

IGNORE = -100


class DualEncoderModel(JointSpace, nn.Module):
    """``mean`` and ``std`` (per channel, of pixels in 0..1) normalise the uint8 images on the model's device.

    Batch normalisation is that of `medvlm.models.batch_norm`. Every forward pass runs every part, whatever is in the
    batch, as ranks of a ZeRO run must run the same modules in the same order.
    """

    choices: tuple[str, ...] = ()

    def __init__(
        self,
        config: DualEncoder,
        vision_tower: Any,
        text_tower: Any,
        *,
        vision_dim: int,
        text_dim: int,
        text_length: int | None,
        pad_token_id: int,
        mean: list[float],
        std: list[float],
    ):
        """``text_tower`` is an encoder, or a masked language model. ``text_length``: all texts are padded to it."""
        super().__init__()
        self.vision_tower: Any = vision_tower
        self.head_arguments = {
            "vision_head": {"features": vision_dim, **head_options(config, "vision_head")},
            "text_head": {"features": text_dim, **head_options(config, "text_head")},
        }
        self.vision_head = ImageHead(**self.head_arguments["vision_head"])
        self.text_tower: Any = text_tower
        self.text_head = Head(**self.head_arguments["text_head"])
        similarity = config.similarity
        self.similarity = Similarity(similarity.temperature, similarity.max_scale, similarity.bias)
        self.image_pooling, self.convolutional = config.vision_tower.pooling, config.vision_head.kind == "conv"
        self.text_pooling, self.text_layers = config.text_tower.pooling, config.text_tower.pooling_layers
        self.text_length, self.pad_token_id = text_length, pad_token_id
        self.mean, self.std = mean, std
        convert_batch_norm(self)

    def train(self, mode: bool = True) -> "DualEncoderModel":
        super().train(mode)
        rest_frozen(self.vision_tower, self.text_tower)
        return self

    @property
    def text_encoder(self) -> Any:
        """Of a masked language model, what is below its output layer."""
        return self.text_tower if self.masked_head is None else self.text_tower.base_model

    @property
    def masked_head(self) -> Any:
        """Hidden states [N, D] -> logits [N, V], if the text tower is a masked language model."""
        return getattr(self.text_tower, "cls", None) or getattr(self.text_tower, "lm_head", None)

    def pixels(self, pixel_values: Tensor) -> Tensor:
        """uint8 [I, 1 or 3, S, S] -> [I, 3, S, S], normalised, in the type of the tower's weights."""
        options: dict[str, Any] = {"dtype": torch.float32, "device": pixel_values.device}
        mean, std = (torch.tensor(v, **options).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return ((pixel_values.float() / 255 - mean) / std).to(next(self.vision_tower.parameters()).dtype)

    def image_features(
        self, pixel_values: Tensor, prior_pixel_values: Tensor | None = None, has_prior: Tensor | None = None
    ) -> Tensor:
        """uint8 [I, C, S, S], C 1 or 3 -> [I, D], not normalised.

        Prior images [I, C, S, S] count where ``has_prior`` [I] is true, by default everywhere. Raises ValueError for
        prior images that the model has no use for.
        """
        return self.embed_images(self.pixels(pixel_values), *self._priors(prior_pixel_values, has_prior))

    def patch_features(
        self, pixel_values: Tensor, prior_pixel_values: Tensor | None = None, has_prior: Tensor | None = None
    ) -> Tensor:
        """[I, h, w, D] in the joint space, not normalised, as of `JointSpace.embed_patches`; arguments as of
        `image_features`."""
        return self.embed_patches(self.pixels(pixel_values), *self._priors(prior_pixel_values, has_prior))

    def _priors(self, pixel_values: Tensor | None, has_prior: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if pixel_values is None:
            return None, None
        if has_prior is None:
            has_prior = torch.ones(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
        return self.pixels(pixel_values[has_prior]), has_prior

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[T, L] -> [T, D], not normalised."""
        return self.embed_texts(input_ids, attention_mask)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prior_pixel_values: Tensor | None = None,
        has_prior: Tensor | None = None,
        masked_ids: Tensor | None = None,
        masked_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``image`` [I, D] and ``text`` [T, D], not normalised; ``scale`` [], and ``bias`` [] if there is one;
        ``masked_loss`` [] if ``masked_ids`` are given: the sum of the losses of the tokens with labels.

        pixel_values: uint8 [I, C, S, S], C 1 or 3; input_ids, attention_mask [T, L]; I and T may differ. Prior images
        as of `image_features`. masked_ids [T, L]: the same texts with tokens masked; masked_labels [T, L]: what they
        were, -100 elsewhere.
        """
        found = {
            "image": self.image_features(pixel_values, prior_pixel_values, has_prior),
            "text": self.text_features(input_ids, attention_mask),
        }
        if masked_ids is not None and masked_labels is not None:
            # after the embeddings, whose dropout is then the same with and without it
            found["masked_loss"] = self._masked_loss(masked_ids, attention_mask, masked_labels)
        return found | dict(zip(("scale", "bias"), self.similarity(), strict=False))

    def _masked_loss(self, masked_ids: Tensor, mask: Tensor | None, labels: Tensor) -> Tensor:
        if self.masked_head is None:
            raise ValueError("masked_ids: the text tower has no output layer; set objective.masked_language_modeling")
        hidden = self.encode_text(masked_ids, mask).last_hidden_state
        chosen = labels != IGNORE
        return cross_entropy(self.masked_head(hidden[chosen]).float(), labels[chosen], reduction="sum")


def head_options(config: DualEncoder, part: str) -> dict[str, Any]:
    """What a recipe says of a head's layers."""
    fields = {"kind", "hidden_dim", "activation", "norm", "bias", "prior_image"}
    return {**getattr(config, part).model_dump(include=fields), "embedding_dim": config.embedding_dim}
