"""Look at shards: `verify` finds what is broken, `stats` counts, `show` prints one sample.

Pictures of samples, of packs and of what `stats` counts: ``medvlm.data.pictures`` and ``medvlm.data.plots``.
"""

import json
from pathlib import Path

import pyarrow.compute as pc
from rich.console import Console

from medvlm.data.schema import Sample, TextPart
from medvlm.data.shards import ShardReader
from medvlm.data.statistics import LABEL_VALUES, Paths, collect, print_stats, stats
from medvlm.data.verify import print_verify, verify
from medvlm.errors import UserError

__all__ = ["collect", "find", "print_stats", "print_verify", "show", "stats", "verify"]


def find(reader: ShardReader, key_or_number: str | int) -> int:
    """The number of a sample given by its key or number; keys win. Raises UserError where there is none or several."""
    wanted = str(key_or_number)
    places = pc.indices_nonzero(pc.equal(reader.table["key"], wanted)).to_pylist()
    if len(places) > 1:
        raise UserError(f"key {wanted!r} occurs {len(places)} times; give one of the numbers {places[:5]}")
    if places:
        return places[0]
    if wanted.isdecimal() and int(wanted) < len(reader):
        return int(wanted)
    raise UserError(f"no sample {wanted!r}: there are {len(reader)}, numbered from 0, such as {reader.key(0)!r}")


def show(paths: Paths, key_or_number: str | int = 0, images_to: Path | None = None) -> Sample:
    """Print one sample, write its images into the folder ``images_to`` if given, and return it."""
    console = Console()
    reader = ShardReader(paths)
    number = find(reader, key_or_number)
    sample = reader.sample(number)

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    line(f"{sample.key}  (number {number} in {reader.tars[reader.row(number).shard]})", "bold")
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
