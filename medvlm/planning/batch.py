"""The batch that a plan is made for: the longest that the recipe allows, or that its data hold."""

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from medvlm.config.schema import RunConfig
from medvlm.data.conversation import IGNORE
from medvlm.data.loader import Batch
from medvlm.models.build import Components
from medvlm.planning.shape import BatchShape


def longest(config: RunConfig, parts: Components, rows: int, tokens: int | None, images: int | None) -> BatchShape:
    """The largest batch that the recipe lets through: full rows in which all text is supervised."""
    data = config.data
    tokens = tokens or (data.packing.tokens if data.packing else data.max_length)
    if images is None:
        images = data.packing.images if data.packing else 1
    images = min(images, (tokens - 2) // parts.image_tokens)
    supervised = tokens - images * parts.image_tokens - 1
    return BatchShape(rows, tokens, images, supervised, data.padding_free or data.packing is not None)


def make_batch(shape: BatchShape, parts: Components) -> Batch:
    """Call it among fake tensors: pixels then take no memory. Token ids and masks are real all the same."""
    size = parts.image_size
    pixels = torch.zeros(shape.rows * shape.images, 3, size, size, dtype=torch.uint8)
    with unset_fake_temporarily():
        ids = torch.full((shape.rows, shape.tokens), parts.tokenizer.pad_token_id)
        ids[:, : shape.images * parts.image_tokens] = parts.image_token_id
        labels = torch.full_like(ids, IGNORE)
        labels[:, shape.tokens - shape.supervised :] = 0
        if not shape.packed:
            mask = torch.ones_like(ids)
            mask[:, -1] = 0  # some padding there will be; with none at all, attention would take a shorter way
            return Batch(ids, labels, mask, pixels)
        edges = torch.arange(0, ids.numel() + 1, shape.tokens, dtype=torch.int32)
        segments = torch.arange(shape.rows).repeat_interleave(shape.tokens)
        positions = torch.arange(shape.tokens).repeat(shape.rows)
        return Batch(ids.view(1, -1), labels.view(1, -1), None, pixels, positions[None], segments[None], edges)


def shapes(shape: BatchShape, parts: Components, world: int) -> dict[str, list[int]]:
    """Of the tensors of one micro-batch of one rank."""
    rows, tokens = (1, shape.rows * shape.tokens) if shape.packed else (shape.rows, shape.tokens)
    images, width = shape.rows * shape.images, parts.text_config.hidden_size
    return {
        "input_ids": [rows, tokens],
        "pixel_values": [images, 3, parts.image_size, parts.image_size],
        "vision features": [images, parts.image_tokens, parts.vision_dim],
        "projected features": [images, parts.image_tokens, width],
        "hidden states": [rows, tokens, width],
        "logits": [shape.rows * shape.supervised, parts.text_config.vocab_size],
    }
