"""One's own archive: a table of images, text and ids; or DICOM studies with a table of reports (``generic_dicom``).

Ids here are those of real patients. None enters a shard: patient, study and image ids become keyed hashes, and the key
is a file of the owner's. With a known key, numbers could be found again by trying them all.
"""

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.generic_dicom import JOINS, studies_of
from data_prep.items import Converter, Dropped, Item, Kind, Source
from data_prep.questions import ask, yes_no
from data_prep.report_text import CORE, choose_sections, parse_report, report_messages
from data_prep.splits import assign
from data_prep.tables import SUFFIXES, column_names, read_table
from data_prep.tables import labels as read_labels
from medvlm.data.schema import Split
from medvlm.errors import UserError

DEFAULTS = {
    "image": "image",
    "text": "report",
    "findings": "findings",
    "impression": "impression",
    "indication": "indication",
    "question": "question",
    "answer": "answer",
    "patient": "patient_id",
    "study": "study_id",
    "split": "split",
}
SPLIT_OF: dict[str, Split] = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev"), "validation"),
    "test": "test",
}
Join = Literal["none", "StudyInstanceUID", "AccessionNumber", "PatientID"]


@dataclass(frozen=True)
class Layout:
    """``columns``: what -> name in this table, absent where the table lacks it; ``key`` makes the pseudonyms."""

    columns: dict[str, str]
    labels: list[str]
    prefix: str
    separator: str
    key: bytes
    unpaired: bool = False

    def pseudonym(self, kind: str, value: str) -> str:
        """16 hexadecimal digits of the keyed hash (HMAC-SHA256); the same id gives the same digits in every run."""
        return hmac.new(self.key, f"{kind}:{value}".encode(), hashlib.sha256).hexdigest()[:16]

    def cell(self, row: dict[str, Any], what: str) -> str:
        value = row.get(self.columns.get(what, ""), "")
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()

    def images(self, row: dict[str, Any]) -> list[str]:
        value = row.get(self.columns.get("image", ""), "")
        names = value if isinstance(value, list) else str(value).split(self.separator)
        return [str(name).strip() for name in names if str(name or "").strip()]

    def read_labels(self, row: dict[str, Any]) -> dict[str, int | None]:
        return {name.removeprefix(self.prefix): v for name, v in read_labels(row, self.labels).items()}


def items(
    source: Path,
    *,
    table: Annotated[
        Path | None, typer.Option(help=f"The table ({', '.join(SUFFIXES)}); else the only one in SOURCE.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Secret for the hashes of ids; or set MEDVLM_DEIDENTIFY_KEY. Keep it.")
    ] = None,
    make_key: Annotated[bool, typer.Option(help="Create the key file (mode 0600) if it is not there.")] = False,
    dicom: Annotated[
        Join, typer.Option(help="SOURCE holds DICOM studies: the header field that joins them to the table.")
    ] = "none",
    join_column: Annotated[
        str | None, typer.Option(help="The table's column for --dicom; else of the same name.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Image path(s), relative to SOURCE. Else: image.")] = None,
    separator: Annotated[str, typer.Option(help="Between several images in one cell.")] = ";",
    text_column: Annotated[str | None, typer.Option(help="Text of the report. Else: report.")] = None,
    findings_column: Annotated[str | None, typer.Option(help="Else: findings.")] = None,
    impression_column: Annotated[str | None, typer.Option(help="Else: impression.")] = None,
    indication_column: Annotated[str | None, typer.Option(help="Else: indication.")] = None,
    question_column: Annotated[str | None, typer.Option(help="Else: question.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Else: answer.")] = None,
    patient_column: Annotated[str | None, typer.Option(help="Else: patient_id.")] = None,
    study_column: Annotated[str | None, typer.Option(help="Else: study_id.")] = None,
    split_column: Annotated[
        str | None, typer.Option(help="train, validation or test. Else: split; else by hash.")
    ] = None,
    labels_prefix: Annotated[
        str, typer.Option(help="Columns that begin so are labels: 1, 0, -1 or blank.")
    ] = "labels_",
    encoding: Annotated[str, typer.Option(help="Of the table: utf-8, cp1252, utf-16, ...")] = "utf-8",
    min_slices: Annotated[int, typer.Option(help="DICOM series with fewer slices (scouts) are left out.")] = 8,
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="Keep images with labels and no text, and text without images.")
    ] = False,
) -> Iterator[Item | Dropped]:
    """One sample per row, in the table's order; then one per conversation: the rows that ask about the same images.

    A row needs text and images; with ``unpaired`` (for contrastive training) text, or images with a label, will do.
    """
    if not source.is_dir():
        raise UserError(
            f"{source}: is not a folder; give the folder of the images as SOURCE and the table with --table"
        )
    path = _table(source, table)
    given = {"image": image_column, "text": text_column, "findings": findings_column, "impression": impression_column}
    given |= {"indication": indication_column, "question": question_column, "answer": answer_column}
    given |= {"patient": patient_column, "study": study_column, "split": split_column}
    layout = _layout(path, given, labels_prefix, separator, _key(key_file, make_key), encoding, unpaired)
    rows = read_table(path, encoding=encoding)
    if dicom == "none":
        yield from _from_rows(rows, layout)
        return
    column = join_column or dicom
    if column not in column_names(path, encoding):
        raise UserError(f"{path}: has no column {column} to join with --dicom {dicom}; name it with --join-column")
    skip = {path.resolve(), key_file.resolve() if key_file else path.resolve()}
    yield from _from_studies(source, rows, layout, dicom, column, skip, min_slices)


