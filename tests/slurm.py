"""A real Slurm cluster of two nodes on this machine, for as long as the tests run.

    from slurm import slurm  # the fixture: SLURM_CONF is set while it lives

Needs root and Debian's slurm-wlm and munge; the tests are skipped, naming what is missing, where they are not there.
Each node has 4 CPUs and, where device nodes may be made, 8 devices that Slurm takes for GPUs (clones of /dev/null).
Jobs in the partition ``high`` preempt those in ``batch``, which are requeued.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo", "munged", "munge")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job may start again only after cred_expire seconds
AuthInfo=socket={lab}/munge/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={lab}/state
SlurmdSpoolDir={lab}/spool/%n
SlurmctldPidFile={lab}/slurmctld.pid
SlurmdPidFile={lab}/slurmd.%n.pid
SlurmctldLogFile={lab}/log/slurmctld.log
SlurmdLogFile={lab}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={lab}/log/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MinJobAge=600
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,requeue_delay=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{gpus}
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs=4 RealMemory=4000 {gres}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """What this machine lacks to run a Slurm of its own, None where nothing."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd and slurmctld are started as root"


@dataclass(frozen=True)
class Cluster:
    """``folder`` holds slurm.conf and the daemons' logs."""

    folder: Path
    nodes: int

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def call(self, *command: str) -> str:
        """The output of a Slurm command, which must succeed."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def logs(self) -> str:
        return "\n".join(f"== {p}\n{p.read_text()[-3000:]}" for p in sorted((self.folder / "log").glob("*.log")))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A running cluster; SLURM_CONF points at it. Skips where Slurm is not installed."""
    if lacking := missing():
        pytest.skip(f"Slurm: {lacking}")
    with start() as cluster:
        yield cluster


@contextlib.contextmanager
def start(nodes: int = 2) -> Iterator[Cluster]:
    """Start daemons on free ports, wait until the nodes are idle, and stop exactly these daemons at the end."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path must be short
    cluster = Cluster(folder, nodes)
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ["SLURM_CONF"] = str(cluster.conf)
    os.environ["PATH"] = f"{before['PATH']}:/usr/sbin:/sbin"
    try:
        _configure(cluster)
        _daemons(cluster)
        yield cluster
    finally:
        _stop(cluster)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)


def _configure(cluster: Cluster) -> None:
    lab, host = cluster.folder, socket.gethostname().partition(".")[0]
    for name in ("state", "log", "munge", "dev", *(f"spool/n{n}" for n in range(1, cluster.nodes + 1))):
        (lab / name).mkdir(parents=True)
    lab.chmod(0o755)
    (lab / "munge" / "munge.key").write_bytes(secrets.token_bytes(128))
    (lab / "munge" / "munge.key").chmod(0o600)
    ports = _free_ports(1 + cluster.nodes)
    with_gpus = _fake_gpus(lab / "dev")
    text = CONFIG.format(
        host=host,
        lab=lab,
        nodes=cluster.nodes,
        ports=ports,
        node_ports=",".join(map(str, ports[1:])),
        gpus="GresTypes=gpu" if with_gpus else "",
        gres="Gres=gpu:8 State=UNKNOWN" if with_gpus else "State=UNKNOWN",
    )
    cluster.conf.write_text(text)
    gres = f"NodeName=n[1-{cluster.nodes}] Name=gpu File={lab}/dev/nvidia[0-7]\n" if with_gpus else ""
    (lab / "gres.conf").write_text(gres)
    keys = ("CgroupAutomount", "ConstrainCores", "ConstrainRAMSpace", "ConstrainDevices")
    (lab / "cgroup.conf").write_text("".join(f"{key}=no\n" for key in keys))


def _fake_gpus(folder: Path) -> bool:
    try:
        for n in range(8):
            os.mknod(folder / f"nvidia{n}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _daemons(cluster: Cluster) -> None:
    lab = cluster.folder
    munge = [f"--key-file={lab}/munge/munge.key", f"--socket={lab}/munge/munge.socket"]
    munge += [f"--pid-file={lab}/munge/munged.pid", f"--log-file={lab}/log/munged.log"]
    cluster.call("munged", "--force", *munge, f"--seed-file={lab}/munge/munge.seed")
    cluster.call("slurmctld", "-c", "-f", str(cluster.conf))
    for n in range(1, cluster.nodes + 1):
        cluster.call("slurmd", "-N", f"n{n}", "-f", str(cluster.conf))
    end = time.monotonic() + 30
    while time.monotonic() < end:
        answer = subprocess.run(["sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N"], capture_output=True)
        if len(answer.stdout.split()) == cluster.nodes:
            return
        time.sleep(0.1)
    raise AssertionError(f"the Slurm nodes did not come up\n{cluster.logs()}")


def _stop(cluster: Cluster) -> None:
    """Cancel jobs, then stop the daemons of this cluster, by their pid files."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        ids = subprocess.run(["squeue", "-h", "-o", "%A"], capture_output=True, text=True, timeout=10).stdout.split()
        if ids:
            subprocess.run(["scancel", *ids], capture_output=True, timeout=10)
            end = time.monotonic() + 10  # the nodes end their processes, by force after KillWait
            while subprocess.run(["squeue", "-h"], capture_output=True, timeout=10).stdout and time.monotonic() < end:
                time.sleep(0.2)
    files = [
        *cluster.folder.glob("slurmd.*.pid"),
        cluster.folder / "slurmctld.pid",
        cluster.folder / "munge/munged.pid",
    ]
    pids = [int(f.read_text()) for f in files if f.exists() and f.read_text().strip()]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + 5
        while pids and time.monotonic() < end:
            pids = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
            time.sleep(0.05)
