"""The LLaVA family: vision tower -> multi-modal projector -> causal language model, image tokens merged in place."""

from typing import Any

import torch
from torch import Tensor, nn

from medvlm.errors import UserError
from medvlm.models.attention import VARLEN
from medvlm.models.backbones import rest_frozen
from medvlm.models.batch_norm import convert_batch_norm
from medvlm.models.sequence_parallel import SequenceParallel
from medvlm.objectives.language_modeling import (
    linear_cross_entropy_sum,
    supervised_positions,
    token_cross_entropy_sum,
)

MASKED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")  # in these a mask separates samples


def select_features(tower: nn.Module, pixels: Tensor, layer: int | list[int], strategy: str) -> Tensor:
    """Hidden states of the chosen layer(s), joined along the features: [I, N, D_vision], as LLaVA does it."""
    return torch.cat(layer_features(tower, pixels, layer, strategy), dim=-1)


def layer_features(tower: nn.Module, pixels: Tensor, layer: int | list[int], strategy: str) -> list[Tensor]:
    """[I, N, D] of each chosen layer. Of a convolutional tower's map [I, D, h, w] each place is a token, row by row.

    strategy "default" drops the first token (CLS); "full" keeps all.
    """
    states = tower(pixels, output_hidden_states=True).hidden_states
    chosen = [states[n] for n in ([layer] if isinstance(layer, int) else layer)]
    tokens = [hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden for hidden in chosen]
    return [hidden[:, 1:] for hidden in tokens] if strategy == "default" else tokens


