"""VQA-RAD (Lau et al., Scientific Data 2018, doi:10.1038/sdata.2018.251) -> images with questions.

The release is ``VQA_RAD_Dataset_Public.json`` and ``images/``. Each image becomes one sample per split, with all its
questions as one conversation; evaluation asks them one by one. Nearly all test images occur in train as well.
"""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.questions import Question, by_image, make_key, question_messages, read_json, shared_text, tidy
from medvlm.data.schema import Split

RELEASE = "VQA_RAD_Dataset_Public.json"
HINT = f"give the folder of the VQA-RAD release, with {RELEASE} and images/"
SplitMode = Literal["official", "image-disjoint"]
TYPOS = {"PRSE": "PRES", "ATRIB": "ATTRIB"}  # one row each in the release
FIELDS = ("qid", "phrase_type", "image_name", "image_case_url", "question", "question_type", "answer", "answer_type")
log = logging.getLogger(__name__)


def items(
    source: Path,
    split: Annotated[
        SplitMode, typer.Option(help="official: the release's test questions; image-disjoint: no image in two splits.")
    ] = "official",
) -> Iterator[Item | Dropped]:
    """One sample per image and split, with all its questions.

    ``official`` keeps the release's test questions; ``image-disjoint`` assigns whole cases. Of a question in both
    splits the copy in test stays.
    """
    rows: list[dict[str, Any]] = []
    for number, raw in enumerate(read_json(source / RELEASE, HINT)):
        what = f"row {number}, qid {raw.get('qid')}"
        try:
            rows.append({**clean(raw), "what": what})
        except ValueError as error:
            yield Dropped(f"{what}: {error}", "bad row")
    case = cases(rows)
    questions = [_question(row, split, case[row["image_name"]]) for row in rows]
    if text := shared_text(questions):
        log.warning("VQA-RAD, %s split: %s; compare with --split image-disjoint", split, text)
    for found in by_image(questions):
        if isinstance(found, Dropped):
            yield found
            continue
        where, name, group = found
        if not (source / "images" / name).is_file():
            yield from (Dropped(f"{q.row}: {name}", "missing image", where) for q in group)
            continue
        yield Item(
            {
                "key": make_key(
                    name.rpartition(".")[0] or name, where
                ),  # the splits share images, and keys must differ
                "split": where,
                "study_id": case[name],
                "messages": question_messages(group),
                "metadata": {
                    "organ": group[0].extra["organ"],
                    "qids": [q.extra["qid"] for q in group],
                    "phrase_types": [q.extra["phrase_type"] for q in group],
                },
            },
            [Source(f"images/{name}", image_id=name)],
        )
    for path in sorted((source / "images").glob("*.jpg")):
        if path.name not in case:
            yield Dropped(path.name, "image without question")


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """One row with single spaces, text answers and tidy types. Raises ValueError that says what cannot be used."""
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise ValueError(f"the row lacks {', '.join(missing)}")
    text = {name: tidy(row[name]) for name in FIELDS}
    empty = [name for name in ("image_name", "question", "answer") if not text[name]]
    if empty:
        raise ValueError(f"the row has an empty {', '.join(empty)}")
    if Path(text["image_name"]).name != text["image_name"]:
        raise ValueError("image_name is not a plain file name")
    text["answer_type"] = text["answer_type"].lower()  # two rows say "CLOSED "
    if text["answer_type"] not in ("closed", "open"):
        raise ValueError(f"answer_type {row['answer_type']!r} is neither CLOSED nor OPEN")
    kinds = (kind.strip().upper() for kind in text["question_type"].split(","))
    text["question_type"] = ", ".join(TYPOS.get(kind, kind) for kind in kinds)
    return {**text, "organ": row.get("image_organ"), "case": text["image_case_url"].rpartition("id=")[2]}


def cases(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Image -> case id. Five images carry several ids, counting upwards; the most frequent, then first, is taken."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row["image_name"]][row["case"]] += 1
    return {image: min(c, key=lambda case: (-c[case], case)) for image, c in counts.items()}


def assign(case: str) -> Split:
    """75 % train, 10 % validation, 15 % test by a hash, so that the images of one case stay together on any machine.

    Published results rest on it, which is why it is not that of :mod:`data_prep.splits`.
    """
    place = int(hashlib.sha256(f"vqa_rad:{case}".encode()).hexdigest(), 16) % 100
    return "train" if place < 75 else "validation" if place < 85 else "test"


def _question(row: dict[str, Any], mode: SplitMode, case: str) -> Question:
    official: Split = "test" if row["phrase_type"].startswith("test") else "train"
    return Question(
        official if mode == "official" else assign(case),
        row["image_name"],
        row["question"],
        row["answer"],
        row["what"],
        row["answer_type"],
        row["question_type"],
        {name: row[name] for name in ("organ", "qid", "phrase_type")},
    )


CONVERTER = Converter(
    name="vqa-rad", license="CC0-1.0", help="VQA-RAD: radiology images with questions by clinicians.", items=items
)
