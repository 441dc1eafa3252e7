"""Look at shards: `verify` finds what is broken, `stats` counts, `show` prints one sample."""

import io
import json
import os
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
from PIL import Image as PILImage
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from medvlm.data.schema import IMAGE_EXTENSIONS, Sample, TextPart, parse_sample
from medvlm.data.shards import INDEX_SCHEMA, ShardReader, find_tars, index_path
from medvlm.errors import UserError

Paths = str | Path | Sequence[str | Path]
QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
LABEL_VALUES = {1: "positive", 0: "negative", -1: "uncertain"}


def _listed(paths: Paths) -> list[str | Path]:
    return [paths] if isinstance(paths, str | Path) else list(paths)


def verify(paths: Paths) -> dict[str, Any]:
    """Read every byte of the shards and compare with the index and the schema.

    Checked are: the tar's own structure, each member against the index (offset, size, crc32), the JSON, the images and
    their sizes, keys that occur twice in a folder, and patients (`Sample.group`) in more than one split. Give all
    splits of a data set at once, or a leak between them cannot be seen. Returns the counts and ``problems``, a list of
    ``{shard, key, reason}`` where key None means the whole shard. Raises UserError only where there is no tar.
    """
    report: dict[str, Any] = {"shards": 0, "samples": 0, "images": 0, "problems": []}

    def add(tar: Path, key: str | None, reasons: list[str]) -> None:
        report["problems"] += [{"shard": str(tar), "key": key, "reason": reason} for reason in reasons]

    keys: dict[tuple[Path, str], Path] = {}
    groups: dict[tuple[str, str], dict[str, tuple[Path, str]]] = defaultdict(dict)
    for tar in find_tars(_listed(paths)):
        report["shards"] += 1
        members, broken = _walk(tar)
        add(tar, None, broken)
        try:
            table = _read_index(tar)
        except UserError as error:
            add(tar, None, [str(error)])
            continue
        for key, reason in _compare(members, table, bool(broken)):
            add(tar, key, [reason])
        with tar.open("rb") as file:
            for row in table.to_pylist():
                report["samples"] += 1
                reasons, sample = _check_sample(file.fileno(), row, report)
                folder_key = (tar.parent, row["key"])
                if folder_key in keys:
                    reasons.append(f"the key occurs twice, first in {keys[folder_key].name}")
                keys.setdefault(folder_key, tar)
                add(tar, row["key"], reasons)
                if sample is not None:
                    groups[sample.source, sample.group].setdefault(sample.split, (tar, row["key"]))
    for (source, group), places in groups.items():
        if len(places) > 1:
            (tar, key), splits = list(places.values())[-1], " and ".join(sorted(places))
            add(tar, key, [f"{source} patient or study {group!r} is in {splits}"])
    return report


def print_verify(report: dict[str, Any], as_json: bool = False, limit: int = 50) -> None:
    """Print a report of `verify`: all of it as JSON, or the first ``limit`` problems and the totals for people."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    problems = report["problems"]
    for problem in problems[:limit]:
        print(f"{problem['shard']}{':' + problem['key'] if problem['key'] else ''}: {problem['reason']}")
    if len(problems) > limit:
        print(f"... and {len(problems) - limit} more; --json lists all")
    found = f"{len(problems)} problem(s)" if problems else "no problems"
    print(f"{report['shards']} shards, {report['samples']} samples, {report['images']} images: {found}")


def _walk(tar: Path) -> tuple[dict[str, list[tuple[int, int]]], list[str]]:
    """Name -> (offset, size) of every member that the headers lead to, and what is wrong with the archive.

    tarfile and webdataset take a damaged header for the end of the archive; the two zero blocks of a real end tell.
    """
    members: dict[str, list[tuple[int, int]]] = defaultdict(list)
    broken = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isfile():
                    members[member.name].append((member.offset_data, member.size))
                    if member.offset_data + member.size > tar.stat().st_size:
                        broken.append(f"truncated inside member {member.name!r}")
            end = archive.offset
        with tar.open("rb") as file:
            file.seek(end)
            rest = file.read(1024)
        if not broken and any(rest):
            broken.append(f"damaged header at byte {end}: readers stop here without a word")
        elif not broken and len(rest) < 512:
            broken.append("truncated: the end-of-archive mark is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        broken.append(f"not a readable tar ({error})")
    return dict(members), broken


def _read_index(tar: Path) -> pa.Table:
    path = index_path(tar)
    if not path.exists():
        raise UserError(f"has no index; run `medvlm shards index {tar}`")
    try:
        table = feather.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the index {path.name} cannot be read ({error}); write it again") from None
    if table.schema.names != INDEX_SCHEMA.names:
        raise UserError(f"the index {path.name} has other columns than this version writes; write it again")
    return table


def _compare(
    members: dict[str, list[tuple[int, int]]], table: pa.Table, tar_is_broken: bool
) -> list[tuple[str | None, str]]:
    """(key, reason) for each member that only the tar or only the index has, or that lies elsewhere."""
    found: list[tuple[str | None, str]] = []
    indexed: dict[str, list[tuple[int, int]]] = defaultdict(list)
    keys: dict[str, str] = {}  # member name -> key
    for row in table.select(["key", "members", "offsets", "sizes"]).to_pylist():
        for extension, offset, size in zip(row["members"], row["offsets"], row["sizes"], strict=True):
            name = f"{row['key']}.{extension}"
            indexed[name].append((offset, size))
            keys[name] = row["key"]
    there = {_index_name(name): places for name, places in members.items()}
    lost = [name for name in indexed if name not in there]
    for name, places in indexed.items():
        if name in there and there[name] != places:
            found.append((keys[name], f"member {name!r} lies elsewhere than the index says; index again"))
    extra = there.keys() - indexed.keys()
    if lost:
        where = "readers that walk the tar do not reach" if tar_is_broken else "the tar lacks"
        samples = len({keys[name] for name in lost})
        found.append((None, f"{where} {len(lost)} member(s) of {samples} sample(s) in the index, from {lost[0]!r} on"))
    if extra:
        found.append((None, f"{len(extra)} member(s) are not in the index, such as {min(extra)!r}; index again"))
    return found


def _index_name(member: str) -> str:
    """A member's name as the index has it, with the extension in lower case."""
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}.{extension.lower()}"


