"""Masking of report text, sentences with masks, patient splits and burnt-in text."""

import hashlib
import hmac
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from data_prep import burnt_in, splits
from data_prep.splits import assign
from medvlm.data.phi import drop_masked_sentences, mask, scan
from medvlm.errors import UserError

# (kind, identifier): each must be found in the note, and all of it must go.
IDENTIFIERS = [
    *[
        ("name", t)
        for t in ("SMITH, JOHN A", "Mary O'Brien", "Jane van der Berg", "Müller-Lüdenscheidt", "Doe", "jones")
    ],
    *[("name", t) for t in ("Robert Brown", "ALICE GREEN", "Peter Parker", "DOE^JANE^Q", "Laura Palmer", "Kevin Hart")],
    *[("name", t) for t in ("M. Imran Khan", "Emily\nStone", "Miller and Rossi", "Foley", "John Adams")],
    *[("date", t) for t in ("03/12/1925", "2019-03-12", "12 March 2018", "March 3, 2017", "5/6/17", "12-MAR-2016")],
    *[
        ("date", t)
        for t in ("20150302", "04/2014", "January 2013", "3/12", "01.02.2019", "January 3rd", "Nov 5", "12.03.19")
    ],
    *[("name", t) for t in ("Hans Kowalski", "Nowak", "LEWANDOWSKI")],
    *[("date", t) for t in ("12 jan 2020", "4.3.20")],
    *[("age", t) for t in ("93", "95", "92", "101", "ninety-two", "94")],
    *[("id", t) for t in ("00123456", "RX-998877", "12345678", "123-45-6789", "S19-12345", "5567-22", "99887766")],
    *[("uid", t) for t in ("1.2.840.113619.2.55.3.604688119",)],
    *[("phone", t) for t in ("(555) 123-4567", "555.123.4567", "+49 30 1234567", "12345", "4455", "555-1234")],
    *[("email", "john.smith@hospital.org"), ("url", "https://pacs.hospital.org/study?id=3"), ("url", "www.abc.com")],
    *[("address", t) for t in ("12 Main Street", "Springfield, IL 62704", "P.O. Box 33", "90210")],
]
NOTE = """Name: SMITH, JOHN A  MRN: 00123456  DOB: 03/12/1925
Patient: Mary O'Brien. Accession #: RX-998877. Acc# 12345678. SSN 123-45-6789.
Referring physician: Jane van der Berg, M.D.
Exam date: 2019-03-12, compared with 12 March 2018, March 3, 2017, 5/6/17, 12-MAR-2016, 20150302, 04/2014 and
January 2013. Seen on 3/12. Operated January 3rd and Nov 5. Last film 12.03.19.
Mrs. Müller-Lüdenscheidt, a 93-year-old woman; sister aged 95, mother 92 y/o, aunt 101yoF, a ninety-two year old.
Dr. Doe and dr. jones were called at (555) 123-4567 or 555.123.4567 or +49 30 1234567, pager 12345, ext. 4455, 555-1234.
E-mail john.smith@hospital.org, see https://pacs.hospital.org/study?id=3 and www.abc.com.
12 Main Street, Springfield, IL 62704. P.O. Box 33. Zip: 90210.
Dictated by: Robert Brown
Electronically signed by ALICE GREEN MD on 01.02.2019. Read by Peter Parker, MD.
Study UID 1.2.840.113619.2.55.3.604688119 of DOE^JANE^Q. Specimen S19-12345. Case No. 5567-22. Order #: 99887766.
cc: Laura Palmer. Kevin Hart, MD, agreed. Dr. M. Imran Khan was told. We paged Dr. Emily
Stone. Drs. Miller and Rossi concur. Dr. Foley placed it. Findings were discussed with John Adams at 3:45 pm.
Radiologist: Dr. med. Hans Kowalski. Prof. Dr. Nowak, at the age of 94, agrees. DR LEWANDOWSKI NOTIFIED AT 3PM.
Compared with 12 jan 2020, dated 4.3.20.
"""
# Text of reports that is nobody's: eponyms, levels, fractions, measures, codes, ages up to 89, years, times.
INNOCENT = """Swan-Ganz catheter tip in the right main pulmonary artery. Kerley B lines. Hunt and Hess grade 3.
Density of 45 Hounsfield units. Dobhoff tube and Foley catheter in place. Cobb angle 23 degrees. Hampton hump.
Upper 1/2 of the lung, strength 5/5, 2/6 murmur, image 10/45 of series 3. Nodule of 3.3 x 2.2 cm, 8-12 weeks, T12-L1.
ICD 786.2, V76.12, 724.5; BP 120/80; saturation 98% on room air; 400-1000 mg; 1,234,567 cells; ratio 2.3.4.
There may be 5 mm nodules; march of progress. PA and lateral views. Discussed with Emergency Department at 3:45 pm.
Notified ICU Nurse. DR CHEST AT 3PM. The dr. med. faculty. Version 4.3.20.
45-year-old male, 85 y/o, 30 pack years. Radiologist: Attending. Read by: Radiology Resident.
Dr. XXXX was notified, Mr. ___ called. The Patient is a 45-year-old. Port-A-Cath, Boston Scientific. T1 and T2 weighted.
Bosniak 2F cyst, L4 5MM anterolisthesis, LEFT CT 12345 no. MR Brain and MS lesions. Since 2019. Mitral valve 90 mm.
Discussed with Port Cath team, notified Swan Ganz service.
Smith fracture, Ewing sarcoma, T. cruzi, E. coli. PMC1234567 NCT01234567. [NAME] on [DATE].
"""


