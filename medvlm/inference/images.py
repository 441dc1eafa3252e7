"""A file on disk -> the picture a reader would see: PNG, JPEG or DICOM as 8-bit grey ("L") or colour ("RGB")."""

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from medvlm.data.pixels import plain_image
from medvlm.errors import UserError


def load_image(path: str | Path) -> Image.Image:
    """Decode one image file; of a multi-frame DICOM the first frame.

    Raises UserError naming the file if it is absent or cannot be decoded.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if data[128:132] != b"DICM" and path.suffix.lower() not in (".dcm", ".dicom"):
        return decode_image(data, str(path))
    from medvlm.data.dicom import picture

    try:
        return Image.fromarray(picture(data).pixels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load_images(path: Path, slices: int, window: tuple[float, float] | None) -> list[Image.Image]:
    """The picture of an image file, or evenly spaced axial slices of a volume (NIfTI, or the folder of a series)."""
    nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    if not nifti and not path.is_dir():
        return [load_image(path)]
    from medvlm.data.nifti import read_nifti
    from medvlm.data.series import read_series
    from medvlm.data.volume_slices import VolumeSlices

    try:
        volume = read_nifti(path) if nifti else read_series(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return [Image.fromarray(plane[..., 0]) for plane in VolumeSlices(slices, window).cut(volume, str(path))]


def decode_image(data: bytes, where: str) -> Image.Image:
    """Encoded PNG or JPEG bytes -> mode "L" or "RGB", upright (see :func:`medvlm.data.pixels.plain_image`).

    Raises UserError naming ``where``.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return plain_image(image)
    except UnidentifiedImageError:
        raise UserError(f"{where}: image cannot be decoded (not a known image format)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: image cannot be decoded ({error})") from error
