"""NIfTI -> a volume in the same orientation and units as a DICOM series: [D, H, W] in LPS."""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvlm.data.volumes import Volume, canonical, compact, to_lps
from medvlm.errors import UserError

MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


def read_nifti(
    path: Path,
    slope: float | None = None,
    intercept: float | None = None,
    volume: int | None = None,
    nan_value: float | None = None,
    axes: str | None = None,
    spacing: tuple[float, float, float] | None = None,
    slices: tuple[slice, slice, slice] | None = None,
) -> Volume:
    """Read a .nii or .nii.gz of either byte order.

    Voxel values are stored * scl_slope + scl_inter; ``slope`` and ``intercept`` replace those of the header (CT-RATE
    gives them in a table). Of a 4D file ``volume`` must choose one, or it is refused. ``nan_value`` replaces voxels
    that are not finite, which are refused otherwise. ``axes`` (such as "LAS": the direction each stored axis grows to)
    is for files whose header has neither qform nor sform; without it they are refused, for left and right are unknown.
    A file whose header has another spacing than ``spacing`` (x, y, z in mm) is refused: some headers are placeholders.
    ``slices`` (z, y, x; no steps) read a part of the canonical volume, from an uncompressed file only that part.

    Raises UserError with the reason.
    """
    import nibabel
    from nibabel.arrayproxy import ArrayProxy

    if not path.exists():
        raise UserError("file not found: no such NIfTI file")
    if not path.stat().st_size:
        raise UserError("empty file")
    try:
        image: Any = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise UserError(f"unreadable NIfTI: it is {type(image).__name__}")
        affine = _lps_affine(image, axes)
        part = _stored_part(image.shape, affine, volume, slices)
        proxy: Any = image.dataobj
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            stored = ArrayProxy(file, (proxy.shape, proxy.dtype, proxy.offset, 1.0, 0.0), mmap=False)  # no slope yet
            raw = np.asarray(stored[part])
            while path.suffix == ".gz" and file.read(2**20):  # its checksum is tested only at the end
                pass
    except UserError:
        raise
    except Exception as error:  # nibabel, gzip and zlib each have their own for damaged files
        raise UserError(f"unreadable NIfTI: {' '.join(str(error).split())}") from error
    if raw.dtype.kind not in "iuf":
        raise UserError(f"unusable voxel type: {raw.dtype} is not one real number per voxel")
    values = compact(
        raw,
        float(proxy.slope if slope is None else slope),
        float(proxy.inter if intercept is None else intercept),
    )
    if values.dtype == np.float32 and not np.isfinite(values).all():
        if nan_value is None:
            raise UserError("voxels that are not finite: give nan_value to replace them")
        values = compact(np.where(np.isfinite(values), values, np.float32(nan_value)))
    array, own_spacing, found = canonical(values, affine)
    if spacing is not None and not np.allclose(own_spacing, spacing, rtol=0.02):
        raise UserError(f"spacing of the header: it is {_in_mm(own_spacing)}, and {_in_mm(spacing)} by the table")
    return Volume(np.ascontiguousarray(array), own_spacing, found)


def _in_mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in spacing) + " mm"


def _lps_affine(image: Any, axes: str | None) -> np.ndarray:
    """From stored indices to mm in LPS (NIfTI's own world is RAS). Raises UserError where orientation is unknown."""
    import nibabel

    header = image.header
    if header["qform_code"] or header["sform_code"]:
        affine = image.affine
    elif axes is None:
        raise UserError("no orientation: the header has neither qform nor sform; give axes, such as LAS")
    else:
        try:
            turned = nibabel.orientations.axcodes2ornt(tuple(axes.upper()))
            if len(axes) != 3 or sorted(turned[:, 0]) != [0, 1, 2]:
                raise ValueError
        except ValueError:
            raise UserError(f"axes: {axes!r} must be one each of L or R, A or P, I or S") from None
        affine = np.eye(4)
        affine[:3, :3] = 0
        for stored, ((world, sign), zoom) in enumerate(zip(turned, header.get_zooms()[:3], strict=True)):
            affine[int(world), stored] = sign * zoom
    unit = MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
    lps = np.diag([-unit, -unit, unit, 1.0]) @ affine
    to_lps(lps)  # refuses an affine that is not finite or is singular
    return lps


def _stored_part(
    shape: tuple[int, ...], affine: np.ndarray, volume: int | None, slices: tuple[slice, slice, slice] | None
) -> tuple[slice | int, ...]:
    """What to read of the stored array: one volume of it, and canonical (z, y, x) slices turned to stored axes."""
    if len(shape) < 3 or min(shape) < 1:
        raise UserError(f"not a volume: its shape is {shape}")
    extra = shape[3:]
    if int(np.prod(extra)) > 1 and (volume is None or len(extra) != 1):
        raise UserError(f"4D volume: it holds {extra} volumes; choose one with volume")
    if volume is not None and not (extra and 0 <= volume < extra[0]) and volume != 0:
        raise UserError(f"no such volume: volume {volume} of {extra or (1,)}")
    part: list[slice | int] = [slice(None)] * 3
    for wanted, stored, reverse in zip(reversed(slices or (slice(None),) * 3), *to_lps(affine), strict=True):
        start, stop, step = wanted.indices(shape[stored])
        if step != 1 or stop <= start:
            raise UserError("sub-volume: slices must not be empty and take no step")
        part[stored] = slice(shape[stored] - stop, shape[stored] - start) if reverse else slice(start, stop)
    return (*part, *([volume or 0, *[0] * (len(extra) - 1)] if extra else []))
