"""The phantom says what it shows: pictures, masks, labels, reports and questions agree."""

from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import medvlm

from data_prep.phantom import SPLITS, generate, make_study, plan_study, split_of, studies_of
from data_prep.phantom_anatomy import Build, Finding, Shot
from data_prep.phantom_draw import draw
from data_prep.phantom_text import DEVICES, LABEL_OF, LABELS
from medvlm.data.schema import parse_sample
from medvlm.data.shards import ShardReader
from medvlm.errors import UserError

SHOT = Shot(noise=0.0)


@pytest.fixture(scope="module")
def studies():
    """[(sample, members)] of 160 patients with all their studies."""
    jobs = [(p, s) for p in range(160) for s in range(studies_of(0, p))]
    return [make_study(0, p, s, width=96, height=96, masks=True) for p, s in jobs]


def names_of(sample):
    return [f["finding"] for f in sample.metadata["findings"]]


def turns(sample):
    return list(zip(sample.messages[::2], sample.messages[1::2], strict=True))


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(tmp_path):
    for workers in (1, 2):
        generate(tmp_path / str(workers), images=40, size=48, masks=True, workers=workers)
    tars = sorted((tmp_path / "1").rglob("*.tar"))
    assert [t.parent.name for t in tars] == sorted(SPLITS)
    for tar in tars:
        assert tar.read_bytes() == (tmp_path / "2" / tar.relative_to(tmp_path / "1")).read_bytes()
    assert make_study(1, 0, 0, width=48, height=48)[1] != make_study(0, 0, 0, width=48, height=48)[1]


def test_patients_stay_in_one_split_and_some_come_back(tmp_path):
    counts = generate(tmp_path, patients=120, size=48, preset="easy", workers=1)
    groups = {s: ShardReader(tmp_path / s).table["group"].to_pylist() for s in SPLITS}
    assert counts == {s: len(g) for s, g in groups.items()}
    assert sum(len(set(g)) for g in groups.values()) == len(set().union(*groups.values())) == 120
    assert len(groups["train"]) > len(set(groups["train"])), "follow-up studies exist"
    shares = Counter(split_of(p, 0) for p in range(4000))
    assert shares["train"] / 4000 == pytest.approx(0.8, abs=0.03)
    assert {split_of(p, 0, (1, 0, 0)) for p in range(100)} == {"train"}


