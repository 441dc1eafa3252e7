"""What is made when every shard exists: the report, the list of bad entries, and an index of each split."""

import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.output import Output, remove_dead
from data_prep.planning import SPLITS, UNKNOWN, Plan
from medvlm.data.shards import MERGED, Merger, index_path, read_index

Markers = dict[str, dict[str, Any]]


def short_reason(reason: str) -> str:
    """The words by which equal reasons are counted: those before the details."""
    return reason.partition(": ")[0].partition(" (")[0]


def summary(plan: Plan, folder: Path, markers: Markers) -> dict[str, Any]:
    """Counts per split of what the shards hold, what was dropped and why, and what was found in texts.

    ``folder`` is the plan's: its hashed ids tell the patients and studies of the samples that were not quarantined.
    """
    splits: dict[str, Any] = {}
    for split in (*SPLITS, UNKNOWN):
        dropped = Counter(plan.dropped.get(split, {}))
        counts: Counter[str] = Counter()
        if split in plan.splits:
            counts, bad = _split_counts(plan, split, folder, markers)
            dropped.update(bad)
        if split in plan.splits or dropped:
            names = ("patients", "studies", "samples", "images", "texts", "shards", "quarantined")
            splits[split] = {**{name: counts[name] for name in names}, "dropped": dict(sorted(dropped.items()))}
    masked: Counter[str] = Counter()
    for marker in markers.values():
        masked.update(marker["masked"])
    return {
        "splits": splits,
        "groups_in_two_splits": plan.shared_groups,
        "mask": plan.fingerprint["mask"],
        "masked": dict(sorted(masked.items())),
        "turns_dropped": sum(marker["turns_dropped"] for marker in markers.values()),
    }


def _split_counts(plan: Plan, split: str, folder: Path, markers: Markers) -> tuple[Counter[str], Counter[str]]:
    ids = np.load(folder / f"ids-{split}.npy")  # group, patient, study
    kept = np.zeros(len(ids), bool)
    counts: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for shard in plan.shards:
        if shard.split != split or shard.name not in markers:
            continue
        marker = markers[shard.name]
        first = shard.number * plan.fingerprint["samples_per_shard"]
        kept[first : first + shard.samples] = True
        for row in marker["quarantined"]:
            kept[first + row["number"]] = False
            bad[short_reason(row["reason"])] += 1
        for name in ("samples", "images", "texts"):
            counts[name] += marker[name]
        counts["shards"] += marker["samples"] > 0
        counts["quarantined"] += len(marker["quarantined"])
    for name, column in (("patients", 1), ("studies", 2)):
        known = ids[kept, column]
        counts[name] = len(np.unique(known[known != 0]))
    return counts, bad


def quarantine_lines(plan: Plan, folder: Path, markers: Markers) -> Iterator[bytes]:
    """``quarantine.jsonl``: rows that the converter dropped, then samples that could not be made."""
    with (folder / "dropped.jsonl").open("rb") as file:
        yield from file
    for shard in plan.shards:
        for row in markers[shard.name]["quarantined"]:
            line = {"split": shard.split, **{name: row[name] for name in ("key", "what", "reason")}}
            yield (json.dumps(line, ensure_ascii=False) + "\n").encode()


def merge_indexes(output: Output, shards: Iterable[str], temporary: Path) -> None:
    """``index.arrow`` of each split, from the indexes of its ``shards``; the tars are not read again."""
    remove_dead(temporary, "merge")
    folder = temporary / f"merge.{socket.gethostname()}.{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        for split, names in groupby(shards, lambda name: name.partition("/")[0]):
            merger = Merger(folder)
            for name, data in output.read_each(str(index_path(shard)) for shard in names):
                merger.add(*read_index(data, f"{output.url}/{name}"))
            merger.write(folder / MERGED)
            output.publish(folder / MERGED, f"{split}/{MERGED}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
