"""Random changes to training images, each a pure function of (sample key, image number, epoch, seed).

They are applied to the uint8 image at the vision tower's size: all geometry is one interpolation of a small picture,
all changes of grey values are one table, and what the processor does to an image at serving time stays as it is.
"""

import hashlib
import math
from dataclasses import dataclass, fields

import numpy as np
import torch


@dataclass(frozen=True)
class Augment:
    """Bounds of the changes; 0 (1 for ``crop``) turns one off. Nothing is mirrored unless asked: side matters.

    rotate: degrees, either way. translate: share of the side, either way. scale: factor in 1 - scale to 1 + scale.
    crop: the least share of the area that a random crop keeps, enlarged to the whole (aspect ratio 3/4 to 4/3).
    horizontal_flip: probability. brightness: share of the full range, either way. contrast: factor in 1 - contrast to
    1 + contrast, about the image's mean. gamma: exponent in 1 / (1 + gamma) to 1 + gamma. blur: the largest standard
    deviation in pixels of a Gaussian filter. noise: the largest standard deviation in grey levels of Gaussian noise.
    gain: factor of all values in 1 - gain to 1 + gain, which torchvision's ColorJitter calls brightness.
    What moves in from outside the image is black.
    """

    rotate: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    crop: float = 1.0
    horizontal_flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    gamma: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    gain: float = 0.0

    @property
    def active(self) -> bool:
        return any(getattr(self, f.name) != f.default for f in fields(self))

    def __call__(self, image: torch.Tensor, key: str, number: int, epoch: int, seed: int) -> torch.Tensor:
        """uint8 [C, H, W] -> the same shape. ``number`` is the image's place in its sample."""
        if not self.active:
            return image
        rng = generator(key, number, epoch, seed)
        # drawn in one fixed order, so that turning one change on leaves the others as they were
        draws = rng.random(14)
        pixels = self._move(image.permute(1, 2, 0).numpy(), draws[:9])
        # of a generator of its own, which leaves the noise as it is without
        gain = 1 + self.gain * (2 * generator(f"{key}/gain", number, epoch, seed).random() - 1) if self.gain else 1.0
        pixels = self._shade(pixels, 2 * draws[9:12] - 1, gain)
        if self.blur and (sigma := self.blur * draws[12]) > 0.1:  # a narrower filter has no second tap
            pixels = _channels(_cv2().GaussianBlur(pixels, (0, 0), sigma))
        if self.noise:  # the same on every channel: grey stays grey
            field = rng.standard_normal((*pixels.shape[:2], 1), np.float32) * (self.noise * draws[13])
            pixels = np.clip(np.rint(pixels + field), 0, 255).astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def _move(self, pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Rotation, shift, zoom, crop and mirroring of [H, W, C], as one affine map with bilinear interpolation."""
        if not (self.rotate or self.translate or self.scale or self.horizontal_flip or self.crop < 1):
            return pixels
        height, width = pixels.shape[:2]
        signed = 2 * draws - 1
        angle, zoom = math.radians(self.rotate * signed[0]), 1 + self.scale * signed[1]
        shift = self.translate * signed[2:4]
        area = self.crop + (1 - self.crop) * draws[4]
        ratio = (4 / 3) ** (0.5 * signed[5]) if self.crop < 1 else 1.0
        kept = np.minimum(math.sqrt(area) * np.array([ratio, 1 / ratio]), 1)  # width and height of the crop
        middle = (1 - kept) * (draws[6:8] - 0.5)
        mirror = -1.0 if draws[8] < self.horizontal_flip else 1.0
        # the map from output to input, about the centre: square pixels turn, the crop is a share of each side
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) / zoom
        side, center = np.array([width, height]), np.array([width - 1, height - 1]) / 2
        linear = turn @ np.diag(kept * [mirror, 1])
        offset = turn @ ((middle - shift) * side) + center - linear @ center
        cv2 = _cv2()
        matrix = np.concatenate([linear, offset[:, None]], axis=1)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return _channels(cv2.warpAffine(pixels, matrix, (width, height), flags=flags, borderValue=(0, 0, 0)))

    def _shade(self, pixels: np.ndarray, signed: np.ndarray, gain: float) -> np.ndarray:
        """Gamma, gain, then contrast about the mean, then brightness, as one table of 256 values."""
        if not (self.brightness or self.contrast or self.gamma or self.gain):
            return pixels
        values = gain * (np.arange(256) / 255) ** ((1 + self.gamma) ** signed[2])
        if self.contrast:
            mean = float(np.bincount(pixels.ravel(), minlength=256) @ values) / pixels.size
            values = mean + (values - mean) * (1 + self.contrast * signed[1])
        values = values + self.brightness * signed[0]
        return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)[pixels]


def generator(key: str, number: int, epoch: int, seed: int) -> np.random.Generator:
    """Random numbers that depend on nothing else: not on worker, rank, order or library state."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{number}/{key}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _channels(pixels: np.ndarray) -> np.ndarray:
    """OpenCV drops the last axis of a one-channel image."""
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _cv2():
    import cv2

    cv2.setNumThreads(1)  # loader workers share the cores already
    return cv2
