"""Curves for people elsewhere: TensorBoard, Weights & Biases, MLflow. ``metrics.jsonl`` is written in any case.

Trackers work in a thread of their own, so that a slow server does not hold up a step, and one that fails is dropped,
loudly: a run does not end because its curves cannot be drawn.
"""

import importlib.util
import json
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from medvlm.config.schema import RunConfig
from medvlm.errors import UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
PATIENCE = 60.0  # seconds that the end of a run waits for its trackers


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self, finished: bool) -> None: ...


class TensorBoard:
    def __init__(self, config: RunConfig, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(config.run.dir / "tensorboard"), purge_step=start + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        self.writer.close()


class WandB:
    """Offline with ``WANDB_MODE=offline``; ``wandb sync`` sends the folder later. A resumed run keeps its id."""

    def __init__(self, config: RunConfig, start: int):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "medvlm"),
            name=config.run.name,
            id=_remembered(config.run.dir, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            dir=str(config.run.dir),
            config=config.public(),
            settings=wandb.Settings(console="off", silent=True),
        )
        # an axis of its own: W&B's drops what is logged at a lower step than before, as after a kill or a rollback
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """To ``MLFLOW_TRACKING_URI``, by default a folder ``mlruns`` beside the runs. A resumed run keeps its id."""

    def __init__(self, config: RunConfig, start: int):
        # MLflow asks for this where files are to be its store: it develops its databases only
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        folder = (Path(config.run.root) / "mlruns").absolute()
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", folder.as_uri()))
        self.id = _remembered(config.run.dir, "mlflow", lambda: self._create(config))
        self.client.update_run(self.id, status="RUNNING")

    def _create(self, config: RunConfig) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "medvlm")
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        run = self.client.create_run(experiment, run_name=config.run.name)
        for key, value in flat(config.public()):
            self.client.log_param(run.info.run_id, key.replace("/", "."), str(value)[:500])
        return run.info.run_id

    def log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


KINDS: dict[str, Callable[[RunConfig, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Trackers:
    """Those of ``run.trackers``; used by rank 0 only. ``start`` is the step that the run goes on from."""

    def __init__(self, config: RunConfig, start: int):
        self.queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.finished = False
        self.thread = threading.Thread(target=self._work, args=(config, start), name="trackers", daemon=True)
        self.thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """A line of ``metrics.jsonl``: its numbers, with names of nested ones joined by a slash."""
        self.queue.put(record)

    def close(self, finished: bool) -> None:
        """Waits until everything is written, a minute at most."""
        self.finished = finished
        self.queue.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            shout(f"trackers: {self.queue.qsize()} records are not delivered after {PATIENCE:.0f} s; giving up")

    def _work(self, config: RunConfig, start: int) -> None:
        active: dict[str, Tracker] = {}

        def begin(name: str) -> None:
            active[name] = KINDS[name](config, start)

        for name in config.run.trackers:
            _guarded(name, begin, name)
        while (record := self.queue.get()) is not None:
            values = {k: float(v) for k, v in flat(record) if isinstance(v, int | float) and k != "step"}
            active = {n: t for n, t in active.items() if _guarded(n, t.log, values, record["step"])}
        for kind, tracker in active.items():
            _guarded(kind, tracker.close, self.finished)


def check(names: Iterable[str]) -> None:
    """Raises UserError where a package is not installed. All ranks call this, before anything is loaded."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"run.trackers: {name} is not installed; pip install 'medvlm[trackers]', or leave it out")


def flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def shout(message: str) -> None:
    print(f"medvlm: WARNING: {message}", file=sys.stderr, flush=True)


def _guarded(name: str, action: Callable[..., Any], *arguments: Any) -> bool:
    try:
        action(*arguments)
    except Exception as error:  # whatever a tracker raises, training goes on
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        shout(f"tracker {name} failed and is off for the rest of this run: {reason}")
        return False
    return True


def _remembered(folder: Path, name: str, create: Callable[[], str]) -> str:
    """An id that all sessions of a run share, kept in ``trackers.json``."""
    path = folder / "trackers.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        known[name] = create()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(known))
        os.replace(partial, path)
    return known[name]
