"""What `verify` must notice, one kind of damage at a time; `stats`, `show`; and the snippets of docs/data-format.md."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image as PILImage

from medvlm.data import statistics
from medvlm.data.audit import audit
from medvlm.data.inspect import find, print_stats, print_verify, show, stats, verify
from medvlm.data.schema import Sample
from medvlm.data.shards import ShardReader, index_path, index_shards, write_index, write_shards
from medvlm.data.volumes import encode_volume
from medvlm.errors import UserError

DOCS = Path(__file__).parents[1] / "docs" / "data-format.md"


def picture(width: int = 32, height: int = 24, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PILImage.effect_noise((width, height), 80).save(buffer, form)
    return buffer.getvalue()


def item(key: str, data: bytes | None = None, **values: object) -> tuple[Sample, dict[str, bytes]]:
    record = {
        "key": key,
        "source": "demo",
        "license": "CC0-1.0",
        "split": "train",
        "patient_id": f"p-{key}",
        "images": [{"file": "0.png", "width": 32, "height": 24}],
        "messages": [
            {"role": "user", "content": "<image> Is it clear?"},
            {"role": "assistant", "content": "yes", "answer_type": "closed"},
        ],
        "labels": {"Edema": -1, "Pneumonia": 1, "Fracture": 0, "Lesion": None},
    }
    return Sample.model_validate({**record, **values}), {"0.png": data if data is not None else picture()}


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_shards([item(f"s{i}") for i in range(4)], tmp_path / "train", "demo")[0]


def reasons(*paths: Path) -> str:
    return "\n".join(f"{p['key']}: {p['reason']}" for p in verify(paths)["problems"])


def damage(tar: Path, at: int, data: bytes) -> None:
    with tar.open("r+b") as file:
        file.seek(at)
        file.write(data)


def header_of(tar: Path, name: str) -> int:
    with tarfile.open(tar) as archive:
        return archive.getmember(name).offset


def data_of(tar: Path, name: str) -> int:
    with tarfile.open(tar) as archive:
        return archive.getmember(name).offset_data


def test_sound_shards_have_no_problems(tar):
    assert verify(tar.parent) == {"shards": 1, "samples": 4, "images": 4, "problems": []}


def test_a_damaged_header_in_the_middle_is_found_although_readers_stop_silently(tar):
    damage(tar, header_of(tar, "s2.json"), b"\xff" * 200)
    with tarfile.open(tar) as archive:
        assert len(archive.getnames()) == 5  # of 8: this is the trap
    found = reasons(tar)
    assert "damaged header" in found and "do not reach 3 member(s) of 2 sample(s)" in found


def test_a_zeroed_header_looks_like_the_end_but_the_index_knows_better(tar):
    damage(tar, header_of(tar, "s1.json"), bytes(1024))
    assert "the tar lacks 5 member(s) of 3 sample(s) in the index, from 's1.json' on" in reasons(tar)


def test_truncation_is_found_inside_a_member_and_at_a_boundary(tar):
    whole = tar.read_bytes()
    tar.write_bytes(whole[: data_of(tar, "s3.0.png") + 88])
    assert "s3: member '0.png' is cut off" in reasons(tar) and "None: " in reasons(tar)
    tar.write_bytes(whole)
    tar.write_bytes(whole[: header_of(tar, "s3.json")])
    assert "end-of-archive mark is missing" in reasons(tar) and "s3: member 'json' is cut off" in reasons(tar)


def test_a_flipped_byte_fails_the_checksum_of_its_member(tar):
    damage(tar, data_of(tar, "s1.0.png") + 60, b"\x00\x01\x02\x03")
    problems = verify(tar)["problems"]
    assert [(p["key"], p["reason"]) for p in problems] == [("s1", "member '0.png' fails its crc32")]
    assert problems[0]["shard"] == str(tar)


def test_an_image_that_does_not_decode_or_has_another_size_is_found(tmp_path):
    items = [item("cut", picture()[:-40]), item("size", picture(40, 24)), item("text", b"not an image")]
    found = reasons(*write_shards(items, tmp_path, "demo"))
    assert "cut: image '0.png' does not decode" in found and "text: image '0.png' does not decode" in found
    assert "size: image '0.png' is 40x24, the JSON says 32x24" in found


def test_a_tar_without_index_with_a_stale_one_or_a_broken_one_is_found(tar):
    index = index_path(tar)
    other = write_shards([item("s0"), item("s1")], tar.parent.parent / "other", "demo")[0]
    index.write_bytes(index_path(other).read_bytes())
    assert "not in the index, such as 's2.0.png'" in reasons(tar)
    index.write_bytes(b"not arrow")
    assert "cannot be read" in reasons(tar)
    index.unlink()
    assert "has no index" in reasons(tar)


def test_a_key_in_two_shards_of_a_folder_is_found(tmp_path):
    write_shards([item("same")], tmp_path, "one")
    write_shards([item("same")], tmp_path, "two")
    assert reasons(tmp_path) == "same: the key occurs twice, first in one-000000.tar"


def test_several_processes_find_the_same_as_one(tmp_path):
    for n in range(5):
        tar = write_shards([item(f"s{n}-{i}", patient_id=f"p{i}") for i in range(3)], tmp_path / "a", f"x{n}")[0]
    write_shards([item("t0", patient_id="p2", split="test")], tmp_path / "b", "x")
    write_shards([item("s0-1")], tmp_path / "a", "z")
    damage(tar, data_of(tar, "s4-1.0.png") + 60, b"\x00\x01\x02\x03")
    report = verify([tmp_path / "a", tmp_path / "b"], workers=3)
    assert report == verify([tmp_path / "a", tmp_path / "b"], workers=1)
    assert (report["shards"], report["samples"], report["images"]) == (7, 17, 16)
    assert [(p["key"], p["reason"]) for p in report["problems"]] == [
        ("s4-1", "member '0.png' fails its crc32"),
        ("s0-1", "the key occurs twice, first in x0-000000.tar"),
        ("t0", "demo patient or study 'p2' is in test and train"),
    ]


def volume(array: np.ndarray, **values: object) -> tuple[Sample, dict[str, bytes]]:
    image = {"file": "0.b2", "width": 6, "height": 5, "depth": 40, "spacing": [1, 1, 2], **values}
    return item("v", images=[image])[0], {"0.b2": encode_volume(array)}


@pytest.mark.parametrize(
    ("array", "values", "reason"),
    [
        (np.zeros((40, 5, 6), np.int16), {}, None),
        (np.zeros((2, 40, 5, 6), np.uint8), {"windows": [(40, 400), (-600, 1500)]}, None),
        (np.zeros((39, 5, 6), np.int16), {}, "image '0.b2' is 6x5x39, the JSON says 6x5x40"),
        (np.zeros((40, 5, 6), np.int16), {"depth": None}, "image '0.b2' is 6x5x40, the JSON says 6x5"),
        (np.zeros((2, 40, 5, 6), np.uint8), {"windows": [(40, 400)]}, "has 2 channel(s), the JSON names 1 window(s)"),
        (np.zeros((40, 5, 6), np.int16), {"spacing": [1, 1]}, "image '0.b2' has 3 dimensions, the JSON's spacing 2"),
    ],
)
def test_a_volume_is_decoded_and_compared_with_its_json(tmp_path, array, values, reason):
    write_shards([volume(array, **values)], tmp_path, "demo")
    found = reasons(tmp_path)
    assert reason in found if reason else found == ""


def test_a_volume_that_does_not_decode_is_found(tmp_path):
    sample, members = volume(np.random.default_rng(0).integers(-1000, 1000, (40, 5, 6), dtype=np.int16))
    data = members["0.b2"]
    damaged = data[:800] + bytes(200) + data[1000:]
    for name, content in (("text", b"text"), ("cut", data[:-300]), ("damaged", damaged)):
        write_shards([(sample, {"0.b2": content})], tmp_path / name, "demo")
        assert "v: image '0.b2' does not decode (unreadable volume" in reasons(tmp_path / name), name


def test_a_folder_index_that_is_out_of_date_is_found(tmp_path):
    tar = write_shards([item("a")], tmp_path, "demo")[0]
    list(index_shards([tmp_path]))
    assert reasons(tmp_path) == ""
    write_shards([item("b")], tmp_path, "demo")
    assert reasons(tar) == "None: index.arrow of the folder is out of date for this shard; index the folder again"


def test_a_patient_in_two_splits_is_found_when_the_splits_are_given_together(tmp_path):
    write_shards([item("a", patient_id="p1"), item("b", patient_id="p2")], tmp_path / "train", "demo")
    write_shards([item("c", patient_id="p1", split="test")], tmp_path / "test", "demo")
    assert reasons(tmp_path / "train", tmp_path / "test") == "c: demo patient or study 'p1' is in test and train"
    assert reasons(tmp_path / "train") == ""


def foreign(path: Path, record: dict, copies: int = 1) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for _ in range(copies):
            writer.write({"__key__": "000", "jpg": picture(form="JPEG"), "json": record})
    return path


def test_a_foreign_tar_can_be_indexed_and_its_schema_problems_are_told(tmp_path):
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A lung."}]
    llava = foreign(tmp_path / "llava.tar", {"id": "1", "image": "000.jpg", "conversations": talk})
    write_index(llava)
    assert ShardReader(llava).member(0, "jpg")[:2] == b"\xff\xd8"
    report = verify(llava)
    assert (report["samples"], report["images"]) == (1, 1)
    assert [p["key"] for p in report["problems"]] == ["000"]
    assert "json: key: Field required (LLaVA's layout" in report["problems"][0]["reason"]
    unknown = foreign(tmp_path / "unknown.tar", {"caption": "a lung"})
    write_index(unknown)
    assert "json: key: Field required" in reasons(unknown)


def test_a_key_that_comes_twice_in_one_foreign_tar_is_found(tmp_path):
    tar = foreign(tmp_path / "twice.tar", {"caption": "x"}, copies=2)
    write_index(tar)
    assert "000: member 'jpg' occurs twice under this key" in reasons(tar)


def test_stats_count_per_source_and_split(tmp_path, capsys):
    write_shards([item("a", patient_id="p1"), item("b", patient_id="p1")], tmp_path / "train", "demo")
    report = {"images": [], "messages": [], "labels": {}, "report": {"findings": "Clear lungs."}}
    write_shards([(item("c", **report, split="test")[0], {})], tmp_path / "test", "demo")
    rows = stats([tmp_path / "train", tmp_path / "test"])
    test, train = rows
    assert (train["split"], train["samples"], train["images"], train["questions"]) == ("train", 2, 2, 2)
    assert (train["closed"], train["open"], train["patients"], train["reports"]) == (2, 0, 1, 0)
    assert train["labels"]["Edema"] == {"positive": 0, "negative": 0, "uncertain": 2}
    assert train["labels"]["Pneumonia"]["positive"] == train["labels"]["Fracture"]["negative"] == 2
    assert "Lesion" not in train["labels"]  # null means not mentioned
    assert train["width"] == {"min": 32, "median": 32, "p95": 32, "max": 32}
    assert (test["reports"], test["characters"]["max"], test["width"]) == (1, len("Clear lungs."), {})
    print_stats(rows, as_json=True)
    assert json.loads(capsys.readouterr().out) == rows
    print_stats(rows)
    assert "Pneumonia" in capsys.readouterr().out


def test_images_with_labels_alone_are_verified_counted_and_shown(tmp_path, capsys):
    tar = write_shards([item("a", messages=[]), item("b")], tmp_path / "train", "demo")[0]
    assert reasons(tar) == ""
    (row,) = stats(tar)
    assert (row["no_text"], row["reports"], row["questions"]) == (1, 0, 1)
    assert (row["labels"]["Edema"]["uncertain"], row["characters"]["min"]) == (2, 0)
    show(tar, "a")
    assert "label Edema: uncertain" in capsys.readouterr().out
    report = audit(tar, workers=1)
    assert report["problems"] == [] and report["labels"]["Pneumonia"]["train"]["positive"] == 2


def test_stats_read_the_json_of_some_samples_and_say_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(statistics, "AT_LEAST", 10)
    for split, count in (("train", 300), ("test", 20)):
        write_shards([item(f"{split}{n}", b"", split=split) for n in range(count)], tmp_path / split, "demo")
    paths = [tmp_path / "train", tmp_path / "test"]
    every, some = stats(paths, limit=None), stats(paths, limit=100)
    assert [row["parsed"] for row in every] == [20, 300] and [row["parsed"] for row in some] == [10, 93]
    for whole, part in zip(every, some, strict=True):
        for name in ("samples", "images", "questions", "groups", "width", "height", "characters"):
            assert whole[name] == part[name]
        assert part["labels"]["Pneumonia"]["positive"] == part["closed"] == part["parsed"]
        assert (whole["patients"], part["patients"]) == (whole["samples"], None)
    print_stats(some)
    assert "of 103 evenly spaced ones of 320 samples" in capsys.readouterr().out


def test_show_prints_a_sample_and_saves_its_images(tar, tmp_path, capsys):
    sample = show(tar, "s2", tmp_path / "look")
    out = capsys.readouterr().out
    assert "[image] Is it clear?" in out and "yes  (closed)" in out and "Edema: uncertain" in out
    assert (tmp_path / "look" / "s2.0.png").read_bytes() == ShardReader(tar).images(2)[0]
    assert sample.key == "s2"
    assert show(tar, 3).key == show(tar, "3").key == "s3"
    with pytest.raises(UserError, match="no sample '9': there are 4"):
        find(ShardReader(tar), 9)


def test_verify_prints_shard_key_and_reason(tar, capsys):
    print_verify(verify(tar))
    assert "no problems" in capsys.readouterr().out
    report = {
        "shards": 1,
        "samples": 1,
        "images": 0,
        "problems": [{"shard": "x.tar", "key": "k", "reason": "bad"}] * 60,
    }
    print_verify(report)
    out = capsys.readouterr().out
    assert "x.tar:k: bad" in out and "and 10 more" in out
    print_verify(report, as_json=True)
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 60


def snippet(name: str) -> str:
    found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"docs/data-format.md has no example {name!r}"
    return found[1]


def test_the_examples_in_the_documentation_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(picture(form="JPEG"))
    (tmp_path / "table.csv").write_text("file,patient,question,answer\na.jpg,p1,Is it clear?,yes\na.jpg,p1,Sure?,no\n")
    exec(compile(snippet("write"), "write", "exec"), {})
    assert verify(tmp_path / "my_data" / "train")["problems"] == []
    exec(compile(snippet("read"), "read", "exec"), {})
    assert "000001" in capsys.readouterr().out


def test_the_json_and_the_index_columns_in_the_documentation_are_the_real_ones(tar):
    text = DOCS.read_text(encoding="utf-8")
    found = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert found
    sample = Sample.model_validate_json(found[1])
    assert sample.model_fields_set == set(Sample.model_fields)
    index = text.split("## The index")[1].split("## ")[0]
    named = {
        name
        for line in index.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert named == set(ShardReader(tar).table.column_names) - {"shard"}
