"""Writing checkpoints: every rank its own file, under a name that says "partial" until all are on the disk."""

import json
import shutil
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvlm.config.model import Model
from medvlm.errors import UserError
from medvlm.training import distributed
from medvlm.training.checkpoint import fragments, frozen
from medvlm.training.checkpoint.files import NAMES, Entry, write_safetensors
from medvlm.training.checkpoint.folder import (
    FORMAT,
    clean,
    complete,
    fingerprint,
    full_shape,
    missing,
    prune,
    rank_file,
    step_name,
)
from medvlm.training.checkpoint.pieces import VALUE, key


@dataclass
class Part:
    """What this rank writes into one folder."""

    folder: Path
    entries: list[Entry]
    starts: dict[str, int]
    scalars: dict[str, Any] = field(default_factory=dict)
    layouts: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        listed = {"starts": self.starts, "scalars": self.scalars, "layouts": self.layouts}
        return write_safetensors(self.folder / name, self.entries, {k: json.dumps(v) for k, v in listed.items()})


def identity(engine: Any, config: Model, grown: bool) -> dict[str, Any]:
    """What a manifest says of a model and its optimizer, whatever the step.

    ``grown``: the vocabulary was enlarged when the model was built.
    """
    origin = frozen.from_pretrained_folders(engine.module, config, grown)
    parameters = engine.module.named_parameters()
    return {
        "model": fingerprint(engine.module),
        "optimizer": type(fragments.base_optimizer(engine)).__name__,
        "parameters": {
            name: {
                "shape": list(full_shape(p)),
                "stored": "trained" if p.requires_grad else "origin" if name in origin else "frozen",
            }
            for name, p in parameters
        },
    }


