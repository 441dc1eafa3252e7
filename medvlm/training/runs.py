"""What the folders of runs say: state, progress, curves and configuration, read from their files only."""

import fcntl
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from medvlm.errors import UserError
from medvlm.training import lifecycle
from medvlm.training.trackers import flat

CURVES = ("loss", "eval_loss", "grad_norm", "lr", "tokens_per_second")
SPACE = ("eval_rankme_image", "eval_rankme_text", "eval_uniformity_image", "eval_uniformity_text", "eval_modality_gap")
"""Of dual encoders: whether their joint space collapses."""


TITLES = {
    "loss": "training loss",
    "eval_loss": "evaluation loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate (highest of the parts)",
    "tokens_per_second": "tokens per second",
    "eval_rankme_image": "RankMe of images",
    "eval_rankme_text": "RankMe of texts",
    "eval_uniformity_image": "uniformity of images",
    "eval_uniformity_text": "uniformity of texts",
    "eval_modality_gap": "modality gap",
}


@dataclass
class RunInfo:
    name: str
    path: str
    state: str
    """running, finished, stopped (by stop_after), interrupted (a checkpoint was written), failed, died, or unknown."""
    step: int
    total: int | None
    eta_seconds: float | None
    loss: float | None
    eval_loss: float | None
    updated: float | None
    """When the last line of metrics.jsonl was written, in seconds since 1970."""
    checkpoints: list[str]
    reason: str | None


def find_runs(folder: Path) -> list[RunInfo]:
    """Runs directly in a folder, and the folder itself if it is one; the one that was active last comes first."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = [describe(path) for path in [folder, *sorted(folder.iterdir())] if (path / "config.yaml").is_file()]
    return sorted(found, key=lambda run: -(run.updated or 0))


def describe(run: Path) -> RunInfo:
    metrics = run / "metrics.jsonl"
    lines = lifecycle.tail(metrics)
    steps = [line for line in lines if "loss" in line]
    record = lifecycle.read(run)
    total, step = record.get("total"), lines[-1]["step"] if lines else 0
    state = record.get("state", "unknown")
    if state == "running" and not is_locked(run):
        state = "died"  # its process ended without a word: killed, or the machine went down
    eta = None
    if state == "running" and total and steps:
        eta = (total - step) * statistics.median(line["seconds"] for line in steps[-50:])
    return RunInfo(
        name=run.name,
        path=str(run),
        state=state,
        step=step,
        total=total,
        eta_seconds=eta,
        loss=steps[-1]["loss"] if steps else None,
        eval_loss=next((line["eval_loss"] for line in reversed(lines) if "eval_loss" in line), None),
        updated=metrics.stat().st_mtime if metrics.exists() else None,
        checkpoints=sorted(p.name for p in (run / "checkpoints").glob("step-*") if p.suffix != ".partial"),
        reason=record.get("reason") if state == "failed" else None,
    )


def is_locked(run: Path) -> bool:
    """Whether a process holds the run's lock (`medvlm.training.run_lock`), on any host of a file system with locks."""
    path = run / ".lock"
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """By name, (step, value), those of SPACE only where the run has them; ``lr`` is the highest of the parts.

    Raises UserError where there are none.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run}: has no metrics.jsonl; is it the folder of a run?")
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in (*CURVES, *SPACE)}
    with path.open() as file:
        for text in file:
            if not text.endswith("\n"):
                continue  # being written
            line = json.loads(text)
            for name in found:
                value = line.get(name)
                if value is not None:
                    found[name].append((line["step"], max(value.values()) if isinstance(value, dict) else value))
    return {name: points for name, points in found.items() if points or name in CURVES}


def summary(run: Path) -> dict[str, Any]:
    """Last and best values of a run's curves. The last loss is a mean over up to 20 steps, as batches differ."""
    found, info = curves(run), describe(run)
    values = {name: [value for _, value in points] for name, points in found.items()}
    last = values["loss"][-20:]
    return {
        "state": info.state,
        "steps": info.step,
        "last loss": statistics.fmean(last) if last else None,
        "last evaluation loss": info.eval_loss,
        "best evaluation loss": min(values["eval_loss"], default=None),
        "at step": min(found["eval_loss"], key=lambda point: point[1])[0] if found["eval_loss"] else None,
        "median gradient norm": statistics.median(values["grad_norm"]) if values["grad_norm"] else None,
        "peak learning rate": max(values["lr"], default=None),
        "median tokens/s": statistics.median(values["tokens_per_second"]) if values["tokens_per_second"] else None,
        **{f"last {TITLES[name]}": values[name][-1] for name in SPACE if name in values},
    }


def differences(runs: Iterable[Path]) -> dict[str, list[Any]]:
    """Settings in which runs differ, with the value of each; their names apart."""
    settings = []
    for run in runs:
        path = run / "config.yaml"
        if not path.is_file():
            raise UserError(f"{run}: is not a run (it has no config.yaml)")
        settings.append({key.replace("/", "."): value for key, value in flat(yaml.safe_load(path.read_text()))})
    keys = sorted(set().union(*settings) - {"run.name", "run.root", "description"})
    table = {key: [one.get(key) for one in settings] for key in keys}
    return {key: row for key, row in table.items() if any(value != row[0] for value in row)}


def as_json(infos: Iterable[RunInfo]) -> list[dict[str, Any]]:
    return [asdict(info) for info in infos]
