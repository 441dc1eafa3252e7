"""Converters of captions, conversations and RadFM's mixed tables."""

import json
from collections import Counter
from pathlib import Path

import pytest
from archives import answers, asked, kept, write_csv, write_image
from questions_archives import llava_med, llava_med_entry, pmc_oa, radfm, reasons, rocov2, samples, write_json

from data_prep import llava_med as llava_med_module
from data_prep import pmc_oa as pmc_oa_module
from data_prep import radfm as radfm_module
from data_prep import rocov2 as rocov2_module
from data_prep.questions import CAPTION_REQUESTS, make_key
from medvlm.errors import UserError

RADFM = {"table": "data_csv/pmcvqa_train.csv", "images": "figures"}


def test_rocov2_keeps_its_official_splits_and_its_concepts(tmp_path):
    made = samples(rocov2_module.items(rocov2(tmp_path)))
    assert Counter(s.split for s in made.values()) == {"train": 3, "validation": 1, "test": 1}
    sample = made["ROCOv2_2023_train_000001"]
    assert sample.messages[0].n_images == 1 and sample.messages[0].text in CAPTION_REQUESTS
    assert sample.messages[1].text == "CT, é and ROCOv2_2023_train_000001"
    assert sample.metadata["concepts"] == ["C0040405", "C0000726"] and sample.labels == {}


def test_rocov2_rows_that_cannot_be_used(tmp_path):
    root = rocov2(tmp_path)
    rows = [
        {"ID": "ROCOv2_2023_train_000001", "Caption": "One."},
        {"ID": "ROCOv2_2023_train_000001", "Caption": "Two."},
        {"ID": "ROCOv2_2023_train_000002", "Caption": " "},
        {"ID": "ROCOv2_2023_train_000009", "Caption": "Nine."},
        {"ID": "../train/ROCOv2_2023_train_000003", "Caption": "Out."},
    ]
    write_csv(root / "train_captions.csv", rows)
    found = list(rocov2_module.items(root))
    assert reasons(found) == {
        ("train", "duplicate id"): 1,
        ("train", "empty answer"): 1,
        ("train", "missing image"): 2,
    }
    assert answers(kept(found)[0]) == ["One."]


def test_requests_vary_by_key_and_never_change(tmp_path):
    root = rocov2(tmp_path)
    rows = [{"ID": f"i{n}", "Caption": "x"} for n in range(200)]
    write_csv(root / "train_captions.csv", rows)
    for row in rows:
        (root / "train" / f"{row['ID']}.jpg").touch()
    requests = [asked(i)[0] for i in kept(list(rocov2_module.items(root)))]
    assert set(requests) == set(CAPTION_REQUESTS)
    assert [asked(i)[0] for i in kept(list(rocov2_module.items(root)))] == requests
    # printf i0 | sha256sum starts with a4, i1 with 4c, i2 with 42: modulo 4 that is 0, 0, 2
    assert requests[:3] == [CAPTION_REQUESTS[n] for n in (0, 0, 2)]


def test_figures_of_one_article_stay_in_one_split(tmp_path):
    made = samples(pmc_oa_module.items(pmc_oa(tmp_path / "pmc")))
    places: dict[str, set[str]] = {}
    for sample in made.values():
        places.setdefault(sample.group, set()).add(sample.split)
    assert len(made) == 80 and len(places) == 40 and all(len(s) == 1 for s in places.values())
    assert set.union(*places.values()) == {"train", "validation", "test"}


def test_pmc_oa_as_csv_and_its_faults(tmp_path):
    names = ["PMC1_F1.jpg", "PMC1_F1.jpg", "PMC1_F2.jpg", "", "plain one.jpg", "PMC2_F1.jpg"]
    captions = ["A caption, with comma", "Again", "", "No image", "Odd name", "See <image>."]
    root = tmp_path / "pmc"
    write_csv(root / "pairs.csv", [{"image": n, "caption": c} for n, c in zip(names, captions, strict=True)])
    for name in set(filter(None, names)):
        write_image(root / name)
    found = list(pmc_oa_module.items(root, table="pairs.csv"))
    made = samples(found)
    assert set(made) == {"PMC1_F1", make_key("plain one")}
    assert Counter(reason for _, reason in reasons(found)) == dict.fromkeys(
        ("duplicate image", "empty answer", "row without image or caption", "text holds <image>"), 1
    )


def test_llava_med_turns_keep_the_place_of_the_image_and_the_typo_is_read(tmp_path):
    made = samples(llava_med_module.items(llava_med(tmp_path)))
    assert set(made) == {f"llava_med_instruct_10k-17989794_F{n}" for n in (1, 2)}
    for sample in made.values():
        assert [p.type for p in sample.messages[0].content] == ["text", "image"]
        assert [m.role for m in sample.messages] == ["user", "assistant"] * 2
        assert sample.group == "17989794" and sample.metadata["domains"] == ["chest_xray"]


