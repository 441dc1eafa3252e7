"""The headers of a folder of DICOM files: which pictures and series make up a study.

Of a header only ids are used, and they leave as keyed hashes; :func:`medvlm.data.dicom.metadata` chooses what else may
enter a shard.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.items import Dropped, Source

# What --dicom may name, and how a study is found by it.
JOINS = {"StudyInstanceUID": "study", "AccessionNumber": "accession", "PatientID": "patient"}
PICTURES = ("CR", "DX", "MG", "RG", "IO", "PX")
SERIES = ("CT", "MR", "PT")  # others (ultrasound, screenshots) often have text burnt in
TAGS = ["Modality", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID", "AccessionNumber"]
TAGS += ["NumberOfFrames", "ViewPosition", "PresentationIntentType"]


@dataclass
class Series:
    """``folders``: folder -> number of its slices in this series; ``frames``: of a multi-frame file, else 1."""

    modality: str
    first: str  # file
    folders: dict[str, int] = field(default_factory=dict)
    file: str = ""
    frames: int = 1

    @property
    def slices(self) -> int:
        return max(self.frames, sum(self.folders.values()))


@dataclass
class Study:
    uid: str
    patient: str
    accession: str
    place: str  # its first file
    pictures: list[Source] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    patients: set[str] = field(default_factory=set)


def studies_of(
    source: Path, join: str, skip: set[Path], min_slices: int, pseudonym: Callable[[str, str], str]
) -> Generator[Dropped, None, dict[str, list[Study]]]:
    """Yields what cannot be used; returns join value -> usable studies, in the order of their first files.

    The list is empty where all studies of a value were dropped.
    """
    studies: dict[str, Study] = {}
    in_folder: dict[str, set[str]] = defaultdict(set)  # several series may lie in one folder
    for path in _files(source, skip):
        name = path.relative_to(source).as_posix()
        header = _header(path)
        ids = {tag: str(header.get(tag) or "").strip() for tag in TAGS} if header is not None else {}
        if not all(ids.get(tag) for tag in ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality")):
            yield Dropped(name, "not a DICOM file" if header is None else "header lacks an id")
            continue
        uid = ids["StudyInstanceUID"]
        if ids["PresentationIntentType"].upper() == "FOR PROCESSING":  # the same exposure comes for presentation too
            yield Dropped(name, "raw image for processing")
            continue
        study = studies.setdefault(uid, Study(uid, ids["PatientID"], ids["AccessionNumber"], name))
        study.patients.add(ids["PatientID"])
        folder = path.parent.relative_to(source).as_posix()
        in_folder[folder].add(ids["SeriesInstanceUID"])
        _add(study, ids, name, folder, pseudonym)
    found: dict[str, list[Study]] = defaultdict(list)
    for study in studies.values():
        yield from _settle(study, in_folder, min_slices, pseudonym)
        value = {"study": study.uid, "accession": study.accession, "patient": study.patient}[join]
        usable = found[value] if value else []
        if len(study.patients) > 1:
            yield Dropped(study.place, "study of two patients")
        elif not study.sources:
            yield Dropped(study.place, "study without a usable image")
        elif not value:
            yield Dropped(study.place, "header lacks an id")
        else:
            usable.append(study)
    return dict(found)


def _add(study: Study, ids: dict[str, str], name: str, folder: str, pseudonym: Callable[[str, str], str]) -> None:
    modality, frames = ids["Modality"].upper(), int(ids["NumberOfFrames"] or 1)
    if modality in PICTURES:
        image_id = pseudonym("image", ids["SOPInstanceUID"] or name)
        study.pictures.append(Source(name, "dicom", image_id=image_id, view=_view(ids["ViewPosition"])))
        return
    series = study.series.setdefault(ids["SeriesInstanceUID"], Series(modality, name))
    series.folders[folder] = series.folders.get(folder, 0) + 1
    if frames > series.frames:
        series.file, series.frames = name, frames


def _settle(
    study: Study, in_folder: dict[str, set[str]], min_slices: int, pseudonym: Callable[[str, str], str]
) -> Generator[Dropped, None, None]:
    """Fills ``study.sources``; yields the series that are left out."""
    study.sources = list(study.pictures)
    for uid, series in study.series.items():
        place = series.file or next(iter(series.folders))
        what = place if series.file or len(in_folder[place]) == 1 else series.first  # a folder of many tells nothing
        if series.modality not in SERIES:
            yield Dropped(what, "modality not taken")
        elif series.slices < min_slices:
            yield Dropped(what, "series with few slices")
        elif len(series.folders) > 1 or (series.file and sum(series.folders.values()) > 1):
            yield Dropped(what, "series in several folders or files of frames")
        else:
            shared = not series.file and len(in_folder[place]) > 1
            options: dict[str, Any] = {"series_uid": uid} if shared else {}
            study.sources.append(Source(place, "series", image_id=pseudonym("image", uid), options=options))


def _files(source: Path, skip: set[Path]) -> Generator[Path, None, None]:
    """All files below, sorted, but hidden ones, DICOMDIR, and those in ``skip``."""
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and name != "DICOMDIR" and path.resolve() not in skip:
                yield path


def _header(path: Path) -> Any:
    """The tags of TAGS, or None where the file is not DICOM."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
    except (InvalidDicomError, OSError, EOFError, ValueError, AttributeError, NotImplementedError):
        return None


def _view(text: str) -> str | None:
    from medvlm.data.dicom_codes import CODES

    return text.upper() if text.upper() in CODES["view_position"][1].split() else None
