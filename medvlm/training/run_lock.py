"""One run at a time in a folder."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from medvlm.errors import UserError
from medvlm.training import distributed

PATIENCE = 3.0  # seconds: a run that was just killed may take a moment to end
held: dict[Path, IO[str]] = {}
"""Locks end with their process, however it ends, and when their file is closed."""


def lock_run(folder: Path) -> None:
    """Keep a run's folder for this process group until it ends. All ranks call this.

    Raises UserError if another run has it. A POSIX lock, which NFS, Lustre (mounted with ``flock``) and local file
    systems know across hosts; where there are none, a line says so.
    """
    problem = _take(folder / ".lock") if distributed.rank() == 0 else ""
    if problem := distributed.gather(problem)[0]:
        raise UserError(f"{folder}: {problem}")


def lock_alone(folder: Path) -> None:
    """The same for a command of one process."""
    if problem := _take(folder / ".lock"):
        raise UserError(f"{folder}: {problem}")


def _take(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(
                    f"{path}: no locks on this file system ({error.strerror}): a second run here would not be noticed"
                )
                return ""
        if time.monotonic() > until:
            file.seek(0)
            return f"another run is at work in it ({file.read().strip()}); wait for it, or choose another run.name"
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    held[path] = file
    return ""
