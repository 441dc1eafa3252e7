"""Small trees in the published layouts of the archives of captions and questions. All text is made up."""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from archives import write_csv, write_image

from data_prep.items import Dropped, Item
from medvlm.data.schema import Sample


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def samples(found: Iterable[Item | Dropped]) -> dict[str, Sample]:
    """The items as the schema reads them, by key; no key may come twice."""
    items = [i for i in found if isinstance(i, Item)]
    made = {}
    for item in items:
        assert all(not Path(s.path).is_absolute() for s in item.images)
        images = [
            {"file": f"{n}.jpg", "width": 1, "height": 1, "image_id": s.image_id} for n, s in enumerate(item.images)
        ]
        sample = Sample.model_validate({**item.fields, "images": images, "source": "test", "license": "test"})
        assert sample.key not in made
        made[sample.key] = sample
    return made


def reasons(found: Iterable[Item | Dropped]) -> dict[tuple[str | None, str], int]:
    counts: dict[tuple[str | None, str], int] = {}
    for d in found:
        if isinstance(d, Dropped):
            counts[d.split, d.reason] = counts.get((d.split, d.reason), 0) + 1
    return counts


def rocov2(root: Path) -> Path:
    for name, n in (("train", 3), ("valid", 1), ("test", 1)):
        ids = [f"ROCOv2_2023_{name}_{i:06d}" for i in range(1, n + 1)]
        write_csv(root / f"{name}_captions.csv", [{"ID": i, "Caption": f"CT, é and\n {i}"} for i in ids])
        write_csv(root / f"{name}_concepts.csv", [{"ID": i, "CUIs": "C0040405;C0000726"} for i in ids])
        for i in ids:
            write_image(root / name / f"{i}.jpg", n)
    return root


def pmc_oa(root: Path) -> Path:
    names = [f"PMC{1000 + a}_Fig{f}_{s}.jpg" for a in range(40) for f, s in ((1, 1), (2, 1))]
    root.mkdir(parents=True)
    lines = [json.dumps({"image": name, "caption": f"Figure {name}"}) for name in names]
    (root / "pmc_oa.jsonl").write_text("\n".join(lines) + "\n")
    for name in names:
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / name).write_bytes(b"")
    return root


def pmc_vqa_row(figure: str, **values: str) -> dict[str, str]:
    row = {"Figure_path": figure, "Caption": "A caption.", "Question": "What is it?"}
    row |= {f"Choice {key}": f" {key}:{text}" for key, text in zip("ABCD", ("CT", "MRI", "X-ray", "PET"), strict=True)}
    return {**row, "Answer": "X-ray", "Answer_label": "C", "split": "train", **values}


def pmc_vqa(root: Path) -> Path:
    write_csv(
        root / "train.csv", [pmc_vqa_row("PMC1_F1_1.jpg"), pmc_vqa_row("PMC1_F1_1.jpg", Question="And the plane?")]
    )
    write_csv(root / "test_clean.csv", [pmc_vqa_row("PMC2_F1_1.jpg", split="test")])
    write_csv(
        root / "test.csv", [pmc_vqa_row(f"PMC{n}_F1_1.jpg", split="test") for n in (2, 3)]
    )  # test_clean is part of it
    for n in (1, 2, 3):
        write_image(root / "images" / f"PMC{n}_F1_1.jpg", n)
    return root


def llava_med_entry(number: str, key: str = "conversations", **values: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "What is shown?\n<image>"},
        {"from": "gpt", "value": "A radiograph."},
        {"from": "human", "value": "Of what?"},
        {"from": "gpt", "value": "The chest."},
    ]
    domain = {"chest_xray": True, "mri": False, "histology": False, "gross": False, "ct_scan": False}
    return {"id": number, "image": f"{number}.jpg", "domain": domain, key: turns, **values}


