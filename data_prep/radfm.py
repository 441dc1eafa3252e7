"""RadFM's tables (Wu et al., Nature Communications 2025, arXiv 2308.02463) -> samples.

Its archive of CSV and JSON files names images by paths of the authors' cluster; ``--images`` says where they are here:
the longest tail of a path that exists below that folder is taken. Which table it is, its columns tell.

Volumes there are ``.npy`` arrays [S, 3, H, W, D] whose spacing and intensities are lost, so they are not read; NIfTI
and picture files named by the same row are.
"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.items import Converter, Dropped, Item, Kind, Source, require
from data_prep.questions import (
    Encoding,
    Question,
    article_of,
    ask,
    by_image,
    caption_messages,
    fault,
    make_key,
    question_messages,
    read_json,
    tidy,
    yes_no,
)
from data_prep.splits import assign
from data_prep.tables import column_names, read_table
from medvlm.data.schema import IMAGE_MARK, Split
from medvlm.errors import UserError

HINT = "give the folder of RadFM's tables and name one with --table"
MODALITY_REQUEST = "Which imaging modality is this?"
LAYOUTS: dict[str, tuple[str, ...]] = {  # by their columns; the first that fits is taken
    "case report": ("PMC_id", "img_ref", "context", "question", "answer"),
    "vqa": ("Figure_path", "Question", "Answer"),
    "caption": ("Figure_path", "Caption"),
    "volume vqa": ("image_path", "question", "answer"),
    "modality": ("image_path", "answer"),
}


def items(
    source: Path,
    table: Annotated[str, typer.Option(help="The CSV or JSON, below the folder.")],
    images: Annotated[Path, typer.Option(help="The folder below which the images are, itself below the folder.")],
    encoding: Encoding = "utf-8",
) -> Iterator[Item | Dropped]:
    """One sample per image, case report or study. The split is told by the table's name, train or test, else a hash.

    Modality tables become one open question. RadFM's own yes/no questions are not imitated: its negatives name the true
    modality and say no.
    """
    path = require(source / table, HINT)
    root = require(source / images, "give the folder of the images with --images")
    name = path.stem.lower()
    official: Split | None = "train" if "train" in name else "test" if "test" in name else None
    finder = _Finder(source, root)
    if path.suffix == ".json":
        yield from _studies(path, official, finder)
        return
    header = column_names(path, encoding)
    layout = next((n for n, columns in LAYOUTS.items() if set(columns) <= set(header)), None)
    if layout is None:
        known = "; ".join(", ".join(columns) for columns in LAYOUTS.values())
        raise UserError(f"{path}: has the columns {', '.join(header)}, which are none of RadFM's known: {known}")
    rows = read_table(path, LAYOUTS[layout], hint=HINT, encoding=encoding)
    if layout == "case report":
        yield from _case_reports(path, rows, official, finder)
    elif layout == "caption":
        yield from _captions(path, rows, official, finder)
    else:
        yield from _questions(path, rows, official, finder)


class _Finder:
    """Where a path of the authors' cluster lies here."""

    def __init__(self, source: Path, root: Path):
        self.source, self.root = source, root

    def __call__(self, name: str) -> Source | None:
        parts = [p for p in Path(name).parts if p not in ("/", "..", ".")]
        for start in range(len(parts)):
            path = self.root.joinpath(*parts[start:])
            if path.is_file():
                kind: Kind = (
                    "nifti" if name.endswith((".nii", ".nii.gz")) else "dicom" if name.endswith(".dcm") else "image"
                )
                within = path.relative_to(self.source) if path.is_relative_to(self.source) else path.absolute()
                return Source(str(within), kind, image_id=name)
        return None


def _key(table: Path, name: str) -> str:
    """Short, though cluster paths are long, and different where only their folders differ."""
    return make_key(table.stem, Path(name).name.partition(".")[0], hashlib.sha256(name.encode()).hexdigest()[:8])


def _group(name: str, official: Split | None) -> tuple[str | None, Split]:
    """The article of a figure, or the folder of a volume, and the split."""
    study = article_of(name)
    return study, official or assign(study or name)


def _questions(
    table: Path, rows: Iterator[dict[str, str]], official: Split | None, find: _Finder
) -> Iterator[Item | Dropped]:
    def read() -> Iterator[Question | Dropped]:
        for number, row in enumerate(rows, 1):
            name = row.get("Figure_path") or row.get("image_path") or ""
            what, split = f"{table.name} row {number}: {name}", _group(name, official)[1]
            question = tidy(row.get("Question", row.get("question", MODALITY_REQUEST)))
            answer = tidy(row.get("Answer", row.get("answer")))
            if not name or name.endswith(".npy"):
                yield Dropped(what, "npy volume is not read" if name else "row without image", split)
                continue
            kind = "modality" if question == MODALITY_REQUEST else None
            yield Question(split, name, question, answer, what, yes_no(answer), kind)

    for found in by_image(read()):
        if isinstance(found, Dropped):
            yield found
            continue
        split, name, group = found
        image = find(name)
        if image is None:
            yield from (Dropped(q.row, "missing image", split) for q in group)
            continue
        yield Item(
            {
                "key": _key(table, name),
                "split": split,
                "study_id": _group(name, official)[0],
                "messages": question_messages(group),
                "metadata": {"table": table.name},
            },
            [image],
        )