@pytest.mark.parametrize(("kind", "identifier"), IDENTIFIERS, ids=[t for _, t in IDENTIFIERS])
def test_an_identifier_is_found_and_goes_whole(kind, identifier):
    assert identifier in NOTE
    found = [f for f in scan(NOTE) if identifier in f.text and f.kind == kind]
    assert found
    assert all(NOTE[f.start : f.end] == f.text for f in found)
    assert kind == "age" or len(identifier) < 6 or identifier not in mask(NOTE)[0]


def test_mask_replaces_by_kind_once_and_keeps_the_rest():
    text, findings = mask("Dr. Smith saw the 93-year-old on 3/12/2019: no effusion.")
    assert text == "Dr. [NAME] saw the [AGE]-year-old on [DATE]: no effusion."
    assert Counter(f.kind for f in findings) == {"name": 1, "age": 1, "date": 1}
    masked, _ = mask(NOTE)
    assert mask(masked) == (masked, [])  # nothing is masked twice
    assert "___" not in masked
    assert "Findings were discussed with [NAME] at 3:45 pm." in masked


@pytest.mark.parametrize("line", INNOCENT.splitlines())
def test_medical_text_stays_as_it_is(line):
    assert scan(line) == []


@cache
def iu_reports(test_data: Path) -> list[str]:
    archive = test_data / "iu_xray_reports" / "NLMCXR_reports.tgz"
    if not archive.exists():
        pytest.skip(f"MEDVLM_TEST_DATA: {archive} is missing")
    texts = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".xml"):
                root = ElementTree.fromstring(tar.extractfile(member).read())
                texts.append("\n".join(f"{a.get('Label')}: {a.text}" for a in root.iter("AbstractText") if a.text))
    return texts


def test_few_false_findings_in_real_reports_that_hold_no_phi(test_data):
    texts = iu_reports(test_data)
    assert len(texts) == 3955
    found = [text for text in texts if scan(text)]
    assert len(found) <= 4, found  # 0 when this was written: at most 1 in 1000


def test_names_and_dates_put_into_real_reports_are_found(test_data):
    """The gaps XXXX after "Dr." and the comparison are filled: what is found does not depend on our own note."""
    filled_in, missed = 0, []
    for n, text in enumerate(iu_reports(test_data)):
        if "Dr. XXXX" in text:
            name = ("Garcia", "Nguyen", "O'Neill", "Schmidt-Rottluff")[n % 4]
            filled = text.replace("Dr. XXXX", f"Dr. {name}", 1)
            filled_in += 1
            missed += [filled] if name in mask(filled)[0] else []
        if "COMPARISON: XXXX." in text:
            day = ("02/14/2011", "February 14, 2011", "14-FEB-11", "2011-02-14")[n % 4]
            filled = text.replace("COMPARISON: XXXX.", f"COMPARISON: {day}.", 1)
            filled_in += 1
            missed += [filled] if day in mask(filled)[0] else []
    assert filled_in > 100 and not missed


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Heart normal. Seen by Dr. ___ at 3 a.m. today. Lungs clear.", "Heart normal. Lungs clear."),
        ("A nodule of 1.2 cm, was ___ on prior. No effusion.", "No effusion."),
        (
            "T. cruzi was found. Compared with No. 3 of ___ it grew. Is it stable? No. Fine.",
            "T. cruzi was found. Is it stable? No. Fine.",
        ),
        ("Compared with ___\nthe effusion grew.\nHeart normal.", "Heart normal."),
        ("1. Stable ___.\n2. No effusion.\n- line of ___\n- heart normal", "2. No effusion.\n- heart normal"),
        ("Addendum ___\n_____________\n\nHeart normal.", "Heart normal."),
        ("Told to ___ by J. ___. ___ was paged!", ""),
        ("Seen by J. Smith and A. Doe on ___. Lungs clear.", "Lungs clear."),
        ("No mask here. T12. Fine.", "No mask here. T12. Fine."),
        ("", ""),
    ],
)
def test_sentences_with_a_mask_go_whole_and_others_stay(text, kept):
    assert " ".join(drop_masked_sentences(text).split(" ")).replace("  ", " ") == kept
    assert "___" not in drop_masked_sentences(text)


