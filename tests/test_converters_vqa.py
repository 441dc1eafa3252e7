"""Converters of questions about images. Trees are in the published layout; counts of releases are the papers'."""

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
from archives import answers, asked, kept, write_csv, write_image
from questions_archives import (
    path_vqa,
    pmc_vqa,
    pmc_vqa_row,
    reasons,
    samples,
    slake,
    slake_row,
    vqa_med_2019,
    write_json,
)

from data_prep import path_vqa as path_vqa_module
from data_prep import pmc_vqa as pmc_vqa_module
from data_prep import slake as slake_module
from data_prep import vqa_med as vqa_med_module
from medvlm.errors import UserError


def pmc_vqa_items(root: Path, **options):
    return list(pmc_vqa_module.items(root, **options))


def test_a_figure_gets_one_conversation_with_lettered_options(tmp_path):
    found = samples(pmc_vqa_items(pmc_vqa(tmp_path)))
    assert set(found) == {"PMC1_F1_1-train", "PMC2_F1_1-test"}
    messages = found["PMC1_F1_1-train"].messages
    lines = ("What is it?", "A: CT", "B: MRI", "C: X-ray", "D: PET", "Answer with the letter.")
    assert messages[0].text == "\n".join(lines)
    assert [(m.text, m.answer_type) for m in messages[1::2]] == [("C", "closed")] * 2
    assert [m.n_images for m in messages] == [1, 0, 0, 0]


@pytest.mark.parametrize(("form", "answer"), [("letter", "C"), ("text", "X-ray"), ("both", "C: X-ray")])
def test_the_answer_is_the_letter_the_text_or_both(tmp_path, form, answer):
    assert answers(kept(pmc_vqa_items(pmc_vqa(tmp_path), answer=form))[0]) == [answer, answer]


@pytest.mark.parametrize(
    ("values", "letter"),
    [
        ({"Answer": "C", "Answer_label": ""}, "C"),  # test_2.csv: the answer is a letter
        ({"Answer": "A. niger", "Answer_label": "", "Choice A": "A. niger"}, "A"),  # that is no prefix
        ({"Answer": "X-ray", "Answer_label": ""}, "C"),  # train_2.csv: no Answer_label
        ({"Answer": "c: x-ray", "Answer_label": ""}, "C"),
        ({"Answer": "", "Anwser": "MRI", "Answer_label": "B"}, "B"),  # the typo of one file
        (
            {"Answer": "B", "Answer_label": "", "Choice A": "B", "Choice B": "A"},
            "A",
        ),  # a choice that reads like a letter
    ],
)
def test_the_right_letter_is_found_in_every_version(values, letter):
    assert pmc_vqa_module.solve(pmc_vqa_row("PMC1_F1.jpg", **values))[0] == letter


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"Answer_label": "E"}, "answer letter out of range"),
        ({"Answer": "E", "Answer_label": ""}, "answer letter out of range"),
        ({"Answer_label": "A"}, "answer text and letter disagree"),
        ({"Answer": "ultrasound", "Answer_label": ""}, "answer is none of the choices"),
        ({"Choice B": " B:X-ray", "Answer_label": ""}, "answer fits two choices"),
        ({"Answer": "", "Answer_label": ""}, "empty answer"),
        ({"Choice D": " D:"}, "empty choice"),
        ({"Question": " "}, "empty question"),
        ({"Figure_path": "PMC9_F9.jpg"}, "missing image"),
    ],
)
def test_unusable_multiple_choice_rows_are_dropped_with_their_reason(tmp_path, values, reason):
    root = pmc_vqa(tmp_path)
    write_csv(root / "train.csv", [pmc_vqa_row("PMC1_F1_1.jpg"), pmc_vqa_row("PMC1_F1_1.jpg", **values)])
    found = pmc_vqa_items(root)
    assert reasons(found) == {("train", reason): 1} and len(kept(found)) == 2


