"""Volumes: one orientation for all of them, windows, and the blosc2 frames that shards hold.

Every volume is [D, H, W] = [z, y, x] in DICOM's patient coordinates (LPS): x grows to the patient's left, y to the
back, z to the head. Slice k is axial as a radiologist looks at it: the patient's left at the viewer's right, the front
on top, slice 0 nearest the feet. Only axes are swapped and reversed; nothing is resampled, so that an oblique
acquisition stays oblique (``oblique_degrees`` in the metadata).

Formats and chunk shapes were chosen by measurement: ``benchmarks/volumes.py``.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np

from medvlm.errors import UserError

CHUNK = (16, 256, 256)  # what is read at once; a block is what is decompressed at once
BLOCK = (8, 64, 128)  # fixed: blosc2 would choose by the cache of the machine, and the bytes with it
DTYPES = ("int16", "float32", "uint8")


@dataclass(frozen=True)
class Volume:
    """``array`` [D, H, W], int16 where all values are whole numbers in its range (HU), else float32; ``spacing`` in mm
    in the order x, y, z; ``metadata`` is fit for a shard."""

    array: np.ndarray
    spacing: tuple[float, float, float]
    metadata: dict[str, Any] = field(default_factory=dict)


def compact(raw: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> np.ndarray:
    """``raw * slope + intercept`` as int16 where that is exact, else as float32. Works plane by plane to spare memory.

    The product is taken in float64, so that a slope that is no whole number may still give whole numbers.
    """
    low, high = (float(v) * slope + intercept for v in (raw.min(), raw.max()))
    limits = np.iinfo(np.int16)
    out = np.empty(raw.shape, np.int16)
    if min(low, high) >= limits.min and max(low, high) <= limits.max:
        for plane, target in zip(raw, out, strict=True):
            values = plane.astype(np.float64) * slope + intercept
            target[...] = whole = np.rint(values)
            if not np.array_equal(values, whole):
                break
        else:
            return out
    return np.stack([(plane.astype(np.float64) * slope + intercept).astype(np.float32) for plane in raw])


def to_lps(affine: np.ndarray) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """How to turn stored axes (i, j, k) to (x, y, z): the stored axis of each of x, y, z, and whether to reverse it.

    ``affine`` (3 x 3 or 4 x 4) leads from (i, j, k) to millimetres in LPS. The axes are assigned to maximise the sum of
    their absolute cosines. Raises UserError for an affine that is not finite or is singular.
    """
    matrix = np.asarray(affine, dtype=np.float64)[:3, :3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise UserError("unusable orientation: the affine is not finite or is singular")
    cosines = matrix / np.linalg.norm(matrix, axis=0)
    axes = max(permutations(range(3)), key=lambda p: sum(abs(cosines[row, column]) for row, column in enumerate(p)))
    return axes, tuple(bool(cosines[row, column] < 0) for row, column in enumerate(axes))


def canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float], dict[str, Any]]:
    """Stored [i, j, k] with its LPS ``affine`` -> a view [D, H, W], the spacing (x, y, z) and the metadata.

    ``oblique_degrees`` is the largest angle between an axis of the volume and that of the patient, absent below 0.1.
    """
    axes, reverse = to_lps(affine)
    view = array.transpose(axes[::-1])
    view = view[tuple(slice(None, None, -1 if r else 1) for r in reverse[::-1])]
    columns = np.asarray(affine, dtype=np.float64)[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    angles = [np.degrees(np.arccos(min(1.0, abs(columns[row, c]) / lengths[c]))) for row, c in enumerate(axes)]
    worst = round(float(max(angles)), 1)
    x, y, z = (round(float(lengths[c]), 6) for c in axes)
    return view, (x, y, z), {"orientation": "LPS", **({"oblique_degrees": worst} if worst >= 0.1 else {})}


def window(volume: np.ndarray, windows: Sequence[tuple[float, float]]) -> np.ndarray:
    """[D, H, W] in modality units -> uint8 [C, D, H, W], a channel per (centre, width).

    The value is ``rint(255 * clip((x - (centre - width / 2)) / width, 0, 1))``, halves to even: DICOM's LINEAR_EXACT,
    so that centre - width/2 is 0 and centre + width/2 is 255. Raises UserError for a width that is not positive.
    """
    if not windows or any(not width > 0 for _, width in windows):
        raise UserError("windows: each needs a (centre, width) with a width above 0")
    out = np.empty((len(windows), *volume.shape), np.uint8)
    for channel, (center, width) in zip(out, windows, strict=True):
        # a table of all int16 values, in the order of their bits as uint16, is faster than arithmetic on all voxels
        table = np.roll(_window(np.arange(-(2**15), 2**15), center, width), 2**15)
        for plane, target in zip(volume, channel, strict=True):
            if volume.dtype == np.int16:
                np.take(table, plane.view(np.uint16), out=target, mode="clip")  # nothing to clip, but unbuffered
            else:
                target[...] = _window(plane, center, width)
    return out


def _window(x: np.ndarray, center: float, width: float) -> np.ndarray:
    return np.rint(255 * np.clip((x.astype(np.float64) - (center - width / 2)) / width, 0, 1)).astype(np.uint8)


def encode_volume(array: np.ndarray) -> bytes:
    """int16 or float32 [D, H, W], or uint8 [C, D, H, W] -> a lossless blosc2 frame (zstd level 1, bitshuffle).

    Equal arrays give equal bytes: one thread, for with more blosc2 orders blocks as they finish, and no BLOSC_*
    variable of the environment, which blosc2 obeys before its arguments.
    """
    import blosc2

    if array.dtype.name not in DTYPES or array.ndim != (4 if array.dtype == np.uint8 else 3) or not array.size:
        raise UserError(f"volume: int16 or float32 [D, H, W] or uint8 [C, D, H, W], not {array.dtype} {array.shape}")
    lead = (1,) * (array.ndim - 3)
    chunks = tuple(min(a, b) for a, b in zip((*lead, *CHUNK), array.shape, strict=True))
    blocks = tuple(min(a, b) for a, b in zip((*lead, *BLOCK), chunks, strict=True))
    cparams = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.BITSHUFFLE], nthreads=1)
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    variables = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("BLOSC_")}
    try:
        return blosc2.asarray(native, chunks=chunks, blocks=blocks, cparams=cparams).to_cframe()
    finally:
        os.environ.update(variables)


def volume_shape(data: bytes) -> tuple[int, ...]:
    """Of an encoded volume, without decompressing it."""
    return tuple(_open(data).shape)


def decode_volume(data: bytes) -> np.ndarray:
    """The array given to :func:`encode_volume`. Raises UserError for bytes that are no such frame or are damaged."""
    return read_subvolume(data, ())


def read_subvolume(data: bytes, slices: tuple[slice, ...]) -> np.ndarray:
    """``decode_volume(data)[slices]``, decompressing only the blocks that it needs. Steps must be 1."""
    array = _open(data)
    if any(s.step not in (None, 1) for s in slices):
        raise UserError("sub-volume: slices take no step")
    try:
        return array[slices]
    except RuntimeError as error:
        raise UserError(f"unreadable volume: {error}") from error


def _open(data: bytes) -> Any:
    import blosc2

    try:
        array = blosc2.ndarray_from_cframe(data)
        array.schunk.dparams = blosc2.DParams(nthreads=1)  # loader workers are the parallelism
    except (RuntimeError, ValueError) as error:
        raise UserError(f"unreadable volume: not a blosc2 frame ({error})") from error
    return array
