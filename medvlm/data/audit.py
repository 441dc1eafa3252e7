"""``medvlm shards audit``: what in a shard set could harm a patient or a score.

Text and metadata that look like PHI; patients, studies and images in several splits; near-duplicate images and texts
across splits and against other shards (a benchmark's test set); labels, licences, and what the index cannot know.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medvlm.data import duplicates
from medvlm.data.phi import scan
from medvlm.data.schema import DEIDENTIFICATION_MASK, IMAGE_EXTENSIONS, Sample
from medvlm.data.shards import ShardReader
from medvlm.errors import UserError

AGAINST = "against"  # the split of the shards that are compared with
EXAMPLES = 20  # of each kind in the report
# Keys of metadata that hold a person, place, number, day or UID, whatever the value looks like.
PERSONAL_KEY = re.compile(
    r"patient_?(name|id|birth|address|phone|mother)|birth_?(date|name)|accession|\bmrn\b|medical_?record|physician|operator"
    r"|institution|station_?name|telephone|phone|e-?mail|ssn|serial_?number|(study|series|acquisition|content)_?(date|time)"
    r"|instance_?uid|series_?uid|study_?uid|requesting|performed_?by|(referring|reading)",
    re.IGNORECASE,
)
RESTRICTED = re.compile(r"\bnc\b|non-?commercial|\bnd\b|no-?deriv|research|credential|duo|restricted", re.IGNORECASE)
UNKNOWN_LICENSES = frozenset(["", "unknown", "other", "none", "n/a", "unspecified", "see source"])


@dataclass(slots=True)
class Facts:
    """What is kept of a sample: names, counts and hashes, no text and no pixels."""

    number: int
    key: str = ""
    error: str = ""
    split: str = ""
    source: str = ""
    license: str = ""
    group: str = ""
    study: str | None = None
    synthetic: bool = False
    labels: dict[str, int | None] = field(default_factory=dict)
    phi: list[tuple[str, str]] = field(default_factory=list)  # (kind, field)
    personal_keys: list[str] = field(default_factory=list)
    masks: int = 0
    burnt_in: int = 0
    digests: list[bytes] = field(default_factory=list)  # of the bytes of each image
    image_hashes: list[bytes] = field(default_factory=list)  # phash256; absent for volumes
    unreadable: int = 0
    text_hash: bytes | None = None


def gather(reader: ShardReader, number: int, near: bool) -> Facts:
    """Read one sample and keep its facts."""
    facts = Facts(number, key=reader.key(number))
    try:
        sample, images = reader.load(number)
    except UserError as error:
        facts.error = str(error)
        return facts
    facts.split, facts.source, facts.license, facts.group = sample.split, sample.source, sample.license, sample.group
    facts.study, facts.synthetic = sample.study_id, sample.synthetic
    facts.labels = {name: value for name, value in sample.labels.items() if value is not None}
    texts = {f"messages.{n}": message.text for n, message in enumerate(sample.messages)}
    texts |= {f"report.{name}": text for name, text in sample.report.items()}
    for name, value in _metadata(sample):
        if PERSONAL_KEY.search(name.rpartition(".")[2]):
            facts.personal_keys.append(name)
        if isinstance(value, str):
            texts[name] = value
    if not sample.synthetic:  # the people in generated text do not exist
        facts.phi = [(finding.kind, name) for name, text in texts.items() for finding in scan(text)]
    facts.masks = sum(DEIDENTIFICATION_MASK in text for name, text in texts.items() if name.startswith("report."))
    facts.burnt_in = sum(bool(image.metadata.get("burnt_in")) for image in sample.images)
    facts.digests = [hashlib.blake2b(data, digest_size=16).digest() for data in images]
    if near:
        _near_hashes(facts, sample, images)
    return facts


def _near_hashes(facts: Facts, sample: Sample, images: list[bytes]) -> None:
    from PIL import Image

    for image, data in zip(sample.images, images, strict=True):
        if image.file.rpartition(".")[2] not in IMAGE_EXTENSIONS:
            continue
        try:
            with Image.open(io.BytesIO(data)) as picture:
                picture.draft("L", (256, 256))  # a JPEG is decoded at reduced scale
                facts.image_hashes.append(duplicates.image_hash(picture).tobytes())
        except OSError:
            facts.unreadable += 1
    answers = [m.text for m in sample.messages if m.role == "assistant"]
    sketch = duplicates.text_hash(" ".join(sample.report.values()) or " ".join(answers))
    facts.text_hash = None if sketch is None else sketch.tobytes()


def _metadata(sample: Sample) -> Iterator[tuple[str, Any]]:
    def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(f"{name}.{key}", inner)
        elif isinstance(value, list):
            for inner in value:
                yield from leaves(name, inner)
        else:
            yield name, value

    yield from leaves("metadata", sample.metadata)
    for image in sample.images:
        yield from leaves("images.metadata", image.metadata)


def audit(
    paths: str | Path | Sequence[str | Path],
    *,
    against: Sequence[str | Path] = (),
    near: bool = True,
    ignore: Sequence[str] = (),
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Read every sample of a shard set (give all its splits at once) and report; see ``docs/prepare.md``.

    ``report["problems"]`` lists, as sentences, what must be looked at before training: PHI patterns (without the kinds
    of ``ignore``), personal metadata, masks, leaks and damage. ``against`` are shards that must not overlap. Near
    duplicate texts are counted but are no problem by themselves: normal reports share their wording. In memory are
    about two kilobytes per sample. Raises UserError where there are no shards.
    """
    facts = list(_gather_all(paths, near, workers, "audit", progress))
    other = [f for f in _gather_all(list(against), near, workers, "against", progress)] if against else []
    for item in other:
        item.split = AGAINST
    report: dict[str, Any] = {"samples": len(facts), "images": sum(len(f.digests) for f in facts)}
    report |= {"splits": _splits(facts), "labels": _labels(facts), "licenses": _licenses(facts)}
    report["unreadable"] = [f.error for f in facts + other if f.error]
    report["phi"] = _phi(facts, set(ignore))
    report["personal_metadata"] = dict(Counter(name for f in facts for name in set(f.personal_keys)))
    report["masks"] = [f.key for f in facts if f.masks]
    report["burnt_in"] = [f.key for f in facts if f.burnt_in]
    report["undecodable_images"] = [f.key for f in facts if f.unreadable]
    report["patients"] = _in_several([f for f in facts if not f.error], lambda f: [f"{f.source} {f.group}"])
    report["studies"] = _in_several(facts, lambda f: [f"{f.source} {f.study}"] if f.study else [])
    report["images_exact"] = _in_several(facts + other, lambda f: f.digests)
    report["images_near"] = _near_images(facts + other) if near else None
    report["texts_near"] = _near_texts(facts + other) if near else None
    report["problems"] = _problems(report)
    return report


