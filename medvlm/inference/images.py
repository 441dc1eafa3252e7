"""A file on disk -> the picture a reader would see: PNG, JPEG or DICOM as 8-bit grey ("L") or colour ("RGB")."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

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
    if data[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom"):
        return _dicom(data, path)
    return decode_image(data, str(path))


def decode_image(data: bytes, where: str) -> Image.Image:
    """Encoded PNG or JPEG bytes -> mode "L" or "RGB". Raises UserError naming ``where``.

    More than 8 bits of grey are stretched from the image's own lowest to its highest value: a 16-bit file often holds
    10 to 14 bits of signal and does not say how many, and Pillow's own conversion clips everything above 255.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode[0] in "IF":  # "I", "I;16", "I;16B", "F"
                return _to_grey(_stretch(np.asarray(image, dtype=np.float64)))
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except UnidentifiedImageError:
        raise UserError(f"{where}: image cannot be decoded (not a known image format)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: image cannot be decoded ({error})") from error


def _dicom(data: bytes, path: Path) -> Image.Image:
    """The grey pipeline of DICOM PS3.3 C.11 (modality LUT, VOI LUT or window, MONOCHROME1), or colour as RGB."""
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        if "PixelData" not in dataset:
            raise ValueError("it holds no pixel data")
        pixels = pixel_array(dataset, index=0)  # YBR becomes RGB here
        _lift_functional_groups(dataset)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
            # 16-bit tables may hold 8-bit entries in either byte, by their writer's or by their reader's byte order
            return Image.fromarray((pixels >> 8 if pixels.max() > 255 else pixels).astype(np.uint8))
        if pixels.ndim == 3:
            top = 2 ** int(dataset.BitsStored) - 1
            return Image.fromarray(np.rint(pixels * (255 / top)).astype(np.uint8))
        padding = dataset.get("PixelPaddingValue")
        shown = _window(apply_modality_lut(pixels, dataset), dataset, pixels != padding)
        return _to_grey(1 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown)
    except Exception as error:  # pydicom and its decoders raise whatever they like on damaged files
        reason = " ".join(str(error).split())
        if "plugins are missing" in reason:
            reason = "its compression needs `pip install 'medvlm[prep]'`"
        raise UserError(f"{path}: DICOM image cannot be decoded ({reason})") from error


def _lift_functional_groups(dataset) -> None:
    """Enhanced multi-frame files keep rescale and window per frame: lift the first frame's to the top level."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in list(dataset.get(groups) or [])[:1]:
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in list(group.get(name) or [])[:1]:
                    for element in item:
                        dataset[element.tag] = element


def _window(values: np.ndarray, dataset, valid: np.ndarray) -> np.ndarray:
    """Values in modality units [H, W] -> [0, 1] by the file's VOI LUT, else its first window (PS3.3 C.11.2.1.2).

    Without either: from the lowest to the highest value that is not padding.
    """
    from pydicom.pixels import apply_voi

    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return apply_voi(np.rint(values).astype(np.int32), dataset) / (2**bits - 1)
    x = values.astype(np.float64)
    center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if center is None or width is None or width <= 0:
        return _stretch(x, valid)
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (x - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-6)
    return np.clip((x - center) / width + 0.5, 0, 1)


def _first(value) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)


def _stretch(x: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Lowest valid value -> 0, highest -> 1; a constant image is black."""
    inside = x if valid is None or not valid.any() else x[valid]
    low, high = float(inside.min()), float(inside.max())
    return np.clip((x - low) / ((high - low) or 1.0), 0, 1)


def _to_grey(unit: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(unit * 255).astype(np.uint8))
