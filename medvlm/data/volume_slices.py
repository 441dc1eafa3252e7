"""A volume as pictures: evenly spaced axial slices, each an image of its own to a model that takes pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medvlm.data.schema import Image, ImagePart, Message
from medvlm.data.volumes import Volume, read_subvolume, volume_shape, window
from medvlm.errors import UserError


@dataclass(frozen=True)
class VolumeSlices:
    """At most ``count`` slices of each volume. ``window`` (centre, width) is for volumes stored in modality units."""

    count: int
    window: tuple[float, float] | None = None

    def places(self, depth: int) -> list[int]:
        """Slice numbers, from feet to head: the middles of ``count`` equal parts; every slice of a thinner volume."""
        count = min(self.count, depth)
        return [(2 * n + 1) * depth // (2 * count) for n in range(count)]

    def images(self, stored: Sequence[Image]) -> list[int]:
        """Of each stored image or volume, how many images the model sees."""
        return [len(self.places(image.depth)) if image.depth else 1 for image in stored]

    def decode(self, data: bytes, where: str) -> list[np.ndarray]:
        """An encoded volume -> uint8 [H, W, C] per slice, C = 3 where three windows were stored. Reads no other slice.

        Raises UserError naming ``where``.
        """
        *channels, depth, _, _ = volume_shape(data)
        lead = (slice(None),) * len(channels)
        picked = [read_subvolume(data, (*lead, slice(z, z + 1))) for z in self.places(depth)]
        return [self._picture(slab[..., 0, :, :], where) for slab in picked]

    def cut(self, volume: Volume, where: str) -> list[np.ndarray]:
        """The same of a volume that was just read."""
        return [self._picture(volume.array[z], where) for z in self.places(len(volume.array))]

    def _picture(self, plane: np.ndarray, where: str) -> np.ndarray:
        if plane.dtype != np.uint8:
            if self.window is None:
                raise UserError(
                    f"{where}: the volume is stored in modality units; give a window (centre and width), "
                    "such as data.volume_window=[40,400], or --window 40 400 of generate, for soft tissue in CT"
                )
            plane = window(plane[None], [self.window])[:, 0]
        planes = plane.reshape(-1, *plane.shape[-2:])
        if len(planes) not in (1, 3):
            raise UserError(f"{where}: the volume was stored with {len(planes)} windows; a picture has 1 or 3 channels")
        return np.ascontiguousarray(planes.transpose(1, 2, 0))


def expand(messages: Sequence[Message], counts: Sequence[int]) -> list[Message]:
    """Messages in which the n-th image part is ``counts[n]`` image parts."""
    if all(count == 1 for count in counts):
        return list(messages)
    left = iter(counts)
    out = []
    for message in messages:
        parts: list[Any] = []
        for part in message.content:
            parts += [part] * (next(left) if isinstance(part, ImagePart) else 1)
        out.append(message.model_copy(update={"content": parts}))
    return out
