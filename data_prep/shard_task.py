"""Making one shard: read its items, encode images, scan and mask text, validate, write, publish, mark as finished."""

import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.executors import WorkerDied, available_cores, run_pool
from data_prep.items import Source
from data_prep.masking import apply_mask, drop_masked_turns
from data_prep.output import Output, remove_dead
from data_prep.pixels import PixelOptions, encode_source
from data_prep.planning import Shard, read_items
from medvlm.data.schema import Sample
from medvlm.data.shards import index_path, write_shard
from medvlm.errors import UserError


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs. ``skip``: number of an item -> why it is not tried again."""

    shard: Shard
    out: str
    plan_folder: Path
    temporary: Path
    root: Path
    source: str
    license: str
    mask: str
    pixels: PixelOptions
    plan: str  # digest
    tool: str
    skip: tuple[tuple[int, str], ...] = ()

    @property
    def stem(self) -> str:
        return self.shard.name.replace("/", "-")


class BadItem(Exception):
    """An item that cannot become a sample: ``what`` and why."""

    def __init__(self, what: str, reason: str):
        super().__init__(reason)
        self.what, self.reason = what, reason


def marker_name(shard_name: str) -> str:
    return f"{shard_name}.json"


def make_shard(task: ShardTask) -> dict[str, Any]:
    """Make one shard and return its marker. May run twice at once: the bytes are the same and moves are atomic.

    Only ``UserError`` and errors of writing come out; what is wrong with an item is recorded in the marker.
    """
    folder = task.temporary / f"{task.stem}.{socket.gethostname()}.{os.getpid()}"
    remove_dead(task.temporary, task.stem)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        return _make(task, folder)
    except FileNotFoundError:
        # Another process may have finished this shard and the whole set, and cleaned up, in the meantime.
        if marker := Output(task.out).read_json(marker_name(task.shard.name)):
            return marker
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make(task: ShardTask, folder: Path) -> dict[str, Any]:
    output, name = Output(task.out), task.shard.name
    counts: Counter[str] = Counter()
    masked: Counter[str] = Counter()
    quarantined: list[dict[str, Any]] = []
    samples = _samples(task, folder / "at", counts, masked, quarantined)
    first = next(samples, None)
    files: dict[str, Any] = {}
    if first is None:  # every item is quarantined; an earlier attempt may have left a shard here
        for old in (name, str(index_path(name))):
            output.remove(old)
    else:
        tar = folder / Path(name).name  # the index tells its name
        write_shard(chain([first], samples), tar)
        files = {"bytes": tar.stat().st_size, "sha256": sha256(tar)}
        files["index_bytes"] = index_path(tar).stat().st_size
        output.publish(tar, name)
        output.publish(index_path(tar), str(index_path(name)))
    marker = {
        **{key: counts[key] for key in ("samples", "images", "texts", "turns_dropped")},
        **files,
        "masked": dict(sorted(masked.items())),
        "quarantined": quarantined,
        "plan": task.plan,
        "tool": task.tool,
    }
    output.write(marker_name(name), json.dumps(marker, ensure_ascii=False).encode())
    return marker


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _samples(
    task: ShardTask, crumb: Path, counts: Counter[str], masked: Counter[str], quarantined: list[dict[str, Any]]
) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    skip = dict(task.skip)
    # The number of the item in work, so that the parent can tell which one killed this process.
    at = os.open(crumb, os.O_WRONLY | os.O_CREAT)
    try:
        for number, item in enumerate(read_items(task.plan_folder / task.shard.items)):
            os.pwrite(at, number.to_bytes(8, "little"), 0)
            try:
                if number in skip:
                    raise BadItem(_what(item), skip[number])
                sample, members, found, dropped = build_sample(item, task)
            except BadItem as bad:
                row = {"number": number, "key": item["fields"]["key"], "what": bad.what, "reason": bad.reason}
                quarantined.append(row)
                continue
            masked.update(found)
            counts["turns_dropped"] += dropped
            counts["samples"] += 1
            counts["images"] += len(sample.images)
            counts["texts"] += sum(m.role == "assistant" for m in sample.messages) or sample.has_report
            yield sample, members
    finally:
        os.close(at)


def _what(item: dict[str, Any]) -> str:
    return item["images"][0]["path"] if item["images"] else item["fields"]["key"]


def build_sample(item: dict[str, Any], task: ShardTask) -> tuple[Sample, dict[str, bytes], Counter[str], int]:
    """The sample, its members, what was found in its text by kind, and the turns that were dropped. Raises BadItem."""
    fields = item["fields"]
    fields, found = apply_mask(fields, task.mask)
    try:
        fields, dropped = drop_masked_turns(fields)
    except ValueError as error:
        raise BadItem(fields["key"], str(error)) from None
    images, members = [], {}
    for number, source in enumerate(item["images"]):
        try:
            image, data = encode_source(Source(**source), task.root, number, task.pixels)
        except MemoryError:
            raise
        except UserError as error:
            raise BadItem(source["path"], str(error)) from None
        except Exception as error:  # a decoder met a file it was not written for: the reason is kept, the run goes on
            raise BadItem(source["path"], f"the decoder failed ({type(error).__name__}): {error}") from error
        images.append(image)
        members[image.file] = data
    try:
        sample = Sample.model_validate({"source": task.source, "license": task.license, **fields, "images": images})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise BadItem(fields["key"], f"{where}: {reason}" if where else reason) from None
    return sample, members, found, dropped


def crashed_at(task: ShardTask) -> int | None:
    """The number of the item in work when a process of this machine died over a shard, None where none did."""
    for folder in task.temporary.glob(f"{task.stem}.{socket.gethostname()}.*"):
        with suppress(FileNotFoundError):
            return int.from_bytes((folder / "at").read_bytes(), "little")
    return None


def make_shards(tasks: list[ShardTask], workers: int | None) -> Iterator[tuple[ShardTask, dict[str, Any]]]:
    """Each task with its marker, as they finish; ``workers`` 0 is this process, None a process per core.

    After the death of a worker, the shards that were in work are made one at a time: an item that kills its process
    alone is quarantined and the run goes on. If none does, memory was short: raises UserError.
    """
    count = min(workers or available_cores(), max(1, len(tasks)))
    if workers == 0:
        yield from ((task, make_shard(task)) for task in tasks)
        return
    while tasks:
        finished: set[str] = set()
        try:
            for task, marker in run_pool(make_shard, tasks, count):
                finished.add(task.shard.name)
                yield task, marker
            return
        except WorkerDied as death:
            in_work = [task for task in death.tasks if crashed_at(task) is not None]
            culprits = 0
            for task in in_work:
                tried, marker = _alone(task)
                finished.add(task.shard.name)
                culprits += len(tried.skip)
                yield tried, marker
            if not culprits:
                raise UserError(
                    f"{death.tasks[0].out}: a worker process was killed while {count} made shards "
                    f"({', '.join(task.shard.name for task in in_work)}), most likely because the machine ran out of "
                    "memory; start again with fewer --workers (finished shards are kept)"
                ) from None
        tasks = [task for task in tasks if task.shard.name not in finished]


def _alone(task: ShardTask) -> tuple[ShardTask, dict[str, Any]]:
    for _ in range(4):
        try:
            [result] = run_pool(make_shard, [task], 1)
            return result
        except WorkerDied:
            if (number := crashed_at(task)) is None:
                break
            reason = "reading it killed the process (its decoder crashed, or memory ran out)"
            task = replace(task, skip=(*task.skip, (number, reason)))
    raise UserError(
        f"{task.out}: processes that make {task.shard.name} are killed again and again, most likely because "
        "the machine has too little memory; start again with more memory (finished shards are kept)"
    )
