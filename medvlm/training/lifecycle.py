"""What state a run is in, for ``medvlm runs`` and for people who want to be told: ``state.json`` and ``run.notify``."""

import functools
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medvlm.config.schema import RunConfig
from medvlm.errors import UserError
from medvlm.training import preemption
from medvlm.training.trackers import shout

PATIENCE = 10  # seconds that a notification may take
FILE = "state.json"


def announced(train: Callable[..., int]) -> Callable[..., int]:
    """Around a function that trains a run and returns the exit status: states how it ends, and tells ``run.notify``."""

    @functools.wraps(train)
    def wrapped(config: RunConfig, *arguments: Any, **options: Any) -> int:
        begun = time.time()
        try:
            status = train(config, *arguments, **options)
        except preemption.Preempted:  # before the first step: the run is where it was
            raise
        except BaseException as error:
            _failed(config, error, begun)
            raise
        if _rank() == 0:
            state = read(config.run.dir)
            done = last_step(config.run.dir) >= state.get("total", 0)
            change(config, "interrupted" if status else "finished" if done else "stopped")
        return status

    return wrapped


def running(config: RunConfig, step: int, total: int) -> None:
    """Rank 0 calls this when the run's folder is its own."""
    now: dict[str, Any] = {"since": time.time(), "host": socket.gethostname(), "reason": None}
    change(config, "running", total=total, from_step=step, **now)


def change(config: RunConfig, state: str, kind: str = "", **more: Any) -> None:
    """Write the state, complete or not at all, and notify; ``kind`` is that of an error."""
    folder = config.run.dir
    path = folder / FILE
    record = {**read(folder), "state": state, "time": time.time(), **more}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1))
    os.rename(partial, path)
    notify(config, state, kind)


def read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    return json.loads(path.read_text()) if path.exists() else {}


def last_step(folder: Path) -> int:
    lines = tail(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def tail(path: Path, size: int = 2**18) -> list[dict[str, Any]]:
    """The last lines of a JSONL file; one that is being written is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - size)
        file.seek(start)
        text = file.read().decode(errors="replace")
    lines = text.splitlines()[1 if start else 0 :]
    if lines and not text.endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def notify(config: RunConfig, state: str, kind: str = "") -> None:
    """Post to a web address, or run a command. Names, numbers and the kind of an error only: its text may name data."""
    target = config.run.notify
    if not target:
        return
    step = last_step(config.run.dir)
    event = {"run": config.run.name, "state": state, "step": step, "host": socket.gethostname(), "error": kind or None}
    event["text"] = f"medvlm {config.run.name}: {state}{f' ({kind})' if kind else ''} at step {step}"
    try:
        if target.startswith(("http://", "https://")):
            request = urllib.request.Request(target, json.dumps(event).encode(), {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=PATIENCE).close()
        else:
            environment = {**os.environ, "MEDVLM_RUN": config.run.name, "MEDVLM_STATE": state, "MEDVLM_STEP": str(step)}
            subprocess.run(
                target, shell=True, check=True, timeout=PATIENCE, env=environment, input=json.dumps(event), text=True
            )
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        # the text of some errors holds the command or the address
        told = f"exit status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else ""
        shout(f"run.notify: {state} could not be told: {told or type(error).__name__}")


def _failed(config: RunConfig, error: BaseException, begun: float) -> None:
    """Any rank; one that is not rank 0 tells of what is no user's mistake, as rank 0 may never learn of it."""
    kind = type(error).__name__
    if _rank() and isinstance(error, UserError):
        return
    state = read(config.run.dir)
    if state.get("state") == "running" and state["since"] >= begun:  # this run, and the first rank that says so
        try:
            change(config, "failed", kind, reason=(str(error) or kind).strip().splitlines()[0], rank=_rank())
        except OSError as second:  # what it failed of is to be heard
            shout(f"{FILE} could not be written: {second}")
    elif _rank() == 0:  # the folder is not this run's yet, perhaps another's
        notify(config, "failed", kind)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