class Saver:
    """Writes a run's checkpoints: a copy in memory at once, the files in a thread while training goes on.

    All ranks make the same calls. ``ready`` says whether this rank's files are on the disk; once it is so on every
    rank, `finish` gives the folder its name. ``background`` off: `save` waits for the disk.
    """

    def __init__(
        self,
        engine: Any,
        run: Path,
        manifest: dict[str, Any],
        keep: int,
        every: int | None = None,
        background: bool = True,
        saved: int | None = None,
    ):
        """``saved``: the step that the run goes on from, whose checkpoint is there."""
        self.engine, self.run, self.manifest = engine, run, manifest
        self.keep, self.every, self.background = keep, every, background
        self.copies: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.step, self.saved = 0, saved
        self.parts: list[Part] = []
        self.result: tuple[list[dict[str, Any]], str] = ([], "")

    @property
    def ready(self) -> bool:
        """Whether a checkpoint is pending of which this rank has nothing left to write, or has failed to."""
        return self.thread is not None and not self.thread.is_alive()

    def save(self, step: int) -> None:
        """Take a copy of the state after ``step`` updates and start to write it; waits for an earlier one first."""
        self.wait()
        if step == self.saved:  # not by a look at the folder: on a network drive ranks may see it differently
            return
        self.step = step
        self.parts = [*self._frozen(), self._trained(step)]
        copied = torch.cuda.Event() if torch.cuda.is_available() else None
        if copied:
            copied.record()
        self.thread = threading.Thread(target=self._write, args=(copied,), name="checkpoint", daemon=True)
        self.thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Until a pending checkpoint is complete."""
        if self.thread is not None:
            self.finish()

    def finish(self) -> None:
        """Complete the pending checkpoint. Raises UserError, on all ranks, if one could not write its part."""
        assert self.thread is not None
        self.thread.join()
        self.thread = None
        results = distributed.gather(self.result)
        if reason := next((reason for _, reason in results if reason), ""):
            self._give_up(reason)
        files = [
            {rank_file(rank, len(results)): r[n] for rank, (r, _) in enumerate(results)} for n in range(len(self.parts))
        ]
        problem = ""
        if distributed.rank() == 0:
            try:
                self._complete(files)
            except OSError as error:
                problem = str(error)
        if problem := distributed.gather(problem)[0]:
            self._give_up(problem)
        self.saved = self.step
        if distributed.rank() == 0:
            clean(self.run, before=self.step)  # other ranks may be at work on the next
            try:
                prune(self.run, self.keep, self.every)
            except OSError as error:  # of what is old; the new one is whole
                print(f"warning: an old checkpoint could not be removed: {error}", flush=True)

    def _give_up(self, reason: str) -> None:
        final = self.parts[-1].folder.with_suffix("")
        if distributed.rank() == 0:
            for part in self.parts:
                shutil.rmtree(part.folder, ignore_errors=True)
        raise UserError(f"{final}: the checkpoint could not be written ({reason}); is the disk full?")

    def _write(self, copied: Any) -> None:
        try:
            if copied:
                copied.synchronize()
            name = rank_file(distributed.rank(), distributed.world_size())
            self.result = [part.write(name) for part in self.parts], ""
        except Exception as error:  # told by `finish`, on all ranks
            self.result = [], (str(error) or type(error).__name__).splitlines()[0]

    def _complete(self, files: list[dict[str, Any]]) -> None:
        """Rank 0: the frozen weights first, as the checkpoint refers to them."""
        *before, last = zip(self.parts, files, strict=True)
        for part, listed in before:
            complete(part.folder, {"format": FORMAT, "files": listed})
        record = {
            "format": FORMAT,
            "step": self.step,
            "world_size": distributed.world_size(),
            "zero_stage": self.engine.zero_optimization_stage(),
            **self.manifest,
            "files": last[1],
        }
        final = complete(last[0].folder, record)
        if problem := missing(final):
            raise OSError(f"{problem} although it was written")

    def _frozen(self) -> list[Part]:
        """What does not train, if a pretrained folder does not give it, and the run has not stored it yet."""
        if "frozen" in self.manifest:
            return []
        model = self.engine.module
        names: dict[str, list[str]] = {}
        for name, values in self.manifest["parameters"].items():
            names.setdefault(values["stored"], []).append(name)
        origin = frozen.digests(model, names.get("origin", []))
        digest = "-".join(frozen.digests(model, names.get("frozen", [])).values())
        self.manifest["frozen"] = {"origin": origin, "folder": f"frozen-{digest}" if digest else None}
        folder = self.run / "checkpoints" / f"frozen-{digest}.partial"
        if not digest or distributed.gather(folder.with_suffix("").exists())[0]:
            return []
        parameters, entries, starts = dict(model.named_parameters()), [], {}
        for name in names["frozen"]:
            away = fragments.on_drive(parameters[name])
            with fragments.held(parameters[name], writing=True) as (start, values):
                if len(values):
                    starts[name], kept = start, values.clone() if away else values
                    entries.append(Entry(key(VALUE, name), kept.dtype, tuple(kept.shape), partial(_alone, kept)))
        return [Part(folder, entries, starts)]

    def _trained(self, step: int) -> Part:
        """What trains, with the optimizer's state."""
        part = Part(self.run / "checkpoints" / f"{step_name(step)}.partial", [], {})
        for n, flat in enumerate(fragments.flats(self.engine, writing=True)):
            tensors = {k: v for k, v in flat.state.items() if torch.is_tensor(v) and v.dim()}
            scalars = {k: _scalar(v) for k, v in flat.state.items() if k not in tensors}
            if any(v.shape != flat.tensor.shape for v in tensors.values()):
                # as of 8-bit optimizers: such states belong to this flat tensor as a whole
                if distributed.rank() == 0 or not flat.alike:
                    part.layouts[str(n)] = flat.layout
                    for kind, tensor in tensors.items():
                        self._add(part, f"{n}@{kind}", tensor, flat.lent)
                tensors = {}
            for f in flat.fragments:
                for kind, tensor in {VALUE: flat.tensor, **tensors}.items():
                    values = tensor.data.view(-1)[f.at : f.at + f.numel]
                    self._add(part, key(kind, f.name), values, flat.lent)
            part.starts |= {f.name: f.start for f in flat.fragments}
            part.scalars |= {f.name: scalars for f in flat.fragments if scalars}
        if distributed.rank() == 0:
            for name, buffer in fragments.persistent_buffers(self.engine.module).items():
                self._add(part, key("buffer", name), buffer)
        return part

    def _add(self, part: Part, name: str, tensor: Tensor, lent: bool = False) -> None:
        """In the background, write a copy: training goes on to change the tensor. Copies stay allocated from one
        checkpoint to the next, as touching new memory takes longer than copying."""
        if self.background or lent:
            copy = self.copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = self.copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            tensor = copy.copy_(tensor, non_blocking=True)
        part.entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), partial(_alone, tensor)))


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _scalar(value: Any) -> Any:
    return {"dtype": NAMES[value.dtype], "value": value.item()} if torch.is_tensor(value) else value


def save(engine: Any, run: Path, step: int, manifest: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint and wait for it. Raises UserError if it cannot be written; earlier ones are then untouched."""
    saver = Saver(engine, run, manifest, keep, background=False)
    saver.save(step)
    return run / "checkpoints" / step_name(step)