def _check_sample(descriptor: int, row: dict[str, Any], report: dict[str, Any]) -> tuple[list[str], Sample | None]:
    """Reasons why one sample is broken, and the sample if its JSON is sound. Counts images in ``report``."""
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
    sizes = {image.file: (image.width, image.height) for image in sample.images} if sample else {}
    for name in sorted(sizes.keys() - set(row["members"])):
        reasons.append(f"the JSON names image {name!r} but the shard has no such member")
    for name, content in data.items():
        if name.rpartition(".")[2] not in IMAGE_EXTENSIONS:
            continue
        report["images"] += 1
        try:
            with PILImage.open(io.BytesIO(content)) as image:
                image.load()
                size = image.size
        except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
            reasons.append(f"image {name!r} does not decode ({error})")
            continue
        if sample and name not in sizes:
            reasons.append(f"image {name!r} is not named in the JSON")
        elif sample and size != sizes[name]:
            reasons.append(f"image {name!r} is {size[0]}x{size[1]}, the JSON says {'{}x{}'.format(*sizes[name])}")
    return reasons, sample


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
    for column in ("source", "split", "group"):
        if row[column] != getattr(sample, column):
            reasons.append(f"the index has {column} {row[column]!r}, the JSON {getattr(sample, column)!r}; index again")
    return sample, reasons


def _foreign(data: bytes) -> str:
    try:
        record = json.loads(data)
    except ValueError:
        return ""
    if isinstance(record, dict) and "conversations" in record:
        return " (LLaVA's layout, with 'conversations'; docs/data-format.md shows how to convert)"
    return ""


def stats(paths: Paths) -> list[dict[str, Any]]:
    """Counts per source and split. Sizes are in pixels, text in characters per sample, as quantiles over samples.

    Raises UserError for a shard without index or a sample that does not follow the schema.
    """
    reader = ShardReader(_listed(paths))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    characters = reader.table["characters"].to_pylist()
    for i in range(len(reader)):
        sample = reader.sample(i)
        row = rows.setdefault((sample.source, sample.split), _empty_row(sample))
        row["samples"] += 1
        row["images"] += len(sample.images)
        row["synthetic"] += sample.synthetic
        answers = [m for m in sample.messages if m.role == "assistant"]
        row["questions"] += len(answers)
        row["closed"] += sum(m.answer_type == "closed" for m in answers)
        row["open"] += sum(m.answer_type == "open" for m in answers)
        row["reports"] += bool(sample.report)
        row["patients"] |= {sample.patient_id} - {None}
        row["groups"].add(sample.group)
        for label, value in sample.labels.items():
            if value is not None:
                counts = row["labels"].setdefault(label, dict.fromkeys(LABEL_VALUES.values(), 0))
                counts[LABEL_VALUES[value]] += 1
        row["width"] += [image.width for image in sample.images]
        row["height"] += [image.height for image in sample.images]
        row["characters"].append(characters[i])
    for row in rows.values():
        row["patients"], row["groups"] = len(row["patients"]), len(row["groups"])
        row.update({name: _quantiles(row[name]) for name in ("width", "height", "characters")})
    return [rows[name] for name in sorted(rows)]


