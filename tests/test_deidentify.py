"""De-identification of DICOM, proven on files in which every identifier carries a mark that no other byte has."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
import typer
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from data_prep import deidentify as command
from data_prep import deidentify_rules as rules
from data_prep.deidentify import deidentify, load_key
from data_prep.deidentify_rules import Pseudonyms, capped_age
from medvlm.errors import UserError

KEY = b"a secret of the hospital, 32 byte"
MARK = "Zqx"  # in every identifying text
DATES = ("20190312", "20190401", "20200115")
TEXT_TAGS = (
    *(
        "ReferringPhysicianName",
        "PerformingPhysicianName",
        "OperatorsName",
        "RequestingPhysician",
        "PatientMotherBirthName",
    ),
    *("NameOfPhysiciansReadingStudy", "OtherPatientNames", "PatientBirthName", "ResponsiblePerson"),
    *("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName", "DeviceSerialNumber"),
    *(
        "StudyDescription",
        "SeriesDescription",
        "ProtocolName",
        "ImageComments",
        "PatientComments",
        "AdditionalPatientHistory",
    ),
    *("AdmittingDiagnosesDescription", "DerivationDescription", "RequestedProcedureDescription", "Occupation"),
    *("PatientAddress", "PatientTelephoneNumbers", "OtherPatientIDs", "MilitaryRank", "BranchOfService", "EthnicGroup"),
    *("IssuerOfPatientID", "StudyComments", "RequestedProcedureID", "ScheduledProcedureStepDescription", "AdmissionID"),
    *("PerformedProcedureStepID", "RequestingService", "CurrentPatientLocation", "InsurancePlanIdentification"),
    *(
        "RegionOfResidence",
        "CountryOfResidence",
        "PatientReligiousPreference",
        "MedicalAlerts",
        "Allergies",
        "VisitComments",
    ),
)


def marked(patient: int, study: int, instance: int, **values: object) -> Dataset:
    """A CT image of patient Zqx<n> with marked PHI in all these places."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.2.826.77777.{patient}.{study}.{instance}"
    ds.StudyInstanceUID = f"1.2.826.77777.{patient}.{study}"
    ds.SeriesInstanceUID = f"{ds.StudyInstanceUID}.77"
    ds.FrameOfReferenceUID = f"1.2.826.77777.{patient}.{study}.99"
    ds.PatientName, ds.PatientID = f"{MARK}Smith{patient}^{MARK}Ann", f"{MARK}ID{patient}"
    ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = "19260102", "FMO"[patient], "093Y"
    ds.AccessionNumber, ds.StudyID = f"{MARK}ACC{study}", f"{MARK}ST{study}"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = DATES[study]
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = "101112"
    ds.AcquisitionDateTime = DATES[study] + "101112.123"
    ds.InstanceCreationDate, ds.DateOfLastCalibration = DATES[study], "20181224"
    ds.Modality, ds.BodyPartExamined, ds.Manufacturer, ds.ConvolutionKernel = "CT", "CHEST", "Acme", "B30f"
    ds.SeriesNumber, ds.InstanceNumber, ds.KVP = 1, instance, "120"
    for name in TEXT_TAGS:
        setattr(ds, name, f"{MARK}{name[:20]}"[:16])
    item = Dataset()
    item.PatientName, item.PatientID, item.StudyDate = f"{MARK}Nested^Name", f"{MARK}NESTED", DATES[study]
    item.PhysiciansOfRecord, item.ReferencedSOPInstanceUID = f"{MARK}Deep", ds.SOPInstanceUID
    item.add_new(0x00991001, "LO", f"{MARK}private in a sequence")
    outer = Dataset()
    outer.ReferencedSOPClassUID, outer.ReferencedSOPInstanceUID = CTImageStorage, ds.SOPInstanceUID
    outer.PurposeOfReferenceCodeSequence = Sequence([item])
    ds.ReferencedImageSequence = Sequence([outer])
    ds.RequestAttributesSequence = Sequence([item])
    ds.ContributingEquipmentSequence = Sequence([item])
    block = ds.private_block(0x0019, f"{MARK} private creator", create=True)
    block.add_new(0x01, "UN", f"{MARK} private bytes".encode())
    ds.add_new(0x60000022, "LO", f"{MARK} overlay description")
    ds.add_new(0x60001500, "LO", f"{MARK} overlay label")
    ds.add_new(0x60003000, "OW", bytes(8))
    ds.Rows = ds.Columns = 16
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelData = np.random.default_rng([patient, study, instance]).integers(0, 4096, (16, 16), np.uint16).tobytes()
    for name, value in values.items():
        setattr(ds, name, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if instance % 2 else ExplicitVRLittleEndian
    ds.file_meta.SourceApplicationEntityTitle = f"{MARK}AETITLE"
    ds.file_meta.PrivateInformationCreatorUID = "1.2.826.77777.5"
    ds.file_meta.PrivateInformation = f"{MARK} meta".encode()
    ds.preamble = f"{MARK} preamble".encode().ljust(128, b"\0")
    return ds


def write(folder: Path, *datasets: Dataset) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n, dataset in enumerate(datasets):
        dataset.save_as(folder / f"{MARK}{n}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """18 files: 3 patients, 3 studies each, 2 images each."""
    files = [marked(p, s, i) for p in range(3) for s in range(3) for i in range(2)]
    return write(tmp_path_factory.mktemp("archive") / "in", *files)


@pytest.fixture(scope="module")
def cleaned(archive) -> tuple[dict, Path]:
    out = archive.parent / "out"
    return deidentify(archive, out, KEY, workers=1), out


def files_of(out: Path) -> list[Path]:
    return sorted(out.rglob("*.dcm"))


def test_no_marked_byte_is_left_in_files_or_names(archive, cleaned):
    report, out = cleaned
    assert report["files"] == report["written"] == len(files_of(out)) == 18
    originals = b"".join(p.read_bytes() for p in archive.iterdir())
    assert originals.count(MARK.encode()) > 45 * 18
    for path in files_of(out):
        data = path.read_bytes()
        for secret in (MARK, "1.2.826.77777", "19260102", *DATES, "20181224", "101112"):
            assert secret.encode() not in data and secret not in str(path.relative_to(out)), secret
    assert [p for p in out.rglob("*") if p.is_file() and p.suffix != ".dcm"] == []


def test_patients_stay_apart_and_studies_keep_their_intervals(cleaned):
    report, out = cleaned
    assert (report["patients"], report["studies"]) == (3, 9)
    seen = {}
    for path in files_of(out):
        ds = pydicom.dcmread(path)
        assert path.relative_to(out).parts == (
            *(str(ds.PatientID), ds.StudyInstanceUID, ds.SeriesInstanceUID),
            f"{ds.SOPInstanceUID}.dcm",
        )
        assert ds.StudyDate == ds.SeriesDate == ds.ContentDate == ds.AcquisitionDateTime[:8]
        seen.setdefault(str(ds.PatientID), set()).add(
            np.datetime64(f"{ds.StudyDate[:4]}-{ds.StudyDate[4:6]}-{ds.StudyDate[6:]}")
        )
    firsts = {min(dates) for dates in seen.values()}
    assert len(seen) == len(firsts) == 3  # each patient has a shift of its own
    for dates in seen.values():
        first, second, third = sorted(dates)
        assert (int((second - first).astype(int)), int((third - first).astype(int))) == (20, 309)  # by calendar


def test_sex_age_and_pixels_stay(archive, cleaned):
    _, out = cleaned
    sexes = set()
    originals = {pydicom.dcmread(p).PixelData for p in archive.iterdir()}
    for path in files_of(out):
        ds = pydicom.dcmread(path)
        sexes.add(ds.PatientSex)
        assert ds.PatientAge == "090Y" and ds.PatientBirthDate == ""
        assert ds.PixelData in originals
        assert (ds.BodyPartExamined, ds.Manufacturer, ds.ConvolutionKernel, ds.KVP) == ("CHEST", "Acme", "B30f", 120)
        assert ds.PatientIdentityRemoved == "YES"
        assert ds.ReferencedImageSequence[0].ReferencedSOPInstanceUID == ds.SOPInstanceUID  # references still agree
    assert sexes == {"F", "M", "O"}


def test_same_key_gives_the_same_bytes_and_another_key_other_ids(archive, cleaned, tmp_path):
    report, out = cleaned
    again = deidentify(archive, tmp_path / "again", KEY, workers=2)
    assert again == report
    before = {p.relative_to(out): p.read_bytes() for p in files_of(out)}
    assert {p.relative_to(tmp_path / "again"): p.read_bytes() for p in files_of(tmp_path / "again")} == before
    deidentify(archive, out, KEY, workers=1)  # over itself
    assert {p.relative_to(out): p.read_bytes() for p in files_of(out)} == before
    one = sorted(archive.iterdir())[0]  # a part of the archive agrees with the whole
    deidentify(one, tmp_path / "part", KEY, workers=1)
    assert {p.relative_to(tmp_path / "part") for p in files_of(tmp_path / "part")} <= set(before)
    deidentify(one, tmp_path / "other", KEY[::-1], workers=1)
    assert not {p.relative_to(tmp_path / "other") for p in files_of(tmp_path / "other")} & set(before)


def nothing(*_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("switched_off", "field"),
    [
        (["drop_groups", "drop_text"], "tag (6000,1500)"),
        (["new_file_meta"], "SourceApplicationEntityTitle"),
        (["shift_dates"], "InstanceCreationDate"),
        (["replace_uids"], "StudyInstanceUID"),
        (["drop_text"], "PatientName"),
        (["standard_table", "drop_text"], "PatientAddress"),
        (["standard_table", "drop_binary", "drop_text"], "private tag"),
    ],
)
def test_the_audit_refuses_the_file_when_a_rule_is_missing(monkeypatch, tmp_path, switched_off, field):
    source = write(tmp_path / "in", marked(1, 1, 0))
    for name in switched_off:
        assert hasattr(rules, name)
        monkeypatch.setattr(rules, name, nothing)
    report = deidentify(source, tmp_path / "out", KEY, workers=1)
    assert report["written"] == 0 and files_of(tmp_path / "out") == []
    ((_, reason),) = report["leaks"]
    assert field in reason and MARK not in reason


def test_a_refused_file_loses_its_earlier_version_and_the_command_fails(monkeypatch, tmp_path, capsys):
    source = write(tmp_path / "in", marked(1, 1, 0))
    arguments = (source, tmp_path / "out", tmp_path / "key", True)
    with pytest.raises(typer.Exit) as done:
        command.prepare(*arguments, workers=1)
    assert done.value.exit_code == 0 and len(files_of(tmp_path / "out")) == 1
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(rules, "shift_dates", nothing)
    with pytest.raises(typer.Exit) as done:
        command.prepare(*arguments, workers=1)
    assert done.value.exit_code == 1 and files_of(tmp_path / "out") == []
    printed = capsys.readouterr()
    assert (tmp_path / "key").read_text().strip() not in printed.out + printed.err


def test_names_typed_into_code_strings_go(tmp_path):
    dataset = marked(0, 0, 0)
    dataset.BodyPartExamined, dataset.ViewPosition, dataset.Laterality = "SMITH JOHN", "PA", "L"
    deidentify(write(tmp_path / "in", dataset), tmp_path / "out", KEY, workers=1)
    [found] = [pydicom.dcmread(path) for path in files_of(tmp_path / "out")]
    assert "BodyPartExamined" not in found and (found.ViewPosition, found.Laterality) == ("PA", "L")


def test_text_in_pixel_data_is_found(tmp_path):
    ds = marked(1, 1, 0)
    ds.PixelData = ds.PixelData[:100] + str(ds.PatientID).encode() + ds.PixelData[100 + len(str(ds.PatientID)) :]
    report = deidentify(write(tmp_path / "in", ds), tmp_path / "out", KEY, workers=1)
    assert "PatientID (in the pixel data)" in report["leaks"][0][1]


def test_an_overlay_drawn_into_unused_bits_is_cleared(tmp_path):
    ds = marked(1, 1, 0)
    pixels = np.frombuffer(ds.PixelData, np.uint16)
    ds.PixelData = (pixels | 0x8000).tobytes()
    ds.add_new(0x60000100, "US", 16)
    ds.add_new(0x60000102, "US", 15)
    deidentify(write(tmp_path / "in", ds), tmp_path / "out", KEY, workers=1)
    (path,) = files_of(tmp_path / "out")
    assert np.array_equal(np.frombuffer(pydicom.dcmread(path).PixelData, np.uint16), pixels)


def test_risky_damaged_and_pixelless_files_are_set_aside_with_reasons(tmp_path):
    report_object = marked(1, 1, 3)
    del report_object.PixelData
    source = write(
        tmp_path / "in",
        marked(0, 0, 0),
        marked(1, 0, 0, Modality="US"),
        marked(1, 0, 1, BurnedInAnnotation="YES"),
        marked(1, 0, 2, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]),
        marked(1, 0, 3, SOPClassUID="1.2.840.10008.5.1.4.1.1.7"),
        report_object,
        marked(1, 1, 4, PixelData=bytes(100)),
    )
    (source / "notes.txt").write_text("not DICOM")
    whole = (source / f"{MARK}0.dcm").read_bytes()
    (source / "cut.dcm").write_bytes(whole[: len(whole) // 3])
    report = deidentify(source, tmp_path / "out", KEY, workers=1)
    reasons = {Path(path).name: reason for path, reason in report["set_aside"]}
    assert report["written"] == 1 and len(reasons) == 8 and not report["leaks"]
    expected = ("modality US", "BurnedInAnnotation", "screenshot", "secondary capture", "no pixels", "truncated")
    for n, words in enumerate(expected, 1):
        assert words in reasons[f"{MARK}{n}.dcm"]
    assert reasons["notes.txt"] == "not a DICOM file" and reasons["cut.dcm"]
    kept = deidentify(source, tmp_path / "kept", KEY, keep_risky=True, workers=1)
    assert kept["written"] == 5 and len(kept["flagged"]) == 4


def test_duplicates_are_counted_and_conflicting_instances_set_aside(tmp_path):
    other = marked(0, 0, 0)
    other.PixelData = bytes(512)
    source = write(tmp_path / "in", marked(0, 0, 0), marked(0, 0, 0), other)
    report = deidentify(source, tmp_path / "out", KEY, workers=1)
    assert (report["written"], report["duplicates"], len(report["set_aside"])) == (1, 1, 1)
    assert "same instance UID" in report["set_aside"][0][1]


def test_dry_run_writes_no_file(archive, tmp_path):
    report = deidentify(archive, tmp_path / "out", KEY, workers=1, dry_run=True)
    assert report["written"] == 18 and not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("age", "born", "expected"),
    [
        ("045Y", "", "045Y"),
        ("089Y", "", "089Y"),
        ("090Y", "", "090Y"),
        ("093Y", "", "090Y"),
        ("003M", "20181201", "003M"),
        ("", "19700313", "048Y"),  # a day before the birthday
        ("", "19700312", "049Y"),
        ("", "19100101", "090Y"),
        ("045Y", "19100101", "090Y"),  # of two, the one that tells more is capped
        ("about 93", "", ""),
        ("1200M", "", "090Y"),
    ],
)
def test_ages_are_capped_at_90(age, born, expected):
    ds = Dataset()
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    ds.add(pydicom.DataElement(0x00101010, "AS", age, validation_mode=pydicom.config.IGNORE))
    ds.PatientBirthDate, ds.StudyDate = born, "20190312"
    assert capped_age(ds) == expected


def test_without_a_patient_id_each_study_is_a_patient(tmp_path):
    source = write(
        tmp_path / "in", marked(0, 0, 0, PatientID=""), marked(0, 0, 1, PatientID=""), marked(0, 1, 0, PatientID="")
    )
    assert deidentify(source, tmp_path / "out", KEY, workers=1)["patients"] == 2


def test_pseudonyms_agree_with_hmac_by_hand():
    import hashlib
    import hmac

    digest = int.from_bytes(hmac.new(KEY, b"uid\x001.2.3", hashlib.sha256).digest(), "big")
    assert Pseudonyms(KEY).uid("1.2.3") == f"2.25.{digest % 2**128}"
    assert -3650 <= Pseudonyms(KEY).shift("x").days <= -1


def test_keys_and_folders_that_would_leak_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv(command.KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match="--key-file"):
        load_key(None)
    key = tmp_path / "key"
    key.write_text("0" * 32)
    key.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        load_key(key)
    key.chmod(0o600)
    assert load_key(key) == b"0" * 32
    with pytest.raises(UserError, match="shorter than 16"):
        Pseudonyms(b"short")
    with pytest.raises(UserError, match="must not lie in the output"):
        command.prepare(tmp_path / "in", tmp_path, key)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="must lie outside"):
        deidentify(tmp_path / "in", tmp_path / "in" / "out", KEY)
    monkeypatch.setenv(command.KEY_VARIABLE, "x" * 20)
    assert load_key(None) == b"x" * 20


def test_real_files_give_no_leak_that_another_reader_sees(test_data, tmp_path):
    """Every clean file of the real collection still decodes to the same pixels; what is refused has a reason."""
    report = deidentify(test_data / "dicom", tmp_path / "out", KEY, keep_risky=True, workers=1)
    assert report["written"] >= 20
    assert report["written"] + report["duplicates"] + len(report["set_aside"]) + len(report["leaks"]) == report["files"]
    assert all(reason for _, reason in report["set_aside"] + report["leaks"])
    pixels = {}
    for path in (test_data / "dicom").glob("*.dcm"):
        try:
            pixels[pydicom.dcmread(path).get("PixelData")] = path
        except Exception:  # damaged on purpose
            continue
    assert all(pydicom.dcmread(p).PixelData in pixels for p in files_of(tmp_path / "out"))