def _captions(
    table: Path, rows: Iterator[dict[str, str]], official: Split | None, find: _Finder
) -> Iterator[Item | Dropped]:
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        name, caption = row["Figure_path"], tidy(row["Caption"])
        study, split = _group(name, official)
        image = find(name)
        why = "duplicate image" if name in seen else fault("Describe", caption)
        seen.add(name)
        if why or image is None:
            yield Dropped(f"{table.name} row {number}: {name}", why or "missing image", split)
            continue
        key = _key(table, name)
        fields = {"key": key, "split": split, "study_id": study, "messages": caption_messages(key, caption)}
        yield Item({**fields, "metadata": {"table": table.name}}, [image])


def _case_reports(
    table: Path, rows: Iterator[dict[str, str]], official: Split | None, find: _Finder
) -> Iterator[Item | Dropped]:
    """The context, then the images in the order of the report, then the question: nothing is cut or reordered."""
    for number, row in enumerate(rows, 1):
        article, what = row["PMC_id"], f"{table.name} row {number}: {row['PMC_id']}"
        split = official or assign(article or what)
        question, answer = tidy(row["question"]).removeprefix("Q:"), tidy(row["answer"]).removeprefix("A:").strip()
        try:
            figures = ast.literal_eval(row["img_ref"] or "[]")
        except (ValueError, SyntaxError):
            figures = None
        if not isinstance(figures, list) or not article:
            yield Dropped(what, "row without article or list of figures", split)
            continue
        found = [find(f"{article}_{figure}.jpg") for figure in figures]
        context = tidy(row["context"])
        why = fault(f"{context} {question.strip()}".strip(), answer)
        if why or None in found:
            yield Dropped(what, why or "missing image", split)
            continue
        start: list[dict[str, Any]] = [{"type": "text", "text": context}] if context else []
        turn = ask(question.strip(), images=len(found))
        yield Item(
            {
                "key": make_key(table.stem, article, str(number)),
                "split": split,
                "study_id": article,
                "messages": [{**turn, "content": start + turn["content"]}, {"role": "assistant", "content": answer}],
                "metadata": {"table": table.name},
            },
            [image for image in found if image is not None],
        )


def _studies(table: Path, official: Split | None, find: _Finder) -> Iterator[Item | Dropped]:
    """radiology_article_npy_{train,test}.json: indication, images, then findings and impression as the report."""
    for number, row in enumerate(read_json(table, HINT), 1):
        npy = str(row.get("npy_path") or "")
        names = [str(n) for n in row.get("image_path") or []]
        what = f"{table.name} entry {number}: {npy or (names or ['no image'])[0]}"
        study = str(Path(names[0]).parent) if names else npy
        case = Path(names[0]).parts[-3] if names and len(Path(names[0]).parts) > 2 else study  # case/series/file
        split = official or assign(case or what)
        report = {"findings": tidy(row.get("finding")), "impression": tidy(row.get("impression"))}
        report = {k: v for k, v in report.items() if v and v.lower() not in ("none", "null")}
        found = [find(name) for name in names]
        text = "\n".join(f"{k.capitalize()}: {v}" for k, v in report.items())
        history = " ".join(t for name in ("pat", "pre") if (t := tidy(row.get(name))) and t != "None")
        why = fault("report", text) if text else "no findings and no impression"
        if not why and (not found or None in found):
            why = "npy volume is not read" if npy and not any(found) else "missing image"
        if not why and IMAGE_MARK in history:
            why = f"text holds {IMAGE_MARK}"
        if why:
            yield Dropped(what, why, split)
            continue
        turn = ask(f"{history}\nReport these images.".strip(), images=len(found))
        yield Item(
            {
                "key": make_key(table.stem, str(number)),
                "split": split,
                "patient_id": case,
                "study_id": study,
                "messages": [turn, {"role": "assistant", "content": text}],
                "report": report,
                "metadata": {"table": table.name, "title": row.get("title"), "articles": row.get("articles")},
            },
            [image for image in found if image is not None],
        )


CONVERTER = Converter(
    name="radfm",
    license="unknown (varies; Radiopaedia needs its own)",
    help="RadFM's tables of questions, captions, case reports and studies.",
    items=items,
)