def test_every_sample_names_its_table_and_how_many_rows_that_has(tmp_path):
    root = pmc_vqa(tmp_path)
    for table, rows in (("test_clean.csv", 1), ("test.csv", 2)):
        found = samples(pmc_vqa_items(root, test=table))
        assert found["PMC2_F1_1-test"].metadata["tables"] == {table: rows}


def test_the_article_is_the_group_unless_the_figure_is_asked_for(tmp_path):
    root = pmc_vqa(tmp_path)
    write_csv(root / "test_clean.csv", [pmc_vqa_row("PMC1_F2_1.jpg"), pmc_vqa_row("PMC3_F1_1.jpg")])
    write_image(root / "images" / "PMC1_F2_1.jpg")

    def shared(**options) -> set[str]:
        groups: dict[str, set[str]] = {}
        for sample in samples(pmc_vqa_items(root, **options)).values():
            groups.setdefault(sample.split, set()).add(sample.group)
        return groups.get("train", set()) & groups.get("test", set())

    assert shared() == {"PMC1"} and shared(group="figure") == set()
    assert shared(split="article-disjoint") == set()


def test_slake_languages_and_what_their_splits_share(tmp_path, caplog):
    root = slake(tmp_path)
    english = samples(slake_module.items(root))
    assert {k: s.split for k, s in english.items()} == {
        "xmlab1-train": "train",
        "xmlab2-validation": "validation",
        "xmlab3-test": "test",
    }
    assert not caplog.records
    turns = english["xmlab1-train"].messages
    assert [(m.text, m.answer_type, m.question_type) for m in turns[1::2]] == [
        ("CT", "open", "Modality"),
        ("CT", "closed", "Modality"),
    ]
    both = samples(slake_module.items(root, language="all"))
    assert "1 of 2 test images also occur in train" in caplog.text
    splits: dict[str, set[str]] = {}
    for sample in both.values():
        splits.setdefault(sample.group, set()).add(sample.split)
    assert splits["xmlab3/source.jpg"] == {"train", "test"}
    caplog.clear()
    apart = samples(slake_module.items(root, language="all", split="image-disjoint"))
    assert len(apart) == 3 == len({s.group for s in apart.values()}) and not caplog.records
    assert sum(len(s.messages) for s in apart.values()) == 2 * 7
    chinese = samples(slake_module.items(root, language="zh"))
    assert {m.text for s in chinese.values() for m in s.messages[1::2]} == {"是"}


def test_slake_entries_that_cannot_be_used(tmp_path):
    root = slake(tmp_path)
    rows = [
        slake_row(1, 1),
        slake_row(1, 1, question="Same id?"),
        slake_row(2, 1, answer_type="MAYBE"),
        slake_row(3, 1, q_lang="fr"),
        slake_row(4, 1, answer=""),
        slake_row(5, 9),
        slake_row(6, 1, question="Question 1?"),
        slake_row(7, 1, img_name="../imgs/xmlab1/source.jpg"),
    ]
    write_json(root / "train.json", rows)
    found = list(slake_module.items(root))
    assert reasons(found) == {
        ("train", "duplicate id"): 1,
        ("train", "answer_type is neither OPEN nor CLOSED"): 1,
        ("train", "language is neither en nor zh"): 1,
        ("train", "entry lacks a field"): 1,
        ("train", "missing image"): 2,
        ("train", "duplicate question"): 1,
    }


