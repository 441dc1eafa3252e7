"""MIMIC-CXR reports with the images, official split, views and labels of MIMIC-CXR-JPG (PhysioNet, versions 2.x).

Both need a credentialed PhysioNet account; neither their text nor their images may be passed on.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.report_text import (
    CORE,
    choose_sections,
    indication_of,
    parse_report,
    report_messages,
    section_list,
    tidy,
)
from data_prep.tables import labels as read_labels
from data_prep.tables import read_table
from medvlm.data.schema import Split
from medvlm.errors import UserError

Views = Literal["all", "frontal", "lateral"]
FRONTAL, LATERAL = ("PA", "AP"), ("LATERAL", "LL")
SPLIT_OF: dict[str, Split] = {"train": "train", "validate": "validation", "test": "test"}
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
REPORT_FOLDERS = ("files", "mimic-cxr-reports/files", ".")


@dataclass
class Study:
    subject: str
    split: str
    images: list[str] = field(default_factory=list)  # dicom ids
    trouble: str = ""


def items(
    source: Path,
    *,
    jpg: Annotated[Path | None, typer.Option(help="Root of MIMIC-CXR-JPG, where it is not SOURCE.")] = None,
    reports: Annotated[Path | None, typer.Option(help="Root of the MIMIC-CXR reports, where it is not SOURCE.")] = None,
    labels: Annotated[Literal["chexpert", "negbio", "none"], typer.Option(help="Which labeller's table.")] = "chexpert",
    views: Annotated[
        Views, typer.Option(help="frontal: PA and AP; lateral: LATERAL and LL; all: unknown ones too.")
    ] = "all",
    sections: Annotated[
        str, typer.Option(help="What the model learns to write, with commas between.")
    ] = "findings,impression",
    with_prior: Annotated[
        bool, typer.Option("--with-prior", help="Add an image of the patient's study before, with role: prior.")
    ] = False,
    last_paragraph: Annotated[
        bool, typer.Option(help="Use the last paragraph of reports that have neither findings nor impression.")
    ] = True,
    section_overrides: Annotated[
        Path | None,
        typer.Option(help="CSV study_id,section[,start,end]: take that section, or those characters, as the report."),
    ] = None,
) -> Iterator[Item | Dropped]:
    """One sample per study, in the order of subjects and studies, from SOURCE with reports and images in ``files/``."""
    wanted = section_list(sections)
    pictures, texts = Path(jpg or source), Path(reports or source)
    folder = _report_folder(texts)
    studies = _studies(pictures)
    position = _positions(pictures)
    table = {} if labels == "none" else _label_table(pictures, labels)
    overrides = _overrides(section_overrides)
    priors = _priors(pictures, studies, position, views) if with_prior else {}
    for number, study in sorted(studies.items(), key=lambda item: (item[1].subject, item[0])):
        split = SPLIT_OF.get(study.split)
        what = f"p{study.subject}/s{number}"
        if study.trouble or split is None:
            yield Dropped(what, study.trouble or "unknown split", split)
            continue
        chosen = _chosen(study.images, position, views)
        path = folder / f"p{study.subject[:2]}" / f"p{study.subject}" / f"s{number}.txt"
        known = table.get(number, ())
        why = "no image of the chosen views" if not chosen else "" if path.is_file() else "report missing"
        if why or isinstance(known, str):
            yield Dropped(f"{what} ({known})" if not why else what, why or "label out of range", split)
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield Dropped(what, "report is not UTF-8 text", split)
            continue
        parsed = parse_report(text)
        report, used = _targets(text, parsed, wanted, last_paragraph, overrides.get(number))
        if not report:
            yield Dropped(what, used, split)
            continue
        indication = indication_of(parsed)
        patient = pictures / "files" / f"p{study.subject[:2]}" / f"p{study.subject}"
        listed = [(number, dicom, "") for dicom in chosen]
        if number in priors:
            listed.append((*priors[number], "prior"))
        images = [
            Source(
                _relative(patient / f"s{where}" / f"{dicom}.jpg", source),
                image_id=dicom,
                view=position.get(dicom) or None,
                metadata={"role": role, "study_id": f"s{where}"} if role else {},
            )
            for where, dicom, role in listed
        ]
        yield Item(
            {
                "key": f"s{number}",
                "split": split,
                "patient_id": f"p{study.subject}",
                "study_id": f"s{number}",
                "messages": report_messages(report, len(images), indication),
                "report": report | ({"indication": indication} if indication else {}),
                "labels": dict(zip(LABELS, known, strict=True)) if known else {},
                "metadata": {"report_from": used, "addendum": "addendum" in parsed},
            },
            images,
        )


def _targets(
    text: str, parsed: dict[str, str], wanted: list[str], last_paragraph: bool, override: tuple[str, int, int] | None
) -> tuple[dict[str, str], str]:
    """The report's targets and where they are from; or {} and why there are none."""
    if override is not None:
        section, start, end = override
        body = tidy(text[start:end] if end else parsed.get(section, ""))
        return ({"report": body}, "override") if body else ({}, "no usable section")
    raw = {name: parsed[name] for name in wanted if name in parsed}
    if raw:
        report = choose_sections(raw, wanted)
        return (report, "sections") if report else ({}, "only masked sentences")
    if any(name in parsed for name in CORE):
        return {}, "chosen section missing"
    if last_paragraph and "last_paragraph" in parsed:
        body = tidy(parsed["last_paragraph"])
        return ({"report": body}, "last_paragraph") if body else ({}, "only masked sentences")
    return {}, "neither findings nor impression"


