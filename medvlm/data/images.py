"""Encoded image -> uint8 tensor of the vision tower's size, with the same pixels as the exported image processor's.

Normalisation (rescale, mean, standard deviation) and the expansion of grey to three channels are left to the model, on
its device: one channel of uint8 is a twelfth of the bytes of three channels of float32.
"""

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from medvlm.data.pixels import plain_image
from medvlm.data.resize import TORCH_FILTERS, Filter, pillow, resize, resize_padded
from medvlm.errors import UserError

GAP = 2.25  # 2 falls to 51 dB where it is met exactly, as 512 for 256 of 2048 pixels
WHOLE_PIXELS = (Filter.NEAREST, Filter.BOX)  # filters that take pixels as they are, and a reduced decode has others
COLORSPACES = {"Gray": "GRAY", "YCbCr": "RGB", "RGB": "RGB"}  # CMYK and YCCK are Pillow's
MAX_PIXELS = 2 * (PILImage.MAX_IMAGE_PIXELS or 89_478_485)  # where Pillow suspects a decompression bomb


@dataclass(frozen=True)
class Decoded:
    """uint8 [h, w, C], a decode at ``eighths``/8 of ``size`` (width, height); h and w are rounded up."""

    pixels: np.ndarray
    size: tuple[int, int]
    eighths: int = 8

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height that the image really has in ``pixels``: its last row and column may be a part of one."""
        return self.size[0] * self.eighths / 8, self.size[1] * self.eighths / 8


class ImageTransform:
    """Pad to square, resize and crop as a Hugging Face image processor's configuration says.

    A JPEG is decoded at the smallest of 1/8, ..., 8/8 of its size that is still GAP times the size wanted, and resized
    by PyTorch's antialiased filters: on X-rays at least 52 dB against a full decode and Pillow's, and within 2 grey
    levels where the decode is full. ``exact`` takes neither short cut: it gives the very values of this processor, with
    the backend (Pillow or torchvision) that transformers chose here.

    Raises UserError for a configuration that training would not follow.
    """

    def __init__(self, processor: Any, exact: bool = False):
        _check(processor)
        self.resample, self.exact = Filter(int(processor.resample)), exact
        self.pillow = (exact and getattr(processor, "backend", "pil") == "pil") or self.resample not in TORCH_FILTERS
        size = {k: v for k, v in dict(processor.size).items() if v is not None}
        self.shortest: int | None = size.get("shortest_edge")
        self.fixed = (size.get("width", 0), size.get("height", 0))
        crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
        self.crop = (crop["width"], crop["height"]) if crop else None
        self.fill: tuple[int, ...] | None = None
        if getattr(processor, "do_pad", False):  # LLaVA's: with the mean colour
            self.fill = tuple(int(value * 255) for value in processor.image_mean)

    def __call__(self, data: bytes, where: str) -> torch.Tensor:
        """uint8 [C, S, S]: C is 1 for a grey file, 3 for colour. EXIF orientation is applied; alpha lies on white.

        Raises UserError naming ``where`` if the data is damaged, is no image, or has more than 8 bits per value.
        """
        try:
            image = self.decode_jpeg(data) if data[:2] == b"\xff\xd8" else _other(data)
        except UnidentifiedImageError:
            what = "a DICOM file; prepare it" if data[128:132] == b"DICM" else "not a known image format"
            raise UserError(f"{where}: image cannot be decoded ({what})") from None
        except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
            raise UserError(f"{where}: image cannot be decoded ({error})") from None
        return self._fit(image)

    def resize(self, pixels: np.ndarray) -> torch.Tensor:
        """Decoded pixels, uint8 [h, w, C] -> uint8 [C, S, S]."""
        return self._fit(Decoded(pixels, (pixels.shape[1], pixels.shape[0])))

    def _fit(self, image: Decoded) -> torch.Tensor:
        size = self._target(*image.size)
        if self.fill is not None and image.size[0] != image.size[1]:
            resized = self._resize_padded(image, size, self.fill)
        else:
            resized = self._resize(image.pixels, image.extent, size).transpose(2, 0, 1)
        if self.crop:
            left, top = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
            resized = resized[:, top : top + self.crop[1], left : left + self.crop[0]]
        return torch.from_numpy(np.ascontiguousarray(resized))

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize, before the crop."""
        if self.shortest is None:
            return self.fixed
        if self.fill is not None:
            width = height = max(width, height)
        # the longer side as transformers computes it: truncated, not rounded
        if width <= height:
            return self.shortest, int(self.shortest * height / width)
        return int(self.shortest * width / height), self.shortest

    def decode_jpeg(self, data: bytes) -> Decoded:
        """At the smallest scale that serves the size wanted. Raises ValueError or OSError where it is damaged."""
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in COLORSPACES or _is_turned(data):
            return _other(data)
        eighths = self._eighths(width, height)
        low, wide = (math.ceil(side * eighths / 8) for side in (height, width))
        if low * wide > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many")
        # strict: truncated or corrupt data raises, where Pillow would fill the rest with grey
        pixels = simplejpeg.decode_jpeg(data, COLORSPACES[colorspace], min_height=low, min_width=wide, strict=True)
        return Decoded(pixels, (width, height), eighths)

    def _eighths(self, width: int, height: int) -> int:
        if self.exact or self.resample in WHOLE_PIXELS:
            return 8
        target = self._target(width, height)
        if self.fill is not None:
            width = height = max(width, height)
        eighths = math.ceil(8 * GAP * max(target[0] / width, target[1] / height))
        return eighths if eighths < 7 else 8  # 7/8 takes longer than all

    def _resize(self, pixels: np.ndarray, extent: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
        if self.pillow:
            return pillow(pixels, (0, 0, *extent), size, self.resample)
        return resize(pixels, extent, size, self.resample)

    def _resize_padded(self, image: Decoded, size: tuple[int, int], fill: tuple[int, ...]) -> np.ndarray:
        """As if the image had been padded in full size to a centred square, then resized; [C, height, width]."""
        start = (max(image.size) - min(image.size)) // 2 * image.eighths / 8
        if not self.exact and not self.pillow:
            padded = resize_padded(image.pixels, image.extent, start, size, fill, self.resample)
            if padded is not None:
                return padded
        canvas, first = _pad(image, start, fill)
        long = max(image.extent)
        box = (first, 0, first + long, long) if image.size[1] > image.size[0] else (0, first, long, first + long)
        resized = self._resize(canvas, box[2:], size) if first == 0 else pillow(canvas, box, size, self.resample)
        return resized.transpose(2, 0, 1)


def _pad(image: Decoded, start: float, fill: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """The image amid a square's colour, on its short side, and where in the first column (row, if the image is wide)
    the square begins: ``start``, the padding of full pixels, need not be whole pixels of a reduced decode."""
    upright, pixels = image.size[1] > image.size[0], image.pixels
    if pixels.shape[2] < len(set(fill)):
        pixels = np.repeat(pixels, 3, axis=2)
    content = pixels if upright else pixels.swapaxes(0, 1)  # a view, to be padded left and right
    rows, columns, channels = content.shape
    short, long = sorted(image.extent)
    left = math.ceil(start)
    color = np.array(fill[:channels], np.uint8)
    whole = math.ceil(left - start + long)
    canvas = np.empty((rows, whole, channels) if upright else (whole, rows, channels), np.uint8)
    view = canvas if upright else canvas.swapaxes(0, 1)
    view[:, :left], view[:, left + columns :], view[:, left : left + columns] = color, color, content
    if rest := columns - short:  # the last column may be a part of one
        view[:, left + columns - 1] = np.rint(content[:, -1] * (1 - rest) + color * rest)
    return canvas, left - start


def _check(processor: Any) -> None:
    """Refuse what would make serving differ from training."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(processor, name, True):
            raise UserError(f"image processor: {name} is off, but training always does it; turn it on")
    if abs(getattr(processor, "rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"image processor: rescale_factor must be 1/255, not {processor.rescale_factor}")
    size = {k: v for k, v in dict(processor.size).items() if v is not None}
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise UserError(f"image processor: size {size} is not supported; give shortest_edge, or height and width")
    if getattr(processor, "do_center_crop", False) and any(
        side > size.get(name, size.get("shortest_edge", 0)) for name, side in dict(processor.crop_size).items() if side
    ):
        raise UserError(f"image processor: it crops {dict(processor.crop_size)} out of {size}, which is smaller")
    if getattr(processor, "do_pad", False) and not hasattr(processor, "pad_to_square"):
        raise UserError("image processor: do_pad is supported for LlavaImageProcessor only, which pads to a square")


def _is_turned(data: bytes) -> bool:
    """Whether a JPEG's EXIF or XMP orientation is not upright; where it has neither, known from its segments alone."""
    end = 2
    while data[end : end + 1] == b"\xff" and data[end + 1 : end + 2] != b"\xda":  # up to the start of the scan
        end += 2 + int.from_bytes(data[end + 2 : end + 4], "big")
    if data.find(b"Exif\0\0", 0, end) < 0 and data.find(b"tiff:Orientation", 0, end) < 0:
        return False
    with PILImage.open(io.BytesIO(data)) as image:
        return image.getexif().get(0x0112, 1) != 1


def _other(data: bytes) -> Decoded:
    """Any format by Pillow, in full."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
        raise ValueError("16 bits per value; prepare it as 8 bits with a window")  # Pillow would clip or cut them
    with PILImage.open(io.BytesIO(data)) as image:
        image.load()
        if image.mode[0] in "IF":
            raise ValueError("more than 8 bits per value; prepare it as 8 bits with a window")
        plain = plain_image(image)
    pixels = np.asarray(plain)
    return Decoded(pixels.reshape(*pixels.shape[:2], -1), plain.size)
