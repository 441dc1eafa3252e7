"""CT-RATE (Hamamci et al. 2024): chest CT volumes with reports; slope and intercept come from its metadata table."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.report_text import choose_sections, report_messages, section_list, tidy
from data_prep.splits import assign
from data_prep.tables import labels as read_labels
from data_prep.tables import read_table
from medvlm.data.schema import Split
from medvlm.errors import UserError

TEXT = {
    "findings": "Findings_EN",
    "impression": "Impressions_EN",
    "indication": "ClinicalInformation_EN",
    "technique": "Technique_EN",
}
NOTHING = ("not given", "not given.", "none", "none.")
TABLES = {  # folder below dataset/, pattern; the releases write both "valid" and "validation"
    "reports": ("radiology_text_reports", "*{set}*reports*.csv"),
    "labels": ("multi_abnormality_labels", "*{set}*labels*.csv"),
    "metadata": ("metadata", "*{set}*metadata*.csv"),
}
_NAME = re.compile(r"(?P<scan>(?P<patient>(?:train|valid)_\d+)_[a-z]+)_(?P<number>\d+)\.nii(?:\.gz)?$")


def items(
    source: Path,
    *,
    reconstructions: Annotated[
        Literal["one", "all"],
        typer.Option(help="one: the lowest-numbered reconstruction of each scan; all: every one."),
    ] = "one",
    valid_as: Annotated[
        Literal["test", "validation"], typer.Option(help="The split that the published valid set becomes.")
    ] = "test",
    validation_share: Annotated[int, typer.Option(help="Per cent of train's patients that become validation.")] = 0,
    sections: Annotated[
        str, typer.Option(help="What the model learns to write, with commas between.")
    ] = "findings,impression",
    labels: Annotated[Literal["predicted", "none"], typer.Option(help="The 18 labels, or none.")] = "predicted",
    rescale: Annotated[
        Literal["metadata", "file"], typer.Option(help="Slope and intercept: of the table, or of each volume's header.")
    ] = "metadata",
    folders: Annotated[
        str, typer.Option(help="Folders of the train and the valid volumes below dataset/.")
    ] = "train,valid",
) -> Iterator[Item | Dropped]:
    """One sample per scan (or per reconstruction), in the order of the report tables.

    The reconstructions of a scan share one report and one patient. The published valid set becomes ``test``, for
    results are reported on it; a validation split can be taken from train, by patient.
    """
    wanted = section_list(sections)
    names = folders.split(",")
    if len(names) != 2 or not 0 <= validation_share < 100:
        raise UserError("folders: give two names, like train,valid; validation_share: from 0 to 99 per cent")
    root = source / "dataset" if (source / "dataset").is_dir() else source
    for group, folder in zip(("train", "valid"), names, strict=True):
        reports = _table(root, "reports", group)
        if reports is None and group == "valid":
            continue
        if reports is None:
            raise UserError(f"{root}: no radiology_text_reports/train_reports.csv; give the folder that holds dataset/")
        scales = _by_volume(root, "metadata", group) if rescale == "metadata" else None
        known = _by_volume(root, "labels", group) if labels == "predicted" else {}
        shares = (100 - validation_share, validation_share, 0)
        kept = _lowest(reports) if reconstructions == "one" else None
        seen: set[str] = set()
        for row in read_table(reports, ("VolumeName", *TEXT.values())):
            volume = row["VolumeName"]
            name = _NAME.search(volume)
            if name is None:
                yield Dropped(volume, "not a CT-RATE volume name")
                continue
            split: Split = valid_as if group == "valid" else assign(name["patient"], shares=shares)
            if volume in seen:
                yield Dropped(volume, "duplicate id", split)
                continue
            seen.add(volume)
            if kept is not None and kept[name["scan"]] != int(name["number"]):
                yield Dropped(volume, "other reconstruction of the scan", split)
                continue
            place = (root / folder / name["patient"] / name["scan"] / volume).relative_to(source).as_posix()
            yield _item(
                row, name, place, split, wanted, known.get(volume), None if scales is None else scales.get(volume, {})
            )


def _item(
    row: dict[str, Any],
    name: re.Match[str],
    place: str,
    split: Split,
    wanted: list[str],
    labels: dict[str, Any] | None,
    scale: dict[str, Any] | None,
) -> Item | Dropped:
    """``scale`` is the volume's row of the metadata table, {} where it has none, None where the header counts."""
    volume = row["VolumeName"]
    text = {section: _given(row[column]) for section, column in TEXT.items()}
    report = choose_sections(text, wanted)
    if not report:
        return Dropped(volume, "report without the chosen sections", split)
    options: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    if scale is not None:
        slope, intercept = _number(scale.get("RescaleSlope")), _number(scale.get("RescaleIntercept"))
        if slope is None or intercept is None or slope == 0:
            return Dropped(volume, "no slope and intercept in the metadata", split)
        options = {"slope": slope, "intercept": intercept}
        if spacing := _spacing(scale):  # the headers of some copies are placeholders
            options["spacing"], metadata = spacing, {"spacing_in_metadata": spacing}
    try:
        values = read_labels(labels or {}, [column for column in labels or {} if column != "VolumeName"])
    except ValueError as error:
        return Dropped(f"{volume} ({error})", "label out of range", split)
    context = {section: tidy(text[section], mask=None) for section in ("indication", "technique")}
    context = {section: body for section, body in context.items() if body}
    return Item(
        {
            "key": name["scan"] + "_" + name["number"],
            "split": split,
            "patient_id": name["patient"],
            "study_id": name["scan"],
            "messages": report_messages(report, 1, context.get("indication")),
            "report": report | context,
            "labels": values,
        },
        [Source(place, "nifti", image_id=volume, metadata=metadata, options=options)],
    )


