"""Folders of DICOM studies with a table of reports -> items."""

from pathlib import Path

import pytest
from archives import answers, dropped, kept, write_csv, write_dicom, write_series

from data_prep import generic
from data_prep.items import Dropped
from medvlm.errors import UserError


@pytest.fixture
def key(tmp_path) -> Path:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def export(tmp_path) -> Path:
    """A PACS export: two radiographs of one study, a CT in a folder with two series, an ultrasound, and stray files."""
    root = tmp_path / "export"
    write_dicom(root / "a" / "IM1", SOPInstanceUID="1.2.826.1.1.1")
    write_dicom(root / "a" / "IM2", SOPInstanceUID="1.2.826.1.1.2", ViewPosition="THE LEFT SIDE")
    ct = {"StudyInstanceUID": "1.2.826.2", "PatientID": "MRN0043", "AccessionNumber": "ACC78"}
    write_series(root / "b", "1.2.826.2.1", 9, **ct)
    write_series(root / "b", "1.2.826.2.2", 2, **ct)
    write_dicom(root / "c" / "us.dcm", **{**ct, "SeriesInstanceUID": "1.2.826.2.3", "Modality": "US"})
    write_dicom(root / "d" / "x.dcm", StudyInstanceUID="1.2.826.3", PatientID="MRN0044", AccessionNumber="ACC79")
    write_dicom(root / "e" / "x.dcm", StudyInstanceUID="1.2.826.4", PatientID="")
    write_dicom(root / "a" / "raw", SOPInstanceUID="1.2.826.1.1.3", PresentationIntentType="FOR PROCESSING")
    (root / "readme.txt").write_text("not an image")
    (root / "DICOMDIR").write_text("an index")
    return root


def test_studies_are_joined_to_their_reports_by_the_header(export, key, tmp_path):
    rows = [
        {"AccessionNumber": "ACC78", "report": "FINDINGS: Nodule.\nIMPRESSION: Follow up.", "labels_Nodule": "1"},
        {"AccessionNumber": "ACC77", "report": "Clear lungs.", "labels_Nodule": "0"},
        {"AccessionNumber": "ACC99", "report": "No images.", "labels_Nodule": ""},
        {"AccessionNumber": "ACC77", "report": "Again.", "labels_Nodule": ""},
        {"AccessionNumber": "ACC80", "report": "Cyst.", "labels_Nodule": ""},
    ]
    alone = {"StudyInstanceUID": "1.2.826.9", "PatientID": "MRN0049", "AccessionNumber": "ACC80", "Modality": "US"}
    write_dicom(export / "u" / "us.dcm", **alone)
    table = write_csv(tmp_path / "reports.csv", rows)
    found = list(generic.items(export, table=table, key_file=key, dicom="AccessionNumber"))
    ct, xray = kept(found)
    assert [(i.path, i.kind, i.view) for i in xray.images] == [("a/IM1", "dicom", "PA"), ("a/IM2", "dicom", None)]
    assert [(i.path, i.kind, i.options) for i in ct.images] == [("b", "series", {"series_uid": "1.2.826.2.1"})]
    assert answers(ct) == ["Findings: Nodule.\nImpression: Follow up."] and answers(xray) == ["Clear lungs."]
    assert (ct.fields["labels"], xray.fields["labels"]) == ({"Nodule": 1}, {"Nodule": 0})
    assert sorted(dropped(found)) == [
        ("a/raw", "raw image for processing"),
        ("b/2-000.dcm", "series with few slices"),
        ("c", "modality not taken"),
        ("d/x.dcm", "study without a row in the table"),
        ("e/x.dcm", "header lacks an id"),
        ("readme.txt", "not a DICOM file"),
        ("row 3", "no study in the folder"),
        ("row 4", "duplicate id"),
        ("row 5", "study was dropped"),
        ("u", "modality not taken"),
        ("u/us.dcm", "study without a usable image"),
    ]
    for item in (ct, xray):
        assert not any(word in repr(item.fields) for word in ("MRN", "ACC", "1.2.826", "MUSTERMANN", "1951"))
        assert not any(word in f"{i.image_id} {i.metadata}" for i in item.images for word in ("1.2.826", "MRN"))


def test_a_patient_has_one_split_whatever_joins_the_studies(export, key, tmp_path):
    by_study = write_csv(tmp_path / "a.csv", [{"uid": "1.2.826.1", "report": "Clear."}])
    (one,) = kept(
        list(generic.items(export, table=by_study, key_file=key, dicom="StudyInstanceUID", join_column="uid"))
    )
    by_patient = write_csv(tmp_path / "b.csv", [{"PatientID": "MRN0042", "report": "Clear."}])
    (two,) = kept(list(generic.items(export, table=by_patient, key_file=key, dicom="PatientID")))
    assert one.fields == two.fields and one.images == two.images


def test_studies_that_cannot_be_told_apart_are_dropped(export, key, tmp_path):
    write_dicom(export / "f" / "x.dcm", StudyInstanceUID="1.2.826.5", PatientID="MRN0044")
    write_dicom(export / "g" / "x.dcm", StudyInstanceUID="1.2.826.3", PatientID="MRN0042")
    rows = [{"PatientID": "MRN0044", "report": "Clear."}, {"PatientID": "MRN0042", "report": "Clear."}]
    write_dicom(export / "h" / "x.dcm", StudyInstanceUID="1.2.826.6", PatientID="MRN0042")
    found = list(generic.items(export, table=write_csv(tmp_path / "r.csv", rows), key_file=key, dicom="PatientID"))
    assert ("d/x.dcm", "study of two patients") in dropped(found)
    assert ("row 2", "several studies share the id") in dropped(found)
    assert [len(i.images) for i in kept(found)] == [1]
    with pytest.raises(UserError, match=r"has no column AccessionNumber to join .*--join-column"):
        list(generic.items(export, table=tmp_path / "r.csv", key_file=key, dicom="AccessionNumber"))


def test_the_table_inside_the_folder_is_not_an_image(export, key):
    (export / "readme.txt").unlink()
    write_csv(export / "reports.csv", [{"PatientID": "MRN0042", "report": "Clear."}])
    found = list(generic.items(export, key_file=key, dicom="PatientID"))
    assert "not a DICOM file" not in {d.reason for d in found if isinstance(d, Dropped)}