def test_llava_med_entries_that_cannot_be_used(tmp_path):
    root = llava_med(tmp_path)
    good = llava_med_entry("17989794_F1")
    human, gpt = good["conversations"][:2]
    cases = [
        (good, None),
        (good, "duplicate entry"),
        ({**good, "conversations": [{**human, "value": "No mark."}, gpt]}, None),
        (llava_med_entry("1_F1"), "missing image"),
        ({**good, "conversations": [gpt, human]}, "turns do not alternate"),
        ({**good, "conversations": [human]}, "turns do not alternate"),
        ({**good, "conversations": [human, {"from": "gpt", "value": " "}]}, "empty turn"),
        ({**good, "conversations": [human, {"from": "bot", "value": "x"}]}, "turn that is neither human nor gpt"),
        (
            {**good, "conversations": [human, {**gpt, "value": "<image> x"}]},
            "more than one <image>, or one in an answer",
        ),
        ({**good, "conversations": []}, "entry without conversations"),
        ({"conversations": [human, gpt]}, "entry without id or image"),
    ]
    write_json(root / "instruct" / "llava_med_instruct_10k.json", [case for case, _ in cases])
    found = list(llava_med_module.items(root))
    assert {reason: n for (_, reason), n in reasons(found).items()} == dict(Counter(r for _, r in cases if r))
    made = samples(found)
    assert set(made) == {f"llava_med_instruct_10k-17989794_F1{end}" for end in ("", "-2")}
    assert made["llava_med_instruct_10k-17989794_F1-2"].messages[0].n_images == 1


def test_llava_med_with_several_files_asks_for_one(tmp_path):
    root = llava_med(tmp_path)
    write_json(root / "instruct" / "llava_med_instruct_60k.json", [])
    with pytest.raises(UserError, match=r"holds several files .*name it with --file"):
        list(llava_med_module.items(root))
    assert len(kept(list(llava_med_module.items(root, file="instruct/llava_med_instruct_10k.json")))) == 2


def test_radfm_question_table_finds_images_by_the_tail_of_their_path(tmp_path):
    made = samples(radfm_module.items(radfm(tmp_path), **RADFM))
    assert [(s.group, s.split, s.messages[1].text) for s in made.values()] == [
        ("PMC1", "train", "CT"),
        ("PMC2", "train", "CT"),
    ]


def test_radfm_modality_table_asks_openly_and_never_says_no(tmp_path):
    root = radfm(tmp_path)
    paths = [f"/cluster/x/{n}/scan.nii.gz" for n in range(20)]
    write_csv(root / "radio_modality_train.csv", [{"image_path": p, "answer": "MRI,T2"} for p in paths])
    for path in paths:
        write_image(root / "figures" / path[1:].replace(".nii.gz", ".png"))
        (root / "figures" / path[1:]).touch()
    found = kept(list(radfm_module.items(root, table="radio_modality_train.csv", images="figures")))
    assert len(found) == 20 and {tuple(answers(i)) for i in found} == {("MRI,T2",)}
    assert {i.images[0].kind for i in found} == {"nifti"}


def test_radfm_case_report_keeps_context_images_and_question_in_order(tmp_path):
    root = radfm(tmp_path)
    row = {"PMC_id": "PMC1", "img_ref": "['F1', 'F2']", "context": "A man came. He left.", "question": "Q: Why?"}
    rows = [
        {**row, "answer": "A: Pain."},
        {**row, "img_ref": "F1", "answer": "x"},
        {**row, "img_ref": "['F9']", "answer": "x"},
    ]
    write_csv(root / "filtered_case_report_test.csv", rows)
    write_image(root / "figures" / "PMC1_F2.jpg")
    found = list(radfm_module.items(root, table="filtered_case_report_test.csv", images="figures"))
    (sample,) = samples(found).values()
    assert [getattr(p, "text", "IMAGE") for p in sample.messages[0].content] == [
        "A man came. He left.",
        "IMAGE",
        "IMAGE",
        "Why?",
    ]
    assert [i.image_id for i in sample.images] == ["PMC1_F1.jpg", "PMC1_F2.jpg"]
    assert sample.messages[1].text == "Pain." and sample.split == "test"
    assert reasons(found) == {("test", "row without article or list of figures"): 1, ("test", "missing image"): 1}