def _table(root: Path, kind: str, group: str) -> Path | None:
    folder, pattern = TABLES[kind]
    found = [path for place in (root / folder, root) for path in sorted(place.glob(pattern.format(set=group)))]
    return found[0] if found else None


def _by_volume(root: Path, kind: str, group: str) -> dict[str, dict[str, Any]]:
    path = _table(root, kind, group)
    if path is None:
        mend = "--labels none" if kind == "labels" else "--rescale file, where the volumes' own headers are right"
        raise UserError(f"{root}: no {kind} table of {group} (in {TABLES[kind][0]}/); download it, or take {mend}")
    columns = () if kind == "labels" else ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
    rows = read_table(path, ("VolumeName", *columns))
    return {row["VolumeName"]: {c: row[c] for c in columns} if columns else row for row in rows}


def _lowest(reports: Path) -> dict[str, int]:
    """Scan -> the lowest number of its reconstructions."""
    lowest: dict[str, int] = {}
    for row in read_table(reports, ("VolumeName",)):
        if name := _NAME.search(row["VolumeName"]):
            lowest[name["scan"]] = min(int(name["number"]), lowest.get(name["scan"], 10**9))
    return lowest


def _given(text: str) -> str:
    return "" if text.strip().lower() in NOTHING else text


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _spacing(row: dict[str, Any]) -> list[float] | None:
    """[x, y, z] in mm from ``XYSpacing`` "[0.75, 0.75]" and ``ZSpacing``, or None where one of them is unreadable."""
    try:
        xy = json.loads(row["XYSpacing"])
    except (KeyError, ValueError):
        return None
    values = [_number(v) for v in (*(xy if isinstance(xy, list) else [xy]), row.get("ZSpacing"))]
    return [v for v in values if v] if len(values) == 3 and all(values) else None


CONVERTER = Converter(
    name="ct-rate",
    license="CC-BY-NC-SA-4.0",
    help="CT-RATE chest CT volumes with reports.",
    items=items,
    deep_tables=("dataset/*/*.csv",),
)
