"""MIMIC-CXR and CheXpert -> items. Layouts are the published ones; every report below was written for these tests."""

import inspect
from pathlib import Path

import pytest
from archives import PLAIN_REPORT, Mimic, answers, asked, chexpert_row, dropped, kept, write_csv, write_image

from data_prep import chexpert, mimic_cxr
from data_prep.report_text import parse_report, report_messages, section_name, split_sections, tidy
from medvlm.data.schema import Sample
from medvlm.errors import UserError

ADDENDUM = """                                 FINAL REPORT
 ADDENDUM:  The time of the call was corrected.
 IMPRESSION:  Text of the addendum.
 ______________________________________________________________________________
"""


# --- the section parser ---


@pytest.mark.parametrize(
    ("header", "section"),
    [
        ("FINDINGS", "findings"),
        ("CONCLUSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("FINDINGS/IMPRESSION", "impression"),
        ("PORTABLE AP CHEST", "findings"),
        ("CHEST, PA & LATERAL", "findings"),
        ("CHEST, TWO VIEWS", "findings"),
        ("FRONTAL SEMI-UPRIGHT RADIOGRAPH", "findings"),
        ("REASON FOR EXAMINATION", "indication"),
        ("REASON FOR CHEST X-RAY", "indication"),
        ("TECHNIQUE OF CHEST CT", "technique"),
        ("CLINICAL HISTORY", "history"),
        ("COMPARISON FILM", "comparison"),
        ("RECOMMENDATION(S)", "recommendations"),
        ("TYPE OF EXAMINATION", "examination"),
        ("IMPRESSON", "impression"),
        ("FINDINDGS", "findings"),
        ("COMPARRISON", "comparison"),
        ("NDICATION", "indication"),  # the official table makes an impression of it
        ("WET READ", "wet read"),
        ("MEDICATION", "medication"),
    ],
)
def test_a_header_opens_the_section_that_it_means(header, section):
    assert section_name(header) == section


def test_text_before_the_first_header_is_preamble_and_headers_start_a_line():
    text = " Portable view.\n Read at NOON: late.\n FINDINGS:  Clear lungs.  NOTE: not a header.\n"
    assert [(name, tidy(body)) for name, body in split_sections(text)] == [
        ("preamble", "Portable view. Read at NOON: late."),
        ("findings", "Clear lungs. NOTE: not a header."),
    ]


def test_an_empty_section_is_dropped_and_the_last_of_several_wins():
    text = " CHEST, PA AND LATERAL:\n \n FINDINGS:  First.\n \n IMPRESSION:  One.\n \n IMPRESSION:  Two.\n FINDINGS:\n"
    parsed = parse_report(text)
    assert (tidy(parsed["findings"]), tidy(parsed["impression"])) == ("First.", "Two.")


def test_a_header_in_the_line_below_an_empty_one_is_seen():
    assert tidy(parse_report("\n FINDINGS:\n IMPRESSION: Normal.\n")["impression"]) == "Normal."


def test_addenda_above_the_line_of_underscores_are_kept_apart():
    parsed = parse_report(ADDENDUM + PLAIN_REPORT)
    assert tidy(parsed["impression"]) == "No acute disease."
    assert "Text of the addendum" in parsed["addendum"] and "Text of the addendum" not in parsed["preamble"]


@pytest.mark.parametrize("below", ["NOTIFICATION: Dr. X was told.", "ADDENDUM:\nIMPRESSION: another.", "Signed."])
def test_what_stands_below_the_report_is_not_the_report(below):
    rule = "_" * 30
    text = f"INDICATION: Cough.\nFINDINGS: Clear.\nIMPRESSION: Normal.\n{rule}\n{below}"
    found = parse_report(text)
    assert (tidy(found["findings"]), tidy(found["impression"])) == ("Clear.", "Normal.")
    assert "last_paragraph" not in found and tidy(found["indication"]) == "Cough."


def test_text_may_stand_right_behind_the_colon_of_a_known_header():
    assert parse_report("FINDINGS:Lungs are clear.\nIMPRESSION:Normal.\n") == {
        "findings": "Lungs are clear.\n",
        "impression": "Normal.\n",
    }
    assert "at noon" not in split_sections("NOON:12:30\n")[0][0]


def test_a_gap_that_fills_a_line_is_no_rule():
    assert tidy(parse_report(" FINDINGS:  Clear.\n ___\n \n IMPRESSION:  Normal.\n")["findings"]) == "Clear."


def test_without_findings_and_impression_the_last_paragraph_stands_in():
    text = " CHEST RADIOGRAPHS\n \n HISTORY:  Cough.\n \n The lungs are\n clear.\n \n No effusion.\n"
    parsed = parse_report(text)
    assert tidy(parsed["last_paragraph"]) == "The lungs are clear.\nNo effusion."
    assert "last_paragraph" not in parse_report(PLAIN_REPORT)
    assert parse_report("") == {} and "last_paragraph" not in parse_report(" One paragraph only.\n")


def test_wrapped_lines_are_joined_and_list_entries_kept_apart():
    text = "\n 1.  Small left\n effusion.\n 2.  No pneumothorax, size\n 3 cm nodule.\n \n New paragraph.\n"
    assert tidy(text) == "1. Small left effusion.\n2. No pneumothorax, size 3 cm nodule.\nNew paragraph."


def test_a_report_becomes_one_request_with_all_images_and_no_masked_sentence():
    report = {"findings": "Clear. Seen on ___.", "impression": "Normal.", "indication": "___ with cough"}
    user, assistant = report_messages(report, 2)
    assert [part["type"] for part in user["content"]] == ["image", "image", "text"]
    assert "___ with cough" in user["content"][-1]["text"]
    assert assistant["content"][0]["text"] == "Findings: Clear.\nImpression: Normal."
    assert report_messages({"findings": "Seen on ___."}, 1) == report_messages(report, 0) == []
    assert report_messages({"findings": "Clear."}, 1, "Fever")[1]["content"][0]["text"] == "Clear."


# --- MIMIC-CXR ---


@pytest.fixture
def mimic(tmp_path) -> Mimic:
    return Mimic(tmp_path / "mimic")


def test_a_study_becomes_one_sample_with_its_split_views_labels_and_sections(mimic):
    mimic.add(50000001, PLAIN_REPORT, "LATERAL - AP", "validate", Edema="-1.0", Pneumonia="0.0", No_Finding="1.0")
    (item,) = mimic.items()
    fields = item.fields
    assert (fields["split"], fields["patient_id"], fields["study_id"]) == ("validation", "p10000001", "s50000001")
    assert [i.view for i in item.images] == ["AP", "LATERAL", None]  # frontal views first
    assert all((mimic.root / i.path).is_file() for i in item.images)
    assert fields["labels"]["Edema"] == -1 and fields["labels"]["Pneumonia"] == 0
    assert fields["labels"]["No Finding"] == 1 and fields["labels"]["Fracture"] is None
    assert fields["report"]["findings"] == "The lungs are clear. There is no effusion."
    assert fields["report"]["indication"] == "___-year-old with cough, evaluate for pneumonia."
    assert answers(item) == ["Findings: The lungs are clear. There is no effusion.\nImpression: No acute disease."]
    assert "___" not in answers(item)[0] and "___-year-old" in asked(item)[0]
    sizes = [{"file": f"{n}.jpg", "width": 24, "height": 24} for n in range(3)]
    Sample(**fields, source="mimic-cxr", license="x", images=sizes)


def test_views_and_sections_are_chosen_and_what_is_left_out_is_counted(mimic):
    mimic.add(50000001, PLAIN_REPORT, "PA LATERAL")
    mimic.add(50000002, PLAIN_REPORT, "LATERAL")
    mimic.add(50000003, " IMPRESSION:  Normal.\n", "AP")
    found = mimic.items(views="frontal", sections="findings")
    assert [[i.view for i in item.images] for item in kept(found)] == [["PA"]]
    assert [reason for _, reason in dropped(found)] == ["no image of the chosen views", "chosen section missing"]
    assert [len(i.images) for i in kept(mimic.items(views="lateral"))] == [1, 1]
    with pytest.raises(UserError, match="sections: conclusion; take one or more of findings, impression"):
        mimic.items(sections="conclusion")


def test_a_prior_is_the_patients_last_frontal_image_before(mimic):
    mimic.add(50004001, PLAIN_REPORT, "AP", when="21800506 93000.0")  # half past nine, before 21:30 of that day
    mimic.add(50003001, PLAIN_REPORT, "LATERAL PA", when="21800506 213014.531")
    mimic.add(50006001, PLAIN_REPORT, "PA", when="21800506 213014.531")  # at the same moment
    mimic.add(50002001, PLAIN_REPORT, "LATERAL", when="21800507 10000.0")
    mimic.add(50001001, PLAIN_REPORT, "AP", when="21800508 10000.0")
    mimic.add(50005001, PLAIN_REPORT, "AP", when=" ")
    mimic.add(50000002, PLAIN_REPORT, "AP", when="21800509 10000.0")  # another patient
    found = {i.fields["key"]: i for i in kept(mimic.items(with_prior=True))}
    priors = {key: [i for i in item.images if i.metadata.get("role") == "prior"] for key, item in found.items()}
    assert {key: [i.metadata["study_id"] for i in images] for key, images in priors.items()} == {
        **{"s50004001": [], "s50003001": ["s50004001"], "s50006001": ["s50004001"], "s50002001": ["s50006001"]},
        **{"s50001001": ["s50006001"], "s50005001": [], "s50000002": []},
    }
    assert [i.view for i in found["s50001001"].images] == ["AP", "PA"]
    assert all((mimic.root / i.path).is_file() for item in found.values() for i in item.images)
    for item in found.values():
        images = [part for part in item.fields["messages"][0]["content"] if part["type"] == "image"]
        assert len(images) == len(item.images)
    assert not any(i.metadata for item in kept(mimic.items()) for i in item.images)


def test_every_report_that_cannot_be_used_is_dropped_with_its_reason(mimic):
    mimic.add(50000000, PLAIN_REPORT)
    mimic.add(50000007, None)
    mimic.add(50000014, "\n EXAMINATION:  Chest.\n")
    mimic.add(50000021, " FINDINGS:  Seen with Dr. ___.\n")
    mimic.add(50000028, PLAIN_REPORT, Edema="2")
    mimic.add(50000035, PLAIN_REPORT, split="dev")
    mimic.add(50000042, PLAIN_REPORT)
    mimic.split.append({**mimic.split[-1], "split": "test"})
    mimic.add(50000049, PLAIN_REPORT)
    mimic.split.append({**mimic.split[-1], "dicom_id": "x", "split": "test"})
    mimic.add(50000056, " FINDINGS:  T 38\xb0.\n".encode("latin-1"))
    found = mimic.items()
    assert len(kept(found)) == 1
    assert dict((what.split("/")[-1], reason) for what, reason in dropped(found)) == {
        "s50000007": "report missing",
        "s50000014": "neither findings nor impression",
        "s50000021": "only masked sentences",
        "s50000028 (Edema = 2)": "label out of range",
        "s50000035": "unknown split",
        "s50000042": "duplicate image id",
        "s50000049": "study in two splits or of two patients",
        "s50000056": "report is not UTF-8 text",
    }


def test_the_last_paragraph_is_used_or_not_and_says_so(mimic):
    mimic.add(50000001, "\n HISTORY:  Cough.\n \n The lungs are clear.\n")
    (item,) = mimic.items()
    assert item.fields["report"] == {"report": "The lungs are clear.", "indication": "Cough."}
    assert answers(item) == ["The lungs are clear."] and item.fields["metadata"]["report_from"] == "last_paragraph"
    assert dropped(mimic.items(last_paragraph=False)) == [("p10000001/s50000001", "neither findings nor impression")]


def test_section_overrides_name_a_section_or_characters(mimic, tmp_path):
    text = " INDICATION:  Lungs are clear.\n"
    mimic.add(50000001, text)
    mimic.add(50000002, " No header, effusion seen.\n")
    mimic.add(50000003, " Nothing here.\n")
    rows = [{"study_id": "s50000001", "section": "indication", "start": "", "end": ""}]
    rows += [{"study_id": "50000002", "section": "", "start": "12", "end": "27"}]
    rows += [{"study_id": "50000003", "section": "", "start": "0", "end": "0"}]
    found = mimic.items(section_overrides=write_csv(tmp_path / "rules.csv", rows))
    assert [answers(item) for item in kept(found)] == [["Lungs are clear."], ["effusion seen."]]
    assert dropped(found) == [("p10000003/s50000003", "no usable section")]
    rows[0]["section"] = ""
    with pytest.raises(UserError, match="row 2 needs a section, or start and end"):
        mimic.items(section_overrides=write_csv(tmp_path / "rules.csv", rows))


def test_reports_and_images_may_lie_in_two_roots_and_the_newer_names_are_read(tmp_path):
    mimic = Mimic(tmp_path / "jpg", "2.1.0", "../txt/mimic-cxr-reports/files")
    mimic.add(50000001, PLAIN_REPORT)
    (item,) = mimic.items(reports=tmp_path / "txt")
    assert (mimic.root / item.images[0].path).is_file()
    (moved,) = mimic_cxr.items(tmp_path / "txt", jpg=mimic.root, labels="negbio")
    assert Path(moved.images[0].path).is_absolute() and moved.fields == item.fields


def test_missing_parts_of_the_release_are_named(mimic, tmp_path):
    mimic.add(50000001, PLAIN_REPORT)
    mimic.items()
    with pytest.raises(UserError, match=r"no report like files/p10/p10000000/s50000000\.txt.*--reports"):
        list(mimic_cxr.items(mimic.root, reports=tmp_path))
    for name in ("split", "metadata", "chexpert"):
        (mimic.root / f"mimic-cxr-2.0.0-{name}.csv.gz").rename(tmp_path / name)
        with pytest.raises(UserError, match=f"no mimic-cxr-2.x.x-{name}.csv.gz.*--jpg"):
            list(mimic_cxr.items(mimic.root))
        (tmp_path / name).rename(mimic.root / f"mimic-cxr-2.0.0-{name}.csv.gz")
    (mimic.root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"split\.csv\.gz: not a readable table"):
        list(mimic_cxr.items(mimic.root))


# --- CheXpert ---


@pytest.fixture
def make_chexpert(tmp_path):
    def make(train: list, valid: list | None = None, test: list | None = None, name: str = "test.csv") -> Path:
        root = tmp_path / "CheXpert-v1.0-small"
        default = [chexpert_row("valid/patient64541/study1/view1_frontal.jpg", **{"No_Finding": "1.0"})]
        write_csv(root / "train.csv", train)
        write_csv(root / "valid.csv", valid or default)
        if test:
            write_csv(root / name, test)
        return tmp_path

    return make


def test_certain_labels_are_asked_and_uncertain_and_blank_ones_are_not(make_chexpert):
    view = "train/patient00001/study1/view1_frontal.jpg"
    root = make_chexpert([chexpert_row(view, Edema="1.0", Pneumonia="-1.0", Fracture="0.0", Support_Devices="1.0")])
    item = kept(list(chexpert.items(root)))[0]
    assert dict(zip(asked(item), answers(item), strict=True)) == {
        "Is there any abnormal finding?": "yes",
        "Is there pulmonary edema?": "yes",
        "Is there a fracture?": "no",
        "Is there a support device?": "yes",
    }
    assert {k: v for k, v in item.fields["labels"].items() if v is not None} == {
        "Edema": 1,
        "Pneumonia": -1,
        "Fracture": 0,
        "Support Devices": 1,
    }
    kinds = {m.get("answer_type") for m in item.fields["messages"] if m["role"] == "assistant"}
    assert kinds == {"closed"} and item.images[0].path == f"CheXpert-v1.0-small/{view}"
    Sample(**item.fields, source="chexpert", license="x", images=[{"file": "0.jpg", "width": 9, "height": 9}])


@pytest.mark.parametrize(("policy", "value"), [("keep", -1), ("zeros", 0), ("ones", 1), ("ignore", None)])
def test_the_uncertain_policy_changes_labels_and_never_questions(make_chexpert, policy, value):
    root = make_chexpert([chexpert_row("train/patient00001/study1/view1_frontal.jpg", Edema="-1.0", Fracture="0.0")])
    item = kept(list(chexpert.items(root, uncertain=policy)))[0]
    assert item.fields["labels"]["Edema"] == value and item.fields["labels"]["Pneumonia"] is None
    assert asked(item) == ["Is there a fracture?"]


def test_images_and_labels_alone_keep_studies_whose_labels_are_uncertain(make_chexpert):
    values = [{"Edema": "1.0"}, {"Pneumonia": "-1.0"}, {}]
    rows = [chexpert_row(f"train/patient0000{n}/study1/view1_frontal.jpg", **v) for n, v in enumerate(values)]
    found = list(chexpert.items(make_chexpert(rows), questions=False))
    first, second = kept(found)[:2]
    assert first.fields["messages"] == [] and first.fields["labels"]["Edema"] == 1
    assert second.fields["labels"]["Pneumonia"] == -1
    assert dropped(found) == [("train/patient00002/study1", "no label")]
    Sample(**second.fields, source="chexpert", license="x", images=[{"file": "0.jpg", "width": 9, "height": 9}])
    ignored = list(chexpert.items(make_chexpert(rows), questions=False, uncertain="ignore"))
    assert [what for what, _ in dropped(ignored)] == ["train/patient00001/study1", "train/patient00002/study1"]


def test_views_of_a_study_are_one_sample_even_where_rows_are_apart(make_chexpert):
    study = "train/patient00002/study3"
    lateral = {"Frontal/Lateral": "Lateral", "AP/PA": "", "No_Finding": "1.0"}
    rows = [chexpert_row(f"{study}/view1_frontal.jpg", No_Finding="1.0", Sex="Unknown", Age="0")]
    rows += [chexpert_row("train/patient00001/study1/view1_frontal.jpg", Edema="1.0")]
    rows += [chexpert_row(f"{study}/view2_lateral.jpg", Sex="Unknown", Age="0", **lateral)]
    items = kept(list(chexpert.items(make_chexpert(rows))))
    by_id = {i.fields["study_id"]: i for i in items}
    assert [i.view for i in by_id["patient00002-study3"].images] == ["AP", "LATERAL"]
    assert by_id["patient00002-study3"].fields["metadata"] == {}  # Sex Unknown and Age 0 say nothing
    assert by_id["patient00001-study1"].fields["metadata"] == {"sex": "F", "age": 50}
    assert asked(by_id["patient00002-study3"]) == ["Is there any abnormal finding?"]
    assert answers(by_id["patient00002-study3"]) == ["no"]
    only = kept(list(chexpert.items(make_chexpert(rows), views="lateral")))
    assert [i.images[0].view for i in only] == ["LATERAL"]


def test_valid_is_validation_and_a_test_set_is_taken_or_carved(make_chexpert, tmp_path):
    train = [chexpert_row(f"train/patient{n:05d}/study1/view1_frontal.jpg", Edema="1.0") for n in range(1, 60)]
    train += [chexpert_row(f"train/patient{n:05d}/study2/view1_frontal.jpg", Edema="0.0") for n in range(1, 60)]
    items = kept(list(chexpert.items(make_chexpert(train), test_share=20)))
    split_of: dict[str, set[str]] = {}
    for item in items:
        split_of.setdefault(item.fields["patient_id"], set()).add(item.fields["split"])
    assert all(len(splits) == 1 for splits in split_of.values())
    counts = [splits for splits in split_of.values() if splits == {"test"}]
    assert 4 < len(counts) < 22 and split_of["patient64541"] == {"validation"}
    image = write_image(tmp_path / "CheXpert-v1.0-small/test/patient64741/study1/view1_frontal.jpg")
    test = [{"Study": "CheXpert-v1.0/test/patient64741/study1", "Edema": "1", "Fracture": "0"}]
    root = make_chexpert(train, test=test, name="groundtruth.csv")
    last = kept(list(chexpert.items(root)))[-1]
    assert (last.fields["split"], root / last.images[0].path, last.images[0].view) == ("test", image, "FRONTAL")
    with pytest.raises(UserError, match=r"test_share: .*groundtruth\.csv is a test set already"):
        list(chexpert.items(root, test_share=10))


def test_bad_rows_of_chexpert_are_dropped_with_their_reason(make_chexpert):
    rows = [
        chexpert_row("train/patient00001/study1/view1_frontal.jpg", Edema="3.0"),
        chexpert_row("train/patient00002/study1/view1_frontal.jpg", Edema="1.0"),
        chexpert_row("train/patient00002/study1/view1_frontal.jpg", Edema="1.0"),
        chexpert_row("train/patient00003/study1/view1_frontal.jpg", Edema="1.0"),
        chexpert_row("train/patient00003/study1/view2_frontal.jpg", Edema="0.0"),
        chexpert_row("train/patient00004/study1/view1_frontal.jpg", Edema="-1.0"),
        chexpert_row("elsewhere.jpg", Edema="1.0"),
    ]
    found = list(chexpert.items(make_chexpert(rows)))
    assert [i.fields["patient_id"] for i in kept(found)] == ["patient00002", "patient64541"]
    assert dropped(found) == [
        ("train/patient00001/study1 (Edema = 3.0)", "label out of range"),
        ("train/patient00002/study1/view1_frontal.jpg", "duplicate image"),
        ("train/patient00003/study1", "labels differ between the images of a study"),
        ("train/patient00004/study1", "no certain label"),
        ("CheXpert-v1.0-small/elsewhere.jpg", "not a CheXpert path"),
    ]


def test_chexpert_tables_of_another_kind_are_refused_in_one_sentence(make_chexpert, tmp_path):
    with pytest.raises(UserError, match=r"no train\.csv; give the folder CheXpert"):
        list(chexpert.items(tmp_path))
    root = make_chexpert([chexpert_row("train/patient00001/study1/view1_frontal.jpg")])
    table = tmp_path / "CheXpert-v1.0-small" / "train.csv"
    table.write_bytes("Path,Edema\n\xe9,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not utf-8 text"):
        list(chexpert.items(root))
    table.write_text("Image,Edema\na,1\n")
    with pytest.raises(UserError, match="neither a column Path nor a column Study"):
        list(chexpert.items(root))
    table.write_text("Path,Disease\na,1\n")
    with pytest.raises(UserError, match="no column of CheXpert's 14 labels"):
        list(chexpert.items(root))


@pytest.mark.parametrize("converter", [mimic_cxr, chexpert])
def test_items_are_made_one_at_a_time(converter):
    assert inspect.isgeneratorfunction(converter.CONVERTER.items)
