"""From a tower's output to one vector per image or text, and to features of patches.

Imports only PyTorch: exported folders carry this file.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Tokens before the patches in the image towers that are known here.
CLASS_TOKENS = {"vit": 1, "clip_vision_model": 1, "dinov2": 1, "siglip_vision_model": 0, "swin": 0, "resnet": 0}
# The last norm of those that pool by a class token.
LAST_NORM = {"vit": "layernorm", "clip_vision_model": "post_layernorm", "dinov2": "layernorm"}


def patch_tokens(tower: Any, output: Any) -> tuple[Tensor, Tensor]:
    """Class tokens [I, P, D] and patches [I, h, w, D] of a tower's output, after its last norm."""
    hidden = output.last_hidden_state
    if hidden.dim() == 4:  # of a convolutional tower
        grid = hidden.permute(0, 2, 3, 1)
        return grid.flatten(1, 2)[:, :0], grid
    if tower.config.model_type == "clip_vision_model":  # which norms only the token that it pools
        hidden = tower.post_layernorm(hidden)
    count = CLASS_TOKENS[tower.config.model_type]
    return hidden[:, :count], on_grid(hidden[:, count:])


def on_grid(patches: Tensor) -> Tensor:
    """[I, h * h, D] -> [I, h, h, D]."""
    side = round(patches.shape[1] ** 0.5)
    return patches.unflatten(1, (side, patches.shape[1] // side))


def pool_image(tower: Any, output: Any, pooling: str) -> Tensor:
    """[I, D]: the tower's own ``pooler`` output, its class token (``cls``), or ``mean`` or ``max`` over patches."""
    if pooling == "pooler":
        return output.pooler_output.flatten(1)
    classes, patches = patch_tokens(tower, output)
    if pooling == "cls":
        return classes[:, 0]
    return patches.mean((1, 2)) if pooling == "mean" else patches.amax((1, 2))


def pool_patches(tower: Any, run: Callable[[], Any], pooling: str) -> Tensor:
    """[I, h, w, D]: each patch as if it were all that there is to pool. ``run`` gives the tower's output."""
    kind = tower.config.model_type
    if pooling == "cls" or (pooling == "pooler" and kind in LAST_NORM):
        patches = on_grid(class_token_by_patch(tower, run)[:, CLASS_TOKENS[kind] :])
    else:
        _, patches = patch_tokens(tower, run())
    pooler = {"vit": "pooler", "siglip_vision_model": "head"}.get(kind)
    if pooling != "pooler" or pooler is None:  # by the class token, or by the mean over patches
        return patches
    return getattr(tower, pooler)(patches.flatten(0, 2)[:, None]).view(patches.shape)


def class_token_by_patch(tower: Any, run: Callable[[], Any]) -> Tensor:
    """[I, N, D]: what the class token would be after the last layer and norm, had it attended there to each of the N
    tokens alone. ``run`` runs the tower.

    What leaves the last layer in a patch's place was never trained to be near texts; what the class token takes from
    the patch was (MaskCLIP, arXiv 2112.01071, which leaves the class token's own part out).
    """
    layer = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))[-1]
    named = list(layer.named_modules())
    value = next(m for name, m in named if name.endswith((".v_proj", ".value")))
    out = next(m for name, m in named if name.endswith((".o_proj", ".out_proj", "attention.output.dense")))
    kept: dict[str, Any] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, *inputs: kept.update(inputs=inputs), with_kwargs=True),
        value.register_forward_hook(lambda _, args, found: kept.update(values=found)),
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    (hidden, *others), options = kept["inputs"]
    hook = out.register_forward_pre_hook(lambda *_: (kept["values"],))  # instead of what it attends to
    try:
        found = layer(hidden[:, :1].expand_as(hidden), *others, **options)
    finally:
        hook.remove()
    return getattr(tower, LAST_NORM[tower.config.model_type])(found[0] if isinstance(found, tuple) else found)


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
