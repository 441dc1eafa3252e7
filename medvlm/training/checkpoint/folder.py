"""The folders of a run's checkpoints: which are there, which are whole, which may go.

    checkpoints/step-00000100/   medvlm.json, rank-00000-of-00002.safetensors, ...
    checkpoints/frozen-3f9c.../  the same, of weights that never change; steps refer to it
    checkpoints/*.partial        being written, or being removed; never read

A folder gets its final name by a rename after everything in it is on the disk.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from medvlm.errors import UserError
from medvlm.training.checkpoint.files import checksum, sync_folder, write_text

MANIFEST = "medvlm.json"
FORMAT = 1


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def rank_file(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def step_folders(run: Path) -> list[Path]:
    """All that bear a final name, oldest first; one that was damaged later is among them."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".partial")


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first: none of their files is missing or of another size."""
    return [path for path in step_folders(run) if not missing(path)]


def newest(run: Path) -> Path:
    """The newest checkpoint. Raises UserError where there is none, or where it has been damaged."""
    found = step_folders(run)
    if not found:
        raise UserError(f"{run}: holds no complete checkpoint (looked for {run}/checkpoints/step-*/{MANIFEST})")
    refuse_damaged(found[-1], missing(found[-1]))
    return found[-1]


def to_resume(run: Path, wish: str) -> Path | None:
    """The checkpoint that a run goes on from; ``wish`` is its ``run.resume``. Raises UserError where it cannot."""
    found = step_folders(run)
    if wish == "never" and found:
        raise UserError(f"{run}: holds checkpoints, and run.resume is never; choose another run.name")
    return newest(run) if found or wish == "require" else None


def refuse_damaged(path: Path, damage: str) -> None:
    """Raise UserError for a checkpoint that was complete once, naming the next older one that is."""
    if not damage:
        return
    run = path.parent.parent
    older = [p for p in checkpoints(run) if p.name < path.name]
    if not older:
        mend = "no complete checkpoint is left before it; restore it from a copy, or choose another run.name"
    else:
        mend = f"to go on from {older[-1].name}: medvlm checkpoint prune {run} --after {older[-1].name}"
    raise UserError(f"{path}: {damage}; it was changed after it had been written; {mend}")


def refuse_changed(path: Path) -> None:
    """Raise UserError unless every byte of a checkpoint is as it was written."""
    refuse_damaged(path, missing(path) or changed(all_files(path)))


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises UserError if it is no checkpoint of this format, or its manifest is not as it was written."""
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: is not a complete checkpoint (it has no {MANIFEST})") from None
    except OSError as error:
        raise UserError(f"{path}: its {MANIFEST} cannot be read ({error.strerror})") from None
    record, damage = parse_manifest(text, path)
    if damage:
        raise UserError(f"{path}: {damage}")
    if record.get("format") != FORMAT:
        raise UserError(
            f"{path}: was written in checkpoint format {record.get('format', 0)}, and this version of medvlm reads "
            f"{FORMAT}; export it with the version that wrote it"
        )
    return record


def parse_manifest(text: bytes, path: Path) -> tuple[dict[str, Any], str]:
    """Of the checkpoint in ``path``; and what is wrong with it, empty if nothing is. The last entry is the checksum of
    all before it, which early versions lack."""
    try:
        record = json.loads(text)
    except ValueError as error:  # of JSON, or of UTF-8
        return {}, f"its {MANIFEST} is damaged ({error})"
    if not isinstance(record, dict) or (record.get("format") == FORMAT and not isinstance(record.get("files"), dict)):
        return {}, f"its {MANIFEST} is damaged (it lists no files)"
    own = record.pop("crc32", None)
    if own is not None and own != crc_of(record):
        return {}, f"its {MANIFEST} is damaged (its checksum is {crc_of(record)} instead of {own})"
    if "step" in record and step_name(record["step"]) != path.name.removesuffix(".partial"):
        return {}, f"its {MANIFEST} is that of step {record['step']}"
    return record, ""


def crc_of(record: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record).encode()):08x}"


