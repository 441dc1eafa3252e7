"""Trackers read back by their own libraries, failures that training survives, states and notifications."""

import http.server
import json
import struct
import threading
from pathlib import Path

import pytest
from conftest import launch
from test_training import metrics
from toy import make_recipe

from medvlm.config.load import load_recipe
from medvlm.training import lifecycle, trackers

TOKEN = "token-7f3a91"  # of a notification, for nobody else to read


def holding_token(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def recipe(world: Path, name: str, *names: str, **options) -> Path:
    return make_recipe(world, name, run__trackers=list(names), training__steps=4, training__zero="zero1", **options)


def test_all_trackers_get_every_number_and_a_resumed_run_keeps_its_id(world, monkeypatch):
    path = recipe(world, "tracked", "tensorboard", "wandb", "mlflow", run__notify=f"true {TOKEN}")
    folder = world / "runs" / "tracked"
    for arguments in (["training.stop_after=2"], []):
        launch(path, *arguments, ranks=1, WANDB_MODE="offline")
        assert "wandb" in (folder / "trackers.json").read_text()
    assert not holding_token(world / "runs")
    rows = metrics(world, "tracked")
    losses = [row["loss"] for row in rows]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.value for e in board.Scalars("loss")] == pytest.approx(losses)
    assert [e.value for e in board.Scalars("lr/language_model")] == pytest.approx(
        [r["lr"]["language_model"] for r in rows]
    )
    assert len(board.Scalars("grad_norms/vision_tower")) == 4

    pytest.importorskip("mlflow", reason="mlflow-skinny is missing (pip install 'medvlm[trackers]')")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((world / "runs" / "mlruns").as_uri())
    ids = json.loads((folder / "trackers.json").read_text())
    history = client.get_metric_history(ids["mlflow"], "loss")
    assert {m.step: m.value for m in history} == pytest.approx(dict(zip(range(1, 5), losses, strict=True)))
    run = client.get_run(ids["mlflow"])
    assert run.info.status == "FINISHED" and run.data.params["training.zero"] == "zero1"

    found = {}
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        assert file.name == f"run-{ids['wandb']}.wandb"
        found |= wandb_losses(file)
    assert found == pytest.approx(dict(zip(range(1, 5), losses, strict=True)))


def wandb_losses(path: Path) -> dict[int, float]:
    """By step, from an offline file: 7 bytes, then LevelDB's log format, which holds W&B's own messages."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, found = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no record's head crosses a block
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "loss" in items:
                found[int(items["step"])] = float(items["loss"])
    return found


def test_wandb_takes_a_step_again(world, monkeypatch):
    """After a kill, or a rollback, that came later than its checkpoint."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = load_recipe(str(recipe(world, "again", "wandb")))
    config.run.dir.mkdir(parents=True)
    board = trackers.WandB(config, 0)
    for step, loss in ((4, 0.4), (5, 0.5), (3, 0.3), (4, 0.2)):
        board.log({"loss": loss}, step)
    board.close(finished=True)
    assert wandb_losses(next(config.run.dir.glob("wandb/offline-run-*/*.wandb"))) == {4: 0.2, 5: 0.5, 3: 0.3}


class Broken:
    def __init__(self, config, start):
        self.calls = 0

    def log(self, values, step):
        raise ConnectionError("server is gone")

    def close(self, finished):
        raise AssertionError("a tracker that failed is left alone")


class Working:
    def __init__(self, config, start):
        self.seen = seen.append

    def log(self, values, step):
        self.seen((step, values))

    def close(self, finished):
        self.seen(finished)


seen: list = []


def test_a_failing_tracker_is_named_once_and_the_others_go_on(world, monkeypatch, capsys):
    monkeypatch.setitem(trackers.KINDS, "wandb", Broken)
    monkeypatch.setitem(trackers.KINDS, "mlflow", Working)
    both = trackers.Trackers(load_recipe(str(recipe(world, "broken", "wandb", "mlflow"))), 0)
    for step in (1, 2):
        both.log({"step": step, "loss": 0.5, "lr": {"a": 0.1}, "batch_digest": "x"})
    both.close(finished=True)
    assert seen == [(1, {"loss": 0.5, "lr/a": 0.1}), (2, {"loss": 0.5, "lr/a": 0.1}), True]
    errors = capsys.readouterr().err
    assert errors.count("tracker wandb failed") == 1 and "server is gone" in errors


def test_training_survives_a_tracker_that_cannot_start(world):
    """MLflow is pointed at a folder that is a file."""
    (world / "file").write_text("")
    path = recipe(world, "survives", "mlflow")
    output = launch(path, ranks=1, MLFLOW_TRACKING_URI=(world / "file").as_uri())
    assert "tracker mlflow failed" in output
    assert len(metrics(world, "survives")) == 4


def test_a_tracker_that_is_not_installed_is_refused(world, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed; pip install 'medvlm"):
        trackers.check(["wandb"])


@pytest.fixture
def webhook():
    """An address, and the list of what is posted to it."""
    posted = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()


def test_start_stop_finish_and_failure_are_told(world, webhook):
    address, posted = webhook
    path = recipe(world, "told", run__notify=address)
    launch(path, "training.stop_after=2")
    launch(path)
    assert [(e["state"], e["step"]) for e in posted] == [
        ("running", 0),
        ("stopped", 2),
        ("running", 2),
        ("finished", 4),
    ]
    assert posted[-1]["text"] == "medvlm told: finished at step 4"
    assert json.loads((world / "runs" / "told" / lifecycle.FILE).read_text())["state"] == "finished"
    posted.clear()
    launch(path, "run.name=fails", "data.max_quarantined=0", "data.max_length=12", fails=True)
    assert [(e["state"], e["error"]) for e in posted] == [("running", None), ("failed", "UserError")]
    state = json.loads((world / "runs" / "fails" / lifecycle.FILE).read_text())
    assert state["state"] == "failed" and "quarantined" in state["reason"]
    assert "quarantined" not in json.dumps(posted)


def test_a_command_is_told_and_its_failure_is_survived(world, tmp_path):
    command = (
        f'echo "$MEDVLM_RUN $MEDVLM_STATE $MEDVLM_STEP" >> {tmp_path}/log; cat >> {tmp_path}/json; exit 3 # {TOKEN}'
    )
    output = launch(recipe(world, "command", run__notify=command), ranks=1)
    assert (tmp_path / "log").read_text() == "command running 0\ncommand finished 4\n"
    assert json.loads((tmp_path / "json").read_text().split("}")[0] + "}")["state"] == "running"
    assert "run.notify: running could not be told: exit status 3" in output
    assert not holding_token(world / "runs" / "command") and TOKEN not in output
