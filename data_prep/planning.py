"""The plan of a data set: which sample goes into which shard. A pure function of the archive and the options.

One JSONL file per future shard holds its items; the plan appears whole, by the rename of a folder.
"""

import hashlib
import json
import os
import re
import shutil
import socket
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.items import Dropped, Item
from data_prep.output import remove_dead, sync
from medvlm.errors import UserError

SPLITS = ("train", "validation", "test")
UNKNOWN = "unknown"  # where a dropped row belongs whose split is not known
TABLES = {".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".xml", ".xlsx", ".gz", ".zip", ".arrow", ".pkl"}
KEY = re.compile(r"[A-Za-z0-9_\-]+")


@dataclass(frozen=True)
class Shard:
    """One shard to be made: ``name`` is ``split/PREFIX-000000.tar``."""

    split: str
    number: int
    name: str
    samples: int

    @property
    def items(self) -> str:
        return f"{self.split}-{self.number:06d}.jsonl"


@dataclass(frozen=True)
class Plan:
    """``splits``: samples of each; ``dropped``: split -> reason -> rows; ``shared_groups``: patients in two splits."""

    fingerprint: dict[str, Any]
    digest: str
    splits: dict[str, int]
    dropped: dict[str, dict[str, int]]
    shared_groups: int

    @property
    def shards(self) -> list[Shard]:
        size, prefix = self.fingerprint["samples_per_shard"], self.fingerprint["prefix"]
        return [
            Shard(split, n, f"{split}/{prefix}-{n:06d}.tar", min(size, samples - n * size))
            for split, samples in self.splits.items()
            for n in range(-(-samples // size))
        ]


def tables_digest(source: Path, others: Iterable[Path] = (), deep: Iterable[str] = (), out: str = "") -> str:
    """A hash of name, size and time of the tables in the top two levels of an archive, to notice that it changed; and
    of those that ``others``, files or folders, are or hold, and of what the patterns ``deep`` find below its root.

    What lies in the folder ``out`` is not the archive's.
    """
    rows, own = [], Path(out).resolve() if out else None
    for root in (source, *others):
        found = [root] if root.is_file() else [*root.glob("*"), *root.glob("*/*")]
        found += [path for pattern in deep for path in root.glob(pattern)] if root is source else []
        for path in dict.fromkeys(found):
            if path.suffix.lower() not in TABLES or not path.is_file():
                continue
            if own and path.resolve().is_relative_to(own):
                continue
            stat = path.stat()
            name = path.relative_to(source) if path.is_relative_to(source) else path
            rows.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(sorted(set(rows))).encode()).hexdigest()


def check_fingerprint(out: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise UserError that names what differs, where ``out`` was begun with another input or other options."""
    if old == new:
        return
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    told = [f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names if name != "tables"]
    if "tables" in names:
        told.append("the tables of the archive have changed")
    raise UserError(
        f"{out}: was begun differently ({'; '.join(told)}); give a new folder, or the same input and options"
    )


def read_plan(folder: Path) -> Plan | None:
    """The plan in a folder, None where there is none."""
    try:
        return Plan(**json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def make_plan(folder: Path, items: Iterable[Item | Dropped], fingerprint: dict[str, Any], allow_leak: bool) -> Plan:
    """Stream items into ``folder``, which appears whole; if another process was quicker, its plan is taken.

    Raises UserError for a key that occurs twice, a patient in two splits (unless ``allow_leak``), and no item at all.
    """
    remove_dead(folder.parent, folder.name)
    part = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True, mode=0o700)  # the texts have not been scanned yet
    try:
        writer = _Writer(part, fingerprint["samples_per_shard"])
        for item in items:
            writer.add(item)
        plan = writer.finish(fingerprint, allow_leak)
        try:
            os.rename(part, folder)
        except OSError:
            if (other := read_plan(folder)) is None:
                raise
            check_fingerprint(str(folder), other.fingerprint, fingerprint)
            return other
        sync(folder.parent)
        return plan
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Writer:
    def __init__(self, folder: Path, samples_per_shard: int):
        self.folder, self.size = folder, samples_per_shard
        self.files: dict[str, Any] = {}
        self.counts = dict.fromkeys(SPLITS, 0)
        self.hashes = {split: hashlib.sha256() for split in SPLITS}
        self.keys = array("Q")
        self.ids = {split: array("Q") for split in SPLITS}  # group, patient, study of each item, hashed; 0: not known
        self.dropped: dict[str, Counter[str]] = {split: Counter() for split in (*SPLITS, UNKNOWN)}
        self.dropped_file = (folder / "dropped.jsonl").open("w", encoding="utf-8")

    def add(self, item: Item | Dropped) -> None:
        if isinstance(item, Item):
            wrong = _wrong(item)
            if wrong is None:
                self._add(item)
                return
            split = item.fields.get("split")
            item = Dropped(str(item.fields.get("key")), wrong, split if split in SPLITS else None)
        self.dropped[item.split or UNKNOWN][item.reason] += 1
        row = {"split": item.split or UNKNOWN, "what": item.what, "reason": item.reason}
        self.dropped_file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _add(self, item: Item) -> None:
        fields, split = item.fields, item.fields["split"]
        if self.counts[split] % self.size == 0:
            self._close(split)
            name = f"{split}-{self.counts[split] // self.size:06d}.jsonl"
            self.files[split] = (self.folder / name).open("w", encoding="utf-8")
        line = json.dumps({"fields": fields, "images": [vars(s) for s in item.images]}, ensure_ascii=False) + "\n"
        self.files[split].write(line)
        self.hashes[split].update(line.encode())
        self.counts[split] += 1
        self.keys.append(_hash(fields["key"]))
        ids = (_group(fields, [vars(s) for s in item.images[:1]]), fields.get("patient_id"), fields.get("study_id"))
        self.ids[split].extend(map(_hash, ids))

    def _close(self, split: str) -> None:
        if file := self.files.pop(split, None):
            file.close()
            sync(Path(file.name))

    def finish(self, fingerprint: dict[str, Any], allow_leak: bool) -> Plan:
        for split in SPLITS:
            self._close(split)
            np.save(self.folder / f"ids-{split}.npy", np.frombuffer(self.ids[split], np.uint64).reshape(-1, 3))
        self.dropped_file.close()
        dropped = {split: dict(sorted(reasons.items())) for split, reasons in self.dropped.items() if reasons}
        if not sum(self.counts.values()):
            told = "; ".join(f"{n} x {r}" for reasons in dropped.values() for r, n in reasons.items())
            raise UserError(f"{fingerprint['source']}: gives no sample{f' (dropped: {told})' if told else ''}")
        self._refuse_duplicates()
        shared = self._shared_groups(allow_leak)
        digests = [*(self.hashes[split].hexdigest() for split in SPLITS), json.dumps(dropped)]
        digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        plan = Plan(fingerprint, digest, {s: n for s, n in self.counts.items() if n}, dropped, shared)
        (self.folder / "plan.json").write_text(json.dumps(vars(plan)), encoding="utf-8")
        for name in ("plan.json", "dropped.jsonl"):
            sync(self.folder / name)
        return plan

    def _refuse_duplicates(self) -> None:
        values, counts = np.unique(np.frombuffer(self.keys, np.uint64), return_counts=True)
        twice = set(values[counts > 1].tolist())
        if not twice:
            return
        first: dict[str, str] = {}
        for split, item in self._rows():
            key = item["fields"]["key"]
            if _hash(key) in twice:
                what = f"{split}, {item['images'][0]['path']}" if item["images"] else split
                if key in first:
                    raise UserError(f"key {key!r} occurs twice: ({first[key]}) and ({what}); keys must be unique")
                first[key] = what

    def _shared_groups(self, allow_leak: bool) -> int:
        groups = {s: np.unique(np.frombuffer(self.ids[s], np.uint64).reshape(-1, 3)[:, 0]) for s in SPLITS}
        joined, counts = np.unique(np.concatenate([*groups.values()]), return_counts=True)
        shared = set(joined[counts > 1].tolist())
        if not shared or allow_leak:
            return len(shared)
        seen: dict[str, set[str]] = {}
        for split, item in self._rows():
            group = _group(item["fields"], item["images"])
            if _hash(group) in shared:
                seen.setdefault(group, set()).add(split)
        leaks = {group: [s for s in SPLITS if s in splits] for group, splits in seen.items() if len(splits) > 1}
        if not leaks:
            return 0
        group, splits = next(iter(leaks.items()))
        raise UserError(
            f"{len(leaks)} of {len(joined)} patients (or studies or images, where no patient is known) are in more "
            f"than one split, for example {group!r} in {' and '.join(splits)}; "
            "choose another split, or --allow-leak to keep it"
        )

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for split in SPLITS:
            for path in sorted(self.folder.glob(f"{split}-*.jsonl")):
                for item in read_items(path):
                    yield split, item


def read_items(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _wrong(item: Item) -> str | None:
    key = item.fields.get("key")
    if not isinstance(key, str) or not KEY.fullmatch(key):
        return "key may hold only letters, digits, _ and -"
    if item.fields.get("split") not in SPLITS:
        return f"split is none of {', '.join(SPLITS)}"
    return None


def _group(fields: dict[str, Any], images: list[dict[str, Any]]) -> str:
    """As Sample.group computes it."""
    image_id = images[0]["image_id"] if images else None
    return fields.get("patient_id") or fields.get("study_id") or image_id or fields["key"]


def _hash(text: str | None) -> int:
    """64 bits, never 0 for a text: eight bytes per sample are what keeps the memory of planning small."""
    if text is None:
        return 0
    return int.from_bytes(hashlib.blake2b(str(text).encode(), digest_size=8).digest(), "little") or 1
