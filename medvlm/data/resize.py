"""Resizing of uint8 images [h, w, C] with antialiasing: Pillow's own values, or PyTorch's kernel, which is quicker."""

import math
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image as PILImage

Filter = PILImage.Resampling
TORCH_FILTERS = {Filter.BILINEAR: "bilinear", Filter.BICUBIC: "bicubic"}  # the others are Pillow's
REACH = {Filter.BILINEAR: 1, Filter.BICUBIC: 2}  # of the filter, in pixels of the result
OFF_GRID = 1 / 16  # pixels that a reduced decode may be moved by: 0.03 pixels of the result and less
SHARE = (64, 192)  # stands for none and for all of a grey image's padding, where that has a colour


def resize(pixels: np.ndarray, extent: tuple[float, float], size: tuple[int, int], resample: Filter) -> np.ndarray:
    """[h, w, C], of which ``extent`` (width, height) is image, to ``size`` (width, height), with PyTorch's values."""
    if pixels.shape[2] > 1:
        return _torch(pixels, extent, size, resample)
    narrow = _transpose(resize_rows(_transpose(pixels), size[0], extent[0], resample))  # first, as in both libraries
    return resize_rows(narrow, size[1], extent[1], resample)


def resize_rows(pixels: np.ndarray, count: int, extent: float, resample: Filter) -> np.ndarray:
    """[h, w, C], of which ``extent`` rows are image, to [count, w, C], by PyTorch.

    Its kernel computes four channels, however few an image has: here they are four neighbours of a row.
    """
    height, width, channels = pixels.shape
    values = width * channels
    if values % 4:
        flat = np.empty((height, values + -values % 4), np.uint8)
        flat[:, :values] = pixels.reshape(height, values)
    else:
        flat = pixels.reshape(height, values)
    fours = flat.reshape(height, -1, 4)
    rows = _torch(fours, (fours.shape[1], extent), (fours.shape[1], count), resample)
    return np.ascontiguousarray(rows.reshape(count, -1)[:, :values]).reshape(count, width, channels)


def _torch(pixels: np.ndarray, extent: tuple[float, float], size: tuple[int, int], resample: Filter) -> np.ndarray:
    """Of several channels."""
    source = torch.from_numpy(np.require(pixels, requirements="W")).permute(2, 0, 1)[None]
    options: dict[str, Any] = {"size": size[::-1]}
    if extent != pixels.shape[1::-1]:  # raised by so little that the size is not rounded down
        scales = (1.0 if to == of else to / of * (1 + 1e-9) for to, of in zip(size, extent, strict=True))
        options = {"scale_factor": tuple(scales)[::-1]}
    resized = torch.nn.functional.interpolate(source, mode=TORCH_FILTERS[resample], antialias=True, **options)
    return cv2.merge(list(resized[0, :, : size[1], : size[0]].numpy()))  # twenty times as fast as NumPy


def _transpose(pixels: np.ndarray) -> np.ndarray:
    """[h, w, C] -> [w, h, C], twenty times as fast as NumPy."""
    return cv2.transpose(pixels).reshape(pixels.shape[1], pixels.shape[0], -1)


def pillow(
    pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int], resample: Filter
) -> np.ndarray:
    """Pillow's resize of the part ``box`` (left, top, right, bottom) of [h, w, C] to ``size`` (width, height)."""
    image = PILImage.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    resized = np.array(image.resize(size, resample, box=box))
    return resized.reshape(*resized.shape[:2], -1)


def resize_padded(
    pixels: np.ndarray,
    extent: tuple[float, float],
    start: float,
    size: tuple[int, int],
    fill: tuple[int, ...],
    resample: Filter,
) -> np.ndarray | None:
    """[h, w, C], as if it had been padded to a square with ``fill`` and then resized: uint8 [C, height, width].

    The image begins ``start`` pixels from the square's edge. The long side is resized first, then padding is added as
    far as the filter reaches; what lies beyond is written into the result. None where no edge of a pixel of the result
    falls on one of the source near enough (`OFF_GRID`), as ``start`` of a reduced decode need not be whole.
    """
    upright, grey = extent[1] > extent[0], pixels.shape[2] == 1
    across, along = size if upright else size[::-1]  # of the side that is padded, of the other
    short, long = sorted(extent)
    step = long / across
    margin = REACH[resample] * max(step, 1) + 1
    starts = start - step * np.arange(max(0, math.floor((start - margin) / step)) + 1)
    first = int(np.abs(starts - starts.round()).argmin())  # the pixels of the result before this one are padding
    if abs(starts[first] - round(starts[first])) > OFF_GRID:
        return None
    count = min(across - first, math.ceil((start + short + margin) / step) - first)
    count = min(across - first, count + -count % 4)  # see `resize_rows`: fours need no copy
    content = _transpose(resize_rows(pixels if upright else _transpose(pixels), along, long, resample))
    height, width, channels = content.shape
    color = np.array(fill[:channels], np.uint8)
    tinted = grey and len(set(fill)) > 1  # resized as one channel, with a few columns more: see `SHARE`
    canvas = np.empty((math.ceil(count * step - 1e-6), width + -width % 4 + 4 * tinted, channels), np.uint8)
    top = round(starts[first])
    for rows, inside, level in [
        (slice(0, top), color, SHARE[1]),
        (slice(top, top + height), content, SHARE[0]),
        (slice(top + height, None), color, SHARE[1]),
    ]:
        canvas[rows, :width], canvas[rows, width:] = inside, level
    if rest := height - short:  # the last row may be a part of one
        canvas[top + height - 1, :width] = np.rint(content[-1] * (1 - rest) + color * rest)
        canvas[top + height - 1, width:] = round(SHARE[0] * (1 - rest) + SHARE[1] * rest)
    resized = resize_rows(canvas, count, count * step, resample)
    inner, share = resized[:, :width], resized[:, -1, 0]
    square = np.empty((3 if tinted else channels, size[1], size[0]), np.uint8)
    square[...] = np.array(fill[: len(square)], np.uint8)[:, None, None]
    place = square[:, :, first : first + count] if upright else square[:, first : first + count]
    place[...] = np.moveaxis(_transpose(inner) if upright else inner, -1, 0)
    if tinted:
        padded = (share - float(SHARE[0])) / (SHARE[1] - SHARE[0])
        edge = np.flatnonzero(padded)
        for channel, value in zip(place.swapaxes(1, 2)[1:] if upright else place[1:], fill[1:], strict=True):
            channel[edge] = (inner[edge, :, 0] + (value - fill[0]) * padded[edge, None]).round().clip(0, 255)
    return square