def _report_folder(root: Path) -> Path:
    """The folder that holds p10 ... p19 with reports below it."""
    for name in REPORT_FOLDERS:
        if next((root / name).glob("p1[0-9]/p*/s*.txt"), None):
            return root / name
    raise UserError(
        f"{root}: no report like files/p10/p10000000/s50000000.txt in it; unpack mimic-cxr-reports.zip of MIMIC-CXR "
        "(MIMIC-CXR-JPG has none), and name its folder with --reports"
    )


def _find(root: Path, name: str) -> Path:
    """``mimic-cxr-2.0.0-NAME.csv[.gz]``, of the newest version if there are several."""
    found = sorted(root.glob(f"mimic-cxr-2.*-{name}.csv*"))
    if not found:
        raise UserError(f"{root}: no mimic-cxr-2.x.x-{name}.csv.gz in it; give the root of MIMIC-CXR-JPG with --jpg")
    return found[-1]


def _studies(root: Path) -> dict[str, Study]:
    """Study -> its split and images; a study with contradictory rows carries its trouble."""
    studies: dict[str, Study] = {}
    seen: set[str] = set()
    for row in read_table(_find(root, "split"), ("dicom_id", "study_id", "subject_id", "split")):
        study = studies.setdefault(row["study_id"], Study(row["subject_id"], row["split"]))
        if row["dicom_id"] in seen:
            study.trouble = "duplicate image id"
        elif (study.subject, study.split) != (row["subject_id"], row["split"]):
            study.trouble = "study in two splits or of two patients"
        seen.add(row["dicom_id"])
        study.images.append(row["dicom_id"])
    return studies


def _positions(root: Path) -> dict[str, str]:
    columns = ("dicom_id", "ViewPosition")
    return {r["dicom_id"]: sys.intern(r["ViewPosition"]) for r in read_table(_find(root, "metadata"), columns)}


def _chosen(images: list[str], position: dict[str, str], views: Views) -> list[str]:
    """Frontal views first, then lateral, then the others; in each group by id."""
    rank = {name: n for n, name in enumerate((*FRONTAL, *LATERAL))}
    kept = {"frontal": FRONTAL, "lateral": LATERAL, "all": None}[views]
    chosen = [i for i in images if kept is None or position.get(i, "") in kept]
    return sorted(chosen, key=lambda i: (rank.get(position.get(i, ""), len(rank)), i))


def _priors(
    root: Path, studies: dict[str, Study], position: dict[str, str], views: Views
) -> dict[str, tuple[str, str]]:
    """Study -> the patient's last study before it with a frontal image (lateral if only these are taken), and that
    image. Dates are shifted, but alike for all studies of a patient."""
    when: dict[str, tuple[int, float]] = {}
    for row in read_table(path := _find(root, "metadata"), ("study_id", "StudyDate", "StudyTime")):
        if row["StudyDate"] and row["StudyTime"]:
            try:
                when[row["study_id"]] = (int(row["StudyDate"]), float(row["StudyTime"]))
            except ValueError:
                moment = f"{row['StudyDate']} {row['StudyTime']}"
                raise UserError(f"{path}: study {row['study_id']} has no date and time but {moment!r}") from None
    priors: dict[str, tuple[str, str]] = {}
    last: dict[str, list[tuple[tuple[int, float], str, str]]] = {}
    for number in sorted(when.keys() & studies.keys(), key=lambda n: (when[n], n)):
        study = studies[number]
        seen = last.setdefault(study.subject, [])
        earlier = [entry for entry in seen if entry[0] < when[number]]
        if earlier:
            priors[number] = earlier[-1][1:]
        images = _chosen(study.images, position, "lateral" if views == "lateral" else "frontal")
        if images and not study.trouble:
            seen.append((when[number], number, images[0]))
    return priors


def _label_table(root: Path, labeller: str) -> dict[str, tuple[int | None, ...] | str]:
    """Study -> the values of ``LABELS``, or the words for what is wrong with them."""
    table: dict[str, tuple[int | None, ...] | str] = {}
    for row in read_table(_find(root, labeller), ("study_id", *LABELS)):
        try:
            table[row["study_id"]] = tuple(read_labels(row, LABELS).values())
        except ValueError as error:
            table[row["study_id"]] = str(error)
    return table


def _overrides(path: Path | None) -> dict[str, tuple[str, int, int]]:
    """Study -> (section, start, end). Raises UserError for a row that gives neither a section nor two numbers."""
    table: dict[str, tuple[str, int, int]] = {}
    for n, row in enumerate(read_table(path, ("study_id", "section")) if path else (), 2):
        start, end = row.get("start", ""), row.get("end", "")
        if not (row["section"] or (start.isdigit() and end.isdigit())):
            raise UserError(f"{path}: row {n} needs a section, or start and end as character numbers")
        study = row["study_id"].removeprefix("s")
        table[study] = (row["section"].lower(), int(start or 0), int(end or 0))
    return table


def _relative(path: Path, source: Path) -> str:
    return path.relative_to(source).as_posix() if path.is_relative_to(source) else str(path.absolute())


CONVERTER = Converter(
    name="mimic-cxr",
    license="PhysioNet Credentialed Health Data License 1.5.0",
    help="MIMIC-CXR reports with MIMIC-CXR-JPG images, official split.",
    items=items,
)
