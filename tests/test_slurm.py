"""The job scripts, submitted to a real Slurm of two nodes: they train, are interrupted, go on, and evaluate."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO, launch
from slurm import Cluster, slurm, start  # noqa: F401 - the fixture
from test_training import metrics, weights
from toy import make_recipe, make_world

from medvlm.config.load import load_recipe
from medvlm.export.llava import write_llava
from medvlm.models.build import build_components, build_model

TRAIN, EVALUATE = REPO / "launchers/slurm/train.sbatch", REPO / "launchers/slurm/evaluate.sbatch"
ONE_RANK = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
HOLDS = 3


@pytest.fixture
def site(slurm: Cluster, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A folder to submit from, with toy data; its ``medvlm`` is this one, and may be told to wait for signals."""
    program = tmp_path / ".venv/bin/medvlm"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\nfrom paced import main\nmain()\n")
    program.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", f"{REPO}:{REPO / 'tests'}")
    monkeypatch.chdir(tmp_path)
    return make_world(tmp_path)


class Job:
    def __init__(self, cluster: Cluster, script: Path, *arguments: object, options: tuple[str, ...]):
        self.cluster = cluster
        self.number = cluster.call("sbatch", "--parsable", *options, str(script), *map(str, arguments))
        name = re.search(r"--job-name=(.*)", script.read_text()).group(1)
        self.path = Path(f"{name}-{self.number}.out")  # as the script's --output says: where it was submitted

    @property
    def state(self) -> str:
        shown = self.cluster.call("scontrol", "show", "job", self.number)
        return re.search(r"JobState=(\w+)", shown).group(1)

    @property
    def log(self) -> str:
        return self.path.read_text() if self.path.exists() else ""

    def wait(self, done: Callable[[], bool], seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not done():
            lost = time.monotonic() > end or self.state in ("FAILED", "TIMEOUT", "CANCELLED")
            assert done() or not lost, f"{self.state}\n{self.log}\n{self.cluster.logs()}"
            time.sleep(0.2)

    def ends_as(self, state: str) -> None:
        self.wait(lambda: self.state == state)

    def wait_until_held(self, times: int) -> None:
        self.wait(lambda: self.log.count("holding at step") == times)

    def wait_until_requeued(self) -> None:
        self.wait(lambda: self.state == "PENDING")
        self.cluster.call("scontrol", "update", f"JobId={self.number}", "TimeLimit=20")


def test_a_job_that_is_interrupted_three_times_equals_an_uninterrupted_run(slurm, site, monkeypatch):  # noqa: F811
    """By a drained node, its time limit and a job of higher priority: losses and weights are equal bit for bit."""
    options = {"training__steps": 12, "training__checkpoint_every": 3, "data__shuffle_turns": True}
    launch(make_recipe(site, "whole", **options))
    monkeypatch.setenv("HOLDS", str(HOLDS))
    several = ("--nodes=2", *ONE_RANK, "--exclusive", "--time=20", "--signal=B:USR1@55")
    job = Job(slurm, TRAIN, make_recipe(site, "broken", **options), options=several)

    job.wait_until_held(1)  # jobs stay on a drained node until their operator requeues them
    slurm.call("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=maintenance")
    slurm.call("scontrol", "requeue", job.number)
    job.wait_until_requeued()
    slurm.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    job.wait_until_held(2)
    slurm.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
    job.wait_until_requeued()
    job.wait_until_held(3)
    slurm.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.wait_until_requeued()
    job.ends_as("COMPLETED")

    keep = ("step", "loss", "grad_norm", "lr", "tokens", "batch_digest")
    whole, broken = ([{k: row[k] for k in keep} for row in metrics(site, name)] for name in ("whole", "broken"))
    assert whole == broken
    a, b = weights(site, "whole"), weights(site, "broken")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [int(n) for n in re.findall(r"start (\d): 2 ranks on n\[1-2\]", job.log)] == [1, 2, 3, 4]
    assert [int(n) for n in re.findall(r"checkpoint of step (\d+) written", job.log)] == [2, 4, 6]
    assert "2 rank(s), ZeRO-3" in job.log and job.log.count("finished at step 12") == 1
    states = slurm.call("sacct", "--completion", "--noheader", "--format=State", f"--jobs={job.number}").split()
    assert states[-1] == "COMPLETED" and len(states) == 4, "accounting has a line per start"


def test_an_exported_folder_is_evaluated(slurm: Cluster, site):  # noqa: F811
    config = load_recipe(str(make_recipe(site)))
    parts = build_components(config.model)
    write_llava(site / "model", dict(build_model(config.model, parts, torch.float32).named_parameters()), parts, config)
    parts.processor.save_pretrained(site / "model")
    arguments = (site / "model", "--data", site / "shards", "--limit", 2, "--max-new-tokens", 2)
    job = Job(slurm, EVALUATE, *arguments, options=ONE_RANK[1:])
    job.ends_as("COMPLETED")
    assert json.loads((site / "results/model/results.json").read_text())["task"] == "vqa"


def test_how_training_ends_says_whether_the_job_is_requeued(slurm: Cluster, site):  # noqa: F811
    """Programs stand for training: one is cancelled, one gets a signal before it listens, one fails."""
    program = site / ".venv/bin/medvlm"
    program.write_text("#!/bin/bash\ntrap 'exit 85' TERM\necho ready\nsleep 60 & wait\n")
    job = Job(slurm, TRAIN, "recipe", options=("--nodes=2", *ONE_RANK))
    job.wait(lambda: job.log.count("ready") == 2)
    slurm.call("scancel", job.number)
    job.ends_as("CANCELLED")
    assert "requeue" not in job.log and "ended with status 85" in job.log

    program.write_text("#!/bin/bash\necho ready\nexec sleep 60\n")
    job = Job(slurm, TRAIN, "recipe", options=("--nodes=2", *ONE_RANK))
    job.wait(lambda: job.log.count("ready") == 2)
    slurm.call("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until_requeued()
    assert "interrupted with status 138, the signal came before training listened: requeue" in job.log
    slurm.call("scancel", job.number)

    program.write_text("#!/bin/bash\nexit $((RANK * 3))\n")
    job = Job(slurm, TRAIN, "recipe", options=("--nodes=2", *ONE_RANK))
    job.ends_as("FAILED")
    assert "requeue" not in job.log and "ended with status 3" in job.log


def test_a_node_that_falls_silent_is_no_failure_of_the_run(site, monkeypatch):
    """The other rank meets it as an error, long before Slurm declares the node down."""
    monkeypatch.setenv("SLURM_WAIT", "1")
    rank0 = "until [[ -e silent ]]; do sleep 0.1; done; exit 1"
    program = f"#!/bin/bash\nif ((RANK == 0)); then {rank0}; fi\necho $$ $PPID > ids\nexec sleep 100\n"
    (site / ".venv/bin/medvlm").write_text(program)
    with start() as cluster:  # of its own, to be hurt
        job = Job(cluster, TRAIN, "recipe", options=("--nodes=2", *ONE_RANK))
        job.wait(lambda: (site / "ids").exists() and len((site / "ids").read_text().split()) == 2)
        node = [*map(int, (site / "ids").read_text().split()), int((cluster.folder / "slurmd.n2.pid").read_text())]
        try:
            for pid in node:
                os.kill(pid, signal.SIGSTOP)
            (site / "silent").touch()
            job.wait(lambda: "a node does not answer: requeue" in job.log)
        finally:
            for pid in node:
                os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(ProcessLookupError):  # awake again, Slurm may have ended it
            os.kill(node[0], signal.SIGKILL)


PLAIN = {"PATH": "/bin:/usr/bin"}


@pytest.mark.parametrize("script", [TRAIN, EVALUATE])
def test_job_scripts_are_refused_outside_of_slurm(script):
    done = subprocess.run(["bash", script, "recipe"], capture_output=True, text=True, env=PLAIN)
    assert done.returncode and "submit this script with sbatch" in done.stderr


def test_a_job_with_other_numbers_of_gpus_and_tasks_is_refused(tmp_path):
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_PER_NODE": "h100:4"}
    done = subprocess.run(["bash", TRAIN, "recipe"], capture_output=True, text=True, env=PLAIN | job)
    assert done.returncode == 2
    assert done.stderr == "--gpus-per-node is 4 and --ntasks-per-node is 8: give one task per GPU\n"
