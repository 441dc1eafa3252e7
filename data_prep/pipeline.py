"""An archive into shards: plan, one task per shard on all cores or a cluster, merge.

    out/<split>/NAME-000000.tar, .arrow (its index) and .tar.json (its marker, written last)
    out/<split>/index.arrow, out/quarantine.jsonl, out/dataset.json     written when every shard exists
    out/.plan.json, out/.work/                 while it is being made

Every shard is a pure function of its items, so parts, workers and restarts do not change a byte.
"""

import hashlib
import importlib.metadata
import inspect
import json
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.executors import run_array, slurm_parameters
from data_prep.items import Converter
from data_prep.merging import merge_indexes, quarantine_lines, short_reason, summary
from data_prep.output import TEMPORARY, Output
from data_prep.pixels import PixelOptions
from data_prep.planning import SPLITS, Plan, Shard, check_fingerprint, make_plan, read_plan, tables_digest
from data_prep.shard_task import ShardTask, make_shards, marker_name, sha256
from medvlm.data.shards import MERGED, index_path
from medvlm.errors import UserError

DATASET, QUARANTINE, STATE = "dataset.json", "quarantine.jsonl", ".plan.json"
JUDGED_FROM = 100  # samples that must have been seen before their bad share may stop a run


@dataclass(frozen=True)
class PipelineOptions:
    """How a data set is made. Only ``samples_per_shard``, ``pixels`` and ``mask`` change what is in it.

    ``workers``: processes, None one per core, 0 none besides this one. ``part``: "i/n" with 0 <= i < n takes the shards
    i, i + n, ... ``max_bad``: the share of quarantined samples that stops the run. ``work``: folder for the plan; where
    ``out`` is remote, parts share it if all see it. ``check``: compare the checksums of finished shards, not only their
    sizes. ``retry_quarantined``: make shards with quarantined samples again. ``cluster``: submitit's slurm, or local to
    try the same without Slurm.
    """

    samples_per_shard: int = 1000
    pixels: PixelOptions = field(default_factory=PixelOptions)
    workers: int | None = None
    part: str | None = None
    executor: Literal["local", "submitit"] = "local"
    parts: int = 1
    slurm: str | None = None
    cluster: Literal["slurm", "local"] = "slurm"
    max_bad: float = 0.01
    mask: Literal["off", "report", "mask"] | None = None
    allow_leak: bool = False
    work: Path | None = None
    check: bool = False
    retry_quarantined: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        parse_part(self.part)
        for name in ("samples_per_shard", "parts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1")
        if self.workers is not None and self.workers < 0:
            raise UserError("workers: must be at least 0")
        if not 0 <= self.max_bad <= 1:
            raise UserError("max_bad: is a share, from 0 to 1")
        if self.executor == "submitit" and self.part is not None:
            raise UserError("part: the submitit executor makes all parts; give --parts N instead")


def parse_part(part: str | None) -> tuple[int, int]:
    """ "i/n" -> (i, n); None is "0/1". Parts count from 0, like SLURM_ARRAY_TASK_ID. Raises UserError."""
    first, _, second = (part or "0/1").partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise UserError(f"part: {part!r} is not i/n with 0 <= i < n; four parts are 0/4, 1/4, 2/4 and 3/4")
    return int(first), int(second)


def run(
    converter: Converter, source: Path, out: str | Path, options: PipelineOptions, **converter_options: Any
) -> dict:
    """Make the shards of this part that do not exist yet, and merge when all exist. Returns the report.

    The report is ``dataset.json`` with ``complete`` true, or the state so far with ``complete`` false. Raises UserError
    for bad input, for a folder that was begun with other options, and when ``max_bad`` is exceeded; whatever was
    finished is kept, and the same command goes on from there.
    """
    job = _Job(converter, Path(source), str(out), options, converter_options)
    try:
        return job.run()
    except OSError as error:
        # A part that was started twice: the other one finished the set and removed the plan in the meantime.
        if isinstance(error, FileNotFoundError) and (report := job.finished()):
            return report
        raise UserError(f"{out}: {error}; finished shards are kept, start again when this is mended") from error