def test_splits_are_those_of_hmac_by_hand_and_never_change():
    for patient in ("p10000032", "CXR1", "ä", *map(str, range(5000))):
        bucket = int(hmac.new(b"medvlm", patient.encode(), hashlib.sha256).hexdigest(), 16) % 1000
        assert assign(patient) == ("train" if bucket < 800 else "validation" if bucket < 900 else "test")
    pinned = [assign(f"patient {i}") for i in range(12)]
    assert " ".join(s[:2] for s in pinned) == "tr tr tr tr va tr tr tr va tr tr tr"
    assert [assign(f"patient {i}", key="another") for i in range(12)] != pinned


def test_split_shares_hold_and_must_sum_to_100():
    counts = Counter(assign(str(i)) for i in range(20_000))
    assert counts["train"] == pytest.approx(16_000, abs=4 * (20_000 * 0.8 * 0.2) ** 0.5)
    assert counts["validation"] == pytest.approx(2_000, abs=4 * (20_000 * 0.1 * 0.9) ** 0.5)
    assert {assign(str(i), shares=(0, 0, 100)) for i in range(100)} == {"test"}
    assert {assign(str(i), shares=(50, 0, 50)) for i in range(100)} == {"train", "test"}
    for wrong in ((80, 10, 20), (110, -10, 0), (100, 0)):
        with pytest.raises(UserError, match="sum to 100"):
            assign("x", shares=wrong)
    with pytest.raises(UserError, match="group"):
        assign("")
    assert splits.SPLITS == ("train", "validation", "test")


def drawn(test_data: Path, text: str):
    from PIL import Image, ImageDraw, ImageFont

    folder = test_data / "cxr_covid_collection" / "images_512"
    if not folder.is_dir():
        pytest.skip(f"MEDVLM_TEST_DATA: {folder} is missing")
    image = Image.open(folder / "000001-17.jpg").convert("L").crop((100, 60, 512, 420))
    draw = ImageDraw.Draw(image)
    draw.text((20, 20), text, fill=255, font=ImageFont.load_default(26))
    return image


def test_ocr_finds_drawn_text_but_reports_no_side_markers(test_data, tmp_path, capsys):
    pytest.importorskip("rapidocr_onnxruntime", reason="the extra ocr is not installed: pip install 'medvlm[ocr]'")
    image = drawn(test_data, "SMITH JOHN 12/03/2019")
    ((box, text, score),) = burnt_in.text_boxes(image)
    assert "SMITH" in text and score > 0.5
    assert box[0] <= 30 and box[2] >= 250 and 10 <= box[1] < box[3] <= 60
    assert burnt_in.text_boxes(burnt_in.blank(image, [box])) == []
    assert burnt_in.text_boxes(drawn(test_data, "PORTABLE")) == []
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_text("no picture")
    burnt_in.prepare(tmp_path / "in", tmp_path / "report.csv", tmp_path / "blanked")
    assert capsys.readouterr().out.strip() == "1 screened, 1 flagged, 1 unreadable"
    assert "SMITH" in (tmp_path / "report.csv").read_text() and (tmp_path / "blanked" / "a.png").exists()


def test_side_markers_are_recognised_and_names_are_not():
    assert all(map(burnt_in.is_side_marker, ("L", "R", "PORTABLE", "AP SUPINE", "Semi-Erect", "PA", "LEFT LAT")))
    assert not any(map(burnt_in.is_side_marker, ("SMITH", "L SMITH", "12/03/2019", "", "PORTABLE 0815")))


def test_blank_fills_boxes_and_nothing_else():
    from PIL import Image

    pixels = np.full((40, 50), 100, np.uint8)
    pixels[0, 0] = 7
    out = np.asarray(burnt_in.blank(Image.fromarray(pixels), [(10, 20, 30, 25)], margin=2))
    expected = pixels.copy()
    expected[18:27, 8:32] = 7
    assert np.array_equal(out, expected)


def test_without_the_extra_the_error_names_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    burnt_in._reader.cache_clear()
    from PIL import Image

    with pytest.raises(UserError, match=r"medvlm\[ocr\]"):
        burnt_in.text_boxes(Image.new("L", (8, 8)))
    burnt_in._reader.cache_clear()
