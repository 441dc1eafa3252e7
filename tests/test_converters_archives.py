"""IU X-ray, CT-RATE and one's own archives -> items; and the tables that they all read."""

import csv
import hashlib
import hmac
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from archives import answers, asked, dropped, iu_xml, kept, make_ct_rate, write_csv, write_image

from data_prep import ct_rate, generic, iu_xray
from data_prep.items import Dropped
from data_prep.tables import label, read_table
from medvlm.data.schema import Sample
from medvlm.errors import UserError

# --- IU X-ray ---

RELEASE = Path(os.environ.get("MEDVLM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "iu_xray_reports"
needs_release = pytest.mark.skipif(
    not (RELEASE / iu_xray.ARCHIVE).exists(), reason=f"the IU X-ray reports are not at {RELEASE}; set MEDVLM_TEST_DATA"
)


@needs_release
def test_all_published_reports_are_read_with_the_published_counts():
    reports = [report for _, report in iu_xray._reports(RELEASE)]
    assert len(reports) == 3955 and all(reports)
    counts = [len(report.images) for report in reports]
    assert [counts.count(n) for n in range(6)] == [104, 446, 3208, 181, 15, 1] and sum(counts) == 7470
    assert len({image for report in reports for image in report.images}) == 7470
    assert sum("findings" not in report.sections for report in reports) == 530
    assert sum("impression" not in report.sections for report in reports) == 34
    written = [" ".join(report.sections.get(name, "") for name in ("findings", "impression")) for report in reports]
    assert sum(iu_xray.PLACEHOLDER in text for text in written) == 1855


@needs_release
def test_published_reports_become_samples_without_placeholders():
    found = list(iu_xray.items(RELEASE, without_images="text"))
    items = kept(found)
    assert len(items) + len(dropped(found)) == 3955
    assert {reason for _, reason in dropped(found)} == {
        "report without the chosen sections",
        "only placeholder sentences",
    }
    targets = [text for item in items for name, text in item.fields["report"].items() if name != "indication"]
    assert not any(iu_xray.PLACEHOLDER in text for text in targets)
    assert [item.fields["key"] for item in items[:3]] == ["CXR1", "CXR2", "CXR3"]
    for item in items[:20]:
        Sample(**item.fields, source="iu_xray", license="x")
    as_they_are = list(iu_xray.items(RELEASE, without_images="text", placeholders="keep"))
    assert len(kept(as_they_are)) == 3955 - 28
    kept_text = " ".join(text for item in kept(as_they_are) for text in item.fields["report"].values())
    assert kept_text.count(iu_xray.PLACEHOLDER) > 1855


@needs_release
def test_published_reports_find_their_images_by_id(tmp_path):
    for name in ("CXR1_1_IM-0001-4001", "CXR1_1_IM-0001-3001", "CXR2_IM-0652-1001"):
        write_image(tmp_path / "png" / f"{name}.png")
    found = iu_xray.items(RELEASE, images=tmp_path / "png")
    first = next(item for item in found if not isinstance(item, Dropped))
    assert [i.image_id for i in first.images] == ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"]
    assert all(Path(i.path).is_file() for i in first.images)
    without = {report.uid for _, report in iu_xray._reports(RELEASE) if report and not report.images}
    assert len(without) == 104 and without <= {what for what, _ in dropped(list(found))}


@pytest.fixture
def make_iu(tmp_path):
    def make(files: dict[str, str], archive: bool = False) -> Path:
        root = tmp_path / "iu"
        for name, text in files.items():
            path = root / "ecgen-radiology" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        write_image(root / "NLMCXR_png" / "CXR10_IM-0002-1001.png")
        if archive:
            with tarfile.open(root / iu_xray.ARCHIVE, "w:gz") as tar:
                tar.add(root / "ecgen-radiology", "ecgen-radiology")
            (root / "ecgen-radiology").rename(tmp_path / "away")
        return root

    return make


@pytest.mark.parametrize("archive", [False, True])
def test_folder_and_archive_give_the_same_samples_in_numerical_order(make_iu, archive):
    clear = {"findings": "Clear lungs. The XXXX is seen.", "impression": "Normal.", "indication": "XXXX-year-old"}
    files = {f"{n}.xml": iu_xml(f"CXR{n}", [f"CXR{n}_IM-0002-1001"], **clear) for n in (10, 2, 1)}
    items = list(iu_xray.items(make_iu(files, archive)))
    assert [i.fields["key"] for i in items] == ["CXR1", "CXR2", "CXR10"]
    assert answers(items[0]) == ["Findings: Clear lungs.\nImpression: Normal."]
    assert items[2].images[0].path == "NLMCXR_png/CXR10_IM-0002-1001.png"
    assert "___-year-old" in asked(items[0])[0] and items[0].fields["metadata"] == {"mesh": ["normal"]}


def test_iu_reports_that_cannot_be_used_are_dropped_with_their_reason(make_iu, tmp_path):
    image = ["CXR10_IM-0002-1001"]
    files = {
        "1.xml": iu_xml("CXR1", image, indication="Cough"),
        "2.xml": iu_xml("CXR2", findings="Clear."),
        "3.xml": iu_xml("CXR3", image, impression="XXXX seen."),
        "4.xml": "<eCitation><uId",
        "5.xml": "<other/>",
        "6.xml": iu_xml("CXR2", image, findings="Clear."),
        "7.xml": iu_xml("CXR7", image, findings="Clear."),
    }
    root = make_iu(files)
    found = list(iu_xray.items(root))
    assert [i.fields["key"] for i in kept(found)] == ["CXR7"]
    assert dropped(found) == [
        ("CXR1", "report without the chosen sections"),
        ("CXR2", "no image"),
        ("CXR3", "only placeholder sentences"),
        ("4.xml", "unreadable report"),
        ("5.xml", "unreadable report"),
        ("6.xml (CXR2)", "duplicate id"),
    ]
    texts = kept(list(iu_xray.items(root, without_images="text")))
    assert (texts[0].fields["key"], texts[0].fields["messages"], texts[0].images) == ("CXR2", [], [])


def test_the_split_of_an_annotation_is_taken_by_report_id(make_iu, tmp_path):
    files = {f"{n}.xml": iu_xml(f"CXR{n}", ["CXR10_IM-0002-1001"], findings="Clear.") for n in (1, 2, 3)}
    split = {"train": [{"id": "CXR1_1_IM-0001"}], "val": [{"id": "CXR3_IM-1384"}], "test": []}
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps(split))
    found = list(iu_xray.items(make_iu(files), annotation=path))
    assert [(i.fields["key"], i.fields["split"]) for i in kept(found)] == [("CXR1", "train"), ("CXR3", "validation")]
    assert dropped(found) == [("CXR2", "not in the annotation")]
    path.write_text("[]")
    with pytest.raises(UserError, match="not an annotation file; expected train, val and test"):
        list(iu_xray.items(make_iu(files), annotation=path))


def test_missing_iu_parts_are_named(tmp_path):
    with pytest.raises(UserError, match=r"NLMCXR_png: not found; unpack NLMCXR_png\.tgz"):
        list(iu_xray.items(tmp_path))
    with pytest.raises(UserError, match=r"NLMCXR_reports\.tgz: not found"):
        list(iu_xray.items(tmp_path, without_images="text"))
    (tmp_path / iu_xray.ARCHIVE).write_bytes(b"\x1f\x8bbroken")
    with pytest.raises(UserError, match="damaged archive"):
        list(iu_xray.items(tmp_path, without_images="text"))


# --- CT-RATE ---


CT = ["train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_2", "valid_1_a_1"]


def test_a_scan_becomes_one_sample_with_slope_intercept_labels_and_split(tmp_path):
    found = list(ct_rate.items(make_ct_rate(tmp_path, CT)))
    items = kept(found)
    assert [i.fields["key"] for i in items] == ["train_1_a_1", "train_1_b_1", "train_2_a_2", "valid_1_a_1"]
    assert dropped(found) == [("train_1_a_2.nii.gz", "other reconstruction of the scan")]
    first = items[0]
    assert first.images[0].path == "dataset/train/train_1/train_1_a/train_1_a_1.nii.gz"
    options = {"slope": 1.0, "intercept": -8192.0, "spacing": [0.75, 0.75, 1.5]}
    assert (first.images[0].kind, first.images[0].options) == ("nifti", options)
    assert first.images[0].metadata == {"spacing_in_metadata": [0.75, 0.75, 1.5]}
    assert (first.fields["patient_id"], first.fields["study_id"]) == ("train_1", "train_1_a")
    assert first.fields["labels"] == {"Emphysema": 0, "Lung nodule": 1}
    assert answers(first) == ["Findings: Clear lungs.\nImpression: Normal."]
    assert "Indication" not in asked(first)[0]  # "Not given." is nothing
    assert [i.fields["split"] for i in items] == ["train", "train", "train", "test"]
    volume = {"file": "0.b2", "width": 9, "height": 9, "depth": 9}
    Sample(**first.fields, source="ct-rate", license="x", images=[volume])


def test_all_reconstructions_stay_with_one_patient_and_the_split_is_by_patient(tmp_path):
    many = [f"train_{n}_{scan}_{k}" for n in range(1, 60) for scan in "ab" for k in (1, 2)]
    root = make_ct_rate(tmp_path, [*many, "valid_1_a_1"])
    items = kept(list(ct_rate.items(root, reconstructions="all", validation_share=20, valid_as="validation")))
    assert len(items) == len(many) + 1
    split_of: dict[str, set[str]] = {}
    for item in items:
        split_of.setdefault(item.fields["patient_id"], set()).add(item.fields["split"])
    assert all(len(splits) == 1 for splits in split_of.values()) and split_of["valid_1"] == {"validation"}
    assert 4 < sum(splits == {"validation"} for splits in split_of.values()) < 24


def test_bad_rows_of_ct_rate_are_dropped_with_their_reason(tmp_path):
    changes = {
        "train_1_a_1": {"RescaleSlope": ""},
        "train_2_a_1": {"Findings_EN": "", "Impressions_EN": "Not given."},
        "train_3_a_1": {"Emphysema": "5"},
        "train_5_a_1": {"XYSpacing": "?"},
    }
    volumes = [*changes, "train_4_a_1", "train_4_a_1", "trial_1"]
    root = make_ct_rate(tmp_path, [v for v in volumes if v.startswith("train")], **changes)
    table = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
    table.write_text(table.read_text() + "trial_1.nii.gz,,,,\n")
    found = list(ct_rate.items(root))
    assert [(i.fields["key"], i.images[0].metadata) for i in kept(found)] == [
        ("train_5_a_1", {}),
        ("train_4_a_1", {"spacing_in_metadata": [0.75, 0.75, 1.5]}),
    ]
    assert dropped(found) == [
        ("train_1_a_1.nii.gz", "no slope and intercept in the metadata"),
        ("train_2_a_1.nii.gz", "report without the chosen sections"),
        ("train_3_a_1.nii.gz (Emphysema = 5)", "label out of range"),
        ("train_4_a_1.nii.gz", "duplicate id"),
        ("trial_1.nii.gz", "not a CT-RATE volume name"),
    ]
    headers = kept(list(ct_rate.items(root, rescale="file", labels="none", folders="train_fixed,valid_fixed")))
    assert headers[0].images[0].options == {} and headers[0].fields["labels"] == {}
    assert headers[0].images[0].path.startswith("dataset/train_fixed/train_1/")


def test_missing_ct_rate_tables_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no radiology_text_reports/train_reports\.csv"):
        list(ct_rate.items(tmp_path))
    root = make_ct_rate(tmp_path, CT)
    (root / "dataset" / "metadata" / "train_metadata.csv").unlink()
    with pytest.raises(UserError, match=r"no metadata table of train.*--rescale file"):
        list(ct_rate.items(root))
    (root / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv").unlink()
    with pytest.raises(UserError, match=r"no labels table of train.*--labels none"):
        list(ct_rate.items(root, rescale="file"))
    with pytest.raises(UserError, match="folders: give two names"):
        list(ct_rate.items(root, folders="train"))


# --- tables ---


def test_formats_of_a_table_give_the_same_rows(tmp_path):
    rows = [{"id": "1", "text": 'a, "b"\nc'}, {"id": "2", "text": ""}]
    paths = [write_csv(tmp_path / name, rows) for name in ("t.csv", "t.csv.gz")]
    paths.append(write_csv(tmp_path / "utf8-bom.csv", rows, "utf-8-sig"))
    with (tmp_path / "t.tsv").open("w", newline="") as file:
        writer = csv.writer(file, "excel-tab")
        writer.writerows([list(rows[0]), *(list(r.values()) for r in rows)])
    paths.append(tmp_path / "t.tsv")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    parquet.write_table(pa.Table.from_pylist([rows[0], {"id": "2", "text": None}]), tmp_path / "t.parquet")
    for path in [*paths, tmp_path / "t.jsonl", tmp_path / "t.parquet"]:
        assert [{**r, "text": r["text"].replace("\r\n", "\n")} for r in read_table(path, ("id", "text"))] == rows
    cp1252 = tmp_path / "cp1252.csv"
    cp1252.write_bytes("id,text\n1,\x93Übersicht\x94\n".encode("latin-1"))
    assert next(read_table(cp1252, encoding="cp1252"))["text"] == "\u201cÜbersicht\u201d"


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("t.csv", "id\n\xe9\n".encode("latin-1"), "is not utf-8 text .*--encoding"),
        ("t.csv", "id\nx\n".encode("utf-16"), "is not utf-8 text .*--encoding"),
        ("t.csv", b"id,id\n1,2\n", "names a column twice"),
        ("t.csv", b"id,b\n1,2,3\n", "line 2 has 3 cells and the header 2"),
        ("t.csv", b"", "its header is empty"),
        ("t.csv", b"id\n", "holds no row"),
        ("t.csv", b"other\n1\n", "has no column id; it has other"),
        ("t.csv.gz", b"id\n1\n", "not a readable table"),
        ("t.jsonl", b'{"id": 1}\n{', "line 2 is not JSON"),
        ("t.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("t.parquet", b"PAR1", "not a readable Parquet file"),
        ("t.xlsx", b"", "not a table by its suffix"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        list(read_table(tmp_path / name, ("id",)))
    with pytest.raises(UserError, match="'none-such' is not known"):
        list(read_table(write_csv(tmp_path / "x.csv", [{"id": "1"}]), encoding="none-such"))


def test_labels_are_those_of_chexpert():
    assert [label(v) for v in ("1.0", "0", "-1.0", "", "NaN", None, 1)] == [1, 0, -1, None, None, None, 1]
    for wrong in ("2", "0.5", "yes", "inf"):
        with pytest.raises(ValueError):
            label(wrong)


# --- one's own archive: a table ---


@pytest.fixture
def key(tmp_path) -> Path:
    path = tmp_path / "secret" / "key"
    path.parent.mkdir()
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    return path


def digits(kind: str, value: str) -> str:
    return hmac.new(b"0123456789abcdef", f"{kind}:{value}".encode(), hashlib.sha256).hexdigest()[:16]


def test_a_table_of_reports_becomes_samples_whose_ids_are_keyed_hashes(tmp_path, key):
    text = "FINDINGS: Clear.\nIMPRESSION: Normal."
    base = {"image": "a/1.png; a/2.dcm", "report": text, "indication": "Cough", "patient_id": "0042", "study_id": "A1"}
    rows = [{**base, "split": "val", "labels_Edema": "1"}]
    rows += [
        {**base, "image": "ct/scan.nii.gz", "report": "Plain text.", "study_id": "A2", "split": "", "labels_Edema": ""}
    ]
    write_csv(tmp_path / "data" / "table.csv", rows)
    first, second = generic.items(tmp_path / "data", key_file=key)
    assert first.fields["key"] == "s" + digits("study", "A1") and first.fields["study_id"] == digits("study", "A1")
    assert first.fields["patient_id"] == second.fields["patient_id"] == digits("patient", "0042")
    assert "0042" not in repr(first) and "A1" not in repr(first)
    assert [(i.path, i.kind) for i in first.images] == [("a/1.png", "image"), ("a/2.dcm", "dicom")]
    assert (first.fields["split"], first.fields["labels"]) == ("validation", {"Edema": 1})
    assert answers(first) == ["Findings: Clear.\nImpression: Normal."] and "Indication: Cough" in asked(first)[0]
    assert second.images[0].kind == "nifti" and answers(second) == ["Plain text."]
    sizes = [{"file": f"{n}.png", "width": 9, "height": 9} for n in range(2)]
    Sample(**first.fields, source="generic", license="x", images=sizes)


def test_columns_of_another_name_and_encoding_are_read(tmp_path, key):
    rows = [{"Bild": "1.png", "Befund": "Erguß links.", "Beurteilung": "Kein Pneumothorax.", "Pat": "7"}]
    path = write_csv(tmp_path / "t.csv", rows, "cp1252")
    names = {"image_column": "Bild", "findings_column": "Befund", "impression_column": "Beurteilung"}
    options = {**names, "patient_column": "Pat", "table": path, "key_file": key}
    (item,) = generic.items(tmp_path, encoding="cp1252", **options)
    assert item.fields["report"] == {"findings": "Erguß links.", "impression": "Kein Pneumothorax."}
    with pytest.raises(UserError, match=r"is not utf-8 text .*--encoding"):
        list(generic.items(tmp_path, **options))
    with pytest.raises(UserError, match="has no column Pt; it has Bild"):
        list(generic.items(tmp_path, encoding="cp1252", **{**options, "patient_column": "Pt"}))


def test_questions_about_the_same_images_become_one_conversation(tmp_path, key):
    rows = [
        {"image": ["1.png", "2.png"], "question": "Is there fluid?", "answer": "Yes", "patient_id": 1},
        {"image": ["3.png"], "question": "Which organ?", "answer": "Lung", "patient_id": 2},
        {"image": ["1.png", "2.png"], "question": "Where?", "answer": "Left", "patient_id": 1},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    first, second = generic.items(tmp_path, key_file=key)
    assert (asked(first), answers(first)) == (["Is there fluid?", "Where?"], ["Yes", "Left"])
    assert [m.get("answer_type") for m in first.fields["messages"]] == [None, "closed", None, "open"]
    assert [i.path for i in first.images] == ["1.png", "2.png"] and len(second.images) == 1
    sizes = [{"file": f"{n}.png", "width": 9, "height": 9} for n in range(2)]
    Sample(**first.fields, source="generic", license="x", images=sizes)


def test_rows_that_cannot_be_used_are_dropped_with_their_reason(tmp_path, key):
    base = {"image": "1.png", "report": "Clear.", "patient_id": "1", "study_id": "1", "split": "train", "labels_x": ""}
    changes = [{}, {"patient_id": "NaN"}, {"report": "___."}, {"image": ""}, {}, {"labels_x": "7"}, {"split": "mine"}]
    write_csv(tmp_path / "t.csv", [{**base, **change} for change in changes])
    found = list(generic.items(tmp_path, key_file=key))
    assert len(kept(found)) == 1
    assert dropped(found) == [
        ("row 2", "no patient id"),
        ("row 3", "no text"),
        ("row 4", "no image"),
        ("row 5", "duplicate id"),
        ("row 6 (labels_x = 7)", "label out of range"),
        ("row 7", "unknown split"),
    ]


def test_unpaired_rows_are_kept_when_asked_for(tmp_path, key):
    base = {"image": "1.png", "report": "Clear.", "patient_id": "1", "indication": "Cough.", "labels_Edema": "1"}
    changes = [{"report": "___."}, {"image": ""}, {"report": "", "labels_Edema": ""}, {"report": "", "image": ""}]
    write_csv(tmp_path / "t.csv", [{**base, **change} for change in changes])
    found = list(generic.items(tmp_path, key_file=key, unpaired=True))
    image, text = kept(found)
    assert (image.fields["labels"], image.fields["report"], image.fields["messages"]) == ({"Edema": 1}, {}, [])
    assert (text.fields["report"], text.images) == ({"report": "Clear.", "indication": "Cough."}, [])
    stored = [{"file": "0.png", "width": 9, "height": 9}]
    Sample(**image.fields, source="generic", license="x", images=stored)
    Sample(**text.fields, source="generic", license="x")
    assert dropped(found) == [("row 3", "no text and no label"), ("row 4", "no text")]
    write_csv(tmp_path / "t.csv", [{"image": "1.png", "labels_Edema": "-1"}])
    assert len(kept(list(generic.items(tmp_path, key_file=key, unpaired=True)))) == 1
    with pytest.raises(UserError, match="has no text column"):
        list(generic.items(tmp_path, key_file=key))


def test_the_split_of_a_patient_is_the_same_for_all_rows_and_near_the_shares(tmp_path, key):
    rows = [{"image": f"{n}.png", "report": "Clear.", "patient_id": n % 400} for n in range(800)]
    write_csv(tmp_path / "t.csv", rows)
    items = list(generic.items(tmp_path, key_file=key))
    assert [i.fields["split"] for i in items[:400]] == [i.fields["split"] for i in items[400:]]
    assert items[0].fields["key"] == "row00000001"
    assert [i.fields["split"] for i in items[:400]].count("train") / 400 == pytest.approx(0.8, abs=0.07)


def test_what_generic_needs_is_asked_for_in_one_sentence(tmp_path, key, monkeypatch):
    monkeypatch.delenv("MEDVLM_DEIDENTIFY_KEY", raising=False)
    with pytest.raises(UserError, match="is not a folder; give the folder of the images as SOURCE"):
        list(generic.items(key, key_file=key))
    with pytest.raises(UserError, match="holds 0 tables"):
        list(generic.items(tmp_path, key_file=key))
    table = write_csv(tmp_path / "t.csv", [{"image": "1.png", "question": "Why?"}])
    with pytest.raises(UserError, match=r"--key-file: is missing .*--make-key creates one"):
        list(generic.items(tmp_path))
    short = tmp_path / "short"
    short.write_text("abc\n")
    short.chmod(0o600)
    with pytest.raises(UserError, match="the key has 3 characters; 16 or more"):
        list(generic.items(tmp_path, key_file=short))
    with pytest.raises(UserError, match=r"has no text column .*both question and answer"):
        list(generic.items(tmp_path, table=Path(table.name), key_file=key))
