"""One :class:`Source` of an archive -> the member that a shard holds, and its record in the sample's json.

Metadata never enters a shard: JPEG and PNG files that are kept lose EXIF, comments, colour profiles and text without
touching a pixel, and of a DICOM header only an allow-list passes (:func:`medvlm.data.dicom.metadata`).
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.items import Source
from medvlm.data.schema import VOLUME_EXTENSION, Image
from medvlm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")  # none that runs a program
OPTIONS = {
    "image": {"keep_16_bit", "frame"},
    "dicom": {"keep_16_bit", "frame", "windows"},
    "series": {"windows", "series_uid"},
    "nifti": {"windows", "slope", "intercept", "volume", "nan_value", "axes", "spacing"},
}


@dataclass(frozen=True)
class PixelOptions:
    """How pictures and volumes are stored.

    ``short_side``: pictures whose shorter side is larger are shrunk to it (about twice the training side; never
    enlarged). ``quality``: of the JPEGs written, 1 to 95. ``keep_16_bit``: grey of more than 8 bits becomes 16-bit PNG
    instead of 8-bit JPEG. ``windows``: (centre, width) pairs in HU, a channel each, for volumes and single CT slices;
    without them volumes keep their values.
    """

    short_side: int | None = None
    quality: int = 95
    keep_16_bit: bool = False
    windows: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise UserError("short_side: must be at least 1 pixel")
        if not 1 <= self.quality <= 95:
            raise UserError("quality: must be from 1 to 95")


def encode_source(source: Source, root: Path, number: int, options: PixelOptions) -> tuple[Image, bytes]:
    """Read one source below ``root``; returns the record of image ``number`` of its sample and the member's bytes.

    Pictures (kinds image, dicom) become ``number.jpg`` or ``.png``, volumes (series, nifti) ``number.b2``. Options of
    the source win over ``options``. Raises UserError whose message is the reason without the path: equal reasons have
    equal words before the colon.
    """
    unknown = set(source.options) - OPTIONS[source.kind]
    if unknown:
        raise UserError(f"unknown option: {', '.join(sorted(unknown))} for kind {source.kind}")
    path = root / source.path
    if not path.exists():
        raise UserError("file not found: no such file")
    extension, fields, data = _KINDS[source.kind](path, dict(source.options), options)
    fields["metadata"] = {**fields.get("metadata", {}), **source.metadata}
    view = source.view or fields["metadata"].get("view_position")
    return Image(file=f"{number}.{extension}", image_id=source.image_id, view=view, **fields), data


Encoded = tuple[str, dict[str, Any], bytes]  # extension, fields of the schema's Image, bytes


def _image(path: Path, choice: dict[str, Any], options: PixelOptions) -> Encoded:
    data = path.read_bytes()
    picture, kept = _open(data, choice.get("frame"))
    deep = picture.mode[0] in "IF" and choice.get("keep_16_bit", options.keep_16_bit)
    extension = "jpg" if picture.format in ("JPEG", "MPO") else "png"
    bits = data[24] if extension == "png" else 8  # of a PNG's samples
    if kept and not _shrinks(picture, options) and (bits, picture.mode) in ((8, "L"), (8, "RGB"), (16 * deep, "I;16")):
        stripped = strip_jpeg(data) if extension == "jpg" else strip_png(data)
        width, height = picture.size
        return extension, {"width": width, "height": height, "original_size": picture.size}, stripped
    if deep:
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UserError("not a 16-bit image: its values do not fit; leave keep_16_bit off")
        return _store(_from_array(values.astype(np.uint16)), None, options)
    from medvlm.data.pixels import plain_image

    return _store(plain_image(picture), None, options)


def _open(data: bytes, frame: int | None) -> tuple["PILImage", bool]:
    """The loaded picture, and whether its file may be kept as it is (a plain JPEG or PNG, upright and opaque)."""
    from PIL import Image as PIL
    from PIL import ImageFile, UnidentifiedImageError

    if not data:
        raise UserError("empty file")
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whoever set it: half a picture must not pass for one
    PIL.init()  # a format is known once its plugin is
    try:
        picture = PIL.open(io.BytesIO(data), formats=FORMATS)
        frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # MPO: a JPEG with previews
        if frames > 1 and frame is None:
            raise UserError(f"several pictures in one file: {frames}; choose one with frame")
        if frame:
            picture.seek(frame)
        picture.load()
        upright = picture.getexif().get(0x0112, 1) == 1
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("unreadable image: not a known image format") from None
    except PIL.DecompressionBombError:
        raise UserError(f"too large an image: more than {2 * (PIL.MAX_IMAGE_PIXELS or 0)} pixels") from None
    except Exception as error:  # each of Pillow's formats has its own for damaged files
        raise UserError(f"unreadable image: {' '.join(str(error).split())}") from error
    plain = upright and frames == 1 and not picture.has_transparency_data
    return picture, plain and picture.format in ("JPEG", "MPO", "PNG")


def _dicom(path: Path, choice: dict[str, Any], options: PixelOptions) -> Encoded:
    from medvlm.data.dicom import picture, read_dicom

    dataset = read_dicom(path.read_bytes())
    windows = choice.get("windows")
    if windows is None and dataset.get("Modality") == "CT":
        windows = options.windows
    if windows is not None and not isinstance(windows, int):
        windows = tuple((float(c), float(w)) for c, w in windows)
    deep = choice.get("keep_16_bit", options.keep_16_bit)
    shown = picture(dataset, choice.get("frame", 0), windows, deep)
    extension, fields, data = _store(_from_array(shown.pixels), shown.spacing, options)
    return extension, {**fields, "windows": shown.windows, "metadata": shown.metadata}, data


def _store(picture: "PILImage", spacing: tuple[float, float] | None, options: PixelOptions) -> Encoded:
    """Shrink and encode a picture of mode L, RGB, or I;16 (which becomes PNG)."""
    from PIL import Image as PIL

    original = picture.size
    if picture.mode == "RGB":
        channels = np.asarray(picture)
        if (channels == channels[..., :1]).all():  # grey that was stored as colour
            picture = PIL.fromarray(np.ascontiguousarray(channels[..., 0]))
    if _shrinks(picture, options):
        scale = (options.short_side or 0) / min(original)
        size = (max(1, round(original[0] * scale)), max(1, round(original[1] * scale)))
        if picture.mode == "I;16":  # Pillow filters 16 bit only as floating point
            floating = PIL.fromarray(np.asarray(picture).astype(np.float32)).resize(size, PIL.Resampling.LANCZOS)
            picture = _from_array(np.rint(np.clip(np.asarray(floating), 0, 65535)).astype(np.uint16))
        else:
            picture = picture.resize(size, PIL.Resampling.LANCZOS)
    out = io.BytesIO()
    if picture.mode == "I;16":
        picture.save(out, "PNG")
    else:
        picture.save(out, "JPEG", quality=options.quality, subsampling=0, optimize=True)
    width, height = picture.size
    fields: dict[str, Any] = {"width": width, "height": height, "original_size": original}
    if spacing is not None:
        fields["spacing"] = (spacing[0] * original[0] / width, spacing[1] * original[1] / height)
    return "png" if picture.mode == "I;16" else "jpg", fields, out.getvalue()


def _shrinks(picture: "PILImage", options: PixelOptions) -> bool:
    return options.short_side is not None and min(picture.size) > options.short_side


def _from_array(pixels: np.ndarray) -> "PILImage":
    from PIL import Image as PIL

    return PIL.fromarray(np.ascontiguousarray(pixels))


def _series(path: Path, choice: dict[str, Any], options: PixelOptions) -> Encoded:
    from medvlm.data.series import read_series

    volume = read_series(path, choice.get("series_uid"))
    is_ct = volume.metadata.get("modality") == "CT"
    return _volume(volume, choice.get("windows", options.windows if is_ct else None))


def _nifti(path: Path, choice: dict[str, Any], options: PixelOptions) -> Encoded:
    from medvlm.data.nifti import read_nifti

    windows = choice.pop("windows", options.windows)
    return _volume(read_nifti(path, **choice), windows)


def _volume(volume: Any, windows: Any) -> Encoded:
    from medvlm.data.volumes import encode_volume, window

    depth, height, width = volume.array.shape
    fields = {"width": width, "height": height, "depth": depth, "original_size": (width, height, depth)}
    pairs = [(float(c), float(w)) for c, w in windows] if windows is not None else None
    data = encode_volume(volume.array if pairs is None else window(volume.array, pairs))
    return VOLUME_EXTENSION, {**fields, "spacing": volume.spacing, "windows": pairs, "metadata": volume.metadata}, data


_KINDS: dict[str, Callable[[Path, dict[str, Any], PixelOptions], Encoded]] = {
    "image": _image,
    "dicom": _dicom,
    "series": _series,
    "nifti": _nifti,
}


def strip_jpeg(data: bytes) -> bytes:
    """A JPEG without APPn and COM segments and without what follows its end; not a pixel changes.

    A bare JFIF header and Adobe's segment stay, for they say which colours the components are. Raises UserError where
    the segments are damaged.
    """
    out, at = bytearray(b"\xff\xd8"), 2
    while data[at : at + 2] not in (b"\xff\xd9", b""):
        marker, length = data[at + 1 : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == b"\xff":  # a fill byte
            at += 1
            continue
        segment = data[at : at + 2 + length]
        if data[at] != 0xFF or length < 2 or len(segment) < 2 + length:
            raise UserError("unreadable image: damaged JPEG segments")
        at += 2 + length
        if marker == b"\xda":  # a scan: its entropy-coded bytes run to the next marker that is no restart
            end = _MARKER.search(data, at)
            out += segment + data[at : end.start() if end else len(data)]
            at = end.start() if end else len(data)
        elif marker == b"\xe0" and segment[4:9] == b"JFIF\0":
            out += b"\xff\xe0\x00\x10" + segment[4:16] + b"\0\0"  # no thumbnail
        elif marker == b"\xee" and segment[4:9] == b"Adobe":
            out += b"\xff\xee\x00\x0e" + segment[4:16]
        elif not (b"\xe0" <= marker <= b"\xef" or marker == b"\xfe"):
            out += segment
    return bytes(out + b"\xff\xd9")


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")


def strip_png(data: bytes) -> bytes:
    """A PNG of its critical chunks alone (IHDR, PLTE, IDAT, IEND); not a pixel changes."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            out += data[at:end]
        if data[at + 4 : at + 8] == b"IEND":
            break
        at = end
    return bytes(out)
