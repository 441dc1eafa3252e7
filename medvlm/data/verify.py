"""``medvlm shards verify``: reads every byte of a shard set and tells what is wrong with it."""

import hashlib
import json
import os
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

from medvlm.data.index import MERGED, Tar, index_path, read_index
from medvlm.data.schema import parse_sample
from medvlm.data.shard_set import find_tars
from medvlm.data.verify_sample import check_sample
from medvlm.errors import UserError

Paths = str | Path | Sequence[str | Path]
Problem = tuple[Path, str | None, str]
SPLITS = ("train", "validation", "test")


@dataclass
class TarReport:
    """One shard. The arrays have a row per sample: hashes of (folder, key) and (source, group), and the split's number.

    64 bits each: a check over ten million samples holds 170 MB. What hashes find is then compared in full.
    """

    samples: int = 0
    images: int = 0
    problems: list[tuple[str | None, str]] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    groups: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    splits: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    described: Tar | None = None


def verify(paths: Paths, workers: int | None = None) -> dict[str, Any]:
    """Read every byte of the shards and compare with the index and the schema.

    Checked are: the tar's own structure, each member against the index (offset, size, crc32), the JSON, the images and
    volumes and their sizes, keys that occur twice in a folder, and patients (`Sample.group`) in more than one split.
    Give all splits of a data set at once, or a leak between them cannot be seen. ``workers`` processes (None: one per
    core) each check a shard at a time. Returns the counts and ``problems``, a list of ``{shard, key, reason}`` where
    key None means the whole shard. Raises UserError only where there is no tar.
    """
    tars = list(map(Path, find_tars([paths] if isinstance(paths, str | Path) else list(paths))))
    reports = list(_over_processes(_check_tar, tars, workers))
    problems = [
        (tar, key, reason) for tar, report in zip(tars, reports, strict=True) for key, reason in report.problems
    ]
    problems += _merged_indexes(tars, reports)
    problems += _repeated_keys(tars, reports)
    problems += _leaks(tars, reports)
    return {
        "shards": len(tars),
        "samples": sum(r.samples for r in reports),
        "images": sum(r.images for r in reports),
        "problems": [{"shard": str(tar), "key": key, "reason": reason} for tar, key, reason in problems],
    }


def print_verify(report: dict[str, Any], as_json: bool = False, limit: int = 50) -> None:
    """Print a report of `verify`: all of it as JSON, or the first ``limit`` problems and the totals for people."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    problems = report["problems"]
    for problem in problems[:limit]:
        print(f"{problem['shard']}{':' + problem['key'] if problem['key'] else ''}: {problem['reason']}")
    if len(problems) > limit:
        print(f"... and {len(problems) - limit} more; --json lists all")
    found = f"{len(problems)} problem(s)" if problems else "no problems"
    print(f"{report['shards']} shards, {report['samples']} samples, {report['images']} images: {found}")


def _over_processes(check: Callable[[Path], TarReport], tars: list[Path], workers: int | None) -> Iterator[TarReport]:
    """Results in the order of the tars, with a progress bar on a terminal."""
    count = min(workers or len(os.sched_getaffinity(0)), len(tars))
    # no refreshing thread: processes are forked while the bar is shown
    progress = Progress(
        console=Console(stderr=True), transient=True, auto_refresh=False, disable=not sys.stderr.isatty()
    )
    with progress:
        task = progress.add_task(f"verifying, {count} process(es)", total=len(tars))

        def shown(results: Iterable[TarReport]) -> Iterator[TarReport]:
            for result in results:
                progress.update(task, advance=1, refresh=True)
                yield result

        if count <= 1:
            yield from shown(map(check, tars))
            return
        with ProcessPoolExecutor(count, mp_context=get_context("fork")) as pool:
            yield from shown(pool.map(check, tars))


def _check_tar(tar: Path) -> TarReport:
    report = TarReport()
    members, broken = _walk(tar)
    report.problems += [(None, reason) for reason in broken]
    try:
        table, described = _read_index(tar)
    except UserError as error:
        report.problems.append((None, str(error)))
        return report
    report.described = described
    report.problems += _compare(members, table, bool(broken))
    keys, groups, splits = [], [], []
    with tar.open("rb") as file:
        for row in table.to_pylist():
            report.samples += 1
            reasons, sample, images = check_sample(file.fileno(), row)
            report.images += images
            report.problems += [(row["key"], reason) for reason in reasons]
            keys.append(_hash(str(tar.parent), row["key"]))
            groups.append(_hash(sample.source, sample.group) if sample else 0)
            splits.append(SPLITS.index(sample.split) if sample else len(SPLITS))
    report.keys, report.groups = np.array(keys, np.uint64), np.array(groups, np.uint64)
    report.splits = np.array(splits, np.uint8)
    return report


def _hash(*words: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(words).encode(), digest_size=8).digest(), "little")


def _places(reports: list[TarReport]) -> tuple[np.ndarray, np.ndarray]:
    """For all samples of all tars, one after the other: the tar's number and the row in it."""
    counts = [len(r.keys) for r in reports]
    starts = np.cumsum([0, *counts[:-1]], dtype=np.int64)
    tar = np.repeat(np.arange(len(counts)), counts)
    return tar, np.arange(len(tar)) - starts[tar]


