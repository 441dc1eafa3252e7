"""Images and texts into one space: what a dual encoder in training and its exported form share.

Imports only PyTorch: exported folders carry this file.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from medvlm.models.poolings import pad_to, patch_tokens, pool_image, pool_patches, pool_text


class Ceiling(torch.autograd.Function):
    """The lesser of x and a limit. Above it the gradient passes if a step against it lowers x, so x can come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * ((x <= ctx.limit) | (gradient > 0)), None


class Similarity(nn.Module):
    """Scale and bias of the logits: scale x cosine + bias."""

    def __init__(self, temperature: float, max_scale: float, bias: float | None):
        super().__init__()
        # relative to where it begins, which bf16 weights then do not round; one dimension, not none, on which
        # deepspeed.initialize fails
        self.start = -math.log(temperature)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.limit = math.log(max_scale)
        self.bias = None if bias is None else nn.Parameter(torch.full((1,), float(bias)))

    def forward(self) -> tuple[Tensor, ...]:
        """Scale [], and bias [] if there is one, in fp32; the scale is at most ``max_scale``."""
        scale = Ceiling.apply(self.start + self.log_scale.float(), self.limit).exp().sum()
        return (scale,) if self.bias is None else (scale, self.bias.float().sum())


class JointSpace:
    """For a module with ``vision_tower``, ``vision_head``, ``text_head`` and the attributes below.

    Every call runs the same modules whatever is in the batch, as ranks of a ZeRO run must.
    """

    vision_tower: Any
    vision_head: Any
    text_head: Any
    text_encoder: Any
    image_pooling: str
    text_pooling: str
    text_layers: list[int]
    convolutional: bool
    """Whether the image head works on the patch grid."""
    text_length: int | None
    """All texts are padded to it with ``pad_token_id``, and then take no mask."""
    pad_token_id: int

    def embed_images(self, pixels: Tensor, priors: Tensor | None = None, has_prior: Tensor | None = None) -> Tensor:
        """Normalised pixels [I, 3, S, S], prior images [P, 3, S, S] of the rows of ``has_prior`` [I] -> [I, D]."""
        output = self.run_tower(pixels, priors)
        if self.convolutional:
            return self.joint_grid(output, len(pixels), has_prior).mean((2, 3))
        return self.vision_head(pool_image(self.vision_tower, output, self.image_pooling))

    def embed_patches(self, pixels: Tensor, priors: Tensor | None = None, has_prior: Tensor | None = None) -> Tensor:
        """[I, h, w, D], what the image's embedding would be if a patch were all that there is to pool."""
        if self.convolutional:
            return self.joint_grid(self.run_tower(pixels, priors), len(pixels), has_prior).permute(0, 2, 3, 1)
        patches = pool_patches(self.vision_tower, lambda: self.run_tower(pixels, priors), self.image_pooling)
        return self.vision_head(patches)

    def run_tower(self, pixels: Tensor, priors: Tensor | None) -> Any:
        """One call for images and, after them, prior images: the same on all ranks, however many of these there are.

        Raises ValueError for prior images that the model has no use for.
        """
        if priors is None:
            return self.vision_tower(pixels)
        if self.vision_head.prior_image is None:
            raise ValueError("prior images, but vision_head.prior_image is off")
        return self.vision_tower(torch.cat([pixels, priors]))

    def joint_grid(self, output: Any, count: int, has_prior: Tensor | None) -> Tensor:
        """[I, D, h, w] by a convolutional head, from the tower's output."""
        grid = patch_tokens(self.vision_tower, output)[1].permute(0, 3, 1, 2)
        return self.vision_head(grid[:count], grid[count:] if len(grid) > count else None, has_prior)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[T, L] -> [T, D]."""
        output = self.encode_text(input_ids, attention_mask)
        return self.text_head(pool_text(output, attention_mask, self.text_pooling, self.text_layers))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        """The text encoder's output."""
        if self.text_length:
            input_ids = pad_to(input_ids, attention_mask, self.text_length, self.pad_token_id)
            attention_mask = None
        deep = self.text_layers != [-1]
        return self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=deep)
