"""``medvlm prepare deidentify``: clean DICOM files from a folder of DICOM files, each audited byte by byte."""

import json
import os
import secrets
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.deidentify_audit import WRITER, identifiers, leaks, walk
from data_prep.deidentify_rules import Pseudonyms, clean, engine_table, patient_of
from medvlm.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

KEY_VARIABLE = "MEDVLM_DEIDENTIFY_KEY"
# Text is part of the picture there (ultrasound, secondary captures, photographs), or the picture may show a face.
RISKY_MODALITIES = frozenset(["US", "IVUS", "OT", "SC", "XC", "ES", "GM", "OP", "HC", "DOC"])
# Written anew by the software that writes a file.
FILE_META = frozenset(
    [*WRITER, "FileMetaInformationGroupLength", "FileMetaInformationVersion", "MediaStorageSOPInstanceUID"]
)
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and its multi-frame kin .7.1 to .7.4


@dataclass
class Result:
    """What became of one file. ``written`` is the clean file, relative to the output, under a temporary name."""

    source: Path
    reason: str = ""  # why there is no clean file
    leak: bool = False
    part: Path | None = None
    target: Path | None = None
    patient: str = ""
    study: str = ""
    flags: list[str] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)


def load_key(key_file: Path | None, make_key: bool = False) -> bytes:
    """The secret key, from a file that only its owner can read or from the environment. Never printed or copied."""
    if key_file is None:
        value = os.environ.get(KEY_VARIABLE, "")
        if not value:
            raise UserError(f"--key-file: is missing (or set {KEY_VARIABLE}); --key-file KEY --make-key creates one")
        return value.encode()
    if make_key and not key_file.exists():
        handle = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    if not key_file.is_file():
        raise UserError(f"{key_file}: no such key file; --make-key creates it")
    if key_file.stat().st_mode & 0o077:
        raise UserError(f"{key_file}: others can read this key; run `chmod 600 {key_file}`")
    return key_file.read_bytes().strip()


def risk(dataset: "Dataset") -> str:
    """Why the pixels probably show text or a person, or ""."""
    modality = str(dataset.get("Modality") or "").strip().upper()
    if str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES":
        return "BurnedInAnnotation is YES"
    if modality in RISKY_MODALITIES:
        return f"modality {modality}: text is usually burnt into the pixels"
    if str(dataset.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE):
        return "secondary capture: the picture may be a screenshot"
    if any("SCREEN" in str(v).upper() for v in dataset.get("ImageType") or []):
        return "ImageType says screenshot"
    return ""


def read(path: Path) -> "Dataset":
    """A DICOM file with whole pixels. Raises UserError with a reason that repeats no value of the file."""
    import pydicom
    from pydicom.errors import InvalidDicomError
    from pydicom.pixels.utils import get_expected_length

    try:
        dataset = pydicom.dcmread(path)
        elements = sum(1 for _ in walk(dataset))  # parses every value, also those in sequences
    except InvalidDicomError:
        raise UserError("not a DICOM file") from None
    except Exception as error:  # pydicom raises many kinds for damaged files; its messages may repeat values
        raise UserError(f"unreadable DICOM ({type(error).__name__})") from None
    if not elements or "SOPInstanceUID" not in dataset or "StudyInstanceUID" not in dataset:
        raise UserError("no study or instance UID (a DICOMDIR?)")
    if "TransferSyntaxUID" not in getattr(dataset, "file_meta", {}):
        raise UserError("no transfer syntax in the file meta")
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise UserError("no pixels (a report, document or presentation state)")
    if "PixelData" in dataset and not dataset.file_meta.TransferSyntaxUID.is_compressed:
        try:
            short = len(dataset.PixelData) < get_expected_length(dataset)
        except (AttributeError, TypeError):
            raise UserError("image attributes are missing") from None
        if short:
            raise UserError("pixel data is truncated")
    return dataset


