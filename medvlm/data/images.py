"""Encoded image -> uint8 tensor of the vision tower's size, with the same pixels as the exported image processor's.

Normalisation (rescale, mean, standard deviation) is left to the model, on its device: a uint8 batch is a quarter
of the bytes, and one channel a third of those.
"""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from medvlm.errors import UserError


class ImageTransform:
    """Resize and crop as a Hugging Face image processor's configuration says. Gives uint8 [3, S, S]."""

    def __init__(self, processor: Any):
        size = dict(processor.size)
        self.resample = PILImage.Resampling(int(processor.resample))
        self.shortest: int | None = size.get("shortest_edge")
        self.fixed = (size.get("width", 0), size.get("height", 0))
        crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
        self.crop = (crop["width"], crop["height"]) if crop else None

    def __call__(self, data: bytes, where: str) -> torch.Tensor:
        try:
            with PILImage.open(io.BytesIO(data)) as image:
                image.load()
                rgb = image.convert("RGB")
        except UnidentifiedImageError:
            raise UserError(f"{where}: image cannot be decoded (not a known image format)") from None
        except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:
            raise UserError(f"{where}: image cannot be decoded ({error})") from None
        size = self._target(*rgb.size)
        if size != rgb.size:
            rgb = rgb.resize(size, self.resample)
        if self.crop:
            left, top = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
            rgb = rgb.crop((left, top, left + self.crop[0], top + self.crop[1]))
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()

    def _target(self, width: int, height: int) -> tuple[int, int]:
        if self.shortest is None:
            return self.fixed
        # the longer side as transformers computes it: truncated, not rounded
        if width <= height:
            return self.shortest, int(self.shortest * height / width)
        return int(self.shortest * width / height), self.shortest
