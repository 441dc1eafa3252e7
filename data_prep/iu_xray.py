"""Indiana University chest X-rays (OpenI): XML reports; images by the id of ``parentImage``, never by their order."""

import json
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.items import Converter, Dropped, Item, Source, require
from data_prep.report_text import choose_sections, indication_of, report_messages, section_list
from data_prep.splits import assign
from medvlm.data.schema import Split
from medvlm.errors import UserError

ARCHIVE, FOLDER, IMAGES = "NLMCXR_reports.tgz", "ecgen-radiology", "NLMCXR_png"
PLACEHOLDER = "XXXX"
SPLIT_OF: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}


@dataclass
class Report:
    uid: str
    sections: dict[str, str] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    mesh: list[str] = field(default_factory=list)


def items(
    source: Path,
    *,
    images: Annotated[Path | None, typer.Option(help="Folder of the PNGs, where it is not SOURCE/NLMCXR_png.")] = None,
    annotation: Annotated[
        Path | None, typer.Option(help="R2Gen's annotation.json: its split, and only the studies in it.")
    ] = None,
    sections: Annotated[
        str, typer.Option(help="What the model learns to write, with commas between.")
    ] = "findings,impression",
    placeholders: Annotated[
        Literal["drop", "keep"], typer.Option(help="Sentences with XXXX, where words were removed: drop or keep them.")
    ] = "drop",
    without_images: Annotated[
        Literal["drop", "text"], typer.Option(help="Reports that have no image: drop them, or keep them as text alone.")
    ] = "drop",
) -> Iterator[Item | Dropped]:
    """One sample per report, by number. There is no official split: a hash of the report's id decides.

    The release does not say which reports are of one patient; that each is of its own is an assumption.
    """
    wanted = section_list(sections)
    folder = images or source / IMAGES
    if without_images == "drop":
        require(folder, f"unpack NLMCXR_png.tgz as {IMAGES}, or take the reports alone with --without-images text")
    split_of = _annotation(annotation) if annotation else None
    mask = PLACEHOLDER if placeholders == "drop" else None
    seen: set[str] = set()
    for name, report in sorted(_reports(source), key=_number):
        if report is None:
            yield Dropped(name, "unreadable report")
            continue
        if report.uid in seen:
            yield Dropped(f"{name} ({report.uid})", "duplicate id")
            continue
        seen.add(report.uid)
        if split_of is not None and report.uid not in split_of:
            yield Dropped(report.uid, "not in the annotation")
            continue
        split = assign(report.uid) if split_of is None else split_of[report.uid]
        if not any(report.sections.get(section) for section in wanted):
            yield Dropped(report.uid, "report without the chosen sections", split)
            continue
        target = choose_sections(report.sections, wanted, mask)
        paired = report.images if folder.is_dir() else []
        why = "only placeholder sentences" if not target else "no image" if not paired else ""
        if why and (why != "no image" or without_images == "drop"):
            yield Dropped(report.uid, why, split)
            continue
        yield _item(report, split, target, paired, folder, source)


def _item(report: Report, split: Split, target: dict[str, str], paired: list[str], folder: Path, source: Path) -> Item:
    indication = indication_of(report.sections, PLACEHOLDER)
    pictures = [Source(_relative(folder / f"{i}.png", source), image_id=i) for i in paired]
    return Item(
        {
            "key": report.uid,
            "split": split,
            "patient_id": report.uid,
            "study_id": report.uid,
            "messages": report_messages(target, len(pictures), indication),
            "report": target | ({"indication": indication} if indication else {}),
            "metadata": {"mesh": report.mesh},
        },
        pictures,
    )


def _reports(source: Path) -> Iterator[tuple[str, Report | None]]:
    """(file, parsed report or None where it is not one), from the folder of XML files or from the archive."""
    if (source / FOLDER).is_dir():
        for path in sorted((source / FOLDER).glob("*.xml")):
            yield path.name, _parse(path.read_bytes())
        return
    archive = require(source / ARCHIVE, f"give the folder that holds {ARCHIVE}, or the {FOLDER} unpacked from it")
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                handle = tar.extractfile(member) if member.isfile() and member.name.endswith(".xml") else None
                if handle is not None:
                    yield Path(member.name).name, _parse(handle.read())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{archive}: damaged archive ({error}); download it again") from None


def _parse(data: bytes) -> Report | None:
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError:
        return None
    uid = root.find("uId")
    if uid is None or not uid.get("id"):
        return None
    report = Report(uid.get("id", ""))
    for part in root.iter("AbstractText"):
        text = "".join(part.itertext()).strip()
        if text:
            report.sections[part.get("Label", "").lower()] = text
    report.images = list(dict.fromkeys(i.get("id", "") for i in root.iter("parentImage") if i.get("id")))
    report.mesh = [term.text.strip() for term in root.iter("major") if term.text]
    return report


def _number(entry: tuple[str, Report | None]) -> tuple[int, str]:
    digits = "".join(c for c in entry[0] if c.isdigit())
    return int(digits or 0), entry[0]


def _annotation(path: Path) -> dict[str, Split]:
    """Report id -> split. The ids of that file go on after the report's (``CXR12_IM-0345``), and it lists images by
    folder, not by parentImage: only its split is used."""
    try:
        table: dict[str, Any] = json.loads(require(path, "the split that was asked for").read_text(encoding="utf-8"))
        return {str(e["id"]).split("_")[0]: SPLIT_OF[name] for name in SPLIT_OF for e in table[name]}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not an annotation file; expected train, val and test, each a list with ids") from None


def _relative(path: Path, source: Path) -> str:
    return path.relative_to(source).as_posix() if path.is_relative_to(source) else str(path.absolute())


CONVERTER = Converter(
    name="iu-xray",
    license="CC-BY-NC-ND-4.0",
    help="Indiana University chest X-rays with reports (OpenI).",
    items=items,
)
