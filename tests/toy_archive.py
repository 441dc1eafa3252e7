"""A small archive of tiny pictures with a table, and its converter, for tests of the pipeline."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.pipeline import PipelineOptions, run


def items(
    source: Path, answer: Annotated[str, typer.Option(help="What every answer says.")] = "yes"
) -> Iterator[Item | Dropped]:
    for line in (source / "table.csv").read_text().splitlines():
        key, picture, split, patient = line.split(",")
        if not picture:
            yield Dropped(key, "row without an image", split)
            continue
        question = {"role": "user", "content": "<image> effusion?"}
        fields = {"key": key, "split": split, "patient_id": patient, "study_id": f"study-{key}"}
        messages = [question, {"role": "assistant", "content": answer}]
        yield Item({**fields, "messages": messages}, [Source(picture, image_id=picture)])


ARCHIVE = Converter("toy-archive", "CC0-1.0", "Tiny pictures.", items)


def make_archive(folder: Path, count: int = 60, rows: tuple[str, ...] = ()) -> Path:
    """``count`` pictures in two splits, two of each patient; ``rows`` are appended to the table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"k{i},{i}.png,{'test' if i % 10 > 7 else 'train'},p{i // 2}")
    (folder / "table.csv").write_text("\n".join([*lines, *rows]))
    return folder


def prepare(source: Path, out: Path | str, answer: str = "yes", **options: Any) -> dict[str, Any]:
    """Run in this process, unless more workers are asked for."""
    values: dict[str, Any] = {"samples_per_shard": 7, "workers": 0, "progress": False, **options}
    return run(ARCHIVE, source, out, PipelineOptions(**values), answer=answer)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, with its sha256."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def forked(function: Any, *arguments: Any) -> int:
    """Start a function in a forked process; returns its pid. Quick: what is imported stays imported."""
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*arguments)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
