"""Preparation as a job array, on a real Slurm of two nodes."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from slurm import Cluster, slurm  # noqa: F401 - the fixture
from toy_archive import ARCHIVE, make_archive, prepare, tree

from data_prep import executors
from data_prep.pipeline import PipelineOptions, _Part
from medvlm.errors import UserError

ARRAY = {"executor": "submitit", "slurm": "partition=batch,time=5,cpus_per_task=1"}


@pytest.fixture
def nodes(slurm: Cluster, monkeypatch) -> Cluster:  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the tasks import the converter of the tests
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.2)
    return slurm


def made(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(out).items() if not name.startswith(".slurm")}


def test_an_array_gives_the_same_bytes_as_one_process(nodes, tmp_path):
    source = make_archive(tmp_path / "archive")
    prepare(source, tmp_path / "here")
    report = prepare(source, tmp_path / "array", parts=3, **ARRAY)
    assert report["complete"] and made(tmp_path / "array") == tree(tmp_path / "here")
    assert len(list((tmp_path / "array/.slurm").glob("*_result.pkl"))) == 3


def when_part_1_waits_at(pipe: Path, out: Path, act: Callable[[psutil.Process], None]) -> threading.Thread:
    """A thread that puts a pipe in a picture's place, which stops who reads it, and then acts on that task of Slurm."""
    pipe.unlink()
    os.mkfifo(pipe)

    def watch() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            for crumb in out.glob(".work/tmp/train-*000001*/at"):
                if crumb.read_bytes() == (2).to_bytes(8, "little"):
                    worker = psutil.Process(int(crumb.parent.name.rpartition(".")[2]))
                    act(next(p for p in worker.parents() if "submitit.core._submit" in p.cmdline()))
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_task_that_runs_out_of_time_is_queued_again_and_goes_on(nodes, tmp_path):
    source = make_archive(tmp_path / "archive", 20)
    pipe, out = source / "11.png", tmp_path / "out"
    picture = pipe.read_bytes()

    def time_out(task: psutil.Process) -> None:
        pipe.unlink()
        pipe.write_bytes(picture)
        job = task.environ()
        nodes.call("scancel", "--signal=USR2", f"{job['SLURM_ARRAY_JOB_ID']}_{job['SLURM_ARRAY_TASK_ID']}")  # as Slurm

    watcher = when_part_1_waits_at(pipe, out, time_out)
    assert prepare(source, out, parts=2, **ARRAY)["complete"]
    watcher.join()
    logs = "".join(path.read_text() for path in (out / ".slurm").glob("*_log.*"))
    assert "requeue" in logs.lower(), logs
    prepare(source, tmp_path / "here")
    assert made(out) == tree(tmp_path / "here")


def test_a_killed_task_is_named_and_the_same_command_goes_on(nodes, tmp_path):
    source = make_archive(tmp_path / "archive", 20)
    pipe, out = source / "11.png", tmp_path / "out"
    picture = pipe.read_bytes()
    killer = when_part_1_waits_at(pipe, out, psutil.Process.kill)  # the whole task, as the kernel or an operator may
    with pytest.raises(UserError, match=r"1 of 2 parts failed.*\n.*part 1/2 \(log .*err\): it ended without a result"):
        prepare(source, out, parts=2, **ARRAY)
    killer.join()
    pipe.unlink()
    pipe.write_bytes(picture)
    assert prepare(source, out, parts=2, **ARRAY)["complete"]
    prepare(source, tmp_path / "here")
    assert made(out) == tree(tmp_path / "here")


def test_an_error_of_a_part_is_its_own_sentence(tmp_path):
    source = make_archive(tmp_path / "archive", 140)
    for i in range(0, 40):
        (source / f"{i}.png").write_text("no image")
    part = _Part(ARCHIVE, source, str(tmp_path / "out"), PipelineOptions(parts=1, workers=0, progress=False), {})
    part.options = replace(part.options, executor="submitit")
    assert "samples seen so far are bad, more than --max-bad 0.01" in str(part(0))


def test_a_partition_that_does_not_exist_is_one_sentence(nodes, tmp_path):
    source = make_archive(tmp_path / "archive", 10)
    with pytest.raises(UserError, match=r"could not be submitted .*partition"):
        prepare(source, tmp_path / "out", parts=2, executor="submitit", slurm="partition=nowhere")


def test_submitit_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.2)
    source = make_archive(tmp_path / "archive", 20)
    assert prepare(source, tmp_path / "out", executor="submitit", cluster="local")["complete"]
    prepare(source, tmp_path / "here")
    assert made(tmp_path / "out") == tree(tmp_path / "here")


@pytest.mark.parametrize("text", ["partition", "partition=", "=cpu"])
def test_a_wrong_slurm_option_is_explained(text):
    with pytest.raises(UserError, match="is not NAME=VALUE"):
        executors.slurm_parameters(text)
