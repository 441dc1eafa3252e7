"""COVID-19 image data collection (Cohen et al. 2020, arXiv:2006.11988): radiographs with case notes and a diagnosis.

The release is ``metadata.csv`` and ``images/``; a collection with a column ``image`` (a path) is read as well. Notes
are those of the case, not radiology reports: they tell history and course, and may speak of other images.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.questions import Encoding, inside, make_key, tidy
from data_prep.splits import assign
from data_prep.tables import read_table

HINT = "give the folder of the collection, with metadata.csv and the images"
COLUMNS = ("patientid", "offset", "sex", "age", "finding", "view", "modality", "filename", "license", "clinical_notes")
VIEWS = {"L": "LATERAL", "AP Supine": "AP", "AP Erect": "AP"}
COVID, UNKNOWN = "COVID-19", ("", "todo", "unknown")
TABLE_LICENSE = "metadata CC BY-NC-SA 4.0"


Row = dict[str, Any]


def items(
    source: Path,
    *,
    modality: Annotated[Literal["X-ray", "CT", "all"], typer.Option(help="CT are single slices.")] = "X-ray",
    originals: Annotated[bool, typer.Option(help="Take the file in originals/ where there is one.")] = False,
    notes: Annotated[bool, typer.Option(help="Keep the case notes, or images with diagnoses alone.")] = True,
    encoding: Encoding = "utf-8",
) -> Iterator[Item | Dropped]:
    """One sample per image, a lateral with its frontal; a hash of the patient decides the split (80/10/10).

    A lateral belongs to the first frontal of the same patient, day and notes.

    The notes are ``report["notes"]``; there is no conversation, for they answer no question about the image. Of the
    diagnoses, ``labels`` has those that are made as 1, and COVID-19 as 0 where it is not among them.
    """
    cases: dict[tuple[str, ...], list[Row]] = {}
    seen: set[str] = set()
    for number, row in enumerate(read_table(source / "metadata.csv", COLUMNS, hint=HINT, encoding=encoding), 1):
        patient, name = _text(row["patientid"]), row["filename"]
        what = f"row {number}: {name}"
        if not patient:
            yield Dropped(what, "no patient id")
            continue
        row["split"] = assign(patient)
        row["path"] = next((p for p in _places(row, originals) if inside(source, p)), "")
        if why := _fault(row, modality, notes) or ("duplicate image" if name in seen else ""):
            yield Dropped(what, why, row["split"])
            continue
        seen.add(name)
        case = (patient, _text(row["offset"]), row["modality"], row["clinical_notes"])
        cases.setdefault(case, []).append(row)
    for rows in cases.values():
        frontal, lateral = ([r for r in rows if (r["view"] == "L") == side] for side in (False, True))
        for n, row in enumerate(frontal or lateral):
            yield _item([row, *lateral] if frontal and n == 0 else [row], notes)


def _fault(row: Row, modality: str, notes: bool) -> str:
    """Why a row cannot become a sample, or part of one; "" where it can."""
    if modality not in ("all", row["modality"]):
        return "other modality"
    if not row["path"]:
        return "missing image"
    return "" if (notes and row["clinical_notes"]) or _diagnoses(row) else "neither notes nor a diagnosis"


def _item(rows: Sequence[Row], notes: bool) -> Item:
    row = rows[0]
    found = _diagnoses(row)
    text = tidy(row["clinical_notes"]) if notes else ""
    metadata: dict[str, Any] = {"modality": row["modality"], "finding": row["finding"]}
    if row["sex"] in ("F", "M"):
        metadata["sex"] = row["sex"]
    if re.fullmatch(r"\d+(?:\.\d+)?", _text(row["age"])):
        metadata["age"] = min(90, int(float(row["age"])))
    # The licences ask for credit. Dates, places and the names of those who sent the case are left out.
    metadata |= {name: row[name] for name in ("doi", "url") if row.get(name)}
    licenses = dict.fromkeys(r["license"] or "unknown" for r in rows)
    key = make_key(Path(row["filename"]).stem)
    images = [
        Source(r["path"], image_id=r["filename"], view=VIEWS.get(r["view"], r["view"].upper()), metadata=_position(r))
        for r in rows
    ]
    return Item(
        {
            "key": key,
            "split": row["split"],
            "patient_id": _text(row["patientid"]),
            "study_id": key,
            "license": "; ".join([*licenses, TABLE_LICENSE]),
            "report": {"notes": text} if text else {},
            "labels": {COVID: 0, **dict.fromkeys(found, 1)} if found else {},
            "metadata": metadata,
        },
        images,
    )


def _places(row: Row, originals: bool) -> list[str]:
    """Where the image of a row may lie, best first."""
    places = [row["image"]] if row.get("image") else []
    places.append(f"{row.get('folder') or 'images'}/{row['filename']}")
    return [f"originals/{row['filename']}", *places] if originals else places


def _diagnoses(row: Row) -> list[str]:
    """``Pneumonia/Viral/COVID-19, ARDS`` -> its four words; none of what is not known."""
    words = (word.strip() for word in re.split(r"[/,]", row["finding"]))
    return [word for word in dict.fromkeys(words) if word.lower() not in UNKNOWN]


def _position(row: Row) -> dict[str, Any]:
    return {"position": "supine"} if row["view"] == "AP Supine" else {}


def _text(value: Any) -> str:
    """A cell as text; 3.0 of a spreadsheet is 3."""
    return re.sub(r"\.0$", "", str(value).strip())


CONVERTER = Converter(
    name="covid-cxr",
    license=f"CC BY, CC BY-SA or CC BY-NC-SA by image; {TABLE_LICENSE}",
    help="COVID-19 image data collection: chest radiographs with case notes and diagnoses.",
    items=items,
)
