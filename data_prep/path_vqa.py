"""PathVQA (He et al., arXiv 2003.10286) -> pathology images with questions.

Layouts: ``pvqa/images/{train,val,test}/NAME.jpg`` with ``qas/{train,val,test}/{train,val,test}_qa.pkl`` (objects with
image, question, answer; the same as .json or .csv is taken too) or ``qas/{train,val,test}_vqa.pkl`` (img_id, sent,
label), and the Parquet export (image bytes, question, answer) as ``{train,validation,test}-*.parquet``.
"""

import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.questions import (
    Question,
    by_image,
    inside,
    make_key,
    question_messages,
    read_json,
    tidy,
    yes_no,
)
from data_prep.tables import read_table
from medvlm.data.schema import Split
from medvlm.errors import UserError

HINT = "give the folder pvqa with images/ and qas/, or one with train-*.parquet and so on"
NAMES: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}


def items(
    source: Path,
    unpack: Annotated[
        Path | None, typer.Option(help="Where the images of a Parquet export are written; needed for one only.")
    ] = None,
) -> Iterator[Item | Dropped]:
    """One sample per image in its official split, with all its questions; answers yes and no are closed."""
    root = source / "pvqa" if (source / "pvqa").is_dir() else source
    questions: list[Question | Dropped] = []
    if parquet := _parquet(root):
        if unpack is None:
            raise UserError("--unpack: name a folder; the images inside the Parquet files are written there")
        for split, files in parquet.items():
            questions += _read_parquet(files, split, unpack)
    else:
        for split, name in NAMES.items():
            questions += _read_folder(root, split, name)
    used: set[str] = set()
    for found in by_image(questions):
        if isinstance(found, Dropped):
            yield found
            continue
        where, path, group = found
        used.add(path)
        if not (Path(path).is_file() if unpack else inside(root, path)):
            yield from (Dropped(q.row, "missing image", where) for q in group)
            continue
        image_id = Path(path).name
        yield Item(
            {
                "key": make_key(Path(path).stem, where),
                "split": where,
                "messages": question_messages(group),
                "metadata": {"question_types": [q.extra["type"] for q in group]} if group[0].extra else {},
            },
            [Source(path if unpack else str(root.relative_to(source) / path), image_id=image_id)],
        )
    for split, name in NAMES.items():
        for file in sorted((root / "images" / name).glob("*.jpg")):
            if f"images/{name}/{file.name}" not in used:
                yield Dropped(f"images/{name}/{file.name}", "image without question", split)


def _read_folder(root: Path, split: Split, name: str) -> Iterator[Question | Dropped]:
    stems = (f"qas/{name}/{name}_qa", f"qas/{name}_qa", f"qas/{name}/{name}_vqa", f"qas/{name}_vqa")
    found = [path for stem in stems for e in (".pkl", ".json", ".csv") if (path := root / f"{stem}{e}").is_file()]
    if not found:
        raise UserError(f"{root / stems[0]}.pkl: not found; {HINT}")
    table = found[0]
    rows: Iterable[dict[str, Any]]
    if table.suffix == ".pkl":
        rows = read_pickle(table)
    elif table.suffix == ".csv":
        rows = read_table(table, ("image", "question", "answer"), hint=HINT)
    else:
        rows = read_json(table, HINT)
    for number, row in enumerate(rows, 1):
        image = tidy(row.get("image", row.get("img_id")))
        label = row.get("label")
        answer = tidy(row.get("answer", max(label, key=label.__getitem__) if isinstance(label, dict) and label else ""))
        what = f"{table.name} entry {number}: {image}"
        if not image:
            yield Dropped(what, "entry without image", split)
            continue
        file = f"images/{name}/{image if image.endswith('.jpg') else image + '.jpg'}"
        extra = {"type": row["question_type"]} if row.get("question_type") else {}
        ask = tidy(row.get("question", row.get("sent")))
        yield Question(split, file, ask, answer, what, yes_no(answer), extra=extra)


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, text and numbers need no class; anything else in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}; only plain lists, dicts, text and numbers are read")


def read_pickle(path: Path) -> list[dict[str, Any]]:
    """A pickled list of plain dicts. Raises UserError for everything else, and runs none of it."""
    try:
        with path.open("rb") as file:
            rows = _PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: not a readable pickle of plain data ({error}); convert it to JSON") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a pickled list of dicts")
    return rows


def _parquet(root: Path) -> dict[Split, list[Path]]:
    prefixes: dict[Split, str] = {"train": "train", "validation": "validation", "test": "test"}
    found = {s: sorted([*root.glob(f"{p}-*.parquet"), *root.glob(f"data/{p}-*.parquet")]) for s, p in prefixes.items()}
    return found if any(found.values()) else {}


def _read_parquet(files: list[Path], split: Split, unpack: Path) -> Iterator[Question | Dropped]:
    """Rows of the export; each image is written once, named by its content, so that running again changes nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = unpack.absolute() / split
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        number = 0
        try:
            table = pq.ParquetFile(file)
            lacking = {"image", "question", "answer"} - set(table.schema_arrow.names)
            if lacking:
                raise UserError(f"{file}: has no column {', '.join(sorted(lacking))}")
            for batch in table.iter_batches(batch_size=64, columns=["image", "question", "answer"]):
                for row in batch.to_pylist():
                    number += 1
                    what = f"{file.name} row {number}"
                    data = row["image"] and row["image"].get("bytes")
                    answer = tidy(row["answer"])
                    if not data:
                        yield Dropped(what, "entry without image", split)
                        continue
                    path = folder / f"{hashlib.sha256(data).hexdigest()[:24]}.jpg"
                    if not path.exists():
                        part = path.with_suffix(f".{os.getpid()}.part")
                        part.write_bytes(data)
                        part.replace(path)
                    yield Question(split, str(path), tidy(row["question"]), answer, what, yes_no(answer))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a readable Parquet file ({error})") from None


CONVERTER = Converter(
    name="path-vqa",
    license="unknown (images of pathology textbooks and digital libraries)",
    help="PathVQA: pathology images with questions.",
    items=items,
)
