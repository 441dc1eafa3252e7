"""The batch that a dual encoder's plan is made for."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from medvlm.config.schema import RunConfig
from medvlm.data.conversation import IGNORE
from medvlm.data.pairs import PairBatch
from medvlm.models.build_dual_encoder import DualComponents
from medvlm.planning.shape import BatchShape


def longest(config: RunConfig, parts: DualComponents, rows: int, tokens: int | None, images: int | None) -> BatchShape:
    """Pairs with texts as long as the recipe lets through; ``images`` is 2 where each has a prior one."""
    prior = bool(getattr(config.model, "vision_head", None) and config.model.vision_head.prior_image)  # type: ignore[union-attr]
    tokens = min(tokens or config.data.max_length, config.data.max_length)
    masking = config.objective.masked_language_modeling if config.objective else None
    masked = max(1, round(masking.probability * tokens)) if masking else 0
    return BatchShape(rows, tokens, images or 1 + prior, masked, False)


def make_batch(shape: BatchShape, parts: DualComponents) -> PairBatch:
    """Call it among fake tensors: pixels then take no memory. Token ids and masks are real all the same."""
    size = parts.image_size
    pixels = torch.zeros(shape.rows, 3, size, size, dtype=torch.uint8)
    prior = torch.zeros_like(pixels) if shape.images > 1 else None
    with unset_fake_temporarily():
        ids = torch.full((shape.rows, shape.tokens), parts.tokenizer.pad_token_id)
        mask = torch.ones_like(ids)
        mask[:, -1] = 0  # some padding there will be; with none at all, attention would take a shorter way
        batch = PairBatch(ids, mask, pixels, shape.rows, shape.rows)
        batch.image_labels = batch.text_labels = torch.zeros(shape.rows, 14)
        if prior is not None:
            batch.prior_pixel_values, batch.has_prior = prior, torch.ones(shape.rows, dtype=torch.bool)
        if shape.supervised:
            batch.masked_ids = ids
            batch.masked_labels = torch.full_like(ids, IGNORE)
            batch.masked_labels[:, : shape.supervised] = 0
    return batch


def shapes(shape: BatchShape, parts: DualComponents, world: int) -> dict[str, list[int]]:
    """Of the tensors of one micro-batch of one rank, on one of ``world``."""
    rows, size = shape.rows, parts.image_size
    found: dict[str, Any] = {
        "pixel_values": [rows, 3, size, size],
        "input_ids": [rows, shape.tokens],
        "image embeddings": [rows, parts.embedding_dim],
        "text embeddings": [rows, parts.embedding_dim],
    }
    if shape.images > 1:
        found["prior_pixel_values"] = [rows, 3, size, size]
    if shape.supervised:
        found["masked tokens"] = [rows * shape.supervised]
    return found
