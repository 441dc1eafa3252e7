"""SLAKE (Liu et al., ISBI 2021, arXiv 2102.09542) -> images with English and Chinese questions.

The release is ``{train,validate,test}.json`` and ``imgs/xmlabN/source.jpg``. The splits of the two languages are
independent of each other: of the 96 images of the English test, 72 are in the Chinese training split.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.questions import Question, by_image, inside, make_key, question_messages, read_json, shared_text, tidy
from data_prep.splits import assign
from medvlm.data.schema import Split
from medvlm.errors import UserError

HINT = "give the folder of the SLAKE release, with train.json, validate.json, test.json and imgs/"
FILES: dict[Split, str] = {"train": "train.json", "validation": "validate.json", "test": "test.json"}
FIELDS = ("qid", "img_name", "question", "answer", "q_lang", "answer_type")
log = logging.getLogger(__name__)


def items(
    source: Path,
    language: Annotated[Literal["en", "zh", "all"], typer.Option(help="Questions of one language, or both.")] = "en",
    split: Annotated[
        Literal["official", "image-disjoint"],
        typer.Option(help="official: the release's; image-disjoint: 80/10/10 by a hash of the image."),
    ] = "official",
) -> Iterator[Item | Dropped]:
    """One sample per image and split, with all its questions."""
    if not (source / "imgs").is_dir():
        raise UserError(f"{source / 'imgs'}: not found; {HINT}")
    questions: list[Question | Dropped] = []
    for official, file in FILES.items():
        questions += _questions(source / file, official, language, split == "image-disjoint")
    if text := shared_text(questions):
        log.warning("SLAKE, %s split, language %s: %s", split, language, text)
    for found in by_image(questions):
        if isinstance(found, Dropped):
            yield found
            continue
        where, name, group = found
        if not inside(source, f"imgs/{name}"):
            yield from (Dropped(q.row, "missing image", where) for q in group)
            continue
        yield Item(
            {
                "key": make_key(name.rpartition("/")[0] or name, where),
                "split": where,
                "messages": question_messages(group),
                "metadata": {
                    "modality": group[0].extra["modality"],
                    "location": group[0].extra["location"],
                    "qids": [q.extra["qid"] for q in group],
                    "languages": [q.extra["language"] for q in group],
                    "base_types": [q.extra["base_type"] for q in group],
                    "triples": [q.extra["triple"] for q in group],
                },
            },
            [Source(f"imgs/{name}", image_id=name)],
        )


def _questions(path: Path, official: Split, language: str, rehash: bool) -> Iterator[Question | Dropped]:
    seen: set[str] = set()
    for number, row in enumerate(read_json(path, HINT), 1):
        qid, name = tidy(row.get("qid")), tidy(row.get("img_name"))
        what = f"{path.name} entry {number}, qid {qid}: {name}"
        lacking = [field for field in FIELDS if tidy(row.get(field)) == ""]
        split = assign(name) if rehash and name else official
        kind = tidy(row.get("answer_type")).lower()
        if lacking:
            yield Dropped(f"{what} lacks {', '.join(lacking)}", "entry lacks a field", split)
        elif row["q_lang"] not in ("en", "zh"):
            yield Dropped(what, "language is neither en nor zh", split)
        elif language not in (row["q_lang"], "all"):
            continue  # not asked for
        elif kind not in ("open", "closed"):
            yield Dropped(what, "answer_type is neither OPEN nor CLOSED", split)
        elif qid in seen:
            yield Dropped(what, "duplicate id", split)
        else:
            seen.add(qid)
            extra = {"qid": qid, "language": row["q_lang"], "modality": row.get("modality")}
            extra |= {name: row.get(name) for name in ("location", "base_type", "triple")}
            content = tidy(row.get("content_type")) or None
            yield Question(split, name, tidy(row["question"]), tidy(row["answer"]), what, kind, content, extra)


CONVERTER = Converter(
    name="slake", license="CC-BY-4.0", help="SLAKE: images with questions in English and Chinese.", items=items
)
