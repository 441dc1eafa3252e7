"""The launchers, run for real: each trains two ranks under ZeRO-3, and says what is wrong in one sentence."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sshd
from conftest import REPO
from test_training import metrics
from toy import make_recipe, make_world

sys.path.insert(0, str(REPO / "launchers"))
import hostfile

LAUNCHERS = REPO / "launchers"
COMMANDS = {
    "local": ["bash", str(LAUNCHERS / "local.sh")],
    "torchrun": ["bash", str(LAUNCHERS / "torchrun.sh")],
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCHERS / "accelerate.yaml")),
        *("--num_processes", "2", "-m", "medvlm.cli", "train"),
    ],
    "multinode": ["bash", str(LAUNCHERS / "deepspeed_multinode.sh")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("launchers"))


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    if lacking := sshd.missing():
        pytest.skip(f"ssh: {lacking}")
    with sshd.server(tmp_path_factory.mktemp("ssh") / "server") as command:
        yield command


@pytest.fixture
def hosts(tmp_path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("".join(f"{host} slots=1\n" for host in sshd.HOSTS))
    return path


def start(launcher: str, *arguments: object, **environment: object) -> subprocess.Popen:
    variables = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    command = [*COMMANDS[launcher], *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPO, env=variables, text=True, stdout=pipe, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


@pytest.mark.parametrize("launcher", ["local", "torchrun", "accelerate"])
def test_each_launcher_of_one_machine_trains(folder, launcher):
    recipe = make_recipe(folder, launcher, training__steps=2)
    status, output = finish(start(launcher, recipe, "run.trackers=[]", NPROC=2))
    assert status == 0 and "2 rank(s), ZeRO-3" in output, output
    assert [row["step"] for row in metrics(folder, launcher)] == [1, 2]


def test_a_hostfile_trains_on_both_hosts_and_hands_on_the_status_of_an_interruption(folder, ssh, hosts):
    recipe = make_recipe(folder, "multinode", training__steps=100_000, training__checkpoint_every=100_000)
    launcher = start("multinode", recipe, HOSTFILE=hosts, SSH=ssh, MEDVLM_TEST='it\'s "passed" on')
    end = time.monotonic() + 200
    rows = folder / "runs/multinode/metrics.jsonl"
    while not rows.exists() or not rows.read_text():
        assert launcher.poll() is None and time.monotonic() < end, finish(launcher)
        time.sleep(0.2)
    ranks = [p for p in map(Path, os.listdir("/proc")) if is_rank(p.name, recipe)]
    passed_on = [b'MEDVLM_TEST=it\'s "passed" on' in Path("/proc", p, "environ").read_bytes() for p in ranks]
    assert len(ranks) == 2 and all(passed_on)
    os.kill(int(ranks[0].name), signal.SIGUSR1)
    status, output = finish(launcher)
    assert status == 85, output
    assert f"2 ranks on {', '.join(sshd.HOSTS)} meet at" in output and "2 rank(s), ZeRO-3" in output
    assert len(list((folder / "runs/multinode/checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [
        (2, "4,5", ""),
        (1, "MIG-1", "--num_gpus 1"),
        (8, None, "--num_gpus 8"),
        (0, None, "--num_gpus 2"),
        (0, "4,5", "--num_gpus 2"),
    ],
)
def test_gpus_that_were_chosen_are_taken(tmp_path, count, visible, expected):
    """DeepSpeed's launcher ignores CUDA_VISIBLE_DEVICES where it is given a number."""
    shutil.copytree(LAUNCHERS, tmp_path / "launchers")
    for name, body in {"python": f"echo {count}", "deepspeed": 'echo "$CUDA_VISIBLE_DEVICES: $@"'}.items():
        stub(tmp_path / ".venv/bin" / name, body)
    script = "source launchers/common.sh; MASTER_PORT=1 run_training R"
    variables = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    variables |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [f"{visible or ''}:", *expected.split(), *["--no_local_rank", "--master_port", "1"],
                                   *["--module", "medvlm.cli", "train", "R"]]  # fmt: skip