def deidentify_file(source: Path, out: Path, pseudonyms: Pseudonyms, keep_risky: bool = False) -> Result:
    """Clean one file to a temporary name beside its target, and grep the original's identifiers in its bytes."""
    result = Result(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings repeat values
            dataset = read(source)
            reason = risk(dataset)
            if reason and not keep_risky:
                raise UserError(reason)
            result.flags = [reason] if reason else []
            data = _clean(dataset, pseudonyms, result)
    except UserError as error:
        result.reason = str(error)
    except Exception as error:  # a file that the rules cannot clean is set aside like one that cannot be read
        result.reason = f"cannot be cleaned ({type(error).__name__})"
    else:
        result.target = Path(
            result.patient, result.study, str(dataset.SeriesInstanceUID), f"{dataset.SOPInstanceUID}.dcm"
        )
        if not result.leak:
            result.part = result.target.with_name(f".{pseudonyms.uid(str(source))}.part")
            (out / result.part).parent.mkdir(parents=True, exist_ok=True)
            (out / result.part).write_bytes(data)
    return result


def _clean(dataset: "Dataset", pseudonyms: Pseudonyms, result: Result) -> bytes:
    import io

    forbidden, before = identifiers(dataset), _census(dataset)
    patient = patient_of(dataset)
    clean(dataset, pseudonyms)
    if "SeriesInstanceUID" not in dataset:
        dataset.SeriesInstanceUID = pseudonyms.uid(f"series of {dataset.StudyInstanceUID}")
    result.patient, result.study = pseudonyms.patient(patient), str(dataset.StudyInstanceUID)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    found = leaks(forbidden, data, dataset.get("PixelData", b""), dataset)
    result.removed = before - _census(dataset)
    if found:
        result.leak, result.reason = True, f"the audit found the original's {', '.join(found)}"
    return data


def _census(dataset: "Dataset") -> Counter[str]:
    def name(element: Any) -> str:
        group = element.tag.group
        return "private" if group % 2 else "overlay or curve" if group & 0xFF00 in (0x5000, 0x6000) else element.keyword

    elements = (e for e in walk(dataset) if e.keyword not in FILE_META and e.value not in (None, "", b""))
    return Counter(name(e) or str(e.tag) for e in elements)


def deidentify(
    source: Path, out: Path, key: bytes, *, keep_risky: bool = False, workers: int | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """De-identify a file or a folder of files into ``out/PATIENT/STUDY/SERIES/INSTANCE.dcm``; returns the report.

    The report holds counts, ``set_aside`` and ``leaks`` ([source, reason], for the operator's eyes: source paths may
    name patients). The same source and key write the same bytes again. Raises UserError for wrong paths.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if out.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: must lie outside {source}, or originals and clean files would mix")
    engine_table()  # fails here, not once per file, where the engine is missing
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    report: dict[str, Any] = {"files": len(files), "written": 0, "duplicates": 0, "bytes": 0}
    patients, studies, removed = set(), set(), Counter[str]()
    lists: dict[str, list] = {"set_aside": [], "leaks": [], "flagged": []}
    targets: set[Path] = set()
    for result in _results(files, out, key, keep_risky, workers):
        size = _finish(result, out, targets, dry_run)
        if result.reason:
            if result.reason == "duplicate":
                report["duplicates"] += 1
            else:
                lists["leaks" if result.leak else "set_aside"].append([str(result.source), result.reason])
            continue
        report["written"] += 1
        report["bytes"] += size
        patients.add(result.patient)
        studies.add(result.study)
        removed += result.removed
        lists["flagged"] += [[str(result.target), flag] for flag in result.flags]
    report |= {"patients": len(patients), "studies": len(studies), "removed": dict(removed.most_common())}
    return {**report, **lists, "dry_run": dry_run}


def _results(files: list[Path], out: Path, key: bytes, keep_risky: bool, workers: int | None) -> Iterator[Result]:
    from rich.console import Console
    from rich.progress import track

    count = min(workers or os.cpu_count() or 1, len(files))
    shown = Console(stderr=True)
    describe = {"description": "de-identify", "total": len(files), "console": shown, "disable": not shown.is_terminal}
    if count <= 1:
        _start(out, key, keep_risky)
        yield from track(map(_work, files), **describe)  # type: ignore[arg-type]
        return
    with ProcessPoolExecutor(count, initializer=_start, initargs=(out, key, keep_risky)) as pool:
        yield from track(pool.map(_work, files, chunksize=8), **describe)  # type: ignore[arg-type]


_setting: dict[str, Any] = {}


def _start(out: Path, key: bytes, keep_risky: bool) -> None:
    _setting.update(out=out, pseudonyms=Pseudonyms(key), keep_risky=keep_risky)


def _work(source: Path) -> Result:
    return deidentify_file(source, **_setting)


def _finish(result: Result, out: Path, targets: set[Path], dry_run: bool) -> int:
    """Give the clean file its name, in the order of the sources; a refused file's earlier version is deleted."""
    if result.leak and result.target:
        (out / result.target).unlink(missing_ok=True)
    if result.part is None or result.target is None:
        return 0
    part, target = out / result.part, out / result.target
    size = part.stat().st_size
    if result.target in targets:
        same = dry_run or part.read_bytes() == target.read_bytes()
        result.reason = "duplicate" if same else "the same instance UID as another file, with other content"
    targets.add(result.target)
    if result.reason or dry_run:
        part.unlink()
    else:
        os.replace(part, target)
    return size


def prepare(
    source: Annotated[Path, typer.Argument(help="A folder of DICOM files (searched whole), or one file.")],
    out: Annotated[Path, typer.Argument(help="The folder for the clean files, outside SOURCE.")],
    key_file: Annotated[Path | None, typer.Option(help=f"File with the secret key; or set {KEY_VARIABLE}.")] = None,
    make_key: Annotated[bool, typer.Option(help="Create the key file (mode 0600) if it is not there.")] = False,
    keep_risky_modalities: Annotated[
        bool, typer.Option(help="Also write ultrasound, secondary captures, photographs and flagged burnt-in text.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Clean and audit, but write nothing.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Write de-identified copies of DICOM files and grep the originals' identifiers in their bytes.

    Exits with 1 if the audit refused a file. Text burnt into pixels, faces and rare descriptions stay your task.
    """
    if key_file is not None and key_file.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{key_file}: the key must not lie in the output folder")
    key = load_key(key_file, make_key)
    report = deidentify(source, out, key, keep_risky=keep_risky_modalities, workers=workers, dry_run=dry_run)
    print(json.dumps(report, indent=2)) if as_json else print_report(report)
    raise typer.Exit(1 if report["leaks"] else 0)


def print_report(report: dict[str, Any], limit: int = 20) -> None:
    """Totals, what was removed most often, and the files that were refused or set aside, with their reasons."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console()
    counts = ("files", "written", "duplicates", "patients", "studies")
    table = Table(*counts, "set aside", "refused by the audit", box=SIMPLE)
    table.add_row(*(str(report[name]) for name in counts), str(len(report["set_aside"])), str(len(report["leaks"])))
    console.print(table)
    reasons = Table("not written because", "files", box=SIMPLE)
    for reason, count in Counter(reason for _, reason in report["leaks"] + report["set_aside"]).most_common():
        reasons.add_row(reason, str(count))
    if reasons.row_count:
        console.print(reasons)
    removed = Table("removed or emptied most often", "times", box=SIMPLE)
    for name, count in list(report["removed"].items())[:limit]:
        removed.add_row(name, str(count))
    console.print(removed)
    for path, reason in (report["leaks"] + report["set_aside"] + report["flagged"])[:limit]:
        console.print(f"{path}: {reason}", markup=False, highlight=False, soft_wrap=True)
    hidden = len(report["leaks"]) + len(report["set_aside"]) + len(report["flagged"]) - limit
    if hidden > 0:
        console.print(f"and {hidden} more; --json lists all")
