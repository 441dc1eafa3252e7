"""LLaVA-Med (Li et al., NeurIPS 2023, arXiv 2306.00890) -> conversations about figures of articles.

Its files are JSON lists of ``{id, image, domain, conversations: [{from, value}]}``: alignment (500k), instruct (10k,
60k, 60k inline mention). The figures are fetched from PubMed Central by the release's own script; many links are dead,
so samples without their figure are dropped and counted.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.items import Converter, Dropped, Item, Source
from data_prep.questions import inside, make_key, read_json
from data_prep.splits import assign
from medvlm.data.schema import DEIDENTIFICATION_MASK, IMAGE_MARK, Split
from medvlm.errors import UserError

HINT = "a LLaVA-Med file is a JSON list of {id, image, conversations}; name it with --file"
ROLES = {"human": "user", "gpt": "assistant"}


def items(
    source: Path,
    file: Annotated[str | None, typer.Option(help="The JSON below the folder; needed if there are several.")] = None,
    images: Annotated[str, typer.Option(help="Folder of the figures.")] = "images",
    split: Annotated[
        Literal["train", "hash"], typer.Option(help="train: all, as released; hash: 80/10/10 by article.")
    ] = "train",
) -> Iterator[Item | Dropped]:
    """One sample per entry, with ``<image>`` where the entry has it: before or after the first question."""
    path = source / file if file else _only_json(source)
    rows = read_json(path, HINT)
    if not (source / images).is_dir():
        raise UserError(f"{source / images}: not found; give the folder of the figures with --images")
    seen: Counter[str] = Counter()
    known: set[bytes] = set()  # digests: the texts of half a million entries are hundreds of megabytes
    for number, row in enumerate(rows, 1):
        name, number_id = str(row.get("image") or ""), str(row.get("id") or "")
        what = f"{path.name} entry {number}: {number_id or name}"
        article = article_id(name or number_id)
        place: Split = assign(article) if split == "hash" and article else "train"
        try:
            messages = conversation(row)
        except ValueError as error:
            yield Dropped(what, str(error), place)
            continue
        content = hashlib.sha256(f"{number_id}\n{name}\n{messages}".encode()).digest()
        if not number_id or not name:
            yield Dropped(what, "entry without id or image", place)
        elif content in known:
            yield Dropped(what, "duplicate entry", place)
        elif not inside(source, f"{images}/{name}"):
            yield Dropped(what, "missing image", place)
        else:
            known.add(content)
            seen[number_id] += 1  # another conversation about the same figure is another sample of the same group
            parts = [path.stem, number_id, *([str(seen[number_id])] if seen[number_id] > 1 else [])]
            domains = sorted(k for k, v in (row.get("domain") or {}).items() if v)
            yield Item(
                {
                    "key": make_key(*parts),
                    "split": place,
                    "study_id": article,
                    "messages": messages,
                    "metadata": {"file": path.name, "domains": domains},
                },
                [Source(f"{images}/{name}", image_id=name)],
            )


def _only_json(source: Path) -> Path:
    found = sorted(p for pattern in ("*.json", "*/*.json", "data/*/*.json") for p in source.glob(pattern))
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(source)) for p in found[:8])
        raise UserError(f"{source}: holds {f'several files ({names})' if found else 'no JSON'}; {HINT}")
    return found[0]


def article_id(pair_id: str) -> str | None:
    """The article part of a pair id such as ``17989794_F1``; without one, the figure is the group."""
    found = re.match(r"((?:PMC)?\d+)_", pair_id)
    return found.group(1) if found else None


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns, ``<image>`` kept in place. Raises ValueError in fixed words where they cannot be learnt from."""
    turns = row.get("conversations", row.get("conversatons"))  # the second is a typo of the release
    if not isinstance(turns, list) or not turns:
        raise ValueError("entry without conversations")
    if any(not isinstance(t, dict) or t.get("from") not in ROLES for t in turns):
        raise ValueError("turn that is neither human nor gpt")
    messages = [{"role": ROLES[t["from"]], "content": str(t.get("value") or "").strip()} for t in turns]
    roles = [m["role"] for m in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError("turns do not alternate")
    if any(not m["content"].replace(IMAGE_MARK, "").strip() for m in messages):
        raise ValueError("empty turn")
    marks = [m["content"].count(IMAGE_MARK) for m in messages]
    if sum(marks) > 1 or any(marks[1::2]):
        raise ValueError(f"more than one {IMAGE_MARK}, or one in an answer")
    if any(DEIDENTIFICATION_MASK in m["content"] for m in messages[1::2]):
        raise ValueError(f"answer holds {DEIDENTIFICATION_MASK}")
    if not sum(marks):  # the 60k inline-mention file and others may leave it to the reader
        messages[0]["content"] = f"{IMAGE_MARK}\n{messages[0]['content']}"
    return messages


CONVERTER = Converter(
    name="llava-med",
    license="CC BY-NC 4.0 for the conversations; figures vary by article",
    help="LLaVA-Med: conversations about figures of articles, written by a language model.",
    items=items,
)