def _from_rows(rows: Iterator[dict[str, Any]], layout: Layout) -> Iterator[Item | Dropped]:
    conversations: dict[tuple[str, ...], Item] = {}
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        what = f"row {number}"
        names, study, patient = layout.images(row), layout.cell(row, "study"), layout.cell(row, "patient")
        split = _split(row, layout, patient or study or ";".join(names) or what)
        question = layout.cell(row, "question")
        try:
            labels = layout.read_labels(row)
        except ValueError as error:
            yield Dropped(f"{what} ({error})", "label out of range", split)
            continue
        if "patient" in layout.columns and not patient:
            yield Dropped(what, "no patient id", split)
        elif split is None:
            yield Dropped(what, "unknown split")
        elif question and not layout.cell(row, "answer"):
            yield Dropped(what, "empty answer", split)
        elif question:
            fields = _fields(layout, f"row{number:08d}", study, patient, split, labels)
            item = Item({**fields, "messages": []}, _sources(layout, names))
            group = (patient, study, split, *names) if names or study else (what,)
            item = conversations.setdefault(group, item)
            answer = layout.cell(row, "answer")
            messages = item.fields["messages"]
            messages.append(ask(question, images=0 if messages else len(names)))
            turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            messages.append({**turn, "answer_type": yes_no(answer)})
        elif why := _lacks(report := _report(row, layout), bool(names), labels, layout.unpaired):
            yield Dropped(what, why, split)
        elif study and study in seen:
            yield Dropped(what, "duplicate id", split)
        else:
            seen.add(study)
            indication = layout.cell(row, "indication") or None
            fields = _fields(layout, f"row{number:08d}" if not study else "", study, patient, split, labels)
            yield _with_report(fields, _sources(layout, names), report, indication)
    yield from conversations.values()


def _from_studies(
    source: Path,
    rows: Iterator[dict[str, Any]],
    layout: Layout,
    dicom: str,
    column: str,
    skip: set[Path],
    min_slices: int,
) -> Iterator[Item | Dropped]:
    studies = yield from studies_of(source, JOINS[dicom], skip, min_slices, layout.pseudonym)
    used: set[str] = set()
    for number, row in enumerate(rows, 1):
        what, value = f"row {number}", str(row[column]).strip()
        found = studies.get(value)
        why = "no study in the folder" if found is None else "study was dropped" if not found else ""
        if found and len(found) > 1:
            why = "several studies share the id"
        if why or value in used:
            yield Dropped(what, why or "duplicate id")
            used.add(value)
            continue
        used.add(value)
        assert found
        study = found[0]
        split = _split(row, layout, study.patient)
        report = _report(row, layout)
        try:
            labels = layout.read_labels(row)
            why = "unknown split" if split is None else _lacks(report, True, labels, layout.unpaired)
        except ValueError as error:
            what, labels, why = f"{what} ({error})", {}, "label out of range"
        if why or split is None:
            yield Dropped(what, why, split)
            continue
        fields = _fields(layout, "", study.uid, study.patient, split, labels)
        yield _with_report(fields, study.sources, report, layout.cell(row, "indication") or None)
    for value, found in studies.items():
        for study in found if value not in used else ():
            yield Dropped(study.place, "study without a row in the table")


