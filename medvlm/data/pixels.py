"""Pixels of any picture -> 8-bit grey or RGB: what preparing data and answering questions must do alike."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def stretch(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Lowest valid value -> 0, highest -> 1, linearly; float64 of the same shape. A constant picture is black."""
    x = values.astype(np.float64)
    inside = x if valid is None or not valid.any() else x[valid]
    low, high = float(inside.min()), float(inside.max())
    return np.clip((x - low) / ((high - low) or 1.0), 0, 1)


def to_8_bit(unit: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint8 by ``rint(255 x)``."""
    return np.rint(unit * 255).astype(np.uint8)


def plain_image(image: "Image.Image") -> "Image.Image":
    """A loaded Pillow image -> mode "L" or "RGB", upright.

    EXIF orientation is applied; transparency lies on white, as a page viewer shows it; CMYK and palettes become RGB.
    More than 8 bits of grey are stretched from the image's own lowest to its highest value: a 16-bit file often holds
    10 to 14 bits of signal and does not say how many, and Pillow's own conversion clips everything above 255.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # "I", "I;16", "I;16B", "F"
        return Image.fromarray(to_8_bit(stretch(np.asarray(image))))
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
        image = paper
    return image.convert("L" if grey else "RGB")
