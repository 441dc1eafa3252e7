"""From a tower's output to one vector per image or text, and to features of patches.

Imports only PyTorch: exported folders carry this file.
"""

from typing import Any

import torch
from torch import Tensor

# Tokens before the patches in the image towers that are known here.
CLASS_TOKENS = {"vit": 1, "clip_vision_model": 1, "dinov2": 1, "siglip_vision_model": 0, "swin": 0, "resnet": 0}


def patch_tokens(tower: Any, output: Any) -> tuple[Tensor, Tensor]:
    """Class tokens [I, P, D] and patches [I, h, w, D] of a tower's output, after its last norm."""
    hidden = output.last_hidden_state
    if hidden.dim() == 4:  # of a convolutional tower
        grid = hidden.permute(0, 2, 3, 1)
        return grid.flatten(1, 2)[:, :0], grid
    if tower.config.model_type == "clip_vision_model":  # which norms only the token that it pools
        hidden = tower.post_layernorm(hidden)
    count = CLASS_TOKENS[tower.config.model_type]
    patches = hidden[:, count:]
    side = round(patches.shape[1] ** 0.5)
    return hidden[:, :count], patches.unflatten(1, (side, patches.shape[1] // side))


def pool_image(tower: Any, output: Any, pooling: str) -> Tensor:
    """[I, D]: the tower's own ``pooler`` output, its class token (``cls``), or ``mean`` or ``max`` over patches."""
    if pooling == "pooler":
        return output.pooler_output.flatten(1)
    classes, patches = patch_tokens(tower, output)
    if pooling == "cls":
        return classes[:, 0]
    return patches.mean((1, 2)) if pooling == "mean" else patches.amax((1, 2))


def pool_patches(tower: Any, output: Any, pooling: str) -> Tensor:
    """[I, h, w, D]: each patch as if it were all that there is to pool."""
    _, patches = patch_tokens(tower, output)
    pooler = {"vit": "pooler", "siglip_vision_model": "head"}.get(tower.config.model_type)
    if pooling != "pooler" or pooler is None:  # other towers pool by a token, or by the mean over patches
        return patches
    return getattr(tower, pooler)(patches.flatten(0, 2)[:, None]).view(patches.shape)


def pool_text(output: Any, attention_mask: Tensor | None, pooling: str, layers: list[int]) -> Tensor:
    """[T, D] over the tokens of ``attention_mask`` [T, L], of the mean of ``layers``; the last one is normed.

    ``pooler`` is the tower's own.
    """
    if pooling == "pooler":
        return output.pooler_output
    hidden = output.last_hidden_state
    if layers != [-1]:
        states = [*output.hidden_states[:-1], hidden]
        hidden = torch.stack([states[layer] for layer in layers]).mean(0)
    if pooling == "cls":
        return hidden[:, 0]
    if attention_mask is None:
        return hidden.mean(1) if pooling == "mean" else hidden.amax(1)
    real = attention_mask.bool()[..., None]
    if pooling == "max":
        return hidden.masked_fill(~real, float("-inf")).amax(1)
    return (hidden * real).sum(1) / real.sum(1)


def pad_to(input_ids: Tensor, attention_mask: Tensor | None, length: int, pad: int) -> Tensor:
    """[T, L] -> [T, length] with ``pad`` where there is no text: SigLIP's texts all have the same length, no mask, and
    are pooled at the last position."""
    if attention_mask is not None:
        input_ids = input_ids.masked_fill(attention_mask == 0, pad)
    return torch.nn.functional.pad(input_ids[:, :length], (0, max(0, length - input_ids.shape[1])), value=pad)
