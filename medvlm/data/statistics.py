"""``medvlm shards stats``: what a shard set holds, per source and split.

What the index knows is counted over all samples. What only a sample's JSON knows (answer types, label values, views,
original sizes) is counted over at most ``limit`` samples, evenly spaced in each source and split: ``parsed`` says how
many they were.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from medvlm.data.schema import Sample
from medvlm.data.shards import ShardReader

Paths = str | Path | Sequence[str | Path]
Group = tuple[str, str]  # source, split
LIMIT = 20_000  # about two seconds
AT_LEAST = 1000  # of each source and split, so that small ones are seen
QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
LABEL_VALUES = {1: "positive", 0: "negative", -1: "uncertain"}
COUNTED = ("samples", "images", "volumes", "questions", "groups")  # columns of a row that the index knows
PARSED = ("synthetic", "closed", "open", "reports", "no_text", "patients")  # and those that need the JSON


@dataclass
class Statistics:
    """``rows`` are printed, one per source and split; the arrays are what histograms are made of.

    ``values``: per group, of each sample ``characters``, ``turns``, ``images`` and ``tokens`` (where known); of each
    image ``width``, ``height`` and ``depth`` (0 for a picture). ``views`` and ``modalities`` count images of the parsed
    samples, ``originals`` are their original (width, height), the stored size where none is noted.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    values: dict[Group, dict[str, np.ndarray]] = field(default_factory=dict)
    views: dict[Group, Counter[str]] = field(default_factory=dict)
    modalities: dict[Group, Counter[str]] = field(default_factory=dict)
    originals: dict[Group, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(row["samples"] for row in self.rows)

    @property
    def parsed(self) -> int:
        return sum(row["parsed"] for row in self.rows)


def stats(paths: Paths, limit: int | None = LIMIT) -> list[dict[str, Any]]:
    """Counts per source and split. Sizes are in pixels, text in characters per sample, as quantiles over samples.

    ``limit``: of samples whose JSON is read, None for all. Raises UserError for a shard without index or a sample that
    does not follow the schema.
    """
    return collect(paths, limit).rows


def collect(paths: Paths, limit: int | None = LIMIT, tokens: np.ndarray | None = None) -> Statistics:
    """As :func:`stats`, with all that its histograms need. ``tokens``: the length of every sample, if known."""
    reader = ShardReader(paths)
    groups, codes = _groups(reader)
    found = Statistics()
    places = [np.flatnonzero(codes == code) for code in range(len(groups))]
    distinct = pa.table({"code": codes, "group": reader.table["group"]}).group_by("code")
    distinct = distinct.aggregate([("group", "count_distinct")])
    patients = dict(zip(distinct["code"].to_pylist(), distinct["group_count_distinct"].to_pylist(), strict=True))
    columns = {name: reader.column(name) for name in ("characters", "turns")}
    starts, widths = reader.lists("widths")
    columns["images"] = np.diff(starts)
    if tokens is not None:
        columns["tokens"] = np.asarray(tokens)
    of_image = {"width": widths, "height": reader.lists("heights")[1], "depth": reader.lists("depths")[1]}
    image_codes = np.repeat(codes, columns["images"])
    for code, group in enumerate(groups):
        values = {name: column[places[code]] for name, column in columns.items()}
        values |= {name: column[image_codes == code] for name, column in of_image.items()}
        found.values[group] = values
        row: dict[str, Any] = {"source": group[0], "split": group[1], "samples": len(places[code]), "parsed": 0}
        row |= {"images": len(values["width"]), "volumes": int(np.count_nonzero(values["depth"]))}
        row |= {"questions": int(values["turns"].sum()), "groups": patients[code]}
        row |= {**dict.fromkeys(PARSED, 0), "labels": {}}
        row |= {name: quantiles(values[name]) for name in ("width", "height", "characters", "tokens") if name in values}
        found.rows.append(row)
    _parse(reader, groups, codes, _choose(places, limit), found)
    return found


def _groups(reader: ShardReader) -> tuple[list[Group], np.ndarray]:
    """All (source, split), sorted, and which of them each sample belongs to."""
    joined = pc.binary_join_element_wise(reader.table["source"], reader.table["split"], "\t")
    names = joined.combine_chunks().dictionary_encode()
    words = [tuple(name.split("\t")) for name in names.dictionary.to_pylist()]
    order = sorted(range(len(words)), key=words.__getitem__)
    rank = np.empty(len(words), np.int32)
    rank[order] = np.arange(len(words))
    return [words[i] for i in order], rank[names.indices.to_numpy()]  # type: ignore[misc]


def _choose(places: list[np.ndarray], limit: int | None) -> np.ndarray:
    """Sample numbers whose JSON is read: evenly spaced in each group, ascending."""
    total = sum(map(len, places))
    chosen = []
    for numbers in places:
        share = len(numbers) if limit is None else min(len(numbers), max(AT_LEAST, len(numbers) * limit // total))
        chosen.append(numbers[np.linspace(0, len(numbers) - 1, share).astype(np.int64)])
    return np.sort(np.concatenate(chosen))


def _parse(reader: ShardReader, groups: list[Group], codes: np.ndarray, chosen: np.ndarray, found: Statistics) -> None:
    """Fill in what only the JSON knows."""
    for group in groups:
        found.views[group], found.modalities[group], found.originals[group] = Counter(), Counter(), []
    patients: list[set[str]] = [set() for _ in groups]
    hidden = not sys.stderr.isatty() or len(chosen) < 2000
    for i in track(chosen.tolist(), "reading samples", console=Console(stderr=True), transient=True, disable=hidden):
        code, sample = codes[i], reader.sample(i)
        _count(sample, found.rows[code])
        patients[code] |= {sample.patient_id} - {None}
        for image in sample.images:
            found.views[groups[code]][image.view or "not noted"] += 1
            modality = image.metadata.get("modality") or sample.metadata.get("modality") or "not noted"
            found.modalities[groups[code]][str(modality)] += 1
            width, height = (image.original_size or (image.width, image.height))[:2]
            found.originals[groups[code]].append((width, height))
    for row, known in zip(found.rows, patients, strict=True):
        row["patients"] = len(known) if row["parsed"] == row["samples"] else None  # a part cannot tell


def _count(sample: Sample, row: dict[str, Any]) -> None:
    answers = [m for m in sample.messages if m.role == "assistant"]
    row["parsed"] += 1
    row["synthetic"] += sample.synthetic
    row["closed"] += sum(m.answer_type == "closed" for m in answers)
    row["open"] += sum(m.answer_type == "open" for m in answers)
    row["reports"] += sample.has_report
    row["no_text"] += not (sample.messages or sample.has_report)
    for label, value in sample.labels.items():
        if value is not None:
            counts = row["labels"].setdefault(label, dict.fromkeys(LABEL_VALUES.values(), 0))
            counts[LABEL_VALUES[value]] += 1


def quantiles(values: np.ndarray) -> dict[str, int]:
    """Nearest-rank quantiles; empty where there are no values."""
    ordered = np.sort(values)
    last = len(ordered) - 1
    return {name: int(ordered[round(q * last)]) for name, q in QUANTILES.items()} if len(ordered) else {}


def print_stats(rows: list[dict[str, Any]], as_json: bool = False) -> None:
    """Print the rows of `stats` as JSON, or as tables of counts, sizes and (if there are any) labels."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    words = ("source", "split", "label", "of")

    def table(title: str, columns: Iterable[str], lines: Iterable[Iterable[Any]]) -> None:
        grid = Table(title=title, box=SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True)
        for column in columns:
            grid.add_column(column, justify="left" if column in words else "right", overflow="fold")
        for line in lines:
            grid.add_row(*("-" if value is None else str(value) for value in line))
        if grid.row_count:
            Console().print(grid)

    def where(row: dict[str, Any]) -> tuple[str, str]:
        return row["source"], row["split"]

    samples, parsed = (sum(r[name] for r in rows) for name in ("samples", "parsed"))
    some = f" of {parsed} evenly spaced ones of {samples} samples, whose JSON was read" if parsed < samples else ""
    for title, names in (("Counts", COUNTED), (f"Kinds{some}", ("parsed", *PARSED))):
        table(title, ("source", "split", *names), ((*where(r), *(r[c] for c in names)) for r in rows))
    spreads = [(r, name) for r in rows for name in ("width", "height", "characters") if r[name]]
    table(
        "Images in pixels, text in characters per sample",
        ("source", "split", "of", *QUANTILES),
        ((*where(r), name, *r[name].values()) for r, name in spreads),
    )
    labels = [(r, label) for r in rows for label in sorted(r["labels"])]
    table(
        f"Labels{some}",
        ("source", "split", "label", *LABEL_VALUES.values()),
        ((*where(r), label, *r["labels"][label].values()) for r, label in labels),
    )
