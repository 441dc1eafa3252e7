"""The contact sheet as one PNG: a matplotlib axes in units of pixels, text in a fixed-width font."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from medvlm.data.contact_sheet import BOX_COLORS, LABEL_SIGNS, label_place, visible
from medvlm.data.page import require
from medvlm.data.pictures import Card, Picture, Piece
from medvlm.errors import UserError

DPI, WIDTH, MARGIN, LINE, CHARACTER = 100, 1500, 16, 17, 8  # pixels
FONT = CHARACTER / 0.602 * 72 / DPI  # points, so that DejaVu Sans Mono advances by whole pixels, as hinting makes it
MOST_LINES = 60  # of a conversation
PICTURE = 320  # the longest side
MAX_HEIGHT = 60_000
Line = list[tuple[str, str]]  # (text, kind): supervised, image, other, title, reason, positive, ...
COLORS = {
    "supervised": ("#06402b", "#b7f0cf"),
    "image": ("#2b2b60", "#d6d6ff"),
    "other": ("#222222", None),
    "title": ("#000000", None),
    "faint": ("#666666", None),
    "reason": ("#8b0000", "#ffdada"),
    "positive": ("#7a1f00", "#ffd9c7"),
    "negative": ("#333333", "#e4e4e4"),
    "uncertain": ("#5a4b00", "#fff0b3"),
}


def draw_sheet(cards: Sequence[Card], title: str) -> Any:
    """The page as a matplotlib figure. Raises UserError where it would be too tall for a PNG."""
    require("matplotlib")
    from matplotlib.figure import Figure

    blocks = [_block(card) for card in cards]
    height = 3 * MARGIN + 2 * LINE + sum(block[2] + MARGIN for block in blocks)
    if height > MAX_HEIGHT:
        raise UserError(f"--out: {len(cards)} samples make a PNG of {height} pixels; use .html, or a smaller --count")
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    axes.axis("off")
    _write(axes, MARGIN, MARGIN, [[(title, "title")]])
    legend = [
        ("supervised tokens", "supervised"),
        (" ", "other"),
        ("image tokens", "image"),
        (" other tokens", "other"),
    ]
    _write(axes, MARGIN, MARGIN + LINE, [legend])
    y: float = 2 * MARGIN + 2 * LINE
    for card, (lines, width, tall) in zip(cards, blocks, strict=True):
        axes.plot([MARGIN, WIDTH - MARGIN], [y - MARGIN / 2] * 2, color="#cccccc", linewidth=0.8)
        top = y
        for picture in card.pictures:
            top += _place(axes, picture, top, int(width / CHARACTER))
        _write(axes, 2 * MARGIN + width, y, lines)
        y += tall + MARGIN
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    return figure


def _place(axes: Any, picture: Picture, top: float, columns: int) -> float:
    """Draw a picture with its boxes and caption; returns their height and that of a space below."""
    from matplotlib.transforms import Bbox, TransformedBbox

    w, h = _shown(picture)
    extent = (MARGIN, MARGIN + w, top + h, top)
    axes.imshow(picture.pixels, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
    factor = w / picture.pixels.shape[1]
    frame = TransformedBbox(Bbox.from_extents(MARGIN, top, MARGIN + w, top + h), axes.transData)
    for n, (label, corners) in enumerate(picture.boxes):
        color = BOX_COLORS[n % len(BOX_COLORS)]
        outline = axes.fill(*(np.array([MARGIN, top]) + corners * factor).T, fill=False, color=color, linewidth=1.2)
        x, base = label_place(label, corners, picture, 12 / factor)
        words = axes.text(MARGIN + x * factor, top + base * factor, label, color=color, fontsize=FONT, parse_math=False)
        for artist in (*outline, words):
            artist.set_clip_box(frame)
            artist.set_clip_on(True)
    caption = list(_wrap([(picture.caption, "faint")], columns))
    _write(axes, MARGIN, top + h, caption)
    return h + (1 + len(caption)) * LINE


def _shown(picture: Picture) -> tuple[float, float]:
    """Width and height of a picture on the PNG."""
    height, width = picture.pixels.shape[:2]
    side = PICTURE if width < 2 * height else 2.4 * PICTURE  # a strip of slices may be wider
    factor = side / max(height, width)
    return width * factor, height * factor


def _block(card: Card) -> tuple[list[Line], float, float]:
    """The lines beside a card's pictures, the width of the pictures, and the height of the whole."""
    sizes = [_shown(picture) for picture in card.pictures]
    width = max([PICTURE, *(w for w, _ in sizes)])
    columns = int((WIDTH - 3 * MARGIN - width) / CHARACTER)
    counts = "".join(f"  {value} {name}" for name, value in card.counts.items())
    lines = list(_wrap([(card.key, "title"), (f"  number {card.number}{counts}", "faint")], columns))
    if card.reason:
        lines += _wrap([(f"{card.fate}: {card.reason}", "reason")], columns)
    runs = [(f"<image> x {p.tokens}" if p.image else visible(p.text), _kind(p)) for p in card.pieces]
    for role, text in card.turns:
        runs += [(f"{role}: ", "faint"), (f"{text}\n", "other")]
    body = list(_wrap(runs, columns))
    if len(body) > MOST_LINES:
        body[MOST_LINES:] = [[(f"... and {len(body) - MOST_LINES} more lines; HTML shows all", "faint")]]
    lines += [[], *body, []]
    labels: Line = []
    for name, value in card.labels.items():
        labels += [(f"{LABEL_SIGNS[value][0]} {name}", LABEL_SIGNS[value][1]), ("  ", "other")]
    lines += _wrap(labels, columns)
    lines += _wrap([("  ".join(f"{n}={v}" for n, v in card.facts), "faint")], columns)
    return lines, width, max(len(lines) * LINE, sum(h + 3 * LINE for _, h in sizes))


def _kind(piece: Piece) -> str:
    return "image" if piece.image else "supervised" if piece.supervised else "other"


def _wrap(runs: Line, columns: int) -> Iterator[Line]:
    """Runs broken at line breaks, and before the words that would pass ``columns`` characters."""
    line: Line = []
    room = columns
    for text, kind in runs:
        for word in re.findall(r"\n|[^\S\n]*\S+|[^\S\n]+", text):
            if word == "\n" or room < len(word) <= columns:
                yield line
                line, room, word = [], columns, word.lstrip(" ")
            while word != "\n" and word:
                if not room:
                    yield line
                    line, room = [], columns
                line.append((word[:room], kind))
                word, room = word[room:], room - len(word[:room])
    if line:
        yield line


def _write(axes: Any, x: float, y: float, lines: Sequence[Line]) -> None:
    for n, line in enumerate(lines):
        column = 0
        for text, kind in _merged(line):
            color, ground = COLORS[kind]
            left, top = x + column * CHARACTER, y + n * LINE
            if ground:
                axes.fill_between([left, left + len(text) * CHARACTER], top, top + LINE - 2, color=ground, linewidth=0)
            weight = "bold" if kind == "title" else "normal"
            axes.text(
                left,
                top + LINE * 0.75,
                text,
                color=color,
                fontsize=FONT,
                family="DejaVu Sans Mono",
                weight=weight,
                parse_math=False,
            )
            column += len(text)


def _merged(line: Line) -> Line:
    """Neighbours of one kind as one: a text object is slow to draw."""
    merged: Line = []
    for text, kind in line:
        if merged and merged[-1][1] == kind:
            merged[-1] = (merged[-1][0] + text, kind)
        else:
            merged.append((text, kind))
    return merged
