"""Draws the cards of `medvlm.data.pictures` as one page: HTML without outside resources, or PNG."""

import base64
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvlm.data.inspect import find
from medvlm.data.page import html_page, output_format, require
from medvlm.data.pictures import Card, Picture, Piece, look
from medvlm.data.shards import ShardReader

LABEL_SIGNS = {1: ("+", "positive"), 0: ("\u2212", "negative"), -1: ("?", "uncertain")}
BOX_COLORS = ("#ff9f1c", "#2ec4ff", "#7ae582", "#ff6bd6", "#ffe14d")
CARDS = """
<p class="legend"><mark>supervised token</mark> <i>other token</i> <i class="im">image tokens</i>
<span class="label positive">+ positive</span> <span class="label negative">&minus; negative</span>
<span class="label uncertain">? uncertain</span> {{ legend }}</p>
{% for card in cards %}
<article id="s{{ card.number }}"{% if card.reason %} class="quarantined"{% endif %}>
<h2>{{ card.key }} <small>number {{ card.number }}{% if card.counts %} &middot; {{ card.counts.tokens }} tokens:
{{ card.counts.image }} image, {{ card.counts.supervised }} supervised{% endif %}</small></h2>
{% if card.reason %}<p class="reason">{{ card.fate }}: {{ card.reason }}</p>{% endif %}
<div class="row">{% if card.pictures %}<div class="pictures">
{% for picture in card.pictures %}<figure>{{ svg(picture) }}
<figcaption>{{ picture.caption }}</figcaption></figure>{% endfor %}
</div>{% endif %}<div class="text">
{% if card.pieces %}<pre>{% for p in card.pieces %}{{ piece(p) }}{% endfor %}</pre>{% endif %}
{% if card.turns %}<dl class="turns">
{% for role, text in card.turns %}<dt>{{ role }}</dt><dd>{{ text }}</dd>{% endfor %}
</dl>{% endif %}
{% if card.labels %}<p>{% for name, value in card.labels.items() %}
<span class="label {{ signs[value][1] }}">{{ signs[value][0] }} {{ name }}</span>{% endfor %}</p>{% endif %}
<p class="facts">{% for name, value in card.facts %}<span><b>{{ name }}</b> {{ value }}</span> {% endfor %}</p>
</div></div></article>
{% endfor %}
"""


def contact_sheet(
    reader: ShardReader,
    out: Path,
    title: str,
    *,
    start: str | int = 0,
    count: int = 24,
    encoder: Any = None,
    epoch: int | None = 0,
    legend: str = "",
) -> list[Card]:
    """Draw ``count`` samples from ``start`` (a key or number) on, as a `SampleEncoder` gives them to the model, or as
    stored. Raises UserError for an unknown ``start``, an ending that is neither .html nor .png, or a missing library.
    """
    output_format(out)
    first = find(reader, start)
    cards = [look(reader, n, encoder, epoch) for n in range(first, min(first + count, len(reader)))]
    write_sheet(cards, out, title, legend)
    return cards


def write_sheet(cards: Sequence[Card], out: Path, title: str, legend: str = "") -> Path:
    """Write the page to ``out``, .html or .png. Raises UserError for another ending or a library that is missing."""
    if output_format(out) == "png":
        from medvlm.data.contact_sheet_png import DPI, draw_sheet

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draw_sheet(cards, f"{title}  {legend}".rstrip()).savefig(out, dpi=DPI)
        if any("missing from font" in str(w.message) for w in caught):
            print(f"{out}: some characters are not in the font of the PNG and show as boxes; .html shows them")
    else:
        out.write_text(sheet_html(cards, title, legend), encoding="utf-8")
    return out


def sheet_html(cards: Sequence[Card], title: str, legend: str = "") -> str:
    """A page in which everything is escaped, and each token is a ``<mark>`` (supervised) or an ``<i>``.

    ``data-n`` is the number of tokens of an element that holds more than one.
    """
    jinja2 = require("jinja2")
    template = jinja2.Environment(autoescape=True).from_string(CARDS)
    body = template.render(cards=cards, legend=legend, signs=LABEL_SIGNS, svg=_svg, piece=_piece)
    return html_page(title, body)


def _piece(piece: Piece) -> Any:
    from markupsafe import Markup

    count = Markup(' data-n="{}"').format(piece.tokens) if piece.tokens > 1 else ""
    if piece.image:
        return Markup('<i class="im"{}>&lt;image&gt; x {}</i>').format(count, piece.tokens)
    tag = "mark" if piece.supervised else "i"
    return Markup(f"<{tag}{{}}>{{}}</{tag}>").format(count, visible(piece.text))


def visible(text: str) -> str:
    """A token's text with a sign for a line break, and for no text at all: it is a token nevertheless."""
    return text.replace("\n", "\u21b5\n") or "\u2205"


def _svg(picture: Picture) -> Any:
    from markupsafe import Markup, escape
    from PIL import Image as PILImage

    height, width = picture.pixels.shape[:2]
    buffer = io.BytesIO()
    PILImage.fromarray(picture.pixels).save(buffer, "png")
    shown = width * max(1, round(256 / width)) if width < 512 else min(width, 768)  # small pictures in whole multiples
    unit = width / shown  # of the screen, in pixels of the picture
    parts = [
        Markup('<svg viewBox="0 0 {0} {1}" style="width:{2}px;aspect-ratio:{0}/{1}">').format(width, height, shown),
        Markup('<image width="{}" height="{}" href="data:image/png;base64,{}"/>').format(
            width, height, base64.b64encode(buffer.getvalue()).decode()
        ),
    ]
    for n, (label, corners) in enumerate(picture.boxes):
        color = BOX_COLORS[n % len(BOX_COLORS)]
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in corners)
        x, y = label_place(label, corners, picture, 12 * unit)
        values = points, color, 1.5 * unit
        parts.append(Markup('<polygon points="{}" stroke="{}" stroke-width="{:.3f}"/>').format(*values))
        place = Markup('<text x="{:.2f}" y="{:.2f}" fill="{}" font-size="{:.2f}">').format(x, y, color, 12 * unit)
        parts += [place, escape(label), Markup("</text>")]
    return Markup("").join([*parts, Markup("</svg>")])


def label_place(label: str, corners: np.ndarray, picture: Picture, size: float) -> tuple[float, float]:
    """Where a box's label begins, on its base line, in letters ``size`` tall: above the box where there is room."""
    height, width = picture.pixels.shape[:2]
    x, top = corners.min(axis=0)
    y = top - 0.2 * size if top > 1.2 * size else top + size
    return float(np.clip(x, 0, max(0, width - 0.6 * size * len(label)))), float(np.clip(y, size, height - 0.2 * size))
