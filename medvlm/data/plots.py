"""Histograms of what `medvlm shards stats` counts."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from medvlm.data.page import INK, inked, require
from medvlm.data.statistics import LABEL_VALUES, Group, Statistics

MOST_GROUPS = 8  # of source and split, in colours of their own; the others are drawn together
MOST_BARS = 16
MOST_LABELS = 20
BINS = 40
COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#a0a0a0")
LABEL_COLORS = {"positive": "#d1495b", "negative": "#8d99ae", "uncertain": "#edae49"}


@dataclass(frozen=True)
class Histogram:
    """``counts`` per group: of values in [edges[i], edges[i + 1]), the last closed; or of each of ``names``."""

    title: str
    counts: dict[str, np.ndarray]
    edges: np.ndarray | None = None
    names: list[str] | None = None


def histograms(found: Statistics) -> list[Histogram]:
    """Text length, turns and images of all samples; views and modalities of the parsed ones."""
    groups = _gather(found)
    some = f", {found.parsed} of {found.samples} samples" if found.parsed < found.samples else ""
    lengths = {"characters": "characters of text per sample", "tokens": "tokens per sample"}
    known = [name for name in lengths if all(name in values for values in found.values.values())]
    drawn = [_length_histogram(lengths[name], name, found, groups) for name in known]
    for name, title in (("turns", "answers per sample"), ("images", "images per sample")):
        if any(values[name].any() for values in found.values.values()):
            drawn.append(_count_histogram(title, name, found, groups))
    for title, counters in (("view of images", found.views), ("modality of images", found.modalities)):
        names = [name for name, _ in sum(counters.values(), Counter()).most_common(MOST_BARS)]
        if names and names != ["not noted"]:
            counts = {
                g: np.array([sum(counters[m][n] for m in members) for n in names]) for g, members in groups.items()
            }
            drawn.append(Histogram(title + some, counts, names=names))
    return drawn


def _gather(found: Statistics) -> dict[str, list[Group]]:
    """Name -> the groups drawn under it: the largest alone, the rest together."""
    sizes = {(row["source"], row["split"]): row["samples"] for row in found.rows}
    largest = sorted(sizes, key=lambda g: -sizes[g])
    alone = largest if len(largest) <= MOST_GROUPS + 1 else largest[:MOST_GROUPS]
    rest = sorted(sizes.keys() - set(alone))
    groups = {" ".join(g).strip() or "not noted": [g] for g in sorted(alone)}
    return {**groups, **({f"{len(rest)} others": rest} if rest else {})}


def _length_histogram(title: str, name: str, found: Statistics, groups: Mapping[str, list[Group]]) -> Histogram:
    """Bins of whole numbers that widen in proportion."""
    most = max(int(values[name].max(initial=1)) for values in found.values.values())
    edges = np.unique(np.append(0, np.geomspace(1, most + 1, BINS).round())).astype(np.int64)
    counts = {
        g: sum((np.histogram(found.values[m][name], edges)[0] for m in members), np.zeros(len(edges) - 1, np.int64))
        for g, members in groups.items()
    }
    return Histogram(title, counts, edges=edges)


def _count_histogram(title: str, name: str, found: Statistics, groups: Mapping[str, list[Group]]) -> Histogram:
    """A bar per number; those from `MOST_BARS` on share the last."""
    most = min(MOST_BARS, max(int(values[name].max(initial=0)) for values in found.values.values()))
    counts = {
        g: sum(
            (np.bincount(np.minimum(found.values[m][name], most), minlength=most + 1) for m in members),
            np.zeros(most + 1, np.int64),
        )
        for g, members in groups.items()
    }
    names = [*map(str, range(most)), f"{most}+" if most == MOST_BARS else str(most)]
    return Histogram(title, counts, names=names)


def label_counts(found: Statistics) -> dict[str, dict[str, dict[str, int]]]:
    """Split -> label -> value -> samples, over all sources; labels by their number of positives, most first."""
    splits: dict[str, dict[str, dict[str, int]]] = {}
    for row in found.rows:
        for label, counts in row["labels"].items():
            into = splits.setdefault(row["split"], {}).setdefault(label, dict.fromkeys(LABEL_VALUES.values(), 0))
            for value, count in counts.items():
                into[value] += count
    return {s: dict(sorted(ls.items(), key=lambda i: (-i[1]["positive"], i[0]))) for s, ls in sorted(splits.items())}


def draw_stats(found: Statistics) -> Any:
    """All histograms of a shard set as one figure."""
    require("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels = label_counts(found)
    some = f"\n{found.parsed} of {found.samples} samples" if found.parsed < found.samples else ""
    panels: list[Callable[[Any], None]] = [partial(_draw_histogram, histogram=h) for h in histograms(found)]
    panels += [partial(_draw_labels, title=f"labels, {s}{some}", labels=labels[s]) for s in labels]
    stored = _tally(np.concatenate([np.stack([v["width"], v["height"]], 1) for v in found.values.values()]))
    originals = _tally(np.array([size for sizes in found.originals.values() for size in sizes]).reshape(-1, 2))
    if len(stored[0]):
        panels.append(partial(_draw_sizes, title="stored size of images", tally=stored))
    if len(originals[0]) and not np.array_equal(originals[0], stored[0]):
        panels.append(partial(_draw_sizes, title=f"original size of images{some}", tally=originals))
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(13, 0.6 + 3.9 * rows), layout="constrained")
    for n, draw in enumerate(panels):
        draw(inked(figure.add_subplot(rows, 2, n + 1)))
    colors = {group: COLORS[n] for n, group in enumerate(_gather(found))} | (LABEL_COLORS if labels else {})
    swatches = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=swatches, loc="outside upper center", ncols=6, fontsize=9, labelcolor=INK, framealpha=0)
    return figure


def _draw_histogram(axes: Any, histogram: Histogram) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    groups = list(histogram.counts)
    for n, counts in enumerate(histogram.counts.values()):
        color = COLORS[n]
        if histogram.edges is not None:
            axes.stairs(counts, np.maximum(histogram.edges, 0.5), color=color, linewidth=1.4)
        else:
            width = 0.84 / len(groups)
            places = np.arange(len(counts)) + (n - (len(groups) - 1) / 2) * width
            axes.bar(places, counts, width, color=color)
    if histogram.edges is not None:
        filled = np.flatnonzero(sum(histogram.counts.values()))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=0.9 * max(0.5, histogram.edges[filled[0]]) if len(filled) else None)
    else:
        names = [name if len(name) <= 18 else name[:17] + "\u2026" for name in histogram.names or []]
        axes.set_xticks(range(len(names)), names, rotation=30 if sum(map(len, names)) > 60 else 0)
    axes.set_yscale("symlog", linthresh=1)  # small splits beside large ones; an empty bin is 0
    axes.set_ylim(bottom=0)
    for axis in (axes.yaxis, *([axes.xaxis] if histogram.edges is not None else [])):
        axis.set_major_formatter("{x:,.0f}")
    axes.set_title(histogram.title, fontsize=11)


def _draw_labels(axes: Any, title: str, labels: Mapping[str, Mapping[str, int]]) -> None:
    names = list(labels)[:MOST_LABELS]
    left = np.zeros(len(names))
    for value, color in LABEL_COLORS.items():
        counts = np.array([labels[name][value] for name in names])
        axes.barh(names, counts, left=left, color=color)
        left += counts
    axes.invert_yaxis()
    hidden = f" (the {MOST_LABELS} most frequent of {len(labels)})" if len(labels) > MOST_LABELS else ""
    axes.set_title(title + hidden, fontsize=11)
    axes.tick_params(axis="y", labelsize=8)


def _tally(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different (width, height) among [n, 2], and how often each occurs."""
    codes, counts = np.unique(sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1].astype(np.int64), return_counts=True)
    return np.stack([codes >> 32, codes & 0xFFFFFFFF], 1), counts


