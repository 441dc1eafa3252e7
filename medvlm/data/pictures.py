"""What the model sees of a sample: pixels after the transform, boxes on them, the conversation token by token.

``medvlm.data.contact_sheet`` draws it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from medvlm.data.conversation import IGNORE, ConversationEncoder
from medvlm.data.pair_text import TextEncoder
from medvlm.data.schema import VOLUME_EXTENSION, Box, Image, Sample, TextPart
from medvlm.data.shards import ShardReader
from medvlm.errors import LeftOut, UserError

SLICES = 8  # of a volume, in its strip
STORED_SIDE = 512  # stored pictures are shrunk to this, longer side, for the sheet
STRIP_SIDE = 192  # a slice's longer side


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens that decode to ``text``: one, or several that make up one character; or an image's."""

    text: str
    tokens: int
    supervised: bool = False
    image: bool = False


@dataclass(frozen=True)
class Picture:
    """uint8 [h, w] or [h, w, 3], and boxes as (label, four corners (x, y)) in pixels of it."""

    pixels: np.ndarray
    caption: str
    boxes: list[tuple[str, np.ndarray]] = field(default_factory=list)


@dataclass
class Card:
    """One sample of a contact sheet. ``reason``: why training would quarantine it, or leave it out. ``counts`` need an
    encoder.

    ``pieces`` is the conversation as the model reads it; without an encoder, or where the sample is quarantined,
    ``turns`` is what is stored, as (role or section, text).
    """

    number: int
    key: str
    reason: str | None = None
    left_out: bool = False
    facts: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def fate(self) -> str:
        return "left out" if self.left_out else "quarantined"


def look(reader: ShardReader, number: int, encoder: Any = None, epoch: int | None = None) -> Card:
    """The card of one sample, through a `SampleEncoder` or `PairEncoder` (shuffled and augmented as in an epoch), or as
    stored.

    A sample that cannot be read or encoded gives a card with the reason, never an exception.
    """
    card = Card(number, reader.key(number))
    try:
        sample = reader.sample(number)
    except UserError as error:
        card.reason = str(error)
        return card
    card.facts = _facts(sample)
    card.labels = {name: value for name, value in sample.labels.items() if value is not None}
    try:
        data = [reader.member(number, image.file) for image in sample.images]
    except UserError as error:
        card.reason, card.turns = str(error), _turns(sample)
        return card
    if encoder is not None:
        try:
            encoded = encoder(sample, data, epoch)
        except UserError as error:
            card.reason, card.left_out = str(error), isinstance(error, LeftOut)
        else:
            ids = encoded.ids or []
            card.pieces = pieces(encoder.tokens, ids, encoded.labels)
            images = sum(p.tokens for p in card.pieces if p.image)
            supervised = sum(p.tokens for p in card.pieces if p.supervised)
            card.counts = {"tokens": len(ids), "image": images, "supervised": supervised}
            for i, tensor in encoded.seen:
                image = sample.images[i]
                matrix = placement(encoder, sample.key, i, (image.width, image.height), epoch)
                boxes = [(b.label, moved(b, matrix)) for b in sample.boxes if b.image == i]
                pixels = tensor.permute(1, 2, 0).numpy()
                pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
                card.pictures.append(Picture(pixels, _caption(image, pixels), boxes))
            return card
    card.turns = _turns(sample)
    for i, (image, content) in enumerate(zip(sample.images, data, strict=True)):
        try:
            card.pictures += _stored(image, content, [b for b in sample.boxes if b.image == i])
        except UserError as error:
            card.reason = card.reason or f"image {image.file}: {error}"
    return card


