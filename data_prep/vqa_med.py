"""VQA-Med 2019, 2020 and 2021 (ImageCLEF; Ben Abacha et al.) -> radiology images with questions.

Tables hold one question a line, ``image|question|answer``. The test sets differ: 2019 has
``image|category|question|answer`` with ``#`` between right answers and ``()`` around optional parts; 2020 and 2021 have
a file of questions and one of answers, ``image|answer|other right answer``. The first answer is the
target; all are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.questions import Question, by_image, make_key, question_messages, read_text, tidy, yes_no
from medvlm.data.schema import Split
from medvlm.errors import UserError

HINT = "give the folder in which the zips of one year's VQA-Med are unpacked"
CATEGORIES = ("modality", "plane", "organ", "abnormality")


@dataclass(frozen=True)
class Part:
    """One set: its table, its folder of images, and the table of answers where that is another."""

    split: Split
    table: str
    images: str
    answers: str | None = None


TRAIN_2020 = Part("train", "VQAnswering_2020_Train_QA_pairs.txt", "VQAnswering_2020_Train_images")
VAL_2020 = ("VQAnswering_2020_Val_QA_Pairs.txt", "VQAnswering_2020_Val_images")
PARTS = {
    "2019": (
        Part("train", "All_QA_Pairs_train.txt", "Train_images"),
        Part("validation", "All_QA_Pairs_val.txt", "Val_images"),
        Part("test", "VQAMed2019_Test_Questions_w_Ref_Answers.txt", "VQAMed2019_Test_Images"),
    ),
    "2020": (
        TRAIN_2020,
        Part("validation", *VAL_2020),
        Part(
            "test",
            "VQAMed2020-Task1-VQAnswering-Test-Questions.txt",
            "Task1-2020-VQAnswering-Test-Images",
            "VQAMed2020-Task1-VQAnswering-Test-ReferenceAnswers.txt",
        ),
    ),
    "2021": (  # its training set is that of 2020, training and validation together
        TRAIN_2020,
        Part("train", *VAL_2020),
        Part(
            "validation",
            "VQA-Med-2021-VQAnswering-Task1-New-ValidationSet.txt",
            "ImageCLEF-2021-VQA-Med-New-Validation-Images",
        ),
        Part(
            "test",
            "Task1-VQA-2021-TestSet-Questions.txt",
            "VQA-500-Images",
            "Task1-VQA-2021-TestSet-ReferenceAnswers.txt",
        ),
    ),
}


def items(
    source: Path,
    year: Annotated[Literal["2019", "2020", "2021"], typer.Option(help="Which year's data lies in the folder.")],
) -> Iterator[Item | Dropped]:
    """One sample per image, with all its questions. Sets whose table is not there are left out."""
    questions: list[Question | Dropped] = []
    tables = {part.table: _find(source, part.table) for part in PARTS[year]}
    if not any(tables.values()):
        raise UserError(f"{source}: holds none of {', '.join(tables)}; {HINT}")
    for part in PARTS[year]:
        if table := tables[part.table]:
            folder = _find(source, part.images)
            if folder is None:
                raise UserError(f"{source}: holds {part.table} but no folder {part.images}; unpack the images there")
            questions += _questions(source, part, table, folder, _categories(table))
    for found in by_image(questions):
        if isinstance(found, Dropped):
            yield found
            continue
        where, path, group = found
        if not (source / path).is_file():
            yield from (Dropped(q.row, "missing image", where) for q in group)
            continue
        name = Path(path).stem
        yield Item(
            {
                "key": make_key(name, where, year),
                "split": where,
                "messages": question_messages(group),
                "metadata": {"year": year, "references": [q.extra["references"] for q in group]},
            },
            [Source(path, image_id=name)],
        )


def _find(source: Path, name: str) -> Path | None:
    """A file or folder of that name at most three folders deep, where unpacking by hand may have put it."""
    found = (p for depth in ("", "*/", "*/*/", "*/*/*/") for p in sorted(source.glob(depth + name)))
    return next(found, None)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(read_text(path, HINT).splitlines(), 1):
        if line.strip():
            yield number, [tidy(cell) for cell in line.split("|")]


def _categories(table: Path) -> dict[tuple[str, str], str]:
    """(image, question) -> category, from QAPairsByCategory of 2019 where it is there."""
    files = sorted((table.parent / "QAPairsByCategory").glob("*.txt"))
    kinds = {file: next((c for c in CATEGORIES if c in file.stem.lower()), None) for file in files}
    return {(c[0], c[1]): kind for file, kind in kinds.items() if kind for _, c in _lines(file) if len(c) > 2}


def _questions(
    source: Path, part: Part, table: Path, folder: Path, categories: dict[tuple[str, str], str]
) -> Iterator[Question | Dropped]:
    with_category = part.table.startswith("VQAMed2019_Test")
    answers: dict[str, list[str]] = {}
    if part.answers:
        file = _find(source, part.answers)
        if file is None:
            raise UserError(f"{source}: holds {part.table} but not {part.answers}; without it there are no answers")
        answers = {cells[0]: [c for c in cells[1:] if c] for _, cells in _lines(file)}
    seen: set[str] = set()
    wanted = 4 if with_category else 2 if part.answers else 3
    for number, cells in _lines(table):
        what = f"{table.name} line {number}: {cells[0]}"
        if len(cells) != wanted or not cells[0]:
            yield Dropped(what, f"line without {wanted} cells", part.split)
            continue
        name, *middle = cells
        if part.answers:
            if name in seen:
                yield Dropped(what, "duplicate id", part.split)
                continue
            seen.add(name)
            references, category = answers.get(name, []), None
        elif with_category:
            references, category = [r.strip() for r in middle[2].split("#") if r.strip()], middle[0]
        else:
            references, category = [middle[1]], categories.get((name, middle[0]))
        question = middle[1] if with_category else middle[0]
        path = str((folder / f"{Path(name).name}.jpg").relative_to(source))
        target = references[0] if references else ""
        extra = {"references": references}
        yield Question(part.split, path, question, target, what, yes_no(target), category, extra)


CONVERTER = Converter(
    name="vqa-med",
    license="CC-BY-4.0 (2019); none stated (2020, 2021)",
    help="VQA-Med 2019, 2020, 2021: radiology images with questions.",
    items=items,
)
