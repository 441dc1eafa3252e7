"""A dual encoder that no class of transformers can express, for ``AutoModel`` with ``trust_remote_code=True``.

Imports only PyTorch, transformers and the files that lie beside it in an exported folder.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, SiglipTextConfig, SiglipTextModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

from medvlm.models.heads import Head, ImageHead
from medvlm.models.joint_space import JointSpace, Similarity

AutoModel.register(SiglipTextConfig, SiglipTextModel, exist_ok=True)  # transformers lists only its vision tower


class DualEncoderConfig(PretrainedConfig):
    model_type = "medvlm_dual_encoder"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        vision_head: dict[str, Any] | None = None,
        text_head: dict[str, Any] | None = None,
        image_pooling: str = "pooler",
        text_pooling: str = "cls",
        text_layers: list[int] | None = None,
        text_length: int | None = None,
        text_pad_token_id: int = 0,
        max_scale: float = 100.0,
        has_bias: bool = False,
        **options: Any,
    ):
        """``vision_head`` and ``text_head`` are the arguments of `ImageHead` and `Head`."""

        def tower(config: Any, default: str) -> Any:
            if isinstance(config, PretrainedConfig):
                return config
            config = dict(config or {"model_type": default})
            return AutoConfig.for_model(config.pop("model_type"), **config)

        self.vision_config, self.text_config = tower(vision_config, "vit"), tower(text_config, "bert")
        self.vision_head = vision_head or {"kind": "none", "features": 768, "embedding_dim": 768}
        self.text_head = text_head or {"kind": "none", "features": 768, "embedding_dim": 768}
        self.image_pooling, self.text_pooling = image_pooling, text_pooling
        self.text_layers, self.text_length = text_layers or [-1], text_length
        self.text_pad_token_id = text_pad_token_id
        self.max_scale, self.has_bias = max_scale, has_bias
        super().__init__(**options)


def tower_of(config: Any, pooling: str) -> Any:
    """Without a pooler that is not asked for."""
    cls: Any = AutoModel._model_mapping[type(config)]
    known = "add_pooling_layer" in inspect.signature(cls).parameters
    return AutoModel.from_config(config, **({"add_pooling_layer": False} if known and pooling != "pooler" else {}))


class DualEncoder(JointSpace, PreTrainedModel):
    """Features are not normalised; ``forward`` normalises them, as CLIP's does."""

    config_class = DualEncoderConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DualEncoderConfig):
        super().__init__(config)
        self.vision_tower = tower_of(config.vision_config, config.image_pooling)
        self.vision_head = ImageHead(**config.vision_head)
        self.text_tower = tower_of(config.text_config, config.text_pooling)
        self.text_head = Head(**config.text_head)
        self.similarity = Similarity(1.0, config.max_scale, 0.0 if config.has_bias else None)
        self.image_pooling, self.convolutional = config.image_pooling, config.vision_head["kind"] == "conv"
        self.text_pooling, self.text_layers = config.text_pooling, config.text_layers
        self.text_length = config.text_length
        self.pad_token_id = config.text_pad_token_id
        self.post_init()

    @property
    def text_encoder(self) -> Any:
        return self.text_tower

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the scale, as of transformers' classes."""
        return self.similarity()[0].log()

    @property
    def logit_bias(self) -> Tensor | None:
        return self.similarity.bias

    def get_image_features(
        self,
        pixel_values: Tensor,
        prior_pixel_values: Tensor | None = None,
        has_prior: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """[I, 3, S, S] -> ``pooler_output`` [I, D]. Prior images [I, 3, S, S] count where ``has_prior`` [I] is true, by
        default everywhere."""
        inputs = self._inputs(pixel_values, prior_pixel_values, has_prior)
        return BaseModelOutputWithPooling(pooler_output=self.embed_images(*inputs))

    def get_image_patch_features(
        self, pixel_values: Tensor, prior_pixel_values: Tensor | None = None, has_prior: Tensor | None = None
    ) -> Tensor:
        """[I, h, w, D] in the joint space."""
        return self.embed_patches(*self._inputs(pixel_values, prior_pixel_values, has_prior))

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """[T, L] -> ``pooler_output`` [T, D]."""
        return BaseModelOutputWithPooling(pooler_output=self.embed_texts(input_ids, attention_mask))

    def _inputs(
        self, pixel_values: Tensor, priors: Tensor | None, has_prior: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Images and those prior images that there are, in the type of the weights, and whose they are."""
        dtype = next(self.vision_tower.parameters()).dtype
        if priors is None:
            return pixel_values.to(dtype), None, None
        if has_prior is None:
            has_prior = torch.ones(len(priors), dtype=torch.bool, device=priors.device)
        return pixel_values.to(dtype), priors[has_prior].to(dtype), has_prior

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        prior_pixel_values: Tensor | None = None,
        has_prior: Tensor | None = None,
        **_: Any,
    ) -> CLIPOutput:
        """``logits_per_image`` [I, T], ``logits_per_text`` [T, I], normalised ``image_embeds`` and ``text_embeds``."""
        image = self.embed_images(*self._inputs(pixel_values, prior_pixel_values, has_prior))
        image, text = normalize(image, dim=-1), normalize(self.embed_texts(input_ids, attention_mask), dim=-1)
        scale, *bias = self.similarity()
        logits = scale.to(image.dtype) * image @ text.T + sum(bias)
        return CLIPOutput(logits_per_image=logits, logits_per_text=logits.T, image_embeds=image, text_embeds=text)