def test_radfm_studies_have_a_report_and_npy_volumes_are_counted(tmp_path):
    root = radfm(tmp_path)
    study = {"pre": "Cough.", "pat": "Age 40.", "finding": "A mass.", "impression": "Tumour.", "title": "Mass"}
    entries = [
        {**study, "npy_path": "/c/0/1.npy", "image_path": ["/c/images/77/2/a.nii.gz"], "articles": ["mass"]},
        {**study, "npy_path": "/c/0/2.npy", "image_path": ["/c/images/78/1/a.nii.gz"]},
        {**study, "npy_path": "/c/0/3.npy", "finding": None, "impression": "None"},
    ]
    write_json(root / "radiology_article_npy_train.json", entries)
    (root / "figures/77/2").mkdir(parents=True)
    (root / "figures/77/2/a.nii.gz").touch()
    found = list(radfm_module.items(root, table="radiology_article_npy_train.json", images="figures"))
    (sample,) = samples(found).values()
    assert (sample.patient_id, sample.report) == ("77", {"findings": "A mass.", "impression": "Tumour."})
    assert sample.messages[0].text == "Age 40. Cough.\nReport these images."
    assert reasons(found) == {("train", "npy volume is not read"): 1, ("train", "no findings and no impression"): 1}


def test_radfm_table_of_unknown_columns_is_told_the_known_ones(tmp_path):
    root = radfm(tmp_path)
    write_csv(root / "paper_train.csv", [{"PMC_path": "a.json"}])
    with pytest.raises(UserError, match="has the columns PMC_path, which are none of RadFM's known: PMC_id, img_ref"):
        list(radfm_module.items(root, table="paper_train.csv", images="figures"))


BAD = [
    (rocov2_module, rocov2, {}, "train_captions.csv", b"ID,Text\na,b\n", "has no column Caption"),
    (rocov2_module, rocov2, {}, "train_captions.csv", "ID,Caption\na,é\n".encode("cp1252"), "is not utf-8 text"),
    (rocov2_module, rocov2, {}, "train_captions.csv", b"ID,Caption\na,b,c\n", "line 2 has 3 cells"),
    (pmc_oa_module, pmc_oa, {}, "pmc_oa.jsonl", b'{"image": 1\n', "line 1 is not JSON"),
    (
        pmc_oa_module,
        pmc_oa,
        {},
        "pmc_oa.jsonl",
        b"version https://git-lfs.github.com/spec/v1\n",
        "is a Git LFS pointer",
    ),
    (
        llava_med_module,
        llava_med,
        {},
        "instruct/llava_med_instruct_10k.json",
        b"version https://git-lfs",
        "Git LFS pointer",
    ),
    (llava_med_module, llava_med, {}, "instruct/llava_med_instruct_10k.json", b"\xff\xfe[", "is not UTF-8 text"),
    (radfm_module, radfm, RADFM, "data_csv/pmcvqa_train.csv", b"\xff\xfea\x00", "is not utf-8 text"),
    (radfm_module, radfm, RADFM, "data_csv/pmcvqa_train.csv", b"Figure_path,Question,Answer\n", "holds no row"),
]


@pytest.mark.parametrize(("module", "make", "options", "name", "data", "sentence"), BAD)
def test_a_bad_table_is_one_sentence(tmp_path, module, make, options, name, data, sentence):
    root = make(tmp_path / "archive")
    (root / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(module.items(root, **options))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "options", "sentence"),
    [
        (rocov2_module, {}, "train_captions.csv: not found; give the folder of the ROCOv2 release"),
        (pmc_oa_module, {}, "pmc_oa.jsonl: not found; give the folder with pmc_oa.jsonl"),
        (llava_med_module, {}, "holds no JSON"),
        (radfm_module, RADFM, "pmcvqa_train.csv: not found; give the folder of RadFM's tables"),
    ],
)
def test_an_empty_folder_is_one_sentence(tmp_path, module, options, sentence):
    with pytest.raises(UserError, match=sentence):
        list(module.items(tmp_path, **options))


def test_tables_of_another_encoding_are_read_when_it_is_named(tmp_path):
    root = rocov2(tmp_path)
    data = (root / "train_captions.csv").read_text(encoding="utf-8")
    (root / "train_captions.csv").write_text(data, encoding="utf-8-sig")
    assert "é" in answers(kept(list(rocov2_module.items(root)))[0])[0]
    for name in ("train", "valid", "test"):
        for kind in ("captions", "concepts"):
            path = root / f"{name}_{kind}.csv"
            path.write_text(path.read_text(encoding="utf-8-sig"), encoding="utf-16")
    assert "é" in answers(kept(list(rocov2_module.items(root, encoding="utf-16")))[0])[0]


def test_keys_of_odd_names_stay_apart():
    keys = [make_key(name, "train") for name in ("a b", "a_b", "a/b", "ab", "é", "ü")]
    assert len(set(keys)) == 6 and keys[1] == "a_b-train"
    assert all(json.dumps(k).isascii() and "/" not in k for k in keys)
    assert Path(keys[2]).name == keys[2]
