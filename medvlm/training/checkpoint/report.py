"""What ``medvlm checkpoint`` does."""

import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from medvlm.errors import UserError
from medvlm.training.checkpoint.files import Entry
from medvlm.training.checkpoint.folder import (
    all_files,
    changed,
    missing,
    newest,
    prune,
    read_manifest,
    refuse_changed,
    refuse_damaged,
    remove_after,
    step_folders,
    step_of,
)
from medvlm.training.checkpoint.pieces import VALUE, Pieces, Weights
from medvlm.training.checkpoint.sharded import finish_folder, in_pieces, new_folder, write_sharded
from medvlm.training.run_lock import lock_alone

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def find(path: Path) -> Path:
    """A checkpoint's folder, or the newest of a run. Raises UserError where there is none, or it is not complete."""
    if path.name.startswith("step-") and path.parent.name == "checkpoints":
        if not path.is_dir():
            raise UserError(f"{path}: no such checkpoint")
        refuse_damaged(path, missing(path))
        return path
    return newest(path)


def inspect(path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    folder = find(path)
    record = read_manifest(folder)
    parts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, values in record["parameters"].items():
        part = parts[name.partition(".")[0]]
        part["parameters"] += math.prod(values["shape"])
        part[values["stored"]] += math.prod(values["shape"])
    pieces, states = Pieces(folder), dict[str, str]()
    for name, values in record["parameters"].items():
        if values["stored"] == "trained":
            states |= {kind: str(dtype).removeprefix("torch.") for kind, dtype in pieces.kinds(name).items()}
    sizes = [values["size"] for values in record["files"].values()]
    keys = ("step", "world_size", "zero_stage", "bf16", "optimizer", "order", "model", "frozen")
    return {
        "path": str(folder),
        **{key: record[key] for key in keys},
        "bytes": sum(sizes),
        "parts": parts,
        "stored": states,
        "config": record["config"],
    }


def print_inspect(found: dict[str, Any]) -> None:
    table = Table("part", "parameters", "trained", "stored once", "from its path", title=found["path"])
    for name, part in found["parts"].items():
        counts = (part.get(key, 0) for key in ("parameters", "trained", "frozen", "origin"))
        table.add_row(name, *(f"{count:,}" for count in counts))
    console = Console()
    console.print(table)
    kinds = ", ".join(f"{'values' if kind == VALUE else kind} ({dtype})" for kind, dtype in found["stored"].items())
    console.print(
        f"step {found['step']}, {found['world_size']} rank(s), ZeRO-{found['zero_stage']}, {found['optimizer']}, "
        f"{found['bytes']:,} bytes\nof each trained parameter: {kinds}\nplan {found['order']}, model {found['model']}, "
        f"frozen weights {found['frozen']['folder'] or 'not stored'}",
        soft_wrap=True,
        highlight=False,
    )


def verify(path: Path) -> list[dict[str, Any]]:
    """Each checkpoint of a run, or the one given, with what is wrong with it (empty: nothing)."""
    one = path.parent.name == "checkpoints"
    folders = [path] if one else step_folders(path)
    if not folders or (one and not path.is_dir()):
        raise UserError(f"{path}: holds no checkpoint")
    rows = []
    for folder in folders:
        problem = missing(folder) or changed(all_files(folder))
        size = sum(file.stat().st_size for file in folder.iterdir())
        rows.append({"path": str(folder), "bytes": size, "problem": problem})
    return rows


def consolidate_to(path: Path, out: Path, dtype: str, shard_gib: float) -> dict[str, Any]:
    """Write a checkpoint's stored weights into a new folder; those that a `path` of the recipe gives are not in it."""
    if dtype not in TYPES:
        raise UserError(f"--dtype: {dtype!r} is not one of {', '.join(TYPES)}")
    folder = find(path)
    refuse_changed(folder)
    weights = Weights(folder)
    entries = [
        Entry(name, TYPES[dtype], tuple(weights.shapes[name]), partial(in_pieces, weights, name, TYPES[dtype]))
        for name in weights
    ]
    staging = new_folder(out)
    size = write_sharded(staging, entries, int(shard_gib * 2**30))
    finish_folder(staging, out)
    return {"path": str(out), "checkpoint": str(folder), "bytes": size, "left_to_pretrained": len(weights.absent)}


def prune_run(run: Path, keep: int | None, every: int | None, after: str | None) -> dict[str, Any]:
    """Raises UserError while the run is training."""
    if (keep is None) == (after is None):
        raise UserError("give one of --keep and --after")
    if not step_folders(run):
        raise UserError(f"{run}: holds no checkpoints")
    lock_alone(run)
    if after is not None:
        if not after.removeprefix("step-").isdigit():
            raise UserError(f"--after: {after!r} is not the name of a checkpoint, such as step-00000100")
        gone = remove_after(run, step_of(Path(after)))
    else:
        assert keep is not None
        gone = prune(run, keep, every)
    return {"removed": [path.name for path in gone], "kept": [path.name for path in step_folders(run)]}
