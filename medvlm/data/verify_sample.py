"""One sample for `medvlm shards verify`: its members against the index, its JSON, and its pixels."""

import io
import json
import os
import zlib
from typing import Any

from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from medvlm.data.schema import IMAGE_EXTENSIONS, VOLUME_EXTENSION, Image, Sample, parse_sample
from medvlm.errors import UserError

SLAB = 16  # slices of a volume that are decoded at once: memory does not grow with the depth


def check_sample(descriptor: int, row: dict[str, Any]) -> tuple[list[str], Sample | None, int]:
    """Reasons why one sample is broken, the sample if its JSON is sound, and how many images and volumes were decoded
    or tried. ``row`` is its row of the index, ``descriptor`` the open tar."""
    reasons: list[str] = []
    data: dict[str, bytes] = {}
    for name, offset, size, crc in zip(row["members"], row["offsets"], row["sizes"], row["crc32"], strict=True):
        content = os.pread(descriptor, size, offset)
        if name in data:
            reasons.append(f"member {name!r} occurs twice under this key")
        if len(content) < size:
            reasons.append(f"member {name!r} is cut off after {len(content)} of {size} bytes")
        elif zlib.crc32(content) != crc:
            reasons.append(f"member {name!r} fails its crc32")
        else:
            data.setdefault(name, content)
    sample, wrong = _check_json(data, row)
    reasons += wrong
    images = {image.file: image for image in sample.images} if sample else {}
    for name in sorted(images.keys() - set(row["members"])):
        reasons.append(f"the JSON names image {name!r} but the shard has no such member")
    count = 0
    for name, content in data.items():
        kind = name.rpartition(".")[2]
        if kind not in (*IMAGE_EXTENSIONS, VOLUME_EXTENSION):
            continue
        count += 1
        try:
            shape = _volume_shape(content) if kind == VOLUME_EXTENSION else _picture_shape(content)
        except UserError as error:
            reasons.append(f"image {name!r} does not decode ({error})")
            continue
        if sample and name not in images:
            reasons.append(f"image {name!r} is not named in the JSON")
        elif sample:
            reasons += [f"image {name!r} {reason}" for reason in _check_shape(images[name], shape)]
    return reasons, sample, count


def _picture_shape(data: bytes) -> tuple[int, ...]:
    """(H, W) of a picture that decodes whole."""
    try:
        with PILImage.open(io.BytesIO(data)) as image:
            image.load()
            return image.size[::-1]
    except UnidentifiedImageError:
        raise UserError("not a known image format") from None
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise UserError(str(error)) from None


def _volume_shape(data: bytes) -> tuple[int, ...]:
    """(D, H, W), or (C, D, H, W) where windows are channels, of a volume that decodes whole."""
    from medvlm.data.volumes import read_subvolume, volume_shape

    shape = volume_shape(data)
    if len(shape) not in (3, 4):
        raise UserError(f"{len(shape)} dimensions, not [D, H, W] or [C, D, H, W]")
    for z in range(0, shape[-3], SLAB):
        read_subvolume(data, (slice(None),) * (len(shape) - 3) + (slice(z, z + SLAB),))
    return shape


def _check_shape(image: Image, shape: tuple[int, ...]) -> list[str]:
    """What the JSON says of an image against the pixels, [H, W], [D, H, W] or [C, D, H, W]."""
    reasons = []
    said = (image.width, image.height) + ((image.depth,) if image.depth is not None else ())
    real = shape[-3:][::-1]
    if said != real:
        reasons.append(f"is {'x'.join(map(str, real))}, the JSON says {'x'.join(map(str, said))}")
    for name in ("original_size", "spacing"):
        values = getattr(image, name)
        if values is not None and len(values) != len(real):
            reasons.append(f"has {len(real)} dimensions, the JSON's {name} {len(values)}")
    if len(shape) == 4 and len(image.windows or ()) != shape[0]:
        reasons.append(f"has {shape[0]} channel(s), the JSON names {len(image.windows or ())} window(s)")
    return reasons


def _check_json(data: dict[str, bytes], row: dict[str, Any]) -> tuple[Sample | None, list[str]]:
    if "json" not in data:
        return None, [] if "json" in row["members"] else ["has no .json member"]
    try:
        sample = parse_sample(data["json"], "json")
    except UserError as error:
        return None, [str(error) + _foreign(data["json"])]
    reasons = []
    if sample.key != row["key"]:
        reasons.append(f"json: key {sample.key!r} differs from the member's name")
    values: dict[str, Any] = {name: getattr(sample, name) for name in ("source", "split", "group")}
    values |= {"widths": [i.width for i in sample.images], "heights": [i.height for i in sample.images]}
    values["depths"] = [i.depth or 0 for i in sample.images]
    for column, value in values.items():
        if row[column] != value:
            reasons.append(f"the index has {column} {row[column]!r}, the JSON {value!r}; index again")
    return sample, reasons


def _foreign(data: bytes) -> str:
    try:
        record = json.loads(data)
    except ValueError:
        return ""
    if isinstance(record, dict) and "conversations" in record:
        return " (LLaVA's layout, with 'conversations'; docs/data-format.md shows how to convert)"
    return ""
