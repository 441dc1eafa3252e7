"""VQA-RAD (Lau et al., Scientific Data 2018, doi:10.1038/sdata.2018.251) -> shards.

The release is ``VQA_RAD_Dataset_Public.json`` and ``images/``. Each image becomes one sample per split, with all its
questions as one conversation; evaluation asks them one by one.
"""

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from PIL import Image as PILImage
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from medvlm.data.schema import Image, ImagePart, Message, Sample, Split, TextPart
from medvlm.data.shards import write_shards
from medvlm.errors import UserError

RELEASE = "VQA_RAD_Dataset_Public.json"
SplitMode = Literal["official", "image-disjoint"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TYPOS = {"PRSE": "PRES", "ATRIB": "ATTRIB"}  # one row each in the release
FIELDS = ("qid", "phrase_type", "image_name", "image_case_url", "question", "question_type", "answer", "answer_type")


def read_release(source: Path) -> list[dict[str, Any]]:
    """The rows of the release. Raises UserError where it is absent or not a JSON list of objects."""
    path = source / RELEASE
    if not path.is_file():
        raise UserError(f"{path}: not found; give the folder of the VQA-RAD release, with {RELEASE} and images/")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of question objects")
    return rows


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """One row with single spaces, text answers and tidy types. Raises ValueError that says what cannot be used."""
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise ValueError(f"the row lacks {', '.join(missing)}")
    text = {name: " ".join(str(row[name]).split()) for name in FIELDS}
    empty = [name for name in ("image_name", "question", "answer") if not text[name]]
    if empty:
        raise ValueError(f"the row has an empty {', '.join(empty)}")
    if Path(text["image_name"]).name != text["image_name"]:
        raise ValueError("image_name is not a plain file name")
    text["answer_type"] = text["answer_type"].lower()  # two rows say "CLOSED "
    if text["answer_type"] not in ("closed", "open"):
        raise ValueError(f"answer_type {row['answer_type']!r} is neither CLOSED nor OPEN")
    kinds = (kind.strip().upper() for kind in text["question_type"].split(","))
    text["question_type"] = ", ".join(TYPOS.get(kind, kind) for kind in kinds)
    return {**text, "organ": row.get("image_organ"), "case": text["image_case_url"].rpartition("id=")[2]}


def studies(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Image -> case id. Five images carry several ids, counting upwards; the most frequent, then first, is taken."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row["image_name"]][row["case"]] += 1
    return {image: min(c, key=lambda case: (-c[case], case)) for image, c in counts.items()}


def assign(study: str) -> Split:
    """75 % train, 10 % validation, 15 % test by a hash, so that the images of one case stay together on any machine."""
    place = int(hashlib.sha256(f"vqa_rad:{study}".encode()).hexdigest(), 16) % 100
    return "train" if place < 75 else "validation" if place < 85 else "test"


def build(source: Path, out: Path, split: SplitMode = "official") -> dict[str, Any]:
    """Write ``out/<split>/vqa_rad-*.tar`` and ``out/quarantine.jsonl``; returns the counts that `prepare` prints.

    ``official`` keeps the release's test questions, whose images nearly all occur in train as well; ``image-disjoint``
    assigns whole cases. Raises UserError for a missing release and where ``out`` already holds shards.
    """
    old = [path for name in SPLITS for path in (out / name).glob("*.tar")]
    if old:
        raise UserError(f"{out}: already holds shards such as {old[0].name}; give a new folder, so splits never mix")
    quarantine: list[dict[str, Any]] = []
    dropped: dict[str, Counter[str]] = {name: Counter() for name in (*SPLITS, "unknown")}
    rows = []
    for number, raw in enumerate(read_release(source)):
        try:
            rows.append(clean(raw))
        except ValueError as error:
            quarantine.append({"row": number, "qid": raw.get("qid"), "reason": str(error)})
            dropped["unknown"]["bad row"] += 1
    study = studies(rows)
    grouped: dict[Split, dict[str, list[dict[str, Any]]]] = {name: defaultdict(list) for name in SPLITS}
    seen: set[tuple[str, str, str]] = set()
    # Test rows come first: of a question that stands in both splits, the copy in train is the one to go.
    for row in sorted(rows, key=lambda r: not r["phrase_type"].startswith("test")):
        official: Split = "test" if row["phrase_type"].startswith("test") else "train"
        name = official if split == "official" else assign(study[row["image_name"]])
        identity = (row["image_name"], row["question"].lower(), row["answer"].lower())
        if identity in seen:
            dropped[name]["duplicate question"] += 1
            continue
        seen.add(identity)
        grouped[name][row["image_name"]].append(row)
    decoded: dict[str, tuple[bytes, int, int] | str] = {i: _read_image(source / "images" / i) for i in study}
    report: dict[str, Any] = {"source": "vqa_rad", "mode": split, "rows": len(rows), "splits": {}}
    for name, images in grouped.items():
        for image in [i for i in images if isinstance(decoded[i], str)]:
            reason = str(decoded[image])
            questions = images.pop(image)
            dropped[name][reason] += len(questions)
            quarantine.append({"split": name, "image": image, "reason": reason, "qids": [q["qid"] for q in questions]})
        if images:
            write_shards(_samples(images, name, study, decoded), out / name, "vqa_rad")
        questions = [q for group in images.values() for q in group]
        kinds = Counter(q["answer_type"] for q in questions)
        report["splits"][name] = {
            "images": len(images),
            "questions": len(questions),
            "closed": kinds["closed"],
            "open": kinds["open"],
            "dropped": dict(dropped[name]),
        }
    report["dropped_without_split"] = dict(dropped["unknown"])
    report["test_images"] = len(grouped["test"])
    report["test_images_in_train"] = len(grouped["test"].keys() & grouped["train"].keys())
    folder = source / "images"
    report["images_without_questions"] = sorted(p.name for p in folder.glob("*.jpg") if p.name not in study)
    report["quarantined"] = len(quarantine)
    out.mkdir(parents=True, exist_ok=True)
    (out / "quarantine.jsonl").write_text("".join(json.dumps(q) + "\n" for q in quarantine), encoding="utf-8")
    return report


def _read_image(path: Path) -> tuple[bytes, int, int] | str:
    """Bytes, width and height of a JPEG that decodes, or the reason why it cannot be used."""
    if not path.is_file():
        return "missing image"
    data = path.read_bytes()
    try:
        with PILImage.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.load()
            return data, image.width, image.height
    except (OSError, SyntaxError, PILImage.DecompressionBombError):
        return "unreadable image"


def _samples(
    images: dict[str, list[dict[str, Any]]], split: Split, study: dict[str, str], decoded: dict[str, Any]
) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    for name, questions in images.items():
        data, width, height = decoded[name]
        messages = []
        for n, q in enumerate(questions):
            ask: list[TextPart | ImagePart] = [ImagePart(type="image")] if n == 0 else []
            ask.append(TextPart(type="text", text=q["question"]))
            messages.append(Message(role="user", content=ask))
            answer: list[TextPart | ImagePart] = [TextPart(type="text", text=q["answer"])]
            kinds = {"answer_type": q["answer_type"], "question_type": q["question_type"]}
            messages.append(Message(role="assistant", content=answer, **kinds))
        try:
            sample = Sample(
                key=f"{Path(name).stem}-{split}",  # the official splits share images, and keys must differ
                source="vqa_rad",
                license="CC0-1.0",
                split=split,
                study_id=study[name],
                images=[Image(file="0.jpg", width=width, height=height, image_id=name)],
                messages=messages,
                metadata={
                    "organ": questions[0]["organ"],
                    "qids": [q["qid"] for q in questions],
                    "phrase_types": [q["phrase_type"] for q in questions],
                },
            )
        except ValidationError as error:
            raise UserError(f"{name}: {error.errors()[0]['msg']}") from None
        yield sample, {"0.jpg": data}


def prepare(
    source: Annotated[Path, typer.Argument(help=f"The release: a folder with {RELEASE} and images/.")],
    out: Annotated[Path, typer.Argument(help="New folder for the shards, one sub-folder per split.")],
    split: Annotated[
        SplitMode, typer.Option(help="official: the release's test questions; image-disjoint: no image in two splits.")
    ] = "official",
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Turn the VQA-RAD release into shards."""
    report = build(source, out, split)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, out)


def _print(report: dict[str, Any], out: Path) -> None:
    console = Console()
    table = Table(title=f"VQA-RAD, {report['mode']} split")
    for column in ("split", "images", "questions", "closed", "open", "dropped"):
        table.add_column(column, justify="left" if column in ("split", "dropped") else "right")
    rows = [*report["splits"].items()]
    if report["dropped_without_split"]:
        rows.append(("unknown", {"dropped": report["dropped_without_split"]}))
    for name, row in rows:
        why = ", ".join(f"{n} {reason}" for reason, n in row["dropped"].items())
        numbers = [str(row.get(column, 0)) for column in ("images", "questions", "closed", "open")]
        table.add_row(name, *numbers, why or "-")
    console.print(table)
    overlap = report["test_images_in_train"]
    console.print(f"{overlap} of {report['test_images']} test images also occur in train.", highlight=False)
    if overlap:
        console.print("Scores on this test split say little about new images; compare with --split image-disjoint.")
    for image in report["images_without_questions"]:
        console.print(f"{image} has no question and is left out.", highlight=False)
    if report["quarantined"]:
        console.print(f"{report['quarantined']} entries were set aside: see {out / 'quarantine.jsonl'}")