def test_the_real_slake_test_questions_are_all_read(test_data, tmp_path):
    rows = json.loads((test_data / "qa_text_only" / "slake_test.json").read_text(encoding="utf-8"))
    write_json(tmp_path / "test.json", rows)
    for name in ("train", "validate"):
        write_json(tmp_path / f"{name}.json", [])
    for name in {row["img_name"] for row in rows}:
        (tmp_path / "imgs" / name).parent.mkdir(parents=True)
        (tmp_path / "imgs" / name).touch()
    for language, images, questions in (("en", 96, 1061), ("zh", None, 1033)):
        found = list(slake_module.items(tmp_path, language=language))
        n_dropped = sum(reasons(found).values())
        made = samples(found)
        assert sum(len(s.messages) // 2 for s in made.values()) + n_dropped == questions
        assert set(reasons(found)) <= {("test", "duplicate question")}
        assert images is None or len(made) == images
        kinds = Counter(m.answer_type for s in made.values() for m in s.messages[1::2])
        assert set(kinds) == {"closed", "open"}


def test_path_vqa_pickles_become_conversations_and_yes_no_is_closed(tmp_path):
    found = list(path_vqa_module.items(path_vqa(tmp_path)))
    made = samples(found)
    assert {k: s.split for k, s in made.items()} == {
        "train_0001-train": "train",
        "val_0001-validation": "validation",
        "test_0001-test": "test",
    }
    assert [(m.text, m.answer_type) for m in made["val_0001-validation"].messages[1::2]] == [
        ("in the canals", "open"),
        ("yes", "closed"),
    ]
    assert reasons(found) == {
        (split, reason): 1
        for split in ("train", "validation", "test")
        for reason in ("duplicate question", "image without question")
    }


def test_path_vqa_in_the_layout_with_labels_and_as_json(tmp_path):
    root = path_vqa(tmp_path) / "pvqa"
    old = root / "qas" / "train" / "train_qa.pkl"
    old.unlink()
    entry = {"img_id": "train_0001", "sent": "what is it?", "label": {"a cell": 0.3, "fat": 1}, "question_type": "what"}
    (root / "qas" / "train_vqa.pkl").write_bytes(pickle.dumps([entry], protocol=2))
    sample = samples(path_vqa_module.items(root))["train_0001-train"]
    assert [m.text for m in sample.messages] == ["what is it?", "fat"]
    assert sample.metadata["question_types"] == ["what"]
    write_json(old.with_suffix(".json"), [{"image": "train_0001", "question": "what?", "answer": "fat"}])
    assert [m.text for m in samples(path_vqa_module.items(root))["train_0001-train"].messages] == ["what?", "fat"]


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path):
    root = path_vqa(tmp_path)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (root / "pvqa/qas/train/train_qa.pkl").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(UserError, match=r"train_qa\.pkl: not a readable pickle of plain data \(it holds pathlib"):
        list(path_vqa_module.items(root))
    assert not (tmp_path / "ran").exists()


def test_the_parquet_export_of_path_vqa_is_unpacked_once(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = write_image(tmp_path / "a.jpg").read_bytes()
    rows = [{"image": {"bytes": picture, "path": None}, "question": f"q{n}?", "answer": "no"} for n in (1, 2)]
    rows.append({"image": None, "question": "q?", "answer": "no"})
    source = tmp_path / "export"
    (source / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), source / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="--unpack: name a folder"):
        list(path_vqa_module.items(source))
    written = set()
    for _ in range(2):
        found = list(path_vqa_module.items(source, unpack=tmp_path / "images"))
        (item,) = kept(found)
        assert reasons(found) == {("test", "entry without image"): 1}
        assert asked(item) == ["q1?", "q2?"] and Path(item.images[0].path).read_bytes() == picture
        written |= {(p.name, p.stat().st_ino) for p in (tmp_path / "images" / "test").iterdir()}
    assert len(written) == 1


def test_vqa_med_2019_has_categories_and_all_right_answers(tmp_path):
    made = samples(vqa_med_module.items(vqa_med_2019(tmp_path), year="2019"))
    train, test = made["synpic1-train-2019"], made["synpic3-test-2019"]
    assert [(m.text, m.answer_type, m.question_type) for m in train.messages[1::2]] == [
        ("ct", "open", "modality"),
        ("yes", "closed", None),
    ]
    assert test.messages[1].text == "(large) cyst" and test.messages[1].question_type == "abnormality"
    assert test.metadata["references"] == [["(large) cyst", "tumour"]]
    assert made["synpic2-validation-2019"].split == "validation"


