"""``medvlm runs``: states from files and locks, values by hand, a picture."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from medvlm import cli
from medvlm.cli_runs import duration
from medvlm.training import runs
from medvlm.training.runs_plot import moving_average


def make_run(folder: Path, name: str, state: str | None = None, steps: int = 40, rate: float = 1e-3, **more) -> Path:
    run = folder / name
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    (run / "checkpoints" / "step-00000040.partial").mkdir()
    settings = {"run": {"name": name}, "model": {"learning_rate": rate}, "training": {"steps": 100}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = []
    for step in range(1, steps + 1):
        loss, norm = 4 / (1 + step * rate * 100), 1 + step % 3
        rates = {"a": rate * step / steps, "b": 0.0}
        line = {"step": step, "loss": loss, "grad_norm": norm, "lr": rates, "seconds": 3.0, "tokens_per_second": 100.0}
        lines.append(line)
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": 3.0 - step / 100})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo')
    if state:
        (run / "state.json").write_text(json.dumps({"state": state, "total": 100, "since": 0, **more}))
    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    make_run(tmp_path, "done", "finished")
    make_run(tmp_path, "bad", "failed", reason="step 41: the loss is nan")
    make_run(tmp_path, "killed", "running")
    make_run(tmp_path, "old")
    (tmp_path / "mlruns").mkdir()
    run = make_run(tmp_path, "alive", "running")
    (run / ".lock").write_text("")
    script = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    holder.stdout.readline()
    yield tmp_path
    holder.communicate("\n")


def invoke(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == status, done.output
    return done.output if status == 0 else str(done.exception)


def test_states_progress_and_checkpoints(folder):
    found = {run["name"]: run for run in json.loads(invoke("runs", folder, "--json"))}
    states = {name: run["state"] for name, run in found.items()}
    expected = {"done": "finished", "bad": "failed", "killed": "died", "old": "unknown", "alive": "running"}
    assert states == expected
    alive = found["alive"]
    assert (alive["step"], alive["total"], alive["eta_seconds"]) == (40, 100, 180.0)
    assert alive["loss"] == pytest.approx(4 / 5) and alive["eval_loss"] == pytest.approx(2.6)
    assert alive["checkpoints"] == ["step-00000020"], "one that is being written is none"
    assert found["killed"]["eta_seconds"] is None
    table = invoke("runs", "list", folder)
    assert "step 41: the loss is nan" in table and "3 min" in table


def test_comparison_by_hand_and_its_picture(folder, tmp_path):
    other = make_run(folder, "faster", "finished", rate=2e-3)
    picture = tmp_path / "curves.png"
    arguments = ("runs", "compare", folder / "done", other, "--out", picture)
    values = json.loads(invoke(*arguments, "--json"))
    assert values["differences"] == {"model.learning_rate": [1e-3, 2e-3]}
    row = values["runs"][str(folder / "done")]
    assert row["last loss"] == pytest.approx(sum(4 / (1 + step / 10) for step in range(21, 41)) / 20)
    assert (row["best evaluation loss"], row["at step"]) == (pytest.approx(2.6), 40)
    assert row["median gradient norm"] == 2 and row["peak learning rate"] == 1e-3
    with Image.open(picture) as image:
        assert image.size == (1800, 960) and len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert "model.learning_rate" in invoke(*arguments)


def test_the_joint_space_of_dual_encoders_is_compared_too(folder, tmp_path):
    dual, other = make_run(tmp_path / "more", "dual", "finished"), folder / "done"
    path = dual / "metrics.jsonl"
    seen = [{"step": 41 + n, "eval_loss": 2.0, "eval_rankme_image": 9.0 - n, "eval_modality_gap": 0.5} for n in (0, 1)]
    path.write_text(path.read_text().rpartition("\n")[0] + "".join(f"\n{json.dumps(line)}" for line in seen) + "\n")
    arguments = ("runs", "compare", other, dual, "--out", tmp_path / "curves.png")
    values = json.loads(invoke(*arguments, "--json"))["runs"]
    assert values[str(dual)]["last RankMe of images"] == 8.0
    assert not any("RankMe" in name for name in values[str(other)])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1800, 1440), "two panels more, and the legend's, in three rows"
    assert "modality gap" in invoke(*arguments)


def test_mistakes_are_one_sentence(folder, tmp_path):
    assert "no such folder" in invoke("runs", folder / "nothing", status=1)
    assert "at least two" in invoke("runs", "compare", folder / "done", status=1)
    assert "metrics.jsonl" in invoke("runs", "compare", folder / "done", folder / "mlruns", status=1)
    assert "--out" in invoke("runs", "compare", folder / "done", folder / "old", "--out", tmp_path / "x.xyz", status=1)


def test_moving_average_and_durations():
    assert moving_average((1.0, 3.0, 8.0, 7.0), 3) == [2.0, 4.0, 6.0, 7.5]
    assert moving_average((1.0, 3.0), 1) == [1.0, 3.0]
    assert [duration(s) for s in (40, 720, 7500, 273600)] == ["40 s", "12 min", "2 h 05 min", "3 d 4 h"]


def test_a_line_without_tail_is_not_read_twice(tmp_path):
    path = make_run(tmp_path, "long", "finished", steps=3000) / "metrics.jsonl"
    assert runs.lifecycle.tail(path)[-1]["step"] == 3000
    assert len(runs.lifecycle.tail(path, size=1000)) < 10
