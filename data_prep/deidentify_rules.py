"""What a de-identified DICOM file keeps: Kitware's dicom-anonymizer (the PS3.15 table), then our own stricter rules.

The engine alone leaves an overlay's description and file-meta titles, makes one patient of all patients, and does not
enter nested sequences; the rules below close that and turn the rest around: text is dropped unless it is allowed.
"""

import hashlib
import hmac
import re
from collections.abc import Callable
from datetime import date, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from medvlm.data.dicom_codes import CODES
from medvlm.data.phi import scan
from medvlm.errors import UserError

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

METHOD = "PS3.15 table, text by allow-list, keyed ids, shifted dates"
AGE_CAP = 90
MAX_SHIFT_DAYS = 3650
TEXT_VRS = frozenset(["AE", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UN", "UR", "UT"])
BINARY_VRS = frozenset(["OB", "OD", "OF", "OL", "OV", "OW"])
CODE = ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")
KEPT_TEXT = frozenset(
    [
        *("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "ConvolutionKernel", "FilterType", *CODE),
        *("LUTExplanation", "ModalityLUTType", "RescaleType", "WindowCenterWidthExplanation"),
        *("SequenceName", "ReceiveCoilName"),
    ]
)
# type 2: a reader expects them, with or without a value
EMPTIED = frozenset(["AccessionNumber", "ReferringPhysicianName", "StudyID", "PatientBirthDate", "StudyTime"])
SHIFTED_DATES = frozenset(
    [
        *("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime", "ContentDateTime"),
        *("FrameAcquisitionDateTime", "FrameReferenceDateTime"),
    ]
)
KEPT_BINARY = re.compile(
    r"(Float|DoubleFloat)?PixelData|ExtendedOffsetTable(Lengths)?|.*PaletteColorLookupTable.*|LUTData"
)
KEPT_UIDS = frozenset(
    ["SOPClassUID", "ReferencedSOPClassUID", "CodingSchemeUID", "ContextUID", "MappingResourceUID", "TransferSyntaxUID"]
)
REFERENCES = frozenset(["ReferencedImageSequence", "SourceImageSequence"])
STANDARD_CODES = frozenset(["DCM", "SCT", "SRT", "SNM3", "LN", "UCUM", "RADLEX", "FMA", "NCIt"])
DROPPED_GROUPS = (0x5000, 0x6000)  # curves and overlays, each with their repeats up to xxFE


class Pseudonyms:
    """Keyed HMAC-SHA256: the same key gives the same ids, UIDs and date shifts on any machine and in any part."""

    def __init__(self, key: bytes):
        if len(key) < 16:
            raise UserError("key: is shorter than 16 bytes and could be guessed; make one with --make-key")
        self._key = key

    def _number(self, purpose: str, value: str) -> int:
        return int.from_bytes(hmac.new(self._key, f"{purpose}\0{value}".encode(), hashlib.sha256).digest(), "big")

    def patient(self, patient: str) -> str:
        """``P`` and 16 hexadecimal digits."""
        return f"P{self._number('patient', patient) % 2**64:016X}"

    def uid(self, uid: str) -> str:
        """A UID under 2.25 (ISO/IEC 9834-8), at most 44 characters."""
        return f"2.25.{self._number('uid', uid) % 2**128}"

    def shift(self, patient: str) -> timedelta:
        """1 to 3650 whole days into the past, the same for all studies of a patient."""
        return timedelta(days=-1 - self._number("date", patient) % MAX_SHIFT_DAYS)


def patient_of(dataset: "Dataset") -> str:
    """What tells patients apart: PatientID, or the study where it is empty (then each study is a patient)."""
    patient = str(dataset.get("PatientID") or "").strip()
    return f"id\0{patient}" if patient else f"study\0{dataset.get('StudyInstanceUID', '')}"


@cache
def engine_table() -> dict[tuple[int, ...], Callable]:
    """dicom-anonymizer's actions (PS3.15 2024b) without those that our rules take over: UIDs, dates, the patient."""
    try:
        from dicomanonymizer import simpledicomanonymizer as engine
    except ImportError:
        raise UserError("dicom-anonymizer: is not installed; pip install 'medvlm[prep]'") from None
    from pydicom.datadict import dictionary_VR, keyword_for_tag

    ours = (
        SHIFTED_DATES | REFERENCES | {"PatientAge", "PatientSex", "PatientID", "PatientName", "PatientIdentityRemoved"}
    )
    table = {}
    for tag, action in engine.initialize_actions_2024b().items():
        if len(tag) > 2 or keyword_for_tag(tag) in ours or tag[0] == 0x0002:
            continue  # repeating groups are dropped whole, the file meta is written anew
        try:
            vr = dictionary_VR(tag)
        except KeyError:  # a retired tag that pydicom does not know
            vr = "SQ"
        if vr != "UI":
            table[tag] = engine.delete if vr == "SQ" else action
    return table


def clean(dataset: "Dataset", pseudonyms: Pseudonyms) -> None:
    """Clean a DICOM data set in place, nested sequences included. Raises UserError where it cannot be made clean."""
    patient, age, sex = patient_of(dataset), capped_age(dataset), str(dataset.get("PatientSex") or "").strip().upper()
    overlays_in_pixels(dataset)
    for rule in (drop_groups, standard_table, drop_text, drop_codes, drop_binary):
        each_level(dataset, rule)
    each_level(dataset, lambda level: shift_dates(level, pseudonyms.shift(patient)))
    each_level(dataset, lambda level: replace_uids(level, pseudonyms))
    dataset.PatientID = dataset.PatientName = pseudonyms.patient(patient)
    dataset.PatientSex = sex if sex in ("M", "F", "O") else ""
    if age:
        dataset.PatientAge = age
    dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", METHOD
    dataset.LongitudinalTemporalInformationModified = "MODIFIED"
    new_file_meta(dataset)


def each_level(dataset: "Dataset", rule: Callable[["Dataset"], None]) -> None:
    """Apply a rule to a data set and to every item of its sequences, the outermost first."""
    rule(dataset)
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                each_level(item, rule)


def standard_table(level: "Dataset") -> None:
    """The engine: what PS3.15 says about each tag, and every private tag dropped."""
    from dicomanonymizer.simpledicomanonymizer import anonymize_dataset

    table = engine_table()
    present = {(tag.group, tag.element) for tag in level.keys()}  # noqa: SIM118 -- iterating gives elements
    anonymize_dataset(level, base_rules_gen=lambda: {tag: table[tag] for tag in present if tag in table})


def drop_groups(level: "Dataset") -> None:
    """Curves, overlays, group 4 (DICOMDIR), digital signatures and trailing padding."""
    for tag in list(level.keys()):
        if tag.group & 0xFF00 in DROPPED_GROUPS or tag.group in (0x0004, 0x0400, 0xFFFC, 0xFFFA):
            del level[tag]


def drop_text(level: "Dataset") -> None:
    """Text stays only under an allowed tag and where it does not look like PHI; times of day and ages go."""
    scheme = str(level.get("CodingSchemeDesignator") or "")
    for element in list(level):
        if element.VR not in TEXT_VRS and element.VR != "AS":
            continue
        local = element.keyword in CODE and scheme not in STANDARD_CODES
        if element.keyword not in KEPT_TEXT or element.VR == "UN" or local or scan("; ".join(_values(element))):
            _drop(level, element)


TYPED = ("body_part", "view_position", "laterality")  # by people
LISTED = {keyword: frozenset(CODES[name][1].split()) for name in TYPED for keyword in CODES[name][0]}
CODE_STRING = re.compile(r"[A-Z0-9_ ]{0,16}")


def drop_codes(level: "Dataset") -> None:
    """A code string stays only if it is one, and BodyPartExamined, ViewPosition and Laterality, which people type, only
    if it is one of the standard's. It is written in upper case."""
    for element in list(level):
        if element.VR == "CS":
            values = [value.strip().upper() for value in _values(element)]
            known = LISTED.get(element.keyword)
            if all(value in known if known else CODE_STRING.fullmatch(value) for value in values if value):
                element.value = values if len(values) > 1 else values[0]
            elif element.keyword != "SpecificCharacterSet":
                _drop(level, element)


def drop_binary(level: "Dataset") -> None:
    """Binary values stay only where they are pixels or look-up tables; an icon is a picture of the picture."""
    for element in list(level):
        binary = element.VR in BINARY_VRS and not KEPT_BINARY.fullmatch(element.keyword)
        if binary or element.keyword == "IconImageSequence":
            _drop(level, element)


def shift_dates(level: "Dataset", shift: timedelta) -> None:
    """Study, series, acquisition and content dates move by whole days and lose their time; other dates go."""
    for element in list(level):
        if element.VR not in ("DA", "DT"):
            continue
        shifted = [_shifted(value, shift) for value in _values(element)]
        if element.keyword in SHIFTED_DATES and all(shifted):
            element.value = shifted if len(shifted) > 1 else shifted[0]
        else:
            _drop(level, element)


def replace_uids(level: "Dataset", pseudonyms: Pseudonyms) -> None:
    """Every UID that the standard does not define is hashed, wherever it stands, so that references still agree."""
    from pydicom.uid import UID_dictionary

    def new(uid: str) -> str:
        return uid if uid in UID_dictionary or not uid else pseudonyms.uid(uid)

    for element in level:
        if element.VR == "UI" and element.keyword not in KEPT_UIDS:
            values = [new(value) for value in _values(element)]
            element.value = values if len(values) > 1 else values[0]


def capped_age(dataset: "Dataset") -> str:
    """PatientAge such as ``045Y`` or ``003M``, from the birth date where it is missing; ``090Y`` from 90 years on."""
    age = str(dataset.get("PatientAge") or "").strip()
    born, seen = (_date(str(dataset.get(name) or "")) for name in ("PatientBirthDate", "StudyDate"))
    years = None
    if born and seen and seen >= born:
        years = seen.year - born.year - ((seen.month, seen.day) < (born.month, born.day))
    match = re.fullmatch(r"(\d{1,4})([DWMY])", age)
    if match:
        stated = int(match[1]) // {"D": 366, "W": 53, "M": 12, "Y": 1}[match[2]]
        if max(stated, years or 0) < AGE_CAP and len(match[1]) < 4:
            return f"{int(match[1]):03d}{match[2]}"
        years = max(stated, years or 0)
    return "" if years is None else f"{min(years, AGE_CAP):03d}Y"


def overlays_in_pixels(dataset: "Dataset") -> None:
    """Clear the unused bits of native pixels where an old overlay says that it is drawn in them."""
    import numpy as np

    embedded = [t for t in dataset.keys() if t.group & 0xFF00 == 0x6000 and t.element == 0x0102]  # noqa: SIM118
    if "PixelData" not in dataset or not any(int(dataset[t].value or 0) > 0 for t in embedded):
        return
    syntax = dataset.file_meta.TransferSyntaxUID
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if syntax.is_compressed or allocated != 16 or int(dataset.get("HighBit", stored - 1)) != stored - 1:
        raise UserError("an overlay is drawn into the pixels in a form that cannot be cleared")
    order = "<" if syntax.is_little_endian else ">"
    pixels = np.frombuffer(dataset.PixelData, f"{order}{'i' if dataset.PixelRepresentation else 'u'}2")
    unused = 16 - stored
    dataset.PixelData = ((pixels << unused) >> unused).astype(pixels.dtype).tobytes()  # sign bits are extended


def new_file_meta(dataset: "Dataset") -> None:
    """A file meta of the four needed elements: no titles of the sending devices, no private information."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta, syntax = FileMetaDataset(), dataset.file_meta.TransferSyntaxUID
    # a deflated file would hide its text from the audit
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_deflated else syntax
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    dataset.file_meta = meta
    dataset.preamble = bytes(128)


def _values(element: "DataElement") -> list[str]:
    return [str(value) for value in element.value] if element.VM > 1 else [str(element.value or "")]


def _drop(level: "Dataset", element: "DataElement") -> None:
    if element.keyword in EMPTIED:
        element.value = ""
    else:
        del level[element.tag]


def _date(value: str) -> date | None:
    match = re.match(r"(\d{4})[.-]?(\d\d)[.-]?(\d\d)", value)
    try:
        return date(*map(int, match.groups())) if match else None
    except ValueError:
        return None


def _shifted(value: str, shift: timedelta) -> str:
    """YYYYMMDD, or "" where the value is no whole date."""
    day: Any = _date(value)
    try:
        return (day + shift).strftime("%Y%m%d") if day else ""
    except OverflowError:
        return ""
