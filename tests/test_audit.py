"""`medvlm shards audit` on shards with planted faults, and near duplicates against all pairs compared by hand."""

import io
import json

import numpy as np
import pytest
import typer
from PIL import Image, ImageFilter

from medvlm.cli_shards import shards_audit as command
from medvlm.data import duplicates
from medvlm.data.audit import audit
from medvlm.data.duplicates import clusters, image_hash, near_images, near_texts, text_hash
from medvlm.data.schema import Sample
from medvlm.data.shards import write_shards

LONG = (
    "The heart is normal in size and the lungs are clear without focal consolidation, effusion or pneumothorax as seen "
    "on the frontal and lateral views today"
)


def picture(seed: int, size: int = 160, quality: int = 90) -> bytes:
    """A smooth random picture as JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12), np.uint8)
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


def row(number: int, split: str, data: bytes, **values) -> tuple[Sample, dict[str, bytes]]:
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    name = "0.png" if data.startswith(b"\x89") else "0.jpg"
    stored = {"file": name, "width": width, "height": height, "metadata": values.pop("image_metadata", {})}
    messages = [("user", "<image> is there an effusion")] + [("assistant", a) for a in values.pop("answers", ["yes"])]
    fields = {
        **{"key": f"s{number:04d}", "source": "toy", "license": "CC0-1.0", "patient_id": f"p{number}", "split": split},
        "images": [stored],
        "messages": [{"role": role, "content": content} for role, content in messages],
        **values,
    }
    return Sample.model_validate(fields), {name: data}


def shards(folder, *rows):
    write_shards(rows, folder, "x", 100)
    return folder


def test_clean_splits_have_no_problem(tmp_path):
    rows = [row(i, split, picture(i), labels={"edema": i % 2}) for i, split in enumerate(["train"] * 6 + ["test"] * 3)]
    report = audit(shards(tmp_path, *rows), workers=1)
    assert report["problems"] == []
    assert report["splits"]["train"] == {"patients": 6, "studies": 0, "samples": 6, "images": 6, "synthetic": 0}
    assert report["labels"] == {
        "edema": {
            "train": {"positive": 3, "negative": 3, "uncertain": 0},
            "test": {"positive": 1, "negative": 2, "uncertain": 0},
        }
    }
    assert report["licenses"] == [{"source": "toy", "license": "CC0-1.0", "samples": 9, "note": ""}]


def test_each_planted_fault_is_reported_once(tmp_path):
    inverted = Image.open(io.BytesIO(picture(3))).point(lambda v: 255 - v)
    buffer = io.BytesIO()
    inverted.save(buffer, "png")
    rows = [
        row(0, "train", picture(0), patient_id="shared", study_id="s0"),
        row(1, "test", picture(1), patient_id="shared", study_id="s1"),
        row(2, "train", picture(2), study_id="same"),
        row(3, "test", picture(3), study_id="same"),
        row(4, "train", picture(4)),
        row(5, "validation", picture(4)),  # the same bytes
        row(6, "train", picture(6)),
        row(7, "test", picture(6, size=120, quality=60)),  # the same picture
        row(8, "train", buffer.getvalue()),  # of 3, inverted
        row(9, "train", picture(9), answers=["Dr. Miller saw it on 3/12/2019."]),
        row(10, "train", picture(10), report={"findings": "Compared with ___ stable."}),
        row(11, "train", picture(11), metadata={"origin": {"PatientName": "x"}}),
        row(12, "train", picture(12), image_metadata={"burnt_in": True, "note": "MRN 1234567"}),
        row(13, "train", picture(13), license="CC-BY-NC-ND-4.0"),
        row(14, "train", picture(14), license="unknown"),
        row(15, "train", picture(15), answers=["Dr. Phantom came on 3/12/2019"], synthetic=True),  # nobody's
    ]
    report = audit(shards(tmp_path, *rows), workers=1)
    assert report["patients"]["splits"] == {"test and train": 1}
    assert report["patients"]["examples"] == [{"train": "s0000", "test": "s0001"}]
    assert report["studies"]["splits"] == {"test and train": 1}
    assert report["images_exact"]["splits"] == {"train and validation": 1}
    assert report["images_near"]["splits"] == {"train and validation": 1, "test and train": 2}
    assert report["phi"]["kinds"] == {"name": 1, "date": 1, "id": 1}
    assert {e["field"] for e in report["phi"]["examples"]} == {"messages.1", "images.metadata.note"}
    assert "Miller" not in json.dumps(report)
    assert report["masks"] == ["s0010"] and report["burnt_in"] == ["s0012"]
    assert report["personal_metadata"] == {"metadata.origin.PatientName": 1}
    assert {r["license"]: r["note"] for r in report["licenses"]} == {
        **{"CC0-1.0": "", "CC-BY-NC-ND-4.0": "restricted", "unknown": "unknown"},
    }
    assert len(report["problems"]) == 9
    assert "1 patients are in test and train" in report["problems"]


def test_metadata_of_the_allow_list_is_not_personal(tmp_path):
    allowed = {"view_position": "PA", "patient_age": 90, "patient_sex": "F", "modality": "DX", "spacing_at": "detector"}
    report = audit(shards(tmp_path, row(0, "train", picture(0), image_metadata=allowed)), workers=1)
    assert report["personal_metadata"] == {} and report["problems"] == []


def test_overlap_with_other_shards_is_found_but_not_theirs_with_each_other(tmp_path):
    mine = shards(tmp_path / "mine", row(0, "train", picture(0)), row(1, "train", picture(1), answers=[LONG]))
    theirs = shards(
        tmp_path / "theirs",
        row(0, "test", picture(0, size=140)),
        row(1, "test", picture(5), answers=[LONG]),
        row(2, "test", picture(7)),
        row(3, "test", picture(7)),
    )
    report = audit(mine, against=[theirs], workers=1)
    assert report["problems"] == ["1 near-duplicate images are in against and train"]
    assert report["texts_near"]["splits"] == {"against and train": 1}
    assert report["samples"] == 2


def test_short_answers_are_no_duplicate_texts_and_long_copies_are(tmp_path):
    other = LONG.replace("today", "again")
    rows = [row(0, "train", picture(0), answers=[LONG]), row(1, "test", picture(1), answers=[LONG])]
    rows += [row(2, "test", picture(2), answers=[other]), *(row(i, "train", picture(i)) for i in (3, 4))]
    rows += [row(5, "test", picture(5), answers=["yes"])]
    report = audit(shards(tmp_path, *rows), workers=1)
    assert report["texts_near"]["texts"] == 3 and report["texts_near"]["splits"] == {"test and train": 1}
    assert report["problems"] == []  # a template is no leak by itself


def test_damage_is_a_problem_and_the_rest_is_still_read(tmp_path):
    folder = shards(tmp_path, *(row(i, "train", picture(i)) for i in range(5)))
    whole = audit(folder, workers=1)
    tar = next(folder.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    where = data.index(b"\xff\xd8\xff")
    data[where + 300] ^= 255
    tar.write_bytes(data)
    report = audit(folder, workers=1)
    assert whole["problems"] == [] and len(report["unreadable"]) == 1
    assert report["splits"]["train"]["samples"] == 4
    assert "cannot be read" in report["problems"][0]


def test_the_command_exits_with_1_on_a_problem_and_prints_json(tmp_path, capsys):
    good = shards(tmp_path / "good", row(0, "train", picture(0)))
    with pytest.raises(typer.Exit) as done:
        command([str(good)], near=False, workers=1, as_json=True)
    assert done.value.exit_code == 0 and json.loads(capsys.readouterr().out)["images_near"] is None
    bad = shards(tmp_path / "bad", row(0, "train", picture(0), answers=["see www.hospital.org"]))
    with pytest.raises(typer.Exit) as done:
        command([str(bad)], workers=1)
    assert done.value.exit_code == 1 and "1 samples hold text that looks like PHI (1 url)" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as done:
        command([str(bad)], ignore=["url"], workers=1)
    assert done.value.exit_code == 0


def test_several_workers_give_the_same_report(tmp_path):
    folder = shards(tmp_path, *(row(i, "train" if i % 3 else "test", picture(i % 40, 64)) for i in range(300)))
    alone = audit(folder, workers=1)
    assert alone["images_exact"]["count"] == 40
    assert audit(folder, workers=2) == alone


def flipped(rng, packed: np.ndarray, count: int) -> np.ndarray:
    bits = np.unpackbits(packed)
    bits[rng.choice(256, count, replace=False)] ^= 1
    return np.packbits(bits)


@pytest.mark.parametrize("threshold", [0, 5, 12])
def test_near_images_are_exactly_those_of_all_pairs(threshold):
    rng = np.random.default_rng(threshold)
    base = rng.integers(0, 256, (300, 32), np.uint8)
    base[:80] = [flipped(rng, base[0], int(k)) for k in rng.integers(0, 14, 80)]  # a crowd
    hashes = np.stack([*base, *(flipped(rng, h, i % 16) for i, h in enumerate(base[100:160]))])
    hashes = np.stack([*hashes, *(flipped(rng, ~h, i % 16) for i, h in enumerate(base[160:220]))])
    bits = np.unpackbits(hashes, axis=1).astype(int)
    distance = (bits[:, None] != bits[None]).sum(axis=2)
    n = len(hashes)
    for inverted in (False, True):
        nearest = np.minimum(distance, 256 - distance) if inverted else distance
        expected = {(i, j): nearest[i, j] for i in range(n) for j in range(i + 1, n) if nearest[i, j] <= threshold}
        found = {(i, j): d for i, j, d in near_images(hashes, threshold, inverted)}
        distinct = len(np.unique(hashes, axis=0)) == n
        assert found == expected if distinct else set(found) <= set(expected)
        assert clusters(n, ((i, j, 0) for i, j in found)) == clusters(n, ((i, j, 0) for i, j in expected))


def test_image_hash_survives_encoding_and_scale_but_not_another_picture():
    original = Image.open(io.BytesIO(picture(0, 300)))
    same = Image.open(io.BytesIO(picture(0, 200, 50)))
    other = Image.open(io.BytesIO(picture(1, 300)))

    def distance(a, b) -> int:
        return int(np.bitwise_count(image_hash(a) ^ image_hash(b)).sum())

    assert distance(original, same) <= duplicates.THRESHOLD < 40 < distance(original, other)


def test_near_texts_agree_with_the_jaccard_index_by_hand():
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(400)]
    texts = [" ".join(rng.choice(words, 120)) for _ in range(60)]
    texts += [" ".join("changed" if k == 60 else w for k, w in enumerate(t.split())) for t in texts[:30]]  # 0.95
    texts += [" ".join("changed" if k % 9 == 0 else w for k, w in enumerate(t.split())) for t in texts[30:60]]  # 0.5
    found = {(i, j) for i, j, _ in near_texts(np.stack([text_hash(t) for t in texts]))}

    def triples(text: str) -> set:
        w = text.split()
        return {tuple(w[i : i + 3]) for i in range(len(w) - 2)}

    sets = [triples(t) for t in texts]
    index = {(i, j): len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i in range(120) for j in range(i + 1, 120)}
    alike = {pair for pair, value in index.items() if value >= 0.9}
    assert len(alike) == 30
    assert len(found & alike) >= 27  # the estimate's error is 0.06 at most
    assert not [pair for pair in found if index[pair] < 0.7]
    assert text_hash("no acute cardiopulmonary process") is None
