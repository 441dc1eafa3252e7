"""Small trees in the layouts that archives are published in, for the tests of their converters. All text is made up."""

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from toy import png

from data_prep import chexpert, mimic_cxr
from data_prep.items import Dropped, Item


def write_csv(path: Path, rows: Sequence[dict[str, Any]], encoding: str = "utf-8") -> Path:
    """With the header of the first row; gzipped where the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_image(path: Path, seed: int = 0, size: int = 24) -> Path:
    """A small grey picture, PNG or JPEG by its name."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(png(seed, size))) as image:
        image.save(path)
    return path


def kept(found: list[Item | Dropped]) -> list[Item]:
    return [i for i in found if isinstance(i, Item)]


def dropped(found: list[Item | Dropped]) -> list[tuple[str, str]]:
    return [(d.what, d.reason) for d in found if isinstance(d, Dropped)]


def answers(item: Item) -> list[str]:
    """The text of the assistant's turns."""
    turns = [m["content"] for m in item.fields["messages"] if m["role"] == "assistant"]
    return [turn if isinstance(turn, str) else turn[0]["text"] for turn in turns]


def asked(item: Item) -> list[str]:
    turns = [m["content"] for m in item.fields["messages"] if m["role"] == "user"]
    return [turn if isinstance(turn, str) else turn[-1]["text"] for turn in turns]


PLAIN_REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 |
 INDICATION:  ___-year-old with cough, evaluate
 for pneumonia.
 |
 FINDINGS: |
 |
 The lungs are clear.  Compared to the study of ___, the heart is
 unchanged.  There is no effusion.
 |
 IMPRESSION: |
 |
 No acute disease.
""".replace("|", "")  # blank lines hold a space, headers end with one


class Mimic:
    """Builds a tree; ``add`` takes one study."""

    def __init__(self, root: Path, version: str = "2.0.0", reports: str = "files"):
        self.root, self.version, self.reports = root, version, reports
        self.split: list[dict[str, Any]] = []
        self.metadata: list[dict[str, Any]] = []
        self.labels: list[dict[str, Any]] = []

    def add(
        self,
        study: int,
        text: str | bytes | None,
        views: str = "PA",
        split: str = "train",
        when: str = "21800506 213014.531",
        **labels: str,
    ) -> None:
        date, time = when.split(" ")
        subject = 10000000 + study % 1000
        folder = f"p{str(subject)[:2]}/p{subject}"
        for n, view in enumerate(views.split()):
            dicom = f"{study:08d}-{n:08d}"
            ids = {"dicom_id": dicom, "study_id": study, "subject_id": subject}
            self.split.append({**ids, "split": split})
            self.metadata.append({**ids, "ViewPosition": "" if view == "-" else view, "Rows": 24})
            self.metadata[-1] |= {"StudyDate": date, "StudyTime": time}
            write_image(self.root / "files" / folder / f"s{study}" / f"{dicom}.jpg", n)
        if text is not None:
            path = self.root / self.reports / folder / f"s{study}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        values = {name: labels.get(name.replace(" ", "_"), "") for name in mimic_cxr.LABELS}
        self.labels.append({"subject_id": subject, "study_id": study, **values})

    def items(self, **options: Any) -> list:
        for name in ("chexpert", "negbio"):
            write_csv(self.root / f"mimic-cxr-{self.version}-{name}.csv.gz", self.labels)
        write_csv(self.root / f"mimic-cxr-{self.version}-split.csv.gz", self.split)
        write_csv(self.root / f"mimic-cxr-{self.version}-metadata.csv.gz", self.metadata)
        return list(mimic_cxr.items(self.root, **options))


CHEXPERT_ROW = {"Path": "", "Sex": "Female", "Age": "50", "Frontal/Lateral": "Frontal", "AP/PA": "AP"}


def chexpert_row(place: str, **values: Any) -> dict[str, Any]:
    row = {**CHEXPERT_ROW, "Path": f"CheXpert-v1.0-small/{place}", **dict.fromkeys(chexpert.NOUNS, "")}
    return {**row, **{name.replace("_", " "): value for name, value in values.items()}}


def iu_xml(uid: str, images: list[str] = (), **sections: str) -> str:
    parts = "".join(f'<AbstractText Label="{k.upper()}">{v}</AbstractText>' for k, v in sections.items())
    pictures = "".join(f'<parentImage id="{i}"><caption>PA</caption></parentImage>' for i in images)
    abstract = f"<MedlineCitation><Article><Abstract>{parts}</Abstract></Article></MedlineCitation>"
    return f'<eCitation><uId id="{uid}"/>{abstract}<MeSH><major>normal</major></MeSH>{pictures}</eCitation>'


def make_ct_rate(root: Path, volumes: list[str], **changes: dict[str, Any]) -> Path:
    """Tables as published, for the volumes named; ``changes``: volume -> cells that differ."""
    for group, word in (("train", "train"), ("valid", "validation")):
        rows = [v for v in volumes if v.startswith(group)]
        reports, labels, metadata = [], [], []
        for name in rows:
            file = f"{name}.nii.gz"
            cells = {"Findings_EN": "Clear lungs.", "Impressions_EN": "Normal.", "Technique_EN": "Non-contrast."}
            cells |= {"ClinicalInformation_EN": "Not given.", "RescaleSlope": "1", "RescaleIntercept": "-8192"}
            cells |= {"XYSpacing": "[0.75, 0.75]", "ZSpacing": "1.5", "Emphysema": "0", "Lung nodule": "1"}
            cells |= changes.get(name, {})
            take = ("ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
            reports.append({"VolumeName": file, **{c: cells[c] for c in take}})
            labels.append({"VolumeName": file, "Emphysema": cells["Emphysema"], "Lung nodule": cells["Lung nodule"]})
            take = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
            metadata.append({"VolumeName": file, "Manufacturer": "x", **{c: cells[c] for c in take}})
        if rows:
            base = root / "dataset"
            write_csv(base / "radiology_text_reports" / f"{word}_reports.csv", reports)
            write_csv(base / "multi_abnormality_labels" / f"{group}_predicted_labels.csv", labels)
            write_csv(base / "metadata" / f"{word}_metadata.csv", metadata)
    return root


def write_dicom(path: Path, **values: Any) -> Path:
    """A small DICOM picture; a name in capitals and a date that must never leave the file."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = values.get("SOPInstanceUID", "1.2.3")
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    pixels = np.random.default_rng(len(str(path))).integers(0, 4096, (24, 20), dtype=np.uint16)
    fields = {
        "PatientID": "MRN0042",
        "PatientName": "MUSTERMANN^ERIKA",
        "PatientBirthDate": "19511123",
        "StudyInstanceUID": "1.2.826.1",
        "SeriesInstanceUID": "1.2.826.1.1",
        "SOPInstanceUID": "1.2.826.1.1.1",
        "AccessionNumber": "ACC77",
        "Modality": "DX",
        "ViewPosition": "PA",
        "PatientSex": "F",
        "Rows": 24,
        "Columns": 20,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PixelData": pixels.tobytes(),
        **values,
    }
    for name, value in fields.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, uid: str, slices: int, **values: Any) -> None:
    for n in range(slices):
        write_dicom(
            folder / f"{uid.rsplit('.', 1)[-1]}-{n:03d}.dcm",
            SeriesInstanceUID=uid,
            SOPInstanceUID=f"{uid}.{n + 1}",
            Modality="CT",
            ImagePositionPatient=[0, 0, 2.5 * n],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[0.7, 0.7],
            RescaleSlope=1,
            RescaleIntercept=-1024,
            **values,
        )
