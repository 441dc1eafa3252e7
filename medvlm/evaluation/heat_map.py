"""Where in a picture a phrase is found: heat maps of patch similarities in the picture's own pixels, and scores."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from medvlm.errors import UserError
from medvlm.evaluation.task import library

SIGMA = 1.5  # patches, as BioViL's code (hi-ml-multimodal) smooths
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)


class Frame(NamedTuple):
    """A picture's point (x, y) is (ax x + bx, ay y + by) in what a model sees, which is ``width`` x ``height``."""

    ax: float
    bx: float
    ay: float
    by: float
    width: int
    height: int


def find_frame(process: Callable[[list[Image.Image]], Tensor], width: int, height: int) -> Frame:
    """What an image processor does to the coordinates of a picture of width x height: resizing, cropping, padding.

    Pictures with an edge go through ``process`` (pictures -> [N, C, H, W]), so its options need not be known. Raises
    UserError if it turns or warps, or if the middle of the picture is not seen.
    """
    places = [(round(share * width), round(share * height)) for share in (0.4, 0.5, 0.6)]
    grey = np.full((2 + 2 * len(places), height, width), 64, dtype=np.uint8)  # far from black: sharpening is not cut
    grey[1] = 191
    for n, (x, y) in enumerate(places):
        grey[2 + n, :, :x] = grey[2 + len(places) + n, :y] = 191
    dark, bright, *edges = process([Image.fromarray(g).convert("RGB") for g in grey]).float().mean(1).cpu().numpy()
    contrast = bright - dark  # [H, W]
    seen = np.abs(contrast) > 0.5 * np.abs(contrast).max()  # padding is as dark in both
    if not seen.any():
        raise UserError("the image processor makes dark and bright the same, so that no place can be traced")
    fits: list[float] = []
    for axis, given in enumerate(zip(*places, strict=True)):
        found = []
        for edge in edges[axis * len(places) : (axis + 1) * len(places)]:
            share = np.where(seen, (edge - dark) / np.where(seen, contrast, 1), 0)  # 1 before the edge, 0 behind it
            lines = share.sum(1 - axis)[seen.any(1 - axis)]  # where the edge is, in each row or column
            first = np.flatnonzero(seen.any(axis))[0]
            found.append(first + lines.mean() if np.ptp(lines) < 1 else np.nan)
        slope, offset = np.polyfit(given, found, 1) if np.isfinite(found).all() else (0.0, 0.0)
        if not slope > 0 or np.abs(np.multiply(slope, given) + offset - found).max() > 0.5:
            raise UserError("the image processor does more than resize, crop and pad, so that no place can be traced")
        fits += [float(slope), float(offset)]
    ax, bx, ay, by = fits
    return Frame(ax, bx, ay, by, width=seen.shape[1], height=seen.shape[0])


def similarity_map(patches: Tensor, text: Tensor, sigma: float = SIGMA) -> np.ndarray:
    """Patches [h, w, D] and a text [D], of length 1 -> smoothed cosines [h, w]; ``sigma`` is in patches."""
    cosines = (patches @ text).double().numpy()
    return library("scipy.ndimage").gaussian_filter(cosines, sigma) if sigma else cosines


def place(cosines: np.ndarray, frame: Frame, width: int, height: int) -> np.ndarray:
    """[h, w] of the patches -> [height, width] of the picture, bilinear; NaN where the model does not see it."""
    x = frame.ax * (np.arange(width) + 0.5) + frame.bx
    y = frame.ay * (np.arange(height) + 0.5) + frame.by
    rows, columns = y / frame.height * cosines.shape[0] - 0.5, x / frame.width * cosines.shape[1] - 0.5
    places = np.meshgrid(rows, columns, indexing="ij")
    out = library("scipy.ndimage").map_coordinates(cosines, places, order=1, mode="nearest")
    slack = 1e-2  # of a pixel: the fit of the frame is not exact
    out[(y < -slack) | (y > frame.height + slack)] = np.nan
    out[:, (x < -slack) | (x > frame.width + slack)] = np.nan
    return out


def box_mask(boxes: Iterable[Sequence[float]], width: int, height: int) -> np.ndarray:
    """Boxes (x0, y0, x1, y1) -> [height, width] bool, True where a pixel's centre lies in any of them."""
    mask = np.zeros((height, width), dtype=bool)
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    for x0, y0, x1, y1 in boxes:
        mask |= ((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1))[None]
    return mask


def contrast_to_noise(heat: np.ndarray, mask: np.ndarray) -> float | None:
    """CNR = (mean in - mean out) / sqrt(variance in + variance out) of the pixels that the model sees.

    Often given as the absolute value, by which a map that avoids the box is as good as one that finds it; here the
    sign is kept. None where the box or its outside is not seen; 0 where nothing varies.
    """
    seen = np.isfinite(heat)
    inside, outside = heat[mask & seen], heat[~mask & seen]
    if not len(inside) or not len(outside):
        return None
    spread = float(np.sqrt(inside.var() + outside.var()))
    flat = spread <= 1e-9 * float(np.abs(heat[seen]).max())  # what rounding leaves is no contrast
    return 0.0 if flat else float(inside.mean() - outside.mean()) / spread


def mean_iou(heat: np.ndarray, mask: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> float:
    """Mean over thresholds of the intersection over union of {heat > threshold} and the mask, where the model sees."""
    seen = np.isfinite(heat)
    hot, wanted = np.where(seen, heat, -np.inf), mask & seen
    shares = [((hot > t) & wanted).sum() / max(((hot > t) | wanted).sum(), 1) for t in thresholds]
    return float(np.mean(shares))


def rescaled(heat: np.ndarray) -> np.ndarray:
    """The same map from 0 at its lowest to 1 at its highest seen pixel; 0 everywhere if it is flat."""
    low, high = np.nanmin(heat), np.nanmax(heat)
    return (heat - low) / (high - low) if high > low else heat - low