def _merged_indexes(tars: list[Path], reports: list[TarReport]) -> Iterator[Problem]:
    """Folders whose ``index.arrow``, which readers prefer, says something else than the indexes of the tars."""
    merged: dict[Path, dict[str, Tar]] = {}
    for tar, report in zip(tars, reports, strict=True):
        folder, path = tar.parent, tar.parent / MERGED
        if folder not in merged:
            merged[folder] = {}
            if path.exists():
                try:
                    merged[folder] = {entry.name: entry for entry in read_index(path, MERGED, mapped=True)[1]}
                except UserError as error:
                    yield tar, None, str(error)
        entry = merged[folder].get(tar.name)
        if merged[folder] and report.described and (entry is None or entry.digest != report.described.digest):
            yield tar, None, f"{MERGED} of the folder is out of date for this shard; index the folder again"


def _repeated_keys(tars: list[Path], reports: list[TarReport]) -> Iterator[Problem]:
    hashes, (number, row) = np.concatenate([r.keys for r in reports]), _places(reports)
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    suspects = np.sort(order[np.append(False, same) | np.append(same, False)]) if len(hashes) else order
    first: dict[tuple[Path, str], Path] = {}
    for n in np.unique(number[suspects]).tolist():
        tar, keys = tars[n], _read_index(tars[n])[0]["key"]
        for i in row[suspects][number[suspects] == n].tolist():
            key = keys[i].as_py()
            if (tar.parent, key) in first:
                yield tar, key, f"the key occurs twice, first in {first[tar.parent, key].name}"
            first.setdefault((tar.parent, key), tar)


def _leaks(tars: list[Path], reports: list[TarReport]) -> Iterator[Problem]:
    """Groups with samples in several splits, each told at the last of them."""
    hashes, splits = (np.concatenate([getattr(r, name) for r in reports]) for name in ("groups", "splits"))
    number, row = _places(reports)
    sound = np.flatnonzero(splits < len(SPLITS))
    pairs, places = np.unique(np.stack([hashes[sound], splits[sound].astype(np.uint64)], 1), axis=0, return_index=True)
    values, counts = np.unique(pairs[:, 0], return_counts=True)
    suspects = np.sort(sound[places[np.isin(pairs[:, 0], values[counts > 1])]])
    groups: dict[tuple[str, str], dict[str, tuple[Path, str]]] = defaultdict(dict)
    for n in np.unique(number[suspects]).tolist():
        table = _read_index(tars[n])[0].select(["key", "members", "offsets", "sizes"])
        with tars[n].open("rb") as file:
            for values in table.take(row[suspects][number[suspects] == n]).to_pylist():
                j = values["members"].index("json")
                data = os.pread(file.fileno(), values["sizes"][j], values["offsets"][j])
                sample = parse_sample(data, values["key"])
                groups[sample.source, sample.group].setdefault(sample.split, (tars[n], values["key"]))
    for (source, group), found in groups.items():
        if len(found) > 1:
            tar, key = list(found.values())[-1]
            yield tar, key, f"{source} patient or study {group!r} is in {' and '.join(sorted(found))}"


def _walk(tar: Path) -> tuple[dict[str, list[tuple[int, int]]], list[str]]:
    """Name -> (offset, size) of every member that the headers lead to, and what is wrong with the archive.

    tarfile and webdataset take a damaged header for the end of the archive; the two zero blocks of a real end tell.
    """
    members: dict[str, list[tuple[int, int]]] = defaultdict(list)
    broken = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isfile() and _index_name(member.name) is not None:
                    members[member.name].append((member.offset_data, member.size))
                    if member.offset_data + member.size > tar.stat().st_size:
                        broken.append(f"truncated inside member {member.name!r}")
            end = archive.offset
        with tar.open("rb") as file:
            file.seek(end)
            rest = file.read(1024)
        if not broken and any(rest):
            broken.append(f"damaged header at byte {end}: readers stop here without a word")
        elif not broken and len(rest) < 512:
            broken.append("truncated: the end-of-archive mark is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        broken.append(f"not a readable tar ({error})")
    return dict(members), broken


def _read_index(tar: Path) -> tuple[pa.Table, Tar]:
    path = index_path(tar)
    if not path.exists():
        raise UserError(f"has no index; run `medvlm shards index {tar}`")
    table, tars = read_index(path, path.name)
    return table, tars[0]


def _compare(
    members: dict[str, list[tuple[int, int]]], table: pa.Table, tar_is_broken: bool
) -> list[tuple[str | None, str]]:
    """(key, reason) for each member that only the tar or only the index has, or that lies elsewhere."""
    found: list[tuple[str | None, str]] = []
    indexed: dict[str, list[tuple[int, int]]] = defaultdict(list)
    keys: dict[str, str] = {}  # member name -> key
    for row in table.select(["key", "members", "offsets", "sizes"]).to_pylist():
        for extension, offset, size in zip(row["members"], row["offsets"], row["sizes"], strict=True):
            name = f"{row['key']}.{extension}"
            indexed[name].append((offset, size))
            keys[name] = row["key"]
    there = {_index_name(name) or name: places for name, places in members.items()}
    lost = [name for name in indexed if name not in there]
    for name, places in indexed.items():
        if name in there and there[name] != places:
            found.append((keys[name], f"member {name!r} lies elsewhere than the index says; index again"))
    extra = there.keys() - indexed.keys()
    if lost:
        where = "readers that walk the tar do not reach" if tar_is_broken else "the tar lacks"
        samples = len({keys[name] for name in lost})
        found.append((None, f"{where} {len(lost)} member(s) of {samples} sample(s) in the index, from {lost[0]!r} on"))
    if extra:
        found.append((None, f"{len(extra)} member(s) are not in the index, such as {min(extra)!r}; index again"))
    return found


def _index_name(member: str) -> str | None:
    """A member's name as the index has it, with the extension in lower case; None for what is no sample's."""
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}{slash}{stem}.{extension.lower()}" if stem and extension else None
