"""Checkpoints that are complete or absent: written under a partial name, renamed when every rank is done.

RNG needs no state: each step seeds it from (seed, step, rank). Data needs none either: the order is a function of the
step. A checkpoint is thus the engine's state and a manifest.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from medvlm.errors import UserError
from medvlm.training import distributed

MANIFEST = "medvlm.json"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".partial" and (p / MANIFEST).exists()]
    return sorted(found)


def newest(run: Path) -> Path:
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run}: holds no complete checkpoint (looked for {run}/checkpoints/step-*/{MANIFEST})")
    return found[-1]


def fingerprint(model: torch.nn.Module) -> str:
    """Of all parameter names and shapes: what makes two models the same to a checkpoint."""
    shapes = [f"{n}:{tuple(getattr(p, 'ds_shape', p.shape))}" for n, p in model.named_parameters()]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]


def save(engine: Any, run: Path, step: int, manifest: dict[str, Any], keep: int) -> Path:
    """All ranks call this. Raises UserError if it cannot be written; earlier checkpoints are then untouched."""
    folder = run / "checkpoints"
    final, partial = folder / f"step-{step:08d}", folder / f"step-{step:08d}.partial"
    if final.exists():
        return final
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    try:
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
        if distributed.rank() == 0:
            record = {**manifest, "step": step, "world_size": distributed.world_size(), "zero_stage": _stage(engine)}
            (partial / MANIFEST).write_text(json.dumps(record, indent=1))
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"{final}: the checkpoint could not be written ({reason}); is the disk full?") from error
    distributed.barrier()
    if distributed.rank() == 0:
        os.rename(partial, final)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return final


def resume(engine: Any, path: Path, manifest: dict[str, Any]) -> int:
    """Load a checkpoint into the engine; returns its step. Refuses one of another model, order or number of ranks."""
    record = json.loads((path / MANIFEST).read_text())
    for key, hint in {
        "model": "it belongs to another model",
        "order": "the training data, their mixture or packing, the seed or the global batch differ, so its position "
        "means nothing here",
    }.items():
        if record[key] != manifest[key]:
            raise UserError(f"{path}: cannot resume, {hint}; start a new run.name")
    now = {"world_size": distributed.world_size(), "zero_stage": _stage(engine)}
    for key, value in now.items():
        if record[key] != value:
            raise UserError(f"{path}: was written with {key} {record[key]}, this run has {value}; use the same")
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:  # DeepSpeed only warns
        raise UserError(f"{path}: DeepSpeed could not load it")
    return record["step"]


def consolidate(path: Path) -> dict[str, torch.Tensor]:
    """Full fp32 weights of a checkpoint, whatever ZeRO stage and number of ranks wrote it, frozen parts included."""
    stage = json.loads((path / MANIFEST).read_text())["zero_stage"]
    state: dict[str, torch.Tensor] = {}
    if stage < 3:  # whole in every rank's file; under ZeRO-1 DeepSpeed's own tool leaves the frozen ones out
        state = torch.load(path / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    if stage > 0:  # trained weights: the optimizer's fp32 copies
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state |= get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name)
    return {name: tensor.float() for name, tensor in state.items()}


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor] | None, where: str) -> None:
    """Copy full weights into a model, partitioned (ZeRO-3; ``state`` is then needed on rank 0 only) or not."""
    parameters = dict(model.named_parameters())
    if state is not None:
        wrong = [
            n for n, p in parameters.items() if n not in state or state[n].shape != getattr(p, "ds_shape", p.shape)
        ]
        if wrong:
            some = ", ".join(wrong[:3])
            raise UserError(
                f"{where}: is of another model; {len(wrong)} weights are absent or of another shape ({some})"
            )
    for name, p in parameters.items():
        if hasattr(p, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
                if state is not None:
                    p.copy_(state[name])
        else:
            assert state is not None
            with torch.no_grad():
                p.copy_(state[name])


def _stage(engine: Any) -> int:
    return engine.zero_optimization_stage()
