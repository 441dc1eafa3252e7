"""PMC-VQA (Zhang et al., arXiv 2305.10415) -> figures with multiple-choice questions.

Tables: version 1 ``train.csv``, ``test.csv`` and ``test_clean.csv``, version 2 ``train_2.csv`` and ``test_2.csv``. The
names trap: the paper's PMC-VQA-test is ``test_clean.csv``, which is a subset of ``test.csv``. So the tables to take are
named by the user, and every sample says which one it is from, and how many rows that has.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.questions import (
    Encoding,
    Question,
    article_of,
    by_image,
    inside,
    make_key,
    question_messages,
    tidy,
)
from data_prep.splits import assign
from data_prep.tables import read_table
from medvlm.data.schema import Split
from medvlm.errors import UserError

HINT = "give the folder of the PMC-VQA release, with the tables that --train and --test name"
LETTERS = "ABCD"
FOLDERS = ("images", "images_2/figures", "images_2", "figures", ".")
AnswerForm = Literal["letter", "text", "both"]


def items(
    source: Path,
    train: Annotated[str, typer.Option(help="Table of the training split; '' for none.")] = "train.csv",
    test: Annotated[
        str, typer.Option(help="Table of the test split; '' for none. The paper's test is test_clean.csv.")
    ] = "test_clean.csv",
    images: Annotated[str | None, typer.Option(help="Folder of the figures; by default images/ or figures/.")] = None,
    answer: Annotated[AnswerForm, typer.Option(help="What is to be answered: letter, text, or both.")] = "letter",
    split: Annotated[
        Literal["official", "article-disjoint"],
        typer.Option(help="official: the tables' splits; article-disjoint: by a hash of the article."),
    ] = "official",
    group: Annotated[
        Literal["article", "figure"],
        typer.Option(help="What no two splits may share: an article (PMC id), or only a figure."),
    ] = "article",
    encoding: Encoding = "utf-8",
) -> Iterator[Item | Dropped]:
    """One sample per figure and split, with all its questions."""
    folders = [images] if images else [f for f in FOLDERS if (source / f).is_dir()]
    if images and not (source / images).is_dir():
        raise UserError(f"{source / images}: not found; give --images as a folder below {source}")
    rows: list[Question | Dropped] = []
    sizes: dict[str, int] = {}
    tables: tuple[tuple[Split, str], ...] = (("train", train), ("test", test))
    for official, table in tables:
        before = len(rows)
        if table:
            rows += _questions(source / table, official, answer, split == "article-disjoint", encoding)
            sizes[table] = len(rows) - before
    for found in by_image(rows):
        if isinstance(found, Dropped):
            yield found
            continue
        where, name, questions = found
        path = next((p for f in folders if inside(source, p := str(Path(f) / name))), None)
        if path is None:
            yield from (Dropped(q.row, "missing image", where) for q in questions)
            continue
        names = sorted({str(q.extra["table"]) for q in questions})
        yield Item(
            {
                "key": make_key(name.rpartition(".")[0] or name, where),
                "split": where,
                "study_id": article_of(name) if group == "article" else None,
                "messages": question_messages(questions),
                "metadata": {
                    "tables": {table: sizes[table] for table in names},
                    "answers": [{"letter": q.extra["letter"], "text": q.extra["text"]} for q in questions],
                },
            },
            [Source(path, image_id=name)],
        )


def _questions(
    table: Path, official: Split, form: AnswerForm, rehash: bool, encoding: str
) -> Iterator[Question | Dropped]:
    columns = ("Figure_path", "Question", *(f"Choice {letter}" for letter in LETTERS))
    for number, row in enumerate(read_table(table, columns, hint=HINT, encoding=encoding), 1):
        name = row["Figure_path"]
        split = assign(article_of(name) or name) if rehash and name else official
        what = f"{table.name} row {number}: {name}"
        try:
            letter, choices = solve(row)
        except ValueError as error:
            yield Dropped(what, str(error), split)
            continue
        text = choices[letter]
        options = "\n".join(f"{key}: {choice}" for key, choice in choices.items())
        ending = {"letter": "Answer with the letter.", "text": "Answer with the text of the right choice."}
        ask = ending.get(form, "Answer with the letter and the text of the right choice.")
        yield Question(
            split,
            name,
            f"{question}\n{options}\n{ask}" if (question := tidy(row["Question"])) else "",
            {"letter": letter, "text": text}.get(form, f"{letter}: {text}"),
            what,
            "closed",
            extra={"table": table.name, "letter": letter, "text": text},
        )


def solve(row: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The right letter and the choices without their own prefixes such as ``A:``.

    The letter is that of ``Answer_label``, else ``Answer`` (or ``Anwser``, as one file spells it) where it is a letter,
    else the choice that equals the answer. Raises ValueError, in fixed words, where none or two of them is meant.
    """
    choices = {key: re.sub(rf"^\s*{key}\s*[:)]\s*", "", tidy(row[f"Choice {key}"])) for key in LETTERS}
    if not all(choices.values()):
        raise ValueError("empty choice")
    answer = tidy(row.get("Answer") or row.get("Anwser"))
    label = tidy(row.get("Answer_label")).upper()
    same = [key for key, choice in choices.items() if choice.lower() == _bare(answer).lower()]
    if not label and len(answer) == 1 and answer.isalpha() and not same:
        label, answer = answer.upper(), ""
    if label:
        if label not in choices:
            raise ValueError("answer letter out of range")
        if answer and answer.upper() != label and label not in same:
            raise ValueError("answer text and letter disagree")
        return label, choices
    if len(same) != 1:
        none = "answer is none of the choices" if answer else "empty answer"
        raise ValueError("answer fits two choices" if same else none)
    return same[0], choices


def _bare(answer: str) -> str:
    return re.sub(rf"^[{LETTERS}]\s*[:)]\s*", "", answer, flags=re.IGNORECASE)


CONVERTER = Converter(
    name="pmc-vqa",
    license="CC BY-SA (figures CC0 or CC BY, by article)",
    help="PMC-VQA: figures of articles with multiple-choice questions.",
    items=items,
)
