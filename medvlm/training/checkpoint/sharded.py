"""A model's weights as Hugging Face folders hold them, written tensor by tensor."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from medvlm.errors import UserError
from medvlm.training.checkpoint.files import Entry, sync_folder, write_safetensors, write_text
from medvlm.training.checkpoint.pieces import Weights
from medvlm.training.checkpoint.stock import StockWeights

PIECE = 16 * 2**20  # elements


def in_pieces(values: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """A weight in a type, flat; of a checkpoint, a piece at a time, so that not even one whole weight is in memory."""
    if not isinstance(values, Weights | StockWeights):
        yield values[name].to(dtype)
        return
    numel = values.shapes[name].numel()
    for start in range(0, numel, PIECE):
        yield values.part(name, start, min(start + PIECE, numel)).to(dtype)


def new_folder(out: Path) -> Path:
    """An empty folder beside ``out`` that will become it. Raises UserError if ``out`` is in use."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists and is not empty")
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def finish_folder(staging: Path, out: Path) -> None:
    if out.exists():
        out.rmdir()
    sync_folder(staging)
    os.rename(staging, out)
    sync_folder(out.parent)


def write_sharded(folder: Path, entries: Iterable[Entry], limit: int) -> int:
    """Write tensors as `transformers` stores a model; returns their bytes. One piece of them at a time is in memory.

    Files have at most ``limit`` bytes, or one tensor; one file is called model.safetensors, several get an index.
    """
    shards: list[list[Entry]] = []
    for entry in entries:
        if not shards or sum(e.bytes for e in shards[-1]) + entry.bytes > limit:
            shards.append([])
        shards[-1].append(entry)
    total, index = sum(e.bytes for shard in shards for e in shard), dict[str, str]()
    for n, shard in enumerate(shards):
        name = f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_safetensors(folder / name, shard, {"format": "pt"})
        index |= {entry.name: name for entry in shard}
    if len(shards) > 1:
        values = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        write_text(folder / "model.safetensors.index.json", json.dumps(values, indent=2))
    return total