_reader: dict[str, Any] = {}


def _open(paths: list[str | Path], near: bool) -> None:
    _reader.update(reader=ShardReader(paths), near=near)


def _one(number: int) -> Facts:
    return gather(_reader["reader"], number, _reader["near"])


def _gather_all(paths: Any, near: bool, workers: int | None, name: str, progress: bool) -> Iterator[Facts]:
    from rich.console import Console
    from rich.progress import track

    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    _open(listed, near)
    total = len(_reader["reader"])
    count = min(workers or os.cpu_count() or 1, 1 + total // 256)
    shown = Console(stderr=True)
    describe: dict[str, Any] = {"total": total, "console": shown, "disable": not (progress and shown.is_terminal)}
    if count == 1:
        yield from track(map(_one, range(total)), name, **describe)
        return
    with ProcessPoolExecutor(count, initializer=_open, initargs=(listed, near)) as pool:
        yield from track(pool.map(_one, range(total), chunksize=64), name, **describe)


def _splits(facts: list[Facts]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for split in sorted({f.split for f in facts if not f.error}):
        rows = [f for f in facts if f.split == split and not f.error]
        table[split] = {
            "patients": len({(f.source, f.group) for f in rows}),
            "studies": len({(f.source, f.study) for f in rows if f.study}),
            "samples": len(rows),
            "images": sum(len(f.digests) for f in rows),
            "synthetic": sum(f.synthetic for f in rows),
        }
    return table


def _labels(facts: list[Facts]) -> dict[str, dict[str, dict[str, int]]]:
    """label -> split -> counts of 1, 0 and -1."""
    table: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    words = {1: "positive", 0: "negative", -1: "uncertain"}
    for f in facts:
        for name, value in f.labels.items():
            counts = table[name].setdefault(f.split, dict.fromkeys(words.values(), 0))
            counts[words[int(value or 0)]] += 1
    return dict(sorted(table.items()))


def _licenses(facts: list[Facts]) -> list[dict[str, Any]]:
    counts = Counter((f.source, f.license) for f in facts if not f.error)
    notes = {
        name: "unknown" if name.strip().lower() in UNKNOWN_LICENSES else "restricted" if RESTRICTED.search(name) else ""
        for _, name in counts
    }
    return [{"source": s, "license": n, "samples": c, "note": notes[n]} for (s, n), c in sorted(counts.items())]


def _phi(facts: list[Facts], ignore: set[str]) -> dict[str, Any]:
    """Counts by kind and where to look; never the text itself."""
    found = [(kind, f.key, name) for f in facts for kind, name in f.phi if kind not in ignore]
    samples = len({key for _, key, _ in found})
    examples = [{"key": key, "field": name, "kind": kind} for kind, key, name in found[:EXAMPLES]]
    return {"samples": samples, "kinds": dict(Counter(kind for kind, _, _ in found)), "examples": examples}


def _in_several(facts: list[Facts], names: Any) -> dict[str, Any]:
    """How many names are in several splits, by the splits, with the keys of one sample from each as examples."""
    places: dict[Any, dict[str, str]] = defaultdict(dict)
    for f in facts:
        for name in names(f):
            places[name].setdefault(f.split, f.key)
    shared = [p for p in places.values() if len(p) > 1 and not set(p) <= {AGAINST}]
    counts = Counter(" and ".join(sorted(p)) for p in shared)
    return {"count": len(shared), "splits": dict(counts), "examples": shared[:EXAMPLES]}


def _near_images(facts: list[Facts]) -> dict[str, Any]:
    rows = [f for f in facts for _ in f.image_hashes]
    hashes = np.frombuffer(b"".join(h for f in facts for h in f.image_hashes), np.uint8).reshape(
        -1, duplicates.BITS // 8
    )
    found = _clustered(rows, duplicates.near_images(hashes))
    return {**found, "threshold_bits": duplicates.THRESHOLD}


def _near_texts(facts: list[Facts]) -> dict[str, Any]:
    rows = [f for f in facts if f.text_hash is not None]
    hashes = np.frombuffer(b"".join(f.text_hash or b"" for f in rows), np.uint32).reshape(-1, duplicates.PERMUTATIONS)
    found = _clustered(rows, duplicates.near_texts(hashes))
    return {**found, "texts": len(rows), "threshold_jaccard": duplicates.SIMILARITY}


def _clustered(rows: list[Facts], pairs: Any) -> dict[str, Any]:
    """Clusters of near duplicates: how many there are, and how many lie in several splits."""
    groups = duplicates.clusters(len(rows), pairs).values() if rows else []
    within = across = 0
    splits: Counter[str] = Counter()
    examples: list[dict[str, str]] = []
    for members in groups:
        places: dict[str, str] = {}
        for i in members:
            places.setdefault(rows[i].split, rows[i].key)
        if len(places) == 1:
            within += AGAINST not in places
        else:
            across += 1
            splits[" and ".join(sorted(places))] += 1
            examples += [places] if len(examples) < EXAMPLES else []
    return {"count": across, "within_a_split": within, "splits": dict(splits), "examples": examples}


def _problems(report: dict[str, Any]) -> list[str]:
    phi = report["phi"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in phi["kinds"].items())
    lines = [
        (len(report["unreadable"]), "samples cannot be read"),
        (len(report["undecodable_images"]), "samples have images that cannot be decoded"),
        (phi["samples"], f"samples hold text that looks like PHI ({kinds})"),
        (sum(report["personal_metadata"].values()), "metadata values stand under personal keys"),
        (len(report["masks"]), f"samples have a report with the mask {DEIDENTIFICATION_MASK}"),
        (len(report["burnt_in"]), "samples have images that are flagged for burnt-in text"),
    ]
    shared = {
        "patients": "patients",
        "studies": "studies",
        "images_exact": "images",
        "images_near": "near-duplicate images",
    }
    for name, words in shared.items():
        for splits, count in ((report[name] or {}).get("splits") or {}).items():
            lines.append((count, f"{words} are in {splits}"))
    return [f"{count} {text}" for count, text in lines if count]


def print_audit(report: dict[str, Any], as_json: bool = False) -> None:
    """Print a report of :func:`audit`, as JSON or as tables with the problems last."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console()
    splits = Table("split", "patients", "studies", "samples", "images", "synthetic", box=SIMPLE)
    for split, row in report["splits"].items():
        splits.add_row(split, *map(str, row.values()))
    licenses = Table("source", "license", "samples", "note", box=SIMPLE)
    for row in report["licenses"]:
        licenses.add_row(*(str(value) for value in row.values()))
    names = list(report["splits"])
    labels = Table("label (positive / negative / uncertain)", *names, box=SIMPLE)
    for label, by_split in report["labels"].items():
        labels.add_row(label, *(" / ".join(map(str, by_split.get(n, {}).values())) for n in names))
    for table in (splits, licenses, labels):
        if table.row_count:
            console.print(table)
    if report["texts_near"]:
        texts = report["texts_near"]
        console.print(
            f"near-duplicate texts: {texts['count']} clusters across splits {texts['splits'] or ''}", markup=False
        )
    for example in report["phi"]["examples"]:
        console.print("looks like PHI: {key} {field}: {kind}".format(**example), markup=False)
    for name in ("patients", "studies", "images_exact", "images_near"):
        for places in (report[name] or {}).get("examples", [])[:5]:
            console.print(f"{name}: {', '.join(f'{key} in {split}' for split, key in places.items())}", markup=False)
    for line in [*report["unreadable"][:EXAMPLES], *report["problems"]]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not report["problems"]:
        console.print("no problem found; that does not prove that there is no PHI and no leak")
