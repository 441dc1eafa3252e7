"""From a checkpoint into an engine (all state, on any number of ranks and any stage) or a model (weights)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvlm.errors import UserError
from medvlm.training import distributed
from medvlm.training.checkpoint import fragments, frozen
from medvlm.training.checkpoint.files import DTYPES
from medvlm.training.checkpoint.folder import (
    all_files,
    changed,
    frozen_folder,
    full_shape,
    missing,
    read_manifest,
    refuse_damaged,
)
from medvlm.training.checkpoint.pieces import VALUE, Pieces, Weights
from medvlm.training.checkpoint.stock import StockWeights

ADAM = {"AdamW", "DeepSpeedCPUAdam"}  # the same state, so that offloading may be turned on and off


def resume(engine: Any, path: Path, manifest: dict[str, Any]) -> int:
    """Load a checkpoint into the engine; returns its step. All ranks call this. What the checkpoint says of frozen
    weights goes into ``manifest``, as the next one will say the same.

    Raises UserError for a damaged checkpoint and one of another model, order, optimizer, or other trainable parameters.
    """
    record = read_manifest(path)
    for key, hint in {
        "model": "it belongs to another model",
        "order": "the training data, their mixture or packing, the seed or the global batch differ, so its position "
        "means nothing here",
    }.items():
        if record[key] != manifest[key]:
            raise UserError(f"{path}: cannot resume, {hint}; start a new run.name")
    _check_trainable(manifest, path, record)
    _check_optimizer(manifest["optimizer"], path, record)
    _check_bytes(path)
    origin = [name for name, values in record["parameters"].items() if values["stored"] == "origin"]
    frozen.compare(record["frozen"]["origin"], frozen.digests(engine.module, origin), str(path))
    manifest |= {key: record[key] for key in ("parameters", "frozen")}

    rank = distributed.rank()
    pieces = Pieces(path, rank if record["world_size"] == distributed.world_size() else 0)
    with torch.no_grad():
        fragments.before_writing_weights(engine)
        for n, flat in enumerate(fragments.flats(engine, writing=False)):
            _fill(n, flat, pieces, engine)
        _load_frozen(engine.module, path, record)
        for name, buffer in fragments.persistent_buffers(engine.module).items():
            buffer.copy_(pieces.whole("buffer", name).view(buffer.shape))
        fragments.after_writing_weights(engine)
    return record["step"]


def _check_trainable(manifest: dict[str, Any], path: Path, record: dict[str, Any]) -> None:
    then, now = (
        {name for name, values in found["parameters"].items() if values["stored"] == "trained"}
        for found in (record, manifest)
    )
    if then != now:
        some = ", ".join(sorted(then ^ now)[:3])
        raise UserError(
            f"{path}: cannot resume, {len(then ^ now)} parameters trained then and not now, or the reverse ({some}); "
            "see `train` of the model's parts, or start a new run with model.init_from"
        )


def _check_optimizer(name: str, path: Path, record: dict[str, Any]) -> None:
    if name != record["optimizer"] and not {name, record["optimizer"]} <= ADAM:
        raise UserError(f"{path}: cannot resume, it holds the state of {record['optimizer']}, and this run has {name}")


def _check_bytes(path: Path) -> None:
    """Every byte of a checkpoint, shared out among the ranks."""
    problem = missing(path) if distributed.rank() == 0 else ""
    refuse_damaged(path, distributed.gather(problem)[0])
    mine = all_files(path)[distributed.rank() :: distributed.world_size()]
    refuse_damaged(path, next(filter(None, distributed.gather(changed(mine))), ""))


def _fill(n: int, flat: fragments.Flat, pieces: Pieces, engine: Any) -> None:
    """Give a flat tensor its values and its optimizer state."""
    if not flat.fragments:
        return
    names = [f.name for f in flat.fragments]
    kinds, scalars = pieces.kinds(names[0]), pieces.scalars_of(names[0])
    if any(pieces.kinds(name).keys() != kinds.keys() or pieces.scalars_of(name) != scalars for name in names):
        raise UserError(f"{pieces.folder}: cannot resume, {names[0]} and others shared no optimizer group then")
    for kind, dtype in kinds.items():
        target = flat.tensor.data if kind == VALUE else flat.state.get(kind)
        if target is None:
            target = flat.state[kind] = torch.zeros_like(flat.tensor.data, dtype=dtype)
        view = target.view(-1)
        for f in flat.fragments:
            shift = f.at - f.start

            def put(at: int, values: Tensor, view: Tensor = view, shift: int = shift) -> None:
                view[at + shift : at + shift + len(values)].copy_(values)

            pieces.read(kind, f.name, f.start, f.start + f.numel, put)
    for kind, value in scalars.items():
        flat.state[kind] = _scalar(value, flat, engine)
    for kind, tensor in pieces.bound_to_layout(n, [[f.name, f.start, f.numel, f.at] for f in flat.fragments]).items():
        flat.state[kind] = tensor.to(flat.tensor.device)


def _scalar(stored: Any, flat: fragments.Flat, engine: Any) -> Any:
    """A number of an optimizer's state (its count of updates), in the form the optimizer keeps it in."""
    optimizer = fragments.base_optimizer(engine)
    value = stored["value"] if isinstance(stored, dict) else stored
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return int(value)
    if not isinstance(stored, dict) and type(optimizer).__name__ != "AdamW":
        return value
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    dtype = DTYPES[stored["dtype"]] if isinstance(stored, dict) else torch.float32
    return torch.tensor(value, dtype=dtype, device=flat.tensor.device if on_device else "cpu")


def _load_frozen(model: nn.Module, path: Path, record: dict[str, Any]) -> None:
    folder = frozen_folder(path, record)
    if folder is None:
        return
    pieces = Pieces(folder)
    for name, p in model.named_parameters():
        if record["parameters"][name]["stored"] == "frozen":
            with fragments.held(p, writing=False, change=True) as (start, values):
                values.copy_(pieces.tensor(VALUE, name, start, start + len(values)))


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into a model, whole or divided by ZeRO-3: a rank reads what it holds. All ranks call this.

    Weights that ``state`` leaves to a pretrained folder stay as the model was built with them. Raises UserError where
    those are not the ones that ``where`` was trained with, or where names or shapes differ.
    """
    parameters = dict(model.named_parameters())
    stored = state if isinstance(state, Weights | StockWeights) else None
    shapes = stored.shapes if stored else {name: t.shape for name, t in state.items()}
    wrong = [name for name, p in parameters.items() if shapes.get(name) != full_shape(p)]
    if wrong:
        some = ", ".join(wrong[:3])
        raise UserError(f"{where}: is of another model; {len(wrong)} weights are absent or of another shape ({some})")
    if stored and stored.absent:
        frozen.compare(stored.origin, frozen.digests(model, stored.absent), where)
    with torch.no_grad():
        for name, p in parameters.items():
            with fragments.held(p, writing=False, change=True) as (start, values):
                stop = start + len(values)
                if stored is None:
                    values.copy_(state[name].reshape(-1)[start:stop])
                elif name not in stored.absent:
                    values.copy_(stored.part(name, start, stop))
                elif (more := stored.added(name, start, stop)) is not None:
                    values.copy_(values.float() + more.to(values.device))
                else:
                    continue
            fragments.forget_copy(p)
            p.from_checkpoint = True  # type: ignore[attr-defined]  # see frozen.from_pretrained_folders
        if stored:  # running statistics of batches
            pieces = Pieces(stored.path)
            for name, buffer in fragments.persistent_buffers(model).items():
                buffer.copy_(pieces.whole("buffer", name).view(buffer.shape))
