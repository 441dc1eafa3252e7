"""What the converters of captions and questions share: reading tables, checking text, grouping into conversations."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.items import Dropped, require
from medvlm.data.schema import DEIDENTIFICATION_MASK, IMAGE_MARK, Split
from medvlm.errors import UserError

SPLITS: tuple[Split, Split, Split] = ("train", "validation", "test")
CAPTION_REQUESTS = (
    "Describe this image.",
    "What does this image show?",
    "Write a caption for this image.",
    "Summarise the content of this image.",
)
_KEY = re.compile(r"[A-Za-z0-9_\-]+")
_ARTICLE = re.compile(r"PMC\d+")
Encoding = Annotated[str, typer.Option(help="Of the tables; cp1252 and utf-16 are usual others.")]


def refuse_pointer(path: Path) -> None:
    """Raise UserError where Git LFS left its pointer in the place of a file."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(30).startswith(b"version https://git-lfs"):
                raise UserError(f"{path}: is a Git LFS pointer, not the data; run `git lfs pull`, or download it")


def read_text(path: Path, hint: str) -> str:
    """A whole UTF-8 file, with or without byte order mark. Raises UserError for what is absent or something else."""
    refuse_pointer(require(path, hint))
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason}); convert it, for example with iconv") from None


def read_json(path: Path, hint: str) -> list[dict[str, Any]]:
    """A JSON list of objects. Raises UserError where it is absent, a Git LFS pointer or something else."""
    text = read_text(path, hint)
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a JSON list of objects; {hint}")
    return rows


def tidy(text: Any) -> str:
    """Single spaces; integer answers become text."""
    return "" if text is None else " ".join(str(text).split())


def make_key(*parts: str) -> str:
    """A sample key from its parts: other characters become ``_``, and a hash is added so that keys still differ."""
    text = "-".join(parts)
    if _KEY.fullmatch(text):
        return text
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', text)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def article_of(name: str) -> str | None:
    """The PubMed Central id in the name of a figure, for all figures of an article belong into one split."""
    found = _ARTICLE.search(name)
    return found.group() if found else None


def caption_messages(key: str, caption: str) -> list[dict[str, Any]]:
    """A request, fixed by the key, and the caption as the answer."""
    request = CAPTION_REQUESTS[hashlib.sha256(key.encode()).digest()[0] % len(CAPTION_REQUESTS)]
    return [ask(request, images=1), {"role": "assistant", "content": caption}]


def ask(text: str, images: int = 0) -> dict[str, Any]:
    """A user turn: the images, then the text."""
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def fault(question: str, answer: str) -> str | None:
    """Why a question or caption cannot be used, in a few fixed words, or None."""
    if not question:
        return "empty question"
    if not answer:
        return "empty answer"
    if IMAGE_MARK in question + answer:
        return f"text holds {IMAGE_MARK}"
    return f"answer holds {DEIDENTIFICATION_MASK}" if DEIDENTIFICATION_MASK in answer else None


def yes_no(answer: str) -> str:
    """``closed`` where the answer is yes or no, else ``open``: for releases that do not say."""
    return "closed" if answer.lower().rstrip(".") in ("yes", "no") else "open"


def inside(source: Path, name: str) -> bool:
    """True for an existing file below ``source``, and not, by way of ``..``, outside of it."""
    return ".." not in Path(name).parts and not Path(name).is_absolute() and (source / name).is_file()


@dataclass(frozen=True)
class Question:
    """One question about one image; ``row`` names it in the list of what was dropped."""

    split: Split
    image: str
    question: str
    answer: str
    row: str
    answer_type: str | None = None
    question_type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def by_image(questions: Iterable[Question | Dropped]) -> Iterator[Dropped | tuple[Split, str, list[Question]]]:
    """Group questions: (split, image, its questions), splits and images in the order in which they come.

    Unusable questions and exact duplicates of (image, question, answer) are dropped; of a duplicate across splits the
    copy in test stays.
    """
    usable = []
    for q in questions:
        why = None if isinstance(q, Dropped) else fault(q.question, q.answer)
        if isinstance(q, Dropped):
            yield q
        elif why:
            yield Dropped(q.row, why, q.split)
        else:
            usable.append(q)
    grouped: dict[Split, dict[str, list[Question]]] = {name: defaultdict(list) for name in SPLITS}
    seen: set[tuple[str, str, str]] = set()
    for q in sorted(usable, key=lambda q: -SPLITS.index(q.split)):
        identity = (q.image, q.question.lower(), q.answer.lower())
        if identity in seen:
            yield Dropped(q.row, "duplicate question", q.split)
        else:
            seen.add(identity)
            grouped[q.split][q.image].append(q)
    for split, images in grouped.items():
        for image, group in images.items():
            yield split, image, group


def question_messages(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """All questions of an image as one conversation, the image in front of the first."""
    messages: list[dict[str, Any]] = []
    for n, q in enumerate(questions):
        kinds = {"answer_type": q.answer_type, "question_type": q.question_type}
        answer = {"role": "assistant", "content": [{"type": "text", "text": q.answer}]}
        messages += [ask(q.question, images=n == 0), answer | {k: v for k, v in kinds.items() if v}]
    return messages


def shared_text(questions: Iterable[Question | Dropped]) -> str:
    """How many images of a split also stand in another, as a sentence; "" where the splits share none."""
    names: dict[Split, set[str]] = {name: set() for name in SPLITS}
    for q in questions:
        if isinstance(q, Question):
            names[q.split].add(q.image)
    pairs = [(a, b) for n, a in enumerate(SPLITS) for b in SPLITS[n + 1 :] if names[a] & names[b]]
    counts = (f"{len(names[a] & names[b])} of {len(names[b])} {b} images also occur in {a}" for a, b in pairs)
    return "; ".join(counts)
