"""The work of deepspeed_multinode.sh: DeepSpeed's launcher on each host of a hostfile, started and ended over ssh.

    python launchers/hostfile.py HOSTFILE RECIPE [section.key=value ...]

Before any training starts, every host is asked whether it can be reached and has the repository, and the first one for
its address and a free port. When a host ends with an error, or this program is told to stop, the others are stopped.
"""

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SSH = [*shlex.split(os.environ.get("SSH", "ssh")), "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
SECONDS = 30  # for a host to answer
GRACE = 10  # seconds in which the other hosts may say what they saw of an error, before they are stopped
PASSED_ON = r"(NCCL|GLOO|UCX|TORCH|DS|OMP|HF|MEDVLM|WANDB|MLFLOW|TOKENIZERS|PYTHON)[A-Z_0-9]*$"
# The first host's address, and a port: the one asked for if it is free, any free one if none is asked for (0).
MEET = """import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try: s.bind(('', int(sys.argv[1])))
except OSError as error: sys.exit('port ' + sys.argv[1] + ': ' + error.strerror)
print(s.getsockname()[1])"""
# The first line of the input is what to run; the input's end, with this program or the connection, ends it.
REMOTE = """IFS= read -r line
exec 3<&0 0</dev/null
eval "$line" & run=$!
{ cat <&3 >/dev/null; kill -TERM $run; } 2>/dev/null & watch=$!
exec 3<&-
wait $run; status=$?
kill $watch 2>/dev/null
exit $status"""


class Refused(Exception):
    """One sentence for the user."""


def read_hosts(path: Path) -> dict[str, int]:
    """Slots by host, in the file's order."""
    if not path.is_file():
        raise Refused(f'{path}: no such hostfile; it has lines such as "node1 slots=8"')
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"([\w.@:-]+)\s+slots=([1-9]\d*)", text)
        if not found:
            raise Refused(f'{path}:{number}: {text!r} is not a host and its number of ranks, as in "node1 slots=8"')
        if found[1] in hosts:
            raise Refused(f"{path}:{number}: {found[1]} is listed twice")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise Refused(f'{path}: lists no host; write lines such as "node1 slots=8"')
    return hosts


def ask(host: str, command: str) -> str:
    """What a command on a host prints. Raises Refused, naming the host, where it fails or does not answer in time."""
    try:
        done = subprocess.run(
            [*SSH, host, command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"{host}: no answer over ssh in {SECONDS} s; is the host up?") from None
    if done.returncode == 255:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Refused(f"{host}: cannot be reached over ssh without a password ({reason})")
    if done.returncode:
        raise Refused(f"{host}: {done.stderr.strip() or f'{command} failed'}")
    return done.stdout.strip()


def check(hosts: dict[str, int], root: Path, port: str) -> tuple[str, str]:
    """Asks all hosts at once; returns where the ranks meet."""
    python = shlex.quote(f"{root}/.venv/bin/python")
    absent = shlex.quote(f"{root}/.venv/bin/python is not there; repository and .venv must have this path on all hosts")
    look = f"test -x {python} || {{ echo {absent} >&2; exit 1; }}"
    first = next(iter(hosts))
    meet = f"{look}; {python} -c {shlex.quote(MEET)} {shlex.quote(port)} && hostname -I"
    with ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(ask, host, meet if host == first else look) for host in hosts]
    errors = [str(answer.exception()) for answer in answers if answer.exception()]
    if errors:
        raise Refused("; ".join(errors))
    free, *addresses = answers[0].result().split()
    return os.environ.get("MASTER_ADDR") or (addresses or [first])[0], free


def remote_line(number: int, world: str, root: Path, where: tuple[str, str], arguments: list[str]) -> str:
    """What the host of this number runs, in one line."""
    exports = [
        f"export {name}={shlex.quote(value)};" for name, value in os.environ.items() if re.match(PASSED_ON, name)
    ]
    launch = [f"{root}/.venv/bin/python", "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    launch += [f"--node_rank={number}", f"--master_addr={where[0]}", f"--master_port={where[1]}", "--no_local_rank"]
    launch += ["--log_level=warning", "--module", "medvlm.cli", "train", *arguments]
    line = f"cd {shlex.quote(str(root))} && {' '.join(exports)} exec {shlex.join(launch)}"
    if "\n" in line:
        raise Refused("an argument, or an environment variable that is passed on, holds a line break")
    return line


def run(hosts: dict[str, int], root: Path, where: tuple[str, str], arguments: list[str]) -> int:
    """The largest exit status of the hosts: 85 where training was interrupted after a checkpoint."""
    slots = {host: list(range(count)) for host, count in hosts.items()}
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    lines = [remote_line(number, world, root, where, arguments) for number in range(len(hosts))]
    command = f"bash -c {shlex.quote(REMOTE)}"
    running = {host: subprocess.Popen([*SSH, host, command], stdin=subprocess.PIPE) for host in hosts}
    for process, line in zip(running.values(), lines, strict=True):
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
    failed = threading.Event()

    def stop(*_: object) -> None:
        failed.set()
        for process in running.values():
            process.stdin.close()

    def watch(host: str) -> int:
        status = running[host].wait()
        if status not in (0, 85, 86) and not failed.is_set():
            failed.set()
            print(f"{host}: ended with status {status}; the other hosts are stopped", file=sys.stderr, flush=True)
            timer = threading.Timer(GRACE, stop)
            timer.daemon = True
            timer.start()
        return abs(status)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with ThreadPoolExecutor(len(hosts)) as pool:
        return max(pool.map(watch, hosts))


def main() -> None:
    path, *arguments = sys.argv[1:]
    root = Path(__file__).resolve().parent.parent
    try:
        hosts = read_hosts(Path(path))
        where = check(hosts, root, os.environ.get("MASTER_PORT", "0"))
        print(f"{sum(hosts.values())} ranks on {', '.join(hosts)} meet at {where[0]}:{where[1]}", flush=True)
        sys.exit(run(hosts, root, where, arguments))
    except Refused as error:
        print(f"deepspeed_multinode.sh: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