class _Job:
    def __init__(
        self, converter: Converter, source: Path, out: str, options: PipelineOptions, converter_options: dict[str, Any]
    ):
        if not source.exists():
            raise UserError(f"{source}: no such file or folder")
        self.converter, self.source, self.options = converter, source.resolve(), options
        self.converter_options = converter_options
        self.output = Output(out)
        if self.output.local:
            out = self.output.root
        self.out = out
        self.mask = options.mask or converter.mask
        bound = inspect.signature(converter.items).bind(self.source, **converter_options)
        bound.apply_defaults()
        others = [v.resolve() for v in list(bound.arguments.values())[1:] if isinstance(v, Path) and v.exists()]
        tables = tables_digest(self.source, others, converter.deep_tables, out if self.output.local else "")
        fingerprint = {
            "converter": converter.name,
            "prefix": converter.name.replace("-", "_"),
            "license": converter.license,
            "source": str(self.source),
            "tables": tables,
            "options": dict(list(bound.arguments.items())[1:]),
            "samples_per_shard": options.samples_per_shard,
            "pixels": asdict(options.pixels),
            "mask": self.mask,
            "tool": f"medvlm {importlib.metadata.version('medvlm')}",
        }
        self.fingerprint = json.loads(json.dumps(fingerprint, default=str))
        name = f"{self.fingerprint['prefix']}-{hashlib.sha256(out.encode()).hexdigest()[:12]}"
        home = Path.home() / ".cache" / "medvlm" / "prepare" / name
        self.work = options.work / name if options.work else Path(out) / ".work" if self.output.local else home
        self.temporary = Path(out, TEMPORARY) if self.output.local else Path(tempfile.gettempdir(), f"medvlm-{name}")

    def run(self) -> dict[str, Any]:
        if report := self.finished():
            return report
        plan = self.plan()
        if self.options.executor == "submitit":
            self.run_parts()
        else:
            self.run_shards(plan)
        return self.merge(plan)

    def finished(self) -> dict[str, Any] | None:
        """The report of a finished data set whose shards are all in place, else None."""
        report = self.output.read_json(DATASET)
        if report is None:
            return None
        check_fingerprint(self.out, report["made_with"], self.fingerprint)
        self._refuse_leak(report["groups_in_two_splits"])
        sizes = self.output.sizes(SPLITS)
        for name, shard in report["shards"].items():
            if marker_name(name) not in sizes or not self._whole(name, shard, sizes):
                return None
            if shard["quarantined"] and self.options.retry_quarantined:
                return None
        self._merge_indexes(report["shards"], sizes)
        self._clean_up()
        return {**report, "complete": True}

    def plan(self) -> Plan:
        """The plan, made now if this is the first part to need it. Raises UserError where ``out`` is another's."""
        merged = self.output.read_json(DATASET)
        begun = self.output.read_json(STATE) or merged
        if begun is not None:
            check_fingerprint(self.out, begun["made_with"], self.fingerprint)
        elif foreign := [name for name in self.output.sizes(["", *SPLITS]) if name.endswith(".tar")]:
            raise UserError(f"{self.out}: already holds shards such as {foreign[0]}; give a new folder")
        self.output.probe()
        folder = self.work / "plan"
        plan = read_plan(folder)
        if plan is not None and plan.fingerprint != self.fingerprint and begun is None and not self.output.local:
            shutil.rmtree(folder)  # of another run that went to the same address, where nothing is left of it
            plan = None
        if plan is not None:
            check_fingerprint(self.out, plan.fingerprint, self.fingerprint)
        else:
            items = self.converter.items(self.source, **self.converter_options)
            plan = make_plan(folder, items, self.fingerprint, self.options.allow_leak)
        self._refuse_leak(plan.shared_groups)
        if begun is not None and begun["plan"] != plan.digest:
            raise UserError(f"{self.out}: the archive has changed since this was begun; give a new folder")
        if begun is None or merged is not None:  # a merged set is opened again where shards are to be made anew
            self.output.write(STATE, _json({"made_with": self.fingerprint, "plan": plan.digest}))
            self.output.remove(DATASET)
        return plan

    def _refuse_leak(self, groups: int) -> None:
        if groups and not self.options.allow_leak:
            raise UserError(f"{self.out}: {groups} patients are in two splits; say --allow-leak again to go on with it")

    def _whole(self, name: str, marker: dict[str, Any], sizes: dict[str, int]) -> bool:
        """Whether the shard that a marker describes lies there, by size, or by checksum where asked."""
        if not marker["samples"]:
            return True
        index = str(index_path(name))
        if sizes.get(name) != marker["bytes"] or sizes.get(index) != marker["index_bytes"]:
            return False
        if not self.options.check:
            return True
        with tempfile.TemporaryDirectory() as folder:
            return sha256(self.output.download(name, Path(folder) / "shard.tar")) == marker["sha256"]

    def markers(self, plan: Plan) -> dict[str, dict[str, Any]]:
        """Shard name -> marker of the shards that any part has finished."""
        sizes = self.output.sizes(SPLITS)
        names = [s.name for s in plan.shards if marker_name(s.name) in sizes]
        found = self.output.read_many([marker_name(name) for name in names])
        markers = {name: found[marker_name(name)] for name in names if marker_name(name) in found}
        for name, marker in markers.items():
            if marker["plan"] != plan.digest:
                raise UserError(f"{self.out}/{name}: belongs to another data set; give a new folder")
        return markers

    def run_shards(self, plan: Plan) -> None:
        """Make what is missing of this part's shards."""
        part, parts = parse_part(self.options.part)
        mine = plan.shards[part::parts]
        seen = self.markers(plan)
        sizes = self.output.sizes(SPLITS)
        done = {s.name for s in mine if s.name in seen and self._whole(s.name, seen[s.name], sizes)}
        if self.options.retry_quarantined:
            done -= {name for name in done if seen[name]["quarantined"]}
        for shard in mine:
            if shard.name not in done and shard.name in seen:
                del seen[shard.name]
                self.output.remove(marker_name(shard.name))
        self._judge(seen)
        todo = [self._task(shard, plan) for shard in mine if shard.name not in done]
        total = sum(shard.samples for shard in mine)
        with self._progress(f"{self.converter.name} {part}/{parts}", total, total - _samples(todo)) as bar:
            for task, marker in make_shards(todo, self.options.workers):
                seen[task.shard.name] = marker
                bar.advance(bar.task_ids[0], task.shard.samples)
                self._judge(seen)

    def _task(self, shard: Shard, plan: Plan) -> ShardTask:
        return ShardTask(
            shard=shard,
            out=self.out,
            plan_folder=self.work / "plan",
            temporary=self.temporary,
            root=self.source if self.source.is_dir() else self.source.parent,
            source=self.fingerprint["prefix"],
            license=self.converter.license,
            mask=self.mask,
            pixels=self.options.pixels,
            plan=plan.digest,
            tool=self.fingerprint["tool"],
        )

    def run_parts(self) -> None:
        """All parts as one job array."""
        parts = self.options.parts
        logs = Path(f"{self.work}.slurm") if not self.output.local else Path(self.out) / ".slurm"
        function = _Part(self.converter, self.source, self.out, self.options, self.converter_options)
        parameters = slurm_parameters(self.options.slurm)
        with self._progress(f"{self.converter.name}, parts", parts, 0) as bar:

            def tick(done: int) -> None:
                bar.update(bar.task_ids[0], completed=done)

            run_array(function, parts, self.options.cluster, parameters, logs, tick)

    def merge(self, plan: Plan) -> dict[str, Any]:
        """The report; when every shard exists, also write it and clean up. Harmless to do twice."""
        markers = self.markers(plan)
        self._judge(markers)
        report = {
            "name": self.fingerprint["prefix"],
            "license": self.converter.license,
            "complete": len(markers) == len(plan.shards),
            **summary(plan, self.work / "plan", markers),
            "shards": {name: _shard_entry(marker) for name, marker in markers.items()},
            "plan": plan.digest,
            "made_with": self.fingerprint,
        }
        if not report["complete"]:
            return {**report, "shards_planned": len(plan.shards)}
        if not any(marker["samples"] for marker in markers.values()):
            first = next(row for marker in markers.values() for row in marker["quarantined"])
            told = f"{_reasons(markers)}; the first is {first['what']}: {first['reason']}"
            raise UserError(f"{self.out}: every sample was quarantined: {told}")
        self._merge_indexes(report["shards"], {})
        self.output.write(QUARANTINE, b"".join(quarantine_lines(plan, self.work / "plan", markers)))
        self.output.write(DATASET, _json({k: v for k, v in report.items() if k != "complete"}))
        self._clean_up()
        return report

    def _merge_indexes(self, shards: dict[str, dict[str, Any]], sizes: dict[str, int]) -> None:
        """An index of each split that is not among the files ``sizes``."""
        names = [name for name, shard in shards.items() if shard["samples"]]
        missing = [name for name in names if f"{name.partition('/')[0]}/{MERGED}" not in sizes]
        merge_indexes(self.output, missing, self.temporary)

    def _clean_up(self) -> None:
        """Remove the plan (it holds texts that were not masked) and what killed processes left."""
        self.output.remove(STATE)
        folders = [self.work, self.temporary, *([Path(self.out, ".work")] if self.output.local else [])]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _judge(self, markers: dict[str, dict[str, Any]]) -> None:
        """Raise UserError where too many of the samples seen so far, by all parts, are quarantined."""
        bad = sum(len(marker["quarantined"]) for marker in markers.values())
        seen = bad + sum(marker["samples"] for marker in markers.values())
        if seen >= JUDGED_FROM and bad > self.options.max_bad * seen:
            raise UserError(
                f"{self.out}: {bad} of the {seen} samples seen so far are bad, more than --max-bad "
                f"{self.options.max_bad:g} ({_reasons(markers)}); *.tar.json list them, finished shards are kept"
            )

    def _progress(self, title: str, total: int, done: int) -> Progress:
        bar = Progress(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(
                TextColumn("elapsed"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=True),
            ),
            console=Console(file=sys.stderr),
            disable=not self.options.progress,
        )
        bar.add_task(title, total=total, completed=done)
        return bar


