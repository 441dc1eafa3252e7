"""Updates that are not made: where loss or gradient is not finite, and, by policy, where they spike.

The decision falls before any weight or moment changes, on numbers that all ranks share. What was left out is listed in
``skipped.jsonl``, so that a resumed run leaves out the same, and for the same reasons.
"""

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from medvlm.config.schema import Training
from medvlm.training import checkpoint, distributed
from medvlm.training.boundary import Stop


@dataclass(frozen=True)
class Verdict:
    action: Literal["warn", "skip", "stop", "rollback"]
    reason: str


Judge = Callable[[float], Verdict | None]


class Gate:
    """Stands between DeepSpeed and the optimizer that it was given.

    At every ZeRO stage DeepSpeed knows the global gradient norm before it first calls that optimizer. A step that is
    refused here leaves weights and moments as they are, and DeepSpeed clears the gradients as after any other.
    """

    def __init__(self, engine: Any, optimizer: Any):
        self.engine, self.apply = engine, optimizer.step
        self.judge: Judge | None = None
        self.norm: float | None = None
        self.verdict: Verdict | None = None
        self.called = False
        optimizer.step = self._step

    def step(self, judge: Judge, norm: float | None) -> tuple[float, Verdict | None]:
        """``engine.step()`` unless ``judge`` refuses; ``norm`` where DeepSpeed does not compute it (ZeRO-0)."""
        self.judge, self.norm, self.verdict, self.called = judge, norm, None, False
        self.engine.step()
        if not self.called:  # the norm was not finite, and DeepSpeed dropped the step without a word
            self.norm = math.nan
            self.verdict = judge(math.nan)
        assert self.norm is not None
        return self.norm, self.verdict

    def _step(self, *arguments: Any, **options: Any) -> Any:
        if not self.called:
            self.called = True
            if self.norm is None:
                self.norm = float(self.engine.optimizer._global_grad_norm)
            assert self.judge is not None
            self.verdict = self.judge(self.norm)
        if self.verdict is None or self.verdict.action == "warn":
            return self.apply(*arguments, **options)
        return None


class Guard:
    """Judges each step, and keeps the record. Steps count from 0 here, and from 1 in files, as in metrics.jsonl."""

    def __init__(self, run: Path, training: Training, step: int):
        self.run, self.training = run, training
        self.rows: list[dict[str, Any]] = []
        self.history: deque[tuple[float, float]] = deque(maxlen=training.spike.window if training.spike else 0)
        self.begin(step)

    def begin(self, step: int) -> None:
        """Read what was left out, and losses and norms of the updates before ``step``, on rank 0 for all ranks."""
        found: list[Any] = [[], []]
        if distributed.rank() == 0:
            found[0] = _rows(self.run / "skipped.jsonl")
            rows = _rows(self.run / "metrics.jsonl") if self.history.maxlen else []
            made = [r for r in rows if "loss" in r and "skipped" not in r and r["step"] <= step]
            found[1] = [(r["loss"], r["grad_norm"]) for r in made[-(self.history.maxlen or 1) :]]
        torch.distributed.broadcast_object_list(found)
        self.rows = found[0]
        self.history.clear()
        self.history.extend(map(tuple, found[1]))

    def left_out(self, first: int, last: int) -> dict[int, str]:
        """The steps from ``first`` to ``last`` that a rollback leaves out altogether, with the reason."""
        spans = [(r["reason"], range(r["from"] - 1, r["step"])) for r in self.rows if r["action"] == "rollback"]
        return {step: reason for reason, span in spans for step in span if first <= step < last}

    def judge(self, step: int, loss: float, values: Mapping[str, float], norm: float) -> Verdict | None:
        """``values``: the similarity's learned numbers by name, the cause where they are not finite."""
        for row in self.rows:
            if row["step"] == step + 1 and row["action"] == "skip":
                return Verdict("skip", row["reason"])
        if not math.isfinite(loss):
            broken = [f", and so is the similarity's {k}" for k, v in values.items() if not math.isfinite(v)]
            return Verdict(self.training.non_finite, f"the loss is {loss}{''.join(broken)}")
        if not math.isfinite(norm):
            return Verdict(self.training.non_finite, "the gradient norm is not finite, though the loss is")
        spike = self.training.spike
        if spike and len(self.history) == spike.window:
            losses, norms = zip(*self.history, strict=True)
            for name, value, past, factor in (
                ("loss", loss, losses, spike.loss_factor),
                ("gradient norm", norm, norms, spike.grad_norm_factor),
            ):
                median = statistics.median(past)
                if factor and value > factor * median:
                    of = f"{factor:g} times {median:.4g}, the median of {len(past)} updates"
                    return Verdict(spike.action, f"the {name} {value:.4g} is above {of}")
        return None

    def decide(self, step: int, verdict: Verdict, suspects: Sequence[str], keys: Sequence[str]) -> Path | None:
        """Print and record a verdict. Returns the checkpoint to go back to; raises `Stop` where the run must not go on.

        ``suspects``: keys of this rank's batches whose loss is not finite; ``keys``: of the whole step. All ranks call
        this.
        """
        every, whole = [], []
        if distributed.rank() == 0:  # which may still be removing old ones
            every, whole = checkpoint.step_folders(self.run), checkpoint.checkpoints(self.run)
        told = distributed.gather((list(suspects), whole[-1:], [path for path in every if path not in whole]))
        found = {rank: mine for rank, (mine, *_) in enumerate(told) if mine}
        whose = "; ".join(f"rank {rank}: {_some(mine)}" for rank, mine in found.items()) or _some(keys)
        text = f"step {step + 1}: {verdict.reason} (samples of {whose})"
        if verdict.action == "stop":
            raise Stop(f"{text}; no update was made; training.non_finite=skip goes on without such steps")
        if verdict.action == "warn":
            self._say(text)
            return None
        row = {"step": step + 1, "action": "skip", "reason": verdict.reason, "ranks": list(found)}
        back = told[0][1][0] if verdict.action == "rollback" and told[0][1] else None
        text += "; no update was made"
        if back:
            row |= {"action": "rollback", "from": checkpoint.step_of(back) + 1}
            text += f"; back to {back.name}, and on from there with step {step + 2}"
            if damaged := [path.name for path in told[0][2] if path.name > back.name]:
                text += f" (damaged: {', '.join(damaged)})"
        row["keys"] = [key for mine in found.values() for key in mine] or list(keys)
        if not any((r["step"], r["action"]) == (row["step"], row["action"]) for r in self.rows):
            self.rows.append(row)
            if distributed.rank() == 0:
                _write(self.run / "skipped.jsonl", self.rows)
            self._say(text)
        count = sum(r["step"] <= step + 1 for r in self.rows)
        if count > self.training.max_skipped:
            raise Stop(f"{text}; that makes {count}, and training.max_skipped is {self.training.max_skipped}")
        return back

    def _say(self, text: str) -> None:
        if distributed.rank() == 0:
            print(text, flush=True)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:8]) + (" ..." if len(keys) > 8 else "")


def _rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line that a kill cut short is none."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Whole and on the disk before anything follows from it."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