def llava_med(root: Path) -> Path:
    entries = [llava_med_entry("17989794_F1"), llava_med_entry("17989794_F2", "conversatons")]
    write_json(root / "instruct" / "llava_med_instruct_10k.json", entries)
    for entry in entries:
        write_image(root / "images" / entry["image"])
    return root


def slake_row(qid: int, image: int, **values: Any) -> dict[str, Any]:
    row = {"img_id": image, "img_name": f"xmlab{image}/source.jpg", "question": f"Question {qid}?", "answer": "CT"}
    row |= {"q_lang": "en", "location": "Lung", "modality": "CT", "answer_type": "OPEN", "base_type": "vqa"}
    return {**row, "triple": ["vhead", "_", "_"], "qid": qid, "content_type": "Modality", **values}


def slake(root: Path) -> Path:
    """English: images 1, 2, 3 in train, validate, test; Chinese: the test's image 3 in train."""
    chinese = {"q_lang": "zh", "question": "图中肺正常吗?", "answer": "是", "answer_type": "CLOSED"}
    rows = {
        "train": [
            slake_row(1, 1),
            slake_row(2, 3, **chinese),
            slake_row(3, 1, question="Second?", answer_type="CLOSED"),
        ],
        "validate": [slake_row(4, 2), slake_row(5, 1, **chinese)],
        "test": [slake_row(6, 3), slake_row(7, 2, **chinese)],
    }
    for name, found in rows.items():
        write_json(root / f"{name}.json", found)
    for n in (1, 2, 3):
        write_image(root / "imgs" / f"xmlab{n}" / "source.jpg", n)
    return root


def path_vqa(root: Path) -> Path:
    for name in ("train", "val", "test"):
        rows = [
            {"image": f"{name}_0001", "question": "where are liver stem cells?", "answer": "in the canals"},
            {"image": f"{name}_0001", "question": "is fat present?", "answer": "yes"},
            {"image": f"{name}_0001", "question": "is fat present?", "answer": "yes"},
        ]
        path = root / "pvqa" / "qas" / name / f"{name}_qa.pkl"
        path.parent.mkdir(parents=True)
        path.write_bytes(pickle.dumps(rows))
        for n in (1, 2):
            write_image(root / "pvqa" / "images" / name / f"{name}_{n:04d}.jpg", n)
    return root


def vqa_med_2019(root: Path) -> Path:
    sets = {
        "ImageClef-2019-VQA-Med-Training/All_QA_Pairs_train.txt": "synpic1|what modality is shown?|ct\n"
        "synpic1|is this ct?|yes\n",
        "ImageClef-2019-VQA-Med-Training/QAPairsByCategory/C1_Modality_train.txt": "synpic1|what modality is shown?"
        "|ct\n",
        "ImageClef-2019-VQA-Med-Validation/All_QA_Pairs_val.txt": "synpic2|in what plane is this?|axial\n",
        "VQAMed2019Test/VQAMed2019_Test_Questions_w_Ref_Answers.txt": "synpic3|abnormality|what is abnormal?|"
        "(large) cyst#tumour\n",
    }
    for name, text in sets.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for folder, n in (
        ("ImageClef-2019-VQA-Med-Training/Train_images", 1),
        ("ImageClef-2019-VQA-Med-Validation/Val_images", 2),
        ("VQAMed2019Test/VQAMed2019_Test_Images", 3),
    ):
        write_image(root / folder / f"synpic{n}.jpg", n)
    return root


def radfm(root: Path) -> Path:
    columns = {"img_root_dir": "/gpfs/home/cs/data/all_images/figures", "Question": "What is it?", "Answer": "CT"}
    rows = [{**columns, "Figure_path": f"PMC{n}_F1.jpg"} for n in (1, 2)]
    write_csv(root / "data_csv" / "pmcvqa_train.csv", rows)
    for n in (1, 2):
        write_image(root / "figures" / f"PMC{n}_F1.jpg", n)
    return root
