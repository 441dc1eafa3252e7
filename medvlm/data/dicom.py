"""DICOM file -> the picture a reader would see, the values of its modality, and an allow-list of its header.

The grey pipeline is that of PS3.3 C.11: modality LUT or rescale, VOI LUT or window, MONOCHROME1 inversion. Overlays
(groups 60xx) are never drawn. Every UserError here is a reason without the file's name: the caller knows that, and
counts equal reasons by the words before the colon.
"""

import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from medvlm.data.dicom_codes import CODES
from medvlm.data.pixels import stretch, to_8_bit
from medvlm.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

Window = tuple[float, float]  # centre, width in modality units (HU for CT)

# One decoder per compressed transfer syntax, named: lossy decoders differ in the last bit, and a shard must not depend
# on what happens to be installed. pylibjpeg-libjpeg is GPL and is never used: JPEG is read by gdcm.
_GDCM = ("gdcm", "python-gdcm")
_OPENJPEG = ("pylibjpeg", "pylibjpeg pylibjpeg-openjpeg")
_CHARLS = ("pyjpegls", "pyjpegls")
DECODERS = {
    "1.2.840.10008.1.2.4.50": _GDCM,  # JPEG baseline
    "1.2.840.10008.1.2.4.51": _GDCM,  # JPEG extended, 8 or 12 bits
    "1.2.840.10008.1.2.4.57": _GDCM,  # JPEG lossless
    "1.2.840.10008.1.2.4.70": _GDCM,  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": _CHARLS,  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81": _CHARLS,  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.90": _OPENJPEG,  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91": _OPENJPEG,  # JPEG 2000
    "1.2.840.10008.1.2.4.201": _OPENJPEG,  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202": _OPENJPEG,  # HTJ2K lossless, RPCL
    "1.2.840.10008.1.2.4.203": _OPENJPEG,  # HTJ2K
    "1.2.840.10008.1.2.5": ("pylibjpeg", "pylibjpeg pylibjpeg-rle"),  # RLE
}
_JPEG_EXTENDED, _JPEG_LOSSLESS = "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57"


@dataclass(frozen=True)
class Picture:
    """``pixels``: uint8 [H, W] or [H, W, 3], or uint16 [H, W] where 16 bit were asked. ``windows`` are those applied,
    one per channel; ``metadata`` is :func:`metadata`, with ``value_slope`` and ``value_intercept`` for 16 bit."""

    pixels: np.ndarray
    windows: list[Window] | None
    spacing: tuple[float, float] | None
    metadata: dict[str, Any] = field(default_factory=dict)


