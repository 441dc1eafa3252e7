"""The converter of the COVID-19 image data collection."""

import csv
import json
from collections import Counter

import pytest
from archives import dropped, kept, write_csv, write_image
from test_converters_pipeline import prepare

from data_prep import covid_cxr
from data_prep.splits import assign
from medvlm.data.audit import audit
from medvlm.errors import UserError

ROW = {
    **{"patientid": "7", "offset": "3", "sex": "F", "age": "93", "finding": "Pneumonia/Viral/COVID-19", "view": "PA"},
    **{"modality": "X-ray", "date": "January 3, 2020", "location": "Rome", "folder": "images", "filename": "a.png"},
    **{"doi": "", "url": "https://x.org/1", "license": "CC BY 4.0", "clinical_notes": "Fever. Patchy opacities."},
    "other_notes": "Case courtesy of Dr Jane Doe",
}


@pytest.fixture
def make(tmp_path):
    def tree(*changes: dict) -> list:
        rows = [{**ROW, **change} for change in changes]
        for n, row in enumerate(rows):
            if row["filename"] != "missing.png":
                write_image(tmp_path / row["folder"] / row["filename"], n)
        write_csv(tmp_path / "metadata.csv", rows)
        return tmp_path

    return tree


def test_notes_diagnoses_and_licence_are_kept_and_dates_places_and_names_are_not(make):
    (item,) = covid_cxr.items(make({}))
    fields = item.fields
    assert fields["report"] == {"notes": "Fever. Patchy opacities."} and "messages" not in fields
    assert fields["labels"] == {"COVID-19": 1, "Pneumonia": 1, "Viral": 1}
    assert fields["license"] == "CC BY 4.0; metadata CC BY-NC-SA 4.0"
    assert (fields["patient_id"], fields["split"]) == ("7", assign("7"))
    assert fields["metadata"] == {
        **{"modality": "X-ray", "finding": "Pneumonia/Viral/COVID-19", "sex": "F", "age": 90},
        "url": "https://x.org/1",
    }
    assert not {"January 3, 2020", "Rome", "Doe"} & set(json.dumps([fields, vars(item.images[0])]).split('"'))


def test_a_lateral_stands_with_the_frontal_of_the_same_day(make):
    changes = [
        {"filename": "l.png", "view": "L"},
        {},
        {"filename": "b.png"},
        {"filename": "later.png", "view": "L", "offset": "9.0"},
        {"filename": "c.png", "view": "AP Supine", "offset": "12"},
    ]
    items = list(covid_cxr.items(make(*changes)))
    names = [[i.image_id for i in item.images] for item in items]
    assert names == [["a.png", "l.png"], ["b.png"], ["later.png"], ["c.png"]]
    assert [i.view for i in items[0].images] == ["PA", "LATERAL"] and items[3].images[0].view == "AP"
    assert items[3].images[0].metadata == {"position": "supine"}
    assert len({item.fields["key"] for item in items}) == 4


def test_rows_that_cannot_be_used_are_dropped_with_their_reason(make):
    changes = [
        {"patientid": ""},
        {"filename": "missing.png"},
        {"modality": "CT", "filename": "ct.png"},
        {},
        {},
        {"filename": "n.png", "clinical_notes": "", "finding": "todo"},
        {"filename": "label.png", "clinical_notes": "", "finding": "No Finding", "sex": "", "age": ""},
    ]
    root = make(*changes)
    found = list(covid_cxr.items(root))
    assert dropped(found) == [
        ("row 1: a.png", "no patient id"),
        ("row 2: missing.png", "missing image"),
        ("row 3: ct.png", "other modality"),
        ("row 5: a.png", "duplicate image"),
        ("row 6: n.png", "neither notes nor a diagnosis"),
    ]
    last = kept(found)[-1].fields
    assert (last["report"], last["labels"]) == ({}, {"COVID-19": 0, "No Finding": 1})
    assert last["metadata"].keys() == {"modality", "finding", "url"}
    assert "ct.png" in {i.images[0].image_id for i in kept(list(covid_cxr.items(root, modality="all")))}
    with pytest.raises(UserError, match=r"metadata\.csv: not found; give the folder of the collection"):
        list(covid_cxr.items(root / "images"))


def test_the_collection_itself(test_data, tmp_path):
    root = test_data / "cxr_covid_collection"
    report, samples = prepare(covid_cxr.CONVERTER, root, tmp_path / "out", originals=True)
    found = [sample for split in samples.values() for sample in split]
    with (root / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["filename"]: row for row in csv.DictReader(file) if row["modality"] == "X-ray"}
    images = [image for sample in found for image in sample.images]
    assert {i.image_id for i in images} == set(rows) and len(images) == len(rows) == 240
    assert sum(sum(row["dropped"].values()) for row in report["splits"].values()) == 47  # CT slices
    for sample in found:
        row = rows[sample.images[0].image_id]
        assert sample.report.get("notes", "") == " ".join(row["clinical_notes"].split())
        assert sample.license.startswith(row["license"]) and sample.patient_id == row["patientid"]
        assert (sample.labels["COVID-19"] == 1) == ("COVID-19" in row["finding"])
    assert Counter(i.view for i in images) == {"PA": 139, "AP": 75, "LATERAL": 26}
    assert sum(len(sample.images) == 2 for sample in found) > 15
    original = [i for i in images if (root / "originals" / i.image_id).exists()]
    assert len(original) > 5
    assert all(i.original_size == tuple(int(rows[i.image_id][f"orig_{s}"]) for s in "wh") for i in original)
    folders = [str(p) for p in (tmp_path / "out").iterdir() if p.is_dir() and list(p.glob("*.tar"))]
    found = audit(folders, workers=1, ignore=["url"])
    assert found["personal_metadata"] == {} and found["patients"]["count"] == 0
    assert found["phi"]["kinds"].keys() <= {"date"}  # three dates in the notes of one publication
