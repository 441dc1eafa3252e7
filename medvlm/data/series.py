"""A folder of DICOM slices, or a multi-frame file -> one volume in modality units (HU for CT).

Slices are ordered by their position along the normal of the slices, never by name or InstanceNumber. A series that is
not one regular grid is refused, with the reason in the words before the colon.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvlm.data.dicom import frame_count, frame_header, metadata, modality_values, read_dicom, stored_pixels
from medvlm.data.volumes import Volume, canonical, compact
from medvlm.errors import UserError

SAME_POSITION = 0.01  # mm
OFF_GRID = 0.1  # of the slice distance: positions are written with one or two decimals
SAME_ANGLE = 1e-3  # between direction cosines
TILT = 0.5  # degrees; less is rounding of the positions
SKIPPED_NAMES = ("DICOMDIR",)  # and hidden files


@dataclass(frozen=True)
class _Slice:
    values: np.ndarray  # [H, W] in modality units, int16 or float32
    position: np.ndarray  # of the first pixel, mm, LPS
    cosines: np.ndarray  # [6]: the direction of a row (x), then of a column (y)
    spacing: tuple[float, float]  # x, y
    series: str
    metadata: dict[str, Any]


def read_series(path: Path, series_uid: str | None = None) -> Volume:
    """Read the DICOM files of a folder (not of its subfolders), or one multi-frame file, as a volume [D, H, W] in LPS.

    int16 where all values are whole numbers, else float32; spacing in mm in the order x, y, z, where the distance of
    slices is measured along their normal from their positions. MONOCHROME1 is not inverted: these are values. With a
    tilted gantry slices are sheared against each other: ``gantry_tilt_degrees`` reports it, nothing is resampled.
    Of several series in a folder ``series_uid`` chooses one; whatever else lies there is then not read.

    Raises UserError with the reason: several series; slices that differ in size, spacing or direction, or are in
    colour; without position; two within 0.01 mm; missing (a gap above 1.5 times the usual one); off the regular grid
    by more than a tenth of the slice distance, along it or across. Slices missing at either end cannot be seen.
    """
    slices = _read(path, series_uid)
    first = slices[0]
    if len(slices) < 2:
        raise UserError("single slice: a series needs two or more; read one slice as a picture")
    if len({s.series for s in slices}) > 1:
        raise UserError(f"several series: {len({s.series for s in slices})} in one folder; choose with series_uid")
    sizes = sorted({s.values.shape for s in slices})
    if len(sizes) > 1:
        raise UserError(f"slices of differing size: {sizes} (rows, columns)")
    if any(not np.allclose(s.spacing, first.spacing, rtol=1e-3) for s in slices):
        raise UserError("slices of differing pixel spacing: they are no regular grid")
    if any(np.abs(s.cosines - first.cosines).max() > SAME_ANGLE for s in slices):
        raise UserError("slices of differing direction: they are not parallel")
    row, column = first.cosines[:3], first.cosines[3:]
    normal = np.cross(row, column)
    slices.sort(key=lambda s: float(s.position @ normal))
    step = _regular_step([s.position for s in slices], normal)

    stack = np.stack([s.values for s in slices])  # int16 unless one of them is float32
    distance = float(step @ normal)
    affine = np.stack([row * first.spacing[0], column * first.spacing[1], normal * distance], axis=1)
    array, spacing, found = canonical(stack.transpose(2, 1, 0), affine)
    tilt = float(np.degrees(np.arccos(min(1.0, distance / float(np.linalg.norm(step))))))
    if tilt >= TILT:
        found["gantry_tilt_degrees"] = round(tilt, 1)
    kept = {k: v for k, v in first.metadata.items() if k not in ("frame", "frames")}
    return Volume(np.ascontiguousarray(array), spacing, {**kept, **found})


def _regular_step(positions: list[np.ndarray], normal: np.ndarray) -> np.ndarray:
    """The vector from slice to slice, in mm, of sorted positions; UserError unless all lie on that grid."""
    along = np.array([p @ normal for p in positions])
    gaps = np.diff(along)
    if gaps.min() < SAME_POSITION:
        raise UserError(f"duplicate slice positions: {int((gaps < SAME_POSITION).sum())} slices lie on another")
    usual = float(np.median(gaps))
    if gaps.max() > 1.5 * usual:
        raise UserError(f"missing slices: a gap of {gaps.max():.2f} mm where {usual:.2f} mm are usual")
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    grid = positions[0] + np.arange(len(positions))[:, None] * step
    off = float(np.linalg.norm(np.stack(positions) - grid, axis=1).max())
    if off > OFF_GRID * usual:
        raise UserError(f"uneven slice spacing: a slice lies {off:.2f} mm off the grid of {usual:.2f} mm")
    return step


def _belongs(file: Path, series_uid: str) -> bool:
    """Whether a file is of the series. Its neighbours may hold no pixels (a report, a plan) or be no DICOM at all."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
    except InvalidDicomError:
        return False
    except Exception as error:  # pydicom raises whatever it likes on damaged files
        raise UserError(f"unreadable DICOM: {' '.join(str(error).split())}") from error
    return header.get("SeriesInstanceUID") == series_uid


def _read(path: Path, series_uid: str | None) -> list[_Slice]:
    """All frames of all files that belong to the series."""
    if not path.exists():
        raise UserError("file not found: no such series")
    files = [path]
    if path.is_dir():
        names = (f for f in sorted(path.iterdir()) if not f.name.startswith(".") and f.name not in SKIPPED_NAMES)
        files = [f for f in names if f.is_file()]
    slices: list[_Slice] = []
    for file in files:
        if series_uid is not None and not _belongs(file, series_uid):
            continue
        dataset = read_dicom(file.read_bytes())
        pixels = stored_pixels(dataset)
        frames = pixels if frame_count(dataset) > 1 else pixels[None]
        if len(frames) > 1 and "PerFrameFunctionalGroupsSequence" not in dataset:
            raise UserError("no slice positions: the frames of a multi-frame file have none of their own")
        for number, frame in enumerate(frames):
            header = frame_header(dataset, number)
            try:
                position = np.array([float(v) for v in header.ImagePositionPatient])
                cosines = np.array([float(v) for v in header.ImageOrientationPatient])
                down, right = (float(v) for v in header.PixelSpacing)
                lengths = np.linalg.norm(cosines.reshape(2, 3), axis=1)
                if not (np.isfinite(position).all() and min(down, right) > 0 and np.abs(lengths - 1).max() < 0.01):
                    raise ValueError
            except (AttributeError, TypeError, ValueError):
                raise UserError("no slice positions: position, orientation or spacing is missing or wrong") from None
            if frame.ndim != 2 or header.get("PhotometricInterpretation") == "PALETTE COLOR":
                raise UserError("colour slices: a series must be grey")
            values = compact(modality_values(frame, header)[None])[0]
            series = str(dataset.get("SeriesInstanceUID"))
            slices.append(_Slice(values, position, cosines, (right, down), series, metadata(dataset, number)))
    if not slices:
        raise UserError("no slices: the folder holds none of this series")
    return slices