def read_dicom(data: bytes) -> "Dataset":
    """Parse a file's bytes. Raises UserError unless it is DICOM of the file format (PS3.10) with pixels."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    if not data:
        raise UserError("empty file")
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        if "TransferSyntaxUID" not in dataset.file_meta:
            raise ValueError("it names no transfer syntax")
        if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise ValueError("it holds no pixel data")
    except InvalidDicomError:
        raise UserError("unreadable DICOM: no DICOM prefix at byte 128 (PS3.10)") from None
    except Exception as error:  # pydicom raises whatever it likes on damaged files
        raise UserError(f"unreadable DICOM: {_one_line(error)}") from error
    return dataset


def stored_pixels(dataset: "Dataset", frame: int | None = None) -> np.ndarray:
    """Decoded values before any rescale: [H, W] or [H, W, 3] (YBR already as RGB), with a first axis of frames where
    ``frame`` is None and there are several. Native byte order. Raises UserError naming the package that is missing."""
    from pydicom.pixels import get_decoder, pixel_array

    try:
        syntax = dataset.file_meta.TransferSyntaxUID
        plugin, packages = DECODERS.get(syntax, ("", ""))
        if plugin and plugin not in get_decoder(syntax).available_plugins:
            raise UserError(f"missing decoder: {syntax.name} needs `pip install 'medvlm[prep]'` ({packages})")
        options: dict[str, Any] = {"decoding_plugin": plugin, "index": frame}
        if syntax == _JPEG_EXTENDED and int(dataset.BitsStored) > 8:
            pixels = _jpeg_12_bit(dataset, options)
        else:
            pixels = pixel_array(dataset, **options)
    except UserError:
        raise
    except Exception as error:  # pydicom and its decoders raise whatever they like on damaged files
        raise UserError(f"unreadable DICOM: {_one_line(error)}") from error
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _jpeg_12_bit(dataset: "Dataset", options: dict[str, Any]) -> np.ndarray:
    """gdcm decodes 12-bit JPEG, but pydicom lets it only under the name of another JPEG process.

    Checks what gdcm's libjpeg merely warns of: a sequential scan must span all 64 coefficients (T.81 B.2.3).
    """
    from pydicom.encaps import generate_frames
    from pydicom.pixels import pixel_array
    from pydicom.uid import UID

    for stream in generate_frames(dataset.PixelData, number_of_frames=frame_count(dataset)):
        scan = stream.find(b"\xff\xda")
        header = stream[scan + 2 : scan + 2 + int.from_bytes(stream[scan + 2 : scan + 4], "big")]
        if stream.find(b"\xff\xc1", 0, scan) > 0 and header[-3:] != b"\x00\x3f\x00":
            raise ValueError("a JPEG scan header is damaged")
    try:
        dataset.file_meta.TransferSyntaxUID = UID(_JPEG_LOSSLESS)
        return pixel_array(dataset, **options)
    finally:
        dataset.file_meta.TransferSyntaxUID = UID(_JPEG_EXTENDED)


def frame_count(dataset: "Dataset") -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def frame_header(dataset: "Dataset", frame: int) -> "Dataset":
    """A copy of the header in which the functional groups of one frame (enhanced multi-frame) lie at the top level:
    rescale, window, position, orientation, spacing and side. The file's own per-frame values win over shared ones."""
    from pydicom import Dataset

    header = Dataset()
    header.file_meta = dataset.file_meta  # palettes need its byte order
    header.update({tag: element for tag, element in dataset._dict.items() if tag.group < 0x6000})
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    for groups in (*shared, *list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]):
        for name, keywords in _FRAME_GROUPS.items():
            for item in list(groups.get(name) or [])[:1]:
                header.update({item[keyword].tag: item[keyword] for keyword in keywords if keyword in item})
    return header


_FRAME_GROUPS = {
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "FrameAnatomySequence": ("FrameLaterality",),
}


def modality_values(pixels: np.ndarray, header: "Dataset") -> np.ndarray:
    """Stored values -> modality units (HU for CT) by the modality LUT, or slope and intercept, or the dose scaling."""
    from pydicom.pixels import apply_modality_lut

    if header.get("DoseGridScaling"):
        return pixels * float(header.DoseGridScaling)
    return apply_modality_lut(pixels, header)


def picture(
    data: "bytes | Dataset",
    frame: int = 0,
    windows: "tuple[Window, ...] | int | None" = None,
    keep_16_bit: bool = False,
) -> Picture:
    """One frame as a picture.

    ``windows``: None takes the file's VOI LUT, else its first window, else the range from the lowest to the highest
    value that is not padding (8-bit files without a window keep their values); an int chooses one of the file's own
    windows; one or three (centre, width) pairs in modality units give grey or three channels, by the LINEAR_EXACT
    formula. Padding is black.

    ``keep_16_bit`` returns grey of more than 8 bits as uint16, unwindowed and lossless: the modality LUT's output, else
    the stored values (plus 2^(BitsStored-1) if signed), MONOCHROME1 inverted; the metadata's ``value_slope`` and
    ``value_intercept`` lead back to modality units. Raises UserError with the reason.
    """
    dataset = read_dicom(data) if isinstance(data, bytes) else data
    if not 0 <= frame < frame_count(dataset):
        raise UserError(f"no such frame: frame {frame} of {frame_count(dataset)}")
    try:
        header = frame_header(dataset, frame)
        found = metadata(dataset, frame)
        pixels = stored_pixels(dataset, frame if frame_count(dataset) > 1 else None)
        if pixels.ndim == 3 or header.get("PhotometricInterpretation") == "PALETTE COLOR":
            return Picture(_colour(pixels, header), None, spacing(header), found)
        if keep_16_bit and 8 < int(header.BitsStored) <= 16:
            deep, slope, intercept = _deep(pixels, header)
            return Picture(deep, None, spacing(header), {**found, "value_slope": slope, "value_intercept": intercept})
        shown, applied = _windowed(pixels, header, windows)
        return Picture(shown, applied, spacing(header), found)
    except UserError:
        raise
    except Exception as error:  # a header may break any rule of the standard
        raise UserError(f"unreadable DICOM: {_one_line(error)}") from error