@pytest.mark.parametrize("name", ["effusion", "pneumothorax", "consolidation", "nodule", "mass", "atelectasis"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_finding_changes_the_picture_on_its_side_in_the_right_direction(name, side):
    size = {"nodule": 24.0, "mass": 50.0, "consolidation": 0.35}.get(name, 0.28)
    finding = Finding(name, side, "middle", size, seed=3)
    healthy, _ = draw(Build(), SHOT, [], 160, 160)
    sick, masks = draw(Build(), SHOT, [finding], 160, 160)
    mask = masks[0] > 0
    assert mask.sum() > 40
    change = (sick - healthy)[mask].mean()
    assert change < -0.05 if name == "pneumothorax" else change > 0.05
    share = mask[:, 80:].sum() / mask.sum()  # the viewer's right half is the patient's left
    assert share > 0.98 if side == "left" else share < 0.02
    if name in ("nodule", "mass", "effusion", "pneumothorax"):
        other = slice(0, 70) if side == "left" else slice(90, None)
        assert np.abs(sick - healthy)[:, other].max() < 0.02, "the other side stays as it was"


@pytest.mark.parametrize("name", [*DEVICES, "fracture", "edema"])
def test_devices_fractures_and_edema_are_drawn(name):
    side = None if name in ("edema", "endotracheal tube") else "left"
    sick, masks = draw(Build(), SHOT, [Finding(name, side, size=0.6)], 256, 256)
    healthy, _ = draw(Build(), SHOT, [], 256, 256)
    difference = sick - healthy
    mask = masks[0] > 0
    assert np.abs(difference)[mask].max() > 0.08
    if name != "fracture":
        assert difference[mask].mean() > 0.05
    if name in DEVICES:
        assert sick[mask].max() > 0.85


def test_zones_are_ordered_from_the_apex_to_the_base():
    rows = []
    for zone in ("upper", "middle", "lower"):
        _, masks = draw(Build(), SHOT, [Finding("consolidation", "right", zone, 0.3)], 128, 128)
        rows.append(np.flatnonzero(masks[0].any(1)).mean())
    assert rows[0] + 10 < rows[1] and rows[1] + 10 < rows[2]


@pytest.mark.parametrize("seed", range(4))
def test_cardiothoracic_ratio_on_the_mask(seed):
    """The heart's width over the inner width of the chest: above 0.55 when enlarged, below 0.5 when normal."""
    build, shot, *_ = plan_study(seed, 0, 0, "full")
    chest = 2 * build.half * 200 * shot.zoom  # pixels at 400 px
    for size, enlarged in ((build.heart, False), (0.60, True)):
        _, masks = draw(build, replace(shot, view="PA", tilt=0.0), [Finding("cardiomegaly", size=size)], 400, 400)
        columns = np.flatnonzero(masks[0].any(0))
        ratio = (columns[-1] + 1 - columns[0]) / chest
        assert ratio == pytest.approx(size, abs=0.02)
        assert ratio > 0.55 if enlarged else ratio < 0.5


def test_both_pleural_findings_of_one_side_stay_visible():
    findings = [Finding("pneumothorax", "left", size=0.25), Finding("effusion", "left", size=0.3)]
    picture, masks = draw(Build(), SHOT, findings, 128, 128)
    assert not (masks[0] & masks[1]).any()
    assert picture[masks[1] > 0].mean() - picture[masks[0] > 0].mean() > 0.3


def test_labels_report_and_findings_agree(studies):
    for sample, _ in studies:
        names = names_of(sample)
        assert tuple(sample.labels) == LABELS
        for label in set(LABEL_OF.values()):
            drawn = any(LABEL_OF[n] == label for n in names)
            assert (sample.labels[label] in (1, -1)) == drawn, (sample.key, label)
        abnormal = [n for n in names if n not in DEVICES]
        assert (sample.labels["No Finding"] == 1) == (not abnormal)
        text = sample.report["findings"].lower()
        assert not {"{", "none", "  "} & set(text.split(" ")) and "none" not in text
        if "cardiomegaly" in names:
            assert "heart size is normal" not in text
        if sample.labels["Pleural Effusion"] == 0:
            assert "effusion" not in names
        for finding in sample.metadata["findings"]:
            if finding["side"] and finding["finding"] in ("pneumothorax", "effusion", "fracture", "chest tube"):
                assert finding["side"] in text


def test_boxes_and_masks_agree(studies):
    for sample, members in studies:
        label_map = cv2.imdecode(np.frombuffer(members["0.mask.png"], np.uint8), cv2.IMREAD_UNCHANGED)
        assert label_map.shape == (96, 96)
        assert {box.label for box in sample.boxes} == set(names_of(sample)), sample.key
        assert len(sample.boxes) == len(names_of(sample))
        assert set(np.unique(label_map)) <= {0, *map(int, sample.metadata["mask_values"])}
        for number, box in enumerate(sample.boxes):
            x0, y0, x1, y1 = box.xyxy
            assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 96
            rows, columns = np.nonzero(label_map == number + 1)
            assert ((columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)).all()


def test_questions_are_answered_by_what_is_drawn(studies):
    nouns = {
        "pneumothorax": "pneumothorax",
        "rib fracture": "fracture",
        "lung mass": "mass",
        "chest tube": "chest tube",
    }
    for sample, _ in studies:
        names, found = names_of(sample), sample.metadata["findings"]
        assert sample.messages[0].n_images == 1
        for question, answer in turns(sample):
            for noun, name in nouns.items():
                if answer.question_type == "presence" and noun in question.text:
                    assert (answer.text == "yes") == (name in names)
                if answer.question_type == "side" and noun in question.text:
                    assert answer.text in {f["side"] for f in found if f["finding"] == name}
            if answer.question_type == "view":
                assert answer.text.upper() == sample.images[0].view
            if answer.question_type == "count" and "effusion" in question.text:
                assert int(answer.text) == names.count("effusion")
            if answer.question_type == "severity":
                assert answer.text in {f["severity"] for f in found}
            if sample.images[0].view == "LATERAL":
                assert answer.question_type != "side"
    answers = [a for s, _ in studies for _, a in turns(s)]
    kinds = Counter(a.question_type for a in answers)
    assert set(kinds) >= {"presence", "side", "count", "view", "severity", "finding"}
    assert {a.answer_type for a in answers} == {"closed", "open"}
    yes = np.mean([a.text == "yes" for a in answers if a.question_type == "presence"])
    assert 0.35 < yes < 0.65


def test_the_full_preset_covers_findings_views_doubt_and_identical_normal_reports(studies):
    samples = [s for s, _ in studies]
    assert {n for s in samples for n in names_of(s)} == set(LABEL_OF)
    assert {s.images[0].view for s in samples} == {"PA", "AP", "LATERAL"}
    words = Counter(s.report["findings"] for s in samples)
    assert words.most_common(1)[0][1] > 10
    assert {s.labels["Pneumonia"] for s in samples} == {None, -1}
    assert any(-1 in (s.labels["Pleural Effusion"], s.labels["Edema"]) for s in samples)
    follow_ups = [s for s in samples if s.metadata["study"]]
    assert any("increased" in s.report["findings"] for s in follow_ups)
    assert any("no longer seen" in s.report["findings"] for s in follow_ups)


def test_every_sample_is_marked_synthetic_and_survives_storage(studies):
    assert len({s.key for s, _ in studies}) == len(studies)
    for sample, _ in studies:
        assert sample.synthetic and sample.metadata["synthetic"] and sample.patient_id.startswith("phantom-p")
        assert parse_sample(sample.model_dump_json(exclude_defaults=True), sample.key) == sample


def test_easy_questions_are_short_and_balanced():
    answers: dict[str, list[bool]] = {}
    for patient in range(400):
        sample, _ = make_study(0, patient, 0, width=32, height=32, preset="easy")
        assert sample.images[0].view in ("PA", "AP")
        for question, answer in turns(sample):
            answers.setdefault(question.text, []).append(answer.text == "yes")
    assert len(answers) == 8 and all(len(question) <= 22 for question in answers)
    assert all(0.42 < np.mean(a) < 0.58 for a in answers.values())
    assert 0.47 < np.mean([a for row in answers.values() for a in row]) < 0.53


def test_easy_findings_are_large_and_absent_ones_leave_the_picture_alone():
    for patient in range(20):
        build, shot, findings, *_ = plan_study(0, patient, 0, "easy")
        _, masks = draw(build, shot, findings, 64, 64)
        for n, f in enumerate(findings):
            assert masks[n].sum() > (8 if f.name == "pacemaker" else 40)
        for f in findings:
            assert f.name != "effusion" or f.size >= 0.2


@pytest.mark.parametrize("bits", [8, 16])
def test_large_and_16_bit_pictures(bits):
    sample, members = make_study(1, 4, 0, width=2500, height=3000, bits=bits)
    file = "0.jpg" if bits == 8 else "0.png"
    pixels = cv2.imdecode(np.frombuffer(members[file], np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels.shape == (3000, 2500) and pixels.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert (sample.images[0].file, sample.images[0].width, sample.images[0].height) == (file, 2500, 3000)
    if bits == 16:
        assert len(np.unique(pixels)) > 5000


def test_a_follow_up_carries_the_image_of_the_study_before():
    with_prior = 0
    for patient in range(60):
        for study in range(studies_of(0, patient)):
            alone, members = make_study(0, patient, study, width=64, height=64)
            sample, more = make_study(0, patient, study, width=64, height=64, with_prior=True)
            assert sample.images[0] == alone.images[0] and more["0.png"] == members["0.png"]
            assert sample.report == alone.report and sample.messages[0].n_images == len(sample.images)
            if len(sample.images) == 1:
                assert not study or "LATERAL" in {
                    v.view for v in (plan_study(0, patient, study - n, "full")[1] for n in (0, 1))
                }
                continue
            before, pixels = make_study(0, patient, study - 1, width=64, height=64)
            assert more["1.png"] == pixels["0.png"] != more["0.png"]
            prior = sample.images[1]
            assert (prior.metadata["role"], prior.image_id, prior.view) == ("prior", before.key, before.images[0].view)
            with_prior += 1
    assert with_prior > 10


def test_wrong_options_are_one_sentence(tmp_path):
    assert "neither full nor easy" in medvlm("prepare", "phantom", tmp_path, "--preset", "hard", status=2)
    for options, message in [
        ({"images": 10, "bits": 12}, "neither 8 nor 16"),
        ({"images": 10, "size": 8}, "outside 32 to 8192"),
        ({"images": 0}, "must be positive"),
        ({"images": 1}, "too few images"),
        ({}, "either a number of images or"),
        ({"images": 10, "bits": 16, "file_format": "jpg"}, "not possible with 16 bits"),
    ]:
        with pytest.raises(UserError, match=message):
            generate(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()