@pytest.mark.parametrize(("status", "restarts", "again"), [(85, 7, True), (86, 1, True), (86, 2, False), (2, 0, False)])
def test_a_job_that_makes_no_step_is_not_started_for_ever(tmp_path, status, restarts, again):
    stub(tmp_path / "srun", f"exit {status}")
    stub(tmp_path / "squeue", "echo RUNNING")
    stub(tmp_path / "scontrol", 'echo "asked: $@"; exit 1')  # else the script waits for its end
    given = {
        "SUBMIT_DIR": REPO,
        "NTASKS_PER_NODE": 1,
        "GPUS_PER_NODE": 0,
        "JOB_ID": 7,
        "NTASKS": 1,
        "JOB_NODELIST": "a",
    }
    variables = {f"SLURM_{name}": str(value) for name, value in {**given, "RESTART_COUNT": restarts}.items()}
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = ["bash", str(LAUNCHERS / "slurm/train.sbatch"), "R"]
    done = subprocess.run(script, env={**os.environ, **variables, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == status and ("asked: requeue 7" in done.stdout) == again
    assert ("give a longer --time" in done.stderr) == (status == 86 and not again)


def stub(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def is_rank(pid: str, recipe: Path) -> bool:
    """Whether a process is a rank of that recipe's run, and not a launcher or a loader's worker."""
    if not pid.isdigit():
        return False
    try:
        words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"medvlm.cli" in words and str(recipe).encode() in words and b"deepspeed.launcher.launch" not in words


def refused(folder: Path, text: str | None, **environment: object) -> str:
    """What the launcher says about a hostfile, in one line; nothing was trained."""
    path = folder / "hostfile"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    status, output = finish(start("multinode", make_recipe(folder, "refused"), HOSTFILE=path, **environment))
    assert status == 2 and output.startswith("deepspeed_multinode.sh: error: ") and output.count("\n") == 1, output
    assert not (folder / "runs/refused").exists()
    return output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "hostfile: no such hostfile"),
        ("# nothing\n", "lists no host"),
        ("node1 slots=2\nnode2 slot=2\n", "hostfile:2: 'node2 slot=2' is not a host and its number of ranks"),
        ("node1 slots=0\n", "hostfile:1: 'node1 slots=0' is not"),
        ("node1 slots=1\nnode1 slots=1\n", "hostfile:2: node1 is listed twice"),
    ],
)
def test_a_wrong_hostfile_is_one_sentence(folder, text, words):
    assert words in refused(folder, text)


def test_a_host_that_cannot_be_reached_is_named_before_anything_starts(folder, ssh):
    said = refused(folder, "127.0.0.2 slots=1\n127.0.0.4 slots=1\n", SSH=ssh)
    assert "127.0.0.4: cannot be reached over ssh" in said and "refused" in said and "127.0.0.2" not in said


def test_a_host_that_does_not_answer_is_named_in_bounded_time(monkeypatch):
    monkeypatch.setattr(hostfile, "SSH", ["sh", "-c", "sleep 30"])
    monkeypatch.setattr(hostfile, "SECONDS", 0.2)
    with pytest.raises(hostfile.Refused, match=r"^node7: no answer over ssh in 0.2 s; is the host up\?$"):
        hostfile.check({"node7": 8}, REPO, "0")


def test_a_host_without_the_repository_is_named(ssh, monkeypatch):
    monkeypatch.setattr(hostfile, "SSH", ssh.split())
    with pytest.raises(hostfile.Refused, match=r"127.0.0.2: /nowhere/.venv/bin/python is not there; .*; 127.0.0.3: "):
        hostfile.check(dict.fromkeys(sshd.HOSTS, 1), Path("/nowhere"), "0")


def test_a_port_in_use_is_named_before_anything_starts(folder, ssh):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        said = refused(folder, "127.0.0.2 slots=1\n", SSH=ssh, MASTER_PORT=port)
        assert f"127.0.0.2: port {port}: Address already in use" in said
        status, output = finish(start("torchrun", "recipe", RDZV=f"127.0.0.1:{port}"))
        assert status and f"port {port} cannot be used" in output and output.count("\n") == 1


def test_when_one_host_fails_the_others_are_stopped(ssh, monkeypatch, tmp_path, capfd):
    """A rank that waits for a dead one may wait for long."""
    commands = {0: "exit 3", 1: f"exec bash -c 'trap \"touch {tmp_path}/told; kill %1; exit 1\" TERM; sleep 60 & wait'"}
    monkeypatch.setattr(hostfile, "SSH", ssh.split())
    monkeypatch.setattr(hostfile, "GRACE", 1)
    monkeypatch.setattr(hostfile, "remote_line", lambda number, *_: commands[number])
    before = signal.getsignal(signal.SIGINT)
    try:
        assert hostfile.run(dict.fromkeys(sshd.HOSTS, 1), REPO, ("", ""), []) == 3
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert (tmp_path / "told").exists()
    assert "127.0.0.2: ended with status 3; the other hosts are stopped" in capfd.readouterr().err