def pieces(conversation: ConversationEncoder | TextEncoder, ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
    """The text of each token. Tokens of one image are one piece; so are bytes that only together are a character."""
    found: list[Piece] = []
    rows = [(i, label != IGNORE, i == conversation.image_id) for i, label in zip(ids, labels, strict=True)]
    before: list[int] = []  # sentencepiece drops the space before a text's first token: decode with the one before
    for (supervised, image), run in groupby(rows, key=lambda row: row[1:]):
        tokens = [row[0] for row in run]
        if image:
            size = conversation.image_tokens
            found += [Piece("<image>", min(size, len(tokens) - n), image=True) for n in range(0, len(tokens), size)]
            before = [tokens[-1]]
            continue
        waiting: list[int] = []
        for place, token in enumerate(tokens, start=1):
            waiting.append(token)
            text = _decode(conversation.tokenizer, before, waiting)
            if not text.endswith("\ufffd") or place == len(tokens):
                found.append(Piece(text, len(waiting), supervised))
                before, waiting = waiting, []
    return found


def _decode(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(before + tokens, **options)[len(tokenizer.decode(before, **options)) :]


def placement(encoder: Any, key: str, number: int, size: tuple[int, int], epoch: int | None) -> np.ndarray:
    """3 x 3: from pixels of a stored image of ``size`` (width, height) to pixels of what the model sees.

    Coordinates are continuous: 0 is the left (upper) edge of the first pixel.
    """
    transform = encoder.transform
    target = transform._target(*size)
    edges = [0.0, 0.0]  # of the stored image, in what is resized
    sides = list(map(float, size))
    if transform.fill is not None:  # padded to a square, whole pixels on each side
        edges = [float((max(size) - side) // 2) for side in size]
        sides = [float(max(size))] * 2
    scale = [target[i] / sides[i] for i in range(2)]
    crop = [(target[i] - transform.crop[i]) // 2 if transform.crop else 0 for i in range(2)]
    matrix = np.diag([*scale, 1.0])
    matrix[:2, 2] = [edges[i] * scale[i] - crop[i] for i in range(2)]
    if encoder.augment and epoch is not None:
        seen = transform.crop or target
        matrix = _augmented(encoder.augment, key, number, epoch, encoder.seed, seen) @ matrix
    return matrix


def _augmented(augment: Any, key: str, number: int, epoch: int, seed: int, size: tuple[int, int]) -> np.ndarray:
    """3 x 3: where an augmentation moves pixels, measured on a picture whose grey levels are its coordinates."""
    import torch

    geometry = replace(augment, brightness=0.0, contrast=0.0, gamma=0.0, blur=0.0, noise=0.0, gain=0.0)
    if not geometry.active:
        return np.eye(3)
    y, x = np.mgrid[: size[1], : size[0]] + 0.5
    ramps = np.stack([x / size[0] * 254, y / size[1] * 254, np.full_like(x, 254)])
    out = geometry(torch.from_numpy(np.rint(ramps).astype(np.uint8)), key, number, epoch, seed).numpy().astype(float)
    inside = out[2] == 254  # what moved in from outside is black
    came = np.stack([out[0] * size[0] / 254, out[1] * size[1] / 254], -1)[inside]
    went = np.stack([x[inside], y[inside], np.ones(inside.sum())], -1)
    inverse, *_ = np.linalg.lstsq(went, came, rcond=None)
    return np.linalg.inv(np.vstack([inverse.T, [0, 0, 1]]))


def moved(box: Box, matrix: np.ndarray) -> np.ndarray:
    """The corners [4, 2] of a box after a 3 x 3 map."""
    x0, y0, x1, y1 = box.xyxy
    corners = np.array([[x0, y0, 1], [x1, y0, 1], [x1, y1, 1], [x0, y1, 1]], float)
    return (corners @ matrix.T)[:, :2]


def _stored(image: Image, data: bytes, boxes: Iterable[Box]) -> list[Picture]:
    """Stored pixels, shrunk where they are large; a volume as a strip of evenly spaced slices (boxes on none)."""
    if image.file.endswith(VOLUME_EXTENSION):
        return [Picture(strip(data, image), _caption(image, None))]
    import io

    from PIL import Image as PILImage

    from medvlm.data.pixels import plain_image

    try:
        with PILImage.open(io.BytesIO(data)) as file:
            file.load()
            picture = plain_image(file)
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        raise UserError(f"does not decode ({error})") from None
    factor = min(1.0, STORED_SIDE / max(picture.size))
    matrix = np.diag([factor, factor, 1.0])
    if factor < 1:
        picture = picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))))
    return [Picture(np.asarray(picture), _caption(image, None), [(b.label, moved(b, matrix)) for b in boxes])]


def strip(data: bytes, image: Image) -> np.ndarray:
    """uint8 [h, n w(, 3)]: at most `SLICES` slices of a volume, side by side, from the first to the last.

    Three windows show as red, green and blue, one or two as the first in grey. Values without a window are spread from
    their 0.5th to their 99.5th percentile.
    """
    from PIL import Image as PILImage

    from medvlm.data.volumes import read_subvolume, volume_shape

    shape = volume_shape(data)
    lead = (slice(None),) * (len(shape) - 3)
    places = np.unique(np.linspace(0, shape[-3] - 1, min(SLICES, shape[-3])).round().astype(int)).tolist()
    slices = np.stack([read_subvolume(data, (*lead, slice(z, z + 1)))[..., 0, :, :] for z in places])
    if slices.ndim == 4:  # [n, C, H, W]
        slices = np.moveaxis(slices, 1, -1) if slices.shape[1] == 3 else slices[:, 0]
    if slices.dtype != np.uint8:
        low, high = np.percentile(slices, [0.5, 99.5])
        slices = np.rint(255 * np.clip((slices - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)
    factor = min(1.0, STRIP_SIDE / max(shape[-2:]))
    size = max(1, round(shape[-1] * factor)), max(1, round(shape[-2] * factor))
    return np.concatenate([np.asarray(PILImage.fromarray(s).resize(size)) for s in slices], axis=1)


def _caption(image: Image, seen: np.ndarray | None) -> str:
    """For example "PA, 2048x2500 > stored 672x820 > 224x224, 0.14 x 0.14 mm"."""

    def size(values: Iterable[float]) -> str:
        return "x".join(f"{v:g}" for v in values)

    stored = (image.width, image.height) + ((image.depth,) if image.depth else ())
    steps = [f"stored {size(stored)}"]
    if image.original_size and image.original_size != stored:
        steps.insert(0, size(image.original_size))
    if seen is not None:
        steps.append(f"seen {seen.shape[1]}x{seen.shape[0]}{' grey' if seen.ndim == 2 else ''}")
    words = [image.file, image.view or "", " > ".join(steps)]
    if image.spacing:
        words.append(f"{' x '.join(f'{v:.3g}' for v in image.spacing)} mm")
    if image.windows:
        words.append("window " + ", ".join(f"{c:g}/{w:g}" for c, w in image.windows))
    return ", ".join(word for word in words if word)


def _facts(sample: Sample) -> list[tuple[str, str]]:
    values = sample.model_dump(include={"source", "split", "license", "patient_id", "study_id"}, exclude_none=True)
    facts = {**values, **({"synthetic": "yes"} if sample.synthetic else {}), **sample.metadata}
    return [(str(name), str(value)) for name, value in facts.items()]


def _turns(sample: Sample) -> list[tuple[str, str]]:
    turns: list[tuple[str, str]] = []
    for message in sample.messages:
        parts = [part.text if isinstance(part, TextPart) else "<image>" for part in message.content]
        turns.append((message.role, " ".join(parts)))
    return turns or list(sample.report.items())