def _colour(pixels: np.ndarray, header: "Dataset") -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    if header.PhotometricInterpretation == "PALETTE COLOR":
        entries, first, bits = header.RedPaletteColorLookupTableDescriptor
        first = first - 2**16 if first > 2**15 and header.get("PixelRepresentation") else first
        table = apply_color_lut(np.arange(entries or 2**16, dtype=np.int32) + first, header)
        # tables declared 16-bit may hold 8-bit entries: then not one of them exceeds 255
        shift = 8 if bits == 16 and table.max() > 255 else 0
        return (apply_color_lut(pixels, header) >> shift).astype(np.uint8)
    top = 2 ** int(header.BitsStored) - 1
    return pixels if pixels.dtype == np.uint8 and top == 255 else to_8_bit(pixels / top)


def _deep(pixels: np.ndarray, header: "Dataset") -> tuple[np.ndarray, float, float]:
    """uint16 values and the slope and intercept from them to modality units."""
    bits, offset, slope, intercept = int(header.BitsStored), 0, 1.0, 0.0
    if header.get("ModalityLUTSequence"):
        bits = int(header.ModalityLUTSequence[0].LUTDescriptor[2])
        pixels = modality_values(pixels, header)
    else:
        offset = 2 ** (bits - 1) if header.PixelRepresentation else 0
        slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
    values = pixels.astype(np.int32) + offset
    if header.PhotometricInterpretation == "MONOCHROME1":  # v = top - (stored + offset)
        top = 2**bits - 1
        return (top - values).astype(np.uint16), -slope, slope * (top - offset) + intercept
    return values.astype(np.uint16), slope, intercept - slope * offset


def _windowed(
    pixels: np.ndarray, header: "Dataset", windows: "tuple[Window, ...] | int | None"
) -> tuple[np.ndarray, list[Window] | None]:
    """Stored grey values [H, W] -> uint8 [H, W] or [H, W, 3], and the windows that were applied."""
    valid = ~_padding(pixels, header)
    values = modality_values(pixels, header)
    applied: list[Window] | None = None
    if isinstance(windows, tuple):
        if len(windows) not in (1, 3):
            raise UserError("windows: a DICOM picture takes one window (grey) or three (one per colour channel)")
        applied = list(windows)
        shown = _channels(values, applied)
    elif windows is None and header.get("VOILUTSequence"):
        from pydicom.pixels import apply_voi

        shown = apply_voi(np.rint(values).astype(np.int32), header) / _top_of_table(header.VOILUTSequence[0])
    else:
        own = _own_windows(header)
        if windows is not None and windows >= len(own):
            raise UserError(f"no such window: window {windows} of {len(own)}")
        if own:
            applied = [own[windows or 0]]
            shown = _apply_window(values, *applied[0], str(header.get("VOILUTFunction") or "LINEAR").upper())
        elif int(header.get("BitsStored", 0)) == 8 and values.dtype == np.uint8:
            shown = values / 255
        else:
            shown = stretch(values, valid)
    if header.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    shown = to_8_bit(shown)
    shown[~valid] = 0
    return shown, applied


def _top_of_table(lut: "Dataset") -> int:
    """The value that is white: of the bits that are declared, or, as some makers declare 16 for a table of 12, of those
    that its largest value needs."""
    declared = int(lut.LUTDescriptor[2])
    if declared == 16:
        data = lut.LUTData
        table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data)
        declared = max(8, int(table.max()).bit_length())
    return 2**declared - 1


def _channels(values: np.ndarray, windows: list[Window]) -> np.ndarray:
    shown = [_apply_window(values, *window, "LINEAR_EXACT") for window in windows]
    return shown[0] if len(shown) == 1 else np.stack(shown, axis=-1)


def _own_windows(header: "Dataset") -> list[Window]:
    centers, widths = (_numbers(header.get(name)) for name in ("WindowCenter", "WindowWidth"))
    return [(c, w) for c, w in zip(centers, widths, strict=False) if w > 0]


