"""VQA-RAD -> shards. The figures are those of the release: Lau et al. 2018 (451 test questions; 2,248 rows in all)."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from archives import kept
from PIL import Image as PILImage
from questions_archives import reasons, samples

from data_prep.pipeline import PipelineOptions, run
from data_prep.pixels import PixelOptions
from data_prep.vqa_rad import CONVERTER, RELEASE, assign, items
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


def prepare(source: Path, out: Path, **options: object) -> tuple[dict, dict[str, ShardReader]]:
    """The pipeline's report, and a reader of each split."""
    settings = PipelineOptions(pixels=PixelOptions(), workers=1, max_bad=0.9, allow_leak=bool(options.pop("leak", 0)))
    report = run(CONVERTER, source, str(out), settings, **options)
    folders = [out / s for s in ("train", "validation", "test") if (out / s).is_dir()]
    return report, {f.name: ShardReader(sorted(f.glob("*.tar"))) for f in folders}


@pytest.fixture(scope="module")
def official():
    return list(items(DATA))


def counts(found: list, split: str) -> tuple[int, int, int, int]:
    """Questions, images, closed and open questions of a split."""
    here = [s for s in samples(found).values() if s.split == split]
    kinds = Counter(m.answer_type for s in here for m in s.messages[1::2])
    return sum(kinds.values()), len(here), kinds["closed"], kinds["open"]


@needs_release
def test_official_split_has_the_published_counts(official):
    assert counts(official, "test") == (451, 203, 272, 179)
    train = counts(official, "train")
    assert train[:2] == (1793, 313) and sum(train[2:]) == 1793
    assert reasons(official) == {("train", "duplicate question"): 4, (None, "image without question"): 1}
    assert train[0] + 451 + 4 == len(json.loads((DATA / RELEASE).read_text())) == 2248


@needs_release
def test_official_split_says_that_its_test_images_occur_in_train(official, caplog):
    names = {s: {i.images[0].image_id for i in kept(official) if i.fields["split"] == s} for s in ("train", "test")}
    assert (len(names["train"] & names["test"]), len(names["test"])) == (202, 203)
    list(items(DATA))
    assert "202 of 203 test images also occur in train" in caplog.text


@needs_release
def test_integer_answers_and_stray_white_space_become_tidy_text(official):
    messages = [m for s in samples(official).values() for m in s.messages]
    assert sum(m.role == "assistant" for m in messages) == 2244
    assert all(m.text == " ".join(m.text.split()) and m.text for m in messages)
    assert {m.answer_type for m in messages if m.role == "assistant"} == {"closed", "open"}
    kinds = {kind for m in messages if m.question_type for kind in m.question_type.split(", ")}
    assert not kinds & {"PRSE", "ATRIB", "Other"}


