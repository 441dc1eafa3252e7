"""An OpenSSH server of this machine's own, at 127.0.0.2 and 127.0.0.3, with keys of its own, while a test runs."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

HOSTS = ("127.0.0.2", "127.0.0.3")
PROGRAMS = ("sshd", "ssh", "ssh-keygen")


def missing() -> str | None:
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install openssh-server)"
    return None if os.geteuid() == 0 else "sshd is started as root"


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """Yields the ``ssh`` command that reaches it. Other addresses of 127.* refuse the connection."""
    folder.mkdir(mode=0o700)
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    listen = "".join(f"ListenAddress {host}:{port}\n" for host in HOSTS)
    (folder / "sshd_config").write_text(
        f"{listen}HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\n"
    )
    (folder / "config").write_text(
        f"Host *\n Port {port}\n IdentityFile {folder}/user\n IdentitiesOnly yes\n LogLevel ERROR\n"
        " StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd refuses to start without
    sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        end = time.monotonic() + 10
        while "listening" not in (folder / "log").read_text():
            assert daemon.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
        yield f"ssh -F {folder}/config"
    finally:
        daemon.terminate()
        daemon.wait()