def _lacks(report: dict[str, str], has_images: bool, labels: dict[str, int | None], unpaired: bool) -> str:
    """What a row without question lacks; "" where it can be a sample. ``unpaired``: text or images with labels do."""
    if not report:
        labelled = unpaired and any(value is not None for value in labels.values())
        return "" if labelled and has_images else "no text and no label" if unpaired and has_images else "no text"
    return "" if has_images or unpaired else "no image"


def _with_report(fields: dict[str, Any], sources: list[Source], report: dict[str, str], indication: str | None) -> Item:
    context = {"indication": indication} if indication and report else {}  # alone it would pass for a report
    messages = report_messages(report, len(sources), indication)
    return Item({**fields, "messages": messages, "report": report | context}, sources)


def _fields(
    layout: Layout, key: str, study: str, patient: str, split: Split, labels: dict[str, int | None]
) -> dict[str, Any]:
    hashed = layout.pseudonym("study", study) if study else None
    return {
        "key": key or f"s{hashed}",
        "split": split,
        "patient_id": layout.pseudonym("patient", patient) if patient else None,
        "study_id": hashed,
        "labels": labels,
    }


def _split(row: dict[str, Any], layout: Layout, group: str) -> Split | None:
    """Of the table where it says one, else by the hash of the group; None for a word that is no split."""
    told = layout.cell(row, "split").lower()
    return SPLIT_OF.get(told) if told else assign(layout.pseudonym("patient", group))


def _report(row: dict[str, Any], layout: Layout) -> dict[str, str]:
    """Findings and impression of their columns or of the text's headers; a text without headers is one ``report``."""
    sections = {name: layout.cell(row, name) for name in CORE if layout.cell(row, name)}
    text = layout.cell(row, "text")
    if not sections and text:
        parsed = parse_report(text)
        sections = {name: parsed[name] for name in CORE if name in parsed} or {"report": text}
    return choose_sections(sections, sections)


def _sources(layout: Layout, names: list[str]) -> list[Source]:
    return [Source(name, _kind(name), image_id=layout.pseudonym("image", name)) for name in names]


def _kind(name: str) -> Kind:
    lower = name.lower()
    if lower.endswith((".nii", ".nii.gz")):
        return "nifti"
    if lower.endswith((".dcm", ".dicom")):
        return "dicom"
    return "image" if Path(lower).suffix else "series"


def _table(source: Path, given: Path | None) -> Path:
    if given is not None:
        return given if given.is_file() or not (source / given).is_file() else source / given
    found = sorted(p for p in source.iterdir() if p.name.lower().removesuffix(".gz").endswith(SUFFIXES))
    if len(found) != 1:
        raise UserError(f"{source}: holds {len(found)} tables ({', '.join(SUFFIXES)}); name one with --table")
    return found[0]


def _key(path: Path | None, make_key: bool) -> bytes:
    from data_prep.deidentify import load_key

    key = load_key(path, make_key)
    if len(key) < 16:
        raise UserError(f"key_file: the key has {len(key)} characters; 16 or more are needed, or ids could be guessed")
    return key


def _layout(
    path: Path,
    given: dict[str, str | None],
    prefix: str,
    separator: str,
    key: bytes,
    encoding: str,
    unpaired: bool,
) -> Layout:
    names = column_names(path, encoding)
    wrong = [name for name in given.values() if name is not None and name not in names]
    if wrong:
        raise UserError(f"{path}: has no column {', '.join(wrong)}; it has {', '.join(names)[:300]}")
    columns = {what: name or DEFAULTS[what] for what, name in given.items() if (name or DEFAULTS[what]) in names}
    texts = [what for what in ("text", *CORE, "question") if what in columns]
    labels = [name for name in names if prefix and name.startswith(prefix)]
    if not (texts or (unpaired and labels)) or ("question" in columns) != ("answer" in columns):
        need = "report, findings, impression, or both question and answer"
        raise UserError(f"{path}: has no text column ({need}); name yours with --text-column and the like")
    return Layout(columns, labels, prefix, separator, key, unpaired)


CONVERTER = Converter(
    name="generic",
    license="not stated (private archive)",
    help="A table of images and text, or DICOM studies with a table of reports; ids are hashed.",
    items=items,
    mask="mask",
)