@needs_release
def test_image_disjoint_split_shares_no_image_and_no_case(official, caplog):
    found = list(items(DATA, "image-disjoint"))
    made = samples(found)
    groups = {s: {m.group for m in made.values() if m.split == s} for s in ("train", "validation", "test")}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))
    images = Counter(m.split for m in made.values())
    assert sum(images.values()) == 314 and min(images.values()) >= 20
    assert sum(len(m.messages) // 2 for m in made.values()) == 2244
    assert "also occur" not in caplog.text


@needs_release
def test_the_release_goes_through_the_pipeline_with_its_pixels_and_twice_with_the_same_bytes(tmp_path):
    with pytest.raises(UserError, match=r"in more than one split.*--allow-leak"):
        prepare(DATA, tmp_path / "refused")
    report, splits = prepare(DATA, tmp_path / "one", leak=True)
    assert {name: len(reader) for name, reader in splits.items()} == {"train": 313, "test": 203}
    assert "duplicate question" in repr(report)
    reader = splits["test"]
    for i in (0, 100, 202):
        image = reader.sample(i).images[0]
        with PILImage.open(DATA / "images" / image.image_id) as original:
            with PILImage.open(io.BytesIO(reader.images(i)[0])) as stored:
                assert stored.tobytes() == original.tobytes()
            assert original.size == (image.width, image.height)
    prepare(DATA, tmp_path / "two", leak=True)
    for name in ("train", "test"):
        (tar,) = (tmp_path / "one" / name).glob("*.tar")
        assert tar.read_bytes() == (tmp_path / "two" / name / tar.name).read_bytes()


def test_all_questions_of_an_image_become_one_conversation(release, tmp_path):
    rows = [
        row(1, answer=2, answer_type="OPEN", question_type="COUNT"),
        row(2, question=" Is it  \t big? ", answer_type="CLOSED ", question_type="SIZE, PRSE"),
    ]
    _, splits = prepare(release(rows), tmp_path / "out")
    sample = splits["train"].sample(0)
    assert [m.n_images for m in sample.messages] == [1, 0, 0, 0]
    assert sample.messages[0].content[0].type == "image"
    assert [m.text for m in sample.messages] == ["Question 1?", "2", "Is it big?", "yes"]
    answers = sample.messages[1::2]
    assert [(m.answer_type, m.question_type) for m in answers] == [("open", "COUNT"), ("closed", "SIZE, PRES")]
    assert (sample.source, sample.license, sample.study_id) == ("vqa_rad", "CC0-1.0", "case-a")
    assert (sample.images[0].image_id, sample.images[0].width, sample.images[0].height) == ("a.jpg", 20, 10)
    assert sample.metadata["qids"] == ["1", "2"]
    assert verify([tmp_path / "out" / "train"])["problems"] == []


def test_of_a_duplicate_across_splits_the_test_copy_stays(release):
    same = {"question": "Same?", "answer": "no"}
    found = list(items(release([row(1, **same), row(2), row(3, **same, phrase_type="test_para")])))
    assert [m.text for m in samples(found)["a-test"].messages] == ["Same?", "no"]
    assert reasons(found) == {("train", "duplicate question"): 1}


def test_missing_and_unreadable_images_and_bad_rows_are_listed_not_lost(release, tmp_path):
    names = ["a.jpg", "gone.jpg", "broken.jpg", "a.jpg", "../a.jpg", "a.jpg"]
    rows = [row(n, image_name=name) for n, name in enumerate(names)]
    rows[3]["answer"] = "  "
    del rows[5]["answer_type"]
    source = release(rows, {"a.jpg": jpeg(), "broken.jpg": b"404: not found", "extra.jpg": jpeg()})
    found = list(items(source))
    assert reasons(found) == {(None, "bad row"): 3, (None, "image without question"): 1, ("train", "missing image"): 1}
    told = " ".join(f"{d.what} {d.reason}" for d in found if hasattr(d, "what"))
    for part in ("gone.jpg", "empty answer", "not a plain file name", "lacks answer_type", "extra.jpg"):
        assert part in told
    report, splits = prepare(source, tmp_path / "out")
    assert [splits["train"].key(i) for i in range(len(splits["train"]))] == ["a-train"]
    quarantine = [
        line for path in (tmp_path / "out").rglob("*quarantine*.jsonl") for line in path.read_text().splitlines()
    ]
    assert any("broken.jpg" in line for line in quarantine), report


def test_the_assignment_of_a_case_never_changes():
    assert [assign(f"case-{i}") for i in range(4)] == ["train", "test", "train", "train"]
    places = [assign(str(i)) for i in range(4000)]
    assert places.count("train") / 4000 == pytest.approx(0.75, abs=0.03)
    assert places.count("test") / 4000 == pytest.approx(0.15, abs=0.03)


def test_a_missing_release_and_an_old_output_are_refused_with_a_sentence(release, tmp_path):
    with pytest.raises(UserError, match="give the folder of the VQA-RAD release"):
        list(items(tmp_path / "nowhere"))
    folder = release([row(1)])
    prepare(folder, tmp_path / "out")
    with pytest.raises(UserError, match="begun differently"):
        prepare(folder, tmp_path / "out", split="image-disjoint")
