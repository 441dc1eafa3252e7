"""Preparation as a job array, on a real Slurm of two nodes."""

import os
import threading
import time
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


def test_a_killed_task_is_named_and_the_same_command_goes_on(nodes, tmp_path):
    source = make_archive(tmp_path / "archive", 20)
    pipe, out = source / "11.png", tmp_path / "out"
    picture = pipe.read_bytes()
    pipe.unlink()
    os.mkfifo(pipe)  # part 1 waits here until it is killed

    def kill() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for crumb in out.glob(".work/tmp/train-*000001*/at"):
                if crumb.read_bytes() == (2).to_bytes(8, "little"):  # the whole task, as the kernel or an operator may
                    worker = psutil.Process(int(crumb.parent.name.rpartition(".")[2]))
                    task = next(p for p in worker.parents() if "submitit.core._submit" in p.cmdline())
                    task.kill()
                    return
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
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
    assert prepare(source, tmp_path / "out", parts=2, executor="submitit", cluster="local")["complete"]
    prepare(source, tmp_path / "here")
    assert made(tmp_path / "out") == tree(tmp_path / "here")


@pytest.mark.parametrize("text", ["partition", "partition=", "=cpu"])
def test_a_wrong_slurm_option_is_explained(text):
    with pytest.raises(UserError, match="is not NAME=VALUE"):
        executors.slurm_parameters(text)