def _draw_sizes(axes: Any, title: str, tally: tuple[np.ndarray, np.ndarray]) -> None:
    """A disc per size, its area by how many images have it; sizes are binned where there are very many."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    unique, counts = tally
    images = counts.sum()
    if len(unique) > 400:
        logs = (np.log2(np.maximum(unique, 1)) * 8).round() / 8
        unique, inverse = np.unique(2**logs, axis=0, return_inverse=True)
        counts = np.bincount(inverse.ravel(), weights=counts).astype(np.int64)
    axes.scatter(*unique.T, s=12 + 500 * counts / counts.max(), color=COLORS[0], alpha=0.45, edgecolors=COLORS[0])
    for size, count in sorted(zip(unique.tolist(), counts.tolist(), strict=True), key=lambda p: -p[1])[:3]:
        words = f"{size[0]:.0f}x{size[1]:.0f}: {count}"
        axes.annotate(words, size, (0, 9), textcoords="offset points", fontsize=8, color=INK, ha="center")
    for axis, values in ((axes.xaxis, unique[:, 0]), (axes.yaxis, unique[:, 1])):
        low, high = max(1, values.min()) / 1.3, max(1, values.max()) * 1.3
        axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
        ticks = [2.0**n for n in range(20) if low <= 2**n <= high]
        axis.set_ticks(ticks if len(ticks) > 1 else sorted({float(values.min()), float(values.max())}))
    axes.set_xlabel("width")
    axes.set_ylabel("height")
    axes.set_title(f"{title}: {images}", fontsize=11)
