"""VQA-RAD -> shards. The figures are those of the release: Lau et al. 2018 (451 test questions; 2,248 rows in all)."""

import io
import json
import os
from pathlib import Path

import pytest
import typer
from PIL import Image as PILImage
from typer.testing import CliRunner

from data_prep.vqa_rad import RELEASE, assign, build, prepare
from medvlm.data.inspect import verify
from medvlm.data.shards import ShardReader
from medvlm.errors import UserError

DATA = Path(os.environ.get("MEDVLM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "vqa_rad"
needs_release = pytest.mark.skipif(
    not (DATA / RELEASE).exists(), reason=f"the VQA-RAD release is not at {DATA}; set MEDVLM_TEST_DATA"
)


def row(number: int, **values: object) -> dict[str, object]:
    base = {
        "qid": number,
        "phrase_type": "freeform",
        "image_name": "a.jpg",
        "image_case_url": "https://medpix.nlm.nih.gov/case?id=case-a",
        "image_organ": "CHEST",
        "question": f"Question {number}?",
        "question_type": "PRES",
        "answer": "yes",
        "answer_type": "CLOSED",
    }
    return {**base, **values}


def jpeg(width: int = 20, height: int = 10) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("L", (width, height), 90).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def release(tmp_path: Path):
    def make(rows: list[dict[str, object]], images: dict[str, bytes] | None = None) -> Path:
        folder = tmp_path / "release"
        (folder / "images").mkdir(parents=True)
        (folder / RELEASE).write_text(json.dumps(rows))
        for name, data in (images if images is not None else {"a.jpg": jpeg()}).items():
            (folder / "images" / name).write_bytes(data)
        return folder

    return make


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("vqa_rad") / "official"
    return out, build(DATA, out)


@needs_release
def test_official_split_has_the_published_counts(official):
    _, report = official
    train, test = report["splits"]["train"], report["splits"]["test"]
    assert (test["questions"], test["images"], test["closed"], test["open"]) == (451, 203, 272, 179)
    assert (train["questions"], train["images"], train["dropped"]) == (1793, 313, {"duplicate question": 4})
    assert train["questions"] + test["questions"] + 4 == report["rows"] == 2248
    assert train["closed"] + train["open"] == train["questions"]


@needs_release
def test_official_split_reports_that_its_test_images_occur_in_train(official):
    out, report = official
    names = {s: {i.image_id for i in samples(out / s, "images")} for s in ("train", "test")}
    assert report["test_images_in_train"] == len(names["train"] & names["test"]) == 202
    assert report["test_images"] == 203
    assert any("in test and train" in p["reason"] for p in verify([out / "train", out / "test"])["problems"])


@needs_release
def test_integer_answers_and_stray_white_space_become_tidy_text(official):
    out, _ = official
    messages = [m for s in ("train", "test") for m in samples(out / s, "messages")]
    assert sum(m.role == "assistant" for m in messages) == 2244
    assert all(m.text == " ".join(m.text.split()) and m.text for m in messages)
    assert {m.answer_type for m in messages if m.role == "assistant"} == {"closed", "open"}
    kinds = {kind for m in messages if m.question_type for kind in m.question_type.split(", ")}
    assert not kinds & {"PRSE", "ATRIB", "Other"}


@needs_release
def test_jpeg_bytes_are_those_of_the_release_with_their_true_size(official):
    out, _ = official
    reader = ShardReader(out / "test")
    for i in (0, 100, 202):
        image = reader.sample(i).images[0]
        original = (DATA / "images" / image.image_id).read_bytes()
        assert reader.images(i) == [original]
        with PILImage.open(io.BytesIO(original)) as opened:
            assert opened.size == (image.width, image.height)


@needs_release
def test_image_disjoint_split_shares_no_image_and_no_case(tmp_path):
    report = build(DATA, tmp_path, "image-disjoint")
    folders = [tmp_path / s for s in ("train", "validation", "test")]
    assert report["test_images_in_train"] == 0
    assert sum(s["questions"] for s in report["splits"].values()) == 2244
    assert sum(s["images"] for s in report["splits"].values()) == 314
    assert min(s["images"] for s in report["splits"].values()) >= 20
    assert verify(folders)["problems"] == []


@needs_release
def test_writing_twice_gives_the_same_bytes(official, tmp_path):
    out, _ = official
    build(DATA, tmp_path)
    name = Path("test") / "vqa_rad-000000.tar"
    assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def samples(folder: Path, attribute: str) -> list:
    reader = ShardReader(folder)
    return [item for i in range(len(reader)) for item in getattr(reader.sample(i), attribute)]


def test_all_questions_of_an_image_become_one_conversation(release, tmp_path):
    rows = [
        row(1, answer=2, answer_type="OPEN", question_type="COUNT"),
        row(2, question=" Is it  \t big? ", answer_type="CLOSED ", question_type="SIZE, PRSE"),
    ]
    build(release(rows), tmp_path / "out")
    sample = ShardReader(tmp_path / "out" / "train").sample(0)
    assert [m.n_images for m in sample.messages] == [1, 0, 0, 0]
    assert sample.messages[0].content[0].type == "image"
    assert [m.text for m in sample.messages] == ["Question 1?", "2", "Is it big?", "yes"]
    answers = sample.messages[1::2]
    assert [(m.answer_type, m.question_type) for m in answers] == [("open", "COUNT"), ("closed", "SIZE, PRES")]
    assert (sample.source, sample.license, sample.study_id) == ("vqa_rad", "CC0-1.0", "case-a")
    assert (sample.images[0].image_id, sample.images[0].width, sample.images[0].height) == ("a.jpg", 20, 10)
    assert sample.metadata["qids"] == ["1", "2"]


def test_of_a_duplicate_across_splits_the_test_copy_stays(release, tmp_path):
    same = {"question": "Same?", "answer": "no"}
    rows = [row(1, **same), row(2), row(3, **same, phrase_type="test_para")]
    report = build(release(rows), tmp_path / "out")
    assert report["splits"]["test"]["questions"] == 1
    assert report["splits"]["train"]["dropped"] == {"duplicate question": 1}


def test_missing_and_unreadable_images_and_bad_rows_are_listed_not_lost(release, tmp_path):
    names = ["a.jpg", "gone.jpg", "broken.jpg", "a.jpg", "../a.jpg", "a.jpg"]
    rows = [row(n, image_name=name) for n, name in enumerate(names)]
    rows[3]["answer"] = "  "
    del rows[5]["answer_type"]
    report = build(release(rows, {"a.jpg": jpeg(), "broken.jpg": jpeg()[:100]}), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert report["quarantined"] == len(lines) == 5
    assert report["splits"]["train"]["dropped"] == {"missing image": 1, "unreadable image": 1}
    assert report["dropped_without_split"] == {"bad row": 3}
    assert report["splits"]["train"]["questions"] == 1
    reasons = " ".join(line["reason"] for line in lines)
    for part in ("missing image", "unreadable image", "empty answer", "not a plain file name", "lacks answer_type"):
        assert part in reasons


def test_the_assignment_of_a_case_never_changes():
    assert [assign(f"case-{i}") for i in range(4)] == ["train", "test", "train", "train"]
    places = [assign(str(i)) for i in range(4000)]
    assert places.count("train") / 4000 == pytest.approx(0.75, abs=0.03)
    assert places.count("test") / 4000 == pytest.approx(0.15, abs=0.03)


def test_a_missing_release_and_an_old_output_are_refused_with_a_sentence(release, tmp_path):
    with pytest.raises(UserError, match="give the folder of the VQA-RAD release"):
        build(tmp_path / "nowhere", tmp_path / "out")
    folder = release([row(1)])
    build(folder, tmp_path / "out")
    with pytest.raises(UserError, match="already holds shards"):
        build(folder, tmp_path / "out", "image-disjoint")


def test_the_command_prints_a_table_or_json(release, tmp_path):
    app = typer.Typer()
    app.command()(prepare)
    folder = release([row(1), row(2, phrase_type="test_freeform")])
    table = CliRunner().invoke(app, [str(folder), str(tmp_path / "one"), "--split", "official"])
    assert table.exit_code == 0 and "1 of 1 test images also occur in train" in table.output
    machine = CliRunner().invoke(app, [str(folder), str(tmp_path / "two"), "--json"])
    assert json.loads(machine.output)["splits"]["test"]["questions"] == 1
    assert CliRunner().invoke(app, [str(folder), str(tmp_path / "three"), "--split", "mine"]).exit_code == 2
