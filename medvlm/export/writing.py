"""What exports of all families share: opening a run, writing weights under a class's names, a fresh process."""

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from medvlm.config.model import Model
from medvlm.config.schema import RunConfig
from medvlm.errors import UserError
from medvlm.models.backbones import tower_path
from medvlm.training import checkpoint
from medvlm.training.checkpoint import frozen
from medvlm.training.checkpoint.files import SafetensorsFile
from medvlm.training.checkpoint.fragments import persistent_buffers
from medvlm.training.checkpoint.pieces import Pieces
from medvlm.training.checkpoint.stock import stock_name

TOLERANCE = 1e-5
SHARD_BYTES = 4 * 2**30


def open_run(run: Path, out: Path, tag: str | None) -> tuple[RunConfig, Path]:
    """Configuration and checkpoint folder of a run. Raises UserError where one is absent, or ``out`` is in use."""
    if not (run / "config.yaml").exists():
        raise UserError(f"{run}: is not a run (it has no config.yaml)")
    try:
        config = RunConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{run}/config.yaml: {where}: {error.errors()[0]['msg']}; is it of another version?") from None
    source = run / "checkpoints" / tag if tag else checkpoint.newest(run)
    if source not in checkpoint.checkpoints(run):
        raise UserError(f"{source}: no such complete checkpoint")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists and is not empty")
    checkpoint.refuse_changed(source)
    return config, source


def pretrained_parts(
    weights: checkpoint.Weights, config: Model, load: Callable[[str, torch.dtype], nn.Module]
) -> nn.Module | None:
    """The parts of a model of which a checkpoint leaves weights to pretrained folders, each as ``load`` gives it in the
    type it is stored in; None if there are none. Raises UserError where they are not what was trained with."""
    names = {stock_name(name) for name in weights.absent}
    if not names:
        return None
    found = nn.Module()
    for part in sorted({name.partition(".")[0] for name in names}):
        found.add_module(part, load(part, stored_dtype(tower_path(getattr(config, part).path))))
    frozen.compare(weights.origin, frozen.digests(found, names), str(weights.path))
    return found


def stored_dtype(path: str) -> torch.dtype:
    """The type of all weights in a folder's files, which are then mapped into memory and take none until they are read;
    float32, which holds every other exactly, where they have several, or are not a local folder's safetensors. What its
    ``config.json`` says may be another."""
    files = [SafetensorsFile(name) for name in Path(path).glob("*.safetensors")]
    kinds = {kind for file in files for name in file if (kind := file.dtype(name)).is_floating_point}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def stored_buffers(module: nn.Module, source: Path, prefix: str = "") -> dict[str, Tensor]:
    """What a checkpoint holds beside its parameters, running statistics of batches, by our names: those of ``module``,
    which may be on the meta device, behind ``prefix``."""
    pieces = Pieces(source)
    names = {prefix + name: value.shape for name, value in persistent_buffers(module).items()}
    return {name: pieces.whole("buffer", name).view(shape) for name, shape in names.items()}


def write_weights(
    folder: Path,
    target: nn.Module,
    sources: Mapping[str, tuple[Mapping[str, Tensor], str]],
    dtype: torch.dtype,
    exact: Collection[str] = (),
) -> None:
    """The weights of a class of transformers, which ``target`` is, built on the meta device: for each of its parameters
    and persistent buffers a mapping and the name in it. Each is asked for once, when it is written, so that a mapping
    that reads from elsewhere needs memory for one at a time. Parameters are stored in ``dtype``, those that ``exact``
    names, and numbers with a point that are none (running means and variances), in fp32 as training has them.

    Raises UserError if the sources are not exactly what the class has.
    """
    buffers = persistent_buffers(target)
    tensors = {**dict(target.named_parameters()), **buffers}
    if wrong := sources.keys() ^ tensors.keys():
        raise UserError(
            f"{folder}: {type(target).__name__}'s weights are not the trained ones: {', '.join(sorted(wrong)[:3])}"
        )
    entries = []
    for file_name, name in file_names(target, tensors).items():
        if name in buffers or name in exact:
            kind = torch.float32 if tensors[name].is_floating_point() else torch.int64
        else:
            kind = dtype
        pieces = partial(checkpoint.in_pieces, *sources[name], kind)
        entries.append(checkpoint.Entry(file_name, kind, tuple(tensors[name].shape), pieces))
    checkpoint.write_sharded(folder, entries, SHARD_BYTES)


def file_names(target: Any, tensors: dict[str, Any]) -> dict[str, str]:
    """Name in transformers' files -> name in its class. They differ, as the files keep the names of older versions."""
    reverted = revert_weight_conversion(target, tensors)
    names = {id(p): name for name, p in tensors.items()}
    if len(reverted) != len(names) or any(id(p) not in names for p in reverted.values()):
        raise UserError(f"{type(target).__name__}: transformers stores its weights in a form that is not written here")
    return {file_name: names[id(p)] for file_name, p in reverted.items()}


def fresh_process(script: str, *arguments: str | Path) -> dict[str, Any]:
    """Run a script of this package, which imports nothing of medvlm; the JSON of its last line.

    Raises UserError, naming the first argument, if it fails.
    """
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        raise UserError(f"{arguments[0]}: the export does not load in a fresh process: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])