def test_vqa_med_2021_joins_its_questions_and_answers(tmp_path):
    folder = tmp_path / "Task1-VQA-2021-TestSet-w-GroundTruth"
    folder.mkdir()
    (folder / "Task1-VQA-2021-TestSet-Questions.txt").write_text(
        "synpic1|what is abnormal?\nsynpic2|what is abnormal?\nsynpic2|again?\nbroken\n", encoding="utf-8-sig"
    )
    (folder / "Task1-VQA-2021-TestSet-ReferenceAnswers.txt").write_text("synpic1|osteopoikilosis|lesions\n")
    for n in (1, 2):
        write_image(folder / "VQA-500-Images" / f"synpic{n}.jpg")
    found = list(vqa_med_module.items(tmp_path, year="2021"))
    (sample,) = samples(found).values()
    assert sample.metadata["references"] == [["osteopoikilosis", "lesions"]]
    assert reasons(found) == {
        ("test", "empty answer"): 1,
        ("test", "duplicate id"): 1,
        ("test", "line without 2 cells"): 1,
    }


BAD = [
    (pmc_vqa_module, pmc_vqa, {}, "train.csv", b"", "train.csv: "),
    (pmc_vqa_module, pmc_vqa, {}, "train.csv", b"Figure_path,Question\na,b\n", "has no column Choice A"),
    (pmc_vqa_module, pmc_vqa, {}, "train.csv", "Figure_path\né".encode("cp1252"), "is not utf-8 text"),
    (slake_module, slake, {}, "train.json", b"[", "train.json: not valid JSON"),
    (slake_module, slake, {}, "train.json", b"{}", "expected a JSON list"),
    (slake_module, slake, {}, "train.json", b"[\xe9]", "is not UTF-8 text"),
    (slake_module, slake, {}, "train.json", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    (path_vqa_module, path_vqa, {}, "pvqa/qas/train/train_qa.pkl", b"\x80", "not a readable pickle"),
    (path_vqa_module, path_vqa, {}, "pvqa/qas/train/train_qa.pkl", pickle.dumps({"a": 1}), "expected a pickled list"),
    (
        vqa_med_module,
        vqa_med_2019,
        {"year": "2019"},
        "ImageClef-2019-VQA-Med-Training/All_QA_Pairs_train.txt",
        b"a|\xe9|b",
        "is not UTF-8 text",
    ),
]


@pytest.mark.parametrize(("module", "make", "options", "name", "data", "sentence"), BAD)
def test_a_bad_table_is_one_sentence(tmp_path, module, make, options, name, data, sentence):
    root = make(tmp_path)
    (root / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(module.items(root, **options))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "options", "sentence"),
    [
        (pmc_vqa_module, {}, "give the folder of the PMC-VQA release"),
        (slake_module, {}, "give the folder of the SLAKE release"),
        (path_vqa_module, {}, "give the folder pvqa"),
        (vqa_med_module, {"year": "2020"}, "holds none of VQAnswering_2020_Train_QA_pairs.txt"),
    ],
)
def test_an_empty_folder_is_one_sentence(tmp_path, module, options, sentence):
    with pytest.raises(UserError, match=sentence):
        list(module.items(tmp_path, **options))


def test_tables_with_a_byte_order_mark_are_read(tmp_path):
    root = pmc_vqa(tmp_path / "a")
    (root / "train.csv").write_bytes(b"\xef\xbb\xbf" + (root / "train.csv").read_bytes())
    assert len(kept(pmc_vqa_items(root))) == 2
    root = slake(tmp_path / "b")
    (root / "train.json").write_bytes(b"\xef\xbb\xbf" + (root / "train.json").read_bytes())
    assert len(kept(list(slake_module.items(root)))) == 3
