"""The layout of packs as a picture: what lies in each row that the model is fed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medvlm.data.page import INK, inked, require
from medvlm.errors import UserError

COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f")
SUPERVISED = "#1f9d55"


@dataclass(frozen=True)
class PackedSample:
    """``supervised``: its supervised tokens, None where they were not counted. ``text_tokens`` are without images'."""

    key: str
    text_tokens: int
    image_tokens: int
    supervised: int | None = None


def draw_packs(packs: Sequence[Sequence[PackedSample]], capacity: int, first: int = 0) -> Any:
    """A bar per pack as a matplotlib figure: a segment per sample, image tokens hatched, the rest of the row empty.

    Beside each bar: how full it is, its samples, and the share of its tokens that is supervised. Packs are numbered
    from ``first``. Raises UserError where there is none.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    if not packs:
        raise UserError("packs: there is none to draw")
    figure = Figure(figsize=(13, 1.4 + 0.42 * len(packs)), layout="constrained")
    axes = inked(figure.add_subplot())
    for y, pack in enumerate(packs):
        start = 0
        for n, sample in enumerate(pack):
            color = COLORS[n % len(COLORS)]
            options: dict[str, Any] = {"height": 0.78, "linewidth": 0}
            axes.barh(y, sample.image_tokens, left=start, color=color, hatch="////", edgecolor="#00000070", **options)
            axes.barh(y, sample.text_tokens, left=start + sample.image_tokens, color=color, alpha=0.65, **options)
            size = sample.image_tokens + sample.text_tokens
            supervised = sample.supervised or 0
            axes.barh(y + 0.45, supervised, left=start + size - supervised, height=0.08, color=SUPERVISED, linewidth=0)
            if size * 130 / capacity > len(sample.key) + 1:
                box = {"boxstyle": "round,pad=0.15", "facecolor": "#ffffffb0", "linewidth": 0}
                place = {"ha": "center", "va": "center", "fontsize": 7, "clip_on": True, "parse_math": False}
                axes.text(start + size / 2, y, sample.key, color="#000000", bbox=box, **place)
            start += size
            axes.plot([start, start], [y - 0.39, y + 0.39], color=INK, linewidth=0.8)
        axes.text(
            1.01 * max(capacity, start), y, _pack_words(pack, start, capacity), fontsize=8, va="center", color=INK
        )
    axes.axvline(capacity, color=INK, linewidth=1, linestyle=":")
    total = sum(s.text_tokens + s.image_tokens for pack in packs for s in pack)
    axes.set_title(f"{len(packs)} packs of {capacity} tokens, {total / (len(packs) * capacity):.1%} full", fontsize=11)
    axes.set_yticks(range(len(packs)), [f"pack {first + n}" for n in range(len(packs))], fontsize=8)
    axes.set_ylim(len(packs) - 0.4, -0.6)
    axes.set_xlabel("tokens; hatched: image tokens; line below: supervised tokens")
    return figure


def _pack_words(pack: Sequence[PackedSample], tokens: int, capacity: int) -> str:
    words = f"{tokens / capacity:.1%}, {len(pack)} sample{'s' * (len(pack) != 1)}"
    counted = [s.supervised for s in pack if s.supervised is not None]
    if pack and len(counted) == len(pack):
        words += f", {sum(counted) / max(tokens, 1):.0%} supervised"
    return words + (f", {tokens - capacity} too many" if tokens > capacity else "")