def frozen_folder(path: Path, record: dict[str, Any]) -> Path | None:
    name = record.get("frozen", {}).get("folder")
    return path.parent / name if name else None


def missing(path: Path) -> str:
    """What is absent or of another size in a checkpoint and the frozen weights it refers to; empty if nothing is."""
    if not (path / MANIFEST).exists():
        return f"its {MANIFEST} is missing"
    try:
        record, damage = parse_manifest((path / MANIFEST).read_bytes(), path)
    except OSError as error:
        return f"its {MANIFEST} cannot be read ({error.strerror})"
    if damage:
        return damage
    if record.get("format") != FORMAT:
        return ""  # `read_manifest` says so
    for name, values in record["files"].items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size != values["size"]:
            return f"{name} has {size} bytes instead of {values['size']}"
    frozen = frozen_folder(path, record)
    if frozen and (problem := missing(frozen)):
        return f"of its frozen weights in {frozen}, {problem}"
    return ""


def all_files(path: Path) -> list[tuple[Path, str]]:
    """Files of a checkpoint and of its frozen weights, with the checksums they should have."""
    record = read_manifest(path)
    listed = [(path / name, values["crc32"]) for name, values in record["files"].items()]
    frozen = frozen_folder(path, record)
    return listed + (all_files(frozen) if frozen else [])


def changed(files: Iterable[tuple[Path, str]]) -> str:
    """The first file whose bytes are not those that were written, as a sentence; empty if there is none."""
    for file, expected in files:
        try:
            found = checksum(file)
        except OSError as error:
            return f"{file.name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{file.name} has checksum {found} instead of {expected}"
    return ""


def fingerprint(model: torch.nn.Module) -> str:
    """Of all parameter names and shapes: what makes two models the same to a checkpoint."""
    shapes = [f"{name}:{full_shape(p)}" for name, p in model.named_parameters()]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]


def full_shape(p: torch.nn.Parameter) -> tuple[int, ...]:
    """Of a parameter that ZeRO-3 may have divided."""
    return tuple(getattr(p, "ds_shape", p.shape))


def complete(partial: Path, record: dict[str, Any]) -> Path:
    """Write the manifest and give a folder its final name. Raises OSError."""
    final = partial.with_suffix("")
    write_text(partial / MANIFEST, json.dumps({**record, "crc32": crc_of(record)}, indent=1))
    sync_folder(partial)
    os.rename(partial, final)
    sync_folder(final.parent)
    return final


def remove(path: Path) -> None:
    """A checkpoint loses its name before its files, so that one that is half removed is never read."""
    gone = path if path.suffix == ".partial" else path.with_name(path.name + ".partial")
    if gone != path:
        os.rename(path, gone)
    shutil.rmtree(gone)


def clean(run: Path, before: int | None = None) -> None:
    """Remove what a killed run left unfinished, or could not remove. For one process, while nothing writes in the run,
    or no other than checkpoints of the step ``before`` and later."""
    for path in (run / "checkpoints").glob("*.partial"):
        step = re.fullmatch(r"step-(\d+)", path.stem)
        if before is not None and not (step and int(step[1]) < before):
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:  # nothing reads it; the next checkpoint tries again
            print(f"warning: what is left of an old checkpoint could not be removed: {error}", flush=True)


def prune(run: Path, keep: int, every: int | None = None) -> list[Path]:
    """Remove complete checkpoints but the last ``keep`` (at least 1) and those at multiples of ``every`` steps."""
    gone = [path for path in checkpoints(run)[: -max(1, keep)] if not every or step_of(path) % every]
    for path in gone:
        remove(path)
    return gone


def remove_after(run: Path, step: int) -> list[Path]:
    """Remove the checkpoints after a complete one, damaged or not. Raises UserError if there is none of that step."""
    if run / "checkpoints" / step_name(step) not in checkpoints(run):
        raise UserError(f"{run}: has no complete checkpoint {step_name(step)}")
    gone = [path for path in step_folders(run) if step_of(path) > step]
    for path in gone:
        remove(path)
    return gone


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