class _Part:
    """One part of a job array, called with its number; submitit submits it again after preemption or time-out."""

    def __init__(self, *arguments: Any):
        self.converter, self.source, self.out, self.options, self.converter_options = arguments

    def __call__(self, part: int) -> str | None:
        """The sentence of a UserError, None when it went well."""
        # Never in this process: submitit's signal handler may raise at any moment, which is no fault of an image.
        workers = self.options.workers or (None if self.options.workers is None else 1)
        name = f"{part}/{self.options.parts}"
        options = replace(self.options, executor="local", part=name, parts=1, workers=workers, progress=False)
        try:
            run(self.converter, self.source, self.out, options, **self.converter_options)
        except UserError as error:
            return str(error)
        return None

    def checkpoint(self, part: int) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, part)


def _samples(tasks: list[ShardTask]) -> int:
    return sum(task.shard.samples for task in tasks)


def _shard_entry(marker: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {k: marker[k] for k in ("samples", "bytes", "sha256", "index_bytes") if k in marker}
    return {**entry, "quarantined": len(marker["quarantined"])}


def _reasons(markers: dict[str, dict[str, Any]]) -> str:
    counts = Counter(short_reason(row["reason"]) for marker in markers.values() for row in marker["quarantined"])
    return "; ".join(f"{n} x {reason}" for reason, n in counts.most_common(3))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
