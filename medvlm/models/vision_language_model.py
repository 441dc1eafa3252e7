"""The LLaVA family: vision tower -> multi-modal projector -> causal language model, image tokens merged in place."""

from typing import Any

import torch
from torch import Tensor, nn

from medvlm.objectives.language_modeling import supervised_positions, token_cross_entropy_sum

PARTS = ("vision_tower", "multi_modal_projector", "language_model")


def select_features(tower: nn.Module, pixels: Tensor, layer: int | list[int], strategy: str) -> Tensor:
    """Hidden states of the chosen layer(s), joined along the features: [I, N, D_vision], as LLaVA does it.

    strategy "default" drops the first token of each layer (CLS); "full" keeps all.
    """
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    layers = [layer] if isinstance(layer, int) else layer
    return torch.cat([hidden[n][:, 1:] if strategy == "default" else hidden[n] for n in layers], dim=-1)


class VisionLanguageModel(nn.Module):
    """``mean`` and ``std`` (per channel, of pixels in 0..1) normalise the uint8 images on the model's device."""

    def __init__(
        self,
        vision_tower: nn.Module,
        projector: nn.Module,
        language_model: nn.Module,
        *,
        image_token_id: int,
        image_size: int,
        feature_layer: int | list[int],
        select_strategy: str,
        mean: list[float],
        std: list[float],
    ):
        super().__init__()
        self.vision_tower = vision_tower
        self.multi_modal_projector = projector
        self.language_model: Any = language_model
        self.image_token_id, self.image_size = image_token_id, image_size
        self.feature_layer, self.select_strategy = feature_layer, select_strategy
        self.mean, self.std = mean, std

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """uint8 [I, 3, S, S], or [I, 1, S, S] of grey images, which normalisation makes three channels -> [I, N, D]."""
        dtype = next(self.multi_modal_projector.parameters()).dtype
        options: dict[str, Any] = {"dtype": torch.float32, "device": pixel_values.device}
        mean, std = (torch.tensor(v, **options).view(1, 3, 1, 1) for v in (self.mean, self.std))
        pixels = ((pixel_values.float() / 255 - mean) / std).to(dtype)
        features = select_features(self.vision_tower, pixels, self.feature_layer, self.select_strategy)
        return self.multi_modal_projector(features)

    def hidden_states(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, D]. Every call runs every part, images or not.

        Ranks of a ZeRO run must run the same modules in the same order, and ZeRO-3 reuses the last gradient of a module
        that all ranks skip; a batch without images therefore sends one blank image through, times zero.
        """
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values.shape[0]:
            features = self.image_features(pixel_values)
            where = input_ids == self.image_token_id
            wanted, given = int(where.sum()), features.shape[0] * features.shape[1]
            if wanted != given:
                raise ValueError(f"{wanted} image tokens in the text but {given} image features")
            embeds = embeds.masked_scatter(where[..., None], features.to(embeds.dtype))
        else:
            blank = pixel_values.new_zeros(1, 3, self.image_size, self.image_size)
            embeds = embeds + 0.0 * self.image_features(blank).sum().to(embeds.dtype)
        # use_cache=False also makes transformers build the block mask of a padding-free row from position_ids: with
        # a cache (the default, in training too), its segments would see each other.
        # Kernels for variable lengths (flash attention) take the segments' edges; the others ignore them.
        edges = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        longest = {"max_length_q": max_seqlen, "max_length_k": max_seqlen}
        return self.language_model.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **({} if cu_seqlens is None else {**edges, **longest}),
        ).last_hidden_state

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The sum of the losses of the supervised tokens (0-dim). Logits are made for those positions only."""
        segments = (cu_seqlens, max_seqlen)
        hidden = self.hidden_states(input_ids, pixel_values, attention_mask, position_ids, *segments)
        mask, targets = supervised_positions(labels)
        return token_cross_entropy_sum(self.head(hidden[mask]), targets)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits as transformers' LLaVA makes them: Gemma-2's final soft cap, monotonic, is not part of that class."""
        return self.language_model.get_output_embeddings()(hidden)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """[B, T, V] in fp32, for comparisons; training never makes these."""
        return self.head(self.hidden_states(input_ids, pixel_values)).float()

    def part_parameters(self, part: str) -> dict[str, nn.Parameter]:
        return dict(getattr(self, part).named_parameters())