def _apply_window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """PS3.3 C.11.2.1.2 (LINEAR) and C.11.2.1.3 (LINEAR_EXACT, SIGMOID), to [0, 1]."""
    x = values.astype(np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (x - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
        if width <= 0:  # a width of 1 is a threshold
            return (x > center).astype(np.float64)
    elif function != "LINEAR_EXACT":
        raise UserError("unreadable DICOM: its VOI LUT function is unknown")
    return np.clip((x - center) / width + 0.5, 0, 1)


def _padding(pixels: np.ndarray, header: "Dataset") -> np.ndarray:
    """Where stored values are padding (PS3.3 C.7.5.1.1.2), a value or a range."""
    low = header.get("PixelPaddingValue")
    if low is None or low == "":
        return np.zeros(pixels.shape, bool)
    limit = header.get("PixelPaddingRangeLimit")
    low, high = sorted((int(low), int(low if limit is None or limit == "" else limit)))
    return (pixels >= low) & (pixels <= high)


def _numbers(value: Any) -> list[float]:
    if value is None or value == "":
        return []
    return [float(v) for v in value] if hasattr(value, "__len__") and not isinstance(value, str) else [float(value)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


OLDEST = 90  # years; greater ages identify


def metadata(dataset: "Dataset", frame: int = 0) -> dict[str, Any]:
    """What of a header may enter a shard, absent where the file does not say.

    The codes of ``CODES``; ``patient_age`` in years, capped at 90; ``bits_stored``; ``frames`` and ``frame`` of a
    multi-frame file; ``orientation``, the patient directions [x, y] that the picture's columns and rows grow towards
    (L, R, A, P, H, F); ``spacing_at`` "detector" where the spacing is not that in the patient; ``slice_thickness`` in
    mm; ``lossy``; ``overlays``, the number of overlay planes left out; ``burnt_in`` True where the file says that it
    has text burnt in, or is an ultrasound screen (it then lists ``ultrasound_regions`` as [x0, y0, x1, y1] in pixels
    of the original: what lies outside is usually text). Files that claim no burnt-in text may have it all the same.
    """
    header = frame_header(dataset, frame)
    found: dict[str, Any] = {}
    for name, (keywords, allowed) in CODES.items():
        values = [str(header.get(keyword) or "").strip().upper() for keyword in keywords]
        found[name] = next((value for value in values if value in allowed.split()), None)
    if header.get("PhotometricInterpretation") == "PALETTE COLOR":
        found["photometric_interpretation"] = "PALETTE COLOR"
    age = re.fullmatch(r"(\d{3})([DWMY])", str(header.get("PatientAge") or ""))
    if age:
        found["patient_age"] = min(OLDEST, int(int(age[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[age[2]]))
    found["bits_stored"] = int(header.get("BitsStored") or 0) or None
    if frame_count(dataset) > 1:
        found |= {"frames": frame_count(dataset), "frame": frame}
    found["orientation"] = _orientation(header)
    at_detector = _numbers(header.get("ImagerPixelSpacing"))
    if at_detector and _numbers(header.get("PixelSpacing")) in ([], at_detector):  # equal: not calibrated
        found["spacing_at"] = "detector"
    found["slice_thickness"] = next((v for v in _numbers(header.get("SliceThickness")) if np.isfinite(v)), None)
    found["lossy"] = True if str(header.get("LossyImageCompression") or "") == "01" else None
    found["overlays"] = len({tag.group for tag in dataset._dict if tag.group in range(0x6000, 0x6020, 2)}) or None
    regions = list(header.get("SequenceOfUltrasoundRegions") or [])
    found["burnt_in"] = True if regions or str(header.get("BurnedInAnnotation") or "") == "YES" else None
    corners = ("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1")
    found["ultrasound_regions"] = [[int(region.get(c) or 0) for c in corners] for region in regions] or None
    return {name: value for name, value in found.items() if value is not None}


def spacing(header: "Dataset") -> tuple[float, float] | None:
    """(x, y) in mm: PixelSpacing, else that at the detector. DICOM itself writes rows (y) first."""
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        values = _numbers(header.get(name))
        if len(values) == 2 and all(np.isfinite(values)) and min(values) > 0:
            return values[1], values[0]
    return None


def _orientation(header: "Dataset") -> list[str] | None:
    cosines = _numbers(header.get("ImageOrientationPatient"))
    if len(cosines) == 6:
        axes = np.abs(cosines).reshape(2, 3).argmax(axis=1)
        return [("RL", "AP", "FH")[i][cosines[3 * n + i] > 0] for n, i in enumerate(axes)]
    words = header.get("PatientOrientation") or ()
    letters = [str(word) for word in words] if not isinstance(words, str) else []
    return letters if len(letters) == 2 and all(re.fullmatch("[LRAPHF]{1,3}", word) for word in letters) else None