class OutputHead(nn.Linear):
    """A language model's output layer, which given targets returns the summed loss instead of logits.

    ZeRO-3 gathers a layer's weight for the length of its own forward. The chunked loss is therefore one call of this
    layer: a call per chunk would be a collective per chunk, and ranks have different numbers of them.
    """

    loss: Any = staticmethod(linear_cross_entropy_sum)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden [S, D] -> logits [S, V]; with targets [S], the sum of their losses (0-dim)."""
        if targets is None:
            return super().forward(hidden)
        return self.loss(hidden, self.weight, targets, self.bias)


class VisionLanguageModel(nn.Module):
    """``mean`` and ``std`` (per channel, of pixels in 0..1) normalise the uint8 images on the model's device.

    ``choices`` says which attention and kernels it was built with, and why nothing better, a line each.
    """

    choices: tuple[str, ...] = ()

    def __init__(
        self,
        vision_tower: nn.Module,
        projector: nn.Module,
        language_model: Any,
        *,
        image_token_id: int,
        image_size: int,
        feature_layer: int | list[int],
        select_strategy: str,
        mean: list[float],
        std: list[float],
    ):
        super().__init__()
        # A micro-batch has few images, on some ranks none but a blank one, of which no statistics are to be made: batch
        # normalisation keeps the running statistics that the tower comes with, though its weights may train.
        convert_batch_norm(vision_tower, fixed=True)
        self.vision_tower = vision_tower
        self.multi_modal_projector = projector
        self.language_model: Any = language_model
        self.image_token_id, self.image_size = image_token_id, image_size
        self.feature_layer, self.select_strategy = feature_layer, select_strategy
        self.mean, self.std = mean, std
        self.sequence_parallel: SequenceParallel | None = None
        head = self.language_model.get_output_embeddings()
        if type(head) is nn.Linear:  # its weights and their names stay
            head.__class__ = OutputHead
        self.language_model.get_decoder().register_forward_pre_hook(_refuse_leaks, with_kwargs=True)

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        super().train(mode)
        rest_frozen(self.vision_tower)
        return self

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
        """Final hidden states [B, T, D], or this rank's part of them. Every call runs every part, images or not.

        A batch has an attention mask, or positions that restart in a row of segments; both raise ValueError.

        Ranks of a ZeRO run must run the same modules in the same order, and ZeRO-3 reuses the last gradient of a module
        that all ranks skip; a batch without images therefore sends one blank image through, times zero.
        """
        if attention_mask is not None and (position_ids is not None or cu_seqlens is not None):
            raise ValueError("a row of segments takes no attention mask: its samples would see each other")
        if attention_mask is not None and attention_mask.all():
            attention_mask = None  # nothing is padded
        group = self.sequence_parallel
        input_ids = group.pad(input_ids, 0) if group else input_ids
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values.shape[0]:
            features = self.image_features(group.images(pixel_values) if group else pixel_values)
            features = group.gather_images(features, pixel_values.shape[0]) if group else features
            where = input_ids == self.image_token_id
            wanted, given = int(where.sum()), features.shape[0] * features.shape[1]
            if wanted != given:
                raise ValueError(f"{wanted} image tokens in the text but {given} image features")
            embeds = embeds.masked_scatter(where[..., None], features.to(embeds.dtype))
        else:
            blank = pixel_values.new_zeros(1, 3, self.image_size, self.image_size)
            embeds = embeds + 0.0 * self.image_features(blank).sum().to(embeds.dtype)
        packed = position_ids is not None or cu_seqlens is not None
        segments: dict[str, Any] = {}
        if packed or (attention_mask is None and self.language_model.config._attn_implementation == VARLEN):
            edges, longest = self._segments(input_ids, position_ids, cu_seqlens, max_seqlen)
            # Kernels for variable lengths take these; the others find the segments in position_ids.
            segments = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
            segments |= {"max_length_q": longest, "max_length_k": longest}
        if group:
            whole = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[0], -1)
            embeds, position_ids, attention_mask = group.part(embeds), group.part(whole), None
        return self.language_model.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **segments,
        ).last_hidden_state

    def _segments(
        self, input_ids: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> tuple[Tensor, int]:
        """Edges and longest length of a batch without a mask: given, or from restarting positions, or its rows."""
        rows, tokens = input_ids.shape
        if cu_seqlens is None and position_ids is not None:
            starts = (position_ids.flatten() == 0).nonzero()[:, 0]
            if not len(starts) or starts[0] != 0:
                raise ValueError("position_ids: the first position of a row is 0")
            cu_seqlens = torch.cat([starts, starts.new_tensor([rows * tokens])]).int()
        if cu_seqlens is None:
            return torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=input_ids.device), tokens
        layers = set(getattr(self.language_model.config, "layer_types", None) or ()) - set(MASKED_LAYERS)
        if layers:
            raise UserError(f"data.packing: {min(layers)} layers carry a state from one sample of a row to the next")
        return cu_seqlens, int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen

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
        """The sum of the losses of the supervised tokens (0-dim), or of those of this rank's part of the rows.

        Logits are made for those positions only.
        """
        segments = (cu_seqlens, max_seqlen)
        hidden = self.hidden_states(input_ids, pixel_values, attention_mask, position_ids, *segments)
        if self.sequence_parallel:
            labels = self.sequence_parallel.labels(labels)
        mask, targets = supervised_positions(labels)
        mask = mask[:, : hidden.shape[1]]
        head = self.language_model.get_output_embeddings()
        if isinstance(head, OutputHead):
            return head(hidden[mask], targets)
        return token_cross_entropy_sum(head(hidden[mask]), targets)  # the layer was wrapped, by an adapter

    def head(self, hidden: Tensor) -> Tensor:
        """Logits as transformers' LLaVA makes them: Gemma-2's final soft cap, monotonic, is not part of that class."""
        return self.language_model.get_output_embeddings()(hidden)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """[B, T, V] in fp32, for comparisons; training never makes these."""
        return self.head(self.hidden_states(input_ids, pixel_values)).float()


def _refuse_leaks(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """With segments, ``transformers`` separates them only if it gets neither a mask nor a cache. Raises ValueError."""
    if kwargs.get("cu_seq_lens_q") is None and not _restarts(kwargs.get("position_ids"), kwargs.get("attention_mask")):
        return
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        raise ValueError("a row of segments takes no attention mask and no cache: its samples would see each other")
    if kwargs.get("use_cache") is not False:
        raise ValueError("a row of segments needs use_cache=False: with a cache its samples would see each other")


def _restarts(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Whether positions [B, T] begin anew within a row, and not after its padding, which ``mask`` [B, T] tells."""
    if positions is None or positions.dim() != 2 or positions.shape[1] < 2:
        return False
    anew = positions[:, 1:] == 0
    if mask is not None and mask.shape == positions.shape:
        anew = anew & mask[:, :-1].bool()
    return bool(anew.any())