def _empty_row(sample: Sample) -> dict[str, Any]:
    row: dict[str, Any] = {"source": sample.source, "split": sample.split}
    row |= dict.fromkeys(("samples", "synthetic", "images", "questions", "closed", "open", "reports"), 0)
    return row | {"patients": set(), "groups": set(), "labels": {}, "width": [], "height": [], "characters": []}


def _quantiles(values: list[int]) -> dict[str, int]:
    """Nearest-rank quantiles; empty where there are no values."""
    ordered = sorted(values)
    return {name: ordered[round(q * (len(ordered) - 1))] for name, q in QUANTILES.items()} if ordered else {}


def print_stats(rows: list[dict[str, Any]], as_json: bool = False) -> None:
    """Print the rows of `stats` as JSON, or as tables of counts, sizes and (if there are any) labels."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    words = ("source", "split", "label", "of")
    counts = ("samples", "images", "questions", "closed", "open", "reports", "patients")

    def table(title: str, columns: Iterable[str], lines: Iterable[Iterable[Any]]) -> None:
        grid = Table(title=title, box=SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True)
        for column in columns:
            grid.add_column(column, justify="left" if column in words else "right")
        for line in lines:
            grid.add_row(*map(str, line))
        if grid.row_count:
            Console().print(grid)

    def where(row: dict[str, Any]) -> tuple[str, str]:
        return row["source"], row["split"]

    table("Counts", ("source", "split", *counts), ((*where(r), *(r[c] for c in counts)) for r in rows))
    spreads = [(r, name) for r in rows for name in ("width", "height", "characters") if r[name]]
    table(
        "Images in pixels, text in characters per sample",
        ("source", "split", "of", *QUANTILES),
        ((*where(r), name, *r[name].values()) for r, name in spreads),
    )
    labels = [(r, label) for r in rows for label in sorted(r["labels"])]
    table(
        "Labels",
        ("source", "split", "label", *LABEL_VALUES.values()),
        ((*where(r), label, *r["labels"][label].values()) for r, label in labels),
    )


def find(reader: ShardReader, key_or_number: str | int) -> int:
    """The number of a sample given by its key or number; keys win. Raises UserError where there is none or several."""
    wanted = str(key_or_number)
    keys = reader.table["key"].to_pylist()
    places = [i for i, key in enumerate(keys) if key == wanted]
    if len(places) > 1:
        raise UserError(f"key {wanted!r} occurs {len(places)} times; give one of the numbers {places[:5]}")
    if places:
        return places[0]
    if wanted.isdecimal() and int(wanted) < len(reader):
        return int(wanted)
    raise UserError(f"no sample {wanted!r}: there are {len(reader)}, numbered from 0, such as {keys[0]!r}")


def show(paths: Paths, key_or_number: str | int = 0, images_to: Path | None = None) -> Sample:
    """Print one sample, write its images into the folder ``images_to`` if given, and return it."""
    console = Console()
    reader = ShardReader(_listed(paths))
    number = find(reader, key_or_number)
    sample = reader.sample(number)

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    line(f"{sample.key}  (number {number} in {reader.tars[reader.table['shard'][number].as_py()]})", "bold")
    record = sample.model_dump(exclude_defaults=True, include={"source", "license", "split", "synthetic"})
    record |= sample.model_dump(exclude_none=True, include={"patient_id", "study_id"})
    line("  ".join(f"{name}={value}" for name, value in record.items()))
    for image in sample.images:
        extra = "  ".join(str(v) for v in (image.image_id, image.view) if v)
        line(f"{image.file}: {image.width}x{image.height} {extra}".rstrip())
    for message in sample.messages:
        text = " ".join(p.text if isinstance(p, TextPart) else "[image]" for p in message.content)
        kind = ", ".join(v for v in (message.answer_type, message.question_type) if v)
        line(f"{message.role:>9}: {text}{f'  ({kind})' if kind else ''}", "cyan" if message.role == "user" else None)
    for name, text in sample.report.items():
        line(f"{name}: {text}")
    for name, value in sample.labels.items():
        line(f"label {name}: {LABEL_VALUES[value] if value is not None else 'not mentioned'}")
    for box in sample.boxes:
        line(f"box {box.label}: image {box.image}, xyxy {box.xyxy}")
    if sample.metadata:
        line(f"metadata: {json.dumps(sample.metadata, ensure_ascii=False)}")
    if images_to is not None:
        images_to.mkdir(parents=True, exist_ok=True)
        for image, data in zip(sample.images, reader.images(number), strict=True):
            target = images_to / f"{sample.key}.{image.file}"
            target.write_bytes(data)
            line(f"wrote {target}")
    return sample
