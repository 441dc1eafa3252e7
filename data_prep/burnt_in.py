"""``medvlm prepare screen-text``: images in which OCR sees text, for review or blanking.

Needs the extra ``ocr``. On X-rays with drawn text the reader found most, not all, of the lines: a screen that makes
review shorter, never a proof that no text is burnt in.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from medvlm.data.shards import ShardReader
from medvlm.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the last ones outside
IMAGES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"])
SIDE_MARKERS = frozenset(
    [
        *(
            "L",
            "R",
            "LT",
            "RT",
            "LEFT",
            "RIGHT",
            "AP",
            "PA",
            "LAT",
            "LATERAL",
            "LL",
            "RL",
            "LLAT",
            "RLAT",
            "OBL",
            "DECUB",
        ),
        *("PORTABLE", "PORT", "MOBILE", "SUPINE", "ERECT", "UPRIGHT", "SEMI", "SEMIERECT", "SEMIUPRIGHT", "SITTING"),
        *(
            "STANDING",
            "PRONE",
            "DECUBITUS",
            "VIEW",
            "CHEST",
            "THORAX",
            "INSP",
            "EXP",
            "INSPIRATION",
            "EXPIRATION",
            "UP",
        ),
        *("BED", "ROOM", "GRID", "NO", "CM", "MM", "KV", "KVP", "MAS", "I", "O", "A", "P", "H", "F"),
    ]
)
LOWEST_SCORE = 0.5


@cache
def _reader() -> Any:
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise UserError(f"rapidocr-onnxruntime: cannot be imported ({error}); pip install 'medvlm[ocr]'") from None
    return RapidOCR()


def is_side_marker(text: str) -> bool:
    """Whether the text consists of side, view and posture markers alone."""
    words = re.findall(r"[A-Za-z]+|\d+", text)
    return bool(words) and all(word.upper() in SIDE_MARKERS for word in words)


def text_boxes(image: "Image") -> list[tuple[Box, str, float]]:
    """(box, text, score) of what OCR reads in an image, without side, view and posture markers.

    Seconds per image. Raises UserError where the extra ``ocr`` is not installed.
    """
    found, _ = _reader()(np.asarray(image.convert("RGB"))[:, :, ::-1])
    boxes = []
    for corners, text, score in found or []:
        xs, ys = [int(x) for x, _ in corners], [int(y) for _, y in corners]
        if float(score) >= LOWEST_SCORE and not is_side_marker(text):
            boxes.append(((min(xs), min(ys), max(xs) + 1, max(ys) + 1), str(text), float(score)))
    return boxes


def blank(image: "Image", boxes: Iterable[Box], margin: int = 4) -> "Image":
    """A copy with the boxes, and a margin in pixels, filled with the darkest value of the image."""
    pixels = np.array(image)
    fill = pixels.reshape(-1, *pixels.shape[2:]).min(axis=0)
    for x0, y0, x1, y1 in boxes:
        pixels[max(0, y0 - margin) : y1 + margin, max(0, x0 - margin) : x1 + margin] = fill
    from PIL import Image

    return Image.fromarray(pixels)


def _images(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the pictures of a shard, a folder of shards, a folder of pictures, or one picture."""
    if source.is_dir() and not any(source.glob("*.tar")):
        files = sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGES)
        if not files:
            raise UserError(f"{source}: holds neither shards nor pictures")
        yield from ((str(p.relative_to(source)), p.read_bytes()) for p in files)
    elif source.suffix.lower() in IMAGES:
        yield source.name, source.read_bytes()
    else:
        reader = ShardReader(source)
        for i in range(len(reader)):
            for image in reader.sample(i).images:
                if f".{image.file.rpartition('.')[2]}" in IMAGES:
                    yield f"{reader.key(i)}.{image.file}", reader.member(i, image.file)


def _eight_bits(image: "Image") -> "Image":
    if not image.mode.startswith("I"):
        return image.convert("L" if image.mode in ("L", "1") else "RGB")
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    span = values.max() - values.min() or 1.0
    return Image.fromarray(np.uint8((values - values.min()) / span * 255))


def screen(source: Path, out: Path, blank_to: Path | None = None) -> dict[str, int]:
    """Write a row per text box (image, box, text, score) to a CSV; optionally blanked copies of the flagged pictures.

    The CSV may hold the burnt-in names themselves: keep it with the originals. Returns counts of images screened,
    flagged, and unreadable; unreadable ones are rows too.
    """
    from PIL import Image
    from rich.console import Console
    from rich.progress import track

    counts = {"screened": 0, "flagged": 0, "unreadable": 0}
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    shown = Console(stderr=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "x0", "y0", "x1", "y1", "text", "score"])
        for name, data in track(_images(source), "reading text", console=shown, disable=not shown.is_terminal):
            try:
                with Image.open(io.BytesIO(data)) as opened:
                    image = _eight_bits(opened)
            except OSError:
                counts["unreadable"] += 1
                writer.writerow([name, "", "", "", "", "unreadable", ""])
                continue
            counts["screened"] += 1
            boxes = text_boxes(image)
            counts["flagged"] += bool(boxes)
            writer.writerows([name, *box, text, f"{score:.2f}"] for box, text, score in boxes)
            if boxes and blank_to is not None:
                target = (blank_to / name).with_suffix(".png")
                target.parent.mkdir(parents=True, exist_ok=True)
                blank(image, [box for box, _, _ in boxes]).save(target)
    return counts


def prepare(
    source: Annotated[Path, typer.Argument(help="Shards (a folder or a tar), or a folder of pictures.")],
    out: Annotated[Path, typer.Option(help="The CSV to write: a row per text box. It may hold names.")],
    blank_to: Annotated[Path | None, typer.Option(help="Also save flagged pictures, text blanked, here (PNG).")] = None,
) -> None:
    """Look for burnt-in text by OCR (extra ``ocr``), side markers left out. It finds most text, not all."""
    counts = screen(source, out, blank_to)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
