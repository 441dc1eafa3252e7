"""The phantom says what it shows: pictures, masks, labels, reports and questions agree."""

import dataclasses

import numpy as np
import pytest
from conftest import medvlm

from data_prep.phantom import generate, make_study, split_of
from data_prep.phantom_draw import Anatomy, Finding, draw
from data_prep.phantom_text import LABEL_OF
from medvlm.data.shards import ShardReader


@pytest.fixture(scope="module")
def studies():
    return [make_study(0, patient, 0, width=96, height=96, masks=True)[0] for patient in range(200)]


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(tmp_path):
    for workers in (1, 2):
        generate(tmp_path / str(workers), images=120, size=64, workers=workers)
    for tar in (tmp_path / "1").rglob("*.tar"):
        assert tar.read_bytes() == (tmp_path / "2" / tar.relative_to(tmp_path / "1")).read_bytes()
    generate(tmp_path / "other", images=120, size=64, seed=1, workers=1)
    tar = "train/phantom-train-000000.tar"
    assert (tmp_path / "other" / tar).read_bytes() != (tmp_path / "1" / tar).read_bytes()


def test_patients_stay_in_one_split_and_some_come_back(tmp_path):
    generate(tmp_path, images=200, size=64, workers=2)
    groups = {s: ShardReader(tmp_path / s).table["group"].to_pylist() for s in ("train", "validation", "test")}
    sets = {name: set(patients) for name, patients in groups.items()}
    assert not sets["train"] & sets["test"] and not sets["train"] & sets["validation"]
    assert len(groups["train"]) > len(sets["train"]), "follow-up studies exist"
    assert split_of(3, 0) == split_of(3, 0)


@pytest.mark.parametrize("name", ["effusion", "pneumothorax", "consolidation", "nodule", "pacemaker", "edema"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_finding_changes_the_picture_on_its_side_in_the_right_direction(name, side):
    finding = Finding(name, side, "middle", 0.25)
    healthy, _ = draw(Anatomy(noise=0.0), 128, 128, np.random.default_rng(0))
    sick, masks = draw(Anatomy(noise=0.0, findings=(finding,)), 128, 128, np.random.default_rng(0))
    mask = masks[0]
    assert mask.sum() > 20
    change = (sick - healthy)[mask].mean()
    assert change < -0.02 if name == "pneumothorax" else change > 0.02
    if name != "edema":
        half = mask[:, 64:].sum() / mask.sum()  # the viewer's right half is the patient's left
        assert half > 0.9 if side == "left" else half < 0.1


@pytest.mark.parametrize(("ratio", "enlarged"), [(0.45, False), (0.62, True)])
def test_the_hearts_drawn_width_is_its_cardiothoracic_ratio(ratio, enlarged):
    anatomy = Anatomy(noise=0.0, findings=(Finding("cardiomegaly", size=ratio),))
    _, masks = draw(anatomy, 400, 400, np.random.default_rng(0))
    columns = np.flatnonzero(masks[0].any(0))
    chest = 2 * (0.13 + 2 * anatomy.lung) * 200
    assert (columns[-1] - columns[0]) / chest == pytest.approx(ratio, abs=0.05)
    assert ((columns[-1] - columns[0]) / chest > 0.55) == enlarged


def test_labels_report_boxes_and_questions_agree(studies):
    for sample in studies:
        names = [f["finding"] if "finding" in f else f["name"] for f in sample.metadata["findings"]]
        for name, label in LABEL_OF.items():
            assert (sample.labels[label] == 1) == (name in names)
        assert sample.labels["No Finding"] == 1 or set(names) - {"pacemaker"}
        assert {box.label for box in sample.boxes} <= set(names)
        assert all(0 <= b.xyxy[0] < b.xyxy[2] <= 96 and 0 <= b.xyxy[1] < b.xyxy[3] <= 96 for b in sample.boxes)
        for question, answer in zip(sample.messages[::2], sample.messages[1::2], strict=True):
            if answer.question_type == "presence" and "effusion" in question.text:
                assert (answer.text == "yes") == ("effusion" in names)
        if "effusion" in names:
            assert "effusion" in sample.report["findings"] and "no pleural effusion" not in sample.report["findings"]
    kinds = {m.question_type for s in studies for m in s.messages if m.role == "assistant"}
    assert kinds >= {"presence", "side", "view", "severity", "count", "finding"}


def test_many_normal_reports_are_identical_and_some_are_uncertain(studies):
    findings = [s.report["findings"] for s in studies]
    assert max(findings.count(text) for text in findings) > 10
    assert any(s.labels["Pneumonia"] == -1 for s in studies)


def test_every_sample_says_that_it_is_synthetic(studies):
    assert all(s.synthetic and s.metadata["synthetic"] and s.patient_id.startswith("phantom") for s in studies)


def test_easy_questions_are_balanced():
    answers: dict[str, list[bool]] = {}
    for patient in range(300):
        sample, _ = make_study(0, patient, 0, width=64, height=64, preset="easy")
        for question, answer in zip(sample.messages[::2], sample.messages[1::2], strict=True):
            answers.setdefault(question.text, []).append(answer.text == "yes")
    assert len(answers) == 8
    assert all(0.4 < np.mean(a) < 0.6 for a in answers.values())


def test_large_and_16_bit_pictures():
    import cv2

    sample, members = make_study(1, 4, 0, width=2500, height=3000, bits=16)
    pixels = cv2.imdecode(np.frombuffer(members["0.png"], np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels.shape == (3000, 2500) and pixels.dtype == np.uint16 and len(np.unique(pixels)) > 256
    assert (sample.images[0].width, sample.images[0].height) == (2500, 3000)
    _, members = make_study(1, 4, 0, width=512, height=512)
    assert list(members) == ["0.jpg"]


def test_noise_and_build_differ_between_patients():
    a, b = (make_study(0, p, 0, width=64, height=64)[1]["0.png"] for p in (1, 2))
    assert a != b
    assert dataclasses.asdict(Anatomy())["findings"] == ()


def test_wrong_options_are_one_sentence(tmp_path):
    assert "neither full nor easy" in medvlm("prepare", "phantom", tmp_path, "--preset", "hard", status=2)
    assert "neither 8 nor 16" in medvlm("prepare", "phantom", tmp_path, "--bits", 12, status=2)
