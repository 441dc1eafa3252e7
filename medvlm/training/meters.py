"""What a step reports: one JSON line for machines, trackers for curves, a progress bar for people."""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from medvlm.models.trainable import PartSummary
from medvlm.training.trackers import Trackers


def peak_memory_gib() -> float:
    """Of this rank: allocated on the GPU, or resident on a CPU run."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Meters:
    """Used by rank 0 only. Continues ``metrics.jsonl`` at ``start``, dropping lines of steps to be taken again."""

    def __init__(self, folder: Path, start: int, total: int, trackers: Trackers):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        whole = path.read_text().split("\n")[:-1] if path.exists() else []  # a kill may cut the last line short
        kept = [line for line in whole if _step(line) <= start]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(path)
        self.file = path.open("a")
        self.trackers = trackers
        self.total, self.console = total, Console(stderr=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not sys.stdout.isatty(),
        )
        self.progress.start()
        self.task = self.progress.add_task("training", total=total, completed=start, status="")

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        step = record["step"]
        self.trackers.log(record)
        if "loss" in record and "grad_norm" in record:
            status = f"loss {record['loss']:.4f}  {record['tokens_per_second']:.0f} tokens/s  MFU {record['mfu']:.1%}"
            self.progress.update(self.task, completed=step, status=status)
            if self.progress.disable and (step == 1 or step % max(1, self.total // 20) == 0 or step == self.total):
                print(f"step {step}/{self.total}  {status}  grad norm {record['grad_norm']:.3f}", flush=True)
        elif "eval_loss" in record:
            print(f"step {step}  evaluation loss {record['eval_loss']:.4f}", flush=True)

    def close(self, finished: bool = True) -> None:
        self.progress.stop()
        self.file.close()
        self.trackers.close(finished)


def _step(line: str) -> int:
    return json.loads(line)["step"]


def print_parts(summaries: list[PartSummary]) -> None:
    table = Table(title="What trains")
    for column in ("part", "train", "parameters", "trainable", "learning rate"):
        table.add_column(column, justify="left" if column in ("part", "train") else "right")
    for s in summaries:
        rate = f"{s.learning_rate:g}" if s.trainable else "-"
        table.add_row(s.name, s.train, f"{s.parameters:,}", f"{s.trainable:,}", rate)
    Console().print(table)
